"""Training a reranker, pairs per second: train_rerank.py beside sentence-transformers' CrossEncoderTrainer.

    python benchmarks/reranker_training.py
    python benchmarks/reranker_training.py --repeats 1 --steps 1 --settings plain      # tries it out

A BERT of MiniLM-L12's size with random weights (or --model), AdamW, 8 queries of 8 to 24 tokens in a step, each with 8
passages of 30 to 256, and the binary cross entropy of each pair. Every run is a process of its own: on this side the
script as users run it, on the other CrossEncoderTrainer with BinaryCrossEntropyLoss and batches of 64 pairs. Both
compute the same pairs. Timed are whole steps by wall clock, loading of batches and optimizer included, without the
first epoch (here) or step (there). The two losses at the end are of the first 64 pairs, without dropout.

* plain: no dropout on either side.
* default: dropout 0.1 on both sides; attention dropout 0.1 only there, because train_rerank.py leaves it out.
"""

import argparse
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
QUERIES, PASSAGES = 8, 8  # in a step; of a query
DROPOUT = {"plain": 0.0, "default": 0.1}


def write_data(folder: Path, model: Path | None, steps: int) -> None:
    """Queries and passages of random words, each about one token; the model with and without dropout."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    from utils.models.tokenizer import train_tokenizer

    rng = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfgklmnprst"]

    def text(low: int, high: int) -> str:
        return " ".join(rng.choice(words, rng.integers(low, high + 1)))

    for name, count in (("train", QUERIES * steps), ("validation", 1)):
        records = [
            {"id": str(i), "query": text(8, 24), "passages": [text(30, 256) for _ in range(PASSAGES)],
             "summary": "none", "evidence": [int(rng.integers(PASSAGES))]} for i in range(count)
        ]  # fmt: skip
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, rate in DROPOUT.items():
        rates = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        if model:
            tokenizer = AutoTokenizer.from_pretrained(model)
            made = BertForSequenceClassification.from_pretrained(model, **rates)
        else:
            tokenizer = train_tokenizer([" ".join(words)] * 3, lowercase=True, max_length=512)
            config = BertConfig(vocab_size=30522, hidden_size=384, num_hidden_layers=12, num_attention_heads=12,
                                intermediate_size=1536, num_labels=1, pad_token_id=tokenizer.pad_token_id,
                                **rates)  # fmt: skip
            made = BertForSequenceClassification(config)
        tokenizer.save_pretrained(folder / name)
        made.save_pretrained(folder / name)


def run_here(folder: Path, setting: str, steps: int, done) -> None:
    """train_rerank.py for two epochs, the second timed from its start to the end of its last step."""
    from utils.training.log import RunLog

    times, epochs, start_epoch = [], [], RunLog.start_epoch

    def note_start(self, epoch, *rest):
        start_epoch(self, epoch, *rest)
        epochs.append(epoch)
        times[:] = [time.perf_counter()]

    def note_step(self, **values):
        times.append(time.perf_counter())
        if len(epochs) == 2 and len(times) == steps + 1:
            done(steps * QUERIES * PASSAGES / (times[-1] - times[0]))

    RunLog.start_epoch, RunLog.advance = note_start, note_step
    flags = [
        "--model_name_or_path", folder / setting, "--train_file", folder / "train.jsonl", "--validation_file",
        folder / "validation.jsonl", "--retriever", "bm25", "--loss", "binary", "--num_hard_negatives", PASSAGES - 1,
        "--draft_share", 0, "--learning_rate", 2e-5, "--per_device_train_batch_size", QUERIES, "--num_train_epochs", 2,
        "--output_dir", folder / "run", "--checkpointing_steps", 10**6, "--log_format", "none", "--eval_after_steps",
        10**6, "--log_steps", 10**6, "--resume_from_checkpoint", "none",
        "--mixed_precision", os.environ["ACCELERATE_MIXED_PRECISION"],
    ]  # fmt: skip
    sys.argv = ["train_rerank.py", *map(str, flags)]
    runpy.run_path(str(ROOT / "train_rerank.py"), run_name="__main__")


def labelled_pairs(folder: Path) -> tuple[list[str], list[str], list[float]]:
    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [(r["query"], text, float(i in r["evidence"])) for r in records for i, text in enumerate(r["passages"])]
    return tuple(map(list, zip(*rows, strict=True)))


def run_there(folder: Path, setting: str, steps: int, done) -> None:
    """CrossEncoderTrainer for one step, and then for as many as are timed."""
    import torch
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
    )
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    from transformers import TrainerCallback

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    dataset = Dataset.from_dict(dict(zip(("query", "passage", "label"), labelled_pairs(folder), strict=True)))
    model = CrossEncoder(str(folder / setting), device="cpu")
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **options):
            times.append(time.perf_counter())
            if len(times) == steps + 1:
                done(steps * QUERIES * PASSAGES / (times[-1] - times[0]))

    arguments = CrossEncoderTrainingArguments(
        output_dir=str(folder / "peer"), max_steps=steps + 1, per_device_train_batch_size=QUERIES * PASSAGES,
        learning_rate=2e-5, bf16=os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16", use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_strategy="no", weight_decay=0.01,
    )  # fmt: skip
    loss = BinaryCrossEntropyLoss(model)
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=dataset, loss=loss, callbacks=[Clock()]).train()


def losses(folder: Path) -> tuple[float, float]:
    """The mean loss of the first 64 pairs without dropout, here and there."""
    import torch
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    from utils.models.cross_encoder import collate_pairs, load_reranker, rerank_loss, tokenize

    queries, passages, labels = (column[: QUERIES * PASSAGES] for column in labelled_pairs(folder))
    reranker = load_reranker(str(folder / "plain"))
    rows = []
    for first in range(0, len(queries), PASSAGES):
        part = slice(first, first + PASSAGES)
        best_first = sorted(zip(labels[part], passages[part], strict=True), key=lambda row: -row[0])
        texts = tokenize(reranker, [text for _, text in best_first], "passage", keep=False)
        rows.append((tokenize(reranker, queries[first : first + 1], "query")[0], texts, 1))
    batch = collate_pairs(reranker, rows, dummy=False)
    there = CrossEncoder(str(folder / "plain"), device="cpu")
    with torch.no_grad():
        scores = reranker(batch["pairs"])["scores"][:, 0]
        loss, _ = rerank_loss(scores, batch["candidates"], batch["positives"], "binary")
        other = BinaryCrossEntropyLoss(there)([queries, passages], torch.tensor(labels))
    return loss.item() / QUERIES, other.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, help="a folder with a BERT that classifies sequences, such as MiniLM-L12")
    parser.add_argument("--settings", nargs="+", choices=DROPOUT, default=list(DROPOUT))
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each run, of 64 pairs")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)  # a child: side, folder, setting
    args = parser.parse_args()

    if args.run:
        side, folder, setting = args.run

        def done(rate: float):
            (Path(folder) / "rate").write_text(str(rate))
            os._exit(0)

        (run_here if side == "here" else run_there)(Path(folder), setting, args.steps, done)
        raise SystemExit("the run ended before its last timed step")

    os.environ |= {"ACCELERATE_USE_CPU": "1", "ACCELERATE_MIXED_PRECISION": args.precision}
    from hardware import hardware

    print(
        f"{hardware()}, precision {args.precision}, {args.repeats} x {args.steps} steps, pairs per second", flush=True
    )
    rates = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, args.model, args.steps)
        for repeat in range(args.repeats):
            for setting in args.settings:
                for side in ("here", "there"):
                    command = [sys.executable, __file__, "--steps", str(args.steps), "--run", side, name, setting]
                    result = subprocess.run(command, capture_output=True, text=True)
                    if result.returncode:
                        raise SystemExit(result.stderr[-3000:])
                    rates.setdefault((side, setting), []).append(float((folder / "rate").read_text()))
                    print(f"repeat {repeat + 1}: {setting:8} {side:5} {rates[side, setting][-1]:7.2f}", flush=True)
        here, there = losses(folder)
    for setting in args.settings:
        ratios = np.divide(rates["here", setting], rates["there", setting])
        print(f"{setting}: {np.median(ratios):.2f} times ({min(ratios):.2f} to {max(ratios):.2f})")
    print(f"loss of 64 pairs: here {here:.6f}, there {there:.6f}")


if __name__ == "__main__":
    main()
