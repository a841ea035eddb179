"""Compares two rankings of the same queries: both means and their paired difference, with 95% bootstrap intervals.

    python -m utils.evaluation.compare outputs/retrieve/retrieved.validation.jsonl bm25
    python -m utils.evaluation.compare ours.run theirs.run --qrels test.tsv --metric ndcg@10

A side is a hand-over file of train_retrieve.py (.jsonl), a TREC run, or the word bm25, which ranks the passages of the
hand-over file on the other side. Each hand-over file has its own evidence, which is also that of a run or bm25 on the
other side; runs belong to its examples by id. With --qrels all evidence comes from there. B may be left out.

Intervals are percentiles of the means over documents drawn with replacement, all queries about a document together,
because they are not independent. Without a hand-over file, or if all queries are about one document (a collection),
the queries are drawn.
"""

import argparse
import dataclasses
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils.cli.arguments import Parser
from utils.data.examples import Example, Ranking
from utils.data.loading import load_examples
from utils.data.trec import by_passage_number, read_qrels, read_run
from utils.errors import DataError
from utils.evaluation.intervals import bootstrap_means
from utils.retrieval.bm25 import bm25_rankings

METRIC = re.compile(r"(recall|mrr|ndcg|gold_words)@([1-9][0-9]{0,6})")


def is_hand_over(side: str) -> bool:
    return ".jsonl" in Path(side).suffixes


def read_hand_over(path: str, qrels_file: str | None) -> list[Example]:
    """The examples of a hand-over file that have evidence: their own, or with a qrels file what that holds for them."""
    examples = load_examples(path, require_summary=False)
    if unranked := [example.id for example in examples if example.retrieved is None]:
        raise DataError(
            f"{path}: example '{unranked[0]}' has no 'retrieved'; give a hand-over file of train_retrieve.py"
        )
    if qrels_file:
        qrels = {query: list(grades.items()) for query, grades in read_qrels(qrels_file).items()}
        judged = by_passage_number(qrels_file, qrels, examples)
        for number, grades in enumerate(judged):
            evidence = sorted(passage for passage, grade in grades if grade > 0)
            examples[number] = dataclasses.replace(examples[number], evidence=evidence, evidence_words=None)
    with_evidence = [example for example in examples if example.evidence]
    if not with_evidence:
        raise DataError(f"{qrels_file or path}: no evidence for an example of {path}; give evidence with --qrels")
    return with_evidence


def score_examples(metric: str, examples: Sequence[Example], rankings: Sequence[Ranking]) -> dict[str, float]:
    """The score, 0 to 100, of each example's ranking, by example id."""
    documents = {id(example.document): example.document for example in examples}
    words_of = {key: [len(text.split()) for text in document.passages] for key, document in documents.items()}
    scores = {}
    for example, ranking in zip(examples, rankings, strict=True):
        passages, words = [passage for passage, _ in ranking], words_of[id(example.document)]
        scores[example.id] = _score(metric, passages, example.evidence, words, example.evidence_words)
    return scores


def score_run(
    metric: str, run: dict[str, list[tuple[str, float]]], qrels: dict[str, dict[str, int]]
) -> dict[str, float]:
    """The score, 0 to 100, of a run for each query of the qrels that has evidence; 0 for those that it lacks."""
    scores = {}
    for query, grades in qrels.items():
        evidence = [docid for docid, grade in grades.items() if grade > 0]
        if evidence:
            ranking = [docid for docid, _ in run.get(query, ())]
            numbers = {docid: number for number, docid in enumerate(dict.fromkeys(ranking + evidence))}
            found, gold = ([numbers[docid] for docid in docids] for docids in (ranking, evidence))
            scores[query] = _score(metric, found, gold, [1] * len(numbers))
    return scores


