"""Ranking the passages of documents by a retriever's vectors, also combined with BM25."""

from collections.abc import Callable, Sequence

import numpy as np

from utils.data.examples import Example, Ranking
from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.ranking import combine, examples_by_document, rank, search_texts

Encode = Callable[[list[str], str], np.ndarray]  # encode(texts, kind) -> (texts, dimension); kind: "query", "passage"


def dense_rankings(
    examples: Sequence[Example], encode: Encode, top_k: int | None = None, queries: Sequence[str] | None = None
) -> list[Ranking]:
    """Ranks passages by dot product with the vector of each example's query, or of its search text in `queries`.

    `encode` is called once with all passages of all documents and once with all different queries, so that it can form
    batches of similar length.
    """
    queries = search_texts(examples, queries)
    if not examples:
        return []
    documents = examples_by_document(examples)
    passage_vectors = encode([passage for document, _ in documents for passage in document.passages], "passage")
    query_rows = {text: row for row, text in enumerate(dict.fromkeys(queries))}
    query_vectors = encode(list(query_rows), "query")

    rankings: list[Ranking] = [[] for _ in examples]
    start = 0
    for document, numbers in documents:
        end = start + len(document.passages)
        rows = [query_rows[queries[number]] for number in numbers]
        scores = query_vectors[rows] @ passage_vectors[start:end].T
        for number, row in zip(numbers, scores, strict=True):
            rankings[number] = rank(row, top_k)
        start = end
    return rankings


def retriever_rankings(examples: Sequence[Example], encode: Encode, settings: dict, queries=None) -> list[Ranking]:
    """Ranks passages as the retriever's `settings` (flags of train_retrieve.py) say: by vectors, or with BM25 too.

    Gives all passages. BM25 is added by score, and neighbours share their scores (see `combine`). A setting that is
    absent has no effect.
    """
    dense = dense_rankings(examples, encode, queries=queries)
    lexical = [None] * len(examples)
    if settings.get("ranking") == "hybrid":
        lexical = bm25_rankings(examples, queries=queries, language=settings.get("language"))
    options = {name: settings.get(name, 0) for name in ("bm25_weight", "smooth_window", "smooth_decay")}
    return [combine(*both, **options) for both in zip(dense, lexical, strict=True)]


def remember_passages(encode: Encode) -> Encode:
    """Wraps `encode` so that it encodes each passage only once, for all hops. Its memory is freed with the wrapper."""
    known: dict[str, np.ndarray] = {}

    def encode_once(texts: list[str], kind: str) -> np.ndarray:
        if kind != "passage":
            return encode(texts, kind)
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, encode(new, kind), strict=True))
        return np.stack([known[text] for text in texts])

    return encode_once
