"""Dense search over a corpus's vectors: exact, or by an approximate index."""

import numpy as np
import torch

from utils.data.examples import Ranking
from utils.retrieval.faiss_index import approximate_index
from utils.retrieval.vectors import INDEXES, Vectors

QUERIES = 64  # multiplied with a shard at once


def dense_search(
    query_vectors: np.ndarray,
    vectors: Vectors,
    top_k: int,
    *,
    index: str = "flat",
    nprobe: int = 64,
    ef_search: int = 128,
) -> list[Ranking]:
    """The `top_k` passages of the greatest dot product with each of the (queries, dimension) vectors.

    `index`: "flat" is exact. "ivf" compares those in the `nprobe` nearest of about 4 * sqrt(passages) clusters, "hnsw"
    follows a graph of neighbours with `ef_search` candidates (Malkov and Yashunin, arXiv:1603.09320): faster, and they
    miss some (see `recall_lost`). Both are built by faiss at the first search, in memory of the size of the vectors
    and more, and kept beside them.
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
        scores, passages = _search_flat(queries, vectors, top_k)
    else:
        approximate = approximate_index(vectors, index)
        if index == "ivf":
            approximate.nprobe = nprobe
        else:
            approximate.hnsw.efSearch = max(ef_search, top_k)
        scores, passages = approximate.search(queries, top_k)
        settle_ties(scores, passages)
    return [
        [(passage, score) for passage, score in zip(*row, strict=True) if passage >= 0]  # -1: none was found
        for row in zip(passages.tolist(), scores.tolist(), strict=True)
    ]


def _search_flat(queries: np.ndarray, vectors: Vectors, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and passage numbers, both (queries, top_k), best first and then in order of the corpus."""
    best_scores = np.empty((len(queries), 0), dtype=np.float32)
    best_passages = np.empty((len(queries), 0), dtype=np.int64)
    for first, shard in vectors.shards():
        parts = [
            _search_shard(some, torch.from_numpy(shard), top_k) for some in torch.from_numpy(queries).split(QUERIES)
        ]
        scores, passages = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        # those before come first, so that a stable sort leaves equal scores in order
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
    settle_ties(scores, passages)
    # of several that are as good as the last `topk` keeps any: the first in the corpus are taken in their place
    for row in np.flatnonzero(scores[:, count - 1] == scores[:, -1]) if count < len(shard) else ():
        best_first = torch.sort(products[row], descending=True, stable=True)
        scores[row, :count], passages[row, :count] = best_first.values[:count], best_first.indices[:count]
    return scores[:, :count], passages[:, :count]


def settle_ties(scores: np.ndarray, passages: np.ndarray) -> None:
    """Puts passages of equal scores, in rows that are sorted by score, in order of the corpus."""
    rows = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    order = np.lexsort((passages[rows], -scores[rows]))
    passages[rows] = np.take_along_axis(passages[rows], order, axis=1)  # scores stay as they are


def recall_lost(
    query_vectors: np.ndarray, vectors: Vectors, top_k: int, *, index: str, max_queries: int = 200, **settings
) -> float:
    """Percent of the exact `top_k` that an approximate index misses, over up to `max_queries` queries.

    `settings` are those of `dense_search`.
    """
    sample = np.linspace(0, len(query_vectors) - 1, min(max_queries, len(query_vectors))).astype(int)
    queries = np.asarray(query_vectors)[sample]
    exact = dense_search(queries, vectors, top_k)
    found = dense_search(queries, vectors, top_k, index=index, **settings)
    missed = [
        len(dict(right).keys() - dict(ours).keys()) / len(right) for right, ours in zip(exact, found, strict=True)
    ]
    return 100 * sum(missed) / max(len(missed), 1)
