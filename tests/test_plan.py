"""benchmarks/plan.py counts the weights that the models really have, and shares them out as it says."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

OPTIONS = {"memory": 141, "peak": 989, "utilization": 0.4, "link": 450, "network": 50}


@pytest.fixture(scope="module")
def planner():
    spec = importlib.util.spec_from_file_location("plan", ROOT / "benchmarks" / "plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def whole_model(config):
    with torch.device("meta"):
        return (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("name", ["BART-large", "1B"])
def test_memory_is_that_of_the_real_models_weights_and_fsdp_shares_it_out(planner, name):
    config, model = planner.MODELS[name], whole_model(planner.MODELS[name])
    weights = sum(p.numel() for p in model.parameters())
    held = ("weights", "gradients", "optimizer")
    ddp, _ = planner.plan(config, False, False, 8, SimpleNamespace(fsdp=False, **OPTIONS))
    assert sum(ddp[part] for part in held) == pytest.approx(16 * weights / 1e9, rel=0.01)
    fsdp, _ = planner.plan(config, False, False, 8, SimpleNamespace(fsdp=True, **OPTIONS))
    assert [8 * fsdp[part] for part in held] == pytest.approx([ddp[part] for part in held])
    checkpointed, slower = planner.plan(config, False, True, 8, SimpleNamespace(fsdp=False, **OPTIONS))
    assert checkpointed["activations"] < ddp["activations"] / 4
    adapted = get_peft_model(model, LoraConfig(r=planner.RANK, target_modules="all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    of_adapters, seconds = planner.plan(config, True, False, 8, SimpleNamespace(fsdp=False, **OPTIONS))
    assert of_adapters["optimizer"] == pytest.approx(8 * trained / 1e9, rel=0.01)
    assert seconds["exchange"] == pytest.approx(2 * 7 / 8 * 4 * trained / 450e9, rel=0.01)
    assert slower["forward"] > 1.9 * seconds["forward"]


def test_a_causal_layer_keeps_what_its_operations_need(planner):
    """Of a linear layer its input, of dropout a mask (without data: in bfloat16), of attention no scores."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.dropout = torch.nn.Linear(8, 8, dtype=torch.bfloat16), torch.nn.Dropout(0.1)

        def forward(self, hidden_states):
            return self.dropout(self.linear(hidden_states))

    with torch.device("meta"):
        layer = Layer()
        states = torch.empty(2, 50, 8, dtype=torch.bfloat16).requires_grad_()
        queries = torch.empty(2, 4, 50, 2, dtype=torch.bfloat16).requires_grad_()
    assert planner.kept_bytes(layer, hidden_states=states) == 100 * 8 * (2 + 2)
    attention = torch.nn.Identity()
    attention.forward = lambda q: planner.FusedAttention.apply(q, q * 2, q * 3)
    assert planner.kept_bytes(attention, q=queries) == 4 * 100 * 8 * 2
