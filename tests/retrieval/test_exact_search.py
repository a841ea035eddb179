"""Dense search in a corpus, against brute force."""

import numpy as np
import pytest
from accelerate import Accelerator
from retrieval_cases import PASSAGES, Encoder, all_vectors, encode_all

from utils.retrieval.exact_search import dense_search, recall_lost
from utils.retrieval.ranking import rank
from utils.retrieval.vectors import encode_corpus


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
