"""What both training loops share and no experiment changes: start-up, seeds, meters, the log, and how a run ends."""

import json
import os
import platform
import random
import resource
import shlex
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import transformers

from utils.arguments import UsageError
from utils.data import DataError


def run_script(main) -> None:
    """Runs `main()` and ends the process with an exit code: 0, or 2 and one line for what a user can mend."""
    code = 0
    try:
        main()
    except (UsageError, DataError) as error:
        code = 2
        if int(os.environ.get("RANK", 0)) == 0:  # every process meets the same error
            print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
        if int(os.environ.get("RANK", 0)) == 0:
            print("\ninterrupted", file=sys.stderr)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    _exit(code)


def end_run(accelerator) -> None:
    """Ends a run that is done; called inside `main`, while all that belongs to the processes' group still exists.

    Returning from `main` would take it apart, in which two gloo processes hang or abort now and then.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
    _exit(0)


def _exit(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_launch(accelerator) -> None:
    """Refuses a launch whose processes do not know of each other, and gives CPU processes all of the cores."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UsageError(
            f"{started} processes were started but each would train alone: "
            "set ACCELERATE_USE_CPU=1 to train on the processor, or start as many processes as there are GPUs"
        )
    transformers.utils.logging.disable_progress_bar()
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise UsageError("fp16 needs a GPU: use --mixed_precision bf16 or no")
        # `accelerate launch` without a configuration starts PyTorch with a single thread
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))


def prepare_run_folder(accelerator, arguments) -> Path:
    """Makes the run folder and writes what was run on what; UsageError if it already holds a run."""
    folder = Path(arguments.output_dir)
    if (folder / "metrics.jsonl").exists() and not arguments.overwrite_output_dir:
        raise UsageError(f"{folder} already holds a run: choose another --output_dir, or pass --overwrite_output_dir")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_text("")
            (folder / "arguments.json").write_text(json.dumps(asdict(arguments), indent=2) + "\n")
            (folder / "command.txt").write_text(shlex.join([sys.executable, *sys.argv]) + "\n")
            (folder / "environment.json").write_text(json.dumps(environment(accelerator), indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"--output_dir {folder}: {error.strerror}") from error
    return folder


def environment(accelerator) -> dict:
    """Versions, device and processes of this run."""
    from importlib.metadata import version

    names = ["torch", "accelerate", "transformers", "datasets", "evaluate", "sentence-transformers"]
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "device": str(accelerator.device),
        "device_name": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else platform.machine(),
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
    }


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds dropout by (seed, step, process), so that a step's randomness does not depend on what ran before it."""
    mixed = int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint32)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(mixed)


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """AdamW's groups: no weight decay on biases and norms, which are the parameters of one dimension."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


def gradient_sync(accelerator, model, is_last: bool):
    """Gradients are exchanged on a step's last micro-batch only."""
    return nullcontext() if is_last else accelerator.no_sync(model)


class RunLog:
    """Writes events to `metrics.jsonl` and, as `log_format` says, to standard output; on the main process only.

    `log_format`: "simple" (one readable line an event), "json" (the same lines as the file), "none".
    """

    def __init__(self, accelerator, folder: Path, log_format: str):
        self.enabled = accelerator.is_main_process
        self.path, self.log_format = folder / "metrics.jsonl", log_format

    def __call__(self, event: str, **values) -> None:
        if not self.enabled:
            return
        line = json.dumps({"event": event, **_rounded(values)})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        if self.log_format == "json":
            print(line, flush=True)
        elif self.log_format == "simple":
            print(" | ".join([event, *(f"{name} {_shown(value)}" for name, value in values.items())]), flush=True)

    def say(self, text: str) -> None:
        if self.enabled and self.log_format == "simple":
            print(text, flush=True)


def score_table(scores: dict[str, dict], columns: tuple[str, ...]) -> str:
    """A table in plain text: a row for each name, a column for each score."""
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"{column:>18}" for column in columns)]
    lines += [
        f"{name:<{width}}" + "".join(f"{row[column]:18.1f}" for column in columns) for name, row in scores.items()
    ]
    return "\n".join(lines)


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _shown(value) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_shown(inner)}" for name, inner in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Meters:
    """Sums over the steps since the last log line, on this process; `read` adds up all processes and starts anew."""

    def __init__(self):
        self.begin = time.perf_counter()
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.gnorm = self.clipped = self.steps = 0
        self.since = time.perf_counter()

    def add(self, **sums) -> None:
        """Adds to this process's sums: numbers, or tensors that stay on their device until they are read."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value

    def add_step(self, gnorm, max_grad_norm: float) -> None:
        """Counts one optimizer step with its gradient norm, the same on all processes."""
        self.steps += 1
        self.gnorm += gnorm
        self.clipped += gnorm > max_grad_norm > 0

    def read(self, accelerator, lr: float) -> dict:
        """The meters of a log line; `loss` and `nll` become means per token or pair in base 2, as fairseq logs them.

        Expects the sums `loss`, `count`, `examples`, `tokens` and `slots` (tokens with padding).
        """
        names = sorted(self.sums)
        values = torch.stack([torch.as_tensor(self.sums[n], dtype=torch.float64).cpu() for n in names])
        totals = accelerator.reduce(values.to(accelerator.device), "sum").tolist()
        total = dict(zip(names, totals, strict=True))
        seconds = time.perf_counter() - self.since
        line = {"loss": total["loss"] / total["count"] / np.log(2)}
        if "nll" in total:
            line["nll_loss"] = total["nll"] / total["count"] / np.log(2)
            line["ppl"] = 2 ** line["nll_loss"]
        if "right" in total:
            line["accuracy"] = total["right"] / total["count"]
        line |= {
            "lr": lr,
            "gnorm": float(self.gnorm / self.steps),
            "clip": float(self.clipped / self.steps),
            "examples": int(total["examples"]),
            "tokens": int(total["tokens"]),
            "tokens_per_second": total["tokens"] / seconds,
            "tokens_per_step": total["tokens"] / self.steps,
            "padding": 1 - total["tokens"] / total["slots"],
            "steps_per_second": self.steps / seconds,
            "examples_per_step": total["examples"] / self.steps,
            "memory_gb": peak_memory_gb(accelerator),
            "train_wall": seconds,
            "wall": time.perf_counter() - self.begin,
        }
        self.reset()
        return line


def peak_memory_gb(accelerator) -> float:
    """Peak memory of this process: of the GPU, or resident on the processor; in gigabytes."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
