"""The training loop's rules and numbers: splits, memory, steps that are not finite, stop rules, intervals, the log."""

import itertools
import json
import math
import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import FORWARD, LOSS, SCRIPTS, assert_close, events, inject, read_jsonl, run, weights

from utils.training.loop_state import LoopState, stop_reason

# with a larger epsilon, AdamW does not scale rounding up; the listwise loss gives the last bias no gradient
EXACT = {"train_rerank.py": ("--adam_epsilon", 1e-2, "--loss", "binary")}


@pytest.mark.parametrize(
    "script",
    [pytest.param("train_retrieve.py", marks=pytest.mark.slow),
     pytest.param("train_rerank.py", marks=pytest.mark.slow), "train_summarize.py"],
)  # fmt: skip
def test_weights_do_not_depend_on_how_the_batch_is_split(script, tmp_path):
    splits = [(1, 1, 16), (1, 2, 8), (1, 4, 4), (2, 1, 8), (2, 2, 4)]  # processes, accumulation, micro-batch
    if script == "train_retrieve.py":  # negatives are those of a micro-batch, over all processes
        splits = [(1, 1, 16), (2, 1, 8)]
    runs = []
    for processes, accumulation, batch in splits:
        folder = tmp_path / f"{processes}x{accumulation}x{batch}"
        run(script, folder, *EXACT.get(script, ()), "--dropout", 0, "--gradient_accumulation_steps", accumulation,
            "--max_train_steps", 3, "--per_device_train_batch_size", batch, "--max_train_examples", 42,
            processes=processes)  # fmt: skip
        runs.append((weights(folder), events(folder, "train")))
    (first, history), *others = runs
    assert sorted(line["examples"] for line in history) == [10, 16, 16]  # a step smaller than the others
    for other, other_history in others:
        # a passage that two processes hold is encoded on both
        for name in ("lr", "examples", "tokens")[: 2 if script == "train_retrieve.py" else None]:
            assert [line[name] for line in other_history] == [line[name] for line in history]
        if script != "train_retrieve.py":
            assert_close(first, other)
            continue
        # AdamW scales rounding up to a share of the learning rate; keys' biases have no other gradient
        names = [name for name in first if not name.endswith("key.bias")]
        assert max((first[name] - other[name]).abs().max() for name in names) <= 1e-4


def test_a_checkpoint_of_another_shape_is_refused_or_resharded_without_losing_an_example(tmp_path):
    script = "train_summarize.py"
    run(script, tmp_path, "--max_train_steps", 2)
    result = run(script, tmp_path, "--gradient_accumulation_steps", 1, expect=2)
    assert "gradient_accumulation_steps 2 there, 1 here" in result.stderr
    assert "--allow_reshard" in result.stderr
    run(script, tmp_path, "--gradient_accumulation_steps", 1, "--allow_reshard", "--num_train_epochs", 1,
        "--per_device_train_batch_size", 5, processes=2)  # fmt: skip
    assert sum(line["examples"] for line in events(tmp_path, "train")) == 48


def test_after_resharding_the_learning_rate_falls_on_to_the_end_of_the_last_epoch(tmp_path):
    script, flags = "train_summarize.py", ["--num_warmup_steps", 0]
    run(script, tmp_path, *flags, "--stop_time_hours", 1e-9, "--eval_steps", 99)  # after one of twelve steps
    [first] = events(tmp_path, "train")
    run(script, tmp_path, *flags, "--gradient_accumulation_steps", 1, "--allow_reshard")
    rates = [line["lr"] for line in events(tmp_path, "train")]
    falls = [before - after for before, after in itertools.pairwise(rates[1:])]
    assert len(rates) == 1 + 10 + 12 and rates[-1] == 0 and first["lr"] > rates[1] > 0.8 * first["lr"]
    assert falls == pytest.approx([3e-4 / 24] * len(falls), rel=1e-3)  # 24 steps of four examples in two epochs


