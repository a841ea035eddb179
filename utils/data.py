"""Examples and documents: reading them, checking them, splitting documents into passages, writing the hand-over file.

`load_examples` reads one example a record, `{"id", "query", "passages" or "document", "summary", "evidence"}`, from
JSON Lines, JSON, CSV, Parquet, a folder or the Hub. Examples about the same document share one `Document`, so that
whatever is computed for a document is computed once. *Words* are runs of characters between white space, everywhere.
"""

import csv
import gzip
import hashlib
import io
import json
import logging
import lzma
import math
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

logger = logging.getLogger(__name__)

SHOWN_PROBLEMS = 20  # bad lines spelled out in one error; the rest are counted


@dataclass(eq=False, slots=True)
class Document:
    """A document as its passages; compared by identity, because examples about the same document share one object."""

    id: str  # doc_id if given, else a hash of the passages
    passages: list[str]  # in document order

    def passage_id(self, number: int) -> str:
        """The id of a passage outside this document, as in TREC files."""
        return f"{self.id}#{number}"


@dataclass(slots=True)
class Example:
    """One thing to summarize. Passage numbers are positions in `document.passages`, from 0."""

    id: str
    query: str  # "" if there is none
    document: Document
    summaries: list[str]  # references; empty only if summaries were not required
    evidence: list[int] | None  # gold passage numbers, sorted and unique; None if nobody marked any
    evidence_words: list[int] | None  # gold words in each of them: all its words, or those of the gold turns merged in
    retrieved: list[tuple[int, float]] | None  # (passage number, score), best first, from a hand-over file


class DataError(ValueError):
    """Data that cannot be used; `str(error)` is the complete message, with place and remedy."""


class _BadRecord(Exception):
    """What is wrong with one record; caught where the file and the line are known."""


