"""ROUGE as a local `evaluate` module: it needs no network and shares no files between processes.

    rouge = Rouge()
    rouge.compute(predictions=["a draft"], references=[["a reference", "another"]])    # {"rouge1": 66.7, ...}

Scores are percentages. Scripts gather the predictions of all processes and compute on the main process. Importing
`evaluate` takes seconds: import this module where validation begins.
"""

import math
import tempfile
from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer

from utils.data.passages import split_sentences
from utils.data.words import rouge_words
from utils.progress import progress

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class RougeWords(Tokenizer):
    """Makes rouge-score use `rouge_words`, which caches and counts words of all scripts."""

    def tokenize(self, text: str) -> tuple[str, ...]:
        return rouge_words(text)


def rouge_scores(prediction: str, references: str | Sequence[str]) -> dict[str, float]:
    """ROUGE-1, -2, -L and -Lsum F-measures (0 to 100) of one prediction; with several references the maximum of each.

    They equal those of rouge-score with `use_stemmer=True` on one sentence a line (only Lsum looks at lines), except
    that letters of all scripts count.
    """
    if isinstance(references, str):
        references = [references]
    if not references:
        raise ValueError("a prediction has no reference; it needs at least one")
    scorer = RougeScorer(ROUGE_TYPES, tokenizer=RougeWords())
    prediction, *references = ("\n".join(split_sentences(text)) for text in (prediction, *references))
    best = scorer.score_multi(references, prediction)
    return {name: 100 * score.fmeasure for name, score in best.items()}


class LocalMetric(evaluate.Metric):
    """A metric that keeps its inputs in memory and writes nothing to the shared cache folder of `evaluate`."""

    def __init__(self, **kwargs):
        # evaluate creates its cache folder even for a metric in memory; a temporary one may be removed at once
        with tempfile.TemporaryDirectory(prefix="metric-") as folder:
            super().__init__(keep_in_memory=True, cache_dir=folder, **kwargs)


def rouge_of_each(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float] | None]:
    """`rouge_scores` of each prediction; None for one without references."""
    return [rouge_scores(*texts) if texts[1] else None for texts in zip(predictions, references, strict=True)]


def mean_of_each(scores: Sequence[dict[str, float] | None]) -> dict[str, float]:
    """Mean of each score over the predictions that have scores, the same in any order."""
    scores = [of_one for of_one in scores if of_one]
    return {name: math.fsum(of_one[name] for of_one in scores) / len(scores) for name in scores[0]}


class Rouge(LocalMetric):
    """ROUGE F-measures (see `rouge_scores`), mean over examples; references are strings or lists of strings.

    `compute(predictions, references, use_aggregator=False)` returns one score for each example instead of the means.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum F-measures in percent, by rouge-score.",
            citation="Lin, 2004. ROUGE: A Package for Automatic Evaluation of Summaries.",
            features=Features({"predictions": Value("string"), "references": ListOf(Value("string"))}),
        )

    def add_batch(self, *, predictions: Sequence[str], references: Sequence[str | Sequence[str]]):
        """Adds predictions with their references."""
        _check_equally_many(predictions=predictions, references=references)
        references = [[texts] if isinstance(texts, str) else list(texts) for texts in references]
        super().add_batch(predictions=list(predictions), references=references)

    def add(self, *, prediction: str, reference: str | Sequence[str]):
        """Adds one prediction with its reference or references."""
        self.add_batch(predictions=[prediction], references=[reference])

    def _compute(self, *, predictions, references, use_aggregator: bool = True) -> dict:
        pairs = zip(predictions, references, strict=True)
        scores = [rouge_scores(*texts) for texts in progress(pairs, "scored", "summaries", total=len(predictions))]
        if not scores:
            raise ValueError("no predictions to score")
        columns = {name: [score[name] for score in scores] for name in ROUGE_TYPES}
        if not use_aggregator:
            return columns
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}


def _check_equally_many(**columns: Sequence):
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the numbers must be equal: {', '.join(f'{n} {name}' for name, n in counts.items())}")
