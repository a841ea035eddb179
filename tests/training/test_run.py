"""The parts of a run that no whole run on a processor can show: steps that are dropped in fp16."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import alone

from utils.errors import UsageError
from utils.training.run import Run


@pytest.fixture
def fp16():
    """A model, its optimizer and a loss scaler, which works on a processor, too; and a run of them."""
    model = torch.nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    run = SimpleNamespace(args=SimpleNamespace(nan_detector=True, seed=1), optimizer=optimizer,
                          accelerator=alone(scaler=scaler), state=SimpleNamespace(step=0),
                          is_culprit_named=False)  # fmt: skip
    run._seed_step, run.model = lambda: None, model
    run._compute = partial(Run._compute, run)
    return model, optimizer, scaler, run


def scaled_gradients(model, optimizer, scaler, factor):
    scaler.scale(factor * model(torch.ones(1, 2)).sum()).backward()
    scaler.unscale_(optimizer)
    return float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))


def test_a_step_that_is_not_finite_lowers_the_loss_scale_and_changes_no_weight(fp16):
    model, optimizer, scaler, run = fp16
    before = model.weight.detach().clone()
    gnorm = scaled_gradients(model, optimizer, scaler, math.inf)
    assert Run.check_gradients(run, [{"loss": 1.0}], gnorm) == "the gradient norm is not finite"
    assert scaler.get_scale() == 512.0
    assert torch.equal(model.weight, before)
    optimizer.zero_grad()

    gnorm = scaled_gradients(model, optimizer, scaler, 1.0)  # and the next step is applied
    assert Run.check_gradients(run, [{"loss": 1.0}], gnorm) is None
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(model.weight, before)


def test_a_step_that_ran_out_of_memory_leaves_no_gradient_and_the_loss_scale_as_it_is(fp16):
    model, optimizer, scaler, run = fp16

    def micro_step(batch, total):
        if batch == "does not":
            raise torch.OutOfMemoryError("memory ran out")
        scaler.scale(model(torch.ones(1, 2)).sum()).backward()
        return {}

    assert Run.try_step(run, micro_step, ["fits", "does not"], 2) is None
    assert model.weight.grad is None
    assert scaler.get_scale() == 1024.0
    assert math.isfinite(scaled_gradients(model, optimizer, scaler, 1.0))  # the scaler is ready for the next step


def test_what_does_not_fit_is_tried_in_halves_until_it_does(fp16):
    *_, run = fp16
    tried = []

    def micro_step(batch, total):
        tried.append(batch)
        if len(batch) > 1:
            raise torch.OutOfMemoryError("memory ran out")
        return {"count": len(batch)}

    def halve(batches):
        parts = [part for batch in batches for part in (batch[: len(batch) // 2], batch[len(batch) // 2 :]) if part]
        return parts if len(parts) > len(batches) else []

    assert Run.try_step(run, micro_step, ["abcd"], 4, halve) == [{"count": 1}] * 4
    assert tried == ["abcd", "ab", "a", "b", "c", "d"]
    assert Run.try_step(run, lambda batch, total: micro_step("xy", 2), ["a"], 1, halve) is None


def test_processes_that_read_other_data_do_not_train_together(monkeypatch):
    monkeypatch.setattr("utils.training.run.gather_object", lambda own: [*own, "other"])
    with pytest.raises(UsageError, match="process 1 has other training data than process 0: all machines"):
        Run(alone(num_processes=2), None, None, None, model=None, optimizer=None, scheduler=None, max_steps=0, warmup=0,
            plan=None, shape=None, data="own")  # fmt: skip
