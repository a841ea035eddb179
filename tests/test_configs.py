"""The files of accelerate_configs/ do what their comments say: the CPU ones are started, all are checked key by key."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "accelerate_configs").glob("*.yaml"))
slow = pytest.mark.slow
every_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

# Two gloo processes abort at interpreter exit in a few runs of a hundred: hence os._exit, as the scripts do.
PROBE = """
import os
import sys

import torch
from accelerate import Accelerator

accelerator = Accelerator()
total = accelerator.reduce(torch.tensor(accelerator.process_index + 1.0, device=accelerator.device), "sum").item()
line = f"probe: {accelerator.num_processes} {accelerator.device.type} {accelerator.mixed_precision} {total}\\n"
os.write(1, line.encode())  # at once: two processes must not write into one line
accelerator.end_training()
sys.stdout.flush()
os._exit(0)
"""


def quoted_command(path: Path) -> tuple[dict[str, str], list[str]]:
    """The command line in the comment on top of a configuration: its variables, and the words after those."""
    comment = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    commands = [line for line in comment if "accelerate launch --" in line]
    assert len(commands) == 1, f"{path}: {len(commands)} command lines in the comment instead of one"
    words = shlex.split(re.sub(r"\$\(nvidia-smi .*?\)", "8", commands[0]))  # so many GPUs has this machine
    first = words.index("accelerate")
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


def launch_arguments(path: Path):
    """The quoted command as `accelerate launch` parses it; an unknown flag ends in SystemExit."""
    _, words = quoted_command(path)
    assert words[:2] == ["accelerate", "launch"]
    return launch_command_parser().parse_args(words[2:])


def known_keys(section: str, title: str) -> set[str]:
    """The keys that `accelerate launch` reads from a section of a configuration: its own flags of that name."""
    [group] = [group for group in launch_command_parser()._action_groups if group.title == title]
    keys = {action.dest for action in group._group_actions}
    assert keys, f"accelerate launch has no flags for {section}"
    return keys


def unknown_keys(path: Path) -> list[str]:
    """The keys of a configuration that accelerate does not know; inside a section it would ignore them silently."""
    config = yaml.safe_load(path.read_text())
    unknown = set(config) - set(ClusterConfig.__dataclass_fields__)
    known = known_keys("fsdp_config", "FSDP Arguments")
    unknown |= {f"fsdp_config.{key}" for key in set(config.get("fsdp_config", {})) - known}
    return sorted(unknown)


def start(path: Path, folder: Path) -> list[str]:
    """Runs the probe as the comment says to run the script; returns what each process printed after `probe:`."""
    variables, words = quoted_command(path)
    script = words.index(launch_arguments(path).training_script)
    probe = folder / "probe.py"
    probe.write_text(PROBE)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", *words[1:script], str(probe)],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return [line.removeprefix("probe: ") for line in done.stdout.splitlines() if line.startswith("probe: ")]


def test_cpu_starts_one_process_on_the_processor(tmp_path):
    assert start(ROOT / "accelerate_configs/cpu.yaml", tmp_path) == ["1 cpu no 1.0"]


def test_multi_cpu_starts_two_processes_that_add_up_their_tensors(tmp_path):
    assert start(ROOT / "accelerate_configs/multi_cpu.yaml", tmp_path) == ["2 cpu no 3.0"] * 2


@every_config
def test_accelerate_knows_every_key(path):
    assert unknown_keys(path) == []
    config = load_config_from_file(str(path))
    assert launch_arguments(path).num_processes or config.num_processes >= config.num_machines


@pytest.mark.parametrize(
    ("name", "key", "typo", "reported"),
    [
        ("cpu", "num_processes", "num_process", "num_process"),
        ("fsdp2", "fsdp_reshard_after_forward", "fsdp_reshard_after_foward", "fsdp_config.fsdp_reshard_after_foward"),
    ],
)
def test_a_misspelt_key_is_found(tmp_path, name, key, typo, reported):
    text = (ROOT / f"accelerate_configs/{name}.yaml").read_text()
    assert f"{key}:" in text
    planted = tmp_path / "planted.yaml"
    planted.write_text(text.replace(f"{key}:", f"{typo}:"))
    assert unknown_keys(planted) == [reported]


@every_config
def test_the_quoted_command_names_its_file_and_a_script_and_is_accepted(path):
    arguments = launch_arguments(path)
    assert arguments.config_file == str(path.relative_to(ROOT))
    assert (ROOT / arguments.training_script).is_file()


@pytest.mark.parametrize("name", ["multi_gpu", "multi_node", "fsdp2"])
def test_the_number_of_gpus_is_no_guess_of_ours(name):
    path = ROOT / f"accelerate_configs/{name}.yaml"
    assert _validate_launch_command(launch_arguments(path))[0].num_processes == (16 if name == "multi_node" else 8)
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "train_summarize.py"])
    with pytest.raises(ValueError, match="You need to manually pass in `--num_processes`"):
        _validate_launch_command(arguments)


def test_a_misspelt_flag_in_a_quoted_command_is_found(tmp_path, capsys):
    planted = tmp_path / "planted.yaml"
    text = (ROOT / "accelerate_configs/multi_node.yaml").read_text()
    planted.write_text(text.replace("--machine_rank 0 --main", "--machine_rang 0 --main"))
    with pytest.raises(SystemExit):
        launch_arguments(planted)
    assert "machine_rang" in capsys.readouterr().err


def test_fsdp2_settings_reach_the_plugin(monkeypatch):
    # the launcher hands them on as environment variables, from which every process builds its plugin
    monkeypatch.chdir(ROOT)
    arguments, _, _ = _validate_launch_command(launch_arguments(ROOT / "accelerate_configs/fsdp2.yaml"))
    for key, value in prepare_multi_gpu_env(arguments).items():
        monkeypatch.setenv(key, value)
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.activation_checkpointing is False


# ---- threads

THREADS = """
import os
import sys

