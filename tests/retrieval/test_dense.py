"""Ranking by a retriever's vectors, against dot products."""

import numpy as np
import pytest
from retrieval_cases import COLOURS, MONEY, make_example

from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.dense import dense_rankings, remember_passages, retriever_rankings
from utils.retrieval.ranking import combine, fuse_scores


def test_dense_rankings_equal_dot_products_and_encode_each_text_once():
    generator = np.random.default_rng(5)
    vectors, encoded = {}, []

    def encode(texts, kind):
        encoded.extend((kind, text) for text in texts)
        return np.stack([vectors.setdefault((kind, text), generator.normal(size=6)) for text in texts])

    examples = [
        make_example("1", "q1", COLOURS),
        make_example("2", "q2", MONEY),
        make_example("3", "q2", COLOURS),
        make_example("4", "q1", COLOURS),
    ]
    rankings = dense_rankings(examples, encode, top_k=3)
    assert sorted(encoded) == sorted(
        [("passage", text) for text in COLOURS.passages + MONEY.passages] + [("query", "q1"), ("query", "q2")]
    )
    for example, ranking in zip(examples, rankings, strict=True):
        scores = [vectors["query", example.query] @ vectors["passage", text] for text in example.document.passages]
        expected = sorted(range(len(scores)), key=lambda passage: -scores[passage])[:3]
        assert [passage for passage, _ in ranking] == expected
        assert [score for _, score in ranking] == pytest.approx([scores[passage] for passage in expected])
    assert dense_rankings([], encode) == []


def test_passages_are_encoded_once_for_all_hops_and_queries_each_time():
    asked = []

    def encode(texts, kind):
        asked.append((kind, list(texts)))
        return np.array([[float(len(text))] for text in texts])

    encode_once = remember_passages(encode)
    assert encode_once(["a", "bb", "a"], "passage").tolist() == [[1], [2], [1]]
    assert encode_once(["bb", "ccc"], "passage").tolist() == [[2], [3]]
    assert encode_once(["a"], "query").tolist() == encode_once(["a"], "query").tolist() == [[1]]
    assert asked == [("passage", ["a", "bb"]), ("passage", ["ccc"]), ("query", ["a"]), ("query", ["a"])]


def test_a_retriever_ranks_as_its_settings_say():
    def encode(texts, kind):
        return np.array([[len(text), 1.0] for text in texts])

    examples = [make_example("1", "yellow case", COLOURS), make_example("2", "budget", MONEY)]
    dense, lexical = dense_rankings(examples, encode), bm25_rankings(examples)
    assert retriever_rankings(examples, encode, {}) == dense
    assert retriever_rankings(examples, encode, {"ranking": "dense", "bm25_weight": 0.7}) == dense
    hybrid = {"ranking": "hybrid", "bm25_weight": 0.7, "smooth_window": 0, "smooth_decay": 0.5}
    fused = [fuse_scores(*both, 0.7) for both in zip(dense, lexical, strict=True)]
    assert retriever_rankings(examples, encode, hybrid) == fused
    smoothed = [combine(*both, bm25_weight=0.7, smooth_window=1, smooth_decay=0.5)
                for both in zip(dense, lexical, strict=True)]  # fmt: skip
    assert retriever_rankings(examples, encode, {**hybrid, "smooth_window": 1}) == smoothed != fused
    plain = retriever_rankings([make_example("1", "budgeting", MONEY)], encode, hybrid | {"language": "none"})
    assert plain != retriever_rankings([make_example("1", "budgeting", MONEY)], encode, hybrid)  # which stems it
    other = retriever_rankings(examples, encode, hybrid, queries=["bye", "paint"])
    assert other != fused
