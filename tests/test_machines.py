"""Several machines: two launchers on this one, each with a cache of its own, that share nothing but the run folder."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from conftest import LOOP, OFFLINE, ROOT, SMALL, STEPS, assert_same_run, events, kill_all, read_jsonl, run, wait_until

CONFIG = ROOT / "accelerate_configs/multi_node.yaml"
LAUNCH = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", CONFIG,
          "--num_processes", 2, "--mixed_precision", "no"]  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_machines(script: str, folder, flags) -> list[subprocess.Popen]:
    """Two machines with a process each; what the second prints goes to a folder of its own."""
    started, port = [], free_port()
    for rank in range(2):
        home = folder.with_name(f"machine{rank}")
        for each in (folder, home):
            each.mkdir(exist_ok=True)
        words = [*LAUNCH, "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
                 str(ROOT / script), "--output_dir", folder, *SMALL[script], *LOOP, *flags]  # fmt: skip
        with (home / "output.txt").open("wb") as output:
            started.append(subprocess.Popen(
                list(map(str, words)), cwd=ROOT, env={**os.environ, **OFFLINE, "HF_HOME": str(home / "cache")},
                stdout=output, stderr=subprocess.STDOUT,
            ))  # fmt: skip
    return started


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" &
    tasks+=($!)
done
for task in "${tasks[@]}"; do wait $task || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [ $1 = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi
"""


def start_job(script: str, folder, flags, home) -> subprocess.Popen:
    """runs/slurm.sh, with stand-ins for srun, which starts two processes, and scontrol."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (home / name).write_text(text)
        (home / name).chmod(0o755)
    environment = {"PATH": f"{home}:{Path(sys.executable).parent}:{os.environ['PATH']}", "SLURM_JOB_ID": free_port(),
                   "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "ACCELERATE_MIXED_PRECISION": "no"}  # fmt: skip
    words = ["bash", ROOT / "runs/slurm.sh", ROOT / script, "--output_dir", folder, *SMALL[script], *LOOP, *flags]
    with (home / "output.txt").open("wb") as output:
        return subprocess.Popen(list(map(str, words)), cwd=home, env={**os.environ, **OFFLINE, **environment},
                                stdout=output, stderr=subprocess.STDOUT)  # fmt: skip


def workers(launcher, script: str) -> list[psutil.Process]:
    """The processes that run a script, without their data loaders."""
    found = psutil.Process(launcher.pid).children(recursive=True)
    return [each for each in found if Path(each.exe()).name.startswith("python") and script in " ".join(each.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_summarize.py", "train_retrieve.py"])
def test_two_machines_end_as_one_also_after_a_machine_was_killed_and_a_job_ran_out_of_time(script, tmp_path):
    one, folder, flags = tmp_path / "one", tmp_path / "run", ("--checkpointing_steps", 1, "--num_train_epochs", 4)
    run(script, one, *flags, processes=2)

    first, second = start_machines(script, folder, flags)
    wait_until(lambda: len(events(folder, "train")) >= 2, first, tmp_path / "machine0")
    kill_all(second)
    assert first.wait(60) == 1
    said = (tmp_path / "machine0/output.txt").read_text()
    assert f"{script}: process 0 on " in said and "run the same command again, on all machines, to resume" in said
    assert not (folder / "model.safetensors").exists()

    job = start_job(script, folder, flags, tmp_path / "machine0")
    wait_until(lambda: len(events(folder, "train")) >= 5, job, tmp_path / "machine0")
    for process in workers(job, script):  # as Slurm does before the time limit
        process.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 138
    assert (tmp_path / "machine0/requeued").read_text().startswith("requeue ")
    assert "SIGUSR1" in events(folder, "stop")[-1]["reason"]

    assert [machine.wait(200) for machine in start_machines(script, folder, flags)] == [0, 0]
    assert len(events(folder, "resume")) == 2
    assert_same_run(folder, one, steps=STEPS)  # scores of validations, too
    for name in ("predictions.validation.jsonl", "retrieved.validation.jsonl"):
        if (one / name).exists():
            assert read_jsonl(folder / name) == read_jsonl(one / name)
