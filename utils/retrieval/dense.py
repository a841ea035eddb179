"""Ranking the passages of documents by a retriever's vectors, also combined with BM25."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from utils.data.examples import Example, Ranking
from utils.errors import UsageError
from utils.progress import Phase
from utils.retrieval.bm25 import bm25_score
from utils.retrieval.ranking import combine, examples_by_document, rank, search_texts
from utils.tables import values

Encode = Callable[[list[str], str], np.ndarray]  # encode(texts, kind) -> (texts, dimension); kind: "query", "passage"
ENCODED_AT_ONCE = 2**14  # passages


def dense_rankings(
    examples: Sequence[Example], encode: Encode, top_k: int | None = None, queries: Sequence[str] | None = None
) -> list[Ranking]:
    """Ranks passages by dot product with the vector of each example's query, or of its search text in `queries`.

    `encode` is called with all passages of many documents, and with all different queries about them, so that it can
    form batches of similar length.
    """
    rankings: list[Ranking] = [[] for _ in examples]
    for number, scores in _score(examples, encode, search_texts(examples, queries)):
        rankings[number] = rank(scores, top_k)
    return rankings


def _score(examples: Sequence[Example], encode: Encode, queries: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each example and its scores (passages,), document by document; few vectors are kept at a time."""
    documents = examples_by_document(examples)
    with Phase("encoded", "passages", sum(len(document.passages) for document, _ in documents)):
        while documents:
            sizes = itertools.accumulate(len(document.passages) for document, _ in documents)
            count = 1 + sum(size <= ENCODED_AT_ONCE for size in itertools.islice(sizes, 1, None))
            block, documents = documents[:count], documents[count:]
            passage_vectors = encode([passage for document, _ in block for passage in document.passages], "passage")
            texts = dict.fromkeys(queries[number] for _, numbers in block for number in numbers)
            query_vectors = dict(zip(texts, encode(list(texts), "query"), strict=True))
            start = 0
            for document, numbers in block:
                vectors = passage_vectors[start : start + len(document.passages)]
                start += len(document.passages)
                scores = np.stack([query_vectors[queries[number]] for number in numbers]) @ vectors.T
                yield from zip(numbers, scores, strict=True)


def retriever_rankings(
    examples: Sequence[Example],
    encode: Encode,
    settings: dict,
    queries: Sequence[str] | None = None,
    top_k: int | None = None,
) -> list[Ranking]:
    """Ranks passages as the retriever's `settings` (flags of train_retrieve.py) say: by vectors, or with BM25 too.

    BM25 is added by score, and neighbours share their scores (see `combine`). A setting that is absent has no effect.
    Gives the `top_k` best passages, or all.
    """
    queries = search_texts(examples, queries)
    if settings.get("smooth_window") and not all(document.is_ordered for document in values(examples, "document")):
        raise UsageError("--smooth_window cannot be used with passages that are no neighbours; set it to 0")
    lexical = itertools.repeat((None, None))
    if settings.get("ranking") == "hybrid":  # both go through the documents in the same order
        lexical = bm25_score(examples, queries, settings.get("language"))
    options = {name: settings.get(name, 0) for name in ("bm25_weight", "smooth_window", "smooth_decay")}
    rankings: list[Ranking] = [[] for _ in examples]
    for (number, dense), (_, words) in zip(_score(examples, encode, queries), lexical, strict=False):
        rankings[number] = combine(rank(dense), None if words is None else rank(words), **options)[:top_k]
    return rankings


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
