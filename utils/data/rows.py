"""Reads the rows of data files of any kind and reports all bad rows of a file together."""

import csv
import gzip
import io
import itertools
import json
import logging
import lzma
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from utils.errors import BadRecord, DataError
from utils.files import write_jsonl
from utils.progress import Phase, has_bars

logger = logging.getLogger(__name__)
SHOWN_PROBLEMS = 20  # an error shows this many problems; the rest are counted
POSITIVES = ("positive_passages", "positive", "pos")  # fields of training data for retrievers (see layouts.py)
WITHOUT_SUMMARY = (
    "marked positives without summaries are only for train_retrieve.py, with --draft_share 0 and --supervision evidence"
)
REMEDY = "fix the lines, or pass --skip_bad_examples to skip them"


@dataclass(slots=True)
class Row:
    """A record of a file, or the reason why it could not be read."""

    number: int  # of the line or row, from 1
    place: str  # "train.jsonl:17" or "train.csv: row 17"
    record: dict | None  # None if there is a problem
    problem: str = ""
    text: str = ""  # the raw text, which the rejected file shows if there is no record
    share: float | None = None  # of the file that has been read, if that is known


# ---- building something from each row


def build_all(
    rows: Iterable[Row],
    file: str,
    build: Callable[[Row], Any],
    columns: dict[str, str],
    required: list[tuple[str, ...]],
    *,
    skip: bool = False,
    rejected_file: str | os.PathLike | None = None,
    max_built: int | None = None,
    holds: str = "record, such as one JSON object a line",
    remedy: str = REMEDY,
) -> tuple[list, list[tuple[str, dict]]]:
    """Calls `build(row)` for every row; returns what was built, and the problems that `report_problems` reported.

    Args:
        build: raises BadRecord for a bad row.
        columns: field name -> column name, for all columns that may be read.
        required: groups of fields; at least one field of each group must occur in some record.
        skip: leave bad rows out instead of raising DataError.
        max_built: stop reading after so many good rows; None or 0 reads all.
        holds: ends the error message for an empty file, after "at least one".
        remedy: the last line of the error that lists the bad rows.
    """
    built, problems, found_columns = [], [], set()
    with Phase("read", f"records of {file}", max_built) as phase:
        for row in rows:
            reason = row.problem
            if row.record is not None:
                found_columns |= row.record.keys()
                row.record = {name: value for name, value in row.record.items() if not _is_absent(value)}
                try:
                    built.append(build(row))
                except BadRecord as error:
                    reason = str(error)
            if reason:
                content = {"text": row.text} if row.record is None else {"record": row.record}
                entry = {"file": file, "line": row.number, "reason": reason}
                problems.append((row.place, entry | content if skip else entry))
            phase.advance(share=row.share)
            if not reason and len(built) == max_built:
                break
    if not built and not problems:
        raise DataError(f"{file}: is empty; it must hold at least one {holds}")
    if found_columns:
        # a single record needs no summary of the columns: its own error lists them and says where it is
        required = required if len(built) + len(problems) > 1 else []
        all_read = not max_built or len(built) < max_built  # a column that was not found yet may come later
        _check_columns(file, found_columns, columns, required, all_read)
    report_problems(problems, file, any_good=bool(built), skip=skip, rejected_file=rejected_file, remedy=remedy)
    return built, problems


def report_problems(
    problems: list[tuple[str, dict]],
    file: str,
    *,
    any_good: bool,
    skip: bool,
    rejected_file: str | os.PathLike | None,
    remedy: str = REMEDY,
) -> None:
    """Raises one DataError that lists all problems; with `skip` it warns instead if there are `any_good` rows.

    A problem is a place and an entry for the rejected file, which is written with `skip`.
    """
    if skip and rejected_file is not None:
        _write_rejected(rejected_file, file, [entry for _, entry in problems])
    if problems and skip and any_good:
        where = f"; they are in {rejected_file}" if rejected_file is not None else ""
        logger.warning("%d bad records skipped, the first at %s%s", len(problems), problems[0][0], where)
        return
    if skip:
        remedy = "fix the lines: --skip_bad_examples would skip all of them"
    raise_all([f"{place}: {entry['reason']}" for place, entry in problems], remedy)


