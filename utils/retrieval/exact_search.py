"""Dense search in the vectors of a corpus: exact, or with an approximate index."""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from utils.data.examples import Ranking
from utils.progress import progress
from utils.retrieval.faiss_index import approximate_index
from utils.retrieval.vectors import INDEXES, Vectors

QUERIES = 64  # multiplied with a shard at once
EF_SEARCH = 128  # candidates that the search in an HNSW graph keeps


def dense_search(
    query_vectors: np.ndarray, vectors: Vectors, top_k: int, *, index: str = "flat", nprobe: int = 64,
    process: int = 0, processes: int = 1,
) -> list[Ranking]:  # fmt: skip
    """Ranks the `top_k` passages with the largest dot products, for each of the (queries, dimension) vectors.

    `index`: "flat" is exact. "ivf" searches the `nprobe` nearest of about 4 * sqrt(passages) clusters. "hnsw" follows a
    graph of neighbours (Malkov and Yashunin, arXiv:1603.09320). These two are faster but miss some passages (see
    `recall_lost`). faiss builds them at the first search, with more memory than the vectors take, and they are kept in
    the vectors' folder.

    With several `processes`, exact search finds the best in this process's share of the vectors (see `merge`).
    """
    queries = np.ascontiguousarray(query_vectors, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != vectors.dimension:
        raise ValueError(f"query vectors of shape {queries.shape}, but those of the passages have {vectors.dimension}")
    if index not in ("flat", *INDEXES):
        raise ValueError(f"index is '{index}'; choose flat, {' or '.join(INDEXES)}")
    if not len(queries):
        return []
    top_k = min(top_k, vectors.count)
    if index == "flat":
        scores, passages = _search_flat(queries, vectors.shards(process, processes), top_k, vectors.count // processes)
    else:
        approximate = approximate_index(vectors, index)
        if index == "ivf":
            approximate.nprobe = nprobe
        else:
            approximate.hnsw.efSearch = max(EF_SEARCH, top_k)
        scores, passages = approximate.search(queries, top_k)
        _order_ties(scores, passages)
    return [
        [(passage, score) for passage, score in zip(*row, strict=True) if passage >= 0]  # -1: none was found
        for row in zip(passages.tolist(), scores.tolist(), strict=True)
    ]


def merge(parts: Sequence[list[Ranking]], top_k: int) -> list[Ranking]:
    """What `dense_search` finds in all vectors, from what it found in each process's share."""
    return [
        sorted(itertools.chain(*of_query), key=lambda found: (-found[1], found[0]))[:top_k]
        for of_query in zip(*parts, strict=True)
    ]


def add_passages(
    query_vectors: np.ndarray, vectors: Vectors, rankings: Sequence[Ranking], others: Sequence[Ranking]
) -> list[Ranking]:
    """Adds to each query's ranking the passages of its ranking in `others` that are not in it, with their dot products.

    `query_vectors` is (queries, dimension).
    """
    added = []
    starts = range(0, len(rankings), QUERIES)  # the vectors of all passages could be too many
    for start in progress(starts, "completed", "rankings", total=len(rankings), size=lambda _: QUERIES):
        block = list(zip(rankings, others, strict=True))[start : start + QUERIES]
        missing = [sorted(dict(other).keys() - dict(ranking).keys()) for ranking, other in block]
        passages = np.unique(np.array(list(itertools.chain.from_iterable(missing)), dtype=np.int64))
        rows = vectors.rows(passages)
        for query, (ranking, _), further in zip(query_vectors[start : start + QUERIES], block, missing, strict=True):
            scores = rows[np.searchsorted(passages, further)] @ query
            added.append(ranking + list(zip(further, scores.tolist(), strict=True)))
    return added


def recall_lost(
    query_vectors: np.ndarray, vectors: Vectors, top_k: int, *, index: str, nprobe: int = 64, max_queries: int = 200
) -> float:
    """Percent of the exact `top_k` that an approximate index misses, over up to `max_queries` queries."""
    sample = np.linspace(0, len(query_vectors) - 1, min(max_queries, len(query_vectors))).astype(int)
    queries = query_vectors[sample]
    exact = dense_search(queries, vectors, top_k)
    found = dense_search(queries, vectors, top_k, index=index, nprobe=nprobe)
    missed = [len(dict(gold).keys() - dict(ours).keys()) / len(gold) for gold, ours in zip(exact, found, strict=True)]
    return 100 * sum(missed) / max(len(missed), 1)


def _search_flat(queries: np.ndarray, shards: Iterable, top_k: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and passage numbers, both (queries, top_k) or less, best first; ties are in corpus order."""
    best_scores = np.empty((len(queries), 0), dtype=np.float32)
    best_passages = np.empty((len(queries), 0), dtype=np.int64)
    for first, shard in progress(shards, "searched", "passages", total=total, size=lambda shard: len(shard[1])):
        parts = [
            _search_shard(some, torch.from_numpy(shard), top_k) for some in torch.from_numpy(queries).split(QUERIES)
        ]
        scores, passages = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        # earlier shards come first, so the stable sort leaves ties in corpus order
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best_passages = np.concatenate([best_passages, passages + first], axis=1)
        order = np.argsort(-best_scores, axis=1, kind="stable")[:, :top_k]
        best_scores = np.take_along_axis(best_scores, order, axis=1)
        best_passages = np.take_along_axis(best_passages, order, axis=1)
    return best_scores, best_passages


def _search_shard(queries: torch.Tensor, shard: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    products = queries @ shard.T
    count = min(top_k, len(shard))
    scores, passages = (tensor.numpy() for tensor in products.topk(min(count + 1, len(shard)), dim=1))
    _order_ties(scores, passages)
    # If a passage beyond the last one ties with it, `topk` has kept any of them. A stable sort takes the first instead.
    for row in np.flatnonzero(scores[:, count - 1] == scores[:, -1]) if count < len(shard) else ():
        best_first = torch.sort(products[row], descending=True, stable=True)
        scores[row, :count], passages[row, :count] = best_first.values[:count], best_first.indices[:count]
    return scores[:, :count], passages[:, :count]


def _order_ties(scores: np.ndarray, passages: np.ndarray) -> None:
    """Puts passages with equal scores in corpus order, in place. Each row must be sorted by score."""
    rows = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    order = np.lexsort((passages[rows], -scores[rows]))
    passages[rows] = np.take_along_axis(passages[rows], order, axis=1)
