"""What grows and what does not: time and memory against size, each as a plot beside this file.

    python benchmarks/growth.py retriever        # gradient caching against the batch; benchmarks/growth_retriever.png

Each point is a process of its own, whose peak of resident memory is measured with all that it has loaded.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from retriever_training import find_minilm, hardware, run_here, write_data

FOLDER = Path(__file__).parent
CHUNK_TOKENS = 4096


def retriever(batches=(64, 128, 256, 512, 1024), plain_batches=(64, 128, 256)) -> None:
    """The first step of train_retrieve.py in bf16, with and without gradient caching, at each batch size.

    2026-11-23, AMD EPYC, one core shared with other work: 1.54 GB with 64 pairs and 1.75 with 1,024 (14 to 18 pairs/s);
    all at once 2.20 GB with 64 and 6.40 with 256 (17 to 19 pairs/s).
    """
    points = {"gradient caching": {}, "all at once": {}}
    for label, sizes in (("gradient caching", batches), ("all at once", plain_batches)):
        for pairs in sizes:
            with tempfile.TemporaryDirectory() as name:
                write_data(Path(name), find_minilm(), pairs=pairs)
                tokens = CHUNK_TOKENS if label == "gradient caching" else 0
                command = [sys.executable, __file__, "retriever", "--point", name, str(pairs), str(tokens)]
                environment = os.environ | {"ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": "bf16"}
                subprocess.run(command, env=environment, check=True, capture_output=True)
                points[label][pairs] = json.loads(Path(name, "point.json").read_text())
            rate, memory = points[label][pairs]
            print(f"{label:16} {pairs:5} pairs: {rate:6.2f} pairs/s, {memory:5.2f} GB", flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, column, title in ((axes[0], 1, "peak memory, GB"), (axes[1], 0, "pairs per second")):
        for label, found in points.items():
            axis.plot(list(found), [values[column] for values in found.values()], "o-", label=label)
        axis.set(xscale="log", xlabel="pairs in a batch", title=title, xticks=batches, xticklabels=batches, ylim=0)
        axis.minorticks_off()
    axes[0].legend()
    figure.suptitle(f"MiniLM, chunks of {CHUNK_TOKENS} tokens; {hardware()}", fontsize=6)
    figure.savefig(FOLDER / "growth_retriever.png", dpi=90)


def retriever_point(folder: str, pairs: int, tokens: int) -> None:
    """In a child: one step."""

    def done(rate: float):
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        Path(folder, "point.json").write_text(json.dumps([rate, memory]))
        os._exit(0)

    run_here(Path(folder), pairs, done, dropout=False, gradient_cache_tokens=tokens, epochs=1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["retriever"])
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        retriever_point(args.point[0], int(args.point[1]), int(args.point[2]))
    else:
        {"retriever": retriever}[args.what]()
