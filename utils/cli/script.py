"""How a script starts and ends: checks of the launch, precision, the run folder, exit codes."""

import json
import os
import platform
import shlex
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers
from accelerate.utils import DistributedType, DynamoBackend, broadcast_object_list, parse_flag_from_env, set_seed
from filelock import FileLock, Timeout
from huggingface_hub.utils import enable_progress_bars

from utils.errors import Interrupted, UsageError, in_one_line
from utils.fast.internals import find, warn
from utils.files import choose_cache_folder, is_disk_full, write_json, write_lines
from utils.processes import connect, from_main, wait_for_all
from utils.progress import close_bars, has_bars
from utils.tables import remove_private_folder
from utils.training.checkpoint_files import WRITER
from utils.training.memory import keep_memory
from utils.training.sharding import keep_sums_exact


def run_script(main) -> None:
    """Runs `main()` and ends the process with an exit code.

    0: done. 2: unusable arguments, data or checkpoint. 3: diverged. 69: the model could not be put on the Hub. 74: a
    write failed. 128 + n: signal n. 1: another process is gone, or any other error. Only the last prints a traceback;
    the others print one readable line.
    """
    try:
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException as error:
        close_bars()
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
        code = 74 if code == 1 and is_disk_full(error) else code
        if code == 1 and is_process_lost(error):
            text = in_one_line(error).partition(". ")[0]
            print(f"{_script()}: process {os.environ.get('RANK', '0')} on {platform.node()} lost the connection to "
                  f"another process, which was killed or has failed ({text}); see what that one says, or run the same "
                  "command again, on all machines, to resume", file=sys.stderr)  # fmt: skip
        elif code == 1:
            traceback.print_exc()
        else:
            text = "interrupted" if isinstance(error, KeyboardInterrupt) else f"error: {error}"
            text = str(error) if isinstance(error, Interrupted) else text
            rank = os.environ.get("RANK", "0")
            if rank != "0" and code != 74:  # most errors occur on every process: the launcher then ends this one
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(3)
                text = f"process {rank}: {text}"
            print(f"{_script()}: {text}", file=sys.stderr)
    _exit(code)


