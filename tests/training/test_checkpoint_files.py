"""Checkpoints: nothing a kill, damage or a full disk can do loses one, and reading one executes nothing.

Started as a script by two processes, this file trains and restores under DDP and FSDP2.
"""

import io
import json
import math
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from transformers import BartConfig, BartForConditionalGeneration

from utils.cli.script import end_run
from utils.errors import CheckpointError, DamagedCheckpoint, UsageError
from utils.files import size_and_digest
from utils.training import checkpoint_files, sharding
from utils.training.checkpoint_files import (
    DTYPES,
    FILES,
    _manifest,
    find_newest_valid,
    problems,
    publish,
    read,
    save,
    tidy,
)
from utils.training.checkpoints import Checkpoints
from utils.training.loop_state import LoopState
from utils.training.sharding import frozen_digest, gather_tensors, keep_sums_exact, restore_tensors
from utils.training.step import parameter_groups

FILES = (*FILES, "manifest.json")


# ----------------------------------------------------------------------------------------------------------------------
# what the tests share


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some_tensors(seed: int, size: int = 1000) -> dict:
    values = torch.randn(3, size, generator=torch.Generator().manual_seed(seed))
    return {"model": {"w": values[0]}, "optimizer": {"w/exp_avg": values[1], "w/exp_avg_sq": values[2]}}


def save_step(checkpoints: Path, step: int, *, tensors=None, limit: int = 0, is_best: bool = False) -> Path:
    return save(checkpoints, step, tensors or some_tensors(step), state={"step": step}, fingerprint={"seed": 42},
                limit=limit, is_best=is_best)  # fmt: skip


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir())


def no_warning(text: str) -> None:
    raise AssertionError(text)


def small_bart(seed: int):
    """A BART with its four tied weights, and AdamW with two groups."""
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=101, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=33, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    model = BartForConditionalGeneration(config)
    return model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True)


def train(accelerator, model, optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(100 * step + accelerator.process_index)
        tokens = torch.randint(3, 100, (2, 8))
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9


def assert_equal(tensors: dict, others: dict) -> None:
    assert tensors.keys() == others.keys()
    for group in tensors:
        assert tensors[group].keys() == others[group].keys()
        for name, tensor in tensors[group].items():
            assert tensor.dtype == others[group][name].dtype
            assert torch.equal(tensor, others[group][name]), name


# ----------------------------------------------------------------------------------------------------------------------
# bit-exact round trips


def check_resuming(accelerator, prepare, checkpoints: Path) -> None:
    """Six steps without a break give the same as three, a checkpoint, another model restored from it, and three."""
    model, optimizer = prepare(*small_bart(seed=1))
    model.train()
    train(accelerator, model, optimizer, range(3))
    halfway = gather_tensors(accelerator, model, optimizer)
    if accelerator.is_main_process:
        assert "model.shared.weight" in halfway["model"] and "lm_head.weight" not in halfway["model"]
        save_step(checkpoints, 3, tensors=halfway)
    train(accelerator, model, optimizer, range(3, 6))
    uninterrupted = gather_tensors(accelerator, model, optimizer)

    model, optimizer = prepare(*small_bart(seed=2))
    model.train()
    tensors = read(checkpoints / "last")[0] if accelerator.is_main_process else {}
    restore_tensors(accelerator, model, optimizer, tensors)
    assert_equal(gather_tensors(accelerator, model, optimizer), halfway)
    train(accelerator, model, optimizer, range(3, 6))
    assert_equal(gather_tensors(accelerator, model, optimizer), uninterrupted)


def check_frozen(accelerator, prepare, folder: Path) -> None:
    """What is not trained is in no checkpoint; its checksum, which training leaves as it is, goes to a file."""

    def frozen_bart(seed: int):
        model, _ = small_bart(seed)
        model.model.encoder.layers.requires_grad_(False)
        return prepare(model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True))

    model, optimizer = frozen_bart(seed=1)
    model.train()
    before = frozen_digest(accelerator, model)
    train(accelerator, model, optimizer, range(2))
    tensors = gather_tensors(accelerator, model, optimizer)
    digests = [before, frozen_digest(accelerator, model), frozen_digest(accelerator, frozen_bart(seed=2)[0])]
    assert frozen_digest(accelerator, prepare(*small_bart(seed=1))[0]) is None
    model, optimizer = frozen_bart(seed=1)
    restore_tensors(accelerator, model, optimizer, tensors)
    assert_equal(gather_tensors(accelerator, model, optimizer), tensors)
    if accelerator.is_main_process:
        assert digests[0] == digests[1] != digests[2]
        assert not [name for name in tensors["model"] if name.startswith("model.encoder.layers.")]
        assert {"final_logits_bias", "model.shared.weight"} < tensors["model"].keys()
        assert not [name for name in tensors["optimizer"] if name.startswith("model.encoder.layers.")]
        folder.mkdir(exist_ok=True)
        (folder / "digest").write_text(before)


