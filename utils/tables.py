"""What is computed from a user's data and kept on disk, as Arrow files that are mapped into memory.

Examples, passages, token ids and rankings live here, not in Python lists. They are written once, shared by all
processes of a machine, and found again by later runs and by the other stage.
"""

import functools
import hashlib
import json
import logging
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
from filelock import FileLock

from utils.errors import DataError
from utils.files import (
    cache_folder,
    digest,
    is_cache_chosen,
    is_disk_full,
    size_and_digest,
    write_json,
    write_whole,
)
from utils.progress import for_all

logger = logging.getLogger(__name__)
ROWS = 1024  # in a record batch
RELEASED_AFTER = 2**8  # reads; the pages around them count as memory of the process until then
INFO = "info.json"


class Table:
    """An Arrow file, mapped into memory. Each access reads the file, so that memory does not grow with it."""

    def __init__(self, path: str | os.PathLike):
        with open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        reader = pa.ipc.open_file(pa.py_buffer(self.memory))
        self.schema = reader.schema
        self.batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self.rows = sum(batch.num_rows for batch in self.batches)
        self.reads = 0

    def __len__(self) -> int:
        return self.rows

    def row(self, number: int) -> dict:
        """A row as Python objects."""
        batch, place = divmod(number, ROWS)
        self.release()
        return self.batches[batch].slice(place, 1).to_pylist()[0]

    def read(self) -> Iterator[dict]:
        """All rows, in order."""
        for number in range(len(self.batches)):
            yield from self.batches[number].to_pylist()
            self.release(ROWS)

    def column(self, name: str) -> "Column":
        return Column(self, self.schema.get_field_index(name), 0, self.rows)

    def array(self, name: str) -> np.ndarray:
        """(rows,) A column of numbers, copied into memory."""
        parts = [batch.column(name).to_numpy(zero_copy_only=False) for batch in self.batches]
        self.release(RELEASED_AFTER)
        return np.concatenate(parts) if parts else np.empty(0, self.schema.field(name).type.to_pandas_dtype())

    def release(self, reads: int = 1) -> None:
        """Counts reads, and now and then gives the pages that they touched back to the system's cache of files."""
        self.reads += reads
        if self.reads >= RELEASED_AFTER:
            self.reads = 0
            self.memory.madvise(mmap.MADV_DONTNEED)