def is_process_lost(error: BaseException) -> bool:
    """Whether an exchange failed because another process or its machine is gone."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",
            "remote process exited", "Application timeout caused pair closure")  # fmt: skip
    return isinstance(error, RuntimeError) and any(text in str(error) for text in lost)


def end_run(accelerator, code: int = 0) -> None:
    """Ends all processes together. Call it as the last line of `main`.

    Returning from `main` would destroy the process group, and two gloo processes then sometimes hang or abort.
    """
    wait_for_all()
    accelerator.end_training()
    _exit(code)


def _exit(code: int) -> None:
    for thread in threading.enumerate():  # a checkpoint may still be being written
        if thread.name == WRITER:
            thread.join()
    remove_private_folder()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(accelerator, args) -> Path:
    """Checks the launch, sets threads and seeds, and makes the run folder, which it returns.

    Raises UsageError if the started processes do not form a group, or the folder cannot be written.
    """
    if not sys.platform.startswith("linux"):
        raise UsageError("only Linux is supported; use WSL 2 on Windows, and a Linux container on a Mac")
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != accelerator.num_processes:
        raise UsageError(
            f"{started} processes were started, but they are not connected: "
            "set ACCELERATE_USE_CPU=1 to train on the CPU, or start as many processes as there are GPUs"
        )
    connect()
    if accelerator.device.type == "cpu":
        if accelerator.mixed_precision == "fp16":
            raise UsageError("fp16 needs a GPU: use --mixed_precision bf16 or no")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        threads = _user_threads() or max(1, len(os.sched_getaffinity(0)) // here)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for libraries that are imported later, such as faiss
        keep_memory()
    if getattr(accelerator, "gradient_accumulation_steps", 1) != 1:  # accelerate would divide gradients by it as well
        raise UsageError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={accelerator.gradient_accumulation_steps} in the environment: "
            "unset it and use --gradient_accumulation_steps"
        )
    _check_compiler(accelerator, getattr(args, "torch_compile", None))
    tracker = getattr(args, "report_to", None)
    if tracker and not any(find_spec(name) for name in (tracker, f"{tracker}X")):  # tensorboardX is a tensorboard
        raise UsageError(f"--report_to {tracker}: the package is not installed: pip install {tracker}")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UsageError(
            "DeepSpeed is not supported: use accelerate_configs/fsdp2.yaml, which shards the model as well"
        )
    choose_cache_folder(args.cache_dir)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if fsdp and (fsdp.fsdp_version != 2 or fsdp.cpu_ram_efficient_loading):  # each process loads the whole model first
        raise UsageError(
            "FSDP: fsdp_version must be 2 and fsdp_cpu_ram_efficient_loading false, as in accelerate_configs/fsdp2.yaml"
        )
    if fsdp and fsdp.activation_checkpointing and getattr(args, "gradient_checkpointing", False):
        raise UsageError("--gradient_checkpointing: fsdp_activation_checkpointing does the same; set only one of them")
    if args.trust_remote_code and accelerator.is_main_process:
        print("--trust_remote_code: Python code that the models bring with them is run", file=sys.stderr)
    if getattr(args, "push_to_hub", False) and (refusal := from_main(accelerator, partial(_hub_problem, args))):
        raise UsageError(refusal)
    keep_sums_exact(accelerator)
    transformers.utils.logging.disable_progress_bar()  # of models that are read, and of the Hub's downloads
    if has_bars():
        enable_progress_bars()
    set_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    folder, problem = Path(args.output_dir), [None]
    if accelerator.is_main_process:
        problem = [_claim(folder)]
    if broadcast_object_list(problem)[0]:
        raise UsageError(f"--output_dir {folder}: {problem[0]}")
    return folder


def _check_compiler(accelerator, is_asked: bool | None) -> None:
    """Raises UsageError if compiling was asked for where it can have no effect, or of accelerate.

    `is_asked` is the value of `--torch_compile`, None in a script that has no such flag.
    """
    plugin = getattr(accelerator.state, "dynamo_plugin", None)
    backend = plugin.backend if plugin else DynamoBackend.NO
    if backend != DynamoBackend.NO and not is_asked:
        remedy = "it has no effect here; leave it out" if is_asked is None else "use --torch_compile of this script"
        raise UsageError(f"--dynamo_backend {backend.value.lower()} of accelerate: {remedy}")
    if is_asked and getattr(getattr(accelerator.state, "fsdp_plugin", None), "activation_checkpointing", False):
        raise UsageError("--torch_compile has no effect with fsdp_activation_checkpointing; leave one of them out")
    if is_asked and backend in (DynamoBackend.NO, DynamoBackend.INDUCTOR):
        if accelerator.device.type == "cpu":
            raise UsageError("--torch_compile needs a GPU; leave the flag out")
        if not find_spec("triton"):
            raise UsageError("--torch_compile needs the package triton: pip install triton")


def hub_name(args) -> str:
    """The repository that `--push_to_hub` publishes the model in, with or without its owner."""
    return args.hub_model_id or os.path.basename(os.path.abspath(args.output_dir))


def _hub_problem(args) -> str | None:
    """Why `--push_to_hub` could not publish at the end, as far as that is known at the start; None if nothing is."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    later = "or leave --push_to_hub out: the same command with it publishes a finished run without training"
    try:
        validate_repo_id(hub_name(args))
    except HFValidationError as error:
        return f"--hub_model_id {hub_name(args)}: {in_one_line(error)}"
    base = args.model_name_or_path
    if args.lora_rank and not args.merge_lora and os.path.exists(base):
        return f"--push_to_hub: nobody else has the base model of the adapters, {base}; add --merge_lora"
    if constants.is_offline_mode():
        return f"--push_to_hub: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set in the environment; unset it, {later}"
    if not get_token():
        return f"--push_to_hub: no token for the Hub: log in with `hf auth login`, or set HF_TOKEN, {later}"
    return None


