"""The learning rate schedule, the steps that it spans, and the best score that a resumed run remembers."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from utils.cli.arguments import LR_SCHEDULERS, TrainingArguments
from utils.training.loop_state import LoopState, schedule_steps, steps_left


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
    args = SimpleNamespace(**{"max_train_steps": 0, "max_tokens": 100, **flags})
    assert schedule_steps(args, lambda epoch: [None] * (epoch + 2), None) == steps


def test_plans_are_made_once_for_each_shape_and_no_further_than_the_limit():
    planned, shapes = [], [{"micro_batches": count} for count in (2, 1, 1, 1)]

    def plan(epoch):
        planned.append(epoch)
        return [None] * 10 * (1 + epoch)

    args = SimpleNamespace(max_train_steps=0, max_tokens=0, num_train_epochs=4)
    assert schedule_steps(args, plan, shapes.__getitem__) == 10 + 3 * 20
    assert planned == [0, 1]
    args = SimpleNamespace(max_train_steps=25, max_tokens=100, num_train_epochs=4)
    assert schedule_steps(args, plan, shapes.__getitem__) == 25
    assert planned == [0, 1, 0, 1]


def test_a_resumed_run_with_another_metric_forgets_the_best_score_of_the_one_before():
    args = SimpleNamespace(metric_for_best="ndcg@10", greater_is_better=None, judged_by=lambda: [20])
    state = LoopState(step=10)
    assert state.note_validation(args, 90)
    state.step = 20
    assert not state.note_validation(args, 80)
    state = LoopState(**asdict(state))  # as from a checkpoint
    state.forget_other_metric(args)
    assert (state.best, state.best_step, state.validations_without_improvement) == (90, 10, 1)
    args.metric_for_best = "recall@1"
    state.forget_other_metric(args)
    assert (state.best, state.best_step, state.validations_without_improvement) == (None, 0, 0)
    assert state.note_validation(args, 60) and state.best_metric == "recall@1"


def test_a_resumed_run_that_validates_otherwise_forgets_the_best_score_of_the_one_before():
    args = TrainingArguments()
    args.max_eval_examples = 20
    state = LoopState(step=10)
    assert state.forget_other_validation(args) == ""  # there is none
    assert state.note_validation(args, 2.0)
    state = LoopState(**json.loads(json.dumps(asdict(state))))  # as from a checkpoint
    assert state.forget_other_validation(args) == "" and state.best == 2
    args.max_eval_examples = None
    assert "the best score so far is forgotten" in state.forget_other_validation(args)
    assert state.best is None and state.note_validation(args, 3.0)
    state.best_judged_by = None
    assert state.forget_other_validation(args) == "" and state.best == 3  # not known to be another


def test_the_steps_that_are_left_are_those_of_the_rest_of_this_epoch_and_of_all_later_ones():
    def plan(epoch, without=()):
        return [None] * (10 + epoch - len(without))

    args = SimpleNamespace(num_train_epochs=3, max_train_steps=0, max_tokens=9)
    here = LoopState(epoch=1, step=14, step_in_epoch=0, done_before=[5, 6, 7, 8])
    assert steps_left(args, plan, None, here) == 11 - 4 + 12
    assert steps_left(args, plan, None, LoopState(epoch=1, step_in_epoch=3)) == 11 - 3 + 12
    assert steps_left(args, plan, None, LoopState(epoch=3)) == 0
    args.max_train_steps = 20
    assert steps_left(args, plan, None, here) == 6
    args.num_train_epochs = 0
    assert steps_left(args, plan, None, here) == 6