def test_one_process_resumes_bit_exactly(tmp_path):
    accelerator = Accelerator(cpu=True)
    check_resuming(accelerator, accelerator.prepare, tmp_path)
    check_frozen(accelerator, accelerator.prepare, tmp_path)


def worker(folder: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    check_resuming(accelerator, accelerator.prepare, folder / "ddp")
    check_frozen(accelerator, accelerator.prepare, folder / "ddp")

    def shard(model, optimizer):  # what accelerator.prepare() does with FSDP2, which it refuses to do on the CPU
        mesh = init_device_mesh("cpu", (2,))
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers, model):
            fully_shard(layer, mesh=mesh)
        return model, torch.optim.AdamW(parameter_groups(model, 0.1), lr=1e-3, fused=True)

    check_resuming(accelerator, shard, folder / "fsdp")
    check_frozen(accelerator, shard, folder / "fsdp")
    check_streaming(accelerator, shard, folder / "streamed")
    check_outputs(fully_shard, init_device_mesh("cpu", (2,)))
    end_run(accelerator)


def check_streaming(accelerator, shard, folder: Path) -> None:
    """A sharded model is written tensor by tensor. A failed write leaves no process waiting."""
    model, optimizer = shard(*small_bart(seed=1))
    model.train()
    train(accelerator, model, optimizer, range(2))
    expected = gather_tensors(accelerator, model, optimizer)
    accelerator.state.distributed_type = DistributedType.FSDP
    args = SimpleNamespace(checkpoints_total_limit=0, decisive=dict)
    checkpoints = Checkpoints(accelerator, args, folder, lambda *event, **values: None, SimpleNamespace(received=None),
                              model=model, optimizer=optimizer, scheduler=SimpleNamespace(state_dict=dict), data="",
                              shape=lambda epoch: {})  # fmt: skip
    gathered, gather = [], sharding._gather

    def watched(*arguments):
        assert sum(tensor() is not None for tensor in gathered) <= 1
        tensor = gather(*arguments)
        gathered.append(weakref.ref(tensor) if tensor is not None else lambda: None)
        return tensor

    with mock.patch.object(sharding, "_gather", watched):
        checkpoints.save(LoopState(step=1), {}, is_best=False)
        checkpoints.wait()
        count = len(gathered)
        assert count == len(expected.get("model", gathered)) + len(expected.get("optimizer", ()))
        with mock.patch.object(checkpoint_files, "_write_whole", side_effect=OSError(28, "No space left on device")):
            checkpoints.save(LoopState(step=2), {}, is_best=False)
            with pytest.raises(CheckpointError, match="No space left on device"):
                checkpoints.wait()
        assert len(gathered) == 2 * count  # to the end, on both processes
    if accelerator.is_main_process:
        assert names(folder / "checkpoints") == ["last", "step_00000001"]
        assert_equal(read(folder / "checkpoints" / "last")[0], expected)
    accelerator.state.distributed_type = DistributedType.MULTI_CPU


class SumOfLosses(torch.nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs).sum() * 0 + torch.tensor(24934.0)


