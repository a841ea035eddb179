"""What both loops share, piece by piece: exit codes, guards, meters, log formats, refusals."""

import copy
import errno
import json
import math
import multiprocessing
import re
import signal
import sys
import time
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from utils.cli.arguments import LR_SCHEDULERS, TrainingArguments
from utils.cli.script import run_script, start
from utils.errors import CheckpointError, DataError, Diverged, UsageError
from utils.training.checkpoints import _compare
from utils.training.log import Meters, RunLog
from utils.training.loop_state import schedule_steps
from utils.training.memory import give_back_memory, keep_memory
from utils.training.signals import Signals
from utils.training.step import NanDetector, check_grad_norm, check_loss_scale, parameter_groups, seed_step


def alone(**changes):
    """What an Accelerator of one process on the processor is to these functions."""
    fields = {"num_processes": 1, "process_index": 0, "is_main_process": True, "device": torch.device("cpu"),
              "mixed_precision": "no", "distributed_type": DistributedType.NO, "trackers": [], "scaler": None,
              "unwrap_model": lambda model: model}  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UsageError("a flag"), 2),
        (DataError("a line"), 2),
        (SystemExit(2), 2),
        (Diverged("nan"), 3),
        (CheckpointError("full"), 74),
        *[(OSError(number, "full"), 74) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        (OSError(errno.EACCES, "closed"), 1),
        (RuntimeError("a bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_way_to_end_has_its_exit_code_and_only_a_bug_a_traceback(error, code, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr("utils.cli.script._exit", codes.append)

    def main():
        if error:
            raise error

    run_script(main)
    assert codes == [code]
    printed = capsys.readouterr().err
    assert ("Traceback" in printed) == (code == 1)
    if code not in (0, 1) and not isinstance(error, SystemExit):
        assert printed.count("\n") == 1


def test_weight_decay_is_for_matrices_and_not_for_biases_and_norms():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    decayed, others = parameter_groups(model, 0.3)
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[1].weight)}
    assert {id(p) for p in others["params"]} == {id(model[1].bias), id(model[2].weight), id(model[2].bias)}
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)


@pytest.mark.parametrize(("scale", "ends"), [(2e-4, False), (1e-4, False), (0.9e-4, True)])
def test_a_loss_scale_under_its_floor_ends_the_run(scale, ends):
    scaler = SimpleNamespace(get_scale=lambda: scale)
    args = SimpleNamespace(min_loss_scale=1e-4)
    check_loss_scale(alone(), args)  # without fp16 there is none
    if ends:
        with pytest.raises(Diverged, match="under --min_loss_scale"):
            check_loss_scale(alone(scaler=scaler), args)
    else:
        check_loss_scale(alone(scaler=scaler), args)


@pytest.mark.parametrize(("other", "ends"), [(5 * (1 + 0.9e-6), False), (5 * (1 + 3e-6), True), (math.nan, False)])
def test_processes_that_disagree_on_the_gradient_norm_end_the_run(other, ends):
    two = alone(num_processes=2, gather=lambda mine: torch.cat([mine, torch.tensor([other], dtype=mine.dtype)]))
    if ends:
        with pytest.raises(Diverged, match="disagree on the gradient norm"):
            check_grad_norm(two, 5.0)
    else:  # what is not finite is dropped as such
        check_grad_norm(two, 5.0)


def test_the_first_module_that_is_not_finite_is_named_else_the_first_gradient():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1))
    with NanDetector(alone(), model) as detector:
        model(torch.ones(1, 2)).sum().backward()
    assert detector.culprit == "not seen again"
    assert not any(module._forward_hooks for module in model.modules())
    model[2].bias.grad.fill_(math.inf)
    assert "the gradient of 2.bias" in detector.culprit
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with NanDetector(alone(), model) as detector:
        model(torch.ones(1, 2))
    assert detector.culprit == "the output of 0 (Linear) is not finite"


