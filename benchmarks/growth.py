"""What grows and what does not: time and memory against size, each as a plot beside this file.

    python benchmarks/growth.py retriever        # gradient caching against the batch; benchmarks/growth_retriever.png
    python benchmarks/growth.py summarizer       # fid and concat against passages; benchmarks/growth_summarizer.png

Each point is a process of its own, whose peak of resident memory is measured with all that it has loaded.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from hardware import hardware
from retriever_training import find_minilm, run_here, write_data
from transformers import BartConfig, BartForConditionalGeneration

from utils.models.encoder_decoder import EncoderDecoder
from utils.models.sources import collate
from utils.training.memory import keep_memory
from utils.training.step import parameter_groups

FOLDER = Path(__file__).parent
CHUNK_TOKENS = 4096
ALL_PAIRS = 1024


def retriever(batches=(64, 128, 256, 512, 1024), plain_batches=(64, 128, 256)) -> None:
    """An epoch of train_retrieve.py over the same 1,024 pairs in bf16, in batches of each size.

    2026-11-26, AMD EPYC (Zen 5), 2 cores: with gradient caching 2.01, 2.07, 2.01, 1.92 and 1.83 GB in batches of 64,
    128, 256, 512 and 1,024 pairs (29.9 to 34.8 pairs/s); all at once 4.02, 6.30 and 8.27 GB in batches of 64, 128 and
    256 (39.8 to 37.0 pairs/s). More steps make more shapes, which break the heap into more pieces; so the first step
    alone, of as many pairs as its batch has, needs less: 1.56 GB with 64 pairs, 1.81 with 1,024.
    2026-11-26, Intel Xeon with AMX, one core beside other work, the first step alone: 1.59 GB with 64 pairs and 2.03
    with 1,024. What grows there is in part the kernels that oneDNN compiles for each new shape and keeps, up to 1,024
    of them: with ONEDNN_PRIMITIVE_CACHE_CAPACITY=64 it was 1.84 with 1,024.
    """
    points = {"gradient caching": {}, "all at once": {}}
    for label, sizes in (("gradient caching", batches), ("all at once", plain_batches)):
        for pairs in sizes:
            with tempfile.TemporaryDirectory() as name:
                write_data(Path(name), find_minilm(), ALL_PAIRS)
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
    """In a child: an epoch."""

    def done(rate: float):
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        Path(folder, "point.json").write_text(json.dumps([rate, memory]))
        os._exit(0)

    run_here(Path(folder), pairs, done, dropout=False, gradient_cache_tokens=tokens, epochs=1)


def summarizer(passages=(2, 4, 8, 16, 32)) -> None:
    """Training steps of 4 examples by both ways of reading, against the number of passages of 128 tokens.

    2026-11-26, AMD EPYC (Zen 5), 2 cores: fid takes 0.173, 0.284, 0.437, 0.843 and 1.627 s with 2, 4, 8, 16 and 32
    passages (0.84 to 2.82 GB), so twice the passages at most 1.93 times as long; concat 0.167, 0.326, 0.737, 2.015 and
    6.736 s (0.89 to 2.98 GB), at last 3.3 times.
    """
    points = {fusion: {} for fusion in ("fid", "concat")}
    for fusion, found in points.items():
        for count in passages:
            command = [sys.executable, __file__, "summarizer", "--point", fusion, str(count), "0"]
            result = subprocess.run(command, check=True, capture_output=True, text=True)
            found[count] = json.loads(result.stdout.splitlines()[-1])
            print(f"{fusion:6} {count:3} passages: {found[count][0]:6.3f} s, {found[count][1]:5.2f} GB", flush=True)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, column, title in ((axes[0], 0, "seconds in a step"), (axes[1], 1, "peak memory, GB")):
        for fusion, found in points.items():
            axis.plot(list(found), [values[column] for values in found.values()], "o-", label=fusion)
        axis.set(xlabel="passages", title=title, xticks=passages, ylim=0)
    axes[0].legend()
    figure.suptitle(f"BART of d_model 256, 4 examples, passages of 128 tokens; {hardware()}", fontsize=6)
    figure.savefig(FOLDER / "growth_summarizer.png", dpi=90)


def summarizer_point(fusion: str, passages: int) -> None:
    """In a child: the median of five steps after two."""
    keep_memory()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=8192, d_model=256, encoder_layers=4, decoder_layers=4, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=1024, decoder_ffn_dim=1024, max_position_embeddings=8192,
    )  # fmt: skip
    model = EncoderDecoder(BartForConditionalGeneration(config)).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), fused=True)
    texts = torch.randint(5, 8000, (4, passages, 128)).tolist()
    sources = texts if fusion == "fid" else [[[token for passage in text for token in passage]] for text in texts]
    batch = collate(sources, torch.randint(5, 8000, (4, 64)).tolist(), pad_token_id=1)
    seconds = []
    for _ in range(7):
        began = time.perf_counter()
        loss, _ = model(**batch, label_smoothing_factor=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    print(json.dumps([statistics.median(seconds[2:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["retriever", "summarizer"])
    parser.add_argument("--point", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point and args.what == "summarizer":
        summarizer_point(args.point[0], int(args.point[1]))
    elif args.point:
        retriever_point(args.point[0], int(args.point[1]), int(args.point[2]))
    else:
        {"retriever": retriever, "summarizer": summarizer}[args.what]()
