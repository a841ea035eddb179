"""Examples and documents: reading them, checking them, writing the hand-over file.

`load_examples` reads one example a record, `{"id", "query", "passages" or "document", "summary", "evidence"}`, from
JSON Lines, JSON, CSV, Parquet, a folder or the Hub. Examples about the same document share one `Document`, so that
whatever is computed for a document is computed once. A corpus that is searched as a whole, from `load_corpus`, is a
document that all examples share.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote

from filelock import FileLock

from utils.passages import merge_passages, split_document
from utils.rows import (
    SHOWN_PROBLEMS,
    BadRecord,
    DataError,
    Row,
    build_all,
    build_each,
    guarded,
    listed_fields,
    open_bytes,
    read_lines,
    read_rows,
    report_problems,
    shown,
    write_jsonl,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True, weakref_slot=True)
class Document:
    """A document as its passages; compared by identity, because examples about the same document share one object."""

    id: str  # doc_id if given, else a hash of the passages
    passages: Sequence[str]  # in document order

    def passage_id(self, number: int) -> str:
        """The name of a passage outside this program, as in TREC files."""
        return f"{self.id}#{number}"


@dataclass(eq=False, slots=True)
class Corpus(Document):
    """The one document of examples that search a corpus; its text stays on the disk, in a file mapped into memory.

    `id` is a checksum of ids and passages. `passages` and `ids` are read where they are indexed: by a number, a slice
    or a list of numbers, of which a slice is much the fastest for many.
    """

    ids: Sequence[str]  # the corpus's own, one for each passage

    def passage_id(self, number: int) -> str:
        """The corpus's own id of a passage."""
        return self.ids[number]


@dataclass(slots=True)
class Hop:
    """One round of retrieving and summarizing."""

    draft: str  # the summary that it wrote
    read: list[int]  # passage numbers that it was written from
    retrieved: list[tuple[int, float]]  # the ranking that they are the best of


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
    hops: list[Hop] = field(default_factory=list)  # in a file that retrieve_and_summarize.py wrote


