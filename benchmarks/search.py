"""Searching a corpus: build time and queries per second of ours against the libraries used directly.

    python benchmarks/search.py                                  # 10,000, 100,000 and 1,000,000 passages
    python benchmarks/search.py --sizes 10000 --repeats 9
    python benchmarks/search.py --memory                         # peak memory with 2,000,000 passages, in parts

Passages are words drawn by Zipf's law from 200,000 (100 words each, 50 at 1,000,000), queries 6 words of a passage;
vectors are random, of unit length and dimension 384. Both sides do the same job: from texts to an index on the disk,
mapped into memory again; from query texts, or vectors, to lists of the 100 best passages and their scores. They take
turns, and each ratio is of neighbours: its median, and least and greatest, over the repeats.

    BM25      `bm25_index`, `bm25_search`           bm25s: tokenize, BM25.index, save, load; tokenize, retrieve
    vectors   `encode_corpus`, `dense_search`       faiss: IndexFlatIP.add, write_index, read_index; search
                                                    torch: matmul and topk, 64 queries at a time, all vectors in memory

`--memory` runs `load_corpus`, `bm25_index`, `encode_corpus` (with random vectors in place of an encoder's) and
`dense_search` one after the other and prints the peak of resident memory during each, pages of mapped files included,
which the system may drop, and what is held without them at its end.

Results

2026-11-26, AMD EPYC (Zen 5), 2 cores, torch 2.13.0+cpu; 1,000,000 with --repeats 3 --build_repeats 1

   10,000 BM25, build    ours                    1.21 s
   10,000 BM25, build    bm25s                   1.54 s          ours is 1.23 times as fast (1.09 to 1.43)
   10,000 BM25, search   ours                  7225.1 queries/s
   10,000 BM25, search   bm25s                 6685.1 queries/s  ours is 1.11 times as fast (1.03 to 1.28)
   10,000 vectors, build ours                    0.04 s
   10,000 vectors, build faiss                   0.03 s          ours is 0.87 times as fast (0.86 to 2.66)
   10,000 vectors, search ours                  8165.5 queries/s
   10,000 vectors, search faiss                 5917.4 queries/s  ours is 1.36 times as fast (1.29 to 1.83)
   10,000 vectors, search torch                 8721.4 queries/s  ours is 0.99 times as fast (0.80 to 1.24)
  100,000 BM25, build    ours                    7.83 s
  100,000 BM25, build    bm25s                  12.59 s          ours is 1.61 times as fast (1.37 to 1.76)
  100,000 BM25, search   ours                  1358.3 queries/s
  100,000 BM25, search   bm25s                  993.1 queries/s  ours is 1.36 times as fast (1.31 to 1.50)
  100,000 vectors, build ours                    0.40 s
  100,000 vectors, build faiss                   0.51 s          ours is 1.31 times as fast (1.27 to 1.59)
  100,000 vectors, search ours                  1124.2 queries/s
  100,000 vectors, search faiss                  359.2 queries/s  ours is 3.20 times as fast (3.02 to 3.47)
  100,000 vectors, search torch                 1148.0 queries/s  ours is 0.94 times as fast (0.83 to 1.04)
1,000,000 BM25, build    ours                   31.02 s
1,000,000 BM25, build    bm25s                  63.12 s          ours is 2.03 times as fast (2.03 to 2.03)
1,000,000 BM25, search   ours                   149.4 queries/s
1,000,000 BM25, search   bm25s                   88.7 queries/s  ours is 1.68 times as fast (1.63 to 1.68)
1,000,000 vectors, build ours                    1.08 s
1,000,000 vectors, build faiss                   5.19 s          ours is 4.79 times as fast (4.79 to 4.79)
1,000,000 vectors, search ours                   118.6 queries/s
1,000,000 vectors, search faiss                   28.8 queries/s  ours is 4.20 times as fast (3.70 to 4.34)
1,000,000 vectors, search torch                   97.0 queries/s  ours is 1.18 times as fast (1.06 to 1.42)

A sixth of the time for 10,000 vectors is the flush to disk, after which they survive a loss of power.

With --memory, 2,000,000 passages (2026-11-24, Zen 4):

  before         peak   0.38 GiB,   0.22 GiB held at the end without mapped files
  load_corpus    peak   0.65 GiB,   0.34 GiB held at the end without mapped files
  bm25_index     peak   5.44 GiB,   1.07 GiB held at the end without mapped files
  bm25_search    peak   3.82 GiB,   1.07 GiB held at the end without mapped files
  encode_corpus  peak   3.82 GiB,   1.07 GiB held at the end without mapped files
  dense_search   peak   3.86 GiB,   1.07 GiB held at the end without mapped files
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import bm25s
import faiss
import numpy as np
import Stemmer
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent.parent))
from hardware import hardware

from utils.data.corpus import load_corpus
from utils.data.examples import Corpus
from utils.retrieval.bm25 import BM25_SETTINGS, bm25_index, bm25_search
from utils.retrieval.exact_search import dense_search
from utils.retrieval.vectors import Vectors, encode_corpus

TOP_K, DIMENSION, SHARD = 100, 384, 2**14
VOCABULARY = 200_000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="passages")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5, help="searches of all queries by each side")
    parser.add_argument("--build_repeats", type=int, default=3, help="builds by each side")
    parser.add_argument("--memory", action="store_true", help="peak memory instead of speed")
    parser.add_argument("--passages", type=int, default=2_000_000, help="with --memory: passages, of 100 words")
    parser.add_argument("--folder", help="where files are written, 10 GB of them with --memory [a temporary folder]")
    args = parser.parse_args()

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    print(hardware(), flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        os.environ["HF_HOME"] = name
        if args.memory:
            measure_memory(Path(name), args.passages, args.queries)
            return
        for size in args.sizes:
            folder = Path(name, str(size))
            folder.mkdir()
            measure_bm25(folder, size, args)
            measure_vectors(folder, size, args)


# ----------------------------------------------------------------------------------------------------------------------
# what is searched


def texts(count: int, words: int, seed: int) -> Iterator[str]:
    """Texts whose words follow Zipf's law; the same for the same seed."""
    rng = np.random.default_rng(0)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    vocabulary = ["".join(parts) for parts in itertools.islice(itertools.product(syllables, repeat=3), VOCABULARY)]
    rng.shuffle(vocabulary)
    shares = np.cumsum(1 / (np.arange(VOCABULARY) + 2.7))
    rng = np.random.default_rng(seed)
    for start in range(0, count, 10_000):
        ranks = np.searchsorted(shares, rng.random(min(10_000, count - start) * words) * shares[-1])
        drawn = [vocabulary[rank] for rank in ranks.tolist()]
        for first in range(0, len(drawn), words):
            yield " ".join(drawn[first : first + words])


