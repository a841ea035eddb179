"""The greedy ROUGE oracle: the passages that match a reference best."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from utils.data.words import rouge_words


def greedy_rouge_oracle(
    passages: Sequence[str], summaries: str | Sequence[str], max_passages: int | None = None
) -> list[int]:
    """Chooses passages one by one, each time the one that raises ROUGE-1 F1 + ROUGE-2 F1 most, until none raises it.

    Greedy labels of extractive summarization (Nallapati et al., 2017, arXiv:1611.04230). N-grams are counted once, in
    each passage by itself: none spans two passages. With several summaries each of the two F1 is the maximum over
    them, as in evaluation. Of equally good passages the first in the document is taken.

    Returns passage numbers in the order chosen; empty if no passage shares a word with a summary.
    """
    if isinstance(summaries, str):
        summaries = [summaries]
    passage_words = [rouge_words(passage) for passage in passages]
    summary_words = [rouge_words(summary) for summary in summaries]
    counts = [_count_ngrams(passage_words, summary, n) for n in (1, 2) for summary in summary_words]

    chosen: list[int] = []
    best = 0.0
    while passages and len(chosen) < (len(passages) if max_passages is None else max_passages):
        f1 = [_f1_with_each_passage(*count, chosen) for count in counts]
        unigram_f1, bigram_f1 = f1[: len(summaries)], f1[len(summaries) :]
        gain_of = np.max(unigram_f1, axis=0) + np.max(bigram_f1, axis=0)
        gain_of[chosen] = 0
        candidate = int(gain_of.argmax())
        if gain_of[candidate] <= best:
            break
        best = gain_of[candidate]
        chosen.append(candidate)
    return chosen


def _count_ngrams(
    passages: list[tuple[str, ...]], summary: tuple[str, ...], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts the n-grams of tokenized passages that a tokenized summary has, and all n-grams.

    Returns the counts in the passages (passages, n-grams of the summary) and in the summary (n-grams of the summary),
    and the number of all n-grams in each passage (passages).
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


def _f1_with_each_passage(
    passage_counts: np.ndarray, summary_counts: np.ndarray, lengths: np.ndarray, chosen: list[int]
) -> np.ndarray:
    """ROUGE-n F1 of the chosen passages and one more, for each passage as that one: (passages,)."""
    overlaps = np.minimum(passage_counts[chosen].sum(axis=0) + passage_counts, summary_counts).sum(axis=1)
    sizes = lengths[chosen].sum() + lengths + summary_counts.sum()
    # F1 = 2PR / (P + R), with P = overlap / words chosen and R = overlap / words of the summary
    return 2 * overlaps / np.maximum(sizes, 1)