def load_splits(args, rejected_file: str | os.PathLike | None = None) -> tuple[list[Example], list[Example]]:
    """Training and validation examples as the flags of `DataArguments` say; without files, the embedded data set.

    A folder or Hub name as `train_file` brings its own validation split. `rejected_file` as in `load_examples`. With
    `corpus_file` all examples of both splits share one `Corpus`.
    """
    for name in ("train_qrels_file", "validation_qrels_file"):
        if getattr(args, name) and not args.corpus_file:
            raise DataError(f"--{name} needs --corpus_file, whose passages it names")
    for name in ("documents_file", "validation_documents_file"):
        if getattr(args, name) and args.corpus_file:
            raise DataError(f"--{name} is not for examples that search a corpus; leave it out, or --corpus_file")
    if args.corpus_file and not args.train_file:
        raise DataError("--corpus_file needs --train_file, whose queries search it")
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
    options = args.reading_options()
    if args.corpus_file:
        options["corpus"] = load_corpus(
            args.corpus_file, skip_bad_examples=args.skip_bad_examples, rejected_file=rejected_file
        )
    train = load_examples(
        args.train_file,
        split="train",
        documents_file=args.documents_file,
        qrels_file=args.train_qrels_file,
        max_examples=args.max_train_examples,
        rejected_file=rejected_file,
        **options,
    )
    validation = load_examples(
        args.validation_file or args.train_file,
        split="validation",
        documents_file=args.validation_documents_file or args.documents_file,
        qrels_file=args.validation_qrels_file,
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
    corpus: Corpus | None = None,
    qrels_file: str | os.PathLike | None = None,
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
    With a `corpus` the records hold none: a query is wanted, a summary is not, and evidence is a list of the corpus's
    ids; for records without, that of `qrels_file` (see `read_qrels`), by the records' ids.
    `skip_bad_examples` goes on without bad records and writes them with reasons to `rejected_file`, which keeps what
    other loaded files have there. `max_examples` (None or 0: all) stops reading after that many good examples.
    """
    if passage_words < 1:
        raise DataError(f"--passage_words is {passage_words}, but a passage needs at least 1 word")
    if corpus is not None and documents_file is not None:
        raise DataError("--documents_file is not for examples that search a corpus; leave it out, or --corpus_file")
    if corpus is not None and merge_passages:
        raise DataError("--merge_passages is not for a corpus, whose passages are found by their ids; leave it out")
    if corpus is None and qrels_file is not None:
        raise DataError(f"{qrels_file}: evidence by the ids of a corpus needs --corpus_file")
    columns = {
        "id": id_column,
        "query": query_column,
        "document": document_column,
        "passages": passages_column,
        "summary": summary_column,
        "evidence": evidence_column,
        "doc_id": doc_id_column,
    }
    list_columns = (passages_column, evidence_column, "evidence_words", "retrieved", "hops")
    rejection = {"skip": skip_bad_examples, "rejected_file": rejected_file}
    shelf = _Shelf(columns, passage_words, merge_passages)
    own_text = documents_file is None and corpus is None
    require_summary = require_summary and corpus is None
    numbers: dict[str, int] = {}  # of the corpus's passages
    qrels: dict[str, dict[str, int]] = {}

    if corpus is not None:
        numbers = {key: number for number, key in enumerate(itertools.chain.from_iterable(blocks(corpus.ids)))}
        whole_corpus = _Source(corpus, len(numbers), None)
        if qrels_file is not None:
            qrels = read_qrels(qrels_file, known_passages=numbers, **rejection)
    elif not own_text:
        rows = read_rows(documents_file, split, dataset_config_name, list_columns)
        used = {field: columns[field] for field in ("doc_id", "document", "passages")}
        build_all(rows, str(documents_file), shelf.add, used, [("doc_id",), ("document", "passages")], **rejection)

    first_places: dict[str, str] = {}

    def build_example(row: Row) -> Example:
        record = row.record
        # the ids of a qrels file are never row numbers, which would match by chance
        example_id = _identifier(record, id_column, **({} if qrels else {"default": str(row.number)}))
        if example_id in first_places:
            raise BadRecord(f"'{id_column}' is '{example_id}', as at {first_places[example_id]}; it must be unique")
        query = record.get(query_column, "")
        if not isinstance(query, str):
            raise BadRecord(f"'{query_column}' must be a string, not {shown(query)}")
        summaries = _summaries(record, summary_column, require_summary)
        if corpus is not None:
            if not query.strip():
                raise BadRecord(f"no '{query_column}' or an empty one; without a query a corpus cannot be searched")
            source = whole_corpus
            record = _numbered(record, evidence_column, numbers, qrels.get(example_id, {}))
        else:
            source = shelf.take(row) if own_text else shelf.find(record, str(documents_file))
        evidence, evidence_words = _evidence(record, evidence_column, passages_column, source)
        retrieved = _retrieved(record, passages_column, source)
        hops = _hops(record, passages_column, source)
        first_places[example_id] = row.place
        return Example(example_id, query, source.document, summaries, evidence, evidence_words, retrieved, hops)

    rows = read_rows(path, split, dataset_config_name, list_columns)
    text_fields = ("document", "passages") if own_text else ()
    used = {field: columns[field] for field in ("id", "query", "summary", "evidence", "doc_id", *text_fields)}
    required = [text_fields if own_text else ("doc_id",)]
    if corpus is not None:
        del used["doc_id"]
        required = [("query",), ("id",)] if qrels else [("query",)]
    if require_summary:
        required.append(("summary",))
    else:
        del used["summary"]  # a file to be summarized need not have the column that the training file has
    examples = build_all(rows, str(path), build_example, used, required, max_built=max_examples, **rejection)
    if qrels and not max_examples and not any(example.id in qrels for example in examples):
        raise DataError(
            f"{qrels_file}: none of its queries, such as '{next(iter(qrels))}', is among the examples of {path}, such "
            f"as '{examples[0].id}'; name the field of their ids with --id_column"
        )
    return examples


# ----------------------------------------------------------------------------------------------------------------------
# A corpus, and the evidence that names its passages

BLOCK = 2**16  # passages or ids read at once


def blocks(texts: Sequence[str], size: int = BLOCK) -> Iterator[list[str]]:
    """Consecutive parts of a long sequence, such as a corpus's, each read at once."""
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])


