"""Files and folders that are written completely or not at all, checksums, and the cache folder."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

TEMPORARY = ".tmp_"  # begins the name of what is being written or removed


def write_whole(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Calls `write(temporary)`, which makes a file or a folder there, and renames it to `path`.

    The bytes are on the disk before the name changes: after a crash `path` is the old content or the new one, whole. If
    `write` raises, `path` stays as it is. A folder that is replaced is absent for a moment.
    """
    path = Path(path)
    temporary = path.with_name(TEMPORARY + path.name)
    remove(temporary)  # left by a run that was killed
    try:
        write(temporary)
        for part in (*temporary.rglob("*"), temporary):
            sync(part)
        if path.is_dir():  # only an empty folder can be replaced
            remove(path.rename(path.with_name(f"{TEMPORARY}replaced_{path.name}")))
        os.replace(temporary, path)
    finally:
        remove(temporary)


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Writes lines as UTF-8, completely or not at all."""

    def write(temporary: Path) -> None:
        # an unpaired surrogate cannot be encoded as UTF-8; backslashreplace makes it its JSON escape
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)

    write_whole(path, write)


def write_jsonl(path: str | os.PathLike, records: Iterable[dict]) -> None:
    """Writes JSON Lines, completely or not at all."""
    write_lines(path, (json.dumps(record, ensure_ascii=False, default=str) for record in records))


def write_json(path: str | os.PathLike, content) -> None:
    """Writes an indented JSON file, completely or not at all."""
    write_lines(path, [json.dumps(content, indent=2)])


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that there is no room to write, also one of a library that has its own kind of error."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    texts = [f"(os error {number})" for number in numbers] + [os.strerror(number) for number in numbers]
    while error is not None:
        if getattr(error, "errno", None) in numbers or any(text in str(error) for text in texts):
            return True
        error = error.__cause__ or error.__context__
    return False


def remove(path: Path) -> None:
    """Removes a file or folder, if it is there. A folder is renamed first, so that no part of it keeps its name."""
    if path.is_dir() and not path.is_symlink():
        temporary = path if path.name.startswith(TEMPORARY) else path.with_name(TEMPORARY + path.name)
        os.rename(path, temporary)
        shutil.rmtree(temporary)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_and_digest(path: Path) -> dict:
    """{"size": bytes, "sha256": hexadecimal digest} of a file."""
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digest(rows: Iterable) -> str:
    """A checksum (16 hexadecimal digits) of values that JSON can hold, such as nested lists of numbers."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row).encode())
    return total.hexdigest()[:16]


_chosen_cache: Path | None = None


def choose_cache_folder(folder: str | os.PathLike | None) -> None:
    """Sets the cache folder of this process; None: the default."""
    global _chosen_cache
    _chosen_cache = Path(folder) if folder else None


def is_cache_chosen() -> bool:
    return _chosen_cache is not None


def cache_folder() -> Path:
    """The folder for what is computed from a user's data and used by later runs; it may be deleted at any time."""
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    return _chosen_cache or Path(home) / "multistep-retrieve-summarize"
