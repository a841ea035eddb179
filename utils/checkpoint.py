"""Checkpoints that a kill, a full disk or a flipped bit cannot break, and that execute nothing when they are read.

    checkpoints/step_00000400/   model.safetensors, optimizer.safetensors, state.json, fingerprint.json, manifest.json
    checkpoints/last, best       links to such folders

A folder of that name is always complete: it is written beside, synced and renamed. Its manifest holds size and SHA-256
of each file and is checked before anything is used. Only safetensors and JSON are read.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate.utils import broadcast, broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor

from utils.arguments import UsageError

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "fingerprint.json")
TEMPORARY = ".tmp_"  # begins the name of what is being written or removed
BLOCK = 2**23  # bytes written at once
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
WRITER = "checkpoint writer"  # name of the thread that calls `save`
REPLACED = ".old"  # ends the name of a checkpoint whose successor of the same step is about to take its place


class CheckpointError(Exception):
    """A write failed, as on a full disk; what had been written before is intact."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be used; names the folder, the file and what is wrong with it."""


# ----------------------------------------------------------------------------------------------------------------------
# tensors of model and optimizer: the same names and values for one process, DDP and FSDP2


def gather_tensors(accelerator, model, optimizer, into=None) -> dict[str, dict[str, torch.Tensor]]:
    """Copies of all tensors on the main process's CPU, {"model": {...}, "optimizer": {...}}; {} on other processes.

    Called on all processes. Training may go on while the copies are written. Tied weights are there once. Of the
    optimizer there is each parameter's state as "parameter/entry", and the groups' learning rates, which schedulers
    move; the groups' other settings are those of the flags. `into`: earlier copies, whose memory is used again.
    """
    named = _named_tensors(accelerator, model)
    names = {id(tensor): name for name, tensor in named.items()}
    optimizer = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    states = {
        f"{names[id(parameter)]}/{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
        if value is not None
    }
    gathered = {}
    for group, tensors in {"model": named, "optimizer": states}.items():
        memory = (into or {}).get(group, {})
        gathered[group] = {name: _gather(accelerator, tensor, memory.get(name)) for name, tensor in tensors.items()}
    if not accelerator.is_main_process:
        return {}
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    gathered["optimizer"]["learning_rates"] = torch.tensor(rates, dtype=torch.float64)
    return gathered


def restore_tensors(accelerator, model, optimizer, tensors, *, with_optimizer: bool = True) -> None:
    """Puts gathered tensors back, bit for bit; called on all processes, `tensors` matters on the main one only.

    Raises UsageError if they are those of another model.
    """
    named = _named_tensors(accelerator, model)
    shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
    saved = [{name: tuple(tensor.shape) for name, tensor in tensors.get("model", {}).items()}]
    broadcast_object_list(saved)
    if differing := sorted(name for name in shapes | saved[0] if shapes.get(name) != saved[0].get(name)):
        name = differing[0]
        raise UsageError(
            f"the checkpoint is of another model: {len(differing)} tensors differ, "
            f"{name} is {saved[0].get(name, 'missing')} there and {shapes.get(name, 'missing')} here"
        )
    with torch.no_grad():
        for name, value in _from_main(accelerator, tensors.get("model", {})):
            named[name].copy_(_laid_out_as(named[name], value))
    if not with_optimizer:
        return

    optimizer = getattr(optimizer, "optimizer", optimizer)
    numbers = {id(p): number for number, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    states, rates = {}, []
    for key, value in _from_main(accelerator, tensors.get("optimizer", {})):
        if key == "learning_rates":
            rates = value.tolist()
            continue
        name, _, entry = key.rpartition("/")
        is_number = value.ndim == 0 and value.dtype in (torch.float64, torch.int64)
        state = states.setdefault(numbers[id(named[name])], {})
        state[entry] = value.item() if is_number else _laid_out_as(named[name], value.clone())
    # load_state_dict() knows on which device each entry belongs
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _named_tensors(accelerator, model) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers under the names of the unwrapped model, tied ones once."""
    # state_dict() and not named_parameters(): it makes FSDP give the shards, which the optimizer holds
    everything = accelerator.unwrap_model(model, keep_torch_compile=False).state_dict(keep_vars=True)
    first_names = {id(tensor): name for name, tensor in reversed(everything.items())}
    return {name: everything[name] for name in everything if first_names[id(everything[name])] == name}


def _gather(accelerator, value, memory: torch.Tensor | None) -> torch.Tensor | None:
    """A contiguous copy of a whole tensor, or number, on the main process's CPU; None elsewhere."""
    if isinstance(value, DTensor):
        value = value.to(value.device_mesh.device_type).full_tensor()  # from the CPU, where parameters are offloaded
    if not accelerator.is_main_process:
        return None
    if not isinstance(value, torch.Tensor):
        return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
    if memory is None or (memory.shape, memory.dtype) != (value.shape, value.dtype):
        memory = torch.empty(value.shape, dtype=value.dtype)
    return memory.copy_(value.detach())  # into pages that are there already: several times faster than into new ones


def _from_main(accelerator, tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The main process's tensors, one by one, on all processes."""
    if accelerator.num_processes == 1:
        yield from tensors.items()
        return
    kinds = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors.items()]]
    broadcast_object_list(kinds)
    for name, shape, dtype in kinds[0]:
        if accelerator.is_main_process:
            tensor = tensors[name].to(accelerator.device)
        else:
            tensor = torch.empty(shape, dtype=dtype, device=accelerator.device)
        yield name, broadcast(tensor)