def check_outputs(fully_shard, mesh) -> None:
    """A sum of losses comes back as it was computed, with accelerate's policy for bf16 as the scripts change it."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    plugin.set_mixed_precision("bf16")
    sums = []
    for change in (lambda accelerator: None, keep_sums_exact):
        change(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin)))
        model = SumOfLosses(4, 4)
        fully_shard(model, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
        sums.append(model(torch.ones(4)).item())
    assert sums == [24960.0, 24934.0]


def test_two_processes_resume_bit_exactly_under_ddp_and_fsdp2_and_one_process_reads_what_they_wrote(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    project = str(Path(__file__).parents[2])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": project, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    accelerator = Accelerator(cpu=True)
    for kind in ("ddp", "fsdp"):
        tensors, _, _ = read(tmp_path / kind / "last")
        model, optimizer = small_bart(seed=3)
        restore_tensors(accelerator, model, optimizer, tensors)
        assert_equal(gather_tensors(accelerator, model, optimizer), tensors)
    check_frozen(accelerator, accelerator.prepare, tmp_path / "one")
    assert len({(tmp_path / kind / "digest").read_text() for kind in ("one", "ddp", "fsdp")}) == 1


def test_model_without_optimizer_leaves_the_optimizer_alone():
    accelerator = Accelerator(cpu=True)
    model, optimizer = small_bart(seed=1)
    train(accelerator, model, optimizer, range(1))
    tensors = gather_tensors(accelerator, model, optimizer)
    other, other_optimizer = small_bart(seed=2)
    restore_tensors(accelerator, other, other_optimizer, tensors, with_optimizer=False)
    assert_equal({"model": dict(other.named_parameters())}, {"model": dict(model.named_parameters())})
    assert not other_optimizer.state and other_optimizer.param_groups[0]["lr"] == 1e-3


def test_gathered_tensors_do_not_change_as_training_goes_on():
    accelerator = Accelerator(cpu=True)
    model, optimizer = small_bart(seed=1)
    tensors = gather_tensors(accelerator, model, optimizer)
    before = tensors["model"]["model.shared.weight"].clone()
    train(accelerator, model, optimizer, range(1))
    assert torch.equal(tensors["model"]["model.shared.weight"], before)


def test_parameters_that_never_had_a_gradient_and_states_that_are_numbers_come_back():
    accelerator = Accelerator(cpu=True)
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    optimizer, other_optimizer = (torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (model, other))
    optimizer.state[model.weight] = {"step": 7, "scale": 0.1}
    tensors = gather_tensors(accelerator, model, optimizer)
    restore_tensors(accelerator, other, other_optimizer, tensors)
    assert dict(other_optimizer.state) == {other.weight: {"step": 7, "scale": 0.1}}


def test_the_checkpoint_of_another_model_is_refused_in_words():
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 2)
    tensors = {"model": {"weight": torch.zeros(3, 2)}, "optimizer": {}}
    with pytest.raises(UsageError, match=r"another model: 2 tensors differ, bias is missing there and \(2,\) here"):
        restore_tensors(accelerator, model, torch.optim.SGD(model.parameters()), tensors)


def test_state_and_fingerprint_come_back_exactly(tmp_path):
    state = {
        "best": -math.inf,
        "seconds": 0.1 + 0.2,
        "schedule": {"_last_lr": [1 / 3, 5e-324]},
        "name": "é",
        "no": None,
    }
    folder = save(tmp_path, 1, some_tensors(1), state=state, fingerprint={"rows": 3}, limit=0, is_best=False)
    tensors, read_state, fingerprint = read(folder)
    assert (read_state, fingerprint) == (state, {"rows": 3})
    assert_equal(tensors, some_tensors(1))


# ----------------------------------------------------------------------------------------------------------------------
# folders and links


def test_pruning_keeps_the_newest_and_what_last_and_best_point_to(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_step(tmp_path, step, limit=2, is_best=step == 2)
    assert names(tmp_path) == ["best", "last", "step_00000002", "step_00000004", "step_00000005"]
    assert os.readlink(tmp_path / "last") == "step_00000005" and os.readlink(tmp_path / "best") == "step_00000002"


def test_limit_zero_keeps_all_and_leftovers_of_killed_saves_go(tmp_path):
    (tmp_path / ".tmp_step_00000009").mkdir()
    (tmp_path / ".tmp_last").symlink_to("nowhere")
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    assert names(tmp_path) == ["last", *(f"step_0000000{step}" for step in (1, 2, 3, 4))]


def test_a_step_saved_again_replaces_the_first(tmp_path):
    save_step(tmp_path, 1)
    save_step(tmp_path, 1, tensors=some_tensors(8))
    assert_equal(read(tmp_path / "step_00000001")[0], some_tensors(8))
    assert names(tmp_path) == ["last", "step_00000001"]


def test_no_checkpoint_is_not_an_error_and_temporaries_are_none(tmp_path):
    assert find_newest_valid(tmp_path / "absent", no_warning) is None
    (tmp_path / ".tmp_step_00000009").mkdir()
    assert find_newest_valid(tmp_path, no_warning) is None


# ----------------------------------------------------------------------------------------------------------------------
# damage


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    save_step(folder, 1)
    save_step(folder, 2)
    return folder


DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": lambda path: flip(path, path.stat().st_size * 4),
    "deleted": lambda path: path.unlink(),
    "garbage": lambda path: path.write_bytes(b"[" * 100_000),
}


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_previous_checkpoint_used(two_checkpoints, tmp_path, file, damage):
    checkpoints = shutil.copytree(two_checkpoints, tmp_path / "checkpoints", symlinks=True)
    DAMAGES[damage](checkpoints / "step_00000002" / file)
    warnings = []
    assert find_newest_valid(checkpoints, warnings.append) == checkpoints / "step_00000001"
    (warning,) = warnings
    assert str(checkpoints / "step_00000002") in warning and f" {file}: " in warning and "\n" not in warning
    assert warning.endswith("; using the previous checkpoint")
    with pytest.raises(DamagedCheckpoint, match=file):
        read(checkpoints / "step_00000002")
    with pytest.raises(DamagedCheckpoint, match=file):
        read(checkpoints / "last")


def test_every_byte_of_a_manifest_matters(two_checkpoints, tmp_path):
    folder = shutil.copytree(two_checkpoints / "step_00000002", tmp_path / "step_00000002")
    manifest = folder / "manifest.json"
    whole = manifest.read_bytes()
    for byte in range(len(whole)):
        flip(manifest, 8 * byte + byte % 8)
        assert "manifest.json" in problems(folder), byte
        manifest.write_bytes(whole)
    assert problems(folder) is None


def test_if_all_are_damaged_the_run_is_refused_with_the_remedy(two_checkpoints, tmp_path):
    checkpoints = shutil.copytree(two_checkpoints, tmp_path / "checkpoints", symlinks=True)
    (checkpoints / "step_00000001/state.json").unlink()
    shutil.rmtree(checkpoints / "step_00000002")
    (checkpoints / "step_00000002").touch()  # not even a folder
    warnings = []
    with pytest.raises(UsageError, match=r"all 2 are damaged: .*--resume_from_checkpoint none.*--output_dir"):
        find_newest_valid(checkpoints, warnings.append)
    assert len(warnings) == 2


class Payload:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("rewritten_manifest", [False, True])
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_planted_pickle_never_runs(two_checkpoints, tmp_path, form, file, rewritten_manifest):
    checkpoints = shutil.copytree(two_checkpoints, tmp_path / "checkpoints", symlinks=True)
    planted, marker = checkpoints / "step_00000002" / file, tmp_path / "marker"
    if form == "pickle":
        planted.write_bytes(pickle.dumps(Payload(marker)))
        pickle.loads(planted.read_bytes())  # noqa: S301 - it does run where something unpickles it
    else:
        torch.save(Payload(marker), planted)
        torch.load(io.BytesIO(planted.read_bytes()), weights_only=False)
    marker.unlink()
    if rewritten_manifest and file != "manifest.json":
        files = {name: size_and_digest(planted.parent / name) for name in FILES}
        (planted.parent / "manifest.json").write_text(_manifest({"is_best": False, "files": files}))
    warnings = []
    assert find_newest_valid(checkpoints, warnings.append) == checkpoints / "step_00000001"
    assert f" {file}: " in warnings[0]
    with pytest.raises(DamagedCheckpoint):
        read(planted.parent)
    assert not marker.exists()


# ----------------------------------------------------------------------------------------------------------------------
# files, and writing them while training goes on


@pytest.mark.parametrize("size", [1, 2000, 2048, 2049, 10_000])  # in 4 bytes each: around blocks of 8192 bytes
@pytest.mark.parametrize("direct", [True, False], ids=["around the page cache", "through it"])
def test_safetensors_reads_what_was_written_byte_for_byte(tmp_path, monkeypatch, size, direct):
    monkeypatch.setattr("utils.training.checkpoint_files.BLOCK", 8192)
    if not direct:
        monkeypatch.delattr(os, "O_DIRECT")
    model = {f"in {dtype}": torch.arange(7).to(dtype) for dtype in DTYPES}
    model |= {
        "number": torch.tensor(1.5),
        "none": torch.zeros(0, 3),
        "large": torch.randn(size),
        "flag": torch.ones(3, 2),
    }
    tensors = {"model": model, "optimizer": {"w": torch.randn(3)}}
    save_step(tmp_path, 1, tensors=tensors)
    assert_equal(read(tmp_path / "last")[0], tensors)


def checkpoints_of(folder: Path, model, optimizer) -> Checkpoints:
    accelerator = Accelerator(cpu=True)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    args, signals = SimpleNamespace(checkpoints_total_limit=0, decisive=dict), SimpleNamespace(received=None)
    return Checkpoints(accelerator, args, folder, lambda *event, **values: None, signals, model=model,
                       optimizer=optimizer, scheduler=scheduler, data="", shape=lambda epoch: {})  # fmt: skip


def test_training_goes_on_while_a_checkpoint_of_the_step_before_is_written(tmp_path, monkeypatch):
    model, optimizer = small_bart(seed=1)
    train(Accelerator(cpu=True), model, optimizer, range(1))
    checkpoints, may_write, plain_save = checkpoints_of(tmp_path, model, optimizer), threading.Event(), save
    slow_save = lambda *args, **kwargs: may_write.wait() and plain_save(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("utils.training.checkpoint_files.save", slow_save)
    before = model.model.shared.weight.clone()
    checkpoints.save(LoopState(step=1), {}, is_best=False)
    train(Accelerator(cpu=True), model, optimizer, range(1, 2))
    assert not (tmp_path / "checkpoints").exists()
    may_write.set()
    checkpoints.save(LoopState(step=2), {}, is_best=False)  # waits for the first one, whose memory it uses again
    assert problems(tmp_path / "checkpoints" / "step_00000001") is None
    checkpoints.wait()
    first, second = (read(tmp_path / "checkpoints" / f"step_0000000{step}")[0]["model"] for step in (1, 2))
    assert torch.equal(first["model.shared.weight"], before)
    assert torch.equal(second["model.shared.weight"], model.model.shared.weight)
    assert not torch.equal(first["model.shared.weight"], second["model.shared.weight"])


def test_a_write_that_fails_in_the_background_asks_the_loop_to_stop_and_is_raised_there(tmp_path):
    checkpoints = checkpoints_of(tmp_path, *small_bart(seed=1))
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    checkpoints.save(LoopState(step=1), {}, is_best=False)
    checkpoints.thread.join()
    assert checkpoints.signals.received
    with pytest.raises(CheckpointError, match="step_00000001 could not be written"):
        checkpoints.wait()


# ----------------------------------------------------------------------------------------------------------------------
# kills


def check_after_a_kill(checkpoints: Path, newest_steps: tuple[int, ...]) -> None:
    for folder in checkpoints.glob("step_*"):
        assert problems(folder) is None
    found = find_newest_valid(checkpoints, no_warning)
    assert read(found)[1]["step"] in newest_steps
    tidy(checkpoints)
    found = find_newest_valid(checkpoints, no_warning)
    assert found.name == f"step_{read(found)[1]['step']:08d}" == os.readlink(checkpoints / "last")
    if json.loads((found / "manifest.json").read_text())["is_best"]:
        assert os.readlink(checkpoints / "best") == found.name
    assert all(name in ("last", "best") or name.startswith("step_") for name in names(checkpoints))


@pytest.mark.parametrize("step", [3, 2], ids=["a new step", "a step saved again"])
def test_a_kill_before_any_change_to_the_disk_leaves_a_whole_checkpoint(tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    class Disk:
        def __init__(self, moment: int):
            self.left = moment

        def __call__(self, operation):
            def counted(*args, **kwargs):
                if not self.left:
                    raise Killed
                self.left -= 1
                return operation(*args, **kwargs)

            return counted

    for moment in range(1000):
        checkpoints = tmp_path / str(moment)
        save_step(checkpoints, 1, is_best=True)
        save_step(checkpoints, 2)
        disk = Disk(moment)
        with monkeypatch.context() as patch:
            for name in ("rename", "replace", "fsync", "symlink", "unlink", "mkdir", "rmdir"):
                patch.setattr(os, name, disk(getattr(os, name)))
            try:
                save_step(checkpoints, step, limit=1, is_best=True)
            except Killed:
                finished = False
            else:
                finished = True
        check_after_a_kill(checkpoints, (step,) if finished else (2, step))
        if finished:
            assert os.readlink(checkpoints / "best") == f"step_{step:08d}"
            break
    assert 20 < moment < 999


def test_ten_kills_at_random_moments_leave_whole_checkpoints(tmp_path):
    # made before the fork: torch's threads do not survive it
    tensors, moments = some_tensors(1, size=100_000), random.Random(0)

    def save_for_ever(first: int):
        for step in range(first, first + 100_000):
            save_step(tmp_path, step, tensors=tensors, limit=2, is_best=step % 2 == 0)
            save_step(tmp_path, step, tensors=tensors, limit=2, is_best=step % 2 == 0)

    step = 0
    for _ in range(10):
        process = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(step + 1,), daemon=True)
        process.start()
        while not (found := find_newest_valid(tmp_path, lambda text: None)) or int(found.name[5:13]) <= step:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        (step,) = (read(find_newest_valid(tmp_path, no_warning))[1]["step"],)
        check_after_a_kill(tmp_path, (step,))


# ----------------------------------------------------------------------------------------------------------------------
# a full disk


def write_too_much(folder: Path) -> None:
    save_file({"w": torch.zeros(10**6)}, folder / "model.safetensors")


def check_full_disk(folder: Path) -> None:
    """On a disk, or with a limit, of less than 4 MB: both kinds of writing fail in words and leave no trace."""
    checkpoints = folder / "checkpoints"
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        save_step(checkpoints, 1, tensors=some_tensors(1, size=10**6))
    save_step(checkpoints, 1, is_best=True)
    for size in (1000, 10**6):  # the first file fits or not
        tensors = {**some_tensors(1, size=10**6), "model": some_tensors(1, size)["model"]}
        with pytest.raises(CheckpointError) as raised:
            save_step(checkpoints, 2, tensors=tensors)
        message = str(raised.value)
        assert f"{checkpoints}/step_00000002 could not be written" in message and "\n" not in message
        assert "step_00000001, is intact" in message
        assert "No space left on device" in message or "File too large" in message
        assert names(checkpoints) == ["best", "last", "step_00000001"]
        assert problems(checkpoints / "step_00000001") is None

    publish(folder, lambda temporary: (temporary / "model.safetensors").write_text("earlier"))
    with pytest.raises(CheckpointError, match=str(folder)):
        publish(folder, write_too_much)
    assert (folder / "model.safetensors").read_text() == "earlier"
    assert names(folder) == ["checkpoints", "model.safetensors"]


def test_a_file_that_may_not_grow_leaves_the_earlier_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * 10**6, limits[1]))
    try:
        check_full_disk(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path)], capture_output=True)
    if mount.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        check_full_disk(tmp_path)
        save_step(tmp_path / "checkpoints", 2)
        assert find_newest_valid(tmp_path / "checkpoints", no_warning).name == "step_00000002"
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


# ----------------------------------------------------------------------------------------------------------------------
# publishing a model


def test_publishing_moves_files_and_sub_folders_to_the_top_and_leaves_the_rest(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("kept")
    (tmp_path / "config.json").write_text("earlier")
    (tmp_path / ".tmp_publish").mkdir()  # of a killed run

    def write(folder: Path):
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling/config.json").write_text("pooling")
        (folder / "config.json").write_text("new")

    publish(tmp_path, write)
    assert names(tmp_path) == ["1_Pooling", "config.json", "metrics.jsonl"]
    contents = [(tmp_path / name).read_text() for name in ("1_Pooling/config.json", "config.json", "metrics.jsonl")]
    assert contents == ["pooling", "new", "kept"]


def test_adapters_replace_a_whole_model_and_the_reverse(tmp_path):
    """Transformers would load both, one upon the other."""
    whole = ["config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    adapters = ["adapter_config.json", "adapter_model.safetensors"]
    (tmp_path / "2_Dense").mkdir()
    (tmp_path / "2_Dense/model.safetensors").write_text("kept")
    for files in (whole, adapters, whole):
        publish(tmp_path, lambda folder: [(folder / name).write_text("new") for name in files])  # noqa: B023
        assert names(tmp_path) == ["2_Dense", *files]
    assert names(tmp_path / "2_Dense") == ["model.safetensors"]


def test_a_writer_that_fails_midway_changes_nothing(tmp_path):
    (tmp_path / "config.json").write_text("earlier")

    def write(folder: Path):
        (folder / "config.json").write_text("new")
        raise failure

    failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):  # a mistake in the code is not a failed write
        publish(tmp_path, write)
    failure = Exception("No space left on device (os error 28)")  # as tokenizers says it
    with pytest.raises(CheckpointError, match="No space left"):
        publish(tmp_path, write)
    assert names(tmp_path) == ["config.json"] and (tmp_path / "config.json").read_text() == "earlier"


def test_manifests_are_json_that_others_can_check(two_checkpoints):
    manifest = json.loads((two_checkpoints / "step_00000002/manifest.json").read_text())
    for name, entry in manifest["files"].items():
        output = subprocess.run(["sha256sum", two_checkpoints / "step_00000002" / name], capture_output=True, text=True)
        assert output.stdout.split()[0] == entry["sha256"]


if __name__ == "__main__":
    worker(Path(sys.argv[1]))
