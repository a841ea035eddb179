"""The training loop's rules and numbers: splits, memory, steps that are not finite, stop rules, intervals, the log."""

import os
from types import SimpleNamespace

import pytest
from conftest import LOOP, ROOT, SCRIPTS, SMALL, assert_close, events, launch, read_jsonl, run, weights

from utils.state import LoopState, stop_reason


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
        if script == "train_summarize.py":  # the small encoder's dropout cannot be set
            assert_close(first, other)


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
plain, calls = module.vocabulary_loss, 0
def injected(hidden, *others):
    global calls
    calls += 1
    if {when}:
        {what}
    return plain(hidden, *others)
module.vocabulary_loss = injected
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
    result = run_injected(tmp_path, "calls >= 5", "hidden = hidden * float('nan')", "--max_skipped_steps", 3)
    assert result.returncode == 3
    assert "4 steps in a row were dropped, more than --max_skipped_steps 3" in result.stderr
    assert "Traceback" not in result.stderr
    skips = events(tmp_path / "run", "skip")
    assert [line["in_a_row"] for line in skips] == [1, 2, 3, 4]
    assert "the gradient of model." in skips[0]["reason"]


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
    best = SimpleNamespace(metric_for_best="rougeL", greater_is_better=None)
    state = LoopState(step=1)
    assert state.note_validation(best, {"rougeL": 1.0})
    assert not state.note_validation(best, {"rougeL": 1.0})
    assert state.validations_without_improvement == 1
    assert state.note_validation(best, {"rougeL": 1.5})
    assert (state.best, state.validations_without_improvement) == (1.5, 0)


@pytest.mark.parametrize(("metric", "greater_is_better"), [("loss", None), ("rougeL", False)])
def test_lower_is_better_for_a_loss_or_if_the_flag_says_so(metric, greater_is_better):
    best = SimpleNamespace(metric_for_best=metric, greater_is_better=greater_is_better)
    state = LoopState(step=1, best=1.0)
    assert not state.note_validation(best, {metric: 2.0})
    assert state.note_validation(best, {metric: 0.5})


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


def test_overfitting_one_batch_sees_the_same_examples_at_each_step_and_learns_them(tmp_path):
    run("train_summarize.py", tmp_path, "--overfit_one_batch", "--dropout", 0, "--num_train_epochs", 3)
    lines = events(tmp_path, "train")
    assert len({line["tokens"] for line in lines}) == 1
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
