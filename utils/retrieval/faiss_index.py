"""Approximate search of a corpus's vectors: faiss indexes, built once and mapped into memory."""

import json
from dataclasses import asdict

import faiss
import numpy as np
from filelock import FileLock

from utils.files import write_json, write_whole
from utils.retrieval.vectors import Vectors

HNSW_NEIGHBOURS = 32
TRAINING_VECTORS = (39, 64)  # for each list of an inverted file: at least (as faiss wants), and at most


def approximate_index(vectors: Vectors, kind: str) -> faiss.Index:
    """A faiss index of the vectors from the file beside them, mapped into memory; built if it is not there."""
    file, record = vectors.folder / f"{kind}.faiss", vectors.folder / f"{kind}.json"
    made_of = {name: value for name, value in asdict(vectors).items() if name != "folder"}
    made_of |= {"faiss": faiss.__version__, "neighbours": HNSW_NEIGHBOURS, "training": list(TRAINING_VECTORS)}
    with FileLock(vectors.folder / f"{kind}.lock"):
        try:
            is_there = json.loads(record.read_text(encoding="utf-8")) == made_of | {"bytes": file.stat().st_size}
        except (OSError, ValueError):
            is_there = False
        if not is_there:
            record.unlink(missing_ok=True)
            built = _build_ivf(vectors) if kind == "ivf" else _build_hnsw(vectors)
            write_whole(file, lambda path: faiss.write_index(built, str(path)))
            del built
            write_json(record, made_of | {"bytes": file.stat().st_size})
    # two ways of mapping, each of which faiss has for one of them
    return faiss.read_index(str(file), faiss.IO_FLAG_MMAP if kind == "ivf" else faiss.IO_FLAG_MMAP_IFC)


def _build_ivf(vectors: Vectors) -> faiss.Index:
    at_least, at_most = TRAINING_VECTORS
    lists = max(1, min(round(4 * vectors.count**0.5), vectors.count // at_least))
    index = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(vectors.dimension), vectors.dimension, lists, faiss.METRIC_INNER_PRODUCT
    )
    count = min(vectors.count, at_most * lists)
    chosen = np.sort(np.random.default_rng(0).choice(vectors.count, count, replace=False))
    parts = []
    for first, shard in vectors.shards():
        parts.append(shard[chosen[(chosen >= first) & (chosen < first + len(shard))] - first])
    index.train(np.concatenate(parts))
    del parts
    for _, shard in vectors.shards():
        index.add(shard)
    return index


def _build_hnsw(vectors: Vectors) -> faiss.Index:
    index = faiss.IndexHNSWFlat(vectors.dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    for _, shard in vectors.shards():
        index.add(shard)
    return index
