"""benchmarks/step_profile.py counts each operator of a step once, where its forward pass was."""

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from utils.fast.cpu import dropout

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
from step_profile import bytes_of, count, forward_operators, is_backward, place

ROWS, IN, OUT = 256, 64, 128


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    layer, x = nn.Linear(IN, OUT), torch.randn(ROWS, IN, requires_grad=True)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        began = time.perf_counter()
        with record_function("forward"), record_function("Linear"):
            out = layer(x)
        with record_function("forward"), record_function("dropout"):
            out = dropout(out, 0.5)
        with record_function("backward"):
            nn.functional.gelu(out).sum().backward()
        optimizer.step()
        wall = time.perf_counter() - began
    return profiler.events(), wall


def test_the_rows_add_up_to_the_step(found):
    rows = count(*found, steps=1)["rows"]
    assert sum(rows.values()) == pytest.approx(found[1])
    assert min(rows[name] for name in ("products, forward", "products, backward", "biases", "optimizer", "dropout",
                                       "activations (GELU, SiLU)", "Python")) > 0  # fmt: skip


def test_operations_are_those_of_the_products(found):
    flops = count(*found, steps=2)["flops"]
    assert flops == {"products, forward": ROWS * IN * OUT, "products, backward": 2 * ROWS * IN * OUT}


def test_a_backward_pass_is_counted_where_the_forward_pass_was(found):
    forward = forward_operators(found[0])
    placed = {event.name.rpartition(" ")[2]: place(event, forward)[0] for event in found[0] if is_backward(event)}
    assert placed["MulBackward0"] == "dropout" and placed["GeluBackward0"] == "activations (GELU, SiLU)"


def test_the_optimizer_reads_four_numbers_of_each_weight_and_writes_three(found):
    (event,) = (event for event in found[0] if event.name == "aten::_fused_adamw_")
    assert bytes_of(event) == 4 * 7 * (IN + 1) * OUT
