"""Searching a corpus: the same as plain computations, made once, and going on after a kill."""

import json
import random

import faiss
import numpy as np
import pytest
from accelerate import Accelerator
from conftest import ROOT, launch

from utils.data.corpus import load_corpus
from utils.files import write_jsonl
from utils.retrieval import faiss_index
from utils.retrieval.bm25 import _build_bm25, bm25_index, bm25_scores, bm25_search
from utils.retrieval.exact_search import dense_search, recall_lost
from utils.retrieval.faiss_index import approximate_index
from utils.retrieval.ranking import rank, reciprocal_rank_fusion
from utils.retrieval.vectors import encode_corpus

WORDS = "mill river bread runner running studies wheat flour stone water wheel baker".split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multistep-retrieve-summarize"


def make_corpus(tmp_path, texts):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    return load_corpus(tmp_path / "corpus.jsonl")


def random_texts(count, longest=8):
    generator = random.Random(5)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


# ---- BM25


@pytest.mark.parametrize("top_k", [1, 7, 400])
def test_bm25_search_equals_the_scores_of_all_passages_with_ties_in_order_of_the_corpus(tmp_path, monkeypatch, top_k):
    texts = [*random_texts(300), "the of", "?!"]
    monkeypatch.setattr("utils.retrieval.bm25.BM25_BLOCK", 64)
    queries = ["running mills", "bread bread water", "studying the wheels of bakers", "stone"]
    index = bm25_index(make_corpus(tmp_path, texts))
    expected = [[entry for entry in rank(scores, top_k) if entry[1] > 0] for scores in bm25_scores(texts, queries)]
    assert bm25_search(index, queries, top_k) == expected
    assert len(set(dict(expected[-1]).values())) < len(expected[-1]) or top_k == 1  # there are ties


def test_a_query_without_a_known_word_finds_nothing(tmp_path):
    index = bm25_index(make_corpus(tmp_path, ["A mill.", "?!"]))
    assert bm25_search(index, ["", "the", "?!", "unheard", "mill"], 5)[:4] == [[], [], [], []]
    assert bm25_search(index, [], 5) == []
    without_words = bm25_index(make_corpus(tmp_path, ["the of and", "?!"]))
    assert bm25_search(without_words, ["the mill"], 5) == [[]]


def test_bm25_index_is_built_once_and_mapped_and_made_anew_for_other_texts_or_where_it_is_damaged(
    tmp_path, cache, monkeypatch
):
    builds, build = [], _build_bm25
    monkeypatch.setattr("utils.retrieval.bm25._build_bm25", lambda *args: builds.append(1) or build(*args))
    texts = random_texts(50)
    corpus = make_corpus(tmp_path, texts)
    expected = bm25_search(bm25_index(corpus, tmp_path / "a"), ["bread"], 9)
    index = bm25_index(corpus, tmp_path / "a")
    assert len(builds) == 1
    assert isinstance(index.scores["data"], np.memmap) and isinstance(index.scores["indices"], np.memmap)
    assert index.scores["data"].dtype.itemsize == index.scores["indices"].dtype.itemsize == 4
    (folder,) = (path for path in (tmp_path / "a").iterdir() if path.is_dir())
    for file in folder.iterdir():
        whole = file.read_bytes()
        for damaged in (None, whole[:-1], b""):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            builds.clear()
            assert bm25_search(bm25_index(corpus, tmp_path / "a"), ["bread"], 9) == expected
            assert len(builds) == 1, file
    assert not list((tmp_path / "a").glob(".*"))
    builds.clear()
    for each, stopwords in ((corpus, "en"), (corpus, "en_plus"), (make_corpus(tmp_path, texts[1:]), "en")):
        bm25_index(each, stopwords=stopwords)
    assert len(builds) == len([path for path in cache.glob("bm25_*") if path.is_dir()]) == 3


# ---- vectors


class Encoder:
    """Vectors that depend on the text alone; counts the calls, and fails in the `fails_at`-th."""

    def __init__(self, dimension=6, fails_at=None):
        self.dimension, self.fails_at, self.calls = dimension, fails_at, []

    def __call__(self, texts):
        if len(self.calls) == self.fails_at:
            raise RuntimeError("killed")
        self.calls.append(texts)
        rows = [np.random.default_rng(list(text.encode())).normal(size=self.dimension) for text in texts]
        return np.array(rows, dtype=np.float32)


def encode_all(passages, encoder, folder, key="k", **options):
    options = {"shard_size": 16} | options
    return encode_corpus(passages, encoder, folder, key=key, accelerator=Accelerator(), **options)


