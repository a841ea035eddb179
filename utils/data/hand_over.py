"""Files with which the stages hand examples on: rankings, drafts, predictions and hops."""

import itertools
import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.data.examples import Corpus, Example, Hop, Ranking, blocks
from utils.data.fields import read_passage_ids, read_passage_numbers
from utils.data.rows import SHOWN_PROBLEMS, Row, build_all, listed_fields, raise_all, read_identifier, read_rows, shown
from utils.data.trec import write_qrels, write_run
from utils.errors import BadRecord, DataError
from utils.files import write_jsonl
from utils.progress import progress
from utils.tables import values

logger = logging.getLogger(__name__)


def read_drafts(path: str | os.PathLike, examples: Sequence[Example]) -> list[list[tuple[str, list[int]]]]:
    """The drafts in a file for each example, found by id; each with the passage numbers that it was written from.

    A record has an `id` and either `hops`, as retrieve_and_summarize.py writes them, or one `draft` or `prediction` of
    any tool. With examples of a corpus, `read` numbers the `passage_ids` of the record, or holds such ids itself. An
    example without a draft that has words gets an empty list; how many do is logged. Raises DataError for unusable
    records, such as those of another query or of other passages, or if no example has a draft.
    """
    by_id: dict[str, list[tuple[str, list]]] = {}
    passages = {example.id: len(example.document.passages) for example in examples}
    queries = {example.id: example.query for example in examples}
    document = examples[0].document
    corpus, places = document if isinstance(document, Corpus) else None, {}  # the first place that names each id

    def take(row: Row) -> None:
        key, draft = read_identifier(row.record, "id"), row.record.get("draft", row.record.get("prediction"))
        hops = row.record.get("hops", [{"draft": draft}])
        if not isinstance(hops, list) or not all(isinstance(hop, dict) for hop in hops):
            raise BadRecord(f'\'hops\' must be a list of {{"draft": "...", "read": [3, 7]}}, not {shown(hops)}')
        query, own = row.record.get("query", queries.get(key)), row.record.get("passages")
        if key in queries and isinstance(query, str) and query.split() != queries[key].split():
            raise BadRecord(f"'{key}' asks {shown(query)} here, but {shown(queries[key])} in the examples")
        are_numbered = corpus is None and isinstance(own, list) and any("read" in hop for hop in hops)
        if are_numbered and len(own) != passages.get(key, len(own)):
            raise BadRecord(f"'{key}' has {len(own)} passages here, but {passages[key]} in the examples; the drafts "
                            "were made with other flags, such as --merge_passages")  # fmt: skip
        for hop in hops:
            text = hop.get("draft")
            if not isinstance(text, str):
                raise BadRecord(f"no 'draft', nor 'prediction' or 'hops' with drafts; {listed_fields(row.record)}")
            if text.strip() and key in passages:
                read = read_passage_numbers(hop, passages[key]) if corpus is None else read_passage_ids(hop, row.record)
                places.update({passage: row.place for passage in read if passage not in places} if corpus else {})
                by_id.setdefault(key, []).append((text, read))

    rows = read_rows(path, "train", None, ("hops", "passage_ids"))
    columns = {name: name for name in ("id", "draft", "prediction", "hops")}
    required = [("id",), ("draft", "prediction", "hops")]
    remedy = "fix the lines, or write the file again"
    build_all(rows, str(path), take, columns, required, holds="record of 'id' and 'draft'", remedy=remedy)
    if corpus:
        ids = enumerate(itertools.chain.from_iterable(blocks(corpus.ids)))
        numbers = {key: number for number, key in ids if key in places}
        unknown = [f"{place}: a draft read passage '{key}', but the corpus holds no such '_id'"
                   for key, place in places.items() if key not in numbers]  # fmt: skip
        raise_all(unknown, "name the --corpus_file that the drafts were made with, or write the file again")
        for drafts in by_id.values():
            drafts[:] = [(text, [numbers[key] for key in read]) for text, read in drafts]
    found = [by_id.get(example.id, []) for example in examples]
    if not any(found):
        raise DataError(
            f"{path}: no draft for any of {len(examples)} examples, such as '{examples[0].id}'; "
            "drafts are matched by 'id'"
        )
    absent = [example.id for example, drafts in zip(examples, found, strict=True) if not drafts]
    if absent and os.environ.get("RANK", "0") == "0":
        logger.warning("%s has no draft for %d of %d examples, such as '%s': they train with drafts made of their "
                       "references, and are validated without drafts",
                       path, len(absent), len(found), absent[0])  # fmt: skip
    return found


def have_rankings(splits: dict[str, Sequence[Example]]) -> bool:
    """Whether the examples of all splits bring their rankings along.

    Raises DataError if only some do: the summarizer would read passages from two sources.
    """
    with_ids = (zip(values(split, "id"), values(split, "retrieved"), strict=True) for split in splits.values())
    without = [example_id for example_id, ranking in itertools.chain.from_iterable(with_ids) if ranking is None]
    examples = sum(map(len, splits.values()))
    if 0 < len(without) < examples:
        raise DataError(
            f"{len(without)} of {examples} examples ({', '.join(splits)}) have no 'retrieved', such as "
            f"'{without[0]}': rank all of them, or choose where passages come from with --retriever"
        )
    return not without


