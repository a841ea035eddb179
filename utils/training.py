"""What both training loops share and no experiment changes: start and end, processes, signals, meters and log."""

import contextlib
import ctypes
import errno
import json
import os
import platform
import random
import resource
import shlex
import signal
import sys
import threading
import traceback
from contextlib import nullcontext
from dataclasses import asdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType, ProfileKwargs, gather_object, parse_flag_from_env, set_seed
from tqdm import tqdm

from utils.arguments import UsageError
from utils.checkpoint import WRITER, CheckpointError
from utils.rows import DataError

# ----------------------------------------------------------------------------------------------------------------------
# start and end of a script


class Diverged(Exception):
    """Training cannot go on: too many dropped steps, a loss scale under its floor, or processes that disagree."""


class Interrupted(Exception):
    """A signal came to one of the processes while no step could be finished and saved; holds its number."""

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name}; the same command goes on from here")
        self.number = number


def run_script(main) -> None:
    """Runs `main()` and ends the process with the exit code of what happened.

    0 done, 2 unusable arguments, data or checkpoint, 3 diverged, 74 a write failed, 128 + its number a signal, 1
    anything else; only the last with a traceback, the others with one readable line.
    """
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = 74 if is_full else EXIT_CODES.get(type(error), 1)
        code = 128 + error.number if isinstance(error, Interrupted) else code
        if code == 1:
            traceback.print_exc()
        elif os.environ.get("RANK", "0") == "0" or code == 74:  # most errors are met by every process alike
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
            text = str(error) if isinstance(error, Interrupted) else text
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    _exit(code)


EXIT_CODES = {UsageError: 2, DataError: 2, Diverged: 3, CheckpointError: 74, KeyboardInterrupt: 130}


def end_run(accelerator, code: int = 0) -> None:
    """Ends the processes together; called inside `main`, while all that belongs to their group still exists.

    Returning from `main` would take it apart, in which two gloo processes hang or abort now and then.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
    _exit(code)


def _exit(code: int) -> None:
    for thread in threading.enumerate():  # after an error, a checkpoint may still be on its way
        if thread.name == WRITER:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(accelerator, args) -> Path:
    """Checks the launch, sets threads and seeds, and makes the run folder with what is run on what; returns it.

    Raises UsageError where processes were started that do not know of each other, or the folder cannot be written.
    """
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UsageError(
            f"{started} processes were started but each would train alone: "
            "set ACCELERATE_USE_CPU=1 to train on the processor, or start as many processes as there are GPUs"
        )
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise UsageError("fp16 needs a GPU: use --mixed_precision bf16 or no")
        # `accelerate launch` without a configuration starts PyTorch with a single thread
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
        keep_memory()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if args.gradient_accumulation_steps != "1":
            raise UsageError("--gradient_accumulation_steps is not supported with DeepSpeed: use FSDP2, or 1")
        # DeepSpeed asks for it and uses it for messages only
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    transformers.utils.logging.disable_progress_bar()
    set_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            (folder / "arguments.json").write_text(json.dumps(asdict(args), indent=2) + "\n")
            (folder / "command.txt").write_text(shlex.join([sys.executable, *sys.argv]) + "\n")
            (folder / "environment.json").write_text(json.dumps(environment(accelerator), indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--output_dir {folder}: {error.strerror}") from error
    if getattr(args, "report_to", None):
        accelerator.init_trackers(folder.name, config=asdict(args))
    return folder


def keep_memory() -> None:
    """Makes glibc keep what tensors of a step leave free for the next step's, instead of giving it back to the system.

    Getting it again, page by page, takes a quarter of the time of training on a processor.
    """
    with contextlib.suppress(AttributeError, OSError):  # other systems' libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def give_back_memory() -> None:
    """Returns to the system what is free in the heap, if the process holds half as much again as a step needs.

    Called after each step: left alone, batches of many shapes break the heap into ever more pieces, and done each time,
    getting it again costs. What a step needs is the most that the process held after a step that began without any.
    """
    with contextlib.suppress(AttributeError, OSError):  # other systems
        held = int(Path("/proc/self/statm").read_text().split()[1])  # pages
        if _heap["is_fresh"]:
            _heap["needed"], _heap["is_fresh"] = max(_heap["needed"], held), False
        elif held > 1.5 * _heap["needed"]:
            ctypes.CDLL(None).malloc_trim(0)
            _heap["is_fresh"] = True


_heap = {"needed": 0, "is_fresh": True}


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


def precision(args, is_pretrained: bool) -> str | None:
    """`--mixed_precision`; without it what `accelerate` was told, or bf16 if that is "no" or nothing, and it pays.

    It does for pretrained models, several times over, where GPU or processor have instructions for it; the small
    models built from scratch lose more in the casting. FSDP and DeepSpeed go by their own configuration.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    own = any(os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    if args.mixed_precision or told != "no" or own or not is_pretrained:
        return args.mixed_precision
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    has_bf16 = (
        torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else torch.cpu._is_avx512_bf16_supported()
    )
    return "bf16" if has_bf16 else None


def hardware() -> str:
    """Date, processor or GPU, cores and torch's version in one line: the head of every table of measurements."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    if not torch.cuda.is_available() and Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device = names[0].partition(": ")[2] if names else device
    cores = len(os.sched_getaffinity(0))
    return f"{date.today()}, {device}, {cores} cores, torch {torch.__version__}"


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds dropout by (seed, step, process), so that a step's randomness does not depend on what ran before it."""
    mixed = int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint32)[0])
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - libraries draw from the global generator
    torch.manual_seed(mixed)


