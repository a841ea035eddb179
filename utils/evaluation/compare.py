"""Compares two rankings or summaries of the same queries: both means and their difference, with 95% intervals.

    python -m utils.evaluation.compare outputs/retrieve/retrieved.validation.jsonl bm25
    python -m utils.evaluation.compare ours.run theirs.run --qrels test.tsv --metric ndcg@10
    python -m utils.evaluation.compare A/predictions.validation.jsonl B/predictions.validation.jsonl --metric rouge1

A side is a hand-over file of train_retrieve.py (*.jsonl), a TREC run, or the word bm25, which ranks the passages of the
hand-over file on the other side. B is optional. The evidence of each hand-over file is its own; a run and bm25 use the
evidence of the hand-over file on the other side. With --qrels, all evidence comes from there. Queries are matched by
id. With a ROUGE metric, both sides are predictions of train_summarize.py or retrieve_and_summarize.py. FILE.jsonl#2 is
the ranking, or the draft, of the second hop in a file of retrieve_and_summarize.py; a search that ended earlier counts
with its last hop.

The intervals are percentiles of bootstrap means. Documents are drawn with replacement, each with all its queries,
because queries about one document are not independent. Without a hand-over file, or if all queries are about one
document (a collection), queries are drawn one by one.
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
from utils.data.fields import read_summaries
from utils.data.loading import load_examples
from utils.data.rows import Row, build_all, listed_fields, read_identifier, read_rows
from utils.data.trec import by_passage_number, read_qrels, read_run
from utils.data.words import count_words
from utils.errors import BadRecord, DataError, UsageError
from utils.evaluation.intervals import bootstrap_means
from utils.retrieval.bm25 import bm25_rankings

METRIC = re.compile(r"(recall|mrr|ndcg|map|gold_words)@([1-9][0-9]{0,6})")
ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m utils.evaluation.compare", description=__doc__.partition("\n\n")[0])
    parser.add_argument("A", help="a hand-over file (*.jsonl), a TREC run, bm25, or with ROUGE a file of predictions")
    parser.add_argument("B", nargs="?", help="likewise; without it only A is scored")
    parser.add_argument(
        "--metric",
        default="gold_words@1024",
        help="recall@k, mrr@k, ndcg@k, map@k, gold_words@N, rouge1, rouge2, rougeL or rougeLsum [%(default)s]",
    )
    parser.add_argument("--qrels", help="evidence by query: TREC qrels or BEIR's tsv [that of the hand-over files]")
    parser.add_argument("--language", help="that of bm25's words: a code or name such as de or german, or none [en]")
    parser.add_argument("--draws", type=int, default=10_000, help="draws of the bootstrap [%(default)s]")
    parser.add_argument("--seed", type=int, default=42, help="seed of the draws [%(default)s]")
    args = parser.parse_args(arguments)
    if args.draws < 1 or args.seed < 0:
        parser.error("give --draws of 1 or more and a --seed of 0 or more")
    if args.metric in ROUGE:
        if args.qrels or args.language or not all(side is None or is_hand_over(side) for side in (args.A, args.B)):
            parser.error(f"--metric {args.metric} compares predictions (*.jsonl), without --qrels and --language")
        return args
    metric = METRIC.fullmatch(args.metric)
    has_hand_over = any(side and is_hand_over(side) for side in (args.A, args.B))
    if not metric:
        parser.error(
            f"--metric {args.metric}: give recall@k, mrr@k, ndcg@k, map@k, gold_words@N, such as recall@5; or rouge1"
        )
    if args.language is not None and "bm25" not in (args.A, args.B):
        parser.error(f"--language {args.language} has no effect without bm25 on one side")
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
    if "bm25" in sides:
        for path in {split_hop(side)[0] for side in sides if is_hand_over(side)}:
            if is_of_corpus(path):
                raise UsageError(f"{path}: holds only what was found in a corpus, which bm25 cannot rank fairly; the "
                                 "log of train_retrieve.py has BM25's scores in the corpus")  # fmt: skip
    document_of = {}
    asked: list[dict] = []  # of each side that has them, the question and references that an id stands for
    if args.metric in ROUGE:
        by_side = [score_predictions(side, args.metric, document_of, asked) for side in sides]
    else:
        hand_overs = {side: read_hand_over(side, args.qrels) for side in sides if is_hand_over(side)}
        by_side = [score_side(side, hand_overs, args.metric, args.qrels, args.language) for side in sides]
        document_of = {example.id: example.document.id for example in next(iter(hand_overs.values()), ())}
        asked = [{example.id: [example.query] for example in examples} for examples in hand_overs.values()]
    for query, texts in asked[0].items() if asked else ():
        others = asked[-1].get(query, texts)
        if any(one and other and one != other for one, other in zip(texts, others, strict=True)):
            raise DataError(
                f"{args.A} and {args.B}: '{query}' is another example there; compare files of the same data"
            )
    queries = [query for query in by_side[0] if query in by_side[-1]]
    left_out = len(set().union(*by_side)) - len(queries)
    if not queries:
        what = "reference" if args.metric in ROUGE else "evidence"
        none = f"{args.A} and {args.B} have no query with {what} in common; queries are matched by id"
        raise DataError(none if args.B else f"{args.A} has no query with {what}")
    if left_out:
        print(f"{left_out} queries are on one side only and left out")

    groups, grouping = [document_of.get(query) for query in queries], "drawn one by one"
    if (documents := len(set(groups))) > 1:
        grouping = f"about {documents} documents, drawn by document"
    else:
        groups = queries
    print(f"{args.metric}, {len(queries)} queries {grouping}, {args.draws:,} draws")

    rows = {name: [scores[query] for query in queries] for name, scores in zip("AB", by_side, strict=False)}
    if args.B:
        rows["A - B"] = difference = np.subtract(rows["A"], rows["B"])
    scores = np.stack(list(rows.values()), axis=1)
    means = bootstrap_means(scores, groups, draws=args.draws, seed=args.seed)
    intervals = np.percentile(means, [2.5, 97.5], axis=0).T
    for name, column, (low, high), side in zip(rows, scores.T, intervals, [*sides, ""], strict=False):
        print(f"{name:<6}{column.mean():7.2f}  [{low:.2f}, {high:.2f}]  {side}".rstrip())
    if args.B:
        better, worse = (difference > 1e-9).sum(), (difference < -1e-9).sum()  # not rounding errors
        print(f"A is better on {better} queries, equal on {len(queries) - better - worse}, worse on {worse}")


def score_predictions(path: str, metric: str, document_of: dict[str, str], asked: list) -> dict[str, float]:
    """ROUGE of each prediction that has a reference, by example id. Adds the documents and texts of the examples."""
    from utils.evaluation.rouge import rouge_scores  # imports `evaluate`, which takes seconds

    scores, (path, hop), most = {}, split_hop(path), [0]
    asked.append({})

    def take(row: Row) -> None:
        key, prediction = read_identifier(row.record, "id"), row.record.get("prediction")
        hops = row.record.get("hops")
        most[0] = max(most[0], len(hops) if isinstance(hops, list) else 0)
        if hop and isinstance(hops, list) and len(hops) > hop:  # else the last hop's
            prediction = hops[hop - 1].get("draft")
        if not isinstance(prediction, str):
            raise BadRecord(f"no 'prediction'; {listed_fields(row.record)}")
        document_of[key] = document_of.get(key) or row.record.get("doc_id")
        references = read_summaries(row.record, "summary", required=False)
        asked[-1][key] = [row.record.get("query"), references]
        if references:
            scores[key] = rouge_scores(prediction, references)[metric]

    columns = {name: name for name in ("id", "prediction", "summary")}
    rows = read_rows(path, "validation", None, ("summary",))
    build_all(rows, path, take, columns, [("id",), ("prediction",)], holds="record of 'id' and 'prediction'",
              remedy="give the predictions of train_summarize.py or retrieve_and_summarize.py")  # fmt: skip
    if hop > most[0]:
        raise UsageError(f"{path}#{hop}: no example was searched for {hop} hops")
    return scores


def is_of_corpus(path: str) -> bool:
    """Whether a hand-over file's passages are those that were found in a corpus, and the evidence."""
    first = next(read_rows(path, "validation", None, ()), None)
    return bool(first and first.record and "passage_ids" in first.record)