def raise_all(problems: Sequence[str], remedy: str) -> None:
    """Raises one DataError for all problems, with the remedy in its last line; does nothing without problems."""
    if problems:
        rest = [f"and {len(problems) - SHOWN_PROBLEMS} more"] if len(problems) > SHOWN_PROBLEMS else []
        raise DataError("\n".join([*problems[:SHOWN_PROBLEMS], *rest, remedy]))


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _check_columns(
    file: str, found: set[str], columns: dict[str, str], required: list[tuple[str, ...]], all_read: bool
) -> None:
    """Raises one error, instead of one for each row, if no record has a column."""
    missing = [fields for fields in required if all(columns[field] not in found for field in fields)]
    if all_read:  # a column that the user named (the default is the field's own name) must exist even if optional
        missing += [(field,) for field, column in columns.items() if column != field and column not in found]
    if not missing:
        return
    names = " or ".join(f"'{columns[field]}'" for field in missing[0])
    if "_id" in columns:  # a corpus, which has no flags for its columns
        remedy = 'a corpus has records such as {"_id": "d7", "title": "A title", "text": "The passage."}'
    else:
        flags = [f"--{field}_column" for field in missing[0] if field not in POSITIVES]
        remedy = f"name the right one with {' or '.join(flags)}"
        if "doc_id" in found and "document" in missing[0]:
            remedy += "; for documents in a file of their own give --documents_file"
        if len(found) == 1 and re.search("[;\t]", *found):
            remedy += "; in a folder the delimiter must be a comma, but in a file that is given itself it is recognized"
        if "summary" in missing[0] and not found.isdisjoint({*POSITIVES, "query_id"}):
            remedy += f"; {WITHOUT_SUMMARY}"
    raise DataError(f"{file}: no record has {names}; the columns found are {', '.join(sorted(found))}: {remedy}")


def _write_rejected(path: str | os.PathLike, file: str, entries: list[dict]) -> None:
    """Replaces the entries of `file` in the rejected file and keeps those of other files."""
    kept = []
    if Path(path).exists():
        rows = _line_rows(str(path), _open_bytes(path), _parse_json)
        kept = [row.record for row in rows if row.record is not None and row.record.get("file") != file]
    elif not entries:
        return
    write_jsonl(path, kept + entries)


# ---- checks of a record


