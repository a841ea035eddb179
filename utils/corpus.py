"""Searching a corpus of millions of passages: BM25, and dense vectors by exact or approximate search.

    index = bm25_index(corpus)                                             # built once, then mapped into memory
    rankings = bm25_search(index, queries, top_k)
    vectors = encode_corpus(corpus.passages, encode, folder, key=key, accelerator=accelerator)
    rankings = dense_search(query_vectors, vectors, top_k)                 # or index="ivf", "hnsw"

The two are fused by `reciprocal_rank_fusion` of `utils/search.py`. Rankings are as there: `(passage number, score)`,
best first, and of equal scores the lower number first. Memory holds a part of the corpus at a time; the rest are files
mapped into memory, which the system may drop and read again.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import bm25s
import faiss
import numpy as np
import scipy.sparse
import Stemmer
import torch
from accelerate.utils import broadcast_object_list
from filelock import FileLock

from utils.data import Corpus, Example, blocks, cache_folder
from utils.search import BM25_SETTINGS, Ranking, reciprocal_rank_fusion, search_words

TEMPORARY = ".part_"  # begins the name of what is being written
BM25_BLOCK = 2**13  # passages tokenized at once


# ----------------------------------------------------------------------------------------------------------------------
# BM25


def bm25_index(corpus: Corpus, folder: str | os.PathLike | None = None, *, stopwords: str = "en") -> bm25s.BM25:
    """The BM25 index of a corpus, with the words and settings of `bm25_scores`, mapped into memory.

    It is built once, under a checksum of passages and settings in `folder` (default: `cache_folder()`), whole or not at
    all; of several processes the first builds it and the others wait. One that is damaged is made anew. Building takes
    some 20 bytes of memory for each word of the corpus, stopwords left out.
    """
    settings = [corpus.id, stopwords, BM25_SETTINGS, bm25s.__version__]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    path = Path(folder or cache_folder()) / f"bm25_{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        index = _load_bm25(path, len(corpus.passages))
        if index is None:
            _write_folder(path, _build_bm25(corpus.passages, stopwords).save)
            index = _load_bm25(path, len(corpus.passages))
    return index


def _build_bm25(passages: Sequence[str], stopwords: str) -> bm25s.BM25:
    """What `bm25s.BM25.index` makes, without lists of all words in Python: words are counted as sparse matrices."""
    # the words of `search_words`, each stemmed once
    tokenizer = bm25s.tokenization.Tokenizer(stopwords=stopwords, stemmer=Stemmer.Stemmer("english"))
    words, lengths = [], []
    for block in blocks(passages, BM25_BLOCK):
        ids = list(tokenizer.streaming_tokenize(block, allow_empty=False))
        lengths.append(np.fromiter(map(len, ids), np.int64, count=len(ids)))
        words.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(lengths[-1].sum())))
    vocabulary = tokenizer.stem_to_sid
    del tokenizer
    starts = np.concatenate([[0], *lengths]).cumsum()
    lengths = np.diff(starts)
    if starts[-1] < 2**31:
        starts = starts.astype(np.int32)  # or scipy makes all numbers as wide as these
    words = np.concatenate(words)

    counts = scipy.sparse.csr_array(
        (np.ones(len(words), dtype=np.float32), words, starts), shape=(len(passages), len(vocabulary))
    )
    del words
    counts.sum_duplicates()
    counts = counts.tocsc()  # a column holds the passages that have the word, in order, and how often they do
    containing = np.diff(counts.indptr)
    idf = np.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5)).astype(np.float32)
    idf = np.repeat(idf, containing)
    k1, b = BM25_SETTINGS["k1"], BM25_SETTINGS["b"]
    damping = k1 * ((1 - b) + b * lengths / max(lengths.mean(), 1))  # of each passage
    for start in range(0, counts.nnz, 2**22):  # in place, a part at a time
        part = slice(start, start + 2**22)
        frequency = counts.data[part]
        counts.data[part] = idf[part] * (frequency / (damping[counts.indices[part]] + frequency))

    index = bm25s.BM25(**BM25_SETTINGS)
    index.scores = {
        "data": counts.data,
        "indices": counts.indices,
        "indptr": counts.indptr,
        "num_docs": len(passages),
    }
    index.vocab_dict, index.nonoccurrence_array = vocabulary, None
    return index


def _load_bm25(path: Path, passages: int) -> bm25s.BM25 | None:
    """None if there is no index, or one that is not whole."""
    try:
        index = bm25s.BM25.load(path, mmap=True, show_progress=False)
        ends = index.scores["indptr"]
        sizes = {len(index.scores["data"]), len(index.scores["indices"]), int(ends[-1])}
        whole = index.scores["num_docs"] == passages and len(sizes) == 1 and len(ends) == len(index.vocab_dict) + 1
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return index if whole else None


def bm25_search(index: bm25s.BM25, queries: Sequence[str], top_k: int, *, stopwords: str = "en") -> list[Ranking]:
    """The `top_k` best passages for each query, of those that share a word with it; maybe none.

    `stopwords` are those of the index.
    """
    rankings = []
    for words in search_words(queries, stopwords):
        known = index.get_tokens_ids(words)
        scores = index.get_scores_from_ids(known) if known else np.zeros(0, dtype=np.float32)
        passages = np.flatnonzero(scores)
        scores = scores[passages]
        if len(passages) > top_k:
            # more than top_k where several are as good as the last: the first of them in the corpus are taken
            good = scores >= np.partition(scores, -top_k)[-top_k]
            passages, scores = passages[good], scores[good]
        best_first = np.argsort(-scores, kind="stable")[:top_k]
        rankings.append(list(zip(passages[best_first].tolist(), scores[best_first].tolist(), strict=True)))
    return rankings


class CorpusSearch:
    """Ranks the passages of one corpus for examples: the functions of `utils/search.py` that do so for documents.

    Args:
        folder: of the passages' vectors, which are encoded anew when `weights_key()`, the encoder's checksum, changes.
        index: "flat", "ivf" or "hnsw"; of the latter two the log says how much they miss.
    """

    def __init__(self, corpus: Corpus, *, folder: Path, weights_key: Callable[[], str], index: str, accelerator, log):
        self.corpus, self.folder, self.weights_key, self.index = corpus, folder, weights_key, index
        self.accelerator, self.log, self.checked = accelerator, log, ""
        self.lexical = bm25_index(corpus)

    def bm25_rankings(
        self, examples: Sequence[Example], top_k: int, queries: Sequence[str] | None = None
    ) -> list[Ranking]:
        return bm25_search(self.lexical, queries or [example.query for example in examples], top_k)

    def dense_rankings(
        self, examples: Sequence[Example], encode, top_k: int, queries: Sequence[str] | None = None
    ) -> list[Ranking]:
        """Called on all processes, as `encode(texts, kind)` is; the result is on all of them."""
        key = f"{self.corpus.id} {self.weights_key()} {self.accelerator.mixed_precision}"
        vectors = encode_corpus(self.corpus.passages, lambda texts: encode(texts, "passage"), self.folder,
                                key=key, accelerator=self.accelerator)  # fmt: skip
        query_vectors = encode(queries or [example.query for example in examples], "query")
        found = [None]
        if self.accelerator.is_main_process:
            found = [dense_search(query_vectors, vectors, top_k, index=self.index)]
            if self.index != "flat" and self.checked != key:
                self.checked = key
                lost = recall_lost(query_vectors, vectors, top_k, index=self.index)
                self.log.say(f"--index {self.index} misses {lost:.1f}% of the {top_k} passages that exact search finds")
        return broadcast_object_list(found)[0]

    def retriever_rankings(self, examples: Sequence[Example], encode, settings: dict, queries=None) -> list[Ranking]:
        """The `top_k` of `settings` passages; with ranking "hybrid", fused with BM25's by reciprocal rank."""
        top_k = settings["top_k"]
        dense = self.dense_rankings(examples, encode, top_k, queries)
        if settings["ranking"] == "dense":
            return dense
        both = zip(dense, self.bm25_rankings(examples, top_k, queries), strict=True)
        return [reciprocal_rank_fusion(pair)[:top_k] for pair in both]