def profiler(accelerator, args, run_folder: Path):
    """`accelerator.profile()` over five steps with `--profile`, the trace in `run_folder/profile`; else nothing."""
    if not args.profile:
        return nullcontext()
    activities = ["cpu", "cuda"] if accelerator.device.type == "cuda" else ["cpu"]
    schedule = {"wait": 1, "warmup": 1, "active": 3, "repeat": 1}
    return accelerator.profile(
        ProfileKwargs(activities=activities, schedule_option=schedule, output_trace_dir=str(run_folder / "profile"))
    )


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """AdamW's groups: no weight decay on biases and norms, which are the parameters of one dimension."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


# ----------------------------------------------------------------------------------------------------------------------
# the step on several processes


def is_sharded(accelerator) -> bool:
    """Whether FSDP or DeepSpeed owns the gradients; otherwise (one process, DDP) each process holds all of them."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def local_gradients(accelerator, model):
    """No exchange of gradients within a micro-batch: `average_gradients` does it once, when all processes are done."""
    return nullcontext() if is_sharded(accelerator) else accelerator.no_sync(model)


def average_gradients(accelerator, model) -> None:
    """Averages the gradients over the processes, in buckets of 64 MiB."""
    if accelerator.num_processes == 1 or is_sharded(accelerator):
        return
    bucket, size = [], 0
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    for number, gradient in enumerate(gradients, start=1):
        bucket.append(gradient)
        size += gradient.nbytes
        if size >= 2**26 or number == len(gradients):
            flat = accelerator.reduce(torch.cat([g.flatten() for g in bucket]), "mean")
            for g, averaged in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                g.copy_(averaged.view_as(g))
            bucket, size = [], 0


def any_process(accelerator, condition: bool) -> bool:
    """Whether the condition holds on any process."""
    if accelerator.num_processes == 1:
        return condition
    return accelerator.reduce(torch.tensor(float(condition), device=accelerator.device), "sum").item() > 0


def check_grad_norm(accelerator, gnorm: float) -> None:
    """Diverged if the processes' gradient norms differ by more than 1e-6 of their size: they train different models."""
    _check_equal(accelerator, gnorm, "the gradient norm")


