"""Several runs side by side: scores of the same questions, with paired intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.evaluation.intervals import bootstrap_means


@dataclass
class Row:
    """A run's mean of one score with its 95% interval, and its difference to the first run with the paired one."""

    mean: float
    interval: tuple[float, float]
    difference: float | None = None  # None: it is the first run
    difference_interval: tuple[float, float] | None = None

    @property
    def is_clear(self) -> bool:
        """Whether the interval of the difference leaves out 0."""
        return self.difference is not None and (self.difference_interval[0] > 0 or self.difference_interval[1] < 0)


def compare(scores: Sequence[dict[str, float]], document_of: dict[str, str]) -> tuple[list[Row], str]:
    """Compares the runs' scores by id on the questions that all runs have; returns a row each, and what was compared.

    Documents are drawn with replacement, each with all its questions, as in `utils.evaluation.compare`. No questions in
    common: no rows.
    """
    common = [key for key in scores[0] if all(key in of_run for of_run in scores)]
    if not common:
        return [], "no question in common"
    groups, grouping = [document_of.get(key) for key in common], "drawn one by one"
    if (documents := len(set(groups))) > 1:
        grouping = f"about {documents} documents, drawn by document"
    else:
        groups = common
    columns = np.array([[of_run[key] for key in common] for of_run in scores]).T
    differences = columns[:, 1:] - columns[:, :1]
    table = np.concatenate([columns, differences], axis=1)
    means, (lows, highs) = table.mean(axis=0), np.percentile(bootstrap_means(table, groups), [2.5, 97.5], axis=0)
    rows = [Row(means[i], (lows[i], highs[i])) for i in range(len(scores))]
    for i, row in enumerate(rows[1:], len(scores)):
        row.difference, row.difference_interval = means[i], (lows[i], highs[i])
    return rows, f"{len(common)} questions {grouping}"