sys.path.insert(0, {root!r})
import torch
from accelerate import Accelerator

from utils.cli.arguments import RunArguments
from utils.cli.script import run_script, start


def main():
    accelerator = Accelerator()
    start(accelerator, RunArguments(output_dir=sys.argv[1]))
    os.write(1, f"threads: {{torch.get_num_threads()}} {{os.environ['OMP_NUM_THREADS']}}\\n".encode())
    accelerator.wait_for_everyone()
    accelerator.end_training()


run_script(main)
"""
ACCELERATE = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
WAYS = {  # how a script is started, and by how many processes
    "python": ([], 1),
    "cpu": ([*ACCELERATE, "accelerate_configs/cpu.yaml"], 1),
    "multi_cpu": ([*ACCELERATE, "accelerate_configs/multi_cpu.yaml"], 2),
    "torchrun": (["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"], 2),
}


def threads(way: str, folder: Path, more=(), **variables) -> tuple[list[str], str]:
    """What each process printed of its threads when it was started in a `way`, and the errors."""
    script = folder / "threads.py"
    script.write_text(THREADS.format(root=str(ROOT)))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "OMP_", "MKL_"))}
    words, _ = WAYS[way]
    done = subprocess.run([sys.executable, *words, *more, str(script), str(folder / "run")], cwd=ROOT, text=True,
                          env=clean | {"ACCELERATE_USE_CPU": "1", **variables}, capture_output=True,
                          timeout=120)  # fmt: skip
    return [line for line in done.stdout.splitlines() if line.startswith("threads: ")], done.stderr


@pytest.mark.parametrize(
    "way", ["cpu", *(pytest.param(way, marks=slow) for way in ("python", "multi_cpu", "torchrun"))]
)
def test_threads_are_those_that_the_user_set_else_the_cores_shared_by_the_processes(way, tmp_path):
    processes = WAYS[way][1]
    cores = len(os.sched_getaffinity(0))
    default, asked = max(1, cores // processes), cores + 1  # which no default is
    assert threads(way, tmp_path)[0] == [f"threads: {default} {default}"] * processes
    assert threads(way, tmp_path, OMP_NUM_THREADS=str(asked))[0] == [f"threads: {asked} {asked}"] * processes


@slow
def test_mkl_threads_and_the_launchers_flag_hold_and_a_contradiction_is_refused(tmp_path):
    asked = str(len(os.sched_getaffinity(0)) + 1)
    assert threads("python", tmp_path, MKL_NUM_THREADS=asked)[0] == [f"threads: {asked} {asked}"]
    flag = ["--num_cpu_threads_per_process", asked]
    assert threads("cpu", tmp_path, flag)[0] == [f"threads: {asked} {asked}"]
    printed, errors = threads("python", tmp_path, OMP_NUM_THREADS="1", MKL_NUM_THREADS="2")
    assert not printed and "OMP_NUM_THREADS=1 and MKL_NUM_THREADS=2 in the environment" in errors
    printed, errors = threads("python", tmp_path, OMP_NUM_THREADS="all")
    assert not printed and "OMP_NUM_THREADS=all in the environment: must be a whole number of at least 1" in errors
    assert "Traceback" not in errors
