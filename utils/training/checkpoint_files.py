"""The files of a checkpoint. A kill, a full disk or a flipped bit cannot break them, and reading them executes nothing.

    checkpoints/step_00000400/   model.safetensors, optimizer.safetensors, state.json, fingerprint.json, manifest.json
    checkpoints/last, best       links to such folders

A folder with such a name is always complete: it is written under another name, synced and renamed. The manifest holds
size and SHA-256 of each file and is checked before anything is used. Only safetensors and JSON are read.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from utils.errors import CheckpointError, DamagedCheckpoint, UsageError
from utils.files import TEMPORARY, remove, size_and_digest, sync

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "fingerprint.json")
BLOCK = 2**23  # bytes written at once
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
OF_ONE_KIND = ("adapter_*", "config.json", "model*.safetensors*")  # of a whole model, or of adapters
WRITER = "checkpoint writer"  # the name of the thread that calls `save`
REPLACED = ".old"  # ends the name of a checkpoint that a new one of the same step is about to replace


def save(
    checkpoints: Path, step: int, tensors: dict | None, *, state: dict, fingerprint: dict, limit: int, is_best: bool,
    whole: Iterator[torch.Tensor] | None = None,
) -> Path:  # fmt: skip
    """Writes a checkpoint, points `last` (and `best`) to it, and then removes old ones.

    The `limit` newest are kept (0: all), and those that `last` and `best` point to. A checkpoint of the same step is
    replaced; without `tensors` the new one keeps those of the old one. If the tensors are sharded, `whole` gives them
    whole, in the order of `file_order`, and no other is in memory at the time. `state` and `fingerprint` are JSON
    (string keys, no tuples). Raises CheckpointError if a write fails.
    """
    folder = checkpoints / f"step_{step:08d}"
    temporary = checkpoints / f"{TEMPORARY}{folder.name}"
    try:
        tidy(checkpoints)
        temporary.mkdir(parents=True)
        files = {}
        for name in ("model.safetensors", "optimizer.safetensors"):
            if tensors:
                files[name] = _write(temporary / name, _safetensors(tensors[Path(name).stem], whole))
            else:
                os.link(folder / name, temporary / name)
                files[name] = json.loads((folder / "manifest.json").read_text())["files"][name]
        for name, content in {"state.json": state, "fingerprint.json": fingerprint}.items():
            files[name] = _write(temporary / name, [(json.dumps(content, indent=1) + "\n").encode()])
        (temporary / "manifest.json").write_text(_manifest({"is_best": is_best, "files": files}))
        for path in (*temporary.iterdir(), temporary):
            sync(path)

        replaced = folder.with_name(folder.name + REPLACED)
        if folder.exists():
            os.rename(folder, replaced)
        os.rename(temporary, folder)
        sync(checkpoints)
        sync(checkpoints.parent)  # which may be new
        if is_best:
            _point(checkpoints / "best", folder)
        _point(checkpoints / "last", folder)  # after `best`: if `last` lags behind, `tidy` knows of a kill

        remove(replaced)
        folders = _newest_first(checkpoints)
        kept = {*folders[: limit or None], _target(checkpoints / "last"), _target(checkpoints / "best")}
        for old in set(folders) - kept:
            remove(old)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_failed_write(error):
            raise
        earlier = _newest_first(checkpoints)
        kept = f"the earlier one, {earlier[0].name}, is intact" if earlier else "there is no earlier one"
        raise CheckpointError(f"checkpoint {folder} could not be written: {_reason(error)}; {kept}") from error
    return folder


def tidy(checkpoints: Path) -> None:
    """Finishes what a killed `save` left undone. Only the run that owns the folder calls it."""
    for path in checkpoints.glob(TEMPORARY + "*"):
        remove(path)
    for link in (checkpoints / "last", checkpoints / "best"):
        if link.is_dir() and not link.is_symlink():  # the run was copied with its links resolved (cp -rL)
            manifest = (link / "manifest.json").read_bytes()
            same = [path for path in _newest_first(checkpoints) if (path / "manifest.json").read_bytes() == manifest]
            remove(link)
            if same:
                _point(link, same[0])
    interrupted = list(checkpoints.glob("step_*" + REPLACED))
    for replaced in interrupted:
        folder = replaced.with_suffix("")
        if folder.exists():
            remove(replaced)
        else:
            os.rename(replaced, folder)
    newest = next(iter(_newest_first(checkpoints)), None)
    if newest and (interrupted or _target(checkpoints / "last") != newest) and not problems(newest):
        if json.loads((newest / "manifest.json").read_text())["is_best"]:
            _point(checkpoints / "best", newest)
        _point(checkpoints / "last", newest)


def publish(run_folder: Path, write: Callable[[Path], None]) -> list[Path]:
    """Calls `write(folder)` on a temporary folder and moves each file, complete, into `run_folder`.

    Returns the paths of the files, relative to the folder. A whole model replaces adapters that were published there
    before, and the reverse: Transformers would use both. Raises CheckpointError if a write fails.
    """
    temporary = run_folder / f"{TEMPORARY}publish"
    try:
        remove(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        for path in files:
            sync(path)
        for pattern in OF_ONE_KIND:
            for path in run_folder.glob(pattern):
                if temporary / path.name not in files:
                    path.unlink()
        for path in files:
            published = run_folder / path.relative_to(temporary)
            published.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, published)
        for folder in {run_folder, *(run_folder / path.relative_to(temporary).parent for path in files)}:
            sync(folder)
        return [path.relative_to(temporary) for path in files]
    except Exception as error:
        if not _is_failed_write(error):
            raise
        raise CheckpointError(
            f"the model could not be written to {run_folder}: {_reason(error)}; the checkpoints are intact"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_failed_write(error: Exception) -> bool:
    # safetensors and tokenizers have their own errors for a full disk
    return isinstance(error, OSError | SafetensorError) or "(os error " in str(error)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def file_order(tensors: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors in the order in which a file holds them, so that each is aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _safetensors(tensors: dict[str, torch.Tensor], whole) -> Iterator[memoryview | bytes]:
    """The bytes of a safetensors file: the length of a JSON header, the header, and the tensors end to end."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    names = file_order(tensors)
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
        tensor = tensors[name] if whole is None else next(whole)
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _write(path: Path, parts) -> dict:
    """Writes byte strings to a new file and returns its size and SHA-256 for the manifest.

    Whole blocks bypass the system's page cache where the file system allows it. Filling the cache with gigabytes that
    nobody reads costs several times the processor time of everything else here.
    """
    block, filled, size, digest = mmap.mmap(-1, BLOCK), 0, 0, hashlib.sha256()  # mmap: direct writes need aligned pages
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
        _set_direct(descriptor, False)  # the rest is less than a block
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
    if view:  # a direct write was refused or cut short: an ordinary write succeeds, or says why not
        _set_direct(descriptor, False)
    while view:
        view = view[os.write(descriptor, view) :]