def cache_folder() -> Path:
    """Where what is made of a user's data is kept for later runs; may be deleted at any time."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return Path(home) / "multistep-retrieve-summarize"


def load_corpus(
    path: str | os.PathLike,
    *,
    skip_bad_examples: bool = False,
    rejected_file: str | os.PathLike | None = None,
) -> Corpus:
    """A corpus in BEIR's layout (Thakur et al., 2021, arXiv:2104.08663): records of `_id`, `text` and maybe `title`.

    `path` is any file, folder or Hub name that examples are read from; of a folder it is the split `train`, of a Hub
    name the split `corpus` of the configuration `corpus`, as BEIR's are there. A passage is title and text with a space
    between. The records are read and checked once and kept in an Arrow file in `cache_folder()`, which all processes
    and later runs map into memory, until the file's path, size or time of change is another. Raises DataError for
    anything unusable; `skip_bad_examples` and `rejected_file` as in `load_examples`.
    """
    key = hashlib.blake2b(json.dumps(_source_state(path)).encode(), digest_size=16).hexdigest()
    folder = cache_folder() / f"corpus_{key}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock")).acquire()  # the first of several processes does the work
    except OSError as error:
        raise DataError(
            f"{folder.parent}: a corpus cannot be kept there: {error.strerror}; set HF_HOME to a folder that can be "
            "written to"
        ) from None
    with lock:
        if _read_corpus(folder) is None:
            _build_corpus(path, folder, skip_bad_examples, rejected_file)
        corpus, problems = _read_corpus(folder)
    report_problems(problems, str(path), found_good=True, skip=skip_bad_examples, rejected_file=rejected_file)
    return corpus


def _source_state(path: str | os.PathLike) -> list:
    """What is another if a file, folder or Hub data set has changed."""
    file = Path(path).absolute()
    files = sorted(file.rglob("*")) if file.is_dir() else [file]
    state = [[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in files if each.is_file()]
    if state or file.exists():
        return state
    try:
        import datasets  # takes seconds

        return [datasets.load_dataset_builder(str(path), "corpus").cache_dir]  # whose name holds the revision
    except Exception:  # of any class; reading it, which comes next, says what is wrong
        return [str(path)]


def _read_corpus(folder: Path) -> tuple[Corpus, list[tuple[str, dict]]] | None:
    """A corpus that is kept, with the bad records that were left out; None if there is none, or a damaged one."""
    import datasets  # takes seconds

    try:
        info = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if (folder / "passages.arrow").stat().st_size != info["bytes"]:
            return None
        rows = datasets.Dataset.from_file(str(folder / "passages.arrow"))
        problems = [(place, entry) for place, entry in info["problems"]]
        return Corpus(info["id"], rows["passage"], rows["id"]), problems
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _build_corpus(path: str | os.PathLike, folder: Path, skip: bool, rejected_file: str | os.PathLike | None) -> None:
    """Reads and checks a corpus and publishes it as `folder`, complete or not at all; a block in memory at a time."""
    import pyarrow  # with `datasets`

    schema = pyarrow.schema({"id": pyarrow.string(), "passage": pyarrow.string()})
    first_rows: dict[str, int] = {}
    digest = hashlib.blake2b(digest_size=16)
    ids: list[str] = []
    passages: list[str] = []

    def take(row: Row) -> None:
        key, passage = _passage(row, first_rows)
        first_rows[key] = row.number
        digest.update(json.dumps([key, passage]).encode())
        ids.append(key)
        passages.append(passage)
        if len(ids) == 1024:
            write_block()

    def write_block() -> None:
        arrays = [pyarrow.array(column, pyarrow.string()) for column in (ids, passages)]
        writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
        ids.clear()
        passages.clear()

    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        with open(temporary / "passages.arrow", "wb") as file:
            with pyarrow.ipc.new_stream(file, schema) as writer:
                is_hub_name = not Path(path).exists()
                split, config_name = ("corpus", "corpus") if is_hub_name else ("train", None)
                rows = read_rows(path, split, config_name, ())
                columns = {"_id": "_id", "title": "title", "text": "text"}
                built, problems = build_each(rows, str(path), take, columns, [("_id",), ("text", "title")], skip=skip)
                if not (skip and built):
                    report_problems(problems, str(path), found_good=bool(built), skip=skip, rejected_file=rejected_file)
                if ids:
                    write_block()
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        info = {"id": digest.hexdigest(), "bytes": size, "problems": problems}
        write_jsonl(temporary / "corpus.json", [info])
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _passage(row: Row, first_rows: dict[str, int]) -> tuple[str, str]:
    """Id and text of a record of a corpus, checked; `first_rows` has the row of each id so far."""
    record = row.record
    key = _identifier(record, "_id")
    if key in first_rows:
        place = row.place.removesuffix(str(row.number)) + str(first_rows[key])
        raise BadRecord(f"'_id' is '{key}', as at {place}; it must be unique")
    if "text" not in record and "title" not in record:
        raise BadRecord(f"no 'text'; {listed_fields(record)}")
    for column in ("title", "text"):
        if not isinstance(record.get(column, ""), str):
            raise BadRecord(f"'{column}' must be a string, not {shown(record[column])}")
    passage = f"{record.get('title', '')} {record.get('text', '')}".strip()
    if not passage:
        raise BadRecord("'text' is empty, and no 'title' stands in; a passage needs words")
    return key, passage


def read_drafts(path: str | os.PathLike, examples: Sequence[Example]) -> list[list[tuple[str, list[int]]]]:
    """For each example the drafts that a file holds for its id, each with the passages that it was written from.

    The file has records of `id` and either `hops`, as retrieve_and_summarize.py writes them, or one `draft` or
    `prediction`, from any tool. An example that it lacks, or whose drafts are empty, gets an empty list. Raises
    DataError for anything unusable, and if it has none of the examples.
    """
    by_id: dict[str, list[tuple[str, list[int]]]] = {}
    passages = {example.id: len(example.document.passages) for example in examples}

    def take(row: Row) -> None:
        key, one = _identifier(row.record, "id"), row.record.get("draft", row.record.get("prediction"))
        hops = row.record.get("hops", [{"draft": one}])
        if not isinstance(hops, list) or not all(isinstance(hop, dict) for hop in hops):
            raise BadRecord(f'\'hops\' must be a list of {{"draft": "...", "read": [3, 7]}}, not {shown(hops)}')
        for hop in hops:
            text = hop.get("draft")
            if not isinstance(text, str):
                raise BadRecord(f"no 'draft', nor 'prediction' or 'hops' with drafts; {listed_fields(row.record)}")
            if text.strip() and key in passages:
                by_id.setdefault(key, []).append((text, _read(hop, passages[key])))

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


def _numbered(record: dict, column: str, numbers: dict[str, int], qrels: dict[str, int]) -> dict:
    """A record whose evidence, its own or that of `qrels`, is turned from the corpus's ids into passage numbers."""
    if "retrieved" in record:
        hint = "leave out --corpus_file, which a hand-over file does not need"
        raise BadRecord(f"'retrieved' and '{column}' number the passages that are in the record itself; {hint}")
    keys = record.get(column)
    if keys is None or keys == []:
        found = [numbers[key] for key, relevance in qrels.items() if relevance > 0]
        return record | {column: found}
    if not isinstance(keys, list):
        raise BadRecord(f'\'{column}\' must be a list of the corpus\'s ids such as ["d3", "d7"], not {shown(keys)}')
    for key in keys:
        if not isinstance(key, str) and not _is_whole(key):
            raise BadRecord(f"'{column}' must hold the corpus's ids, strings or whole numbers, but holds {shown(key)}")
        if str(key) not in numbers:
            raise BadRecord(f"'{column}' holds {shown(key)}, but the corpus holds no such '_id'")
    return record | {column: [numbers[str(key)] for key in keys]}


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

    def add(self, row: Row) -> _Source:
        """Takes in a record of the documents file."""
        doc_id = _identifier(row.record, self.columns["doc_id"])
        if doc_id in self.by_id:
            column, place = self.columns["doc_id"], self.by_id[doc_id][1]
            raise BadRecord(f"'{column}' is '{doc_id}', as at {place}; a document must be there once")
        return self.take(row)

    def find(self, record: dict, documents_file: str) -> _Source:
        """The document of the documents file that an example names."""
        doc_id = _identifier(record, self.columns["doc_id"])
        if doc_id not in self.by_id:
            raise BadRecord(f"'{self.columns['doc_id']}' is '{doc_id}', but {documents_file} holds no such document")
        return self.by_id[doc_id][0]

    def take(self, row: Row) -> _Source:
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
                raise BadRecord(f"'{self.columns['doc_id']}' is '{key}', as at {place}, but the text is another one")
        source = self.sources[doc_id, content] = _Source(document, given, placed)
        self.by_id.setdefault(key, (source, row.place))
        return source

    def _content(self, record: dict) -> str | tuple[str, ...]:
        """The checked text of a record: a tuple of passages or one string; passages win where it holds both."""
        passages_column, document_column = self.columns["passages"], self.columns["document"]
        if passages_column in record:
            passages = record[passages_column]
            if not isinstance(passages, list):
                raise BadRecord(f"'{passages_column}' must be a list of strings, not {shown(passages)}")
            if not passages:
                raise BadRecord(f"'{passages_column}' is an empty list; there must be at least one passage")
            for number, passage in enumerate(passages):
                if not isinstance(passage, str):
                    raise BadRecord(f"'{passages_column}' must hold strings, but number {number} is {shown(passage)}")
                if not passage.strip():
                    remedy = f"leave it out and renumber '{self.columns['evidence']}'"
                    raise BadRecord(f"'{passages_column}' number {number} is empty; {remedy}")
            return tuple(passages)
        if document_column not in record:
            raise BadRecord(f"no '{passages_column}' and no '{document_column}'; {listed_fields(record)}")
        text = record[document_column]
        if not isinstance(text, str):
            hint = f" (a list of passages goes under '{passages_column}')" if isinstance(text, list) else ""
            raise BadRecord(f"'{document_column}' must be a string, not {shown(text)}{hint}")
        if not text.strip():
            raise BadRecord(f"'{document_column}' is empty; it must hold the text to summarize")
        return text