def load_splits(args, rejected_file: str | os.PathLike | None = None) -> tuple[list[Example], list[Example]]:
    """Training and validation examples as the flags of `DataArguments` say; without files, the embedded data set.

    A folder or Hub name as `train_file` brings its own validation split. `rejected_file` as in `load_examples`.
    """
    if not args.train_file:
        if args.validation_file:
            raise DataError("--validation_file needs --train_file")
        from utils.sample import sample_examples

        train = sample_examples("train", args.sample_documents)
        validation = sample_examples("validation", max(1, min(50, args.sample_documents // 10)))
        return train[: args.max_train_examples], validation[: args.max_eval_examples]
    has_splits = Path(args.train_file).is_dir() or not Path(args.train_file).exists()
    if not args.validation_file and not has_splits:
        raise DataError("--train_file needs --validation_file")
    options = {name: getattr(args, name) for name in (
        "dataset_config_name", "id_column", "query_column", "document_column", "passages_column", "summary_column",
        "evidence_column", "passage_words", "merge_passages", "skip_bad_examples")}  # fmt: skip
    train = load_examples(
        args.train_file,
        split="train",
        documents_file=args.documents_file,
        max_examples=args.max_train_examples,
        rejected_file=rejected_file,
        **options,
    )
    validation = load_examples(
        args.validation_file or args.train_file,
        split="validation",
        documents_file=args.validation_documents_file or args.documents_file,
        max_examples=args.max_eval_examples,
        rejected_file=rejected_file,
        **options,
    )
    return train, validation


def load_examples(
    path: str | os.PathLike,
    *,
    split: str = "train",
    documents_file: str | os.PathLike | None = None,
    dataset_config_name: str | None = None,
    id_column: str = "id",
    query_column: str = "query",
    document_column: str = "document",
    passages_column: str = "passages",
    summary_column: str = "summary",
    evidence_column: str = "evidence",
    doc_id_column: str = "doc_id",
    passage_words: int = 100,
    merge_passages: bool = False,
    require_summary: bool = True,
    skip_bad_examples: bool = False,
    rejected_file: str | os.PathLike | None = None,
    max_examples: int | None = None,
) -> list[Example]:
    """Reads and checks the examples of a file, a folder or a Hub data set; raises DataError for anything unusable.

    `split` and `dataset_config_name` matter for folders and Hub names only: a file is one split. With `documents_file`
    the text comes from there, by doc_id; without it each record holds its own `passages` or, failing them, `document`.
    `skip_bad_examples` goes on without bad records and writes them with reasons to `rejected_file`, which keeps what
    other loaded files have there. `max_examples` (None or 0: all) stops reading after that many good examples.
    """
    if passage_words < 1:
        raise DataError(f"--passage_words is {passage_words}, but a passage needs at least 1 word")
    columns = {
        "id": id_column,
        "query": query_column,
        "document": document_column,
        "passages": passages_column,
        "summary": summary_column,
        "evidence": evidence_column,
        "doc_id": doc_id_column,
    }
    list_columns = (passages_column, evidence_column, "evidence_words", "retrieved")
    rejection = {"skip": skip_bad_examples, "rejected_file": rejected_file}
    shelf = _Shelf(columns, passage_words, merge_passages)
    own_text = documents_file is None

    if not own_text:
        rows = _read_rows(documents_file, split, dataset_config_name, list_columns)
        used = {field: columns[field] for field in ("doc_id", "document", "passages")}
        _build_all(rows, str(documents_file), shelf.add, used, [("doc_id",), ("document", "passages")], **rejection)

    first_places: dict[str, str] = {}

    def build_example(row: "_Row") -> Example:
        record = row.record
        example_id = _identifier(record, id_column, default=str(row.number))
        if example_id in first_places:
            raise _BadRecord(f"'{id_column}' is '{example_id}', as at {first_places[example_id]}; it must be unique")
        query = record.get(query_column, "")
        if not isinstance(query, str):
            raise _BadRecord(f"'{query_column}' must be a string, not {_shown(query)}")
        summaries = _summaries(record, summary_column, require_summary)
        source = shelf.take(row) if own_text else shelf.find(record, str(documents_file))
        evidence, evidence_words = _evidence(record, evidence_column, passages_column, source)
        retrieved = _retrieved(record, passages_column, source)
        first_places[example_id] = row.place
        return Example(example_id, query, source.document, summaries, evidence, evidence_words, retrieved)

    rows = _read_rows(path, split, dataset_config_name, list_columns)
    text_fields = ("document", "passages") if own_text else ()
    used = {field: columns[field] for field in ("id", "query", "summary", "evidence", "doc_id", *text_fields)}
    required = [text_fields if own_text else ("doc_id",)]
    if require_summary:
        required.append(("summary",))
    else:
        del used["summary"]  # a file to be summarized need not have the column that the training file has
    return _build_all(rows, str(path), build_example, used, required, max_built=max_examples, **rejection)


# ----------------------------------------------------------------------------------------------------------------------
# Splitting and merging

_STOPS = ".!?…。！？।؟۔"
_CLOSERS = "\"'”’»)]}"
_OPENERS = "\"'“‘«([{"
# Followed by a name, hence never the end of a sentence ...
_TITLES = frozenset(
    "mr mrs ms messrs mme dr prof st mt sen rep gov gen col maj sgt capt lt cmdr rev hon pres vs cf viz".split()
)
# ... or by a number ("No. 5", "Fig. 2", "Jan. 3"), and otherwise the end of one ("No. He left.")
_NUMBERED = frozenset(
    "no nos fig figs eq sec sect ch vol art p pp ca approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)


def split_document(text: str, passage_words: int) -> list[str]:
    """Splits a text into passages of at most `passage_words` words, on sentence and line ends; no word is lost.

    A line (a turn, a paragraph) that does not fit into what is left of a passage starts a new one if the passage is
    half full already and the line fits there whole. Only a sentence longer than a passage is cut between words.
    """
    passages: list[str] = []
    pieces: list[str] = []  # of the passage being filled, each after the first with its separator in front
    filled = 0
    any_case = text.islower()  # without capitals, a small letter after a stop may well begin a sentence
    for line in text.splitlines():
        words = line.split()
        separator = "\n"
        keep_whole = len(words) <= passage_words < filled + len(words) and 2 * filled >= passage_words
        for sentence in _sentences(words, any_case):
            for start in range(0, len(sentence), passage_words):
                part = sentence[start : start + passage_words]
                if filled + len(part) > passage_words or keep_whole:
                    passages.append("".join(pieces))
                    pieces, filled, keep_whole = [], 0, False
                pieces.append((separator if pieces else "") + " ".join(part))
                filled += len(part)
                separator = " "
    if pieces:
        passages.append("".join(pieces))
    return passages


def _sentences(words: list[str], any_case: bool) -> Iterator[list[str]]:
    """The sentences of one line as lists of words; in doubt, two sentences stay together."""
    start = 0
    for end in range(1, len(words)):
        if _ends_sentence(words, start, end - 1, any_case):
            yield words[start:end]
            start = end
    if words:
        yield words[start:]


def _ends_sentence(words: list[str], start: int, last: int, any_case: bool) -> bool:
    """Whether a sentence that began at word `start` ends with word `last`, which another word follows."""
    following = words[last + 1]
    if all(character in "'”’»)]}" for character in following):
        return False  # tokenized text: the closing quote or bracket stands alone (a straight " may open as well)
    while last > start and all(character in _CLOSERS for character in words[last]):
        last -= 1
    core = words[last].rstrip(_CLOSERS)
    stem = core.rstrip(_STOPS)
    stop = core[len(stem) :]
    if not stop:
        return False
    if not stem and stop.strip("…") and stop.count(".") < 2:
        return True  # a stop that stands alone ("OK , we 're on ."), other than dots ("well ... you know")
    if not any_case and following.lstrip(_OPENERS)[:1].islower():
        return False  # "Go!" he said
    if stop != ".":
        return True
    stem = stem.lstrip(_OPENERS)
    if last == start and stem.isdigit():
        return False  # "1. Introduction"
    letters = stem.split(".")
    if all(len(letter) == 1 and letter.isalpha() for letter in letters) and (len(letters) > 1 or stem.isupper()):
        return False  # "J.", "U.S.", "e.g."
    return not (stem.lower() in _TITLES or (stem.lower() in _NUMBERED and following[0].isdigit()))


def merge_passages(passages: Sequence[str], passage_words: int) -> tuple[list[str], list[dict[int, int]]]:
    """Merges consecutive passages, one a line, into chunks of at most `passage_words` words; splits longer ones.

    Returns the chunks and, for each given passage, how many of its words went into which chunk.
    """
    chunks: list[list[str]] = []
    placed: list[dict[int, int]] = []
    filled = passage_words  # so that the first passage opens the first chunk
    for passage in passages:
        placed.append({})
        fits = len(passage.split()) <= passage_words
        for part in [passage] if fits else split_document(passage, passage_words):
            words = len(part.split())
            if filled + words > passage_words:
                chunks.append([])
                filled = 0
            chunks[-1].append(part)
            filled += words
            placed[-1][len(chunks) - 1] = words
    return ["\n".join(chunk) for chunk in chunks], placed


# ----------------------------------------------------------------------------------------------------------------------
# Documents, each split or merged once


@dataclass(slots=True)
class _Source:
    """A document and how the passages of its record became its own."""

    document: Document
    given: int | None  # passages in the record; None if they were split from a text, so that nothing can refer to them
    placed: list[dict[int, int]] | None  # with merging: words of each given passage in each chunk


class _Shelf:
    """The documents met so far, by what they hold and by doc_id."""

    def __init__(self, columns: dict[str, str], passage_words: int, merge: bool):
        self.columns, self.passage_words, self.merge = columns, passage_words, merge
        self.sources: dict[tuple[str | None, str | tuple[str, ...]], _Source] = {}
        self.by_id: dict[str, tuple[_Source, str]] = {}  # with the place where it was first met

    def add(self, row: "_Row") -> _Source:
        """Takes in a record of the documents file."""
        doc_id = _identifier(row.record, self.columns["doc_id"])
        if doc_id in self.by_id:
            column, place = self.columns["doc_id"], self.by_id[doc_id][1]
            raise _BadRecord(f"'{column}' is '{doc_id}', as at {place}; a document must be there once")
        return self.take(row)

    def find(self, record: dict, documents_file: str) -> _Source:
        """The document of the documents file that an example names."""
        doc_id = _identifier(record, self.columns["doc_id"])
        if doc_id not in self.by_id:
            raise _BadRecord(f"'{self.columns['doc_id']}' is '{doc_id}', but {documents_file} holds no such document")
        return self.by_id[doc_id][0]

    def take(self, row: "_Row") -> _Source:
        """The document that a record holds: the one met before if it was, else a new one."""
        content = self._content(row.record)
        doc_id = _identifier(row.record, self.columns["doc_id"], default=None)
        source = self.sources.get((doc_id, content))
        if source is not None:
            return source
        given, placed = None, None
        if isinstance(content, str):
            passages = split_document(content, self.passage_words)
        else:
            given, passages = len(content), list(content)
            if self.merge:
                passages, placed = merge_passages(passages, self.passage_words)
        key = doc_id or hashlib.blake2b(json.dumps(passages).encode(), digest_size=8).hexdigest()
        document = Document(key, passages)
        if key in self.by_id:
            document, place = self.by_id[key][0].document, self.by_id[key][1]
            if document.passages != passages:
                raise _BadRecord(f"'{self.columns['doc_id']}' is '{key}', as at {place}, but the text is another one")
        source = self.sources[doc_id, content] = _Source(document, given, placed)
        self.by_id.setdefault(key, (source, row.place))
        return source

    def _content(self, record: dict) -> str | tuple[str, ...]:
        """The checked text of a record: a tuple of passages or one string; passages win where it holds both."""
        passages_column, document_column = self.columns["passages"], self.columns["document"]
        if passages_column in record:
            passages = record[passages_column]
            if not isinstance(passages, list):
                raise _BadRecord(f"'{passages_column}' must be a list of strings, not {_shown(passages)}")
            if not passages:
                raise _BadRecord(f"'{passages_column}' is an empty list; there must be at least one passage")
            for number, passage in enumerate(passages):
                if not isinstance(passage, str):
                    raise _BadRecord(f"'{passages_column}' must hold strings, but number {number} is {_shown(passage)}")
                if not passage.strip():
                    remedy = f"leave it out and renumber '{self.columns['evidence']}'"
                    raise _BadRecord(f"'{passages_column}' number {number} is empty; {remedy}")
            return tuple(passages)
        if document_column not in record:
            raise _BadRecord(f"no '{passages_column}' and no '{document_column}'; {_fields(record)}")
        text = record[document_column]
        if not isinstance(text, str):
            hint = f" (a list of passages goes under '{passages_column}')" if isinstance(text, list) else ""
            raise _BadRecord(f"'{document_column}' must be a string, not {_shown(text)}{hint}")
        if not text.strip():
            raise _BadRecord(f"'{document_column}' is empty; it must hold the text to summarize")
        return text


# ----------------------------------------------------------------------------------------------------------------------
# Fields of a record; absent fields (null, NaN, an empty CSV cell) are not in it


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _fields(record: dict) -> str:
    return f"the record has {', '.join(sorted(map(str, record)))}" if record else "the record is empty"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _identifier(record: dict, column: str, **default: str | None) -> str | None:
    if column not in record:
        if default:
            return default["default"]
        raise _BadRecord(f"no '{column}'; {_fields(record)}")
    value = record[column]
    if not _is_whole(value) and not isinstance(value, str):
        raise _BadRecord(f"'{column}' must be a string or a whole number, not {_shown(value)}")
    if value == "":
        raise _BadRecord(f"'{column}' is empty")
    return str(value)


def _summaries(record: dict, column: str, required: bool) -> list[str]:
    if column not in record:
        if required:
            raise _BadRecord(f"no '{column}'; {_fields(record)}")
        return []
    value = record[column]
    summaries = [value] if isinstance(value, str) else value
    if not isinstance(summaries, list) or not all(isinstance(summary, str) for summary in summaries):
        raise _BadRecord(f"'{column}' must be a string or a list of strings, not {_shown(value)}")
    if required and not (summaries and all(summary.strip() for summary in summaries)):
        where = " or holds an empty string" if len(summaries) > 1 else ""
        raise _BadRecord(f"'{column}' is empty{where}; an example needs a summary")
    return [summary for summary in summaries if summary.strip()]


def _check_passage_number(number: Any, column: str, passages: int) -> None:
    if not _is_whole(number):
        raise _BadRecord(f"'{column}' must hold passage numbers (whole numbers from 0), but holds {_shown(number)}")
    if not 0 <= number < passages:
        count = f"there are {passages} passages (numbers 0 to {passages - 1})"
        raise _BadRecord(f"'{column}' holds {number}, but {count if passages > 1 else 'there is 1 passage (number 0)'}")


def _evidence(
    record: dict, column: str, passages_column: str, source: _Source
) -> tuple[list[int] | None, list[int] | None]:
    """Gold passage numbers and the gold words in each; an empty list is as good as none."""
    numbers, given_words = record.get(column), record.get("evidence_words")
    if given_words is not None and not numbers:
        raise _BadRecord(f"'evidence_words' needs '{column}', whose passages it counts the gold words of")
    if numbers is None or numbers == []:
        return None, None
    if not isinstance(numbers, list):
        raise _BadRecord(f"'{column}' must be a list of passage numbers such as [3, 7], not {_shown(numbers)}")
    if source.given is None:
        raise _BadRecord(f"'{column}' needs '{passages_column}': it cannot number the passages of a text not yet split")
    for number in numbers:
        _check_passage_number(number, column, source.given)

    if source.placed is not None:
        if given_words is not None:
            raise _BadRecord("'evidence_words' counts words in the passages as they are; leave out --merge_passages")
        words = Counter()
        for number in set(numbers):
            words.update(source.placed[number])
        evidence = sorted(words)
        return evidence, [words[chunk] for chunk in evidence]

    evidence = sorted(set(numbers))
    sizes = [len(source.document.passages[number].split()) for number in evidence]
    if given_words is None:
        return evidence, sizes
    if not isinstance(given_words, list) or len(given_words) != len(numbers) or len(evidence) != len(numbers):
        raise _BadRecord(f"'evidence_words' must be a list with one word count for each of '{column}', without repeats")
    by_number = dict(zip(numbers, given_words, strict=True))
    for number, size in zip(evidence, sizes, strict=True):
        words = by_number[number]
        if not _is_whole(words) or not 1 <= words <= size:
            raise _BadRecord(f"'evidence_words' holds {_shown(words)} for passage {number}, which has {size} words")
    return evidence, [by_number[number] for number in evidence]


def _retrieved(record: dict, passages_column: str, source: _Source) -> list[tuple[int, float]] | None:
    """A hand-over file's ranking of the passages, best first."""
    entries = record.get("retrieved")
    if entries is None:
        return None
    if source.given is None:
        raise _BadRecord(
            f"'retrieved' needs '{passages_column}': it cannot number the passages of a text not yet split"
        )
    if source.placed is not None:
        raise _BadRecord("'retrieved' numbers the passages as they are; leave out --merge_passages")
    wanted = '\'retrieved\' must be a list of {"passage": 12, "score": 0.91}'
    if not isinstance(entries, list):
        raise _BadRecord(f"{wanted}, not {_shown(entries)}")
    ranking: dict[int, float] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "passage" not in entry or "score" not in entry:
            raise _BadRecord(f"{wanted}, but holds {_shown(entry)}")
        number, score = entry["passage"], entry["score"]
        _check_passage_number(number, "retrieved", source.given)
        if number in ranking:
            raise _BadRecord(f"'retrieved' holds passage {number} twice")
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
            raise _BadRecord(f"'retrieved' must score passage {number} with a finite number, not {_shown(score)}")
        ranking[number] = float(score)
    return list(ranking.items())


# ----------------------------------------------------------------------------------------------------------------------
# From rows to what is built from them, and the report on bad ones


@dataclass(slots=True)
class _Row:
    number: int  # of the line or row, from 1
    place: str  # "train.jsonl:17" or "train.csv: row 17"
    record: dict | None  # None if there is a problem
    problem: str = ""
    text: str = ""  # what was read instead of a record


def _build_all(
    rows: Iterable[_Row],
    file: str,
    build: Callable[[_Row], Any],
    columns: dict[str, str],
    required: list[tuple[str, ...]],
    *,
    skip: bool,
    rejected_file: str | os.PathLike | None,
    max_built: int | None = None,
) -> list:
    """`build(row)` of all rows; problems are gathered and raised together, or set aside.

    `columns` are the columns that may be read, by field; of each group in `required` one must be in some record.
    """
    built, problems, found, stopped = [], [], set(), False  # found: columns
    for row in rows:
        reason = row.problem
        if row.record is not None:
            found |= row.record.keys()
            row.record = {name: value for name, value in row.record.items() if not _is_absent(value)}
            try:
                built.append(build(row))
            except _BadRecord as error:
                reason = str(error)
        if reason:
            content = {"text": row.text} if row.record is None else {"record": row.record}
            entry = {"file": file, "line": row.number, "reason": reason}
            problems.append((row.place, entry | content if skip else entry))
        elif len(built) == max_built:
            stopped = True
            break
    if not built and not problems:
        raise DataError(f"{file}: is empty; it must hold at least one record, such as one JSON object a line")
    if found:
        # the error of a single record lists its columns anyway, and says where it is
        _check_columns(file, found, columns, required if len(built) + len(problems) > 1 else [], not stopped)

    if skip and rejected_file is not None:
        _write_rejected(rejected_file, file, [entry for _, entry in problems])
    if not problems:
        return built
    if skip and built:
        where = f"; they are in {rejected_file}" if rejected_file is not None else ""
        logger.warning("%d bad records left out, the first at %s%s", len(problems), problems[0][0], where)
        return built
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


# ----------------------------------------------------------------------------------------------------------------------
# Reading rows from any kind of file

_OPENERS_BY_ENDING = {".gz": gzip.open, ".xz": lzma.open}
_ENDINGS = ".jsonl, .json, .csv, .tsv (also with .gz or .xz) or .parquet"
_HALF_CHARACTER = "invalid UTF-8, or half of a character pair (such as \\ud83d alone); save the file as UTF-8"


def _read_rows(
    path: str | os.PathLike, split: str, config_name: str | None, list_columns: Sequence[str]
) -> Iterator[_Row]:
    """Rows of a file, a folder or a Hub data set; DataError if it cannot be read on, whatever the reason."""
    number = 0
    try:
        for row in _choose_reader(path, split, config_name, list_columns):
            yield row
            number = row.number
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error) as error:
        if isinstance(error, OSError) and error.strerror:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        raise DataError(
            f"{path}: damaged after record {number}: {error}; nothing was loaded: copy or make the file again"
        ) from None


def _choose_reader(
    path: str | os.PathLike, split: str, config_name: str | None, list_columns: Sequence[str]
) -> Iterator[_Row]:
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


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines without the byte order mark that some editors put in front."""
    with stream:
        for number, line in enumerate(stream):
            yield line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line


def _json_line_rows(name: str, stream: Iterable[bytes]) -> Iterator[_Row]:
    for number, line in enumerate(_lines(stream), 1):
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
        yield _Row(number, f"{name}:{number}", None if problem else record, problem, text)


def _json_rows(name: str, stream: BinaryIO) -> Iterator[_Row]:
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
        yield _Row(number, f"{name}: row {number}", None if problem else record, problem, text)


def _object_problem(record: Any, may_hold_halves: bool) -> str:
    if not isinstance(record, dict):
        return f'must be a JSON object such as {{"passages": [...], "summary": "..."}}, not {_shown(record)}'
    if may_hold_halves:
        try:
            json.dumps(record, ensure_ascii=False, default=str).encode("utf-8")
        except UnicodeEncodeError:
            return _HALF_CHARACTER
    return ""


def _csv_rows(name: str, stream: BinaryIO, delimiter: str, list_columns: Sequence[str]) -> Iterator[_Row]:
    """Rows of a CSV file as they are: no cell is taken for a number, and none named "NA" for nothing."""
    csv.field_size_limit(2**31 - 1)  # the csv module's own limit, 131,072 characters, is less than a long document
    lines = (line.decode("utf-8", "surrogateescape") for line in _lines(stream))
    for number, cells in enumerate(csv.DictReader(lines, delimiter=delimiter), 1):
        surplus = cells.pop(None, None)
        record = {column: cell for column, cell in cells.items() if cell != ""}
        problem = _object_problem(record, may_hold_halves=True)
        if surplus is not None:
            problem = f"has {len(surplus)} more cells than the header has columns; quote text that holds '{delimiter}'"
        text = json.dumps(cells) if problem else ""
        record = None if problem else dict.fromkeys(cells) | _decode_lists(record, list_columns)
        yield _Row(number, f"{name}: row {number}", record, problem, text)


def _dataset_rows(name: str, list_columns: Sequence[str], *arguments: Any, **options: Any) -> Iterator[_Row]:
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
        yield _Row(number, f"{name}: row {number}", _decode_lists(record, list_columns))


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


# ----------------------------------------------------------------------------------------------------------------------
# Writing


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes JSON Lines, completely or not at all, as `write_lines` does."""
    write_lines(path, (json.dumps(record, ensure_ascii=False, default=str) for record in records))


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Writes lines, completely or not at all: to a temporary sibling first, which then takes the file's place."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # lone halves of a character pair cannot be UTF-8; with backslashreplace they become their JSON escapes
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            for line in lines:
                file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_retrieved(
    path: str | os.PathLike, examples: Sequence[Example], rankings: Sequence[Sequence[tuple[int, float]]]
) -> None:
    """Writes the hand-over file: each example with `rankings[i]`, its (passage number, score) pairs, best first.

    The file is a self-contained example file: `load_examples` gives the examples back, with the rankings.
    """
    if len(examples) != len(rankings):
        raise ValueError(f"{len(examples)} examples, but {len(rankings)} rankings")
    write_jsonl(path, map(_retrieved_record, examples, rankings))


def _retrieved_record(example: Example, ranking: Sequence[tuple[int, float]]) -> dict:
    record: dict[str, Any] = {"id": example.id, "query": example.query, "doc_id": example.document.id}
    if example.summaries:
        record["summary"] = example.summaries if len(example.summaries) > 1 else example.summaries[0]
    if example.evidence:
        record["evidence"] = example.evidence
        record["evidence_words"] = example.evidence_words
    record["retrieved"] = []
    for passage, score in ranking:
        if not math.isfinite(score):
            raise ValueError(f"example '{example.id}': the score of passage {passage} is {score}")
        record["retrieved"].append({"passage": int(passage), "score": float(f"{score:.6g}")})
    record["passages"] = example.document.passages
    return record
