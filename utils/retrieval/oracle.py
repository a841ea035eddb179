"""The greedy ROUGE oracle: the passages that match a reference best."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from utils.data.words import rouge_words


def greedy_rouge_oracle(
    passages: Sequence[str], summaries: str | Sequence[str], max_passages: int | None = None
) -> list[int]:
    """Chooses passages one by one, always the one that raises ROUGE-1 F1 + ROUGE-2 F1 most, until none raises it.

    These are the greedy labels of extractive summarization (Nallapati et al., 2017, arXiv:1611.04230). N-grams do not
    span passages. With several summaries, each F1 is the maximum over them, as in evaluation. Ties go to the first
    passage in the document.

    Returns passage numbers in the order chosen; none if no passage shares a word with a summary.
    """
    if isinstance(summaries, str):
        summaries = [summaries]
    passage_words = [rouge_words(passage) for passage in passages]
    summary_words = [rouge_words(summary) for summary in summaries]
    # n-grams are counted only once, not at every choice
    unigrams, bigrams = ([_count_ngrams(passage_words, words, n) for words in summary_words] for n in (1, 2))

    chosen: list[int] = []
    best = 0.0
    for _ in range(len(passages))[:max_passages]:
        totals = _best_f1(unigrams, chosen) + _best_f1(bigrams, chosen)
        totals[chosen] = 0
        candidate = int(totals.argmax())
        if totals[candidate] <= best:
            break
        best = totals[candidate]
        chosen.append(candidate)
    return chosen


def _count_ngrams(
    passages: list[tuple[str, ...]], summary: tuple[str, ...], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts the n-grams of tokenized passages.

    Returns the counts of the summary's n-grams in each passage (passages, n-grams) and in the summary (n-grams,), and
    the number of all n-grams in each passage (passages,).
    """
    summary_counts = Counter(zip(*(summary[i:] for i in range(n)), strict=False))
    columns = {ngram: column for column, ngram in enumerate(summary_counts)}
    found = [
        (row, columns[ngram])
        for row, words in enumerate(passages)
        for ngram in zip(*(words[i:] for i in range(n)), strict=False)
        if ngram in columns
    ]
    passage_counts = np.zeros((len(passages), len(columns)), dtype=np.int64)
    if found:
        np.add.at(passage_counts, tuple(np.array(found).T), 1)
    lengths = np.array([max(len(words) - n + 1, 0) for words in passages], dtype=np.int64)
    return passage_counts, np.array(list(summary_counts.values()), dtype=np.int64), lengths


def _best_f1(counts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], chosen: list[int]) -> np.ndarray:
    """(passages,) ROUGE-n F1 of the chosen passages plus each passage; the maximum over the summaries."""
    by_summary = []
    for passage_counts, summary_counts, lengths in counts:
        overlaps = np.minimum(passage_counts[chosen].sum(axis=0) + passage_counts, summary_counts).sum(axis=1)
        sizes = lengths[chosen].sum() + lengths + summary_counts.sum()
        # F1 = 2PR / (P + R), with P = overlap / n-grams chosen and R = overlap / n-grams of the summary
        by_summary.append(2 * overlaps / np.maximum(sizes, 1))
    return np.max(by_summary, axis=0)
