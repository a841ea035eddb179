"""Rankings: ordering by score, smoothing over neighbours, fusing searches and hops, choosing hard negatives."""

import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from utils.data.examples import Document, Example, Ranking
from utils.data.words import count_words
from utils.tables import values

# chosen on QMSum's training meetings:
SHARPNESS = 0.7  # factor of the standardized scores before `combine` takes their exponentials
FADES_BACK = 2  # a score fades twice as fast backward: what belongs to a topic mostly comes after its first mention

# chosen on EntailmentBank (runs/hop_fusion.py) and QMSum's validation meetings (runs/qmsum_hops.py):
TRUST = 0.5, 0.9  # a hop counts from this agreement with the hops before it, and fully from that
COMPARED = 10  # of its best passages

RANKED_AT_ONCE = 2**11  # examples
KEPT = 1025  # passages of a ranking that are kept: those that can be among the first 1,024 words, and the next
WRITTEN = 100  # passages of a ranking in a file of hops; more if these have fewer than 1,024 words


# ---- queries and scores


def search_text(query: str, draft: str) -> str:
    """The text that a hop searches with: the query, and after the first hop also the draft of the hop before."""
    return f"{query} {draft}".strip()


def search_texts(examples: Sequence[Example], queries: Sequence[str] | None) -> Sequence[str]:
    """`queries` if given, else the examples' own. ValueError unless there is one for each example."""
    if queries is None:
        return values(examples, "query")
    if len(queries) != len(examples):
        raise ValueError(f"{len(queries)} queries for {len(examples)} examples; there must be one for each")
    return queries


def examples_by_document(examples: Sequence[Example]) -> list[tuple[Document, list[int]]]:
    """Groups the numbers of the examples that share a document (the same object), in order of first appearance."""
    groups: dict[Document, list[int]] = {}
    for number, document in enumerate(values(examples, "document")):
        groups.setdefault(document, []).append(number)
    return list(groups.items())


def rank(scores: np.ndarray, top_k: int | None = None) -> Ranking:
    """Orders passages by score, best first. Ties stay in document order."""
    best_first = np.argsort(-scores, kind="stable")[:top_k]
    return [(int(passage), float(scores[passage])) for passage in best_first]


def cut_ranking(ranking: Ranking, document: Document, at_least: int) -> Ranking:
    """The part of a ranking that a file of hops holds: enough for all scores."""
    words = 0
    for count, (passage, _) in enumerate(ranking, 1):
        words += count_words(document.passages[passage])
        if count >= max(at_least, WRITTEN) and words >= KEPT - 1:
            return ranking[:count]
    return ranking


# ---- combining scores within a document


def combine(
    dense: Ranking, lexical: Ranking | None, *, bm25_weight: float, smooth_window: int, smooth_decay: float
) -> Ranking:
    """Combines a document's dense ranking with BM25's (if given), and smooths the scores over neighbouring passages.

    Smoothing works on the exponentials of the standardized scores. One passage that stands out then lifts its
    neighbours more than several average ones do. Each kind of score is exponentiated by itself, so that a passage can
    stand out in one of them only.
    """
    if not smooth_window:
        return fuse_scores(dense, lexical, bm25_weight) if lexical is not None else dense
    scores = np.exp(SHARPNESS * _standardized(dense))
    if lexical is not None:
        scores += bm25_weight * np.exp(SHARPNESS * _standardized(lexical))
    return rank(smooth(scores, smooth_window, smooth_decay))


def fuse_scores(first: Ranking, second: Ranking, weight: float, among: Iterable[int] | None = None) -> Ranking:
    """Ranks by the standardized scores of `first` plus `weight` times those of `second`, which rank the same passages.

    Scores of different kinds can be added once they are standardized: mean 0 and deviation 1 over these passages, or
    over those `among` them. Unlike reciprocal ranks they tell by how much one passage is better than the next.
    """
    passages = sorted(passage for passage, _ in first)
    counts = slice(None) if among is None else np.isin(passages, list(among))
    total = _standardized(first, counts) + weight * _standardized(second, counts)
    return [(passages[place], score) for place, score in rank(total)]