OUT_OF_MEMORY = "raise torch.OutOfMemoryError('injected')"
one_epoch = ("--num_train_epochs", 1, "--gradient_accumulation_steps", 1)


@pytest.mark.parametrize("script", [pytest.param("train_retrieve.py", marks=pytest.mark.slow), "train_summarize.py"])
@pytest.mark.parametrize("first", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_memory_running_out_on_one_of_two_processes_drops_the_step_on_both(first, script, tmp_path):
    wrapper = inject(tmp_path, script, FORWARD[script],
                     f"rank == 1 and args[0].training and {first} <= calls < {first + 4}", OUT_OF_MEMORY)  # fmt: skip
    run(wrapper, tmp_path / "run", *one_epoch, processes=2)
    skips = events(tmp_path / "run", "skip")
    assert skips and {line["reason"] for line in skips} == {"memory ran out"}
    assert events(tmp_path / "run", "stop")[-1]["step"] == 6
    last = events(tmp_path / "run", "train")[-1]
    assert last["skipped"] == len(skips)
    assert sum(line["examples"] for line in events(tmp_path / "run", "train")) == 48 - 8 * len(skips)


@pytest.mark.parametrize(
    ("target", "when"),
    [
        (LOSS["train_retrieve.py"], "calls == 2"),
        pytest.param("torch:Tensor.backward", "calls == 3", marks=pytest.mark.slow),  # of the loss
        ("torch:Tensor.backward", "calls == 4"),  # of the encoder
    ],
)
def test_memory_running_out_in_the_loss_or_backward_of_one_process_drops_the_step_on_both(target, when, tmp_path):
    wrapper = inject(tmp_path, "train_retrieve.py", target, f"rank == 1 and {when}", OUT_OF_MEMORY)
    run(wrapper, tmp_path / "run", *one_epoch, processes=2, timeout=120)  # none waits for the other
    assert [line["step"] for line in events(tmp_path / "run", "skip")] == [2]
    assert sum(line["examples"] for line in events(tmp_path / "run", "train")) == 48 - 8


@pytest.mark.parametrize("script", ["train_rerank.py", "train_summarize.py"])
def test_a_micro_batch_that_does_not_fit_is_tried_again_in_halves(script, tmp_path):
    wrapper = inject(tmp_path, script, LOSS[script], "calls == 3", OUT_OF_MEMORY)
    flags = ["--num_train_epochs", 1, "--dropout", 0, *EXACT.get(script, ())]
    run(wrapper, tmp_path / "run", *flags)
    assert not events(tmp_path / "run", "skip")
    assert sum(line["examples"] for line in events(tmp_path / "run", "train")) == 48
    run(script, tmp_path / "plain", *flags)
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "plain"))


