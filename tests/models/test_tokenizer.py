"""Token ids that are kept on disk: the same as without, made once, and remade where a file is damaged."""

import numpy as np
import pytest

from utils.models import tokenizer
from utils.models.tokenizer import describe_cut, tokenize, train_tokenizer

TEXTS = [f"The committee saw {number} mills, and mended {number % 7}." for number in range(300)]


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, vocab_size=300)


@pytest.fixture
def calls(bpe, tmp_path, monkeypatch):
    """An entry for each real call of a tokenizer; tokens are kept from the first character on, in the test's folder."""
    counted, plain = [], type(bpe).__call__
    monkeypatch.setattr(type(bpe), "__call__", lambda *args, **kwargs: counted.append(1) or plain(*args, **kwargs))
    monkeypatch.setattr(tokenizer, "CACHED_FROM", 0)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return counted


def test_texts_are_tokenized_once_and_other_texts_options_or_tokenizers_anew(bpe, calls):
    expected = bpe(TEXTS, truncation=True, max_length=9)["input_ids"]
    calls.clear()
    for _ in range(2):
        assert tokenize(bpe, TEXTS, truncation=True, max_length=9) == expected
    assert len(calls) == 1
    assert tokenize(bpe, TEXTS, truncation=True, max_length=8) != expected
    assert tokenize(bpe, TEXTS[::-1], truncation=True, max_length=9) == expected[::-1]
    assert tokenize(train_tokenizer(TEXTS[:9], vocab_size=270), TEXTS, truncation=True, max_length=9) != expected
    assert len(calls) == 4
    assert tokenize(bpe, []) == []


@pytest.mark.parametrize("place", [0, 40, -3])
def test_a_damaged_file_is_made_anew(bpe, calls, tmp_path, place):
    expected = tokenize(bpe, TEXTS)
    (file,) = tmp_path.rglob("*.arrow")
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert tokenize(bpe, TEXTS) == expected
    assert tokenize(bpe, TEXTS) == expected
    assert len(calls) == 2


def test_where_nothing_can_be_written_the_ids_are_kept_for_this_run_only(bpe, calls, tmp_path, caplog):
    (tmp_path / "multistep-retrieve-summarize").write_text("a file in its place")
    expected = bpe(TEXTS)["input_ids"]
    calls.clear()
    for _ in range(2):
        assert tokenize(bpe, TEXTS) == expected
    assert len(calls) == 1
    assert "--cache_dir" in caplog.text and len(caplog.records) <= 1


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_lengths_before_the_cut_are_those_without_it_and_cost_no_other_call(bpe, calls, monkeypatch, is_cached, side):
    monkeypatch.setattr(bpe, "truncation_side", side)
    texts = [*TEXTS, "", "mills " * 40]
    whole, cut = bpe(texts)["input_ids"], bpe(texts, truncation=True, max_length=7)["input_ids"]
    monkeypatch.setattr(tokenizer, "CACHED_FROM", 0 if is_cached else 10**9)
    calls.clear()
    for made in (1, 1 if is_cached else 2):
        lengths = []
        assert tokenize(bpe, texts, whole=lengths, truncation=True, max_length=7) == cut
        assert np.concatenate(lengths).tolist() == list(map(len, whole))
        assert len(calls) == made


def test_a_tokenizer_that_forgets_what_it_cut_is_asked_again_about_full_texts_only(bpe, monkeypatch):
    asked = []

    class Slow:
        def __call__(self, text, **options):
            asked.append(len(text))
            return {"input_ids": bpe(text, **options)["input_ids"]}

    texts, lengths = ["a mill", *TEXTS[:3]], []
    assert tokenize(Slow(), texts, whole=lengths, truncation=True, max_length=7)
    assert np.concatenate(lengths).tolist() == [len(ids) for ids in bpe(texts)["input_ids"]]
    assert asked == [4, 3]


def test_a_cut_is_described_with_its_share_and_flag_and_none_is_not():
    lengths = {"references": [3, 9, 1200, 5], "others": [8], "none": []}
    told = "cut to 8 tokens by --max_target_length: 2 of 4 references (50.0%, the longest has 1,200)"
    assert describe_cut("max_target_length", 8, lengths) == told
    assert describe_cut("max_target_length", 1200, lengths) == ""
