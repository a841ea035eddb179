"""Slow tests, `make slow`: kills, damage and signals at many places of a run, and uneven numbers of examples."""

import os
import random
import time

import pytest
from conftest import assert_same_run, events, kill_all, run, start, wait_until

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 20))  # fewer to develop with


@pytest.mark.parametrize(
    ("script", "processes", "workers"),
    [*[("train_summarize.py", processes, workers) for processes in (1, 2) for workers in (0, 2)],
     ("train_retrieve.py", 1, 2), ("train_retrieve.py", 2, 0)],
)  # fmt: skip
def test_a_run_killed_twenty_times_ends_as_if_undisturbed(script, processes, workers, tmp_path, capsys):
    flags = ["--num_train_epochs", 8, "--per_device_train_batch_size", 4 // processes, "--checkpointing_steps", 1,
             "--dataloader_num_workers", workers]  # fmt: skip
    reference, folder = tmp_path / "undisturbed", tmp_path / "killed"
    run(script, reference, *flags, processes=processes)
    seconds = events(reference, "done")[0]["seconds"] / 48  # of a step with its share of checkpoints and validations
    log, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    rng = random.Random(f"{script} {processes} {workers}")
    in_a_write, in_a_validation = 0, 0

    for number in range(KILLS):
        before = log.stat().st_ino if log.exists() else None
        process = start(script, folder, *flags, processes=processes)
        wait_until(lambda: log.exists() and log.stat().st_ino != before, process, folder)  # noqa: B023 - it resumed
        # then a kill in the first step, or after a new step, or after a new checkpoint, without which none comes far
        event = rng.choice([None, "train", "checkpoint", "checkpoint"])
        seen = len(events(folder, event))
        wait_until(lambda: event is None or len(events(folder, event)) > seen, process, folder)  # noqa: B023
        time.sleep(rng.uniform(0, 2 * seconds))
        assert process.poll() is None, f"the run ended before kill {number}"
        kill_all(process)
        in_a_write += any(checkpoints.glob(".tmp_step_*"))
        in_a_validation += log.read_text().rstrip().rpartition("\n")[2].startswith('{"event": "epoch"')

    run(script, folder, *flags, processes=processes)
    with capsys.disabled():
        print(f"\n{script}, {processes} process(es), {workers} workers: {KILLS} kills, {in_a_write} inside a write, "
              f"{in_a_validation} inside a validation, {len(events(folder, 'resume'))} resumptions")  # fmt: skip
    assert in_a_write or KILLS < 20
    assert_same_run(folder, reference, steps=48)