@pytest.mark.parametrize("detector", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_that_are_not_finite_are_dropped_and_named_and_too_many_end_the_run(script, detector, tmp_path):
    wrapper = inject(tmp_path, script, LOSS[script], "calls >= 5", "args = (args[0] * float('nan'), *args[1:])")
    result = run(wrapper, tmp_path / "run", "--max_skipped_steps", 3, "--nan_detector", detector, expect=3)
    assert "4 steps in a row were dropped, more than --max_skipped_steps 3" in result.stderr
    assert "Traceback" not in result.stderr
    skips = events(tmp_path / "run", "skip")
    assert [line["in_a_row"] for line in skips] == [1, 2, 3, 4]
    named = {"train_retrieve.py": "the gradient of ", "train_summarize.py": "the output of the model"}  # the loss
    assert (named[script] if detector else "the gradient norm is not finite") in skips[0]["reason"]
    assert skips[1]["reason"] == "the gradient norm is not finite"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_step_that_is_not_finite_changes_nothing_and_the_run_goes_on(script, tmp_path):
    wrapper = inject(tmp_path, script, LOSS[script], "calls <= 4", "args = (args[0] * float('nan'), *args[1:])")
    flags = ["--gradient_accumulation_steps", 1, "--num_warmup_steps", 0]  # the detector runs the first again
    run(wrapper, tmp_path / "run", *flags, "--max_train_steps", 3, "--eval_steps", 1, "--eval_after_steps", 3,
        "--checkpointing_steps", 1, "--checkpoints_total_limit", 0, "--max_skipped_steps", 3)  # fmt: skip
    assert [line["in_a_row"] for line in events(tmp_path / "run", "skip")] == [1, 2, 3]
    assert [line["examples"] for line in events(tmp_path / "run", "train")] == [0, 0, 0]
    first, last = (weights(tmp_path / "run" / "checkpoints" / f"step_0000000{step}") for step in (1, 3))
    assert all(torch.equal(first[name], last[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_whose_weights_differ_stop_unless_told_not_to(script, tmp_path):
    doubled = "next(args[1].parameters()).data.mul_(2)"
    wrapper = inject(tmp_path, script, "utils.training.step:check_weight_norm", "rank == 1", doubled)
    result = run(wrapper, tmp_path / "run", processes=2, expect=1)  # the launcher's code
    assert "the processes disagree on the norm of the weights" in result.stderr
    assert re.search(r"exitcode +: 3\b", result.stderr)
    assert not events(tmp_path / "run", "train")
    run(wrapper, tmp_path / "run", "--check_weight_norm", False, "--num_train_epochs", 1, processes=2)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_processes_that_train_different_models_stop(script, tmp_path):
    wrapper = inject(tmp_path, script, FORWARD[script], "rank == 1 and args[0].training and calls == 1",
                     "next(args[0].parameters()).data.mul_(1.5)")  # fmt: skip
    result = run(wrapper, tmp_path / "run", processes=2, expect=1)  # the launcher's code
    assert "the processes disagree on the norm of the weights" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_without_a_last_step_warms_up_too(script, tmp_path):
    run(script, tmp_path, "--num_train_epochs", 0, "--lr_scheduler_type", "constant_with_warmup", "--patience", 1,
        "--eval_steps", 3, "--learning_rate", 1e-6, "--num_warmup_steps", 4)  # fmt: skip
    rates = [line["lr"] for line in events(tmp_path, "train")]
    assert rates[:5] == pytest.approx([0.25e-6, 0.5e-6, 0.75e-6, 1e-6, 1e-6])


def rules(**changes):
    flags = {"num_train_epochs": 0, "max_train_steps": 0, "stop_time_hours": 0, "stop_min_lr": -1, "patience": -1}
    return SimpleNamespace(**{**flags, **changes})


@pytest.mark.parametrize(
    ("flags", "before", "reached", "words"),
    [
        ({"num_train_epochs": 2}, {"epoch": 1}, {"epoch": 2}, "num_train_epochs 2"),
        ({"max_train_steps": 5}, {"step": 4}, {"step": 5}, "max_train_steps 5"),
        ({"stop_time_hours": 0.5}, {"wall_seconds": 1799.0}, {"wall_seconds": 1800.0}, "stop_time_hours 0.5"),
        ({"patience": 2}, {"validations_without_improvement": 1}, {"validations_without_improvement": 2}, "patience 2"),
        ({"patience": 0}, {"validations_without_improvement": 0}, {"validations_without_improvement": 1}, "patience 0"),
        ({"stop_min_lr": 0.1}, {"step": 1}, {"step": 2}, "stop_min_lr 0.1"),
    ],
)
def test_each_stop_rule_ends_the_run_when_it_is_met_and_not_before(flags, before, reached, words):
    alone = SimpleNamespace(num_processes=1)
    assert stop_reason(alone, rules(**flags), LoopState(**before), lr=0.1, warmup=2) is None
    assert words in stop_reason(alone, rules(**flags), LoopState(**reached), lr=0.1, warmup=2)


def judged(**flags):
    """Flags that decide which validation is the best."""
    return SimpleNamespace(**flags, judged_by=list)


def test_a_score_that_is_no_number_is_never_the_best():
    args, state = judged(metric_for_best="rougeL", greater_is_better=None), LoopState()
    assert not state.note_validation(args, math.nan)
    assert state.note_validation(args, 1.0)
    assert not state.note_validation(args, math.nan)
    assert state.best == 1.0


def test_a_tie_is_no_improvement_and_patience_counts_anew_after_one():
    best = judged(metric_for_best="rougeL", greater_is_better=None)
    state = LoopState(step=1)
    assert state.note_validation(best, 1.0)
    assert not state.note_validation(best, 1.0)
    assert state.validations_without_improvement == 1
    assert state.note_validation(best, 1.5)
    assert (state.best, state.validations_without_improvement) == (1.5, 0)


@pytest.mark.parametrize(("metric", "greater_is_better"), [("loss", None), ("rougeL", False)])
def test_lower_is_better_for_a_loss_or_if_the_flag_says_so(metric, greater_is_better):
    best = judged(metric_for_best=metric, greater_is_better=greater_is_better)
    state = LoopState(step=1, best=1.0)
    assert not state.note_validation(best, 2.0)
    assert state.note_validation(best, 0.5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_intervals_patience_pruning_and_the_log_in_one_run(script, tmp_path):
    result = run(script, tmp_path, "--eval_steps", 2, "--eval_after_steps", 4, "--checkpointing_steps", 3,
                 "--checkpoints_total_limit", 2, "--learning_rate", 0, "--patience", 2, "--log_format", "json",
                 "--log_steps", 4, "--report_to", "tensorboard", "--profile")  # fmt: skip
    # nothing changes at learning rate 0: the first validation is the best, and patience ends the run two later
    assert [line["step"] for line in events(tmp_path, "validation")] == [4, 6, 8]
    assert events(tmp_path, "stop")[-1]["reason"].startswith("patience 2")
    # before each validation, too, and once more for the best
    found = [(line["step"], line["is_best"]) for line in events(tmp_path, "checkpoint")]
    assert found == [(3, False), (4, False), (4, True), (6, False), (8, False)]
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000004", "step_00000006", "step_00000008"]
    assert os.readlink(folder / "best") == "step_00000004"
    assert os.readlink(folder / "last") == "step_00000008"
    assert list(tmp_path.rglob("events.out.tfevents*"))
    assert list((tmp_path / "profile").iterdir())
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [line["event"] for line in lines][-2:] == ["stop", "done"]
    assert [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")] == lines
    # meters start anew after each log interval, and at the end of an epoch
    assert [(line["step"], line["examples"]) for line in events(tmp_path, "train")] == [(4, 32), (6, 16), (8, 16)]
    assert [(line["step"], line["examples"]) for line in events(tmp_path, "epoch")] == [(6, 48)]


def test_no_score_depends_on_how_many_passages_are_handed_over(tmp_path):
    validations = []
    for top_k in (1, 100):
        run("train_retrieve.py", tmp_path / str(top_k), "--max_train_steps", 1, "--top_k", top_k)
        validations.append(events(tmp_path / str(top_k), "validation"))
    assert validations[0] == validations[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_best_model_is_the_result_if_asked_for(script, tmp_path):
    metric = {"train_summarize.py": "loss", "train_retrieve.py": "recall@100"}[script]  # falls; is always the same
    flags = ["--metric_for_best", metric, "--greater_is_better", "true", "--load_best_model_at_end"]
    result = run(script, tmp_path, *flags)
    assert "the model is that of step 6, the best" in result.stdout
    checkpoints = tmp_path / "checkpoints"
    best, last = (weights(checkpoints / name) for name in ("best", "last"))
    published = weights(tmp_path)
    for name, tensor in published.items():
        (key,) = (key for key in best if key.endswith(name))
        assert torch.equal(tensor, best[key])
    assert any(not torch.equal(best[key], last[key]) for key in best)
    # what is written with it and the table of scores are of that model too: those of the first validation
    scores = events(tmp_path, "validation")[0]
    table = result.stdout[result.stdout.rindex("done training") :]
    assert f"{scores['rougeL' if script == 'train_summarize.py' else 'ndcg@10']:.1f}" in table


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_the_best_adapters_are_the_result_if_asked_for(script, undisturbed, tmp_path):
    metric = {"train_summarize.py": "loss", "train_retrieve.py": "recall@100"}[script]
    flags = ["--metric_for_best", metric, "--greater_is_better", "true", "--load_best_model_at_end",
             "--model_name_or_path", undisturbed[script], "--lora_rank", 4]  # fmt: skip
    result = run(script, tmp_path, *flags)
    assert re.search(r"^[\d,]+ of [\d,]+ parameters are trained,.* 1 process on cpu", result.stdout, re.MULTILINE)
    assert "the model is that of step 6, the best" in result.stdout
    best, last, published = (weights(tmp_path / name) for name in ("checkpoints/best", "checkpoints/last", "."))
    names = {name: name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in published}
    for name, tensor in published.items():
        (key,) = (key for key in best if key.endswith(f".{names[name]}"))
        assert torch.equal(tensor, best[key])
    assert any(not torch.equal(best[key], last[key]) for key in best)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_adapters_do_not_depend_on_the_number_of_processes(script, undisturbed, tmp_path):
    flags = ["--dropout", 0, "--gradient_accumulation_steps", 1, "--max_train_steps", 3, "--max_train_examples", 42,
             "--model_name_or_path", undisturbed[script], "--lora_rank", 4]  # fmt: skip
    for processes in (1, 2):
        run(script, tmp_path / str(processes), *flags, "--per_device_train_batch_size", 16 // processes,
            processes=processes)  # fmt: skip
    one, two = (weights(tmp_path / str(processes)) for processes in (1, 2))
    assert one.keys() == two.keys()
    # AdamW scales rounding up to a share of the learning rate
    assert max((one[name] - two[name]).abs().max() for name in one) <= 1e-4


@pytest.mark.parametrize("script", [pytest.param("train_retrieve.py", marks=pytest.mark.slow), "train_summarize.py"])
def test_overfitting_one_batch_sees_the_same_examples_at_each_step_and_learns_them(script, tmp_path):
    flags = ["--dropout", 0] if script == "train_summarize.py" else ["--num_hard_negatives", 0, "--learning_rate", 3e-3]
    run(script, tmp_path, "--overfit_one_batch", "--num_train_epochs", 3, *flags)
    lines = events(tmp_path, "train")
    if script == "train_summarize.py":  # a retriever draws one of the positives in each epoch
        assert len({line["tokens"] for line in lines}) == 1
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_schedule_accumulation_curriculum_clipping_and_smoothing_are_those_of_the_flags(script, tmp_path):
    flags = {"train_summarize.py": ["--label_smoothing_factor", 0],
             # drafts, which are drawn anew in each epoch, have lengths of their own
             "train_retrieve.py": ["--num_hard_negatives", 0, "--draft_share", 0]}[script]  # fmt: skip
    result = run(script, tmp_path, "--num_train_epochs", 3, "--gradient_accumulation_steps", "2,1",
                 "--curriculum_epochs", 1, "--lr_scheduler_type", "cosine", "--num_warmup_steps", 2,
                 "--max_grad_norm", 2.5, "--eval_after_steps", 30, *flags)  # fmt: skip
    lines = events(tmp_path, "train")
    assert [line["examples"] for line in lines] == [8] * 6 + [4] * 24  # two micro-batches of 4, later one
    half = [0.5 * (1 + math.cos(math.pi * (step - 2) / 28)) for step in range(2, 31)]
    assert [line["lr"] for line in lines] == pytest.approx([3e-4 * share for share in (0.5, *half)], rel=1e-4, abs=1e-9)
    tokens = [line["tokens"] / line["examples"] for line in lines]
    assert np.corrcoef(tokens[:6], range(6))[0, 1] > 0.8  # the curriculum's epoch runs by length, the others do not
    assert abs(np.corrcoef(tokens[6:18], range(12))[0, 1]) < 0.6
    assert [line["clip"] for line in lines] == [float(line["gnorm"] > 2.5) for line in lines]
    assert {line["clip"] for line in lines} == {0.0, 1.0}
    if script == "train_summarize.py":
        assert [line["loss"] for line in lines] == [line["nll_loss"] for line in lines]
    assert [line["reason"] for line in events(tmp_path, "stop")] == ["num_train_epochs 3 reached"]
    assert re.search(r"^done training in [\d.]+ s$", result.stdout, re.MULTILINE)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_log_line_has_all_meters(script, undisturbed):
    names = """step epoch lr skipped loss gnorm clip examples tokens tokens_per_second tokens_per_step padding
        steps_per_second examples_per_step memory_gb train_wall wall seconds_left""".split()
    names += ["nll_loss", "ppl"] if script == "train_summarize.py" else ["accuracy"]
    lines = events(undisturbed[script], "train")
    for line in lines:
        assert line.keys() == {"event", *names}
        assert line["tokens_per_step"] == line["tokens"] > 0
        assert line["examples_per_step"] == line["examples"] == 8
        assert 0 <= line["padding"] < 0.5
        assert line["steps_per_second"] * line["train_wall"] == pytest.approx(1, rel=1e-4)
        if "nll_loss" in line:  # base 2, without the label smoothing
            assert line["ppl"] == pytest.approx(2 ** line["nll_loss"], rel=1e-4)
            assert line["nll_loss"] < line["loss"]
    # the wall clock runs on in validation, after the first epoch, and while checkpoints are copied
    walls, seconds = [line["wall"] for line in lines], [line["train_wall"] for line in lines]
    assert walls[5] == pytest.approx(sum(seconds[:6]), rel=0.05)
    assert sum(seconds) < walls[-1] <= events(undisturbed[script], "done")[-1]["seconds"]
    assert walls[6] - walls[5] > 1.5 * seconds[6]
    # one number for epochs: those that are done, with the fraction of the present one
    assert [line["epoch"] for line in lines] == pytest.approx([step / 6 for step in range(1, 13)], rel=1e-5)
    assert [line["epoch"] for line in events(undisturbed[script], "epoch")] == [1, 2]
    assert [line["epoch"] for line in events(undisturbed[script], "validation")] == [1, 2]
    left = [line["seconds_left"] for line in lines]
    assert left[-1] == 0 and left[8] == pytest.approx(3 / 9 * walls[8], rel=0.1)
    for epoch, line in enumerate(events(undisturbed[script], "epoch")):
        of_epoch = lines[6 * epoch : 6 * epoch + 6]
        assert line["examples"] == 48
        assert line["tokens"] == sum(step["tokens"] for step in of_epoch)
        assert line["gnorm"] == pytest.approx(sum(step["gnorm"] for step in of_epoch) / 6, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_another_seed_makes_another_run(script, undisturbed, tmp_path):
    run(script, tmp_path, "--seed", 7)
    ours, theirs = (events(folder, "train") for folder in (tmp_path, undisturbed[script]))
    assert [line["tokens"] for line in ours] != [line["tokens"] for line in theirs]
    assert ours[0]["loss"] != theirs[0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_hours_count_over_all_sessions_of_a_run(script, tmp_path):
    flags = ["--num_train_epochs", 0, "--lr_scheduler_type", "constant", "--stop_time_hours"]
    run(script, tmp_path, *flags, 1e-9)
    first, spent = events(tmp_path, "train"), events(tmp_path, "done")[-1]["seconds"]  # with its validation
    assert len(first) == 1
    result = run(script, tmp_path, *flags, 1e-9)
    assert "nothing to train: stop_time_hours 1e-09 reached" in result.stdout
    assert events(tmp_path, "train") == first
    run(script, tmp_path, *flags, (spent + 1) / 3600)
    lines = events(tmp_path, "train")
    assert lines[0] == first[0]
    assert first[0]["wall"] < lines[1]["wall"] < lines[-1]["wall"]
    assert lines[-2]["wall"] < spent + 1 <= lines[-1]["wall"] + 1e-4
