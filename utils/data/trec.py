"""Rankings and evidence in TREC's files, which search engines write and trec_eval reads: runs and qrels.

A line of a run is `qid Q0 docid rank score tag`, one of qrels `qid 0 docid grade`. The qid is the id of an example, the
docid that of a passage (`Document.passage_id`). Columns are separated by white space; white space and percent signs
within an id are percent-encoded.
"""

import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, TypeVar
from urllib.parse import quote, unquote

import numpy as np

from utils.data.examples import Document, Example, Ranking
from utils.data.rows import SHOWN_PROBLEMS, Row, build_all, guarded, open_bytes, read_lines, shown
from utils.errors import BadRecord, DataError
from utils.files import write_lines

RUN_COLUMNS = "qid Q0 docid rank score tag"
Value = TypeVar("Value", float, int)


class _BadLine(Exception):
    """What is wrong with one line; caught where the file and the line are known."""


def write_run(path: str | os.PathLike, examples: Sequence[Example], rankings: Sequence[Ranking], tag: str) -> None:
    """Writes a TREC run with one ranking for each example, completely or not at all; `tag` names the system.

    trec_eval looks at scores only: it reads them as float32, sorts, and puts ties in descending order of docid. So that
    it sees the ranking as it is, a score that is not below the one before it at float32 (a tie, or a difference too
    small) is lowered to the next float32 number below. Raises ValueError for a score that is not finite.

    An example with an empty ranking has no line.
    """
    if not tag:
        raise ValueError("a run needs a tag: its last column names the system")
    write_lines(path, _run_lines(examples, rankings, _encode(tag)))


def _run_lines(examples: Sequence[Example], rankings: Sequence[Ranking], tag: str) -> Iterator[str]:
    for example, ranking in zip(examples, rankings, strict=True):
        written = math.inf
        for position, (passage, score) in enumerate(ranking, start=1):
            below = float(np.nextafter(np.float32(written), np.float32(-np.inf)))
            written = _as_float32(min(score, below))
            if not (math.isfinite(score) and math.isfinite(written)):
                raise ValueError(f"example '{example.id}': the score of passage {passage} is {score}")
            docid = _encode(example.document.passage_id(passage))
            yield f"{_encode(example.id)} Q0 {docid} {position} {written:.9g} {tag}"


def write_qrels(path: str | os.PathLike, examples: Iterable[Example]) -> None:
    """Writes the evidence as TREC qrels of grade 1, completely or not at all; without evidence there are no lines."""
    write_lines(
        path,
        (
            f"{_encode(example.id)} 0 {_encode(example.document.passage_id(passage))} 1"
            for example in examples
            for passage in example.evidence or ()
        ),
    )


def _encode(text: str) -> str:
    return re.sub(r"[\s%]", lambda found: quote(found[0], safe=""), text)


def _as_float32(score: float) -> float:
    with np.errstate(over="ignore"):  # to infinity
        return float(np.float32(score))


def read_run(path: str | os.PathLike) -> dict[str, list[tuple[str, float]]]:
    """The (docid, score) pairs of each query of a TREC run, in trec_eval's order.

    That is by score at float32, best first, and of equal scores by docid, as it stands in the file, descending; the
    column of ranks is not looked at. Raises DataError with all lines that are malformed or name a docid again.
    """
    found: dict[str, dict[str, tuple[float, str, float]]] = {}

    def add(line: bytes) -> None:
        query, _, written_docid, _, written_score, _ = _columns(line, RUN_COLUMNS)
        try:
            score = float(written_score)
        except ValueError:
            score = math.nan
        if not math.isfinite(_as_float32(score)):
            raise _BadLine(f"the score is '{written_score}'; a finite number is wanted")
        entry = (_as_float32(score), written_docid, score)
        _add_once(found, unquote(query), unquote(written_docid), entry)

    _read_lines(path, add, RUN_COLUMNS)
    return {
        query: [
            (docid, entry[-1]) for docid, entry in sorted(entries.items(), key=lambda pair: pair[1][:2], reverse=True)
        ]
        for query, entries in found.items()
    }


