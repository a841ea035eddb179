"""Reading a corpus of passages once, into an Arrow file that all processes map into memory."""

import hashlib
import json
import os
import shutil
from pathlib import Path

from filelock import FileLock

from utils.data.documents import read_identifier
from utils.data.examples import Corpus
from utils.data.rows import Row, build_each, listed_fields, read_rows, report_problems, shown
from utils.errors import BadRecord, DataError
from utils.files import cache_folder, write_jsonl


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
    key = read_identifier(record, "_id")
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
