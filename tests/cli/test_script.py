"""How a script starts and ends."""

import errno
import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from conftest import alone

from utils.cli.arguments import TrainingArguments, flag
from utils.cli.script import record_run, run_script, start
from utils.errors import CheckpointError, DataError, Diverged, UsageError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UsageError("a flag"), 2),
        (DataError("a line"), 2),
        (SystemExit(2), 2),
        (Diverged("nan"), 3),
        (CheckpointError("full"), 74),
        *[(OSError(number, "full"), 74) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        (OSError(errno.EACCES, "closed"), 1),
        (RuntimeError("a bug"), 1),
        (RuntimeError("[gloo/pair.cc:553] Connection closed by peer [10.0.0.1]:3389"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_way_to_end_has_its_exit_code_and_only_a_bug_a_traceback(error, code, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr("utils.cli.script._exit", codes.append)

    def main():
        if error:
            raise error

    run_script(main)
    assert codes == [code]
    printed = capsys.readouterr().err
    is_lost = "Connection closed" in str(error)
    assert ("Traceback" in printed) == (code == 1 and not is_lost)
    if is_lost:
        assert "lost the connection to another process" in printed and "run the same command again" in printed
    if (code not in (0, 1) and not isinstance(error, SystemExit)) or is_lost:
        assert printed.count("\n") == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_start_seeds_everything_and_asks_for_deterministic_operations_if_told(deterministic, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # is put back afterwards
    threads = torch.get_num_threads()
    args = TrainingArguments(output_dir=str(tmp_path / "run"), seed=3, deterministic=deterministic)
    try:
        record_run(alone(), args, start(alone(), args))
        draws = torch.rand(2)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        start(alone(), args)
        assert torch.equal(torch.rand(2), draws)
        assert json.loads((tmp_path / "run" / "arguments.json").read_text())["seed"] == 3
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_a_tracker_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.cli.script.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--report_to wandb: the package is not installed: pip install wandb"):
        start(alone(), TrainingArguments(output_dir=str(tmp_path / "run"), report_to="wandb"))


@pytest.mark.parametrize(
    ("flags", "variables", "said"),
    [
        ({"hub_model_id": "a/b/c"}, {}, "--hub_model_id a/b/c: Repo id must be"),
        ({"hub_model_id": "anna/a--b"}, {}, "--hub_model_id anna/a--b: "),
        ({"output_dir": "{folder}/my run"}, {}, "--hub_model_id my run: "),  # the default
        ({}, {"HF_TOKEN": ""}, "--push_to_hub: no token for the Hub: log in with `hf auth login`, or set HF_TOKEN"),
        ({}, {"offline": True}, "--push_to_hub: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set in the environment"),
        ({"lora_rank": 2, "model_name_or_path": "{folder}"}, {}, "nobody else has the base model of the adapters"),
        ({"lora_rank": 2, "model_name_or_path": "{folder}", "merge_lora": True}, {}, None),
        ({"lora_rank": 2, "model_name_or_path": "facebook/bart-base"}, {}, None),
        ({"hub_model_id": "anna/retriever"}, {}, None),
    ],
)
def test_what_could_not_be_published_is_refused_at_the_start(flags, variables, said, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # is put back afterwards
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", "offline" in variables)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setenv("HF_TOKEN", variables.get("HF_TOKEN", "hf_some"))
    flags = {name: value.format(folder=tmp_path) if isinstance(value, str) else value for name, value in flags.items()}
    args = TrainAnything(**{"output_dir": str(tmp_path / "run"), "push_to_hub": True, **flags})
    threads = torch.get_num_threads()
    try:
        if said is None:
            assert start(alone(), args).is_dir()
            return
        with pytest.raises(UsageError) as refused:
            start(alone(), args)
    finally:
        torch.set_num_threads(threads)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


@dataclass
class TrainAnything(TrainingArguments):
    """Flags of a script that trains."""

    model_name_or_path: str | None = flag(None, "what is trained")


def test_gradients_are_not_divided_by_accelerate_as_well(tmp_path):
    with pytest.raises(UsageError, match="unset it and use --gradient_accumulation_steps"):
        start(alone(gradient_accumulation_steps=4), TrainingArguments(output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("change", [{"fsdp_version": 1}, {"cpu_ram_efficient_loading": True}])
def test_fsdp_of_another_kind_is_refused(change, tmp_path):
    plugin = {"fsdp_version": 2, "cpu_ram_efficient_loading": False, "activation_checkpointing": False, **change}
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(**plugin))
    with pytest.raises(UsageError, match="fsdp_version must be 2 and fsdp_cpu_ram_efficient_loading false"):
        start(alone(state=state), TrainingArguments(output_dir=str(tmp_path / "run")))


def test_other_systems_than_linux_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UsageError, match="only Linux is supported"):
        start(alone(), TrainingArguments(output_dir=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
