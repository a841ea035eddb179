"""Averaging gradients: what two processes send and when, and that neither waits for the other when memory runs out.

Started as a script by two processes, this file is their work.
"""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator

from utils.cli.script import end_run
from utils.errors import UsageError
from utils.training import exchange
from utils.training.exchange import average_gradients, exchanging
from utils.training.run import Run
from utils.training.sharding import prepare

WIDTH, LAYERS = 32, 6
BYTES = 4 * (WIDTH * WIDTH + WIDTH)  # of a layer


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.first_only = torch.nn.Linear(WIDTH, WIDTH)  # the first process uses it
        self.unused = torch.nn.Linear(WIDTH, WIDTH)
        self.frozen = torch.nn.Linear(WIDTH, WIDTH).requires_grad_(False)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.first_only(x) if dist.get_rank() == 0 else x


def local_gradients(model, batches) -> dict:
    """The mean gradients of all processes, without an exchange in buckets; None where no process has one."""
    model.zero_grad()
    for batch in batches:
        model(batch).square().sum().backward()
    found = {}
    for name, parameter in model.named_parameters():
        counts = torch.tensor(float(parameter.grad is not None))
        dist.all_reduce(counts)
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        dist.all_reduce(gradient)
        found[name] = gradient / dist.get_world_size() if counts else None
    model.zero_grad()
    return found


def assert_mean(model, expected: dict) -> None:
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name]), name


def worker() -> None:
    accelerator = Accelerator(cpu=True)
    rank = accelerator.process_index
    torch.manual_seed(rank)
    model = Model()
    with pytest.raises(UsageError, match=r"process 1 on .* has loaded another model than process 0 on .*: 18 param"):
        prepare(accelerator, model, torch.optim.AdamW(model.parameters()))
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.layers[0].weight[0, 0] += 1e-6 * rank
    model, optimizer = prepare(accelerator, model, torch.optim.AdamW(model.parameters()))
    assert isinstance(model, Model)  # no DDP, which would hold a second copy of all gradients
    weights = accelerator.gather(model.layers[0].weight.detach()[None])
    assert torch.equal(weights[0], weights[1])

    exchange.BUCKET = 2 * BYTES
    log, is_backward = [], False
    all_reduce = dist.all_reduce

    def logged(tensor, *args, async_op=False, **options):
        if async_op or is_zeros(tensor):
            storages = {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes()
                        for p in model.parameters() if p.grad is not None}  # fmt: skip
            storages |= {flat.untyped_storage().data_ptr(): flat.nbytes for _, flat, _ in model.exchange.sent}
            log.append((tensor.nbytes, is_backward, sum(storages.values())))
        return all_reduce(tensor, *args, async_op=async_op, **options)

    def is_zeros(tensor):  # of a process whose memory ran out
        return tensor.ndim == 1 and tensor.numel() > WIDTH and not tensor.any()

    dist.all_reduce = logged

    def micro_step(batch, total):
        nonlocal is_backward
        loss = model(batch).square().sum()
        with exchanging(model):
            is_backward = True
            loss.backward()
            is_backward = False
        return {"examples": len(batch)}

    state = SimpleNamespace(accelerator=accelerator, model=model, optimizer=optimizer, _seed_step=lambda: None)
    state._compute = partial(Run._compute, state)
    try_step = partial(Run.try_step, state, micro_step, total=1)
    torch.manual_seed(rank)
    batches = [torch.randn(4, WIDTH) for _ in range(2)]
    expected = local_gradients(model, batches)

    def halve(parts):
        parts = [half for part in parts for half in part.split(max(1, len(part) // 2))]
        return parts if max(map(len, parts)) > 1 else []

    for number in range(3):
        log.clear()
        assert try_step(batches) == [{"examples": 4}] * 2
        average_gradients(accelerator, model)
        assert_mean(model, expected)
        optimizer.zero_grad()
        # each gradient once, and one number for each parameter that says whether it is there
        assert sum(size for size, *_ in log) == (LAYERS + 2) * (BYTES + 2 * 4)
        early = [was_backward for _, was_backward, _ in log]
        # now it is known what is unused, and what the second process does not use: one bucket, sent at the end
        assert not number or early == [True] * (len(early) - 1) + [False]
        # what is sent and what is not yet: the gradients once, and the bucket that is being copied
        assert max(held for *_, held in log) <= (LAYERS + 2) * (BYTES + 8) + 2 * exchange.BUCKET

    def assert_same_exchanges():
        sizes = accelerator.gather(torch.tensor([size for size, *_ in log] + [0] * (20 - len(log)))[None])
        assert torch.equal(sizes[0], sizes[1]), sizes

    # memory runs out on the second process, in the last backward pass, after some buckets were sent
    is_failing = False

    def fail(parameter):
        if is_failing and model.exchange.is_open:
            assert model.exchange.sent
            raise torch.OutOfMemoryError("simulated")

    model.layers[0].weight.register_post_accumulate_grad_hook(fail)
    is_failing = rank == 1
    log.clear()
    assert try_step(batches) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    assert_same_exchanges()

    log.clear()  # with smaller micro-batches it is enough: all processes compute the step again
    sums = try_step(batches, halve=halve)
    assert sums == ([{"examples": 2}] * 4 if rank else [{"examples": 4}] * 2)
    average_gradients(accelerator, model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (expected[name] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])
    optimizer.zero_grad()
    is_failing = False

    # in a forward pass before the last
    def fail_forward(module, inputs):
        if is_failing:
            raise torch.OutOfMemoryError("simulated")

    model.layers[3].register_forward_pre_hook(fail_forward)
    is_failing = rank == 1
    log.clear()
    assert try_step(batches) is None
    assert_same_exchanges()
    is_failing = False
    assert try_step(batches) is not None  # nothing is left of it
    average_gradients(accelerator, model)
    assert_mean(model, expected)
    optimizer.zero_grad()

    # a second backward pass would add to a gradient that is on its way
    model.exchange.is_due = True
    with pytest.raises(RuntimeError, match="only one backward pass may run"), exchanging(model):
        for _ in range(2):
            model(batches[0]).square().sum().backward()
    model.exchange.drop()
    optimizer.zero_grad()
    model.exchange.is_due = True
    with exchanging(model, overlaps=False):
        for batch in batches:
            model(batch).square().sum().backward()
    average_gradients(accelerator, model)
    assert_mean(model, expected)
    end_run(accelerator)


def test_two_processes_average_gradients_while_the_backward_pass_runs_and_neither_waits_for_one_without_memory():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    worker()