def check_weight_norm(accelerator, model) -> None:
    """Diverged if the processes' weights differ in norm by more than 1e-6: averaged gradients do not show it."""
    if accelerator.num_processes > 1 and not is_sharded(accelerator):
        norms = torch._foreach_norm([parameter.detach() for parameter in model.parameters()])
        _check_equal(accelerator, float(torch.stack(norms).double().norm()), "the norm of the weights")


def _check_equal(accelerator, value: float, name: str) -> None:
    if accelerator.num_processes == 1:
        return
    values = accelerator.gather(torch.tensor([value], dtype=torch.float64, device=accelerator.device)).tolist()
    if not max(values) - min(values) <= 1e-6 * max(values) and all(map(np.isfinite, values)):
        raise Diverged(f"the processes disagree on {name}: {values}")


def check_loss_scale(accelerator, args) -> None:
    """Diverged if the loss scale of fp16 has fallen under its floor."""
    if accelerator.scaler and accelerator.scaler.get_scale() < args.min_loss_scale:
        raise Diverged(f"the loss scale fell under --min_loss_scale {args.min_loss_scale}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the exception says that the memory of the GPU or the machine ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@contextlib.contextmanager
def together(accelerator):
    """Raises OutOfMemoryError on every process if memory ran out on any of them within it.

    So they leave together, and none waits for another in an exchange that follows.
    """
    error = None
    try:
        yield
    except (RuntimeError, MemoryError) as caught:
        if not is_out_of_memory(caught):
            raise
        error = caught
    if any_process(accelerator, error is not None):
        raise torch.OutOfMemoryError("memory ran out on this process or another") from error


class NanDetector:
    """Within it, a forward pass notes the first module whose output is not finite; `culprit` names it in words.

    Where all outputs are finite, it names the first parameter whose gradient is not.
    """

    def __init__(self, accelerator, model):
        self.accelerator, self.model, self.module = accelerator, accelerator.unwrap_model(model), None

    def __enter__(self):
        self.hooks = [module.register_forward_hook(self._look(name)) for name, module in self.model.named_modules()]
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()

    def _look(self, name: str):
        def hook(module, inputs, output):
            tensors = output if isinstance(output, tuple) else (output,)
            if not self.module and any(torch.is_tensor(t) and not torch.isfinite(t).all() for t in tensors):
                self.module = f"the output of {name or 'the model'} ({type(module).__name__}) is not finite"

        return hook

    @property
    def culprit(self) -> str:
        for name, parameter in self.model.named_parameters():
            if not self.module and parameter.grad is not None and not torch.isfinite(parameter.grad).all():
                self.module = f"the gradient of {name} is not finite"
        found = gather_object([self.module]) if self.accelerator.num_processes > 1 else [self.module]
        return next((module for module in found if module), "not seen again")


# ----------------------------------------------------------------------------------------------------------------------
# signals


class Signals:
    """Notes SIGTERM, SIGINT and SIGUSR1, for the loop to save and leave; a second SIGINT leaves at once.

    Exit codes are 128 + the signal's number.
    """

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received: int | None = None
        self.was_interrupted = False
        for number in self.NUMBERS:
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and self.was_interrupted:
            os._exit(130)
        self.was_interrupted |= number == signal.SIGINT
        self.received = self.received or number

    def agree(self, accelerator, count=0) -> tuple[int, int | None]:
        """The sum of `count` over the processes and the signal that any of them received, in one exchange."""
        noted = [float(self.received == number) for number in self.NUMBERS]
        sums = torch.tensor([float(count), *noted], dtype=torch.float64 if accelerator.device.type == "cpu" else None)
        count, *noted = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return int(count), next((n for n, times in zip(self.NUMBERS, noted, strict=True) if times), None)

    def poll(self, accelerator) -> None:
        """Raises Interrupted on all processes if any of them received a signal."""
        if received := self.agree(accelerator)[1]:
            raise Interrupted(received)


# ----------------------------------------------------------------------------------------------------------------------
# log and meters


class RunLog:
    """Writes events to `metrics.jsonl`, to standard output and to trackers; on the main process only.

    `log_format`: "tqdm" (a progress bar, and readable lines above it), "simple" (readable lines), "json" (the same
    lines as the file) or "none". `begin(step)` forgets what a run that is gone on with had logged after that step.
    The thread that writes checkpoints logs too: a line is written whole, in the same order everywhere.
    """

    def __init__(self, accelerator, folder: Path, log_format: str | None):
        self.accelerator, self.path = accelerator, folder / "metrics.jsonl"
        default = "tqdm" if sys.stdout.isatty() else "simple"
        self.log_format = (log_format or default) if accelerator.is_main_process else "none"
        self.bar = None
        self.lock = threading.RLock()

    def begin(self, step: int) -> None:
        if not self.accelerator.is_main_process:
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if step and self.path.exists() else []:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # cut short when the run was killed
            if event["step"] <= step and event["event"] not in ("stop", "done"):
                kept.append(line + "\n")
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(self.path)

    def __call__(self, event: str, **values) -> None:
        if not self.accelerator.is_main_process:
            return
        line = json.dumps({"event": event, **_rounded(values)})
        with self.lock:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            if self.log_format == "json":
                print(line, flush=True)
            else:
                self.say(" | ".join([event, *(f"{name} {_shown(value)}" for name, value in values.items())]))
        if self.accelerator.trackers and event in ("train", "epoch", "validation"):
            numbers = {f"{event}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            self.accelerator.log(numbers, step=values.get("step"))

    def say(self, text: str) -> None:
        with self.lock:
            if self.log_format == "tqdm":
                tqdm.write(text)  # above the bar, if there is one
            elif self.log_format == "simple":
                print(text, flush=True)

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def start_epoch(self, epoch: int, done: int, steps: int) -> None:
        if self.log_format == "tqdm":
            self.bar = tqdm(total=steps, initial=done, desc=f"epoch {epoch + 1}", unit="step", leave=False)

    def advance(self, **values) -> None:
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(values, refresh=False)

    def end_epoch(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


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
    """Sums over the steps of a log interval or an epoch, on this process; `read` adds up all processes, then resets.

    `saved` is what `state` gave for a checkpoint.
    """

    def __init__(self, accelerator, saved: dict | None = None):
        self.reset()
        if saved and accelerator.is_main_process:
            self.sums, self.gnorm, self.clipped, self.steps, self.seconds = (
                saved[name] for name in ("sums", "gnorm", "clipped", "steps", "seconds")
            )

    def reset(self) -> None:
        self.sums: dict[str, float] = {}
        self.gnorm, self.clipped, self.steps, self.seconds = 0.0, 0, 0, 0.0

    def add(self, **sums) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value)

    def add_step(self, gnorm: float, max_grad_norm: float, seconds: float) -> None:
        """Counts one optimizer step with its gradient norm, the same on all processes."""
        self.steps += 1
        self.gnorm += gnorm
        self.clipped += gnorm > max_grad_norm > 0
        self.seconds += seconds

    def total(self, accelerator) -> dict[str, float]:
        """The sums over all processes; every process must have added the same names."""
        names = sorted(self.sums)
        if accelerator.num_processes == 1 or not names:
            return self.sums
        exact = torch.float64 if accelerator.device.type in ("cpu", "cuda") else torch.float32
        values = torch.tensor([self.sums[name] for name in names], dtype=exact, device=accelerator.device)
        return dict(zip(names, accelerator.reduce(values, "sum").tolist(), strict=True))

    def state(self, accelerator) -> dict:
        """What a checkpoint holds; the main process goes on with all processes' sums, the others with none."""
        sums = self.total(accelerator)
        return {**vars(self), "sums": dict(sums)}

    def read(self, accelerator) -> dict:
        """The meters of a log line; `loss` and `nll` become means per token or pair in base 2, as fairseq logs them.

        Expects the sums `loss`, `count`, `examples`, `tokens` and `slots` (tokens with padding); steps that were
        dropped are in none of them.
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
    """Peak memory of this process: of the GPU, or resident on the processor; in gigabytes."""
    if accelerator.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