def _read_lines(path: str | os.PathLike, add: Callable[[bytes], None], wanted: str) -> None:
    """Calls `add` with each line that is not blank; DataError with all that it refused."""
    problems, is_empty = [], True
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # an editor's byte order mark
                if not line.strip():
                    continue
                is_empty = False
                try:
                    add(line)
                except _BadLine as problem:
                    problems.append(f"{path}:{number}: {problem}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if is_empty:
        raise DataError(f"{path}: is empty; lines of '{wanted}' are wanted")
    _raise_all(problems, "fix the lines, or write the file again")


def _columns(line: bytes, wanted: str) -> list[str]:
    _decoded(line)  # or say where it cannot be
    # bytes: only ASCII white space divides columns, as for trec_eval
    columns = [part.decode() for part in line.split()]
    if len(columns) != len(wanted.split()):
        raise _BadLine(f"{len(columns)} columns; '{wanted}' is wanted")
    return columns


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise _BadLine(f"invalid UTF-8: {where}; save the file as UTF-8") from None


def _add_once(found: dict[str, dict], query: str, docid: str, entry) -> None:
    if docid in found.setdefault(query, {}):
        raise _BadLine(f"docid '{docid}' is there twice for query '{query}'; once is wanted")
    found[query][docid] = entry


def _raise_all(problems: Sequence[str], remedy: str) -> None:
    if problems:
        rest = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise DataError("\n".join([*problems[:SHOWN_PROBLEMS], *rest, remedy]))


def run_rankings(path: str | os.PathLike, examples: Sequence[Example]) -> list[Ranking]:
    """The ranking that a TREC run holds for each example, by its id; lines about other queries are left out.

    Docids as for `by_passage_number`. Raises DataError with all examples that have no line, all docids that are no
    passage of the example's document, and all examples that cannot be told apart by id.
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
    _raise_all(problems, "a run must rank passages for every example, training and validation, each with an id its own")
    return by_passage_number(path, run, examples)


def by_passage_number(
    path: str | os.PathLike, found: Mapping[str, Iterable[tuple[str, Value]]], examples: Sequence[Example]
) -> list[list[tuple[int, Value]]]:
    """What a run or qrels file holds for each example, with passage numbers in place of docids; nothing: [].

    A docid is a passage id ("m1#3"), or a passage number ("3") where no passage has a number for its id. Raises
    DataError with all docids that are neither or mean the same passage as another; `path` names the file in it.
    """
    numbers_of: dict[int, dict[str, int]] = {}  # by document
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
    _raise_all(problems, "name passages by these ids, or by their numbers from 0, split or merged as in the examples")
    return numbered


def _passage_numbers(document: Document) -> dict[str, int]:
    """Passage numbers by what a docid may be."""
    numbers = {document.passage_id(number): number for number in range(len(document.passages))}
    if not any(map(str.isdecimal, numbers)):
        numbers |= {str(number): number for number in range(len(document.passages))}
    return numbers


def read_qrels(
    path: str | os.PathLike,
    *,
    known_passages: Container[str] | None = None,
    skip: bool = False,
    rejected_file: str | os.PathLike | None = None,
) -> dict[str, dict[str, int]]:
    """Relevance judgements: {query id: {passage id: relevance}}, of which more than 0 means relevant.

    Reads BEIR's files (a header `query-id corpus-id score`, then three columns with tabs between) and TREC's (query, a
    column that nobody uses, passage, relevance, with white space between), also with .gz or .xz. Raises DataError for
    anything unusable, such as a relevant passage that is not among the `known_passages`; `skip` and `rejected_file` as
    `skip_bad_examples` and `rejected_file` of `load_examples`.
    """
    qrels: dict[str, dict[str, int]] = {}

    def take(row: Row) -> None:
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

    rows = guarded(path, lambda: _qrels_rows(str(path), open_bytes(path)))
    holds = "query with a passage and its relevance"
    build_all(rows, str(path), take, {}, [], skip=skip, rejected_file=rejected_file, holds=holds)
    return qrels


def _qrels_rows(name: str, stream: BinaryIO) -> Iterator[Row]:
    fields, separator, wanted = ("query-id", "0", "corpus-id", "score"), None, "TREC's four columns"
    is_first = True
    for number, line in enumerate(read_lines(stream), 1):
        try:
            text, problem = line.decode("utf-8").strip("\r\n"), ""
        except UnicodeDecodeError:
            text, problem = line.decode("utf-8", "replace").strip("\r\n"), "invalid UTF-8; save the file as UTF-8"
        if not text.strip():
            continue
        cells = text.split(separator)
        if is_first and cells == ["query-id", "corpus-id", "score"]:
            fields, separator, wanted = tuple(cells), "\t", "BEIR's three columns, with tabs between"
            is_first = False
            continue
        is_first = False
        if len(cells) != len(fields) and not problem:
            problem = f"has {len(cells)} columns; {wanted} are wanted"
            if separator is None:
                problem += ", or BEIR's three under the header 'query-id corpus-id score'"
        if separator is None:  # TREC's ids, in which white space is percent-encoded
            cells = [unquote(cell) for cell in cells]
        record = None if problem else dict(zip(fields, cells, strict=True))
        yield Row(number, f"{name}:{number}", record, problem, text if problem else "")