# ----------------------------------------------------------------------------------------------------------------------
# Fields of a record; absent fields (null, NaN, an empty CSV cell) are not in it


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _identifier(record: dict, column: str, **default: str | None) -> str | None:
    if column not in record:
        if default:
            return default["default"]
        raise BadRecord(f"no '{column}'; {listed_fields(record)}")
    value = record[column]
    if not _is_whole(value) and not isinstance(value, str):
        raise BadRecord(f"'{column}' must be a string or a whole number, not {shown(value)}")
    if value == "":
        raise BadRecord(f"'{column}' is empty")
    return str(value)


def _summaries(record: dict, column: str, required: bool) -> list[str]:
    if column not in record:
        if required:
            raise BadRecord(f"no '{column}'; {listed_fields(record)}")
        return []
    value = record[column]
    summaries = [value] if isinstance(value, str) else value
    if not isinstance(summaries, list) or not all(isinstance(summary, str) for summary in summaries):
        raise BadRecord(f"'{column}' must be a string or a list of strings, not {shown(value)}")
    if required and not (summaries and all(summary.strip() for summary in summaries)):
        where = " or holds an empty string" if len(summaries) > 1 else ""
        raise BadRecord(f"'{column}' is empty{where}; an example needs a summary")
    return [summary for summary in summaries if summary.strip()]


