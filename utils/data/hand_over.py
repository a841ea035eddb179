"""The hand-over file between the stages: examples with rankings and hops, written and read."""

import logging
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from utils.data.documents import read_identifier
from utils.data.examples import Corpus, Example, Hop, Ranking
from utils.data.fields import read_passage_numbers
from utils.data.rows import SHOWN_PROBLEMS, Row, build_all, listed_fields, read_rows, shown
from utils.data.trec import write_qrels, write_run
from utils.errors import BadRecord, DataError
from utils.files import write_jsonl

logger = logging.getLogger(__name__)


def read_drafts(path: str | os.PathLike, examples: Sequence[Example]) -> list[list[tuple[str, list[int]]]]:
    """For each example the drafts that a file holds for its id, each with the passages that it was written from.

    The file has records of `id` and either `hops`, as retrieve_and_summarize.py writes them, or one `draft` or
    `prediction`, from any tool. An example that it lacks, or whose drafts are empty, gets an empty list. Raises
    DataError for anything unusable, and if it has none of the examples.
    """
    by_id: dict[str, list[tuple[str, list[int]]]] = {}
    passages = {example.id: len(example.document.passages) for example in examples}

    def take(row: Row) -> None:
        key, one = read_identifier(row.record, "id"), row.record.get("draft", row.record.get("prediction"))
        hops = row.record.get("hops", [{"draft": one}])
        if not isinstance(hops, list) or not all(isinstance(hop, dict) for hop in hops):
            raise BadRecord(f'\'hops\' must be a list of {{"draft": "...", "read": [3, 7]}}, not {shown(hops)}')
        for hop in hops:
            text = hop.get("draft")
            if not isinstance(text, str):
                raise BadRecord(f"no 'draft', nor 'prediction' or 'hops' with drafts; {listed_fields(row.record)}")
            if text.strip() and key in passages:
                by_id.setdefault(key, []).append((text, read_passage_numbers(hop, passages[key])))

    rows = read_rows(path, "train", None, ("hops",))
    columns = {name: name for name in ("id", "draft", "prediction", "hops")}
    build_all(rows, str(path), take, columns, [("id",), ("draft", "prediction", "hops")], skip=False,
               rejected_file=None, holds="record of 'id' and 'draft'")  # fmt: skip
    found = [by_id.get(example.id, []) for example in examples]
    if not any(found):
        raise DataError(
            f"{path}: no draft for any of {len(examples)} examples, such as '{examples[0].id}'; drafts go by 'id'"
        )
    return found


def write_retrieved(
    path: str | os.PathLike, examples: Sequence[Example], rankings: Sequence[Sequence[tuple[int, float]]]
) -> None:
    """Writes the hand-over file: each example with `rankings[i]`, its (passage number, score) pairs, best first.

    The file is a self-contained example file: `load_examples` gives the examples back, with the rankings. Examples of a
    corpus become examples with passages of their own: those in the ranking, in its order, then the evidence that is not
    in it; `passage_ids` has their ids in the corpus. Where there is neither, the example is left out, with a warning.
    """
    if len(examples) != len(rankings):
        raise ValueError(f"{len(examples)} examples, but {len(rankings)} rankings")
    left_out = []

    def records() -> Iterator[dict]:
        for example, ranking in zip(examples, rankings, strict=True):
            record = _retrieved_record(example, ranking)
            if record["passages"]:
                yield record
            else:
                left_out.append(example.id)

    write_jsonl(path, records())
    if left_out:
        names = ", ".join(left_out[:SHOWN_PROBLEMS])
        logger.warning("%s is without %d examples, for which nothing was found: %s", path, len(left_out), names)


def write_hand_over(
    folder: Path, split: str, examples: Sequence[Example], rankings: Sequence[Ranking], *, with_trec: bool
) -> None:
    """Writes `retrieved.<split>.jsonl` (see `write_retrieved`) and, if asked for, TREC run and qrels files."""
    write_retrieved(folder / f"retrieved.{split}.jsonl", examples, rankings)
    if with_trec:
        write_run(folder / f"run.{split}.trec", examples, rankings, tag="train_retrieve")
        write_qrels(folder / f"qrels.{split}.trec", examples)


def write_predictions(path: str | os.PathLike, rows: Iterable[dict], predictions: Iterable[str]) -> None:
    """Writes each prediction with its example and the passages that it was written from.

    A row has an `example` and the numbers of its `passages`.
    """
    records = []
    for row, prediction in zip(rows, predictions, strict=True):
        example = row["example"]
        records.append({
            "id": example.id,
            "query": example.query,
            "prediction": prediction,
            "summary": example.summaries,
            "evidence": example.evidence,
            "passages": [{"passage": i, "text": example.document.passages[i]} for i in row["passages"]],
        })  # fmt: skip
    write_jsonl(path, records)


def hops_record(example: Example, hops: Sequence[Hop], prediction: str) -> dict:
    """What retrieve_and_summarize.py writes of an example: a record of a hand-over file, with every hop in it.

    Its ranking is the last hop's.
    """
    record = _retrieved_record(example, hops[-1].retrieved)
    text = {"passages": record.pop("passages")}  # long, and therefore last
    of_hops = [
        {"draft": hop.draft, "read": hop.read, "retrieved": _ranking_entries(example, hop.retrieved)} for hop in hops
    ]
    return record | {"prediction": prediction, "hops": of_hops} | text


def _ranking_entries(example: Example, ranking: Sequence[tuple[int, float]]) -> list[dict]:
    for passage, score in ranking:
        if not math.isfinite(score):
            raise ValueError(f"example '{example.id}': the score of passage {passage} is {score}")
    return [{"passage": int(passage), "score": float(f"{score:.6g}")} for passage, score in ranking]


def _retrieved_record(example: Example, ranking: Sequence[tuple[int, float]]) -> dict:
    document, evidence, evidence_words = example.document, example.evidence, example.evidence_words
    entries = _ranking_entries(example, ranking)
    if isinstance(document, Corpus):  # of which the record keeps what it names, under numbers of its own
        kept = list(dict.fromkeys([entry["passage"] for entry in entries] + (evidence or [])))
        positions = {number: position for position, number in enumerate(kept)}
        entries = [entry | {"passage": positions[entry["passage"]]} for entry in entries]
        if evidence:
            words = dict(zip([positions[number] for number in evidence], evidence_words, strict=True))
            evidence, evidence_words = sorted(words), [words[position] for position in sorted(words)]
        text = {"passages": document.passages[kept], "passage_ids": document.ids[kept]}
    else:
        text = {"passages": document.passages}

    record: dict[str, Any] = {"id": example.id, "query": example.query}
    if not isinstance(document, Corpus):
        record["doc_id"] = document.id
    if example.summaries:
        record["summary"] = example.summaries if len(example.summaries) > 1 else example.summaries[0]
    if evidence:
        record["evidence"] = evidence
        record["evidence_words"] = evidence_words
    record["retrieved"] = entries
    return record | text