def _user_threads() -> int | None:
    """The number of threads that the user asked for by OMP_NUM_THREADS or MKL_NUM_THREADS; None if by neither.

    Launchers set OMP_NUM_THREADS for the processes that they start, often to 1: `accelerate launch` always, and torch's
    for several processes. What the user set is then in the launcher's own environment. Raises UsageError for a value
    that is no number of threads, and for two values that differ.
    """
    own = os.environ
    if any(name in own for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")):  # a launcher started this
        try:
            launcher = Path(f"/proc/{os.getppid()}")
            words = launcher.joinpath("cmdline").read_text(errors="replace").split("\0")
            lines = launcher.joinpath("environ").read_text(errors="replace").split("\0")
        except OSError:  # hidden: the environment of this process is all that is known
            words, lines = [], []
        is_launcher = any("accelerate" in word or "torch" in word for word in words)
        if is_launcher and not any(word.startswith("--num_cpu_threads_per_process") for word in words):
            own = dict(line.split("=", 1) for line in lines if "=" in line)
    values = {name: own[name] for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if own.get(name)}
    for name, value in values.items():
        if not value.split(",")[0].isdecimal() or int(value.split(",")[0]) < 1:  # "4,2": 4, and 2 in nested regions
            raise UsageError(f"{name}={value} in the environment: must be a whole number of at least 1")
    threads = {int(value.split(",")[0]) for value in values.values()}
    if len(threads) > 1:
        shown = " and ".join(f"{name}={value}" for name, value in values.items())
        raise UsageError(f"{shown} in the environment: PyTorch needs one number for both; unset one of them")
    return next(iter(threads), None)


def _claim(folder: Path) -> str | None:
    """Makes a run folder and locks it until this process ends. Returns the problem if it belongs to another run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _locks.setdefault(folder.resolve(), FileLock(folder / ".lock", blocking=False)).acquire()
        owner = json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("script", _script())
    except (FileNotFoundError, ValueError, AttributeError):
        return None  # no run yet
    except Timeout:
        return "another run is working in this folder; wait until it ends, or choose another folder"
    except OSError as error:
        return error.strerror or str(error)
    return None if owner == _script() else f"holds a run of {owner}; choose another folder for {_script()}"


_locks: dict[Path, FileLock] = {}  # held until the process ends


def _script() -> str:
    return Path(sys.argv[0]).name


def record_run(accelerator, args, folder: Path, say=None, step: int = 0) -> None:
    """Writes what is run, on what, into the run folder. Call it once the run has accepted flags, data and checkpoint.

    A run that is resumed at a `step` says with `say` which flags have changed. TensorBoard then hides what an earlier
    start logged after that step.
    """
    if accelerator.is_main_process:
        try:
            before = json.loads((folder / "arguments.json").read_text(encoding="utf-8")) if step else {}
        except (OSError, ValueError):
            before = {}
        changed = [name for name, value in asdict(args).items() if before.get(name, value) != value]
        if changed:
            values = ", ".join(f"--{name} {before[name]} -> {getattr(args, name)}" for name in changed)
            say(f"changed since the last start: {values}")
        write_json(folder / "arguments.json", asdict(args))
        write_lines(folder / "command.txt", [shlex.join([sys.executable, *sys.argv])])
        write_json(folder / "environment.json", environment(accelerator))
    if getattr(args, "report_to", None):
        options = {"tensorboard": {"purge_step": step + 1}}
        accelerator.init_trackers(folder.name, config=asdict(args), init_kwargs=options)


def environment(accelerator) -> dict:
    """Versions, device and processes of this run."""
    from importlib.metadata import version

    names = ["torch", "accelerate", "transformers", "datasets", "evaluate", "sentence-transformers"]
    return {
        "script": _script(),
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
    built from scratch are faster in float32. FSDP uses its own configuration.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    own = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    if args.mixed_precision or told != "no" or own or not is_pretrained:
        return args.mixed_precision
    on_gpu = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    if on_gpu:
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    has_bf16 = find("torch.cpu._is_avx512_bf16_supported")
    if has_bf16 is None:
        warn("torch.cpu._is_avx512_bf16_supported is gone", "without --mixed_precision bf16, the precision is float32")
    return "bf16" if has_bf16 and has_bf16() else None
