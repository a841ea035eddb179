"""Seconds of the greedy ROUGE oracle for one long document: `greedy_rouge_oracle` beside rouge-score's RougeScorer.

    python benchmarks/rouge_oracle.py
    python benchmarks/rouge_oracle.py --turns 100 --repeats 1      # a small one

The document has turns of 5 to 40 words, drawn by Zipf's law like those of the summary. Both sides choose until no
passage raises the score. On the other side every round scores the passages chosen, with each other one, as one text;
RougeScorer tokenizes with rouge-score's own words, or with ours, which are remembered. It counts bigrams that span two
passages as well, and ours does not; both must choose the same passages here. Cold: no word has been stemmed yet; warm:
all have.

Results

2026-11-24, AMD EPYC (Zen 4), 2 cores, torch 2.13.0+cpu
500 turns, 11,417 words

| | passages chosen | seconds | ratio to ours, cold |
| --- | ---: | ---: | ---: |
| greedy_rouge_oracle, cold | 5 | 0.034 | 1.0 |
| greedy_rouge_oracle, warm | 5 | 0.005 | 0.1 |
| RougeScorer | 5 | 5.288 | 153.7 |
| RougeScorer, our words, cold | 5 | 0.462 | 13.4 |
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

sys.path.insert(0, str(Path(__file__).parent.parent))
from hardware import hardware

from utils.data.words import _porter_stem, rouge_words
from utils.evaluation.rouge import RougeWords
from utils.retrieval.oracle import greedy_rouge_oracle

SYLLABLES = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
ENDINGS = ["", "", "s", "ed", "ing", "ation", "ly"]  # which the stemmer takes off


def parse():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--turns", type=int, default=500)
    parser.add_argument("--summary_words", type=int, default=70)
    parser.add_argument(
        "--repeats", type=int, default=5, help="of ours, of which the median is shown; RougeScorer runs once"
    )
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def make_document(turns: int, summary_words: int, seed: int) -> tuple[list[str], str]:
    """Turns and a summary, of words whose frequency falls with their rank."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(SYLLABLES, rng.integers(1, 4))) + rng.choice(ENDINGS) for _ in range(20_000)]

    def text(length: int) -> str:
        return " ".join(words[rank % len(words)] for rank in rng.zipf(1.2, length))

    return [text(rng.integers(5, 41)) for _ in range(turns)], text(summary_words)


def rouge_score_oracle(passages: Sequence[str], summary: str, tokenizer=None) -> list[int]:
    """The greedy choice with RougeScorer: every round scores the text of the chosen passages and each other one."""
    scorer = RougeScorer(["rouge1", "rouge2"], use_stemmer=True, tokenizer=tokenizer)
    chosen, best = [], 0.0
    while len(chosen) < len(passages):
        gain_of = {}
        for passage in range(len(passages)):
            if passage not in chosen:
                text = "\n".join(passages[number] for number in [*chosen, passage])
                gain_of[passage] = sum(score.fmeasure for score in scorer.score(summary, text).values())
        candidate = max(gain_of, key=gain_of.get)
        if gain_of[candidate] <= best:
            break
        best = gain_of[candidate]
        chosen.append(candidate)
    return chosen


def forget_words() -> None:
    rouge_words.cache_clear()
    _porter_stem.cache_clear()


def time_it(choose: Callable[[], list[int]], is_cold: bool, repeats: int) -> tuple[list[float], list[int]]:
    seconds = []
    for _ in range(repeats):
        if is_cold:
            forget_words()
        began = time.perf_counter()
        chosen = choose()
        seconds.append(time.perf_counter() - began)
    return seconds, chosen


def main():
    args = parse()
    passages, summary = make_document(args.turns, args.summary_words, args.seed)
    greedy_rouge_oracle(passages[:1], "running")  # imports nltk

    def ours() -> list[int]:
        return greedy_rouge_oracle(passages, summary)

    rows = {  # how it is chosen, whether cold, how often
        "greedy_rouge_oracle, cold": (ours, True, args.repeats),
        "greedy_rouge_oracle, warm": (ours, False, args.repeats),
        "RougeScorer": (lambda: rouge_score_oracle(passages, summary), True, 1),
        "RougeScorer, our words, cold": (lambda: rouge_score_oracle(passages, summary, RougeWords()), True, 1),
    }
    print(hardware())
    print(f"{args.turns} turns, {sum(len(text.split()) for text in passages):,} words\n")
    print("| | passages chosen | seconds | ratio to ours, cold |\n| --- | ---: | ---: | ---: |")
    expected = cold = None
    for name, row in rows.items():
        seconds, chosen = time_it(*row)
        median = statistics.median(seconds)
        expected, cold = expected or chosen, cold or median
        assert chosen == expected, f"{name} chose {chosen}, not {expected}"
        print(f"| {name} | {len(chosen)} | {median:.3f} | {median / cold:.1f} |", flush=True)


if __name__ == "__main__":
    main()