def write_hand_over(
    folder: Path, split: str, examples: Sequence[Example], hops: Iterable[Sequence[Hop]], top_k: int, with_trec: bool
) -> Path:
    """Writes `retrieved.<split>.jsonl` and, with `with_trec`, a TREC run and qrels, each of the `top_k` best passages.

    Their rankings are those of the last hop. If there is more than one hop, the records hold all of them: stage 2 then
    trains on what each hop found. Returns the path of the first file.
    """
    path, rankings = folder / f"retrieved.{split}.jsonl", []  # rankings for TREC's files

    def cut() -> Iterator[list[Hop]]:
        for of_example in hops:
            of_example = [Hop(hop.draft, hop.read, hop.retrieved[:top_k]) for hop in of_example]
            if with_trec:
                rankings.append(of_example[-1].retrieved)
            yield of_example

    write_retrieved(path, examples, cut())
    if with_trec:
        write_run(folder / f"run.{split}.trec", examples, rankings, tag="multistep-retrieve-summarize")
        write_qrels(folder / f"qrels.{split}.trec", examples)
    return path


def write_retrieved(path: str | os.PathLike, examples: Sequence[Example], hops: Iterable[Sequence[Hop]]) -> None:
    """Writes the hand-over file: the examples with their rankings, which `load_examples` reads back.

    Examples of a corpus become examples with their own passages (see `hops_record`). An example without any passage is
    left out, with a warning.
    """
    left_out = []

    def records() -> Iterator[dict]:
        for example, of_example in zip(examples, hops, strict=True):
            record = hops_record(example, of_example)
            if len(of_example) == 1:
                del record["hops"]
            if record["passages"]:
                yield record
            else:
                left_out.append(example.id)

    write_jsonl(path, records())
    if left_out:
        names = ", ".join(left_out[:SHOWN_PROBLEMS])
        logger.warning("%s is without %d examples, for which nothing was found: %s", path, len(left_out), names)


def write_predictions(folder: Path, split: str, rows: Sequence[dict], predictions: Iterable[str]) -> Path:
    """Writes `predictions.<split>.jsonl`: each with its example and the passages that it was written from.

    Returns the path. A row holds an `example` and the numbers of the `passages` that the summarizer read.
    """
    path = folder / f"predictions.{split}.jsonl"
    write_jsonl(path, (
        {
            "id": row["example"].id,
            "doc_id": row["example"].document.id,
            "query": row["example"].query,
            "prediction": prediction,
            "summary": row["example"].summaries,
            "evidence": row["example"].evidence,
            "passages": [{"passage": i, "text": row["example"].document.passages[i]} for i in row["passages"]],
        }
        for row, prediction in progress(zip(rows, predictions, strict=True), "wrote", "predictions", total=len(rows))
    ))  # fmt: skip
    return path


def hops_record(example: Example, hops: Sequence[Hop], prediction: str | None = None) -> dict:
    """The record of an example with all its hops: a record of a hand-over file with the ranking of the last hop.

    For an example of a corpus it has only the passages that it names, numbered anew: those of the last ranking, in its
    order, then those of earlier hops, and the evidence. `passage_ids` holds their ids in the corpus.
    """
    document, evidence, evidence_words = example.document, example.evidence, example.evidence_words
    record: dict[str, Any] = {"id": example.id, "query": example.query}
    if isinstance(document, Corpus):
        named = [[passage for passage, _ in hop.retrieved] + list(hop.read) for hop in reversed(hops)]
        kept = list(dict.fromkeys(itertools.chain(*named, evidence or [])))
        number = {passage: place for place, passage in enumerate(kept)}
        if evidence:
            words = dict(zip([number[passage] for passage in evidence], evidence_words, strict=True))
            evidence, evidence_words = sorted(words), [words[place] for place in sorted(words)]
        text = {"passages": document.passages[kept], "passage_ids": document.ids[kept]}
    else:
        number = range(len(document.passages))  # the same numbers
        text = {"passages": list(document.passages)}  # the longest field comes last
        record["doc_id"] = document.id
        if not document.is_ordered:
            record["is_ordered"] = False
    if example.summaries:
        record["summary"] = example.summaries if len(example.summaries) > 1 else example.summaries[0]
    if evidence:
        record |= {"evidence": evidence, "evidence_words": evidence_words}
    rankings = [_ranking_entries(example, hop.retrieved, number) for hop in hops]
    record["retrieved"] = rankings[-1]
    if prediction is not None:
        record["prediction"] = prediction
    record["hops"] = [
        {"draft": hop.draft, "read": [number[passage] for passage in hop.read], "retrieved": ranking}
        for hop, ranking in zip(hops, rankings, strict=True)
    ]
    return record | text


def _ranking_entries(example: Example, ranking: Ranking, number) -> list[dict]:
    for passage, score in ranking:
        if not math.isfinite(score):
            raise ValueError(f"example '{example.id}': the score of passage {passage} is {score}")
    return [{"passage": number[passage], "score": float(f"{score:.6g}")} for passage, score in ranking]