def is_hand_over(side: str) -> bool:
    return ".jsonl" in Path(split_hop(side)[0]).suffixes


def split_hop(side: str) -> tuple[str, int]:
    """The path and the number of the hop in a name such as `predictions.validation.jsonl#2`; 0: the last one."""
    path, _, hop = side.rpartition("#")
    return (path, int(hop)) if path and hop.isdecimal() and int(hop) else (side, 0)


def read_hand_over(path: str, qrels_file: str | None) -> list[Example]:
    """Reads the examples of a hand-over file that have evidence: in the qrels file if given, else their own."""
    path, hop = split_hop(path)
    examples = list(load_examples(path, require_summary=False))
    if hop and not any(len(example.hops) >= hop for example in examples):
        raise UsageError(f"{path}#{hop}: no example was searched for {hop} hops")
    if hop:
        examples = [
            dataclasses.replace(e, retrieved=e.hops[hop - 1].retrieved) if len(e.hops) > hop else e for e in examples
        ]
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


def score_side(
    side: str, hand_overs: dict[str, list], metric: str, qrels_file: str | None, language: str | None = None
) -> dict[str, float]:
    """Scores one side by query. A run or bm25 ranks for the examples of the first hand-over file, if there is one."""
    if side in hand_overs:
        return score_examples(metric, hand_overs[side], [example.retrieved for example in hand_overs[side]])
    examples = next(iter(hand_overs.values()), None)
    if side == "bm25":
        rankings = bm25_rankings(examples, language=language, say=print)
        # as long as the other side's, which the file may have cut
        rankings = [ranking[: len(e.retrieved)] for e, ranking in zip(examples, rankings, strict=True)]
        return score_examples(metric, examples, rankings)
    run = read_run(side)
    if examples:
        scores = score_examples(metric, examples, by_passage_number(side, run, examples))
    else:
        scores = score_run(metric, run, read_qrels(qrels_file))
    absent = sum(query not in run for query in scores)
    if absent == len(scores):
        raise DataError(f"{side}: no line for any query with evidence; a run's qids must be ids of examples or qrels")
    if absent:
        print(f"{absent} of {len(scores)} queries have no line in {side} and score 0 there")
    return scores


def score_examples(metric: str, examples: Sequence[Example], rankings: Sequence[Ranking]) -> dict[str, float]:
    """Scores the ranking of each example, 0 to 100, by example id."""
    documents = {example.document for example in examples}
    words_of = {document: list(map(count_words, document.passages)) for document in documents}
    scores = {}
    for example, ranking in zip(examples, rankings, strict=True):
        passages = [passage for passage, _ in ranking]
        scores[example.id] = _score(
            metric, passages, example.evidence, words_of[example.document], example.evidence_words
        )
    return scores


def score_run(
    metric: str, run: dict[str, list[tuple[str, float]]], qrels: dict[str, dict[str, int]]
) -> dict[str, float]:
    """Scores a run, 0 to 100, for each query that has evidence in the qrels. A query that the run lacks scores 0."""
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
    options = {"recall": "recall_cutoffs", "gold_words": "word_budget", "map": "map_cutoff"}
    option = options.get(kind, "rank_cutoff")
    return retrieval_scores(*case, **{option: (int(number),) if kind == "recall" else int(number)})[metric]


if __name__ == "__main__":
    try:
        main()
    except (DataError, UsageError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
