"""Two hops over a large corpus: peak memory and seconds a query, by hop, of retrieve_and_summarize.py as users run it.

    python benchmarks/corpus_hops.py                             # 2,000,000 passages, 100 queries
    python benchmarks/corpus_hops.py --passages 20000            # tries it out

Passages are 30 words drawn by Zipf's law from 200,000, queries 6 words of a passage. The retriever is a small encoder
with random weights (128 numbers a vector) and BM25; drafts are extracts of what was read. The first run reads, indexes
and encodes the corpus; the second one finds all that in place, and shows what the searches alone need. Peak memory is
resident memory, pages of mapped files included, which the system may drop.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def write_data(folder: Path, passages: int, queries: int) -> None:
    from utils.models.encoder import build_small_encoder

    rng = np.random.default_rng(0)
    words = np.array([f"w{number}" for number in range(200_000)])
    shares = 1 / np.arange(1, len(words) + 1)
    shares /= shares.sum()
    asked = set(rng.choice(passages, queries, replace=False).tolist())
    with (folder / "corpus.jsonl").open("w") as corpus, (folder / "queries.jsonl").open("w") as questions:
        for first in range(0, passages, 10_000):
            block = words[rng.choice(len(words), (min(10_000, passages - first), 30), p=shares)]
            for number, row in enumerate(block, first):
                corpus.write(json.dumps({"_id": f"p{number}", "text": " ".join(row) + "."}) + "\n")
                if number in asked:
                    record = {"id": f"q{number}", "query": " ".join(row[:6]), "evidence": [f"p{number}"]}
                    questions.write(json.dumps(record) + "\n")
    build_small_encoder([" ".join(words[:3000])] * 2, layers=1).save_pretrained(str(folder / "retriever"))


def run(folder: Path, processes_memory: list[float]) -> float:
    """Seconds that the script took; adds the highest resident memory that was seen, in GiB."""
    flags = ["--corpus_file", folder / "corpus.jsonl", "--input_file", folder / "queries.jsonl", "--retriever",
             folder / "retriever", "--ranking", "hybrid", "--summarizer", "extract", "--num_hops", 2,
             "--output_dir", folder / "run", "--cache_dir", folder / "cache"]  # fmt: skip
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, ROOT / "retrieve_and_summarize.py", *map(str, flags)])
    while process.poll() is None:
        try:
            peak = max(peak, psutil.Process(process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait():
        raise SystemExit(process.returncode)
    processes_memory.append(peak / 2**30)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--passages", type=int, default=2_000_000)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    args = parser.parse_args()
    os.environ |= {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
    from hardware import hardware

    print(f"{hardware()}, {args.passages:,} passages, {args.queries} queries", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, peaks = Path(name), []
        write_data(folder, args.passages, args.queries)
        for what in ("reads, indexes and encodes", "searches only"):
            seconds = run(folder, peaks)
            print(f"a run that {what}: {seconds:.0f} s, peak {peaks[-1]:.2f} GiB", flush=True)
            for hop in json.loads((folder / "run" / "hops.validation.json").read_text()):
                print(f"  hop {hop['hop']}: {hop['seconds'] / hop['examples']:.3f} s a query")
            for parts in (folder / "run").glob("parts.*"):
                shutil.rmtree(parts)  # else the second run has nothing to do


if __name__ == "__main__":
    main()
