"""Slow tests, `make slow`: kills, damage and signals at many places of a run, and uneven numbers of examples."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import (
    FORWARD,
    ROOT,
    SCRIPTS,
    assert_same_run,
    events,
    history,
    inject,
    kill_all,
    read_jsonl,
    run,
    start,
    wait_until,
    weights,
)

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", 20))  # fewer to develop with


def sample(path, documents: int):
    """A file of the embedded data, six examples for each document."""
    with path.open("w") as file:
        command = [sys.executable, "-m", "utils.data.sample", "--documents", str(documents)]
        subprocess.run(command, cwd=ROOT, stdout=file, check=True)
    return path


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
        # then a kill in the first step, after a step, after a checkpoint (without which no kill comes far) or amid one
        place, wait = rng.choice(["start", "train", "checkpoint", "write", "write"]), rng.random()
        event = {"start": None, "write": "checkpoint"}.get(place, place)
        seen = len(events(folder, event))
        wait_until(lambda: event is None or len(events(folder, event)) > seen, process, folder)  # noqa: B023
        if place == "write":
            wait_until(lambda: any(checkpoints.glob(".tmp_step_*")), process, folder)
        time.sleep(wait * seconds * (0.2 if place == "write" else 2))
        assert process.poll() is None, f"the run ended before kill {number}"
        kill_all(process)
        in_a_write += any(checkpoints.glob(".tmp_step_*"))
        in_a_validation += log.read_text().rstrip().rpartition("\n")[2].startswith('{"event": "epoch"')

    run(script, folder, *flags, processes=processes)
    with capsys.disabled():
        print(f"\n{script}, {processes} process(es), {workers} workers: {KILLS} kills, {in_a_write} inside a write, "
              f"{in_a_validation} inside a validation, {len(events(folder, 'resume'))} resumptions")  # fmt: skip
    assert in_a_write >= KILLS // 10
    assert_same_run(folder, reference, steps=48)


# ----------------------------------------------------------------------------------------------------------------------
# damage


def flip(path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "fingerprint.json", "manifest.json"]
DAMAGES = {
    "emptied": lambda path: path.write_bytes(b""),
    "halved": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one bit flipped": flip,
    "deleted": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def with_all_checkpoints(tmp_path_factory):
    """For each script, a run that nothing happens to, with the checkpoints of all its steps."""
    folders = {script: tmp_path_factory.mktemp("all") for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, folder, "--checkpointing_steps", 1, "--checkpoints_total_limit", 0)
    return folders


def stopped_at(step: int, source, folder):
    """A copy of a run as it was after `step` steps; its checkpoints are that one, the one before and the best."""
    gone = [f"step_{s:08d}" for s in range(1, 13) if s not in (step, step - 1, 6)]
    return shutil.copytree(source, folder, symlinks=True,
                           ignore=shutil.ignore_patterns(*gone, "model.safetensors.*", "last"))  # fmt: skip


@pytest.mark.parametrize(
    ("script", "file", "damage"),
    [("train_summarize.py", file, damage) for file in FILES for damage in DAMAGES]
    + [("train_retrieve.py", file, damage) for file, damage in zip(FILES, DAMAGES, strict=False)],
)
def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    script, file, damage, with_all_checkpoints, tmp_path
):
    folder = stopped_at(10, with_all_checkpoints[script], tmp_path / "run")
    (folder / "model.safetensors").unlink()
    newest = folder / "checkpoints" / "step_00000010"
    DAMAGES[damage](newest / file)
    result = run(script, folder, "--checkpointing_steps", 1)
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert f"{newest} " in warnings[0] and f" {file}: " in warnings[0]
    assert events(folder, "resume")[-1]["checkpoint"].endswith("step_00000009")
    assert_same_run(folder, with_all_checkpoints[script])


# ----------------------------------------------------------------------------------------------------------------------
# where a run starts


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_goes_on_from_the_checkpoint_given_or_starts_anew(script, with_all_checkpoints, tmp_path):
    reference = with_all_checkpoints[script]
    folder = stopped_at(10, reference, tmp_path / "run")
    checkpoints = folder / "checkpoints"
    flags = ["--checkpointing_steps", 1, "--resume_from_checkpoint"]
    refused = run(script, folder, *flags, checkpoints / "step_00000009", expect=2)
    assert "holds other checkpoints, up to step_00000010" in refused.stderr
    refused = run(script, folder, *flags, tmp_path / "nowhere", expect=2)
    assert "--resume_from_checkpoint" in refused.stderr and "Traceback" not in refused.stderr
    other = tmp_path / "other"  # another folder's checkpoint
    run(script, other, *flags, checkpoints / "step_00000009")
    assert events(other, "resume")[0]["checkpoint"].endswith("step_00000009")
    assert all((weights(other)[name] == tensor).all() for name, tensor in weights(reference).items())
    run(script, folder, *flags, "none")
    assert not events(folder, "resume")
    assert_same_run(folder, reference)
    assert {path.name for path in checkpoints.iterdir()} >= {"step_00000012", "last", "best"}
    assert not (checkpoints / "step_00000009").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_finished_run_trains_nothing_more_and_another_shape_or_data_is_refused(
    script, with_all_checkpoints, tmp_path
):
    reference = with_all_checkpoints[script]
    folder = shutil.copytree(reference, tmp_path / "run", symlinks=True)
    before = (folder / "metrics.jsonl").read_bytes()
    for flags, processes, expect, said in [
        (["--per_device_train_batch_size", 2], 1, 2, "batch_size 4 there, 2 here"),
        ([], 2, 1, "num_processes 1 there, 2 here"),  # 1: the launcher's code
        (["--max_train_examples", 47], 1, 2, "belongs to another run: data "),
    ]:
        refused = run(script, folder, *flags, processes=processes, expect=expect)
        assert refused.stderr.count(said) == 1
        assert processes > 1 or "Traceback" not in refused.stderr
    assert (folder / "metrics.jsonl").read_bytes() == before
    result = run(script, folder)
    assert "nothing to train: num_train_epochs 2 reached" in result.stdout
    assert_same_run(folder, reference)


# ----------------------------------------------------------------------------------------------------------------------
# signals


VALIDATION = {"train_retrieve.py": FORWARD["train_retrieve.py"],
              "train_summarize.py": "utils.models.encoder_decoder:EncoderDecoder.generate"}  # fmt: skip


def test_a_second_interrupt_leaves_at_once(tmp_path):
    script, folder, generating = "train_summarize.py", tmp_path / "run", tmp_path / "generating"
    wrapper = inject(tmp_path, script, VALIDATION[script], "True", f"Path({str(generating)!r}).touch()")
    process = start(wrapper, folder, "--eval_steps", 1, "--num_beams", 4, "--min_new_tokens", 900,
                    "--max_new_tokens", 900)  # fmt: skip
    wait_until(generating.exists, process, folder)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None  # the first one waits for a place to save at
    process.send_signal(signal.SIGINT)
    assert process.wait(2) == 130  # amid half a minute of generation
    assert not events(folder, "validation") and not events(folder, "stop")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_amid_a_validation_leaves_soon_and_the_validation_is_made_up_for(script, number, tmp_path):
    documents = {"train_retrieve.py": 120, "train_summarize.py": 30}  # many batches of 8192 tokens, or of 4 examples
    data = sample(tmp_path / "data.jsonl", documents[script])
    flags = ["--train_file", data, "--max_train_examples", 48, "--validation_file", data,
             "--per_device_eval_batch_size", 4, "--checkpointing_steps", 4]  # fmt: skip
    folder, batches = tmp_path / "run", tmp_path / "batches"
    slow = f"Path({str(batches)!r}).open('a').write('.'); time.sleep(0.5)"  # each batch of a validation
    wrapper = inject(tmp_path, script, VALIDATION[script], "not args[0].training", slow)
    process = start(wrapper, folder, *flags)
    wait_until(lambda: batches.exists() and batches.stat().st_size >= 3, process, folder)
    process.send_signal(number)
    sent = time.monotonic()
    assert process.wait(60) == 128 + number
    seconds, done = time.monotonic() - sent, batches.stat().st_size
    assert not events(folder, "validation")
    assert events(folder, "checkpoint")[-1]["step"] == events(folder, "stop")[-1]["step"] == 6
    run(script, tmp_path / "undisturbed", *flags)
    (newest,) = (folder / "checkpoints").glob("*6")
    run(script, tmp_path / "elsewhere", *flags, "--resume_from_checkpoint", newest)
    assert history(tmp_path / "elsewhere")["validation"] == history(tmp_path / "undisturbed")["validation"]
    run(script, folder, *flags)
    assert_same_run(folder, tmp_path / "undisturbed")
    assert done <= 5 and seconds < 4, f"it left {done - 3} batches and {seconds:.1f} s after the signal"


def test_two_processes_resume_at_a_validation_in_the_middle_of_an_epoch(tmp_path):
    script, folder = "train_retrieve.py", tmp_path / "run"
    flags = ["--gradient_accumulation_steps", 1, "--eval_steps", 4, "--checkpointing_steps", 4, "--max_train_steps", 5,
             "--log_steps", 3]  # fmt: skip
    wrapper = inject(tmp_path, script, VALIDATION[script], "not args[0].training", "os._exit(1)")
    run(wrapper, folder, *flags, expect=1, processes=2)
    run(script, folder, *flags, processes=2)
    run(script, tmp_path / "undisturbed", *flags, processes=2)
    assert history(folder) == history(tmp_path / "undisturbed")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_signal_amid_the_validation_of_a_finished_run_leaves_with_its_code(script, with_all_checkpoints, tmp_path):
    folder = shutil.copytree(with_all_checkpoints[script], tmp_path / "run", symlinks=True)
    batches = tmp_path / "batches"
    slow = f"Path({str(batches)!r}).open('a').write('.'); time.sleep(1)"
    wrapper = inject(tmp_path, script, VALIDATION[script], "not args[0].training", slow)
    process = start(wrapper, folder, "--per_device_eval_batch_size", 1)
    wait_until(lambda: batches.exists() and batches.stat().st_size >= 1, process, folder)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM


# ----------------------------------------------------------------------------------------------------------------------
# numbers of examples that fit no batch


@pytest.mark.parametrize(
    ("size", "examples"), [*[("batch", examples) for examples in (61, 64, 65, 3)], ("tokens", 61), ("tokens", 3)]
)
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("script", SCRIPTS)
def test_each_example_counts_once_in_an_epoch(script, processes, size, examples, tmp_path):
    budget = {"train_summarize.py": 500, "train_retrieve.py": 300}[script]
    run(script, tmp_path, "--sample_documents", 11, "--max_train_examples", examples, "--max_eval_examples", 2,
        *(["--max_tokens", budget] if size == "tokens" else []), processes=processes)  # fmt: skip
    lines = events(tmp_path, "train")
    for epoch in (0, 1):
        assert sum(line["examples"] for line in lines if math.ceil(line["epoch"]) == epoch + 1) == examples
    assert [line["examples"] for line in events(tmp_path, "epoch")] == [examples] * 2
    if size == "tokens":  # two micro-batches a process, padding included
        for line in lines:
            assert line["tokens"] / (1 - line["padding"]) <= 2 * processes * budget + 1


def test_examples_without_positives_are_left_out_of_the_retrievers_epochs(tmp_path):
    data = sample(tmp_path / "data.jsonl", documents=2)
    records = read_jsonl(data)
    for record in records[::4]:
        record.update(evidence=[], summary=["Zyzzyva."])  # nor does a passage share a word with it
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    result = run("train_retrieve.py", tmp_path / "run", "--train_file", data, "--validation_file", data)
    assert "12 training examples, 12 validation examples; positives from gold evidence: 9" in result.stdout
    assert [line["examples"] for line in events(tmp_path / "run", "epoch")] == [9, 9]