def _check_passage_number(number: Any, column: str, passages: int) -> None:
    if not _is_whole(number):
        raise BadRecord(f"'{column}' must hold passage numbers (whole numbers from 0), but holds {shown(number)}")
    if not 0 <= number < passages:
        count = f"there are {passages} passages (numbers 0 to {passages - 1})"
        raise BadRecord(f"'{column}' holds {number}, but {count if passages > 1 else 'there is 1 passage (number 0)'}")


def _evidence(
    record: dict, column: str, passages_column: str, source: _Source
) -> tuple[list[int] | None, list[int] | None]:
    """Gold passage numbers and the gold words in each; an empty list is as good as none."""
    numbers, given_words = record.get(column), record.get("evidence_words")
    if given_words is not None and not numbers:
        raise BadRecord(f"'evidence_words' needs '{column}', whose passages it counts the gold words of")
    if numbers is None or numbers == []:
        return None, None
    if not isinstance(numbers, list):
        raise BadRecord(f"'{column}' must be a list of passage numbers such as [3, 7], not {shown(numbers)}")
    if source.given is None:
        raise BadRecord(f"'{column}' needs '{passages_column}': it cannot number the passages of a text not yet split")
    for number in numbers:
        _check_passage_number(number, column, source.given)

    if source.placed is not None:
        if given_words is not None:
            raise BadRecord("'evidence_words' counts words in the passages as they are; leave out --merge_passages")
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
        raise BadRecord(f"'evidence_words' must be a list with one word count for each of '{column}', without repeats")
    by_number = dict(zip(numbers, given_words, strict=True))
    for number, size in zip(evidence, sizes, strict=True):
        words = by_number[number]
        if not _is_whole(words) or not 1 <= words <= size:
            raise BadRecord(f"'evidence_words' holds {shown(words)} for passage {number}, which has {size} words")
    return evidence, [by_number[number] for number in evidence]