def shown(value: Any) -> str:
    """Formats a value for an error message; long values are cut."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def listed_fields(record: dict) -> str:
    """Lists the fields of a record, for the error that names a missing one."""
    return f"the record has {', '.join(sorted(map(str, record)))}" if record else "the record is empty"


def is_whole_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def read_identifier(record: dict, column: str) -> str:
    """An id as a string; the record may hold a whole number. Raises BadRecord if it is missing or empty."""
    if column not in record:
        raise BadRecord(f"no '{column}'; {listed_fields(record)}")
    value = record[column]
    if not is_whole_number(value) and not isinstance(value, str):
        raise BadRecord(f"'{column}' must be a string or a whole number, not {shown(value)}")
    if value == "":
        raise BadRecord(f"'{column}' is empty")
    return str(value)


def is_listed(text: str) -> bool:
    """Whether a text is probably a list that was written by Python or NumPy, such as "['a', 'b']", and not by JSON."""
    return re.fullmatch(r"\s*\[\s*(['\"]).*['\"]\s*\]\s*", text, re.DOTALL) is not None


# ---- reading rows

_OPENERS_BY_ENDING = {".gz": gzip.open, ".xz": lzma.open}
_ENDINGS = ".jsonl, .json, .csv, .tsv (also with .gz or .xz) or .parquet"
_HALF_CHARACTER = "invalid UTF-8, or half of a character pair (such as \\ud83d alone); save the file as UTF-8"


def read_rows(
    path: str | os.PathLike,
    split: str,
    config_name: str | None,
    list_columns: Sequence[str],
    text_columns: Sequence[str] = (),
) -> Iterator[Row]:
    """Rows of a file, a folder or a Hub data set.

    Tables may keep a list as text: in `list_columns`, text that begins with "[" or "{" is parsed as JSON. In
    `text_columns`, which hold texts or lists of texts, it stays text if it is no JSON list of strings.
    """
    return _guarded(path, lambda: _choose_reader(path, split, config_name, (list_columns, text_columns)))


def read_line_rows(path: str | os.PathLike, parse: Callable[[str], dict | None]) -> Iterator[Row]:
    """Rows of a text file with one record a line, also packed (.gz, .xz); blank lines are skipped.

    `parse(line)` returns a record, returns None to skip the line, or raises BadRecord.
    """
    return _guarded(path, lambda: _line_rows(str(path), _open_bytes(path), parse))


def source_name(path: str | os.PathLike, split: str) -> str:
    """A file, or a folder or Hub data set with the split that is read, as messages and rejected records name it."""
    return str(path) if os.path.exists(path) and not os.path.isdir(path) else f"{path} ({split})"


def _guarded(path: str | os.PathLike, read: Callable[[], Iterator[Row]]) -> Iterator[Row]:
    """Rows of `read()`; raises DataError if the file cannot be opened or read to its end."""
    number = 0
    try:
        for row in read():
            yield row
            number = row.number
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error, UnicodeError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        raise DataError(
            f"{path}: damaged after record {number}: {error}; nothing was loaded: copy or make the file again"
        ) from None


def _open_bytes(path: str | os.PathLike) -> BinaryIO:
    """Opens a file and unpacks it if its ending says so."""
    return _OPENERS_BY_ENDING.get(Path(path).suffix.lower(), open)(path, "rb")


def _choose_reader(
    path: str | os.PathLike, split: str, config_name: str | None, columns: tuple[Sequence[str], Sequence[str]]
) -> Iterator[Row]:
    name, file = str(path), Path(path)
    is_packed = file.suffix.lower() in _OPENERS_BY_ENDING
    kind = Path(file.stem if is_packed else file.name).suffix.lower()
    if file.is_dir():
        return _dataset_rows(name, columns, name, config_name, split=split)
    if not file.exists():
        file_endings = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt")
        if re.fullmatch(r"[\w-]+(/[\w.-]+)?", name) and kind not in file_endings and not is_packed:
            return _dataset_rows(name, columns, name, config_name, split=split)
        raise DataError(f"{name}: no such file or folder; give a {_ENDINGS} file, a folder, or a Hub name (owner/name)")
    if kind == ".parquet":
        return _dataset_rows(name, columns, "parquet", data_files=name, split="train")
    if kind in (".csv", ".tsv"):
        return _csv_rows(name, _open_bytes(file), "\t" if kind == ".tsv" else ",", columns)
    if kind == ".json":
        return _json_rows(name, _open_bytes(file))
    if kind in (".jsonl", ".ndjson", ""):
        return _line_rows(name, _open_bytes(file), _parse_json)
    raise DataError(f"{name}: unknown kind of file '{kind}'; give a {_ENDINGS} file")


def _encoding(start: bytes) -> str:
    """UTF-16 if a file starts with its byte order mark (Excel's "Unicode text", PowerShell's `>`), else UTF-8."""
    return "utf-16" if start.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of a file in UTF-8, without the byte order mark that some editors write at its start."""
    with stream:
        if _encoding(stream.peek(2)) == "utf-16":
            yield from (line.encode() for line in io.TextIOWrapper(stream, "utf-16", newline="\n"))
            return
        for number, line in enumerate(stream):
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _share(stream) -> float | None:
    """How much of a file has been read, 0 to 1; None if that is not known, as of a pipe."""
    try:
        return os.lseek(stream.fileno(), 0, os.SEEK_CUR) / os.fstat(stream.fileno()).st_size
    except (OSError, ZeroDivisionError):
        return None


def _line_rows(name: str, stream: BinaryIO, parse: Callable[[str], dict | None]) -> Iterator[Row]:
    for number, line in enumerate(_lines(stream), 1):
        if not line.strip():
            continue
        record, problem = None, ""
        try:
            text = line.decode("utf-8").rstrip("\r\n")
            record = parse(text)
        except UnicodeDecodeError as error:
            text = line.decode("utf-8", "replace").rstrip("\r\n")
            where = f"0x{line[error.start]:02x} at byte {error.start + 1} of the line"
            problem = f"invalid UTF-8: {where}; save the file as UTF-8"
        except BadRecord as error:
            problem = str(error)
        if problem or record is not None:
            yield Row(number, f"{name}:{number}", record, problem, text, _share(stream))


