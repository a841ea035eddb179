"""Parts of a step: parameter groups, checks, the NaN detector, seeds."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import alone

from utils.errors import Diverged
from utils.training.step import NanDetector, check_loss_scale, check_weight_norm, parameter_groups, seed_step


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
def test_processes_whose_weights_differ_end_the_run(other, ends):
    two = alone(num_processes=2, gather=lambda mine: torch.cat([mine, torch.tensor([other], dtype=mine.dtype)]))
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, 4.0]])  # of norm 5
    if ends:
        with pytest.raises(Diverged, match="disagree on the norm of the weights"):
            check_weight_norm(two, model)
    else:  # weights that are not finite are another fault
        check_weight_norm(two, model)


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


def test_a_module_within_a_compiled_layer_is_named():
    layer = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    layer.compile(backend="eager")
    model = torch.nn.Sequential(layer, torch.nn.Linear(2, 1))
    model(torch.ones(1, 2))  # compiled without any hook
    with torch.no_grad():
        layer[0].weight[0, 0] = math.nan
    with NanDetector(alone(), model) as detector:
        model(torch.ones(1, 2))
    assert detector.culprit == "the output of 0.0 (Linear) is not finite"


def test_a_steps_randomness_depends_on_seed_step_and_process_alone():
    def draw(*place):
        torch.rand(3)
        seed_step(*place)
        return torch.rand(1).item()

    assert draw(42, 5, 1) == draw(42, 5, 1)
    assert len({draw(42, 5, 1), draw(43, 5, 1), draw(42, 6, 1), draw(42, 5, 0)}) == 4