class Column(Sequence):
    """Consecutive values of a column of texts or of lists of numbers, such as the passages of a document."""

    __slots__ = ("first", "index", "stop", "table")

    def __init__(self, table: Table, index: int, first: int, stop: int):
        self.table, self.index, self.first, self.stop = table, index, first, stop

    def __len__(self) -> int:
        return self.stop - self.first

    def __getitem__(self, place):
        """A value; a list of them for a slice or a list of places."""
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            return list(self._between(start, stop)) if step == 1 else [self[i] for i in range(start, stop, step)]
        if isinstance(place, list):
            return [self[each] for each in place]
        number = range(self.first, self.stop)[place]
        self.table.release()
        value = self.table.batches[number // ROWS].column(self.index)[number % ROWS]
        return value.values.to_numpy(zero_copy_only=False).tolist() if _holds_numbers(value.type) else value.as_py()

    def __iter__(self) -> Iterator:
        return self._between(0, len(self))

    def _between(self, start: int, stop: int) -> Iterator:
        number, end = self.first + start, self.first + stop
        while number < end:
            place, count = number % ROWS, min(end - number, ROWS - number % ROWS)
            values = self.table.batches[number // ROWS].column(self.index).slice(place, count).to_pylist()
            self.table.release(count)
            yield from values
            number += count

    def __eq__(self, other) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(lambda a, b: a == b, self, other))

    __hash__ = None

    def lengths(self) -> np.ndarray:
        """(values,) The number of items of each list."""
        parts = [batch.column(self.index).value_lengths().to_numpy() for batch in self.table.batches]
        self.table.release(RELEASED_AFTER)
        return (np.concatenate(parts) if parts else np.empty(0, np.int64))[self.first : self.stop]


def _holds_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_large_list(kind) and pa.types.is_integer(kind.value_type)


def lengths(rows: Sequence) -> np.ndarray:
    """(rows,) The number of items in each row of a column or list."""
    return rows.lengths() if isinstance(rows, Column) else np.fromiter(map(len, rows), np.int64, count=len(rows))


def values(rows: Sequence, name: str) -> Sequence:
    """The attribute `name` of each row; of rows that have a method `column`, only this column is read."""
    return rows.column(name) if hasattr(rows, "column") else [getattr(row, name) for row in rows]


class Texts:
    """Texts that `make()` gives anew for each iteration, so that they need not be held in memory."""

    def __init__(self, make: Callable[[], Iterator[str]]):
        self.make = make

    def __iter__(self) -> Iterator[str]:
        return self.make()


@contextmanager
def table_writer(path: Path, schema: pa.Schema) -> Iterator[Callable[[dict], None]]:
    """Writes an Arrow file; the context's value adds a row. At most `ROWS` rows are held in memory."""
    waiting: list[dict] = []
    with pa.ipc.new_file(str(path), schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_batch(pa.RecordBatch.from_pylist(waiting, schema=schema))
                waiting.clear()

        def add(row: dict) -> None:
            waiting.append(row)
            if len(waiting) == ROWS:
                flush()

        yield add
        flush()


def write_table(path: Path, schema: pa.Schema, rows: Iterable[dict]) -> None:
    with table_writer(path, schema) as add:
        for row in rows:
            add(row)


# ---- the cache


@functools.cache
def code_key(*others: str) -> str:
    """A checksum of the code in utils/, because what is kept depends on it too, and of other files of code."""
    files = [*sorted(Path(__file__).parent.rglob("*.py")), *map(Path, others)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _private_folder() -> tempfile.TemporaryDirectory:
    """Of this process, for what cannot be kept."""
    return tempfile.TemporaryDirectory(prefix="multistep-retrieve-summarize-")


def remove_private_folder() -> None:
    """Call it before a process ends without Python's own cleaning up."""
    if _private_folder.cache_info().currsize:
        _private_folder().cleanup()
        _private_folder.cache_clear()


def cached(name: str, key: list | None, write: Callable[[Path], None]) -> Path:
    """The folder of the cache for this `name` and `key`. If it is not there or damaged, `write(folder)` fills it.

    `key` holds all that decides the content, beside the code in utils/; None is of use to this process only, which
    writes to a temporary folder. One process writes while others that want the
    same folder wait; a folder that was not written to its end is never used. If the default cache folder cannot be
    written to, a temporary folder of this process takes its place, with a warning; if the one of `--cache_dir` cannot,
    DataError is raised.
    """

    def fill(temporary: Path) -> None:
        temporary.mkdir()
        write(temporary)
        # a kill leaves no folder of this name, but disks do damage files
        write_json(temporary / INFO, {file.name: size_and_digest(file) for file in sorted(temporary.iterdir())})

    if key is None:
        path = Path(tempfile.mkdtemp(dir=_private_folder().name)) / name
        write_whole(path, fill)
        return path
    path = cache_folder() / f"{name}_{digest([code_key(), *key])}"
    if _is_whole(path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_suffix(".lock"))
        lock.acquire()
    except OSError as error:
        if is_disk_full(error):
            raise
        return _keep_privately(path, error, fill)
    with lock, for_all():
        if not _is_whole(path):
            write_whole(path, fill)
    return path


def find_cached(name: str, key: list) -> Path | None:
    """The folder that `cached` filled for this `name` and `key`, if it is there and whole."""
    path = cache_folder() / f"{name}_{digest([code_key(), *key])}"
    return path if _is_whole(path) else None


def _keep_privately(path: Path, error: OSError, fill: Callable[[Path], None]) -> Path:
    folder, reason = path.parent, error.strerror or error
    if is_cache_chosen():
        raise DataError(f"--cache_dir {folder}: cannot be written to: {reason}; name another folder") from None
    if not _private_folder.cache_info().currsize:
        logger.warning("%s cannot be written to (%s): what is made of the data is kept for this run only; "
                       "name another folder with --cache_dir", folder, reason)  # fmt: skip
    private = Path(_private_folder().name) / path.name
    if not private.exists():
        write_whole(private, fill)
    return private


def _is_whole(path: Path) -> bool:
    try:
        info = json.loads((path / INFO).read_text(encoding="utf-8"))
        return all(size_and_digest(path / name) == state for name, state in info.items())
    except (OSError, ValueError, AttributeError):
        return False
