"""How a script starts and ends: checks of the launch, precision, the run folder, exit codes."""

import errno
import json
import os
import platform
import shlex
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from accelerate.utils import DistributedType, parse_flag_from_env, set_seed

from utils.errors import Interrupted, UsageError
from utils.training.checkpoint_files import WRITER
from utils.training.memory import keep_memory


def run_script(main) -> None:
    """Runs `main()` and ends the process with an exit code.

    0: done. 2: unusable arguments, data or checkpoint. 3: diverged. 74: a write failed. 128 + n: signal n. 1: any other
    error. Only the last prints a traceback; the others print one readable line.
    """
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        code = 74 if is_full else code
        if code == 1:
            traceback.print_exc()
        elif os.environ.get("RANK", "0") == "0" or code == 74:  # most errors occur on every process
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
            text = str(error) if isinstance(error, Interrupted) else text
            print(f"{Path(sys.argv[0]).name}: {text}", file=sys.stderr)
    _exit(code)


def end_run(accelerator, code: int = 0) -> None:
    """Ends all processes together. Call it as the last line of `main`.

    Returning from `main` would destroy the process group, and two gloo processes then sometimes hang or abort.
    """
    accelerator.wait_for_everyone()
    accelerator.end_training()
    _exit(code)


def _exit(code: int) -> None:
    for thread in threading.enumerate():  # a checkpoint may still be being written
        if thread.name == WRITER:
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(accelerator, args) -> Path:
    """Checks the launch, sets threads and seeds, and makes the run folder, which it returns.

    Raises UsageError if the started processes do not form a group, or the folder cannot be written.
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
    """The value of `--mixed_precision`, else what `accelerate` was told, else bf16 where that is faster.

    bf16 is several times faster for pretrained models if the GPU or processor has instructions for it. The small models
    built from scratch are faster in float32. FSDP and DeepSpeed use their own configuration.
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
