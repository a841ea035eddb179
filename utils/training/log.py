"""A run's log: events, meters, the progress bar and tables."""

import json
import resource
import sys
import threading
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from utils.files import write_lines
from utils.processes import add_up
from utils.progress import Phase, choose, close_bar, has_bars, open_bar, write

WIDTH = 120  # columns of a line on a terminal
# what a line of training shows of its meters, and under which names
SHORT = ("step", "epoch", "loss", "lr", "tokens_per_second", "skipped", "seconds_left")
NAMES = {"tokens_per_second": "tokens/s", "seconds_left": "left"}


class RunLog:
    """Writes events to `metrics.jsonl`, to standard output and to trackers, on the main process only.

    `log_format` is "tqdm" (a progress bar, with readable lines above it), "simple" (readable lines), "json" (the lines
    of the file) or "none". The thread that writes checkpoints logs, too: a lock keeps lines whole and in one order.
    """

    def __init__(self, accelerator, folder: Path, log_format: str | None):
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        default = "tqdm" if sys.stdout.isatty() else "simple"
        self.log_format = (log_format or default) if accelerator.is_main_process else "none"
        choose(log_format)
        self.bar = self.phase = None
        self.lock = threading.RLock()

    def begin(self, step: int, validates: bool = False, tests: bool = False) -> None:
        """Drops the lines of the file after the step that the run resumes from; 0 drops all.

        With `validates`, the run first validates this step: a kill came after its validation was logged, but before
        that was saved. The logged one is dropped. With `tests`, the run scores a test split at its end, and drops what
        it logged about it before.
        """
        if not self.accelerator.is_main_process:
            return
        kept, dropped = [], ("stop", "done", *(["test"] if tests else []))
        for line in self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # an incomplete line: the run was killed
            is_repeated = validates and event["event"] == "validation" and event["step"] == step
            if event["step"] <= step and event["event"] not in dropped and not is_repeated:
                kept.append(line)
        write_lines(self.path, kept)

    def __call__(self, event: str, **values) -> None:
        if not self.accelerator.is_main_process:
            return
        line = json.dumps({"event": event, **_rounded(values)})
        with self.lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if self.log_format == "json":
                write(line)
            elif event != "done":  # the run says that in words
                self.say(_readable(event, values))
        if self.accelerator.trackers and event in ("train", "epoch", "validation", "test"):
            parts = [(key, values[key]) for key in values if isinstance(values[key], dict)]  # such as hop2 and bm25
            flat = values | {f"{key}/{name}": value for key, part in parts for name, value in part.items()}
            numbers = {f"{event}/{k}": v for k, v in flat.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(numbers, step=values.get("step"))

    def track(self, texts: dict[str, str], step: int) -> None:
        """Shows texts in Markdown by tag, in TensorBoard; other trackers get the numbers only."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else ():
            if tracker.name == "tensorboard":
                tracker.log(texts, step=step)

    def say(self, text: str) -> None:
        """Shows a text to the user, unless it is empty."""
        if not text:
            return
        with self.lock:
            if self.log_format in ("tqdm", "simple"):
                write(text)

    def say_model(self, model) -> None:
        """One line on the size of a model, what of it is trained, pooling, attention, processes and precision."""
        accelerator, total = self.accelerator, sum(parameter.numel() for parameter in model.parameters())
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        precision = accelerator.mixed_precision.replace("no", "float32")
        processes = f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
        size = f"{total:,} parameters" if trained == total else f"{trained:,} of {total:,} parameters are trained"
        poolings = [str(part.pooling_mode) for part in model.modules() if hasattr(part, "pooling_mode")]
        size += f", pooling: {' '.join(poolings)}" if poolings else ""
        size += "".join(f", {part.attends}" for part in model.modules() if hasattr(part, "attends"))
        self.say(f"{size}, {processes} on {accelerator.device.type}, {precision}")

    def warn(self, text: str) -> None:
        write(f"warning: {text}", sys.stderr)

    def start_epoch(self, epoch: int, done: int, steps: int) -> None:
        self.end_epoch()
        if self.log_format == "none":
            return
        if has_bars():
            self.bar = open_bar(total=steps, initial=done, desc=f"epoch {epoch + 1}", unit="step")
        else:
            self.phase = Phase("trained", f"steps of epoch {epoch + 1}", steps - done).begin()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()
        elif self.phase is not None:
            self.phase.advance()

    def end_epoch(self) -> None:
        if self.bar is not None:
            close_bar(self.bar)
            self.bar = None


def score_table(scores: dict[str, dict], columns: tuple[str, ...]) -> str:
    """A plain-text table with a row for each name and a column for each score; counts stay whole numbers."""
    width = max(map(len, scores))
    lines = [" " * width + "".join(f"  {column:>7}" for column in columns)]
    for name, row in scores.items():
        cells = [_cell(row.get(column)).rjust(max(len(column), 7)) for column in columns]
        lines.append(f"{name:<{width}}" + "".join(f"  {cell}" for cell in cells))
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value}" if isinstance(value, int) else f"{value:.1f}"


def _rounded(value):
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _readable(event: str, values: dict) -> str:
    """The line of an event for a terminal. Lines of scores are cut to WIDTH columns; the file has all of them."""
    values = {name: value for name, value in values.items() if value is not None}
    if event in ("train", "epoch"):
        values = {name: values[name] for name in SHORT if name in values}
    line = event
    for name, value in values.items():
        part = f" | {NAMES.get(name, name)} {_shown(name, value)}"
        if event in ("train", "epoch", "validation", "test") and len(line + part) > WIDTH:
            break
        line += part
    return line


def _shown(name: str, value) -> str:
    if name == "seconds_left":
        return str(timedelta(seconds=round(value)))
    if isinstance(value, dict):
        return " ".join(f"{inner} {_shown(inner, number)}" for inner, number in value.items())
    if name == "tokens_per_second":
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Meters:
    """Sums over the steps of a log interval or an epoch, on this process. `read` adds up all processes and resets.

    `saved` is what `state` returned when a checkpoint was saved.
    """

    def __init__(self, accelerator, saved: dict | None = None):
        self.reset()
        if saved:
            keeps = accelerator.is_main_process
            self.sums = {name: value if keeps else 0.0 for name, value in saved["sums"].items()}  # all have the names
            if keeps:
                self.gnorm, self.clipped, self.steps, self.seconds = (
                    saved[name] for name in ("gnorm", "clipped", "steps", "seconds")
                )

    def reset(self) -> None:
        self.sums: dict[str, float | torch.Tensor] = {}
        self.gnorm, self.clipped, self.steps, self.seconds = 0.0, 0, 0, 0.0

    def add(self, **sums) -> None:
        """Adds numbers, and tensors of one number where they are: the host does not wait for them."""
        for name, value in sums.items():
            value = value.double() if torch.is_tensor(value) else float(value)
            self.sums[name] = self.sums.get(name, 0.0) + value

    def add_step(self, gnorm: float, max_grad_norm: float) -> None:
        """Counts one optimizer step with its gradient norm, which is the same on all processes."""
        self.steps += 1
        self.gnorm += gnorm
        self.clipped += gnorm > max_grad_norm > 0

    def total(self, accelerator) -> dict[str, float]:
        """Sums over all processes, which must all have added the same names."""
        waiting = {name: value for name, value in self.sums.items() if torch.is_tensor(value)}
        if waiting:  # the only place where the host waits for them, for all at once
            self.sums |= zip(waiting, torch.stack(list(waiting.values())).tolist(), strict=True)
        names = sorted(self.sums)
        if accelerator.num_processes == 1 or not names:
            return self.sums
        return dict(zip(names, add_up([self.sums[name] for name in names]), strict=True))

    def state(self, accelerator) -> dict:
        """What a checkpoint holds. After a resume the main process has the sums of all."""
        sums = self.total(accelerator)
        return {**vars(self), "sums": dict(sums)}

    def read(self, accelerator) -> dict:
        """The meters of a log line. `loss` and `nll` become means per token or pair in base 2, as in fairseq.

        Needs the sums `loss`, `count`, `examples`, `tokens` and `slots` (tokens with padding). Dropped steps are not in
        them.
        """
        total, steps, seconds = self.total(accelerator), max(self.steps, 1), max(self.seconds, 1e-9)
        line = {}
        if total.get("count"):
            line["loss"] = total["loss"] / total["count"] / np.log(2)
            if "nll" in total:
                line["nll_loss"] = total["nll"] / total["count"] / np.log(2)
                line["ppl"] = 2 ** line["nll_loss"]
            if "right" in total:
                line["accuracy"] = total["right"] / total["count"]
        tokens, examples = total.get("tokens", 0), total.get("examples", 0)
        line |= {
            "gnorm": self.gnorm / steps,
            "clip": self.clipped / steps,
            "examples": int(examples),
            "tokens": int(tokens),
            "tokens_per_second": tokens / seconds,
            "tokens_per_step": tokens / steps,
            "padding": 1 - tokens / max(total.get("slots", 0), 1),
            "steps_per_second": self.steps / seconds,
            "examples_per_step": examples / steps,
            "memory_gb": peak_memory_gb(accelerator),
            "train_wall": self.seconds,
        }
        self.reset()
        return line


def peak_memory_gb(accelerator) -> float:
    """Peak memory of this process in gigabytes: of the GPU, or resident memory on a processor."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
