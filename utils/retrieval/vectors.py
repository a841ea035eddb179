"""The vectors of a corpus's passages: encoded once, into files of several thousand vectors each (shards)."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.files import TEMPORARY, write_json, write_whole
from utils.processes import from_main, wait_for_all
from utils.progress import Phase

INDEXES = ("ivf", "hnsw")  # approximate indexes, whose files lie beside the shards


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors of a corpus's passages, as float32 files on disk."""

    folder: Path
    key: str  # identifies the corpus and the encoder
    count: int
    dimension: int
    shard_size: int  # vectors per file

    def shards(self, process: int = 0, processes: int = 1) -> Iterator[tuple[int, np.ndarray]]:
        """Gives the number of each shard's first passage, and its vectors (passages, dimension), mapped into memory.

        With several `processes`, these share the shards.
        """
        for first in range(process * self.shard_size, self.count, processes * self.shard_size):
            # "c" (copy on write) because torch warns about read-only arrays; nothing writes to them
            yield first, np.lib.format.open_memmap(_shard_file(self.folder, first // self.shard_size), mode="c")

    def rows(self, passages: np.ndarray) -> np.ndarray:
        """(passages, dimension) The vectors of some passages, whose numbers are sorted."""
        found = [np.empty((0, self.dimension), dtype=np.float32)]
        for first, shard in self.shards():
            start, stop = np.searchsorted(passages, [first, first + len(shard)])
            found.append(shard[passages[start:stop] - first])
        return np.concatenate(found)


def encode_corpus(
    passages: Sequence[str],
    encode: Callable[[list[str]], np.ndarray],
    folder: str | os.PathLike,
    *,
    key: str,
    accelerator,
    shard_size: int = 2**14,
) -> Vectors:
    """Encodes a corpus into files in `folder`, one shard of `shard_size` passages in memory at a time.

    Call it on all processes; `encode(texts)` runs on all and returns (texts, dimension) on all. Only the main process
    writes. Shards with the same `key` (such as a checksum of encoder and corpus) are kept, so a killed run resumes.
    Damaged shards are encoded again. Shards of another key, corpus size or shard size are deleted first.
    """
    folder = Path(folder)
    wanted = {"key": key, "count": len(passages), "shard_size": shard_size}
    dimension, missing = from_main(accelerator, lambda: _open_shards(folder, wanted))
    starts = [shard * shard_size for shard in missing]
    with Phase("encoded", "passages", sum(min(shard_size, len(passages) - start) for start in starts)):
        for shard, start in zip(missing, starts, strict=True):
            texts = list(passages[start : start + shard_size])
            vectors = np.ascontiguousarray(encode(texts), dtype=np.float32)
            if vectors.shape != (len(texts), dimension or vectors.shape[-1]):
                raise ValueError(f"encode gave {vectors.shape} for {len(texts)} texts, dimension {dimension or 'any'}")
            if accelerator.is_main_process:
                if dimension is None:  # only the first encoded shard tells the dimension
                    write_json(folder / "manifest.json", wanted | {"dimension": vectors.shape[1]})
                write_whole(_shard_file(folder, shard), lambda path, vectors=vectors: np.save(path, vectors))
            dimension = vectors.shape[1]
    wait_for_all()  # no process may read the files before the main one has written them
    return Vectors(folder, key, len(passages), dimension, shard_size)


def find_vectors(folder: str | os.PathLike, *, key: str, count: int, shard_size: int = 2**14) -> Vectors | None:
    """The vectors that `encode_corpus` has written to a folder, if all `count` of this `key` are there."""
    folder = Path(folder)
    wanted = {"key": key, "count": count, "shard_size": shard_size}
    manifest, dimension = _read_manifest(folder)
    is_there = manifest == wanted and not _missing(folder, wanted, dimension)
    return Vectors(folder, key, count, dimension, shard_size) if is_there else None


def _read_manifest(folder: Path) -> tuple[dict, int | None]:
    """What the vectors in a folder are, and their dimension; {} and None if that is not known."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        return manifest, manifest.pop("dimension")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}, None


def _missing(folder: Path, wanted: dict, dimension: int | None) -> list[int]:
    """The numbers of the shards that are not there whole."""
    size, missing = wanted["shard_size"], []
    for first in range(0, wanted["count"], size):
        if not _is_whole(_shard_file(folder, first // size), (min(size, wanted["count"] - first), dimension)):
            missing.append(first // size)
    return missing


def _open_shards(folder: Path, wanted: dict) -> list:
    """Prepares the folder. Returns the dimension (None if it is not known yet) and the numbers of missing shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{TEMPORARY}*"):  # left by a killed run
        path.unlink()
    manifest, dimension = _read_manifest(folder)
    if manifest != wanted:
        dimension = None
        # the manifest first: without it, no file in this folder counts
        indexes = [folder / f"{kind}.{ending}" for kind in INDEXES for ending in ("json", "faiss")]
        for path in [folder / "manifest.json", *indexes, *folder.glob("[0-9]" * 8 + ".npy")]:
            path.unlink(missing_ok=True)
    return [dimension, _missing(folder, wanted, dimension)]


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:08d}.npy"


def _is_whole(path: Path, shape: tuple[int, int | None]) -> bool:
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return False
    size = vectors.offset + vectors.nbytes
    return (vectors.shape, vectors.dtype, path.stat().st_size) == (shape, np.float32, size)
