"""The training loop as a user meets it: killed, interrupted, starved of memory, split over processes, started again."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, events, launch, read_jsonl
from safetensors.torch import load_file

from utils.state import LoopState, stop_reason

SMALL = {
    "train_retrieve.py": ["--sample_documents", 8, "--num_hard_negatives", 2],
    "train_summarize.py": ["--sample_documents", 8, "--dropout", 0.1, "--max_new_tokens", 2, "--num_beams", 1],
}
LOOP = ["--num_train_epochs", 2, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
        "--log_steps", 1, "--learning_rate", 3e-4]  # fmt: skip
STEPS = 12  # 48 examples, 8 in a step, two epochs
SCRIPTS = list(SMALL)


def run(script, folder, *flags, expect=0, **options):
    result = launch(script, "--output_dir", folder, *SMALL[script], *LOOP, *flags, **options)
    assert result.returncode == expect, (result.returncode, result.stdout[-2000:], result.stderr[-4000:])
    return result


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(folder, reference) -> None:
    """The same weights to the last bit, and the same training history without repeated steps."""
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    keep = ("step", "epoch", "loss", "lr", "gnorm", "examples", "tokens")
    histories = [[[line[name] for name in keep] for line in events(run, "train")] for run in (folder, reference)]
    assert histories[0] == histories[1]
    assert [line["step"] for line in events(folder, "train")] == list(range(1, STEPS + 1))


def assert_close(ours: dict, theirs: dict) -> None:
    """Weights within 1e-5 of their norm, tensor by tensor.

    Biases of keys are left out: softmax cancels them, so that their gradient is rounding, which AdamW scales up.
    """
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith("k_proj.bias"):
            assert torch.linalg.norm(ours[name] - theirs[name]) <= 1e-5 * torch.linalg.norm(theirs[name]), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For each script, a run that nothing happens to."""
    folders = {script: tmp_path_factory.mktemp("undisturbed") for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, folder)
    return folders


