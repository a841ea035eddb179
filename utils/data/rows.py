"""Rows of data files of any kind, and one report on all bad ones."""

import csv
import gzip
import io
import json
import logging
import lzma
import math
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import BadRecord, DataError
from utils.files import write_jsonl

logger = logging.getLogger(__name__)
SHOWN_PROBLEMS = 20  # bad lines spelled out in one error; the rest are counted


def shown(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def listed_fields(record: dict) -> str:
    """What a record has, for the error that says what it lacks."""
    return f"the record has {', '.join(sorted(map(str, record)))}" if record else "the record is empty"


@dataclass(slots=True)
class Row:
    """A record of a file, or what is wrong with it."""

    number: int  # of the line or row, from 1
    place: str  # "train.jsonl:17" or "train.csv: row 17"
    record: dict | None  # None if there is a problem
    problem: str = ""
    text: str = ""  # what was read instead of a record


def build_all(
    rows: Iterable[Row],
    file: str,
    build: Callable[[Row], Any],
    columns: dict[str, str],
    required: list[tuple[str, ...]],
    *,
    skip: bool,
    rejected_file: str | os.PathLike | None,
    max_built: int | None = None,
    holds: str = "record, such as one JSON object a line",
) -> list:
    """`build(row)` of all rows; problems are gathered and raised together, or set aside.

    `columns` are the columns that may be read, by field; of each group in `required` one must be in some record.
    `holds` says, after "at least one", what an empty file must hold.
    """
    built, problems = build_each(rows, file, build, columns, required, skip=skip, max_built=max_built, holds=holds)
    report_problems(problems, file, found_good=bool(built), skip=skip, rejected_file=rejected_file)
    return built


def build_each(
    rows: Iterable[Row],
    file: str,
    build: Callable[[Row], Any],
    columns: dict[str, str],
    required: list[tuple[str, ...]],
    *,
    skip: bool,
    max_built: int | None = None,
    holds: str = "record, such as one JSON object a line",
) -> tuple[list, list[tuple[str, dict]]]:
    """What was built, and (place, entry of the rejected file) of each problem, with its content if `skip`."""
    built, problems, found, stopped = [], [], set(), False  # found: columns
    for row in rows:
        reason = row.problem
        if row.record is not None:
            found |= row.record.keys()
            row.record = {name: value for name, value in row.record.items() if not _is_absent(value)}
            try:
                built.append(build(row))
            except BadRecord as error:
                reason = str(error)
        if reason:
            content = {"text": row.text} if row.record is None else {"record": row.record}
            entry = {"file": file, "line": row.number, "reason": reason}
            problems.append((row.place, entry | content if skip else entry))
        elif len(built) == max_built:
            stopped = True
            break
    if not built and not problems:
        raise DataError(f"{file}: is empty; it must hold at least one {holds}")
    if found:
        # the error of a single record lists its columns anyway, and says where it is
        _check_columns(file, found, columns, required if len(built) + len(problems) > 1 else [], not stopped)
    return built, problems


def report_problems(
    problems: list[tuple[str, dict]],
    file: str,
    *,
    found_good: bool,
    skip: bool,
    rejected_file: str | os.PathLike | None,
) -> None:
    """One DataError for all problems, or a warning and the rejected file where they are to be skipped."""
    if skip and rejected_file is not None:
        _write_rejected(rejected_file, file, [entry for _, entry in problems])
    if not problems:
        return
    if skip and found_good:
        where = f"; they are in {rejected_file}" if rejected_file is not None else ""
        logger.warning("%d bad records left out, the first at %s%s", len(problems), problems[0][0], where)
        return
    report = [f"{place}: {entry['reason']}" for place, entry in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        report.append(f"and {len(problems) - SHOWN_PROBLEMS} more")
    if skip:
        report.append("fix the lines: --skip_bad_examples has none left to go on with")
    else:
        report.append("fix the lines, or pass --skip_bad_examples to go on without them")
    raise DataError("\n".join(report))


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_columns(
    file: str, found: set[str], columns: dict[str, str], required: list[tuple[str, ...]], optional_too: bool
) -> None:
    """One error, instead of one a line, for a column that no record has."""
    wanted = [fields for fields in required if all(columns[field] not in found for field in fields)]
    if optional_too:  # a flag that was set to another name than the default, which is the field's own
        wanted += [(field,) for field, column in columns.items() if column != field and column not in found]
    if not wanted:
        return
    names = " or ".join(f"'{columns[field]}'" for field in wanted[0])
    if "_id" in columns:  # of a corpus, which has no flags for its columns
        remedy = 'a corpus has records such as {"_id": "d7", "title": "A title", "text": "The passage."}'
        raise DataError(f"{file}: no record has {names}; the columns found are {', '.join(sorted(found))}: {remedy}")
    flags = " or ".join(f"--{field}_column" for field in wanted[0])
    hint = "; for documents in a file of their own give --documents_file" if "doc_id" in found else ""
    raise DataError(
        f"{file}: no record has {names}; the columns found are {', '.join(sorted(found))}: "
        f"name the right one with {flags}{hint if 'document' in wanted[0] else ''}"
    )


def _write_rejected(path: str | os.PathLike, file: str, entries: list[dict]) -> None:
    """Puts the bad records of `file` into the rejected file in place of those of an earlier run; other files' stay."""
    kept = []
    if Path(path).exists():
        rows = _json_line_rows(str(path), io.BytesIO(Path(path).read_bytes()))
        kept = [row.record for row in rows if row.record is not None and row.record.get("file") != file]
    elif not entries:
        return
    write_jsonl(path, kept + entries)


_OPENERS_BY_ENDING = {".gz": gzip.open, ".xz": lzma.open}
_ENDINGS = ".jsonl, .json, .csv, .tsv (also with .gz or .xz) or .parquet"
_HALF_CHARACTER = "invalid UTF-8, or half of a character pair (such as \\ud83d alone); save the file as UTF-8"


def read_rows(
    path: str | os.PathLike, split: str, config_name: str | None, list_columns: Sequence[str]
) -> Iterator[Row]:
    """Rows of a file, a folder or a Hub data set."""
    return guarded(path, lambda: _choose_reader(path, split, config_name, list_columns))


def guarded(path: str | os.PathLike, read: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """The rows that `read()` gives; DataError if they cannot be read on, whatever the reason."""
    number = 0
    try:
        for row in read():
            yield row
            number = row.number
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        raise DataError(
            f"{path}: damaged after record {number}: {error}; nothing was loaded: copy or make the file again"
        ) from None


def open_bytes(path: str | os.PathLike) -> BinaryIO:
    """What a file holds, unpacked."""
    return _OPENERS_BY_ENDING.get(Path(path).suffix.lower(), open)(path, "rb")


def _choose_reader(
    path: str | os.PathLike, split: str, config_name: str | None, list_columns: Sequence[str]
) -> Iterator[Row]:
    name, file = str(path), Path(path)
    endings = [ending.lower() for ending in file.suffixes]
    open_file = _OPENERS_BY_ENDING.get(endings[-1] if endings else "", open)
    if open_file is not open:
        endings.pop()
    kind = endings[-1] if endings else ""
    if file.is_dir():
        return _dataset_rows(name, list_columns, name, config_name, split=split)
    if not file.exists():
        file_endings = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
        if re.fullmatch(r"[\w-]+(/[\w.-]+)?", name) and kind not in file_endings and open_file is open:
            return _dataset_rows(name, list_columns, name, config_name, split=split)
        raise DataError(f"{name}: no such file or folder; give a {_ENDINGS} file, a folder, or a Hub name (owner/name)")
    if kind == ".parquet":
        return _dataset_rows(name, list_columns, "parquet", data_files=name, split="train")
    if kind in (".csv", ".tsv"):
        return _csv_rows(name, open_file(file, "rb"), "\t" if kind == ".tsv" else ",", list_columns)
    if kind == ".json":
        return _json_rows(name, open_file(file, "rb"))
    if kind in (".jsonl", ".ndjson", ""):
        return _json_line_rows(name, open_file(file, "rb"))
    raise DataError(f"{name}: unknown kind of file '{kind}'; give a {_ENDINGS} file")


def read_lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines without the byte order mark that some editors put in front."""
    with stream:
        for number, line in enumerate(stream):
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _json_line_rows(name: str, stream: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(read_lines(stream), 1):
        if not line.strip():
            continue
        record, problem = None, ""
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            record = json.loads(text)
        except UnicodeDecodeError as error:
            where = f"0x{line[error.start]:02x} at byte {error.start + 1} of the line"
            problem = f"invalid UTF-8: {where}; save the file as UTF-8"
        except json.JSONDecodeError as error:
            problem = f"invalid JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists nested without end
            problem = f"invalid JSON: {error}"
        else:
            problem = _object_problem(record, may_hold_halves="\\ud" in text or "\\uD" in text)
        text = line.decode("utf-8", "replace").rstrip("\r\n") if problem else ""
        yield Row(number, f"{name}:{number}", None if problem else record, problem, text)


def _json_rows(name: str, stream: BinaryIO) -> Iterator[Row]:
    """A `.json` file: one array of records, or JSON Lines under the other name."""
    with stream:
        data = stream.read()
    try:
        records = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_line_rows(name, io.BytesIO(data))
            return
        if isinstance(error, UnicodeDecodeError):
            line = data[: error.start].count(b"\n") + 1
            raise DataError(f"{name}:{line}: invalid UTF-8; save the file as UTF-8") from None
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise DataError(f"{name}:{line}: invalid JSON: {reason}; fix the array, or give one object a line") from None
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        problem = _object_problem(record, may_hold_halves=True)
        text = json.dumps(record) if problem else ""
        yield Row(number, f"{name}: row {number}", None if problem else record, problem, text)


def _object_problem(record: Any, may_hold_halves: bool) -> str:
    if not isinstance(record, dict):
        return f'must be a JSON object such as {{"passages": [...], "summary": "..."}}, not {shown(record)}'
    if may_hold_halves:
        try:
            json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            return _HALF_CHARACTER
    return ""


def _csv_rows(name: str, stream: BinaryIO, delimiter: str, list_columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a CSV file as they are: no cell is taken for a number, and none named "NA" for nothing."""
    csv.field_size_limit(2**31 - 1)  # the csv module's own limit, 131,072 characters, is less than a long document
    lines = (line.decode("utf-8", "surrogateescape") for line in read_lines(stream))
    for number, cells in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
        surplus = cells.pop(None, None)
        record = {column: cell for column, cell in cells.items() if cell != ""}
        problem = _object_problem(record, may_hold_halves=True)
        if surplus is not None:
            problem = f"has {len(surplus)} more cells than the header has columns; quote text that holds '{delimiter}'"
        text = json.dumps(cells) if problem else ""
        record = None if problem else dict.fromkeys(cells) | _decode_lists(record, list_columns)
        yield Row(number, f"{name}: row {number}", record, problem, text)


def _dataset_rows(name: str, list_columns: Sequence[str], *arguments: Any, **options: Any) -> Iterator[Row]:
    """Rows of whatever `datasets.load_dataset` reads."""
    import datasets  # seconds to import, and JSON Lines and CSV do without it

    try:
        rows = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # of any class: network, Hub, cache, Arrow, pandas, the data set's own features
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        message = " ".join(str(cause or error).split()) or type(error).__name__
        if Path(name).exists():
            raise DataError(f"{name}: datasets.load_dataset cannot read it: {message}") from None
        raise DataError(
            f"{name}: no such file or folder, nor can it be loaded from the Hub: {message}; "
            "check the name, or download the data and give its path"
        ) from None
    for number, record in enumerate(rows, 1):
        yield Row(number, f"{name}: row {number}", _decode_lists(record, list_columns))


def _decode_lists(record: dict, list_columns: Sequence[str]) -> dict:
    """Tables keep lists as text: '[3, 7]' in a column of lists is that list."""
    for column in list_columns:
        cell = record.get(column)
        if isinstance(cell, str) and cell.lstrip().startswith("["):
            try:
                record[column] = json.loads(cell)
            except (ValueError, RecursionError):
                continue  # left as text, which the check of the field refuses with its place
    return record
