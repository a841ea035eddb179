"""The vectors of a corpus's passages, encoded once into files of some thousands each."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate.utils import broadcast_object_list

from utils.files import TEMPORARY, write_json, write_whole

INDEXES = ("ivf", "hnsw")  # approximate ones


@dataclass(frozen=True, slots=True)
class Vectors:
    """The vectors of a corpus's passages on the disk: `count` of `dimension` float32, `shard_size` in a file."""

    folder: Path
    key: str  # what they were made of and by
    count: int
    dimension: int
    shard_size: int

    def shards(self) -> Iterator[tuple[int, np.ndarray]]:
        """The number of each shard's first passage, and its vectors (passages, dimension), mapped into memory."""
        for first in range(0, self.count, self.shard_size):
            # "c": what is written stays in memory; nothing is, but torch warns of arrays that cannot be written to
            yield first, np.lib.format.open_memmap(_shard_file(self.folder, first // self.shard_size), mode="c")


def encode_corpus(
    passages: Sequence[str],
    encode: Callable[[list[str]], np.ndarray],
    folder: str | os.PathLike,
    *,
    key: str,
    accelerator,
    shard_size: int = 2**14,
    poll: Callable[[], None] | None = None,
) -> Vectors:
    """Encodes a corpus into files in `folder`, a shard of `shard_size` passages in memory at a time.

    Called on all processes; `encode(texts)` likewise, and returns (texts, dimension) on all of them. The main process
    writes, each file whole or not at all. Shards that are in the folder under the same `key` (the encoder's and
    corpus's checksum, say) are kept, so that a run that was killed goes on where it was; damaged ones are made anew,
    and those of another key, corpus size or shard size removed first. `poll()` is called before each shard and may
    raise.
    """
    folder = Path(folder)
    wanted = {"key": key, "count": len(passages), "shard_size": shard_size}
    todo: list = [None, None]  # the dimension, where it is known, and the numbers of shards to encode
    if accelerator.is_main_process:
        todo = _open_shards(folder, wanted)
    dimension, missing = broadcast_object_list(todo)
    for shard in missing:
        if poll:
            poll()
        texts = list(passages[shard * shard_size : (shard + 1) * shard_size])
        vectors = np.ascontiguousarray(encode(texts), dtype=np.float32)
        if vectors.shape != (len(texts), dimension or vectors.shape[-1]):
            raise ValueError(f"encode gave {vectors.shape} for {len(texts)} texts, dimension {dimension or 'any'}")
        if accelerator.is_main_process:
            if dimension is None:  # the first of all: only now is it known
                write_json(folder / "manifest.json", wanted | {"dimension": vectors.shape[1]})
            write_whole(_shard_file(folder, shard), lambda path, vectors=vectors: np.save(path, vectors))
        dimension = vectors.shape[1]
    accelerator.wait_for_everyone()  # the files are there when any process returns
    return Vectors(folder, key, len(passages), dimension, shard_size)


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"{shard:08d}.npy"


def _open_shards(folder: Path, wanted: dict) -> list:
    """Makes the folder ready, on the main process; the dimension if it is known, and the shards that are missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{TEMPORARY}*"):  # of a run that was killed
        path.unlink()
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        dimension = manifest.pop("dimension")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        manifest, dimension = {}, None
    if manifest != wanted:
        dimension = None
        # the manifest first: without it no file of this folder counts
        indexes = [folder / f"{kind}.{ending}" for kind in INDEXES for ending in ("json", "faiss")]
        for path in [folder / "manifest.json", *indexes, *folder.glob("[0-9]" * 8 + ".npy")]:
            path.unlink(missing_ok=True)
    size, missing = wanted["shard_size"], []
    for first in range(0, wanted["count"], size):
        if not _is_whole(_shard_file(folder, first // size), (min(size, wanted["count"] - first), dimension)):
            missing.append(first // size)
    return [dimension, missing]


def _is_whole(path: Path, shape: tuple[int, int | None]) -> bool:
    try:
        vectors = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError):
        return False
    size = vectors.offset + vectors.nbytes
    return (vectors.shape, vectors.dtype, path.stat().st_size) == (shape, np.float32, size)
