"""Rankings: ordering by score, smoothing over neighbours, fusing hops and searches."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from utils.data.examples import Document, Example, Ranking

# chosen on QMSum's training meetings:
SHARPNESS = 0.7  # of standardized scores, before neighbours share them
FADES_BACK = 2  # times as fast as forward: more of what is said of a matter follows its mention than comes before


def rank(scores: np.ndarray, top_k: int | None = None) -> Ranking:
    """Orders passages by score, best first; equal scores stay in document order."""
    scores = np.asarray(scores)
    best_first = np.argsort(-scores, kind="stable")[:top_k]
    return [(int(passage), float(scores[passage])) for passage in best_first]


def reciprocal_rank_fusion(
    rankings: Iterable[Ranking], k: int = 60, weights: Iterable[float] = itertools.repeat(1.0)
) -> Ranking:
    """Fuses rankings: a passage scores the sum of 1 / (k + its rank) over those that have it (Cormack et al., 2009).

    `weights` multiply the shares of each ranking.
    """
    shares: dict[int, list[float]] = {}
    for ranking, weight in zip(rankings, weights, strict=False):
        for position, (passage, _) in enumerate(ranking, start=1):
            shares.setdefault(passage, []).append(weight / (k + position))
    # fsum: passages with the same ranks in another order must tie exactly
    fused = [(passage, math.fsum(parts)) for passage, parts in shares.items()]
    return sorted(fused, key=lambda entry: (-entry[1], entry[0]))


def smooth(scores: np.ndarray, window: int = 1, decay: float = 0.5) -> np.ndarray:
    """Adds to each passage's score shares of those of its `window` neighbours on either side, in document order.

    A score fades by `decay` at each passage that it goes forward, and by the square of it backward. What neighbours a
    passage at an end of the document lacks add nothing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    total = scores.copy()
    for distance in range(1, min(window, len(scores) - 1) + 1):
        share = decay**distance
        total[distance:] += share * scores[:-distance]
        total[:-distance] += share**FADES_BACK * scores[distance:]
    return total


def combine(
    dense: Ranking, lexical: Ranking | None, *, bm25_weight: float, smooth_window: int, smooth_decay: float
) -> Ranking:
    """A document's ranking from the retriever's, with BM25's (if given) and with the passages' neighbours in it.

    Neighbours share what the standardized scores are exponents of: one passage that stands out then lifts those around
    it more than several middling ones do, and each kind of score may find a place of its own.
    """
    if not smooth_window:
        return fuse_scores(dense, lexical, bm25_weight) if lexical is not None else dense
    shared = np.exp(SHARPNESS * _standardized(dense))
    if lexical is not None:
        shared += bm25_weight * np.exp(SHARPNESS * _standardized(lexical))
    return rank(smooth(shared, smooth_window, smooth_decay))


def fuse_hops(rankings: Sequence[Ranking]) -> Ranking:
    """Fuses the rankings of an example's hops, first to last, by reciprocal rank, of which the last hop's counts twice.

    k is small: with the usual 60, passages that are middling at every hop would outrank what one draft alone finds.
    """
    if len(rankings) == 1:
        return rankings[0]
    return reciprocal_rank_fusion(rankings, k=10, weights=[*[1.0] * (len(rankings) - 1), 2.0])


def search_text(query: str, draft: str) -> str:
    """What a hop searches with: the query, and from the second hop on the draft of the one before."""
    return f"{query} {draft}".strip()


def hard_negatives(ranking: Ranking, evidence: Iterable[int], pool: int, margin: float | None = None) -> list[int]:
    """The `pool` best passages of a ranking that are no evidence, best first.

    With `margin`, a passage must score at least that share below the best evidence: what comes closer is likely
    evidence that nobody marked (NV-Retriever, Moreira et al., 2024, arXiv:2407.15831).
    """
    evidence = set(evidence)
    best = max((score for passage, score in ranking if passage in evidence), default=math.inf)
    limit = math.inf if margin is None or best == math.inf else best - margin * abs(best)
    return [passage for passage, score in ranking if passage not in evidence and score <= limit][:pool]


def passage_scores(ranking: Ranking) -> np.ndarray:
    """(passages,) the scores of a ranking that holds every passage of the document, in document order."""
    scores = np.zeros(len(ranking))
    for passage, score in ranking:
        scores[passage] = score
    return scores


def fuse_scores(first: Ranking, second: Ranking, weight: float) -> Ranking:
    """Ranks all passages by standardized scores: those of `first` and `weight` times those of `second`.

    Standardized (mean 0, deviation 1 over the document's passages), scores of different kinds can be added, and keep
    what reciprocal ranks lose: by how much one passage is better than the next.
    """
    return rank(_standardized(first) + weight * _standardized(second))


def _standardized(ranking: Ranking) -> np.ndarray:
    """(passages,) scores in document order, of mean 0 and deviation 1."""
    scores = passage_scores(ranking)
    return (scores - scores.mean()) / (scores.std() or 1.0)


def search_texts(examples: Sequence[Example], queries: Sequence[str] | None) -> Sequence[str]:
    if queries is None:
        return [example.query for example in examples]
    if len(queries) != len(examples):
        raise ValueError(f"{len(queries)} queries for {len(examples)} examples; one for each is wanted")
    return queries


def examples_by_document(examples: Sequence[Example]) -> list[tuple[Document, list[int]]]:
    """Groups the numbers of the examples that share one document (the same object), in order of first appearance."""
    groups: dict[int, tuple[Document, list[int]]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(id(example.document), (example.document, []))[1].append(number)
    return list(groups.values())
