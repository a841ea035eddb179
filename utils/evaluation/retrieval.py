"""Recall, MRR, nDCG and gold words within a word budget, as a local `evaluate` module."""

import math
from collections.abc import Sequence

import evaluate
from datasets import Features, Value
from datasets import Sequence as ListOf

from utils.data.examples import Corpus, Example, Ranking
from utils.evaluation.rouge import LocalMetric, _check_equally_many

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
) -> dict[str, float]:
    """Recall@k, MRR@k, nDCG@k (binary gains) and gold_words@budget, 0 to 100, of one ranking of a document's passages.

    `ranking` holds passage numbers, best first, and may be cut short; `passage_words` the number of words of every
    passage; `evidence_words` the number of gold words in each passage of `evidence` (default: all its words).

    gold_words@budget is the share of the gold words that a reader finds who takes passages in ranked order until the
    budget of words is spent. The passage in which it runs out is read in part, and gives the same part of its gold
    words.
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

    found, budget_left = 0.0, word_budget
    for passage in ranking:
        words_read = min(passage_words[passage], budget_left)
        if words_read and passage in gold_words:
            found += gold_words[passage] * words_read / passage_words[passage]
        budget_left -= words_read
    scores[f"gold_words@{word_budget}"] = 100 * found / max(sum(gold_words.values()), 1)
    return scores


class Retrieval(LocalMetric):
    """Retrieval scores (see `retrieval_scores`, whose keywords `compute` accepts), mean over examples with evidence.

    `predictions` are rankings of passage numbers, `references` the evidence or None. The result counts the examples
    that have evidence as `examples`; if there are none, that count is all it holds.
    """

    def _info(self) -> evaluate.MetricInfo:
        numbers = ListOf(Value("int64"))
        return evaluate.MetricInfo(
            description="Recall@k, MRR@k, nDCG@k and share of gold words within a word budget, in percent.",
            citation="",
            inputs_description="predictions: ranked passage numbers; references: evidence; words of all passages; "
            "gold words of the evidence.",
            features=Features(
                {"predictions": numbers, "references": numbers, "passage_words": numbers, "evidence_words": numbers}
            ),
        )

    def add_batch(self, *, predictions, references, passage_words, evidence_words):
        """Adds rankings with evidence, the words of all passages, and the gold words of the evidence."""
        columns = {
            "predictions": predictions,
            "references": references,
            "passage_words": passage_words,
            "evidence_words": evidence_words,
        }
        _check_equally_many(**columns)
        super().add_batch(**{name: list(column) for name, column in columns.items()})

    def _compute(self, *, predictions, references, passage_words, evidence_words, **cutoffs) -> dict:
        examples = zip(predictions, references, passage_words, evidence_words, strict=True)
        scores = [retrieval_scores(*example, **cutoffs) for example in examples if example[1]]
        means = {
            name: math.fsum(score[name] for score in scores) / len(scores) for name in (scores[0] if scores else ())
        }
        return {**means, "examples": len(scores)}


def score_rankings(examples: Sequence[Example], rankings: Sequence[Ranking], evidence: Sequence) -> dict:
    """`Retrieval` of the rankings of examples' passages, (passage number, score) pairs, against `evidence` or None.

    Of a corpus only the passages in a ranking or its evidence are read.
    """
    columns = {"predictions": [], "references": [], "passage_words": []}
    for example, ranking, relevant in zip(examples, rankings, evidence, strict=True):
        numbers = list(dict.fromkeys([passage for passage, _ in ranking] + (relevant or [])))
        places = {passage: place for place, passage in enumerate(numbers)}  # they are numbered anew
        texts = example.document.passages
        if isinstance(example.document, Corpus):
            texts = texts[numbers] if numbers else []
        else:
            texts = [texts[number] for number in numbers]
        columns["predictions"].append(list(range(len(ranking))))
        columns["references"].append([places[passage] for passage in relevant or []])
        columns["passage_words"].append([len(text.split()) for text in texts])
    return Retrieval().compute(**columns, evidence_words=[example.evidence_words for example in examples])
