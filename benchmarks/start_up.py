"""How long until something happens: `--help`, a mistyped flag, and the first training step with the defaults.

python benchmarks/start_up.py

2026-11-26, Intel(R) Xeon(R) Processor, 2 cores, torch 2.13.0+cpu
train_retrieve.py --help                     0.12 s (0.09 to 0.13)
train_retrieve.py with a mistyped flag       0.13 s (0.08 to 0.13)
train_retrieve.py, first step               13.18 s (12.82 to 13.52)
train_summarize.py --help                    0.12 s (0.08 to 0.13)
train_summarize.py with a mistyped flag      0.12 s (0.12 to 0.12)
train_summarize.py, first step              11.58 s (10.80 to 11.83)

On an AMD EPYC (Zen 5), the same day: `--help` 0.05 s, first steps after 8.47 s (8.13 to 10.18) and 7.04 s (6.70 to
8.33).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def seconds_of(script: str, *flags) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), *flags], capture_output=True)
    return time.perf_counter() - began


def first_step(script: str) -> float:
    """Seconds until the first step with the embedded data is in the log; the run is then ended."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
        command = [sys.executable, str(ROOT / script), "--output_dir", folder, "--log_steps", "1"]
        began = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = Path(folder, "metrics.jsonl")
        while not (log.exists() and "\n" in log.read_text()):
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        process.kill()
        process.wait()
        assert json.loads(log.read_text().splitlines()[0])["step"] == 1
    return seconds


def main():
    rows = {}
    for script in ("train_retrieve.py", "train_summarize.py"):
        rows[f"{script} --help"] = lambda script=script: seconds_of(script, "--help")
        rows[f"{script} with a mistyped flag"] = lambda script=script: seconds_of(script, "--learnin_rate", "1")
        rows[f"{script}, first step"] = lambda script=script: first_step(script)
    measured = {name: [] for name in rows}
    for _ in range(3):
        for name, measure in rows.items():
            measured[name].append(measure())
    from hardware import hardware

    print(hardware())
    for name, seconds in measured.items():
        print(f"{name:42} {statistics.median(seconds):6.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


if __name__ == "__main__":
    main()
