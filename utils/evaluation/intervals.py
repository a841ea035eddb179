"""Confidence intervals by the bootstrap."""

from collections.abc import Hashable, Sequence

import numpy as np

DRAWN_AT_ONCE = 2**22  # groups; bounds the memory of the bootstrap


def bootstrap_means(
    scores: np.ndarray, groups: Sequence[Hashable], *, draws: int = 10_000, seed: int = 42
) -> np.ndarray:
    """Cluster bootstrap: the mean scores of groups drawn with replacement, as many groups as there are.

    `scores` is (queries, columns); `groups` has a label for each query. All columns share the draws, so a column of
    differences is a paired comparison. Returns (draws, columns); their percentiles are a confidence interval (Efron and
    Tibshirani, 1993, chapter 13).
    """
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    members = np.array([numbers[group] for group in groups])
    sizes = np.bincount(members)
    sums = np.zeros((len(sizes), scores.shape[1]))
    np.add.at(sums, members, scores)
    rng = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // len(sizes))
    means = []
    for first in range(0, draws, at_once):
        drawn = rng.integers(len(sizes), size=(min(at_once, draws - first), len(sizes)))
        means.append(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1, keepdims=True))
    return np.concatenate(means)