def _score(metric: str, *case) -> float:
    from utils.evaluation.retrieval import retrieval_scores  # imports `evaluate`, which takes seconds

    kind, number = METRIC.fullmatch(metric).groups()
    option = {"recall": "recall_cutoffs", "gold_words": "word_budget"}.get(kind, "rank_cutoff")
    return retrieval_scores(*case, **{option: (int(number),) if kind == "recall" else int(number)})[metric]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m utils.evaluation.compare", description=__doc__.partition("\n\n")[0])
    parser.add_argument("A", help="a hand-over file (*.jsonl), a TREC run, or bm25")
    parser.add_argument("B", nargs="?", help="likewise; without it A alone is scored")
    parser.add_argument(
        "--metric", default="gold_words@1024", help="recall@k, mrr@k, ndcg@k or gold_words@N [%(default)s]"
    )
    parser.add_argument("--qrels", help="evidence, by query: TREC's qrels or BEIR's tsv [that of the hand-over files]")
    parser.add_argument("--draws", type=int, default=10_000, help="draws of the bootstrap [%(default)s]")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draws [%(default)s]")
    args = parser.parse_args(arguments)
    metric = METRIC.fullmatch(args.metric)
    has_hand_over = any(side and is_hand_over(side) for side in (args.A, args.B))
    if not metric:
        parser.error(f"--metric {args.metric}: recall@k, mrr@k, ndcg@k or gold_words@N is wanted, such as recall@5")
    if args.draws < 1 or args.seed < 0:
        parser.error("--draws of 1 or more and a --seed of 0 or more are wanted")
    if "bm25" in (args.A, args.B) and not has_hand_over:
        parser.error("bm25 ranks the passages of a hand-over file (*.jsonl): give one on the other side")
    if metric[1] == "gold_words" and not has_hand_over:
        parser.error(f"--metric {args.metric} counts words of passages: give a hand-over file (*.jsonl) on one side")
    if not args.qrels and not has_hand_over:
        parser.error("runs hold no evidence: give --qrels, or a hand-over file (*.jsonl) on the other side")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    sides = [args.A, args.B] if args.B else [args.A]
    hand_overs = {side: read_hand_over(side, args.qrels) for side in sides if is_hand_over(side)}
    known = next(iter(hand_overs.values()), None)  # the examples of the first

    def scores_of(side: str) -> dict[str, float]:
        if side == "bm25":
            return score_examples(args.metric, known, bm25_rankings(known))
        if side in hand_overs:
            return score_examples(args.metric, hand_overs[side], [example.retrieved for example in hand_overs[side]])
        run = read_run(side)
        scores = (
            score_examples(args.metric, known, by_passage_number(side, run, known))
            if known
            else score_run(args.metric, run, read_qrels(args.qrels))
        )
        absent = sum(query not in run for query in scores)
        if absent == len(scores):
            raise DataError(
                f"{side}: no line for any query with evidence; a run's qids must be ids of examples or qrels"
            )
        if absent:
            print(f"{absent} of {len(scores)} queries have no line in {side} and score 0 there")
        return scores

    of_sides = [scores_of(side) for side in sides]
    queries = [query for query in of_sides[0] if query in of_sides[-1]]
    left_out = len(set().union(*of_sides)) - len(queries)
    if not queries:
        raise DataError(f"{args.A} and {args.B} have no query with evidence in common; queries are matched by id")
    if left_out:
        print(f"{left_out} queries are on one side only and left out")

    scores = np.array([[side[query] for side in of_sides] for query in queries])
    document_of = {example.id: example.document.id for example in known or ()}
    documents = len({document_of.get(query) for query in queries})
    if documents > 1:
        groups, grouping = [document_of[query] for query in queries], f"about {documents} documents, drawn by document"
    else:
        groups, grouping = queries, "drawn one by one"
    print(f"{args.metric}, {len(queries)} queries {grouping}, {args.draws:,} draws")
    rows = list(zip("AB", scores.T, sides, strict=False))
    if args.B:
        difference = scores[:, 0] - scores[:, 1]
        rows.append(("A - B", difference, ""))
    means = bootstrap_means(
        np.stack([column for _, column, _ in rows], axis=1), groups, draws=args.draws, seed=args.seed
    )
    for (name, column, side), (low, high) in zip(rows, np.percentile(means, [2.5, 97.5], axis=0).T, strict=True):
        print(f"{name:<6}{column.mean():7.2f}  [{low:.2f}, {high:.2f}]  {side}".rstrip())
    if args.B:
        better, worse = (difference > 1e-9).sum(), (difference < -1e-9).sum()  # rounding is no difference
        print(f"A is better on {better} queries, equal on {len(queries) - better - worse}, worse on {worse}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
