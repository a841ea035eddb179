"""TREC runs (rankings) and qrels (relevance judgements), as search engines write them and trec_eval reads them.

A line of a run is `qid Q0 docid rank score tag`, a line of qrels is `qid 0 docid grade`. The qid is an example's id and
the docid a passage's id (`Document.passage_id`). ASCII white space separates the columns; white space and percent signs
within an id are percent-encoded.
"""

import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TypeVar
from urllib.parse import quote, unquote

import numpy as np

from utils.data.examples import Document, Example, Ranking
from utils.data.rows import Row, build_all, raise_all, read_line_rows, shown
from utils.errors import BadRecord
from utils.files import write_lines

RUN_COLUMNS = ("qid", "Q0", "docid", "rank", "score", "tag")
BEIR_QRELS_COLUMNS = ("query-id", "corpus-id", "score")
TREC_QRELS_COLUMNS = ("query-id", "0", "corpus-id", "score")
Value = TypeVar("Value", float, int)


# ---- writing


def write_run(path: str | os.PathLike, examples: Sequence[Example], rankings: Sequence[Ranking], tag: str) -> None:
    """Writes a TREC run with one ranking for each example, completely or not at all; `tag` names the system.

    trec_eval ignores the ranks: it reads the scores as float32, sorts by score, and breaks ties by descending docid. To
    keep the order of the ranking, a score that is not lower as float32 than the one before is written as the next lower
    float32 number. Raises ValueError for a score that is not finite. An example with an empty ranking has no line.
    """
    if not tag:
        raise ValueError("a run needs a tag: its last column names the system")
    write_lines(path, _run_lines(examples, rankings, _encode(tag)))


def _run_lines(examples: Sequence[Example], rankings: Sequence[Ranking], tag: str) -> Iterator[str]:
    for example, ranking in zip(examples, rankings, strict=True):
        written = math.inf
        for rank, (passage, score) in enumerate(ranking, start=1):
            below = float(np.nextafter(np.float32(written), np.float32(-np.inf)))
            written = _as_float32(min(score, below))
            if not (math.isfinite(score) and math.isfinite(written)):
                raise ValueError(f"example '{example.id}': the score of passage {passage} is {score}")
            docid = _encode(example.document.passage_id(passage))
            yield f"{_encode(example.id)} Q0 {docid} {rank} {written:.9g} {tag}"


