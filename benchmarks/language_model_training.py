"""Training a decoder-only summarizer: real tokens per second of this suite's step beside trl's SFTTrainer.

    pip install -r requirements.txt "trl>=1.16,<2"
    python benchmarks/language_model_training.py
    python benchmarks/language_model_training.py --size tiny --repeats 1 --steps 2      # tries everything out

A model of SmolLM2-135M's size with random weights (or --model_name_or_path), sources of 500 to 1,400 tokens, targets of
30 to 150, and a loss on the targets only. They take turns, each in a process of its own, in the same precision. Timed
are whole steps by wall clock, collating and optimizer included, after one step of warm-up. Padding is not counted.

* here: the step of train_summarize.py with --max_tokens and accumulation: no padding, and logits of targets only.
* SFTTrainer: its defaults (batches of 8 in random order, padded, gradient checkpointing), but a `max_length` that cuts
  nothing. The completions are the targets. With `packing=True`, its rows have `max_length` tokens.
* The last two rows are SFTTrainer without gradient checkpointing, in smaller batches that then fit into 24 GiB,
  accumulated to as many rows a step. Packed rows come one at a time: several are attended to as one long sequence.

2026-11-28, Intel Xeon (AVX-512, no bf16 instructions), 2 cores, torch 2.13.0+cpu, trl 1.16, float32, `--steps 1`
(interleaved, twice; the row with packing and gradient checkpointing was left out, because its rows of a step, attended
to as one sequence of 12,000 tokens, take over five minutes a step):

    real tokens per second                  1st  2nd  padding
    here                                    257  254       0%   loss of four examples 10.927259
    SFTTrainer                               98   97    23.4%                         10.927258   2.62x
    SFTTrainer, no checkpointing            135  146     7.0%                         10.927258   1.82x
    SFTTrainer, packing, no checkpointing   153  165       0%                                     1.61x
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
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {  # and the lengths of sources
    "135m": ({"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 49152}, (500, 1400)),
    "tiny": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 4096}, (50, 140)),
}  # fmt: skip
TARGETS = (30, 150)
WARM_UP = 1  # steps that are not counted
UNCHECKPOINTED = {"gradient_checkpointing": False, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
ONE_ROW = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
CONTENDERS = {  # settings of SFTTrainer
    "here": None,
    "SFTTrainer": {},
    "SFTTrainer, packing": {"packing": True},
    "SFTTrainer, no checkpointing": UNCHECKPOINTED,
    "SFTTrainer, packing, no checkpointing": UNCHECKPOINTED | ONE_ROW | {"packing": True},
}


def make(folder: Path, size: str, name_or_path: str | None) -> None:
    """The model with its tokenizer, and examples as token ids: of each the source and the target."""
    from utils.models.tokenizer import train_tokenizer

    sizes, sources = SIZES[size]
    if name_or_path:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=torch.float32)
    else:
        tokenizer = train_tokenizer([" a b c"] * 50)
        torch.manual_seed(0)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = LlamaConfig(**sizes, **special, tie_word_embeddings=True, max_position_embeddings=8192)
        model = AutoModelForCausalLM.from_config(config)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.save_pretrained(folder / "model")
    model.save_pretrained(folder / "model")
    rng = np.random.default_rng(0)
    lengths = [(rng.integers(sources[0], sources[1] + 1), rng.integers(TARGETS[0], TARGETS[1] + 1)) for _ in range(400)]
    rows = [[rng.integers(10, model.config.vocab_size, n).tolist() for n in pair] for pair in lengths]
    (folder / "rows.json").write_text(json.dumps(rows))


class Clock:
    """Real tokens per second of the steps after the warm-up."""

    def __init__(self, steps: int):
        self.steps, self.ended, self.real, self.slots = steps, 0, 0, 0

    def count(self, real: int, slots: int) -> None:
        if self.ended >= WARM_UP:
            self.real, self.slots = self.real + real, self.slots + slots

    def end_step(self) -> bool:
        """Whether that was the last step."""
        self.ended += 1
        if self.ended == WARM_UP:
            self.began = time.perf_counter()
        self.seconds = time.perf_counter() - self.began
        return self.ended == WARM_UP + self.steps


def run_here(folder: Path, clock: Clock, precision: str, max_tokens: int, accumulation: int) -> float:
    """The step of train_summarize.py; returns the mean loss of the first four examples."""
    from accelerate import Accelerator

    from utils.models.sources import collate, count_tokens
    from utils.models.summarizer import load_model_and_tokenizer, wrap
    from utils.training.batching import plan_epoch
    from utils.training.memory import keep_memory
    from utils.training.step import parameter_groups

    keep_memory()
    accelerator = Accelerator(mixed_precision=precision, cpu=True)
    rows = json.loads((folder / "rows.json").read_text())
    pretrained, tokenizer = load_model_and_tokenizer(str(folder / "model"))
    model = wrap(pretrained).train()

    def batch_of(examples):
        return collate([[rows[i][0]] for i in examples], [rows[i][1] for i in examples], tokenizer.pad_token_id)

    def summed_loss(batch) -> torch.Tensor:
        with accelerator.autocast():
            return model(**batch, label_smoothing_factor=0.0)[0]

    with torch.no_grad():
        first = summed_loss(batch_of(range(4))).item() / sum(len(target) for _, target in rows[:4])
    plan = plan_epoch(
        [[len(source), len(target)] for source, target in rows], seed=0, epoch=0,
        gradient_accumulation_steps=accumulation, max_tokens=max_tokens,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=2e-5, fused=True)
    for step in plan:
        batches = [batch_of(micro_batch) for (micro_batch,) in step]
        targets = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        for batch in batches:
            accelerator.backward(summed_loss(batch) / targets)
            tokens = count_tokens(batch, model.is_packed)
            clock.count(tokens["tokens"], tokens["slots"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if clock.end_step():
            return first
    raise SystemExit("too few examples for so many steps")


def run_there(folder: Path, clock: Clock, precision: str, settings: dict) -> float | None:
    """SFTTrainer; returns the mean loss of the first four examples, where they are not packed."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Steps(TrainerCallback):
        def on_step_end(self, arguments, state, control, **options):
            control.should_training_stop = clock.end_step()

    class Trainer(SFTTrainer):
        def training_step(self, model, inputs, *arguments, **options):
            slots = inputs["input_ids"].numel()
            clock.count(int(inputs["attention_mask"].sum()) if "attention_mask" in inputs else slots, slots)
            return super().training_step(model, inputs, *arguments, **options)

    rows = json.loads((folder / "rows.json").read_text())
    dataset = Dataset.from_dict({
        "input_ids": [source + target for source, target in rows],
        "completion_mask": [[0] * len(source) + [1] * len(target) for source, target in rows],
    })  # fmt: skip
    arguments = SFTConfig(
        output_dir=str(folder / "peer"), max_steps=WARM_UP + clock.steps, bf16=precision == "bf16", use_cpu=True,
        max_length=max(len(source) + len(target) for source, target in rows), report_to="none", save_strategy="no",
        completion_only_loss=True, logging_strategy="no", disable_tqdm=True, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    trainer = Trainer(
        model, args=arguments, train_dataset=dataset, callbacks=[Steps()],
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )  # fmt: skip
    first = None
    if not settings.get("packing"):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])  # with labels
        with torch.no_grad(), trainer.compute_loss_context_manager():
            first = trainer.compute_loss(trainer.model, batch).item()
    trainer.train()
    return first


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="135m")
    parser.add_argument("--model_name_or_path", help="a real model in place of the random one")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--rows", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--max_tokens", type=int, default=4096, help="of train_summarize.py, per micro-batch")
    parser.add_argument("--gradient_accumulation_steps", type=int, default=2, help="of train_summarize.py")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # a child: contender, folder
    args = parser.parse_args()

    if args.run:
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        clock, (name, folder) = Clock(args.steps), args.run
        if CONTENDERS[name] is None:
            loss = run_here(Path(folder), clock, args.precision, args.max_tokens, args.gradient_accumulation_steps)
        else:
            loss = run_there(Path(folder), clock, args.precision, CONTENDERS[name])
        print(json.dumps({"speed": clock.real / clock.seconds, "padding": 1 - clock.real / clock.slots, "loss": loss}))
        return

    os.environ |= {"ACCELERATE_USE_CPU": "1", "TOKENIZERS_PARALLELISM": "false"}
    from hardware import hardware

    print(hardware())
    print(f"{args.model_name_or_path or args.size}, precision {args.precision}, {args.repeats} x {args.steps} steps:")
    print("real tokens per second, padding, loss of four examples before training", flush=True)
    measured = {name: [] for name in args.rows}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), args.size, args.model_name_or_path)
        flags = ["--precision", args.precision, "--steps", args.steps, "--max_tokens", args.max_tokens,
                 "--gradient_accumulation_steps", args.gradient_accumulation_steps]  # fmt: skip
        for _ in range(args.repeats):
            for name in args.rows:
                command = [sys.executable, __file__, *map(str, flags), "--run", name, folder]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    print(f"{name:38} failed, exit code {result.returncode}: {result.stderr[-300:]}", flush=True)
                    continue
                row = json.loads(result.stdout.splitlines()[-1])
                loss = "" if row["loss"] is None else f"{row['loss']:.6f}"
                print(f"{name:38} {row['speed']:8.0f}  {row['padding']:6.1%}  {loss}", flush=True)
                measured[name].append(row["speed"])
    for name, speeds in measured.items():
        if name != "here" and speeds and measured.get("here"):
            ratio = statistics.median(measured["here"]) / statistics.median(speeds)
            print(f"here against {name}: {ratio:.2f}x")


if __name__ == "__main__":
    main()