# ----------------------------------------------------------------------------------------------------------------------
# vectors of all passages, in files of some thousands each


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
                _write_json(folder / "manifest.json", wanted | {"dimension": vectors.shape[1]})
            _write_file(_shard_file(folder, shard), lambda path, vectors=vectors: np.save(path, vectors))
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


# ----------------------------------------------------------------------------------------------------------------------
# dense search


INDEXES = ("ivf", "hnsw")  # approximate ones
QUERIES = 64  # multiplied with a shard at once
HNSW_NEIGHBOURS = 32
TRAINING_VECTORS = (39, 64)  # for each list of an inverted file: at least (as faiss wants), and at most


def dense_search(
    query_vectors: np.ndarray,
    vectors: Vectors,
    top_k: int,
    *,
    index: str = "flat",
    nprobe: int = 64,
    ef_search: int = 128,
) -> list[Ranking]:
    """The `top_k` passages of the greatest dot product with each of the (queries, dimension) vectors.

    `index`: "flat" is exact. "ivf" compares those in the `nprobe` nearest of about 4 * sqrt(passages) clusters, "hnsw"
    follows a graph of neighbours with `ef_search` candidates (Malkov and Yashunin, arXiv:1603.09320): faster, and they
    miss some (see `recall_lost`). Both are built by faiss at the first search, in memory of the size of the vectors
    and more, and kept beside them.
    """
    queries = np.ascontiguousarray(query_vectors, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != vectors.dimension:
        raise ValueError(f"query vectors of shape {queries.shape}, but those of the passages have {vectors.dimension}")
    if index not in ("flat", *INDEXES):
        raise ValueError(f"index is '{index}'; choose flat, {' or '.join(INDEXES)}")
    if not len(queries):
        return []
    top_k = min(top_k, vectors.count)
    if index == "flat":
        scores, passages = _search_flat(queries, vectors, top_k)
    else:
        approximate = _approximate_index(vectors, index)
        if index == "ivf":
            approximate.nprobe = nprobe
        else:
            approximate.hnsw.efSearch = max(ef_search, top_k)
        scores, passages = approximate.search(queries, top_k)
        _settle_ties(scores, passages)
    return [
        [(passage, score) for passage, score in zip(*row, strict=True) if passage >= 0]  # -1: none was found
        for row in zip(passages.tolist(), scores.tolist(), strict=True)
    ]


def _search_flat(queries: np.ndarray, vectors: Vectors, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores and passage numbers, both (queries, top_k), best first and then in order of the corpus."""
    best_scores = np.empty((len(queries), 0), dtype=np.float32)
    best_passages = np.empty((len(queries), 0), dtype=np.int64)
    for first, shard in vectors.shards():
        parts = [
            _search_shard(some, torch.from_numpy(shard), top_k) for some in torch.from_numpy(queries).split(QUERIES)
        ]
        scores, passages = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        # those before come first, so that a stable sort leaves equal scores in order
        best_scores = np.concatenate([best_scores, scores], axis=1)
        best_passages = np.concatenate([best_passages, passages + first], axis=1)
        order = np.argsort(-best_scores, axis=1, kind="stable")[:, :top_k]
        best_scores = np.take_along_axis(best_scores, order, axis=1)
        best_passages = np.take_along_axis(best_passages, order, axis=1)
    return best_scores, best_passages


def _search_shard(queries: torch.Tensor, shard: torch.Tensor, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    products = queries @ shard.T
    count = min(top_k, len(shard))
    scores, passages = (tensor.numpy() for tensor in products.topk(min(count + 1, len(shard)), dim=1))
    _settle_ties(scores, passages)
    # of several that are as good as the last `topk` keeps any: the first in the corpus are taken in their place
    for row in np.flatnonzero(scores[:, count - 1] == scores[:, -1]) if count < len(shard) else ():
        best_first = torch.sort(products[row], descending=True, stable=True)
        scores[row, :count], passages[row, :count] = best_first.values[:count], best_first.indices[:count]
    return scores[:, :count], passages[:, :count]


def _settle_ties(scores: np.ndarray, passages: np.ndarray) -> None:
    """Puts passages of equal scores, in rows that are sorted by score, in order of the corpus."""
    rows = np.flatnonzero((scores[:, 1:] == scores[:, :-1]).any(axis=1))
    order = np.lexsort((passages[rows], -scores[rows]))
    passages[rows] = np.take_along_axis(passages[rows], order, axis=1)  # scores stay as they are


def recall_lost(
    query_vectors: np.ndarray, vectors: Vectors, top_k: int, *, index: str, max_queries: int = 200, **settings
) -> float:
    """Percent of the exact `top_k` that an approximate index misses, over up to `max_queries` queries.

    `settings` are those of `dense_search`.
    """
    sample = np.linspace(0, len(query_vectors) - 1, min(max_queries, len(query_vectors))).astype(int)
    queries = np.asarray(query_vectors)[sample]
    exact = dense_search(queries, vectors, top_k)
    found = dense_search(queries, vectors, top_k, index=index, **settings)
    missed = [
        len(dict(right).keys() - dict(ours).keys()) / len(right) for right, ours in zip(exact, found, strict=True)
    ]
    return 100 * sum(missed) / max(len(missed), 1)


def _approximate_index(vectors: Vectors, kind: str) -> faiss.Index:
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
            _write_file(file, lambda path: faiss.write_index(built, str(path)))
            del built
            _write_json(record, made_of | {"bytes": file.stat().st_size})
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


# ----------------------------------------------------------------------------------------------------------------------
# writing, each file and folder whole or not at all


def _write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(path)` with a temporary sibling, which then takes the file's place."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path, content: dict) -> None:
    _write_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8"))


def _write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(folder)` with a temporary sibling, which then takes the folder's place."""
    temporary = path.with_name(TEMPORARY + path.name)
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed
    temporary.mkdir()
    try:
        write(temporary)
        for file in temporary.iterdir():
            _sync(file)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file's bytes are on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