def start(script, folder, *flags, processes=1):
    """A run in the background, in a process group of its own."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [
        str(ROOT / script),
        "--output_dir",
        str(folder),
        *map(str, SMALL[script]),
        *map(str, LOOP),
        *map(str, flags),
    ]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen(command, env=variables, start_new_session=True, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)  # fmt: skip


def wait_for_step(folder, step: int, process) -> None:
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        path = folder / "metrics.jsonl"
        if path.exists() and path.read_text().count('"event": "train"') >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached: {process.poll()}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(script, undisturbed, tmp_path):
    for step in (3, 8):  # in the middle of the first epoch, and of the second
        process = start(script, tmp_path, "--checkpointing_steps", 1, "--dataloader_num_workers", 2)
        wait_for_step(tmp_path, step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "model.safetensors").exists()
    run(script, tmp_path, "--checkpointing_steps", 1)
    assert len(events(tmp_path, "resume")) >= 1
    assert_same_run(tmp_path, undisturbed[script])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_and_leaves_with_its_code(number, processes, tmp_path, request):
    script = "train_summarize.py"
    if processes == 2 and number != signal.SIGUSR1:
        pytest.skip("torch's launcher answers for its workers: one of the three signals is enough")
    process = start(script, tmp_path, "--log_format", "none", processes=processes)
    wait_for_step(tmp_path, 2, process)
    if processes == 1:
        os.kill(process.pid, number)
        assert process.wait(60) == 128 + number
    else:  # to one of the two workers only
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[0]), number)
        process.wait(60)
    stop = events(tmp_path, "stop")[-1]
    assert number.name in stop["reason"]
    assert events(tmp_path, "checkpoint")[-1]["step"] == stop["step"] < STEPS
    if processes == 1 and number == signal.SIGTERM:
        run(script, tmp_path)
        assert_same_run(tmp_path, request.getfixturevalue("undisturbed")[script])


def test_all_checkpoints_damaged_is_an_error_and_never_a_fresh_start(undisturbed, tmp_path):
    script = "train_summarize.py"
    run(script, tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    for file in (tmp_path / "checkpoints").glob("step_*/optimizer.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    result = run(script, tmp_path, "--max_train_steps", 2, expect=2)
    assert "all 2 are damaged" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_weights_do_not_depend_on_how_the_batch_is_split(script, tmp_path):
    splits = [(1, 1, 16), (1, 2, 8), (1, 4, 4), (2, 1, 8), (2, 2, 4)]  # processes, accumulation, micro-batch
    if script == "train_retrieve.py":  # negatives are those of a micro-batch, over all processes
        splits = [(1, 1, 16), (2, 1, 8)]
    runs = []
    for processes, accumulation, batch in splits:
        folder = tmp_path / f"{processes}x{accumulation}x{batch}"
        flags = ["--dropout", 0] if script == "train_summarize.py" else ["--attention_dropout", 0]
        run(script, folder, *flags, "--gradient_accumulation_steps", accumulation, "--per_device_train_batch_size",
            batch, "--max_train_steps", 3, processes=processes)  # fmt: skip
        runs.append((weights(folder), events(folder, "train")))
    (first, history), *others = runs
    for other, other_history in others:
        for name in ("tokens", "lr", "examples"):
            assert [line[name] for line in other_history] == [line[name] for line in history]
        for name in first:
            if script == "train_summarize.py":  # the small encoder's dropout cannot be set
                assert torch.linalg.norm(first[name] - other[name]) <= 1e-5 * torch.linalg.norm(first[name]) + 1e-7, (
                    name
                )


def test_a_checkpoint_of_another_shape_is_refused_or_resharded_without_losing_an_example(tmp_path):
    script = "train_summarize.py"
    run(script, tmp_path, "--max_train_steps", 2)
    result = run(script, tmp_path, "--gradient_accumulation_steps", 1, expect=2)
    assert "gradient_accumulation_steps 2 there, 1 here" in result.stderr
    assert "--allow_reshard" in result.stderr
    run(script, tmp_path, "--gradient_accumulation_steps", 1, "--allow_reshard", "--num_train_epochs", 1,
        "--per_device_train_batch_size", 5, processes=2)  # fmt: skip
    assert sum(line["examples"] for line in events(tmp_path, "train")) == 48


INJECTED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import torch
import utils.summarizer as module
plain, calls = module.label_smoothed_loss, 0
def injected(logits, targets, smoothing):
    global calls
    calls += 1
    if {when}:
        {what}
    return plain(logits, targets, smoothing)
module.label_smoothed_loss = injected
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_injected(tmp_path, when: str, what: str, *flags, processes=1):
    wrapper = tmp_path / "injected.py"
    wrapper.write_text(INJECTED.format(root=str(ROOT), when=when, what=what))
    script = ROOT / "train_summarize.py"
    return launch(wrapper, script, "--output_dir", tmp_path / "run", *SMALL[script.name], *LOOP, *flags,
                  processes=processes)  # fmt: skip


def test_memory_running_out_on_one_of_two_processes_drops_the_step_on_both(tmp_path):
    result = run_injected(
        tmp_path, "os.environ['RANK'] == '1' and 3 <= calls <= 8", "raise torch.OutOfMemoryError('injected')",
        "--num_train_epochs", 1, "--gradient_accumulation_steps", 1, processes=2,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    skips = events(tmp_path / "run", "skip")
    assert skips and {line["reason"] for line in skips} == {"memory ran out"}
    assert events(tmp_path / "run", "stop")[-1]["step"] == 6
    assert events(tmp_path / "run", "train")[-1]["skipped"] == len(skips)


def test_a_micro_batch_that_does_not_fit_is_tried_again_in_halves(tmp_path):
    result = run_injected(
        tmp_path, "calls == 3", "raise torch.OutOfMemoryError('injected')", "--num_train_epochs", 1, "--dropout", 0
    )
    assert result.returncode == 0, result.stderr
    assert not events(tmp_path / "run", "skip")
    assert sum(line["examples"] for line in events(tmp_path / "run", "train")) == 48
    run("train_summarize.py", tmp_path / "plain", "--num_train_epochs", 1, "--dropout", 0)
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_steps_that_are_not_finite_are_dropped_and_named_and_too_many_end_the_run(tmp_path):
    result = run_injected(tmp_path, "calls >= 5", "logits = logits * float('nan')", "--max_skipped_steps", 3)
    assert result.returncode == 3
    assert "4 steps in a row were dropped, more than --max_skipped_steps 3" in result.stderr
    assert "Traceback" not in result.stderr
    skips = events(tmp_path / "run", "skip")
    assert [line["in_a_row"] for line in skips] == [1, 2, 3, 4]
    assert "the gradient of model." in skips[0]["reason"]


def test_a_file_system_that_is_full_ends_the_run_with_74_and_the_earlier_checkpoint(tmp_path, undisturbed):
    import resource

    script = "train_summarize.py"
    run(script, tmp_path, "--stop_time_hours", 1e-9)  # one step
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # inherited: no file may grow over a megabyte
    try:
        result = run(script, tmp_path, expect=74)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == kept
    run(script, tmp_path)
    assert_same_run(tmp_path, undisturbed[script])


def rules(**changes):
    flags = {"num_train_epochs": 0, "max_train_steps": 0, "stop_time_hours": 0, "stop_min_lr": -1, "patience": -1}
    return SimpleNamespace(**{**flags, **changes})


@pytest.mark.parametrize(
    ("flags", "before", "reached", "words"),
    [
        ({"num_train_epochs": 2}, {"epoch": 1}, {"epoch": 2}, "num_train_epochs 2"),
        ({"max_train_steps": 5}, {"step": 4}, {"step": 5}, "max_train_steps 5"),
        ({"stop_time_hours": 0.5}, {"train_seconds": 1799.0}, {"train_seconds": 1800.0}, "stop_time_hours 0.5"),
        ({"patience": 2}, {"validations_without_improvement": 1}, {"validations_without_improvement": 2}, "patience 2"),
        ({"patience": 0}, {"validations_without_improvement": 0}, {"validations_without_improvement": 1}, "patience 0"),
        ({"stop_min_lr": 0.1}, {"step": 0}, {"step": 1}, "stop_min_lr 0.1"),
    ],
)
def test_each_stop_rule_ends_the_run_when_it_is_met_and_not_before(flags, before, reached, words):
    alone = SimpleNamespace(num_processes=1)
    assert stop_reason(alone, rules(**flags), LoopState(**before), lr=0.1) is None
    assert words in stop_reason(alone, rules(**flags), LoopState(**reached), lr=0.1)


def test_a_tie_is_no_improvement_and_patience_counts_anew_after_one():
    state = LoopState(step=1)
    assert state.note_validation(1.0, greater_is_better=True)
    assert not state.note_validation(1.0, greater_is_better=True)
    assert state.validations_without_improvement == 1
    assert not state.note_validation(2.0, greater_is_better=False)
    assert state.note_validation(0.5, greater_is_better=False)
    assert (state.best, state.validations_without_improvement) == (0.5, 0)


def test_intervals_patience_pruning_and_the_log_in_one_run(tmp_path):
    run("train_summarize.py", tmp_path, "--eval_steps", 2, "--eval_after_steps", 4, "--checkpointing_steps", 3,
        "--checkpoints_total_limit", 2, "--learning_rate", 0, "--patience", 2, "--log_format", "json",
        "--report_to", "tensorboard", "--profile")  # fmt: skip
    # nothing changes at learning rate 0: the first validation is the best, and patience ends the run two later
    assert [line["step"] for line in events(tmp_path, "validation")] == [4, 6, 8]
    assert events(tmp_path, "stop")[-1]["reason"].startswith("patience 2")
    assert [line["step"] for line in events(tmp_path, "checkpoint")] == [3, 4, 6, 8]
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000004", "step_00000006", "step_00000008"]
    assert os.readlink(folder / "best") == "step_00000004"
    assert os.readlink(folder / "last") == "step_00000008"
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert list((tmp_path / "profile").iterdir())
    assert [line["event"] for line in read_jsonl(tmp_path / "metrics.jsonl")][-2:] == ["stop", "done"]


def test_fine_tuning_from_another_run_keeps_or_resets_its_state(tmp_path, undisturbed):
    script = "train_summarize.py"
    source = undisturbed[script]
    run(script, tmp_path / "reset", "--init_from", source, "--reset_optimizer", "--reset_lr_scheduler",
        "--reset_dataloader", "--reset_meters", "--max_train_steps", 1, "--learning_rate", 0)  # fmt: skip
    assert events(tmp_path / "reset", "train")[0]["step"] == 1
    ours, theirs = weights(tmp_path / "reset"), weights(source)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    run(script, tmp_path / "kept", "--init_from", source, "--num_train_epochs", 3)
    assert events(tmp_path / "kept", "train")[0]["step"] == STEPS + 1


def test_overfitting_one_batch_sees_the_same_examples_at_each_step_and_learns_them(tmp_path):
    run("train_summarize.py", tmp_path, "--overfit_one_batch", "--dropout", 0, "--num_train_epochs", 3)
    lines = events(tmp_path, "train")
    assert len({line["tokens"] for line in lines}) == 1
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
