"""The greedy ROUGE oracle, against a brute-force search with rouge-score."""

import random
import time
from collections import Counter

from retrieval_cases import random_text
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from utils.data.words import rouge_words
from utils.retrieval.oracle import greedy_rouge_oracle


def rouge_sum(passages, chosen, summaries):
    """ROUGE-1 F1 + ROUGE-2 F1 by rouge-score's own counting; n-grams do not span passages."""
    tokenize = DefaultTokenizer(use_stemmer=True).tokenize
    total = 0.0
    for n in (1, 2):
        ngrams = Counter()
        for passage in chosen:
            ngrams.update(rouge_scorer._create_ngrams(tokenize(passages[passage]), n))
        references = [rouge_scorer._create_ngrams(tokenize(summary), n) for summary in summaries]
        total += max(rouge_scorer._score_ngrams(reference, ngrams).fmeasure for reference in references)
    return round(total, 10)  # rounding errors make no difference


def greedy_by_brute_force(passages, summaries, max_passages):
    chosen = []
    while len(chosen) < max_passages:
        rest = [passage for passage in range(len(passages)) if passage not in chosen]
        best = max(rest, key=lambda passage: rouge_sum(passages, [*chosen, passage], summaries), default=None)
        if best is None or rouge_sum(passages, [*chosen, best], summaries) <= rouge_sum(passages, chosen, summaries):
            break
        chosen.append(best)
    return chosen


def test_rouge_oracle_makes_the_choices_of_a_brute_force_greedy_search():
    generator = random.Random(11)
    lengths = set()
    for _ in range(60):
        passages = [random_text(generator, generator.randint(0, 9)) for _ in range(generator.randint(1, 10))]
        summaries = [random_text(generator, generator.randint(1, 15)) for _ in range(generator.randint(1, 3))]
        max_passages = generator.choice([1, 2, 10])
        choice = greedy_rouge_oracle(passages, summaries, max_passages=max_passages)
        assert choice == greedy_by_brute_force(passages, summaries, max_passages)
        lengths.add(len(choice))
    assert {1, 2, 3} <= lengths  # the cases are not all trivial


def test_rouge_oracle_returns_the_order_chosen_and_stops_when_nothing_helps():
    passages = ["a cat", "unrelated words", "the dog sat on the mat", "the dog sat on the mat"]
    assert greedy_rouge_oracle(passages, "the dog sat on the mat with a cat") == [2, 0]
    assert greedy_rouge_oracle(passages, "the dog sat on the mat with a cat", max_passages=1) == [2]
    assert greedy_rouge_oracle(passages, "zebra") == []
    assert greedy_rouge_oracle([], "zebra") == []
    assert greedy_rouge_oracle(passages, "") == []


def test_rouge_oracle_of_500_turns_takes_less_than_200_ms():
    generator = random.Random(1)
    vocabulary = " ".join(f"{random_text(generator, 1)}{number}" for number in range(2000))
    passages = [random_text(generator, 20, vocabulary) for _ in range(500)]
    summary = " ".join(random_text(generator, 8, passage) for passage in passages[::50])
    greedy_rouge_oracle(passages[:1], summary)  # imports nltk
    seconds = []
    for _ in range(3):  # the best of three: other work on the machine is not its fault
        rouge_words.cache_clear()
        started = time.perf_counter()
        assert len(greedy_rouge_oracle(passages, summary)) > 5
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.2
