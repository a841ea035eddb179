"""Token ids that are kept on disk: the same as without, made once, and remade where a file is damaged."""

import pytest

from utils.models import tokenizer
from utils.models.tokenizer import tokenize, train_tokenizer

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
