"""Recall, MRR, nDCG and gold words within a word budget, as a local `evaluate` module."""

import math
from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from utils.data.examples import Example, Ranking
from utils.data.words import count_words
from utils.evaluation.rouge import LocalMetric, _check_equally_many
from utils.progress import progress

RECALL_CUTOFFS = (1, 5, 10, 20, 100)
RANK_CUTOFF = 10  # of MRR and nDCG
WORD_BUDGET = 1024


def retrieval_scores(
    ranking: Sequence[int],
    evidence: Sequence[int],
    passage_words: Sequence[int],
    evidence_words: Sequence[int] | None = None,
    *,
    recall_cutoffs: Sequence[int] = RECALL_CUTOFFS,
    rank_cutoff: int = RANK_CUTOFF,
    word_budget: int = WORD_BUDGET,
    map_cutoff: int | None = None,
) -> dict[str, float]:
    """Scores one ranking of a document's passages: recall@k, MRR@k, nDCG@k (binary gains), gold_words@budget; 0 to 100.

    With `map_cutoff` also map@k: the precision at the rank of each passage of evidence among the first k, averaged over
    all evidence.

    `ranking` holds passage numbers, best first, and need not be complete. `passage_words` holds the number of words of
    every passage, `evidence_words` the number of gold words in each passage of `evidence` (default: all its words).

    gold_words@budget: somebody reads the passages in ranked order until `word_budget` words are read. The score is the
    share of all gold words that they read. If they read a part of the last passage, the same part of its gold words
    counts.
    """
    if not len(evidence):
        raise ValueError("recall without evidence is undefined; leave the example out")
    if len(set(ranking)) != len(ranking):
        raise ValueError(f"a ranking names a passage twice: {list(ranking)[:20]}")
    if evidence_words is None:
        evidence_words = [passage_words[passage] for passage in evidence]
    if len(evidence_words) != len(evidence):
        raise ValueError(f"{len(evidence_words)} evidence_words for {len(evidence)} passages of evidence")
    gold_words = dict(zip(evidence, evidence_words, strict=True))
    hits = [passage in gold_words for passage in ranking]  # by rank

    scores = {f"recall@{k}": 100 * sum(hits[:k]) / len(gold_words) for k in recall_cutoffs}

    first_hit = hits[:rank_cutoff].index(True) + 1 if any(hits[:rank_cutoff]) else math.inf
    scores[f"mrr@{rank_cutoff}"] = 100 / first_hit

    discounts = [1 / math.log2(position + 1) for position in range(1, rank_cutoff + 1)]
    gain = sum(discount for discount, hit in zip(discounts, hits, strict=False) if hit)
    scores[f"ndcg@{rank_cutoff}"] = 100 * gain / sum(discounts[: len(gold_words)])

    if map_cutoff:
        ranks = [rank for rank, hit in enumerate(hits[:map_cutoff], 1) if hit]
        precisions = (number / rank for number, rank in enumerate(ranks, 1))
        scores[f"map@{map_cutoff}"] = 100 * sum(precisions) / len(gold_words)

    found, budget_left = 0.0, word_budget
    for passage in ranking:
        words_read = min(passage_words[passage], budget_left)
        if words_read and passage in gold_words:
            found += gold_words[passage] * words_read / passage_words[passage]
        budget_left -= words_read
    scores[f"gold_words@{word_budget}"] = 100 * found / max(sum(gold_words.values()), 1)
    return scores


class Retrieval(LocalMetric):
    """The mean of `retrieval_scores` over the examples that have evidence.

    `predictions` are rankings of passage numbers, `references` the evidence or None. `compute` accepts the keywords of
    `retrieval_scores`. The result also counts the examples with evidence, as `examples`; it holds nothing else if there
    are none.
    """

    def _info(self) -> evaluate.MetricInfo:
        columns = ("predictions", "references", "passage_words", "evidence_words")
        return evaluate.MetricInfo(
            description="Recall@k, MRR@k, nDCG@k and share of gold words within a word budget, in percent.",
            citation="",
            inputs_description="predictions: ranked passage numbers; references: evidence; words of all passages; "
            "gold words of the evidence.",
            features=Features(dict.fromkeys(columns, ListOf(Value("int64")))),
        )

    def add_batch(self, **columns: Sequence):
        """Adds `predictions`, `references`, `passage_words` and `evidence_words`, each with an entry per example."""
        _check_equally_many(**columns)
        super().add_batch(**{name: list(column) for name, column in columns.items()})

    def _compute(self, *, predictions, references, passage_words, evidence_words, **cutoffs) -> dict:
        examples = zip(predictions, references, passage_words, evidence_words, strict=True)
        examples = progress(examples, "scored", "rankings", total=len(predictions))
        scores = [retrieval_scores(*example, **cutoffs) for example in examples if example[1]]
        names = scores[0] if scores else ()
        means = {name: math.fsum(score[name] for score in scores) / len(scores) for name in names}
        return {**means, "examples": len(scores)}


def score_rankings(examples: Sequence[Example], rankings: Sequence[Ranking], evidence: Sequence) -> dict:
    """Scores the examples' rankings against `evidence`, a list or None for each, with `Retrieval`."""
    columns = {"predictions": [], "references": [], "passage_words": []}
    rows = zip(examples, rankings, evidence, strict=True)
    for example, ranking, relevant in progress(rows, "read", "rankings", total=len(examples)):
        # only these passages are read, and numbered anew: a corpus may be large
        numbers = list(dict.fromkeys([passage for passage, _ in ranking] + (relevant or [])))
        places = {passage: place for place, passage in enumerate(numbers)}
        texts = [example.document.passages[number] for number in numbers]
        columns["predictions"].append([places[passage] for passage, _ in ranking])
        columns["references"].append([places[passage] for passage in relevant or []])
        columns["passage_words"].append(list(map(count_words, texts)))
    return Retrieval().compute(**columns, evidence_words=[example.evidence_words for example in examples])