def write_corpus(folder: Path, count: int, words: int) -> Path:
    path = folder / "corpus.jsonl"
    with open(path, "w") as file:
        for number, text in enumerate(texts(count, words, seed=1)):
            file.write(json.dumps({"_id": f"d{number}", "title": "", "text": text}) + "\n")
    return path


def draw_queries(passages, count: int) -> list[str]:
    rng = np.random.default_rng(2)
    return [
        " ".join(rng.choice(passages[int(number)].split(), 6)) for number in rng.integers(len(passages), size=count)
    ]


def random_vectors(count: int, seed) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, DIMENSION), dtype=np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors


def as_rankings(passages: np.ndarray, scores: np.ndarray) -> list[list[tuple[int, float]]]:
    return [list(zip(*row, strict=True)) for row in zip(passages.tolist(), scores.tolist(), strict=True)]


# ----------------------------------------------------------------------------------------------------------------------
# speed


def take_turns(what: str, size: int, sides: dict, repeats: int, queries: int = 0) -> dict:
    """Times each side `repeats` times in turns and prints ratios to the first; returns what each gave at last."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    results = {}
    for repeat in range(repeats):
        names = list(sides)
        for name in names if repeat % 2 == 0 else names[::-1]:
            results.pop(name, None)  # so that two of a kind are never in memory
            began = time.perf_counter()
            results[name] = sides[name]()
            seconds[name].append(time.perf_counter() - began)
    ours = next(iter(sides))
    for name, spent in seconds.items():
        shown = statistics.median(spent)
        line = f"{size:>9,} {what:14} {name:18}"
        line += f"{queries / shown:10.1f} queries/s" if queries else f"{shown:10.2f} s        "
        if name != ours:
            ratios = [theirs / own for theirs, own in zip(spent, seconds[ours], strict=True)]
            line += f"  ours is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f})"
        print(line, flush=True)
    return {name: results[name] for name in sides}


def measure_bm25(folder: Path, size: int, args) -> None:
    corpus = load_corpus(write_corpus(folder, size, 100 if size < 1_000_000 else 50))
    passages = list(corpus.passages)
    queries = draw_queries(passages, args.queries)
    fresh = (folder / f"index{number}" for number in itertools.count())  # nothing is there to be found

    def tokenize(some: list[str], **options):
        stemmer = Stemmer.Stemmer("english")
        return bm25s.tokenize(some, stopwords="en", stemmer=stemmer, show_progress=False, **options)

    def build_directly() -> bm25s.BM25:
        path = next(fresh)
        index = bm25s.BM25(**BM25_SETTINGS)
        index.index(tokenize(passages), show_progress=False)
        index.save(path)
        del index
        return bm25s.BM25.load(path, mmap=True)

    def search_directly() -> list:
        found, scores = built["bm25s"].retrieve(tokenize(queries, return_ids=False), k=TOP_K, show_progress=False)
        return as_rankings(found, scores)

    built = take_turns("BM25, build", size, {"ours": lambda: bm25_index(corpus, next(fresh)), "bm25s": build_directly},
                       args.build_repeats)  # fmt: skip
    found = take_turns("BM25, search", size, {"ours": lambda: bm25_search(built["ours"], queries, TOP_K),
                                              "bm25s": search_directly}, args.repeats, len(queries))  # fmt: skip
    for ours, theirs in zip(*found.values(), strict=True):  # the same but for ties and scores of 0
        assert np.allclose([s for _, s in ours], [s for _, s in theirs][: len(ours)], rtol=1e-5)
        assert not any(score for _, score in theirs[len(ours) :])


def measure_vectors(folder: Path, size: int, args) -> None:
    vectors = np.concatenate([random_vectors(min(SHARD, size - at), at) for at in range(0, size, SHARD)])
    queries = random_vectors(args.queries, [1, 2])
    fresh = (folder / f"vectors{number}" for number in itertools.count())

    def build_ours() -> Vectors:
        starts = iter(range(0, size, SHARD))

        def encode(passages: list[str]) -> np.ndarray:
            at = next(starts)
            return vectors[at : at + len(passages)]

        return encode_corpus([""] * size, encode, next(fresh), key="", accelerator=Accelerator(),
                             shard_size=SHARD)  # fmt: skip

    def build_directly() -> faiss.Index:
        path = str(next(fresh))
        index = faiss.IndexFlatIP(DIMENSION)
        index.add(vectors)
        faiss.write_index(index, path)
        del index
        return faiss.read_index(path)

    def search_with_faiss() -> list:
        scores, passages = built["faiss"].search(queries, TOP_K)
        return as_rankings(passages, scores)

    def search_with_torch() -> list:
        matrix, rankings = torch.from_numpy(vectors), []
        for some in torch.from_numpy(queries).split(64):
            scores, passages = (some @ matrix.T).topk(TOP_K, dim=1)
            rankings += as_rankings(passages.numpy(), scores.numpy())
        return rankings

    built = take_turns("vectors, build", size, {"ours": build_ours, "faiss": build_directly}, args.build_repeats)
    found = take_turns("vectors, search", size, {"ours": lambda: dense_search(queries, built["ours"], TOP_K),
                                                 "faiss": search_with_faiss, "torch": search_with_torch},
                       args.repeats, len(queries))  # fmt: skip
    for ours, *others in zip(*found.values(), strict=True):
        for theirs in others:
            assert np.allclose([s for _, s in ours], [s for _, s in theirs], rtol=1e-4)


# ----------------------------------------------------------------------------------------------------------------------
# memory


def measure_memory(folder: Path, count: int, queries: int) -> None:
    path = write_corpus(folder, count, 100)
    report("before")
    corpus = load_corpus(path)
    report("load_corpus")
    index = bm25_index(corpus)
    report("bm25_index")
    bm25_search(index, draw_queries(corpus.passages, queries), TOP_K)
    report("bm25_search")
    vectors = encode_as_random(corpus, folder / "vectors")
    report("encode_corpus")
    dense_search(random_vectors(queries, [1, 2]), vectors, TOP_K)
    report("dense_search")


def encode_as_random(corpus: Corpus, folder: Path) -> Vectors:
    seeds = itertools.count()
    return encode_corpus(
        corpus.passages, lambda passages: random_vectors(len(passages), next(seeds)), folder, key="random",
        accelerator=Accelerator(), shard_size=SHARD,
    )  # fmt: skip


def report(part: str) -> None:
    """Prints the peak since the last report, and starts another."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak, held = (int(status[name].split()[0]) / 2**20 for name in ("VmHWM", "RssAnon"))
    print(f"{part:14} peak {peak:6.2f} GiB, {held:6.2f} GiB held at the end without mapped files", flush=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM


if __name__ == "__main__":
    main()
