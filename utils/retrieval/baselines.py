"""Rankings that need no retriever: lead, random and oracle."""

import random
from collections.abc import Iterable

from utils.data.examples import Example, Ranking
from utils.errors import DataError
from utils.retrieval.oracle import greedy_rouge_oracle


def lead_ranking(example: Example, top_k: int | None = None) -> Ranking:
    """Ranks the passages in document order."""
    return _in_order(range(len(example.document.passages)), top_k)


def random_ranking(example: Example, top_k: int | None = None, seed: int = 42) -> Ranking:
    """Shuffles the passages. The order depends only on the example's id and the seed."""
    passages = list(range(len(example.document.passages)))
    random.Random(f"{seed} {example.id}").shuffle(passages)
    return _in_order(passages, top_k)


def oracle_ranking(example: Example, top_k: int | None = None) -> Ranking:
    """Ranks only the evidence, in document order, or without evidence the choice of the greedy ROUGE oracle.

    Raises DataError if the example has neither evidence nor a reference.
    """
    if example.evidence:
        return _in_order(sorted(example.evidence), top_k)
    if not example.summaries:
        reason = "has neither evidence nor a reference, which the oracle needs"
        raise DataError(f"example '{example.id}' {reason}: choose another --retriever")
    return _in_order(greedy_rouge_oracle(example.document.passages, example.summaries, max_passages=top_k), top_k)


def _in_order(passages: Iterable[int], top_k: int | None) -> Ranking:
    return [(passage, 1 / position) for position, passage in enumerate(passages, start=1)][:top_k]