def _set_direct(descriptor: int, on: bool) -> None:
    """Turns direct writes on or off, where system and file system support them."""
    direct, flags = getattr(os, "O_DIRECT", 0), fcntl.fcntl(descriptor, fcntl.F_GETFL)
    with contextlib.suppress(OSError):
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | direct if on else flags & ~direct)


def _manifest(content: dict) -> str:
    """The text of a manifest, with a checksum of its own."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _point(link: Path, folder: Path) -> None:
    temporary = link.with_name(TEMPORARY + link.name)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name)
    os.replace(temporary, link)
    sync(link.parent)


def _target(link: Path) -> Path | None:
    return link.parent / os.readlink(link) if link.is_symlink() else None


def find_newest_valid(checkpoints: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that can be used, or None if there is none. Calls `warn` for each damaged one.

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
            "start again with --resume_from_checkpoint none, or in another --output_dir"
        )
    return None


def problems(folder: Path) -> str | None:
    """What is wrong with a checkpoint, with folder and file; None if it can be used."""
    try:
        _verify(folder)
    except DamagedCheckpoint as error:
        return str(error)
    return None


def read(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict, dict]:
    """Checks a checkpoint and returns (tensors, state, fingerprint). Raises DamagedCheckpoint."""
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
    """Checks that the files of a checkpoint match its manifest and can be parsed; returns state and fingerprint."""

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
            found = size_and_digest(folder / name)
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