def all_vectors(vectors):
    return np.concatenate([shard for _, shard in vectors.shards()])


PASSAGES = [f"passage {number}" for number in range(60)]


def test_vectors_are_written_shard_by_shard_and_mapped(tmp_path):
    encoder, polls = Encoder(), []
    corpus = make_corpus(tmp_path, PASSAGES)
    vectors = encode_all(corpus.passages, encoder, tmp_path / "v", poll=lambda: polls.append(1))
    assert [len(texts) for texts in encoder.calls] == [16, 16, 16, 12] and len(polls) == 4
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


# ---- dense search


def brute_force(queries, vectors, top_k):
    return [rank(row, top_k) for row in queries @ all_vectors(vectors).T]


@pytest.mark.parametrize("top_k", [1, 9, 20, 100])
def test_flat_search_equals_brute_force_over_several_shards(tmp_path, top_k):
    vectors = encode_all(PASSAGES, Encoder(), tmp_path / "v")
    queries = Encoder()(["one", "two", "three"])
    found, expected = dense_search(queries, vectors, top_k), brute_force(queries, vectors, top_k)
    assert [[passage for passage, _ in ranking] for ranking in found] == [
        [passage for passage, _ in ranking] for ranking in expected
    ]
    for ours, theirs in zip(found, expected, strict=True):
        assert dict(ours) == pytest.approx(dict(theirs), abs=1e-5)
    assert dense_search(queries[:0], vectors, top_k) == []


@pytest.mark.parametrize("top_k", [3, 70, 100, 130, 400])
def test_equal_scores_stay_in_order_of_the_corpus_within_and_across_shards(tmp_path, top_k):
    grades = np.random.default_rng(2).integers(0, 5, size=400)

    def encode(texts):  # whole numbers, so that scores are exact, and few, so that most are equal
        return np.array([[grades[int(text)], 1] for text in texts], dtype=np.float32)

    vectors = encode_all([str(number) for number in range(400)], encode, tmp_path / "v", shard_size=300)
    queries = np.array([[1, 0], [0, 1], [-1, 2]], dtype=np.float32)
    assert dense_search(queries, vectors, top_k) == brute_force(queries, vectors, top_k)


def test_query_vectors_of_another_dimension_and_unknown_indexes_are_refused(tmp_path):
    vectors = encode_all(PASSAGES, Encoder(), tmp_path / "v")
    with pytest.raises(ValueError, match="those of the passages have 6"):
        dense_search(np.zeros((2, 5)), vectors, 3)
    with pytest.raises(ValueError, match="choose flat, ivf or hnsw"):
        dense_search(np.zeros((2, 6)), vectors, 3, index="lsh")