def write_qrels(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Writes the evidence as TREC qrels of grade 1, completely or not at all."""
    pairs = ((example, passage) for example in examples for passage in example.evidence or ())
    lines = (f"{_encode(example.id)} 0 {_encode(example.document.passage_id(passage))} 1" for example, passage in pairs)
    write_lines(path, lines)


def _encode(text: str) -> str:
    return re.sub(r"[\s%]", lambda found: quote(found[0], safe=""), text)


def _as_float32(score: float) -> float:
    with np.errstate(over="ignore"):  # a score beyond float32 becomes infinite
        return float(np.float32(score))


# ---- reading runs


def read_run(path: str | os.PathLike) -> dict[str, list[tuple[str, float]]]:
    """The (docid, score) pairs of each query of a TREC run, in the order in which trec_eval sees them.

    That order is by score as float32, best first; ties are in descending order of the docid as it is written in the
    file. Ranks are ignored. One DataError lists all lines that are malformed or repeat a docid.
    """
    found: dict[str, dict[str, tuple[float, str, str, float]]] = {}  # query -> docid -> two sort keys, docid, score

    def add(row: Row) -> None:
        query, docid, written_score = unquote(row.record["qid"]), unquote(row.record["docid"]), row.record["score"]
        try:
            score = float(written_score)
        except ValueError:
            score = math.nan
        if not math.isfinite(_as_float32(score)):
            raise BadRecord(f"the score is '{written_score}'; it must be a finite number")
        if docid in found.setdefault(query, {}):
            raise BadRecord(f"docid '{docid}' appears twice for query '{query}'")
        found[query][docid] = (_as_float32(score), row.record["docid"], docid, score)

    rows = read_line_rows(path, _parse_run_line)
    holds, remedy = f"line of '{' '.join(RUN_COLUMNS)}'", "fix the lines, or write the file again"
    build_all(rows, str(path), add, {}, [], holds=holds, remedy=remedy)
    return {
        query: [(docid, score) for _, _, docid, score in sorted(entries.values(), key=itemgetter(0, 1), reverse=True)]
        for query, entries in found.items()
    }


def _cells(line: str) -> list[str]:
    """The columns of a line of a run or of qrels: only ASCII white space separates them, as in trec_eval."""
    return re.findall(r"[^ \t\n\r\v\f]+", line)


def _parse_run_line(line: str) -> dict:
    cells = _cells(line)
    if len(cells) != len(RUN_COLUMNS):
        raise BadRecord(f"has {len(cells)} columns; it must have '{' '.join(RUN_COLUMNS)}'")
    return dict(zip(RUN_COLUMNS, cells, strict=True))


def run_rankings(path: str | os.PathLike, examples: Sequence[Example]) -> list[Ranking]:
    """The ranking of each example in a TREC run, found by the example's id; lines of other queries are ignored.

    Docids are as in `by_passage_number`. Raises DataError if examples have no line, if docids are not passages of the
    example's document, or if different examples share an id; all such examples or docids are listed.
    """
    run = read_run(path)
    first: dict[str, Example] = {}
    problems = []
    for example in examples:
        other = first.setdefault(example.id, example)
        if example.id not in run:
            problems.append(f"{path}: no line for example '{example.id}'")
        elif (other.query, other.document.id) != (example.query, example.document.id):
            problems.append(f"{path}: two different examples have the id '{example.id}', so that its lines fit both")
    raise_all(problems, "a run must rank passages for every example of all splits, each with an id its own")
    return by_passage_number(path, run, examples)


def by_passage_number(
    path: str | os.PathLike, found: Mapping[str, Iterable[tuple[str, Value]]], examples: Sequence[Example]
) -> list[list[tuple[int, Value]]]:
    """The (passage number, value) pairs of each example in a run or in qrels; [] for an example without lines.

    A docid is a passage id ("m1#3"). It may also be a passage number ("3"), unless the ids of the passages are numbers
    themselves. One DataError lists all docids that are neither, or that name a passage a second time; `path` is the
    file that the error names.
    """
    numbers_of: dict[int, dict[str, int]] = {}  # id(document) -> docid -> passage number
    problems, numbered = [], []
    for example in examples:
        document = example.document
        if id(document) not in numbers_of:
            numbers_of[id(document)] = _passage_numbers(document)
        numbers = numbers_of[id(document)]
        entries: dict[int, Value] = {}
        for docid, value in found.get(example.id, ()):
            number = numbers.get(docid)
            if number is None:
                problems.append(
                    f"{path}: query '{example.id}': '{docid}' is none of the {len(document.passages)} passages of its "
                    f"document, which are '{document.passage_id(0)}' and so on"
                )
            elif number in entries:
                problems.append(f"{path}: query '{example.id}': '{docid}' is there under another name as well")
            else:
                entries[number] = value
        numbered.append(list(entries.items()))
    raise_all(problems, "name passages by these ids, or by their numbers from 0, split or merged as in the examples")
    return numbered


def _passage_numbers(document: Document) -> dict[str, int]:
    """docid -> passage number, for every docid that `by_passage_number` accepts."""
    numbers = {document.passage_id(number): number for number in range(len(document.passages))}
    if document.is_ordered and not any(map(str.isdecimal, numbers)):
        numbers |= {str(number): number for number in range(len(document.passages))}
    return numbers


# ---- reading qrels


def read_qrels(
    path: str | os.PathLike,
    *,
    known_passages: Container[str] | None = None,
    skip: bool = False,
    rejected_file: str | os.PathLike | None = None,
    problems: list | None = None,
) -> dict[str, dict[str, int]]:
    """Relevance judgements, {query id: {passage id: relevance}}; a passage is relevant if its relevance is above 0.

    Reads the layout of BEIR (a header `query-id corpus-id score`, then three columns separated by tabs) and that of
    TREC (query, an unused column, passage, relevance, separated by white space), also with .gz or .xz. Raises DataError
    for unusable lines and for relevant passages that are not in `known_passages`; `skip` and `rejected_file` are
    `skip_bad_examples` and `rejected_file` of `load_examples`; what is skipped is added to `problems`, too.
    """
    qrels: dict[str, dict[str, int]] = {}

    def add(row: Row) -> None:
        query, passage, text = row.record["query-id"], row.record["corpus-id"], row.record["score"]
        try:
            relevance = int(text)
        except ValueError:
            raise BadRecord(f"the relevance must be a whole number, not {shown(text)}") from None
        if known_passages is not None and relevance > 0 and passage not in known_passages:
            raise BadRecord(f"query '{query}' names passage '{passage}', but the corpus holds no such '_id'")
        if qrels.get(query, {}).get(passage, relevance) != relevance:
            earlier = qrels[query][passage]
            raise BadRecord(
                f"query '{query}' and passage '{passage}' have relevance {earlier} further up; give it once"
            )
        qrels.setdefault(query, {})[passage] = relevance

    rows = read_line_rows(path, _qrels_parser())
    holds = "query with a passage and its relevance"
    _, bad = build_all(rows, str(path), add, {}, [], skip=skip, rejected_file=rejected_file, holds=holds)
    if problems is not None:
        problems.append([str(path), bad])
    return qrels


def _qrels_parser() -> Callable[[str], dict | None]:
    """Returns a parser for the lines of one file; its first line decides between the two layouts."""
    is_beir = None

    def parse(line: str) -> dict | None:
        nonlocal is_beir
        cells = _cells(line)
        if not cells:
            return None
        if is_beir is None:
            is_beir = tuple(cells) == BEIR_QRELS_COLUMNS
            if is_beir:
                return None
        if is_beir:
            columns, cells = BEIR_QRELS_COLUMNS, line.strip("\r\n").split("\t")
            wanted = "it must have BEIR's three columns, separated by tabs"
        else:
            columns, cells = TREC_QRELS_COLUMNS, [unquote(cell) for cell in cells]
            wanted = (
                f"it must have TREC's four columns, or BEIR's three under the header '{' '.join(BEIR_QRELS_COLUMNS)}'"
            )
        if len(cells) != len(columns):
            raise BadRecord(f"has {len(cells)} columns; {wanted}")
        return dict(zip(columns, cells, strict=True))

    return parse