def _laid_out_as(parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's part of `value`, if that has the shape of a sharded parameter; else `value`."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    # every process has the whole value, so nothing is sent
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


# ----------------------------------------------------------------------------------------------------------------------
# writing, on the main process


def save(checkpoints: Path, step: int, tensors, *, state: dict, fingerprint: dict, limit: int, is_best: bool) -> Path:
    """Writes a checkpoint, points `last` (and `best`) to it, then removes all but the `limit` newest; 0 keeps all.

    `state` and `fingerprint` are plain JSON (keys are strings, no tuples). What `last` or `best` point to stays. A
    checkpoint of the same step is replaced. Raises CheckpointError if a write fails.
    """
    folder = checkpoints / f"step_{step:08d}"
    temporary = checkpoints / f"{TEMPORARY}{folder.name}"
    try:
        tidy(checkpoints)
        temporary.mkdir(parents=True)
        files = {
            "model.safetensors": _safetensors(tensors["model"]),
            "optimizer.safetensors": _safetensors(tensors["optimizer"]),
            "state.json": [(json.dumps(state, indent=1) + "\n").encode()],
            "fingerprint.json": [(json.dumps(fingerprint, indent=1) + "\n").encode()],
        }
        files = {name: _write(temporary / name, parts) for name, parts in files.items()}
        (temporary / "manifest.json").write_text(_manifest({"is_best": is_best, "files": files}))
        for path in (*temporary.iterdir(), temporary):
            _sync(path)

        replaced = folder.with_name(folder.name + REPLACED)
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        _sync(checkpoints)
        _sync(checkpoints.parent)  # which may be new
        if is_best:
            _point(checkpoints / "best", folder)
        _point(checkpoints / "last", folder)  # after `best`: a `last` that lags behind tells `tidy` of a kill

        _remove(replaced)
        folders = _newest_first(checkpoints)
        kept = {*folders[: limit or None], _target(checkpoints / "last"), _target(checkpoints / "best")}
        for old in set(folders) - kept:
            _remove(old)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_failed_write(error):
            raise
        earlier = _newest_first(checkpoints)
        kept = f"the earlier one, {earlier[0].name}, is intact" if earlier else "there is no earlier one"
        raise CheckpointError(f"checkpoint {folder} could not be written: {_reason(error)}; {kept}") from error
    return folder


def tidy(checkpoints: Path) -> None:
    """Finishes what a killed `save` left undone: for the run that owns the folder, before it looks for a checkpoint."""
    for path in checkpoints.glob(TEMPORARY + "*"):
        _remove(path)
    interrupted = list(checkpoints.glob("step_*" + REPLACED))
    for replaced in interrupted:
        folder = replaced.with_suffix("")
        if folder.exists():
            _remove(replaced)
        else:
            os.rename(replaced, folder)
    newest = next(iter(_newest_first(checkpoints)), None)
    if newest and (interrupted or _target(checkpoints / "last") != newest) and not problems(newest):
        if json.loads((newest / "manifest.json").read_text())["is_best"]:
            _point(checkpoints / "best", newest)
        _point(checkpoints / "last", newest)


def publish(run_folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write(folder)` on a temporary folder and moves its files, each at once and whole, into `run_folder`.

    Raises CheckpointError if a write fails.
    """
    temporary = run_folder / f"{TEMPORARY}publish"
    try:
        _remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        for path in files:
            _sync(path)
        for path in files:
            published = run_folder / path.relative_to(temporary)
            published.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, published)
        for folder in {run_folder, *(run_folder / path.relative_to(temporary).parent for path in files)}:
            _sync(folder)
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise CheckpointError(
            f"the model could not be written to {run_folder}: {_reason(error)}; the checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_failed_write(error: Exception) -> bool:
    # safetensors and tokenizers report a full disk by errors of their own
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _safetensors(tensors: dict[str, torch.Tensor]) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file: the length of a JSON header, the header, and the tensors end to end."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # so that each is aligned
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield memoryview(tensors[name].reshape(-1).view(torch.uint8).numpy())


def _write(path: Path, parts) -> dict:
    """Writes byte strings to a new file; returns its size and digest for the manifest.

    Whole blocks go around the system's page cache where the file system lets them: filling it with gigabytes that
    nobody reads takes the processor several times as long as all the rest.
    """
    block, filled, size, digest = mmap.mmap(-1, BLOCK), 0, 0, hashlib.sha256()  # mmap: direct writes want whole pages
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        _set_direct(descriptor, True)
        for part in parts:
            while part:
                count = min(len(part), BLOCK - filled)
                block[filled : filled + count] = part[:count]
                part, filled, size = part[count:], filled + count, size + count
                if filled == BLOCK:
                    digest.update(block)
                    _write_whole(descriptor, memoryview(block))
                    filled = 0
        _set_direct(descriptor, False)  # the rest is no whole block
        digest.update(block[:filled])
        _write_whole(descriptor, memoryview(block)[:filled])
    finally:
        os.close(descriptor)
    return {"size": size, "sha256": digest.hexdigest()}


def _write_whole(descriptor: int, view: memoryview) -> None:
    try:
        view = view[os.write(descriptor, view) :]
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    if view:  # refused, or cut short where the disk is full: in the ordinary way, which works or says why
        _set_direct(descriptor, False)
    while view:
        view = view[os.write(descriptor, view) :]


def _set_direct(descriptor: int, on: bool) -> None:
    """Whether writes go around the page cache; not every system and file system can."""
    direct, flags = getattr(os, "O_DIRECT", 0), fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)


def _manifest(content: dict) -> str:
    """The text of a manifest, with a checksum of its own."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _size_and_digest(path: Path) -> dict:
    with path.open("rb") as file:
        return {"size": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _point(link: Path, folder: Path) -> None:
    temporary = link.with_name(TEMPORARY + link.name)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, link)
    _sync(link.parent)


def _target(link: Path) -> Path | None:
    return link.parent / os.readlink(link) if link.is_symlink() else None


def _remove(path: Path) -> None:
    """Removes a folder, or what there is of it, such that no half of it keeps its name."""
    if path.is_dir() and not path.is_symlink():
        temporary = path if path.name.startswith(TEMPORARY) else path.with_name(TEMPORARY + path.name)
        os.rename(path, temporary)
        shutil.rmtree(temporary)
    else:
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# reading


def find_newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole, or None if there is none at all; `warn` hears of each damaged one.

    Raises UsageError if all are damaged.
    """
    folders = _newest_first(checkpoints)
    for folder in folders:
        if not (problem := problems(folder)):
            return folder
        warn(f"{problem}; using the previous checkpoint")
    if folders:
        raise UsageError(
            f"no checkpoint in {checkpoints} is usable, all {len(folders)} are damaged: "
            "start anew with --resume_from_checkpoint none, or in another --output_dir"
        )
    return None


def problems(folder: Path) -> str | None:
    """What is wrong with a checkpoint, naming folder and file; None if it can be used."""
    try:
        _verify(folder)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def read(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict, dict]:
    """(tensors, state, fingerprint) of a checkpoint, after checking it; raises DamagedCheckpoint."""
    state, fingerprint = _verify(folder)
    tensors = {group: load_file(folder / f"{group}.safetensors") for group in ("model", "optimizer")}
    return tensors, state, fingerprint


def _newest_first(checkpoints: Path) -> list[Path]:
    found = []
    for path in checkpoints.glob("step_*"):
        if match := re.fullmatch(rf"step_(\d+)({re.escape(REPLACED)})?", path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _verify(folder: Path) -> tuple[dict, dict]:
    """Checks a checkpoint's files against its manifest and that each can be parsed; returns state and fingerprint."""

    def damaged(problem: str) -> DamagedCheckpoint:
        return DamagedCheckpoint(f"checkpoint {folder} is damaged: {name}: {problem}")

    name = "manifest.json"
    try:
        text = (folder / name).read_text(encoding="utf-8")
        manifest = json.loads(text)
        del manifest["sha256"]
        if text != _manifest(manifest):
            raise damaged("wrong checksum")
        expected = {file: (manifest["files"][file]["size"], manifest["files"][file]["sha256"]) for file in FILES}
        for name, (size, digest) in expected.items():
            found = _size_and_digest(folder / name)
            if found["size"] != size:
                raise damaged(f"{found['size']} bytes instead of {size}")
            if found["sha256"] != digest:
                raise damaged("wrong checksum")
        contents = []
        for name in FILES:
            if name.endswith(".json"):
                contents.append(json.loads((folder / name).read_text(encoding="utf-8")))
            else:
                safe_open(folder / name, framework="pt")  # reads the header
    except DamagedCheckpoint:
        raise
    except FileNotFoundError:
        raise damaged("missing") from None
    except OSError as error:
        raise damaged(f"unreadable ({error.strerror})") from None
    except (ValueError, LookupError, TypeError, RecursionError, SafetensorError):
        raise damaged("unreadable, this is not what a checkpoint holds") from None
    state, fingerprint = contents
    return state, fingerprint