def test_meters_add_up_their_steps_and_start_anew_once_read():
    meters = Meters(alone())
    for gnorm in (0.5, 1.5, 2.5):
        meters.add_step(gnorm, max_grad_norm=1.0, seconds=2.0)
        meters.add(loss=6 * math.log(2), nll=4 * math.log(2), count=2, examples=4, tokens=30, slots=40)
    middle = copy.deepcopy(json.loads(json.dumps(meters.state(alone()))))
    line = meters.read(alone())
    expected = {
        "loss": 3, "nll_loss": 2, "ppl": 4, "gnorm": 1.5, "clip": 2 / 3, "examples": 12, "tokens": 90,
        "tokens_per_second": 15, "tokens_per_step": 30, "padding": 0.25, "steps_per_second": 0.5,
        "examples_per_step": 4, "train_wall": 6,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert line["memory_gb"] > 0
    assert meters.read(alone())["examples"] == 0
    again = Meters(alone(), middle)  # from a checkpoint
    memory = {"memory_gb": 0}
    assert again.read(alone()) | memory == line | memory
    meters.add_step(9.0, max_grad_norm=0, seconds=1.0)
    assert meters.read(alone())["clip"] == 0  # 0: never clipped


def log_something(folder, log_format, **changes):
    log = RunLog(alone(**changes), folder, log_format)
    log.begin(0)
    log.start_epoch(0, done=0, steps=2)
    log("train", step=1, loss=0.123456789)
    log.advance()
    log.end_epoch()
    log.say("in words")


def test_each_log_format_prints_what_it_says_and_the_file_is_the_same(tmp_path, capsys, monkeypatch):
    line = '{"event": "train", "step": 1, "loss": 0.123457}\n'
    expected = {"simple": "train | step 1 | loss 0.1235\nin words\n", "json": line, "none": ""}
    for log_format, output in expected.items():
        log_something(tmp_path, log_format)
        assert capsys.readouterr() == (output, ""), log_format
        assert (tmp_path / "metrics.jsonl").read_text() == line
    for log_format in ("tqdm", None):  # a terminal has a progress bar without asking
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        log_something(tmp_path, log_format)
        output, bar = capsys.readouterr()
        assert output == expected["simple"]
        assert "epoch 1" in bar and "0/2" in bar
    log_something(tmp_path / "absent", "json", is_main_process=False)  # the others neither print nor write
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("log_format", ["json", "simple"])
def test_lines_of_the_thread_that_writes_checkpoints_are_printed_whole_and_in_the_order_of_the_file(
    log_format, tmp_path, monkeypatch
):
    printed = []

    def write(text):
        time.sleep(0.001)  # others get their turn between a line and its end
        printed.append(text)

    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False))
    log = RunLog(alone(), tmp_path, log_format)
    threads = [Thread(target=lambda: [log("event", step=step) for step in range(20)]) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    written = (tmp_path / "metrics.jsonl").read_text()
    expected = {"json": written, "simple": re.sub(r".*: (.*)}", r"event | step \1", written)}[log_format]
    assert "".join(printed) == expected and written.count("\n") == 40


def test_the_log_of_a_killed_run_goes_on_without_repeated_or_broken_lines(tmp_path):
    events = [("train", 1), ("train", 2), ("stop", 2), ("train", 3)]
    lines = [json.dumps({"event": event, "step": step}) for event, step in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "tra')
    RunLog(alone(), tmp_path, "none").begin(2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]
    RunLog(alone(), tmp_path, "none").begin(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is kept and given back with glibc only")
def test_memory_that_a_step_left_free_is_given_back_once_it_is_more_than_steps_need():
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    context = multiprocessing.get_context("fork")  # what is set for a process stays set

    def steps(found):
        keep_memory()
        give_back_memory()  # after the first step
        needed = held()
        sizes = []
        for share in (0.2, 2.0):
            tensors = [torch.ones(2**16) for _ in range(int(share * needed) // 2**18)]
            del tensors
            sizes.append(held())
            give_back_memory()
            sizes.append(held())
        found.put([size / needed for size in sizes])

    found = context.Queue()
    process = context.Process(target=steps, args=(found,))
    process.start()
    little, little_after, much, much_after = found.get(timeout=60)
    process.join(60)
    assert little == pytest.approx(1.2, abs=0.1) and little_after == little
    assert much > 2.5 and much_after < 1.3


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_start_seeds_everything_and_asks_for_deterministic_operations_if_told(deterministic, tmp_path):
    threads = torch.get_num_threads()
    args = TrainingArguments(output_dir=str(tmp_path / "run"), seed=3, deterministic=deterministic)
    try:
        start(alone(), args)
        draws = torch.rand(2)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        start(alone(), args)
        assert torch.equal(torch.rand(2), draws)
        assert json.loads((tmp_path / "run" / "arguments.json").read_text())["seed"] == 3
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_a_steps_randomness_depends_on_seed_step_and_process_alone():
    def draw(*place):
        torch.rand(3)
        seed_step(*place)
        return torch.rand(1).item()

    assert draw(42, 5, 1) == draw(42, 5, 1)
    assert len({draw(42, 5, 1), draw(43, 5, 1), draw(42, 6, 1), draw(42, 5, 0)}) == 4


def test_each_learning_rate_schedule_rises_over_the_warm_up_and_ends_where_it_should():
    from transformers import get_scheduler

    ends = {"linear": 0, "cosine": 0, "cosine_with_restarts": 0, "polynomial": 1e-7, "constant": 0.1,
            "constant_with_warmup": 0.1, "inverse_sqrt": 0.1 * (4 / 20) ** 0.5}  # fmt: skip
    assert set(ends) == set(LR_SCHEDULERS)
    for name, end in ends.items():
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = get_scheduler(name, optimizer, 4, 20)
        rates = []
        for _ in range(20):
            optimizer.step()
            scheduler.step()
            rates += scheduler.get_last_lr()
        assert rates[-1] == pytest.approx(end, abs=1e-9), name
        assert rates[:4] == pytest.approx([0.1] * 4 if name == "constant" else [0.025, 0.05, 0.075, 0.1]), name


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ({"num_train_epochs": 2}, 5),
        ({"num_train_epochs": 2, "max_train_steps": 4}, 4),
        ({"num_train_epochs": 2, "max_train_steps": 9}, 5),
        ({"num_train_epochs": 0, "max_train_steps": 9}, 9),
        ({"num_train_epochs": 0, "max_train_steps": 0}, 0),
    ],
)
def test_the_schedule_spans_the_steps_that_the_flags_allow(flags, steps):
    args = SimpleNamespace(**{"max_train_steps": 0, **flags})
    assert schedule_steps(args, lambda epoch: [None] * (epoch + 2)) == steps


SHAPE = {"num_processes": 2, "gradient_accumulation_steps": 4, "batch_size": 16, "max_tokens": 0}


@pytest.mark.parametrize(
    ("here", "said", "can_be_allowed"),
    [
        ({"data": "other"}, "data same there, other here", False),
        ({"seed": 7}, "seed 42 there, 7 here", False),
        ({"parameters": 9}, "parameters 5 there, 9 here", False),
        ({"shape": SHAPE | {"num_processes": 1}}, "num_processes 2 there, 1 here", True),
        ({"shape": SHAPE | {"batch_size": 8}}, "batch_size 16 there, 8 here", True),
        ({"shape": SHAPE | {"max_tokens": 99}}, "max_tokens 0 there, 99 here", True),
    ],
)
def test_going_on_as_another_run_is_refused_with_what_differs(here, said, can_be_allowed, tmp_path):
    saved = {"data": "same", "parameters": 5, "seed": 42, "shape": SHAPE}
    _compare(tmp_path, saved, saved, allow_reshard=False)
    with pytest.raises(UsageError, match=said) as refusal:
        _compare(tmp_path, saved, saved | here, allow_reshard=False)
    assert ("--allow_reshard" in str(refusal.value)) == can_be_allowed
    if can_be_allowed:
        _compare(tmp_path, saved, saved | here, allow_reshard=True)
    else:
        with pytest.raises(UsageError):
            _compare(tmp_path, saved, saved | here, allow_reshard=True)


TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("sent", "received", "left"),
    [((), None, []), ((TERM,), TERM, []), ((USR1, TERM), USR1, []), ((TERM, TERM), TERM, []), ((INT,), INT, []),
     ((INT, INT), INT, [130]), ((TERM, INT), TERM, []), ((TERM, INT, INT), TERM, [130])],
)  # fmt: skip
def test_the_first_signal_is_noted_and_a_second_interrupt_leaves_at_once(sent, received, left, monkeypatch):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    handlers = {number: signal.getsignal(number) for number in Signals.NUMBERS}
    try:
        signals = Signals()
        for number in sent:
            signal.raise_signal(number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    reduced = alone(reduce=lambda sums, _: sums)
    assert signals.agree(reduced, 7) == (7, received)
    assert codes == left