def smooth(scores: np.ndarray, window: int, decay: float) -> np.ndarray:
    """Adds to each passage's score a share of the scores of its `window` neighbours on either side.

    `scores` is (passages,), in document order. A score fades by `decay` with each passage forward, and by `decay`
    squared with each passage backward.
    """
    total = scores.copy()
    for distance in range(1, min(window, len(scores) - 1) + 1):
        share = decay**distance
        total[distance:] += share * scores[:-distance]
        total[:-distance] += share**FADES_BACK * scores[distance:]
    return total


def _standardized(ranking: Ranking, counts=slice(None)) -> np.ndarray:
    """(passages,) The scores of a ranking, in the order of the passages' numbers, with mean 0 and deviation 1."""
    return standardized(np.array([score for _, score in sorted(ranking)]), counts)


def standardized(scores: np.ndarray, counts=slice(None)) -> np.ndarray:
    """Scores (passages,) with mean 0 and deviation 1 over those that count; if these are equal, their score is 0."""
    return (scores - scores[counts].mean()) / (scores[counts].std() or 1.0)


# ---- fusing rankings


def reciprocal_rank_fusion(
    rankings: Iterable[Ranking], k: int = 60, weights: Iterable[float] = itertools.repeat(1.0)
) -> Ranking:
    """Fuses rankings: a passage scores the weighted sum of 1 / (k + its rank), over the rankings that have it.

    Cormack et al., 2009. `weights` has one weight for each ranking.
    """
    shares: dict[int, list[float]] = {}
    for ranking, weight in zip(rankings, weights, strict=False):
        for position, (passage, _) in enumerate(ranking, start=1):
            shares.setdefault(passage, []).append(weight / (k + position))
    # fsum is exact, so passages that have the same ranks in different rankings tie
    fused = [(passage, math.fsum(parts)) for passage, parts in shares.items()]
    return sorted(fused, key=lambda entry: (-entry[1], entry[0]))


def fuse_hops(rankings: Sequence[Ranking], weight: float) -> Ranking:
    """Fuses the rankings of an example's hops, first to last, by score.

    A later hop adds its standardized scores with `weight`, what came before it with 1 - `weight`; a passage that one of
    them lacks has its lowest score there. A draft may lead astray. So a hop counts less, down to not at all, the fewer
    of its best passages the hops before it ranked in their upper half (see `agreement`).
    """
    fused = rankings[0]
    for ranking in filter(None, rankings[1:]):
        if not fused:
            fused = ranking
            continue
        passages = sorted({passage for both in (fused, ranking) for passage, _ in both})
        before, now = (standardized(scores_of(part, passages)) for part in (fused, ranking))
        trusted = np.clip((agreement(fused, ranking) - TRUST[0]) / (TRUST[1] - TRUST[0]), 0, 1)
        share = weight * float(trusted)
        fused = [(passages[place], score) for place, score in rank((1 - share) * before + share * now)]
    return fused


def agreement(before: Ranking, now: Ranking) -> float:
    """The share of the ten best passages of `now` (fewer of a short ranking) in the upper half of `before`: 0 to 1.

    By chance it would be a half. Passages that tie with the last of the upper half are in it.
    """
    half = (len(before) + 1) // 2
    lowest = before[half - 1][1]
    upper = {passage for passage, score in before if score >= lowest}
    best = [passage for passage, _ in now[: min(COMPARED, half)]]
    return sum(passage in upper for passage in best) / len(best)


def scores_of(ranking: Ranking, passages: Sequence[int]) -> np.ndarray:
    """(passages,) The scores of these passages; one that the ranking lacks has its lowest."""
    scores = dict(ranking)
    lowest = min(scores.values())
    return np.array([scores.get(passage, lowest) for passage in passages])


# ---- hard negatives


def hard_negatives(ranking: Ranking, evidence: Iterable[int], pool: int, margin: float | None = None) -> list[int]:
    """The `pool` best different passages of a ranking that are not evidence, best first.

    With `margin`, a passage must score at least that share below the best evidence, because a closer one is probably
    unmarked evidence (NV-Retriever, Moreira et al., 2024, arXiv:2407.15831). So a ranking that ends before any evidence
    has none.
    """
    evidence, limit = set(evidence), math.inf if margin is None else -math.inf
    found = [score for passage, score in ranking if passage in evidence]
    if found and margin is not None:
        limit = max(found) - margin * abs(max(found))
    found = dict.fromkeys(passage for passage, score in ranking if passage not in evidence and score <= limit)
    return list(found)[:pool]
