"""Approximate indexes of a corpus's vectors: built once by faiss and mapped into memory."""

import json
from dataclasses import asdict

import faiss
import numpy as np
from filelock import FileLock

from utils.files import write_json, write_whole
from utils.progress import progress
from utils.retrieval.vectors import Vectors

HNSW_NEIGHBOURS = 32
TRAINING_VECTORS = (39, 64)  # per cluster of "ivf": the least that faiss wants, and the most that are used


def approximate_index(vectors: Vectors, kind: str) -> faiss.Index:
    """Returns the "ivf" or "hnsw" index from the vectors' folder, mapped into memory. Builds it if it is missing."""
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
            write_whole(file, lambda path: faiss.write_index(_build(vectors, kind), str(path)))
            write_json(record, made_of | {"bytes": file.stat().st_size})
    # faiss maps each kind with a flag of its own
    return faiss.read_index(str(file), faiss.IO_FLAG_MMAP if kind == "ivf" else faiss.IO_FLAG_MMAP_IFC)


def _build(vectors: Vectors, kind: str) -> faiss.Index:
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(vectors.dimension, HNSW_NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)
    else:
        at_least, at_most = TRAINING_VECTORS
        clusters = max(1, min(round(4 * vectors.count**0.5), vectors.count // at_least))
        centres = faiss.IndexFlatIP(vectors.dimension)
        index = faiss.IndexIVFFlat(centres, vectors.dimension, clusters, faiss.METRIC_INNER_PRODUCT)
        count = min(vectors.count, at_most * clusters)
        chosen = np.sort(np.random.default_rng(0).choice(vectors.count, count, replace=False))
        index.train(vectors.rows(chosen))
    for _, shard in progress(vectors.shards(), "indexed", "passages", total=vectors.count, size=lambda s: len(s[1])):
        index.add(shard)
    return index
