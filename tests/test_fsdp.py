"""FSDP2 with two processes on a CPU, each with a part of model and optimizer: they end with the weights of one process.

accelerate has FSDP2 for GPUs only: the wrapper tells it to shard on a CPU, with the settings of our configuration.
"""

import pytest
import yaml
from conftest import ROOT, events, read_jsonl, run, weights

slow = pytest.mark.slow
PROMPT = ["--max_source_length", 256]
WRAPPER = """
import runpy, sys
sys.path.insert(0, {root!r})
from accelerate import state
from accelerate.utils import DistributedType
plain = state.AcceleratorState.__init__
def on_cpu(self, *args, fsdp_plugin=None, **kwargs):
    plain(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.fsdp_plugin = fsdp_plugin
        self.distributed_type = state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
state.AcceleratorState.__init__ = on_cpu
{more}
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


OUT_OF_MEMORY = """
import os, torch
from utils.models import contrastive
plain_loss, calls = contrastive.contrastive_loss, 0
def loss(*args, **kwargs):
    global calls
    calls += 1
    if calls == 5 and os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("injected")
    return plain_loss(*args, **kwargs)
contrastive.contrastive_loss = loss
"""


def on_two(folder, script: str, more: str = "") -> tuple:
    """A script to run instead of `script`, and what else `run` needs."""
    wrapper = folder / script
    wrapper.write_text(WRAPPER.format(root=str(ROOT), script=str(ROOT / script), more=more))
    config = yaml.safe_load((ROOT / "accelerate_configs/fsdp2.yaml").read_text())["fsdp_config"]
    return wrapper, {"ACCELERATE_USE_FSDP": "true", **{key.upper(): str(value) for key, value in config.items()}}


def read_output(folder, script: str) -> list:
    if script == "train_summarize.py":
        return [row["prediction"] for row in read_jsonl(folder / "predictions.validation.jsonl")]
    rows = read_jsonl(folder / "retrieved.validation.jsonl")
    return [[found["passage"] for found in row["retrieved"]] for row in rows]


@pytest.mark.parametrize(
    ("script", "model", "flags"),
    [
        ("train_summarize.py", None, []),
        ("train_retrieve.py", None, ["--gradient_cache_tokens", 100]),
        pytest.param("train_summarize.py", "language model", PROMPT, marks=slow),
        pytest.param("train_summarize.py", "language model", [*PROMPT, "--lora_rank", 4], marks=slow),
        pytest.param("train_summarize.py", "trained", ["--lora_rank", 4, "--merge_lora"], marks=slow),
        pytest.param("train_summarize.py", None, ["--fusion", "fid", "--gradient_checkpointing"], marks=slow),
        pytest.param("train_retrieve.py", None, [], marks=slow),
        pytest.param("train_retrieve.py", "trained", ["--lora_rank", 4], marks=slow),
        pytest.param("train_rerank.py", None, ["--loss", "binary"], marks=slow),
        pytest.param("train_rerank.py", "trained", ["--loss", "binary", "--lora_rank", 4], marks=slow),
    ],
)
def test_processes_that_share_a_model_resume_and_end_with_the_weights_of_one(script, model, flags, tmp_path, request):
    if model == "trained":
        flags = [*flags, "--model_name_or_path", request.getfixturevalue("undisturbed")[script]]
    elif model:
        flags = [*flags, "--model_name_or_path", request.getfixturevalue("language_model")]
    # with a larger epsilon, AdamW does not scale rounding up
    flags = ["--max_train_steps", 3, "--dropout", 0, "--adam_epsilon", 1e-2, "--mixed_precision", "no", *flags]
    run(script, tmp_path / "one", *flags, "--per_device_train_batch_size", 8)
    wrapper, environment = on_two(tmp_path, script)
    two = tmp_path / "two"
    run(wrapper, two, *flags, "--stop_time_hours", 1e-9, processes=2, **environment)  # ends after a step
    assert [line["step"] for line in events(two, "train")] == [1]
    run(wrapper, two, *flags, processes=2, **environment)
    assert len(events(two, "resume")) == 1

    ours, theirs = weights(two), weights(tmp_path / "one")
    assert ours.keys() == theirs.keys()  # tied weights once
    # norms are near 1, where float32 has steps of 1.2e-7
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) <= 3e-7
    moved = [(theirs[name] - tensor).abs().max() for name, tensor in weights(two / "checkpoints/step_00000001").items()
             if name in theirs]  # fmt: skip
    assert not moved or max(moved) > 1e-6
    for event in ("train", "validation"):
        for line, other in zip(events(two, event)[-1:], events(tmp_path / "one", event)[-1:], strict=True):
            assert line.get("loss", 0) == pytest.approx(other.get("loss", 0), rel=1e-5)
    assert read_output(two, script) == read_output(tmp_path / "one", script)


@slow
def test_a_process_without_memory_ends_the_run_of_all_and_the_next_start_goes_on(tmp_path):
    script = "train_retrieve.py"
    wrapper, environment = on_two(tmp_path, script, OUT_OF_MEMORY)
    flags = ["--max_train_steps", 3, "--checkpointing_steps", 1]
    result = run(wrapper, tmp_path / "run", *flags, processes=2, timeout=120, expect=1, **environment)
    assert "injected" in result.stderr
    wrapper, _ = on_two(tmp_path, script)
    run(wrapper, tmp_path / "run", *flags, processes=2, **environment)
    assert events(tmp_path / "run", "stop")[-1]["step"] == 3
