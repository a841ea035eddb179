"""Reads a corpus of passages once, into an Arrow file that all processes map into memory."""

import hashlib
import json
import os
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from utils.data.examples import Corpus
from utils.data.rows import Row, build_all, listed_fields, read_identifier, read_rows, report_problems, shown
from utils.data.words import count_words
from utils.errors import BadRecord, DataError
from utils.files import cache_folder, digest, write_jsonl, write_whole
from utils.progress import for_all
from utils.tables import Table, code_key, table_writer

PASSAGES = pa.schema([("id", pa.large_string()), ("passage", pa.large_string())])


class CorpusWords:
    """Item i is the number of words of passage i."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __getitem__(self, number: int) -> int:
        return count_words(self.corpus.passages[number])


def load_corpus(
    path: str | os.PathLike,
    *,
    skip_bad_examples: bool = False,
    rejected_file: str | os.PathLike | None = None,
) -> Corpus:
    """Reads a corpus in BEIR's layout (Thakur et al., 2021, arXiv:2104.08663): `_id`, `text` and optionally `title`.

    `path` is any file, folder or Hub name that examples can be read from. A folder gives its split `train`; a Hub name
    gives the split `corpus` of the configuration `corpus`, as in BEIR's data sets. A passage is the title, a space and
    the text.

    The checked passages are kept in an Arrow file in `cache_folder()`. All processes and later runs map it into memory,
    until the path, size or modification time of the source changes, or the code in utils/. Raises DataError for
    unusable data; `skip_bad_examples` and `rejected_file` are as in `load_examples`.
    """
    folder = cache_folder() / f"corpus_{digest([code_key(), *_source_state(path)])}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_suffix(".lock")).acquire()  # the first of several processes reads the corpus
    except OSError as error:
        raise DataError(
            f"{folder.parent}: a corpus cannot be kept there: {error.strerror}; name another folder with --cache_dir"
        ) from None
    with lock, for_all():
        kept = _read_corpus(folder)
        if kept is None:
            _build_corpus(path, folder, skip_bad_examples, rejected_file)
            return _read_corpus(folder)[0]
    corpus, problems = kept  # the problems of an earlier run are reported again
    report_problems(problems, str(path), any_good=True, skip=skip_bad_examples, rejected_file=rejected_file)
    return corpus


def _source_state(path: str | os.PathLike) -> list:
    """Values that differ after a file, folder or Hub data set has changed."""
    file = Path(path).absolute()
    files = sorted(file.rglob("*")) if file.is_dir() else [file]
    state = [[str(each), each.stat().st_size, each.stat().st_mtime_ns] for each in files if each.is_file()]
    if state or file.exists():
        return state
    try:
        import datasets  # takes seconds

        return [datasets.load_dataset_builder(str(path), "corpus").cache_dir]  # its name contains the revision
    except Exception:  # of many classes; reading the corpus, which comes next, reports what is wrong
        return [str(path)]


def _read_corpus(folder: Path) -> tuple[Corpus, list[tuple[str, dict]]] | None:
    """A cached corpus and the bad records that were left out; None if it is missing or damaged."""
    try:
        info = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if (folder / "passages.arrow").stat().st_size != info["bytes"]:
            return None
        table = Table(folder / "passages.arrow")
        problems = [(place, entry) for place, entry in info["problems"]]
        return Corpus(info["id"], table.column("passage"), table.column("id")), problems
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _build_corpus(path: str | os.PathLike, folder: Path, skip: bool, rejected_file: str | os.PathLike | None) -> None:
    """Reads and checks a corpus and writes it to `folder`, completely or not at all; holds few passages in memory."""
    columns = {"_id": "_id", "title": "title", "text": "text"}
    required = [("_id",), ("text", "title")]
    split, config_name = ("train", None) if Path(path).exists() else ("corpus", "corpus")
    rows = read_rows(path, split, config_name, ())
    first_rows: dict[str, int] = {}
    checksum = hashlib.blake2b(digest_size=16)

    def write(temporary: Path) -> None:
        temporary.mkdir()
        file = temporary / "passages.arrow"
        with table_writer(file, PASSAGES) as add:

            def take(row: Row) -> None:
                key, passage = _read_passage(row, first_rows)
                first_rows[key] = row.number
                checksum.update(json.dumps([key, passage]).encode())
                add({"id": key, "passage": passage})

            _, problems = build_all(rows, str(path), take, columns, required, skip=skip, rejected_file=rejected_file)
        info = {"id": checksum.hexdigest(), "bytes": file.stat().st_size, "problems": problems}
        write_jsonl(temporary / "corpus.json", [info])

    write_whole(folder, write)


def _read_passage(row: Row, first_rows: dict[str, int]) -> tuple[str, str]:
    """Id and text of a record, checked; `first_rows` has the row of each earlier id."""
    record = row.record
    key = read_identifier(record, "_id")
    if key in first_rows:
        place = row.place.removesuffix(str(row.number)) + str(first_rows[key])
        raise BadRecord(f"'_id' is '{key}', like {place}; it must be unique")
    if "text" not in record and "title" not in record:
        raise BadRecord(f"no 'text'; {listed_fields(record)}")
    for column in ("title", "text"):
        if not isinstance(record.get(column, ""), str):
            raise BadRecord(f"'{column}' must be a string, not {shown(record[column])}")
    passage = f"{record.get('title', '')} {record.get('text', '')}".strip()
    if not passage:
        raise BadRecord("'text' is empty, and so is 'title'; a passage needs words")
    return key, passage