@pytest.fixture(scope="module")
def clustered(tmp_path_factory):
    """3,000 unit vectors around 60 centres, and 40 queries near some of them."""
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(60, 16))
    rows = centres[rng.integers(60, size=3040)] + 0.3 * rng.normal(size=(3040, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    vectors = encode_corpus(
        [str(number) for number in range(3000)],
        lambda texts: rows[[int(text) for text in texts]],
        tmp_path_factory.mktemp("clustered"),
        key="clustered",
        accelerator=Accelerator(),
        shard_size=700,
    )
    return vectors, rows[3000:]


@pytest.mark.parametrize("index, settings", [("ivf", {"nprobe": 8}), ("hnsw", {})])
def test_approximate_indexes_find_nine_of_ten_and_the_loss_is_measured(clustered, index, settings):
    vectors, queries = clustered
    exact = dense_search(queries, vectors, 10)
    found = dense_search(queries, vectors, 10, index=index, **settings)
    shares = [len(dict(a).keys() & dict(b).keys()) / 10 for a, b in zip(exact, found, strict=True)]
    assert np.mean(shares) >= 0.9
    assert recall_lost(queries, vectors, 10, index=index, **settings) == pytest.approx(100 * (1 - np.mean(shares)))
    for ranking in found:
        assert [score for _, score in ranking] == sorted((score for _, score in ranking), reverse=True)


def test_measured_loss_is_that_of_a_bad_search(clustered):
    vectors, queries = clustered
    exact = dense_search(queries, vectors, 100)
    found = dense_search(queries, vectors, 100, index="ivf", nprobe=1)
    lost = recall_lost(queries, vectors, 100, index="ivf", nprobe=1)
    shares = [len(dict(a).keys() & dict(b).keys()) / 100 for a, b in zip(exact, found, strict=True)]
    assert lost == pytest.approx(100 * (1 - np.mean(shares))) and lost > 5
    assert any(len(ranking) < 100 for ranking in found)  # a cluster may hold less: then so does the ranking
    assert recall_lost(queries, vectors, 100, index="flat") == 0
    few = recall_lost(queries, vectors, 100, index="ivf", nprobe=1, max_queries=2)
    assert few == pytest.approx(100 * (1 - np.mean([shares[0], shares[-1]])))


def test_approximate_index_is_built_once_and_mapped_and_anew_for_other_vectors_or_where_it_is_damaged(
    tmp_path, monkeypatch
):
    builds = []
    for kind in ("ivf", "hnsw"):
        build = getattr(faiss_index, f"_build_{kind}")
        monkeypatch.setattr(
            faiss_index, f"_build_{kind}", lambda vectors, build=build: builds.append(1) or build(vectors)
        )
    vectors = encode_all(PASSAGES, Encoder(), tmp_path / "v")
    queries = Encoder()(["one"])
    for kind in ("ivf", "hnsw"):
        expected = dense_search(queries, vectors, 5)
        for damage in (None, None, b"half", "json"):
            if damage == "json":
                (tmp_path / "v" / f"{kind}.json").unlink()
            elif damage:
                (tmp_path / "v" / f"{kind}.faiss").write_bytes(damage)
            assert [p for p, _ in dense_search(queries, vectors, 5, index=kind)[0]] == [p for p, _ in expected[0]]
        assert len(builds) == 3
        builds.clear()
    mapped = approximate_index(vectors, "ivf")
    assert isinstance(faiss.downcast_InvertedLists(mapped.invlists), faiss.OnDiskInvertedLists)
    others = encode_all(PASSAGES[:50], Encoder(), tmp_path / "v", "other")
    assert not (tmp_path / "v" / "ivf.faiss").exists()
    assert len(dense_search(queries, others, 60, index="ivf")[0]) == 50


def test_lexical_and_dense_rankings_are_fused_by_rank(tmp_path):
    texts = random_texts(40)
    corpus = make_corpus(tmp_path, texts)
    lexical = bm25_search(bm25_index(corpus), ["bread"], 5)
    dense = dense_search(Encoder()(["bread"]), encode_all(corpus.passages, Encoder(), tmp_path / "v"), 5)
    (fused,) = [reciprocal_rank_fusion(both)[:5] for both in zip(lexical, dense, strict=True)]
    assert fused[0][0] in (lexical[0][0][0], dense[0][0][0]) and len(fused) == 5


# ---- several processes

TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {root!r})
import numpy as np
from accelerate import Accelerator
from utils.retrieval import bm25
from utils.retrieval.bm25 import bm25_index, bm25_search
from utils.retrieval.exact_search import dense_search
from utils.retrieval.vectors import encode_corpus
from utils.data.corpus import load_corpus

accelerator, folder = Accelerator(), {folder!r}
rank, calls, builds, build = accelerator.process_index, [], [], bm25._build_bm25
bm25._build_bm25 = lambda *args: builds.append(1) or build(*args)

def encode(texts):
    calls.append(len(texts))
    return np.array([[len(text), text.count("e")] for text in texts], dtype=np.float32)

corpus = load_corpus(folder + "/corpus.jsonl")
lexical = bm25_search(bm25_index(corpus), ["bread"], 5)
settings = {{"key": "k", "accelerator": accelerator, "shard_size": 16}}
encode_corpus(corpus.passages, encode, folder + "/v", **settings)
accelerator.wait_for_everyone()
if rank == 0:
    open(folder + "/v/00000001.npy", "wb").close()
accelerator.wait_for_everyone()
vectors = encode_corpus(corpus.passages, encode, folder + "/v", **settings)
dense = dense_search(np.ones((1, 2)), vectors, 5)
found = {{"calls": calls, "builds": len(builds), "lexical": lexical, "dense": dense, "dimension": vectors.dimension}}
with open(f"{{folder}}/{{rank}}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()
"""


def test_two_processes_build_once_encode_together_and_find_the_same(tmp_path):
    make_corpus(tmp_path, random_texts(40))
    (tmp_path / "run.py").write_text(TWO_PROCESSES.format(root=str(ROOT), folder=str(tmp_path)))
    result = launch(tmp_path / "run.py", processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["calls"] == second["calls"] == [16, 16, 8, 16]  # the second time the damaged shard only
    assert first.pop("builds") + second.pop("builds") == 1
    assert first == second and first["dimension"] == 2
    assert [len(ranking) for ranking in first["dense"] + first["lexical"]] == [5, 5]
