"""`--torch_compile`: names of parameters, resuming, batches of any shape, and where it is refused.

On a processor, torch's backend "eager" stands in for the compiler of GPUs: it runs what was captured as it is.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import TorchDynamoPlugin
from conftest import assert_same_run, events, kill_all, launch, run, start, wait_until, weights
from test_waiting import LLAMA, SIZES, T5, ids
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from utils.errors import UsageError
from utils.models.settings import compile_layers
from utils.models.sources import collate
from utils.models.summarizer import wrap

EAGER = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}
ARGS = SimpleNamespace(torch_compile=True, model_name_or_path="model")


def eager():
    return SimpleNamespace(state=SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend="eager")))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "settings"), [("bart", SIZES), ("llama", LLAMA), ("t5", T5)])
def test_compiled_layers_keep_their_names_and_results_and_are_compiled_for_all_shapes_at_once(kind, settings):
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **settings)
    for name in ("dropout", "dropout_rate", "activation_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    plain = wrap(auto_class.from_config(config)).train()
    accelerator = eager()
    compiled = compile_layers(copy.deepcopy(plain), ARGS, accelerator)
    assert accelerator.state.dynamo_plugin.backend == "NO"  # `prepare` would wrap the whole model
    assert list(compiled.state_dict()) == list(plain.state_dict())
    graphs = []
    for lengths in ((9, 3, 12), (8, 5, 7, 4), (11, 2, 30), (5, 6, 1, 2, 9), (21, 22)):
        batch = collate([[source] for source in ids(*lengths)], ids(*(1 + length // 3 for length in lengths)), 1)
        found = []
        for model in (plain, compiled):
            model.zero_grad()
            loss = model(**batch, label_smoothing_factor=0.1)[0]
            loss.backward()
            found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(torch.equal(*both) for both in zip(*found, strict=True))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    del batch["labels"]
    compiled.eval().generate(**batch, max_new_tokens=4)  # is not compiled
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and len(set(graphs[1:])) == 1


def test_a_model_without_repeated_layers_is_refused():
    config = AutoConfig.for_model("llama", **{**LLAMA, "num_hidden_layers": 0})
    with pytest.raises(UsageError, match="--torch_compile: model has no layers that repeat"):
        compile_layers(torch.nn.Sequential(AutoModelForCausalLM.from_config(config)), ARGS, eager())


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_retrieve.py", "train_rerank.py", "train_summarize.py"])
def test_a_killed_run_with_compiled_layers_resumes_to_the_weights_of_one_without(script, undisturbed, tmp_path,
                                                                                  monkeypatch):  # fmt: skip
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    process = start(script, tmp_path, "--torch_compile")
    wait_until(lambda: len(events(tmp_path, "train")) > 7, process, tmp_path)  # six steps an epoch
    kill_all(process)
    run(script, tmp_path, "--torch_compile")
    assert events(tmp_path, "resume")[0]["step"] == 6
    assert_same_run(tmp_path, undisturbed[script])
    for folder in (tmp_path, tmp_path / "checkpoints" / "last"):
        assert not any("_orig_mod" in name for name in weights(folder))


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (["--torch_compile"], {}, "--torch_compile needs a GPU; leave the flag out"),
        ([], EAGER, "--dynamo_backend eager of accelerate: use --torch_compile of this script"),
        (["--torch_compile", "--gradient_checkpointing"], EAGER, "has no effect with --gradient_checkpointing"),
    ],
)
def test_compiling_is_refused_in_one_line_where_it_can_have_no_effect(flags, environment, message, tmp_path):
    result = launch("train_summarize.py", "--output_dir", tmp_path, *flags, **environment)
    assert (result.returncode, len(result.stderr.splitlines())) == (2, 1)
    assert message in result.stderr
