"""Memory, time to the first step and steps a second of both training scripts, on few and on many documents.

    python benchmarks/memory.py --documents 500 50000 --folder /tmp/memory

Generates documents of 800 words with a question, a reference and evidence each, starts each script with two processes
twice, and prints for each start: the proportional set size (PSS) of both processes, which counts a shared page once,
at its peak and once training runs; the seconds to the first step; and the steps a second after the first ten. With
`--code`, the scripts of another folder are measured, such as those of an earlier commit.

2026-11-28, Intel Xeon without bfloat16 instructions, 2 cores, float32, torch 2.13.0 (50,000 documents: 429 MB of text):

    script              documents  start  MB at the peak  seconds to step 1  steps/s
    train_retrieve.py         500      1           2,056               10.9      2.9
    train_retrieve.py         500      2           1,852                8.2      2.8
    train_retrieve.py      50,000      1           2,369              243.1      2.9
    train_retrieve.py      50,000      2           2,010               12.3      3.0
    train_summarize.py        500      1           1,527                8.9      2.9
    train_summarize.py        500      2           1,385                6.7      2.9
    train_summarize.py     50,000      1           1,757              215.7      2.8
    train_summarize.py     50,000      2           1,499               10.6      2.8

The first start reads, tokenizes and searches all documents; most of the memory is the libraries of two processes.

The same with lists in each process (commit a717b04), first start: train_retrieve.py 2,134 MB with 500 documents and,
with 50,000, the machine's 24 GB before the first step; train_summarize.py 1,480 MB and 17,205 MB, 291 s to step 1, 2.8
steps/s.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
STEPS = 80
FLAGS = {
    "train_retrieve.py": ["--per_device_train_batch_size", "8"],
    "train_summarize.py": ["--per_device_train_batch_size", "8", "--retriever", "bm25"],
}


def write_data(path: Path, documents: int, seed: str) -> None:
    """Documents of eight passages of 100 words, drawn from 20,000 words with frequencies as in real text."""
    rng = random.Random(seed)
    words = ["".join(rng.choice(["ba", "de", "fi", "ko", "lu", "mo", "na", "ri", "su", "te"]) for _ in range(4))
             + str(number % 7) for number in range(20_000)]  # fmt: skip
    cumulative = list(itertools.accumulate(1 / (rank + 10) for rank in range(len(words))))
    with path.open("w", encoding="utf-8") as file:
        for number in range(documents):
            passages = [" ".join(rng.choices(words, cum_weights=cumulative, k=100)) for _ in range(8)]
            gold = rng.randrange(8)
            said = passages[gold].split()
            record = {"id": f"{seed}{number}", "passages": passages, "query": " ".join(rng.sample(said, 8)),
                      "summary": " ".join(said[20:60]), "evidence": [gold]}  # fmt: skip
            file.write(json.dumps(record) + "\n")


def pss(process: psutil.Process) -> float:
    """MB of the training processes that a launcher started, without their data loaders."""
    total = 0
    for child in process.children():
        try:
            total += child.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 1e6


def step_times(folder: Path) -> list[float]:
    """Seconds since the loop began, at each step."""
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else ()
    return [line["wall"] for line in lines if line["event"] == "train"]


def measure(script: str, data: Path, folder: Path, code: Path, cache: Path) -> dict:
    """One start of a script with two processes, until `STEPS` steps are done."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(code / script), "--output_dir", str(folder), "--train_file", str(data / "train.jsonl"),
               "--validation_file", str(data / "validation.jsonl"), "--num_train_epochs", "0",
               "--max_train_steps", "100000", "--log_steps", "1", "--checkpointing_steps", "1000000",
               "--eval_steps", "1000000", *FLAGS[script]]  # fmt: skip
    environment = {**os.environ, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    began = time.perf_counter()
    log = folder.with_suffix(".log").open("wb")
    process = psutil.Process(subprocess.Popen(command, cwd=code, env=environment, stdout=log, stderr=log).pid)
    first, peak, running = None, 0.0, []
    while len(times := step_times(folder)) < STEPS:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit(folder.with_suffix(".log").read_text()[-3000:])
        now = pss(process)
        peak = max(peak, now)
        if times:
            first = first or time.perf_counter() - began - (times[-1] - times[0])
            running.append(now)
        time.sleep(1)
    pace = (len(times) - 11) / (times[-1] - times[10])
    for child in process.children(recursive=True):
        child.send_signal(signal.SIGKILL)
    process.kill()
    process.wait()
    return {"MB at the peak": peak, "MB in training": max(running), "seconds to step 1": first, "steps/s": pace}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[500, 50_000])
    parser.add_argument("--folder", type=Path, default=Path("outputs/memory"))
    parser.add_argument("--code", type=Path, default=ROOT, help="folder of the scripts to measure")
    parser.add_argument("--scripts", nargs="+", default=list(FLAGS))
    parser.add_argument("--starts", type=int, default=2)
    args = parser.parse_args()
    folder = args.folder.resolve()
    for documents in args.documents:
        data = folder / f"data{documents}"
        if not data.exists():
            data.mkdir(parents=True)
            write_data(data / "validation.jsonl", 50, "validation")
            write_data(data / "train.jsonl", documents, "train")
    header = ("script", "documents", "start", "MB at the peak", "MB in training", "seconds to step 1", "steps/s")
    print("".join(f"{name:>20}" for name in header), flush=True)
    for script in args.scripts:
        for documents in args.documents:
            cache = folder / "cache"
            shutil.rmtree(cache, ignore_errors=True)
            for start in range(1, args.starts + 1):
                row = measure(script, folder / f"data{documents}", folder / "run", args.code.resolve(), cache)
                cells = [script, documents, start, *(f"{value:.1f}" for value in row.values())]
                print("".join(f"{cell!s:>20}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