def _parse_json(line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecord(f"invalid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or lists nested too deep
        raise BadRecord(f"invalid JSON: {error}") from None
    if problem := _object_problem(record, may_hold_halves="\\ud" in line or "\\uD" in line):
        raise BadRecord(problem)
    return record


def _json_rows(name: str, stream: BinaryIO) -> Iterator[Row]:
    """Rows of a `.json` file, which holds one array of records, one record, or JSON Lines."""
    with stream:
        data = stream.read()
    try:
        records = json.loads(data.decode(_encoding(data)))
    except (ValueError, RecursionError) as error:
        if not data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _line_rows(name, io.BufferedReader(io.BytesIO(data)), _parse_json)
            return
        if isinstance(error, UnicodeDecodeError):
            line = data[: error.start].count(b"\n") + 1
            raise DataError(f"{name}:{line}: invalid UTF-8; save the file as UTF-8") from None
        line, reason = getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise DataError(f"{name}:{line}: invalid JSON: {reason}; fix the array, or give one object a line") from None
    records = records if isinstance(records, list) else [records]
    for number, record in enumerate(records, 1):
        problem = _object_problem(record, may_hold_halves=True)
        text = json.dumps(record) if problem else ""
        row = Row(number, f"{name}: row {number}", None if problem else record, problem, text)
        row.share = number / len(records)
        yield row


def _object_problem(record: Any, may_hold_halves: bool) -> str:
    """Says why a value is no usable record; `may_hold_halves`: it may contain half of a surrogate pair."""
    if not isinstance(record, dict):
        return f'must be a JSON object such as {{"passages": [...], "summary": "..."}}, not {shown(record)}'
    if may_hold_halves:
        try:
            json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            return _HALF_CHARACTER
    return ""


def _csv_rows(
    name: str, stream: BinaryIO, delimiter: str, columns: tuple[Sequence[str], Sequence[str]]
) -> Iterator[Row]:
    """Rows of a CSV file; cells stay text: none becomes a number, and "NA" does not mean missing.

    The first line shows which delimiter there is; `delimiter` is the usual one for the ending of the file.
    """
    encoding = _encoding(stream.peek(2))
    with io.TextIOWrapper(stream, encoding, errors="surrogateescape", newline="") as file:  # any kind of line end
        lines = enumerate(file, 1)
        first = next((line for line in lines if line[1].strip()), (1, ""))
        if given := re.fullmatch(r'"?sep=([^\w"\r\n])"?[\r\n]*', first[1]):  # written by and for Excel
            delimiter, first = given[1], next(lines, (2, ""))
        else:
            unquoted = re.sub('"(?:[^"]|"")*"', "", first[1])
            delimiter = max(delimiter, ",", ";", "\t", key=unquoted.count)  # the first of equals
        rows = _csv_cells(name, itertools.chain([first], lines), delimiter)
        header, problem, _ = next(rows, ([], "", ""))
        _check_header(f"{name}:{first[0]}", header, problem)
        for number, (cells, problem, text) in enumerate(rows, 1):
            record = dict(zip(header, (cell or None for cell in cells), strict=False))
            record.pop("", None)  # an unnamed column, such as the row numbers of pandas
            if len(cells) != len(header) and not problem:
                count, kind = abs(len(cells) - len(header)), "more" if len(cells) > len(header) else "fewer"
                problem = f"has {count} {kind} cells than the header has columns"
                problem += f"; quote text that holds '{delimiter}' or line ends"
            record = _decode_lists(record, columns)
            problem = problem or _object_problem(record, may_hold_halves=True)
            if problem == _HALF_CHARACTER and (byte := re.search("[\udc80-\udcff]", "".join(cells))):
                problem = _invalid_byte(byte[0])
            text = text or (json.dumps(record) if problem else "")
            yield Row(number, f"{name}: row {number}", None if problem else record, problem, text, _share(file))


def _csv_cells(name: str, lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[tuple[list[str], str, str]]:
    """The cells of each row that is not blank. If its quotation marks are wrong: none, the problem and the text.

    Raises DataError if a quotation with a wrong end goes over several lines, because each of them may be a row.
    """
    csv.field_size_limit(2**31 - 1)  # the default, 131,072 characters, is shorter than a long document
    taken: list[tuple[int, str]] = []  # the lines of the current row, with their numbers

    def take() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line[1]

    reader = csv.reader(take(), delimiter=delimiter, strict=True)  # otherwise an open quotation swallows rows
    while True:
        taken.clear()
        try:
            if cells := next(reader):
                yield cells, "", ""
        except StopIteration:
            return
        except csv.Error as error:
            begin, end = _open_quotation(taken, delimiter), taken[-1][0]
            is_closed = "expected after" in str(error)
            problem = f"the quotation that begins in line {begin} " + (
                f"ends in line {end}, but its cell does not" if is_closed else "never ends"
            )
            remedy = 'close it at the end of its cell, and double the quotation marks inside (""), or use JSON Lines'
            if begin != end:
                raise DataError(f"{name}:{begin}: {problem}; nothing was loaded: {remedy}") from None
            yield [], f"{problem}; {remedy}", "".join(line for _, line in taken)


def _open_quotation(lines: list[tuple[int, str]], delimiter: str) -> int:
    """The number of the line in which a row's first cell begins whose quotation does not end where the cell ends."""
    text, position = "".join(line for _, line in lines), 0
    cell = re.compile(f'(?:"(?:[^"]++|"")*+"|(?!")[^{re.escape(delimiter)}\r\n]*+){re.escape(delimiter)}')
    while match := cell.match(text, position):
        position = match.end()
    ends = itertools.accumulate(len(line) for _, line in lines)
    return next((number for (number, _), end in zip(lines, ends, strict=True) if position < end), lines[-1][0])


def _check_header(place: str, header: list[str], problem: str) -> None:
    """Raises DataError if the first row of a table cannot name its columns."""
    text = "".join(header)
    if not problem and "\0" in text:
        problem = "holds NUL characters, as UTF-16 without a byte order mark does; save the file as UTF-8"
    elif byte := re.search("[\udc80-\udcff]", text):
        problem = _invalid_byte(byte[0])
    elif repeated := [name for name, count in Counter(header).items() if name and count > 1]:
        problem = f"several columns are named '{repeated[0]}'; rename or remove all but one"
    if problem:
        raise DataError(f"{place}: {problem}")


def _invalid_byte(character: str) -> str:
    """The problem of a byte that is no UTF-8, from the character that stands for it (`surrogateescape`)."""
    byte = character.encode("utf-8", "surrogateescape")
    meant = byte.decode("cp1252", "replace")
    hint = f"it is '{meant}' in Windows-1252, which Excel writes: save the file as UTF-8 (Excel: CSV UTF-8)"
    return f"invalid UTF-8: byte 0x{byte[0]:02x}; {hint}"


def _dataset_rows(
    name: str, columns: tuple[Sequence[str], Sequence[str]], *arguments: Any, **options: Any
) -> Iterator[Row]:
    """Rows of `datasets.load_dataset(*arguments, **options)`."""
    import datasets  # takes seconds, and JSON Lines and CSV do not need it

    if not has_bars():
        datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(*arguments, **options)
    except Exception as error:  # of many classes: network, Hub, cache, Arrow, pandas, features of the data set
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else None
        message = " ".join(str(cause or error).split()) or type(error).__name__
        if Path(name).exists():
            raise DataError(f"{name}: datasets.load_dataset cannot read it: {message}") from None
        raise DataError(
            f"{name}: no such file or folder, nor can it be loaded from the Hub: {message}; "
            "check the name, or download the data and give its path"
        ) from None
    source = source_name(name, options["split"])
    for number, record in enumerate(rows, 1):
        yield Row(number, f"{source}: row {number}", _decode_lists(record, columns), share=number / len(rows))


def _decode_lists(record: dict, columns: tuple[Sequence[str], Sequence[str]]) -> dict:
    list_columns, text_columns = columns
    for column in (*list_columns, *text_columns):
        cell = record.get(column)
        if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
            try:
                value = json.loads(cell)
            except (ValueError, RecursionError):
                continue  # it stays text, and the check of the field rejects it with its place
            is_texts = isinstance(value, list) and all(isinstance(each, str) for each in value)
            if column in list_columns or is_texts:
                record[column] = value
    return record
