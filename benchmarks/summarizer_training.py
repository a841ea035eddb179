"""Training a summarizer: real tokens per second of train_summarize.py against a plain loop.

    python benchmarks/summarizer_training.py --size base

The plain loop is of the kind of Transformers' `run_summarization_no_trainer.py`: batches of 4 in random order, padded
to the longest, the model's own loss over all positions, torch's AdamW as it comes. The script runs as it is, from the
command line, with its defaults. Both train the same BART with random weights (dropout 0.1) on the same texts: sources
log-normal around 280 tokens, up to 512, targets of 30 to 128. They take turns. Both sides
are timed by wall clock, loading of batches included, after two steps of warm-up. Padding is not counted.

    2026-11-26, AMD EPYC (Zen 5), 2 cores, torch 2.13.0+cpu
    BART of base size, 2 rounds: real tokens per second (lowest to highest), padding
    plain loop, float32               259  (254 to 264)   33.8%
    plain loop, bf16                  545  (539 to 551)   33.8%
    train_summarize.py, float32       829  (810 to 847)    0.0%
    train_summarize.py, bf16         1451  (1435 to 1468)    0.0%
    train_summarize.py, default      1470  (1436 to 1505)    0.0%
    float32 against the plain loop in float32: 3.20x
    bf16 against the plain loop in bf16: 2.66x
    default against the plain loop in float32: 5.67x
    (--size base --repeats 2 --examples 48)

On an Intel Xeon, the same day, one round, before float32 products stayed with MKL there, which is fast on that make.
The default is bf16: what lies between the last two rows is the machine, shared with others.

    plain loop, float32               261    33.8%
    plain loop, bf16                  366    33.8%
    train_summarize.py, float32       374     0.0%
    train_summarize.py, bf16          796     0.0%
    train_summarize.py, default       658     0.0%
    float32 against the plain loop in float32: 1.43x
    bf16 against the plain loop in bf16: 2.17x
    default against the plain loop in float32: 2.52x

2026-11-28, an Intel Xeon without bf16 instructions, 2 cores, float32 only, two rounds of 32 examples, in turns: the
plain loop 357 and 287, train_summarize.py 667 and 580, 1.87x and 2.02x. By the seconds that the log counts for steps,
from which the rows above were taken, train_summarize.py is at the same 667 and 580: the wall clock changes nothing.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, get_scheduler

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from hardware import hardware

from utils.files import write_jsonl
from utils.models.tokenizer import train_tokenizer

SIZES = {"small": {"d_model": 256, "layers": 4, "heads": 4}, "base": {"d_model": 768, "layers": 6, "heads": 12}}
WARM_UP = 2  # steps that are not counted


def make(folder: Path, size: str) -> None:
    """A model with its tokenizer, and texts of which every word is a token."""
    words = [a + b + c for a in "bdfgklmn" for b in "aeiou" for c in "bdfgklmnprst"]
    tokenizer = train_tokenizer([" " + word for word in words] * 50)
    words = [word for word in words if len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) == 1]
    width, layers, heads = SIZES[size].values()
    config = BartConfig(
        vocab_size=50265, d_model=width, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=heads,
        decoder_attention_heads=heads, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    BartForConditionalGeneration(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    rows = []
    for number in range(1200):
        lengths = int(np.clip(rng.lognormal(np.log(280), 0.5), 16, 508)), int(rng.integers(28, 126))
        texts = [" " + " ".join(rng.choice(words, length)) for length in lengths]
        rows.append({"id": str(number), "passages": [texts[0]], "summary": texts[1]})
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "validation.jsonl", rows[:1])


def plain(folder: Path, steps: int, precision: str) -> None:
    """The plain loop; prints its tokens per second and share of padding."""
    accelerator = Accelerator(mixed_precision=precision)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = BartForConditionalGeneration.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    features = [
        tokenizer(row["passages"][0], text_target=row["summary"], truncation=True, max_length=512) for row in rows
    ]

    def collate(features: list) -> dict:
        batch = tokenizer.pad([{"input_ids": f["input_ids"]} for f in features], return_tensors="pt")
        longest = max(len(f["labels"]) for f in features)
        batch["labels"] = torch.tensor([f["labels"] + [-100] * (longest - len(f["labels"])) for f in features])
        return batch

    generator = torch.Generator().manual_seed(0)
    loader = torch.utils.data.DataLoader(features, 4, shuffle=True, collate_fn=collate, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)
    scheduler = get_scheduler("linear", optimizer, 0, 1000)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    model.train()
    real = slots = 0
    for step, batch in enumerate(loader):
        if step == WARM_UP:
            began = time.perf_counter()
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        loss.item()
        if step >= WARM_UP:
            real += int((batch["attention_mask"].sum() + (batch["labels"] != -100).sum()).item())
            slots += batch["attention_mask"].numel() + batch["labels"].numel()
        if step + 1 == WARM_UP + steps:
            break
    print(json.dumps({"tokens_per_second": real / (time.perf_counter() - began), "padding": 1 - real / slots}))


def ours(folder: Path, steps: int, flags: list[str]) -> dict:
    """train_summarize.py with its defaults and `flags`; its tokens per second and share of padding, from its log."""
    run = [sys.executable, str(ROOT / "train_summarize.py"), "--model_name_or_path", folder / "model",
           "--train_file", folder / "train.jsonl", "--validation_file", folder / "validation.jsonl",
           "--retriever", "lead", "--output_dir", folder / "run", "--resume_from_checkpoint", "none",
           "--max_train_steps", WARM_UP + steps, "--log_steps", 1, "--max_new_tokens", 1, "--learning_rate", 5e-5,
           "--log_format", "none", *flags]  # fmt: skip
    subprocess.run([*map(str, run)], check=True, cwd=folder)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    before, *lines = [line for line in lines if line["event"] == "train"][WARM_UP - 1 :]
    tokens = sum(line["tokens"] for line in lines)
    slots = sum(line["tokens"] / (1 - line["padding"]) for line in lines)
    return {"tokens_per_second": tokens / (lines[-1]["wall"] - before["wall"]), "padding": 1 - tokens / slots}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--examples", type=int, default=64, help="examples that each loop trains on, warm-up aside")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plain", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if args.plain:  # in a process of its own
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        plain(Path.cwd(), args.examples // 4, args.plain)
        return

    contenders = {
        "plain loop, float32": "no",
        "plain loop, bf16": "bf16",
        "train_summarize.py, float32": ["--mixed_precision", "no"],
        "train_summarize.py, bf16": ["--mixed_precision", "bf16"],
        "train_summarize.py, default": [],
    }
    measured = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.size)
        for _ in range(args.repeats):
            for name, how in contenders.items():
                if isinstance(how, list):
                    measured[name].append(ours(Path(folder), args.examples // 16, how))
                    continue
                command = [sys.executable, __file__, "--plain", how, "--examples", str(args.examples)]
                result = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
                measured[name].append(json.loads(result.stdout.splitlines()[-1]))

    print(hardware())
    print(f"BART of {args.size} size, {args.repeats} rounds: real tokens per second (lowest to highest), padding")
    speed = {}
    for name, rounds in measured.items():
        speeds = sorted(r["tokens_per_second"] for r in rounds)
        speed[name] = statistics.median(speeds)
        print(f"{name:28} {speed[name]:8.0f}  ({speeds[0]:.0f} to {speeds[-1]:.0f})  {rounds[0]['padding']:6.1%}")
    for kind, other in (("float32", "float32"), ("bf16", "bf16"), ("default", "float32")):
        ratio = speed[f"train_summarize.py, {kind}"] / speed[f"plain loop, {other}"]
        print(f"{kind} against the plain loop in {other}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
