"""Scores of rankings by question: beside BM25's, at each cut-off and each budget of words."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from utils.data.examples import Document, Example
from utils.data.words import count_words
from utils.errors import DataError
from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.ranking import KEPT, WRITTEN

MOST_SCORED = 2000  # questions; of a longer file the first
RANKS = 100
BUDGETS = 2048  # words; the curve ends there
STEP = 32  # words between two points of the curve
COLUMNS = ("recall@1", "recall@5", "recall@10", "recall@20", "mrr@10", "ndcg@10", "gold_words@1024")


@dataclass
class Ranked:
    """The rankings of the questions that have evidence.

    Attributes:
        examples: the questions, with their passages and evidence.
        scores: {"BM25" or "hop 1", ...: {metric: an array with the score of each question, in percent}}.
        recall: {the same: (RANKS,) mean recall by number of passages, in percent}.
        gold_words: {the same: mean share of gold words by budget, in percent}; the budgets are multiples of STEP.
        own: the name of the run's own ranking: the last hop of a run that summarized, else the first hop, because the
            drafts of the second were given or imitated.
        ranks: {the same: for each question {passage of evidence: its rank, from 1}}.
        is_cut: whether the file has more questions than were scored.
        whole_ranks: where the file has cut rankings, if that is too early for all scores; else 0.
    """

    examples: list[Example]
    scores: dict[str, dict[str, np.ndarray]]
    recall: dict[str, np.ndarray]
    gold_words: dict[str, np.ndarray]
    ranks: dict[str, list[dict[int, int]]]
    own: str
    is_cut: bool = False
    whole_ranks: int = 0

    def means(self) -> dict[str, dict[str, float]]:
        return {name: {metric: float(column.mean()) for metric, column in of_one.items()}
                for name, of_one in self.scores.items()}  # fmt: skip

    def by_id(self, metric: str) -> dict[str, float]:
        """The scores of the run's own ranking, by the questions' ids."""
        return dict(zip([e.id for e in self.examples], self.scores[self.own][metric].tolist(), strict=True))

    def changes(self, metric: str, first: str, last: str, count: int) -> tuple[list, list]:
        """The questions that gained and that lost most from one ranking to another: (number, points) of each."""
        points = self.scores[last][metric] - self.scores[first][metric]
        order = np.argsort(-points, kind="stable")
        gained = [(int(i), float(points[i])) for i in order[:count] if points[i] > 1e-9]
        return gained, [(int(i), float(points[i])) for i in order[::-1][:count] if points[i] < -1e-9]


def rank_records(records: Iterable[tuple[str, dict]], language: str | None = None) -> Ranked | None:
    """Scores the rankings in records of a hand-over file or a file of hops; None if none has rankings and evidence.

    Examples of a corpus hold only the passages that they name, so BM25's ranking is not known for them.
    """
    from utils.evaluation.retrieval import retrieval_scores  # imports `evaluate`, which takes seconds

    examples, hops, documents, words, is_cut, of_corpus, is_summarized = [], [], {}, {}, False, False, False
    for place, record in records:
        try:
            evidence, passages = record.get("evidence"), record["passages"]
            if not evidence or record.get("retrieved") is None:  # predictions of train_summarize.py have no ranking
                continue
            if len(examples) == MOST_SCORED:
                is_cut = True
                break
            of_corpus, is_summarized = of_corpus or "passage_ids" in record, "prediction" in record
            key = (record.get("doc_id") or "", len(passages)) if "passage_ids" not in record else record["id"]
            if key not in documents or documents[key].passages != passages:
                documents[key] = Document(str(record.get("doc_id") or ""), passages)
                words[documents[key]] = list(map(count_words, passages))
            examples.append(Example(str(record["id"]), record.get("query") or "", documents[key], [], evidence,
                                    record.get("evidence_words"), None))  # fmt: skip
            of_hops = record.get("hops") or [record]
            hops.append([[entry["passage"] for entry in hop["retrieved"]] for hop in of_hops])
        except (LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{place}: not a record of these scripts ({error!r}); write the file again") from error
    if not examples:
        return None
    methods, most = {}, max(map(len, hops))
    if not of_corpus:  # as long as this run's, which the file may have cut
        bm25 = zip(bm25_rankings(examples, language=language), hops, strict=True)
        methods["BM25"] = [[passage for passage, _ in ranking[: len(of_one[-1])]] for ranking, of_one in bm25]
    for hop in range(most):  # a search that ended earlier counts with its last hop
        methods[f"hop {hop + 1}" if most > 1 else "this run"] = [of_one[: hop + 1][-1] for of_one in hops]
    every = [sum(words[example.document]) for example in examples]
    budgets = np.arange(STEP, min(BUDGETS, max(max(every), STEP)) + STEP, STEP)
    own = [name for name in methods if name != "BM25"]
    last, longest = [of_one[-1] for of_one in hops], max(len(of_one[-1]) for of_one in hops)
    if not any(len(ranking) == longest and _is_too_short(ranking, words[example.document], of_corpus)
               for example, ranking in zip(examples, last, strict=True)):  # fmt: skip
        longest = 0
    ranked = Ranked(examples, {}, {}, {}, {}, own[-1 if is_summarized else 0], is_cut, longest)
    for name, rankings in methods.items():
        scores, recall, gold, ranks = [], np.zeros(RANKS), np.zeros(len(budgets)), []
        for example, ranking in zip(examples, rankings, strict=True):
            of_words = words[example.document]
            scores.append(retrieval_scores(ranking, example.evidence, of_words, example.evidence_words))
            hits = np.isin(np.asarray(ranking[:RANKS], dtype=int), example.evidence)
            recall += np.concatenate([hits, np.zeros(RANKS - len(hits))]).cumsum() / len(example.evidence)
            gold += gold_words_by_budget(ranking, example.evidence, of_words, example.evidence_words, budgets)
            places = {passage: rank for rank, passage in enumerate(ranking, 1)}
            ranks.append({passage: places[passage] for passage in example.evidence if passage in places})
        ranked.scores[name] = {metric: np.array([of_one[metric] for of_one in scores]) for metric in COLUMNS}
        ranked.recall[name], ranked.gold_words[name] = 100 * recall / len(examples), 100 * gold / len(examples)
        if longest:  # beyond it, the curves would only show that
            ranked.recall[name] = ranked.recall[name][:longest]
        ranked.ranks[name] = ranks
    return ranked


def _is_too_short(ranking: list[int], passage_words: list[int], of_corpus: bool) -> bool:
    """Whether a ranking in a file ends before scores do (see `cut_ranking`); a record of a corpus has few passages."""
    is_whole = len(ranking) == len(passage_words) and not of_corpus
    return not is_whole and (len(ranking) < WRITTEN or sum(passage_words[i] for i in ranking) < KEPT - 1)


def beside(first: Ranked, second: Ranked) -> Ranked:
    """Two runs' own rankings of the questions that both have."""
    places = {example.id: number for number, example in enumerate(second.examples)}
    of_both = [(i, places[example.id]) for i, example in enumerate(first.examples) if example.id in places]
    scores, ranks = {}, {}
    for side, (name, run) in enumerate((("first run", first), ("last run", second))):
        rows = [pair[side] for pair in of_both]
        scores[name] = {metric: column[rows] for metric, column in run.scores[run.own].items()}
        ranks[name] = [run.ranks[run.own][row] for row in rows]
    return Ranked([first.examples[i] for i, _ in of_both], scores, {}, {}, ranks, name)


def gold_words_by_budget(ranking, evidence, passage_words, evidence_words, budgets: np.ndarray) -> np.ndarray:
    """The share of gold words that somebody reads within each budget (see `retrieval_scores`); 0 to 1."""
    of_evidence = evidence_words or [passage_words[passage] for passage in evidence]
    gold = dict(zip(evidence, of_evidence, strict=True))
    found = np.zeros(len(budgets))
    starts = itertools.accumulate((passage_words[passage] for passage in ranking), initial=0)
    for passage, start in zip(ranking, starts, strict=False):
        if passage in gold and passage_words[passage]:
            found += gold[passage] * np.clip((budgets - start) / passage_words[passage], 0, 1)
    return found / max(sum(gold.values()), 1)
