"""Vectors of a corpus: encoded once, resumed after a kill, repaired after damage."""

import numpy as np
import pytest
from retrieval_cases import PASSAGES, Encoder, all_vectors, encode_all, make_corpus


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multistep-retrieve-summarize"


def test_vectors_are_written_shard_by_shard_and_mapped(tmp_path):
    encoder = Encoder()
    corpus = make_corpus(tmp_path, PASSAGES)
    vectors = encode_all(corpus.passages, encoder, tmp_path / "v")
    assert [len(texts) for texts in encoder.calls] == [16, 16, 16, 12]
    assert (vectors.count, vectors.dimension) == (60, 6)
    assert np.array_equal(all_vectors(vectors), Encoder()(PASSAGES))
    assert all(isinstance(shard, np.memmap) for _, shard in vectors.shards())
    assert [first for first, _ in vectors.shards()] == [0, 16, 32, 48]


def test_killed_encoding_goes_on_without_what_is_done(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        encode_all(PASSAGES, Encoder(fails_at=2), tmp_path / "v")
    (tmp_path / "v" / ".tmp_00000002.npy").write_bytes(b"half")
    again = Encoder()
    vectors = encode_all(PASSAGES, again, tmp_path / "v")
    assert [texts[0] for texts in again.calls] == ["passage 32", "passage 48"]
    assert np.array_equal(all_vectors(vectors), Encoder()(PASSAGES))
    assert not list((tmp_path / "v").glob(".*"))
    done = Encoder()
    encode_all(PASSAGES, done, tmp_path / "v")
    assert done.calls == []


def test_another_key_or_another_size_is_encoded_anew_and_other_files_are_left_alone(tmp_path):
    encode_all(PASSAGES, Encoder(), tmp_path / "v")
    (tmp_path / "v" / "notes.json").write_text("{}")
    for passages, key, shards in ((PASSAGES, "other", 4), (PASSAGES[:30], "other", 2)):
        encoder = Encoder(dimension=4)
        vectors = encode_all(passages, encoder, tmp_path / "v", key)
        assert len(encoder.calls) == shards
        assert all_vectors(vectors).shape == (len(passages), 4)
    assert sorted(path.name for path in (tmp_path / "v").glob("*")) == [
        "00000000.npy", "00000001.npy", "manifest.json", "notes.json",
    ]  # fmt: skip


def test_a_damaged_shard_is_made_anew(tmp_path):
    vectors = encode_all(PASSAGES, Encoder(), tmp_path / "v")
    file = tmp_path / "v" / "00000001.npy"
    whole = file.read_bytes()
    other_shape = Encoder(dimension=5)(PASSAGES[16:32])
    for damage in (
        lambda: file.write_bytes(whole[:-1]),
        lambda: file.write_bytes(whole + b"x"),
        lambda: file.write_bytes(b"x" + whole[1:]),
        lambda: file.write_bytes(b""),
        file.unlink,
        lambda: np.save(file, other_shape),
    ):
        damage()
        encoder = Encoder()
        encode_all(PASSAGES, encoder, tmp_path / "v")
        assert [texts[0] for texts in encoder.calls] == ["passage 16"]
        assert np.array_equal(all_vectors(vectors), Encoder()(PASSAGES))
    (tmp_path / "v" / "manifest.json").write_text("[1, 2")
    encoder = Encoder()
    encode_all(PASSAGES, encoder, tmp_path / "v")
    assert len(encoder.calls) == 4


def test_an_encoder_that_gives_another_dimension_than_the_shards_have_is_an_error(tmp_path):
    with pytest.raises(RuntimeError):
        encode_all(PASSAGES, Encoder(fails_at=1), tmp_path / "v")
    with pytest.raises(ValueError, match=r"encode gave \(16, 5\) for 16 texts, dimension 6"):
        encode_all(PASSAGES, Encoder(dimension=5), tmp_path / "v")