def _retrieved(record: dict, passages_column: str, source: _Source) -> list[tuple[int, float]] | None:
    """A hand-over file's ranking of the passages, best first."""
    entries = record.get("retrieved")
    if entries is None:
        return None
    if source.given is None:
        raise BadRecord(f"'retrieved' needs '{passages_column}': it cannot number the passages of a text not yet split")
    if source.placed is not None:
        raise BadRecord("'retrieved' numbers the passages as they are; leave out --merge_passages")
    wanted = '\'retrieved\' must be a list of {"passage": 12, "score": 0.91}'
    if not isinstance(entries, list):
        raise BadRecord(f"{wanted}, not {shown(entries)}")
    ranking: dict[int, float] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "passage" not in entry or "score" not in entry:
            raise BadRecord(f"{wanted}, but holds {shown(entry)}")
        number, score = entry["passage"], entry["score"]
        _check_passage_number(number, "retrieved", source.given)
        if number in ranking:
            raise BadRecord(f"'retrieved' holds passage {number} twice")
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
            raise BadRecord(f"'retrieved' must score passage {number} with a finite number, not {shown(score)}")
        ranking[number] = float(score)
    return list(ranking.items())


def _hops(record: dict, passages_column: str, source: _Source) -> list[Hop]:
    """What retrieve_and_summarize.py wrote of its hops."""
    entries = record.get("hops")
    if entries is None:
        return []
    wanted = '\'hops\' must be a list of {"draft": "...", "read": [3, 7], "retrieved": [...]}'
    if not isinstance(entries, list):
        raise BadRecord(f"{wanted}, not {shown(entries)}")
    hops = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("draft"), str) or not entry.get("retrieved"):
            raise BadRecord(f"{wanted}, but number {number} is {shown(entry)}")
        try:
            retrieved = _retrieved(entry, passages_column, source)
            hops.append(Hop(entry["draft"], _read(entry, source.given), retrieved))
        except BadRecord as error:
            raise BadRecord(f"hop {number}: {error}") from None
    return hops


def _read(hop: dict, passages: int) -> list[int]:
    """The numbers of the passages that a hop's draft was written from."""
    numbers = hop.get("read", [])
    if not isinstance(numbers, list):
        raise BadRecord(f"'read' must be a list of passage numbers such as [3, 7], not {shown(numbers)}")
    for number in numbers:
        _check_passage_number(number, "read", passages)
    return numbers


# ----------------------------------------------------------------------------------------------------------------------
# Writing


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
