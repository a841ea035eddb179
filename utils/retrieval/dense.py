"""Ranking the passages of documents by a retriever's vectors, with BM25 where that is asked for."""

from collections.abc import Callable, Sequence

import numpy as np

from utils.data.examples import Example, Ranking
from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.ranking import combine, examples_by_document, rank, search_texts


def dense_rankings(
    examples: Sequence[Example],
    encode: Callable[[list[str], str], np.ndarray],
    top_k: int | None = None,
    queries: Sequence[str] | None = None,
) -> list[Ranking]:
    """Ranks each example's passages by the dot product of their vectors with that of its query (or of `queries`).

    `encode(texts, kind)` returns (texts, dimensions), kind being "query" or "passage". It is called once with all
    passages of all documents and once with all different queries, so that it can batch by length.
    """
    queries = search_texts(examples, queries)
    if not examples:
        return []
    documents = examples_by_document(examples)
    passage_vectors = encode([passage for document, _ in documents for passage in document.passages], "passage")
    query_numbers = {text: number for number, text in enumerate(dict.fromkeys(queries))}
    query_vectors = encode(list(query_numbers), "query")

    rankings: list[Ranking] = [[] for _ in examples]
    start = 0
    for document, numbers in documents:
        end = start + len(document.passages)
        rows = [query_numbers[queries[number]] for number in numbers]
        scores = np.asarray(query_vectors[rows]) @ np.asarray(passage_vectors[start:end]).T
        for number, row in zip(numbers, scores, strict=True):
            rankings[number] = rank(row, top_k)
        start = end
    return rankings


def remember_passages(encode: Callable[[list[str], str], np.ndarray]) -> Callable[[list[str], str], np.ndarray]:
    """`encode(texts, kind)` that encodes a passage once, however many hops ask for it; as long as it is kept."""
    known: dict[str, np.ndarray] = {}

    def encode_once(texts: list[str], kind: str) -> np.ndarray:
        if kind != "passage":
            return encode(texts, kind)
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, encode(new, kind), strict=True))
        return np.stack([known[text] for text in texts])

    return encode_once


def retriever_rankings(examples: Sequence[Example], encode, settings: dict, queries=None) -> list[Ranking]:
    """`dense_rankings`, with BM25 and neighbours where the retriever's `settings` say so.

    These are the flags of train_retrieve.py by name, of which those that are absent change nothing.
    """
    dense = dense_rankings(examples, encode, queries=queries)
    is_hybrid = settings.get("ranking") == "hybrid"
    lexical = bm25_rankings(examples, queries=queries) if is_hybrid else [None] * len(examples)
    weights = {
        "bm25_weight": settings.get("bm25_weight", 0.0),
        "smooth_window": settings.get("smooth_window", 0),
        "smooth_decay": settings.get("smooth_decay", 0.0),
    }
    return [combine(*both, **weights) for both in zip(dense, lexical, strict=True)]
