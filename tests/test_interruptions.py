"""Runs that are killed, interrupted, damaged or out of disk: what they leave, and that they end as if undisturbed."""

import resource
import shutil
import signal

import psutil
import pytest
import torch
from conftest import (
    STEPS,
    assert_same_run,
    beir_flags,
    events,
    history,
    kill_all,
    run,
    start,
    wait_until,
    weights,
    write_beir,
)
from safetensors.torch import save_file


@pytest.mark.parametrize(
    "script",
    [pytest.param("train_retrieve.py", marks=pytest.mark.slow),
     pytest.param("train_rerank.py", marks=pytest.mark.slow), "train_summarize.py"],
)  # fmt: skip
def test_killed_runs_end_with_the_weights_of_an_undisturbed_one(script, undisturbed, tmp_path):
    for step in (3, 8):  # in the middle of the first epoch, and of the second
        process = start(script, tmp_path, "--checkpointing_steps", 1, "--dataloader_num_workers", 2)
        wait_until(lambda: len(events(tmp_path, "train")) >= step, process, tmp_path)  # noqa: B023
        kill_all(process)
        assert not (tmp_path / "model.safetensors").exists()
    run(script, tmp_path, "--checkpointing_steps", 1)
    assert len(events(tmp_path, "resume")) >= 1
    assert_same_run(tmp_path, undisturbed[script])


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("script", "number", "processes"),
    [
        ("train_summarize.py", signal.SIGTERM, 1),
        pytest.param("train_summarize.py", signal.SIGUSR1, 2, marks=slow),  # to one worker of two
        pytest.param("train_summarize.py", signal.SIGINT, 1, marks=slow),
        pytest.param("train_summarize.py", signal.SIGUSR1, 1, marks=slow),
        ("train_rerank.py", signal.SIGTERM, 1),
        pytest.param("train_rerank.py", signal.SIGUSR1, 2, marks=slow),
        pytest.param("train_retrieve.py", signal.SIGTERM, 1, marks=slow),
        pytest.param("train_retrieve.py", signal.SIGINT, 1, marks=slow),
        pytest.param("train_retrieve.py", signal.SIGUSR1, 1, marks=slow),
        pytest.param("train_retrieve.py", signal.SIGUSR1, 2, marks=slow),
    ],
)
def test_a_signal_saves_and_leaves_with_its_code_and_the_run_goes_on(script, number, processes, tmp_path, request):
    folder = tmp_path / "run"
    process = start(script, folder, "--log_format", "none", processes=processes)
    wait_until(lambda: len(events(folder, "train")) >= 2, process, folder)
    if processes == 1:
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    else:
        psutil.Process(process.pid).children()[1].send_signal(number)
        process.wait(60)
    stop = events(folder, "stop")[-1]
    assert number.name in stop["reason"]
    last = STEPS // processes
    assert events(folder, "checkpoint")[-1]["step"] == stop["step"] < last
    run(script, folder, processes=processes)
    if processes == 1:
        assert_same_run(folder, request.getfixturevalue("undisturbed")[script])
    else:
        run(script, tmp_path / "undisturbed", processes=processes)
        assert_same_run(folder, tmp_path / "undisturbed", steps=last)


@pytest.mark.slow
@pytest.mark.parametrize("is_corpus", [False, True], ids=["documents", "corpus"])
def test_mined_negatives_are_those_of_the_interrupted_run(is_corpus, undisturbed, tmp_path):
    """Killed in the second epoch, whose negatives a model found that no longer exists."""
    script, flags = "train_retrieve.py", ("--mine_negatives_every", 1, "--checkpointing_steps", 1)
    if is_corpus:
        write_beir(tmp_path, train=8, validation=1)
        flags += (*beir_flags(tmp_path), "--ranking", "hybrid", "--found_weight", 0.1, "--draft_share", 0.7)
    run(script, tmp_path / "whole", *flags)
    process = start(script, tmp_path / "killed", *flags)
    wait_until(lambda: len(events(tmp_path / "killed", "train")) >= 8, process, tmp_path / "killed")
    kill_all(process)
    run(script, tmp_path / "killed", *flags)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    assert all("hop2" in line for line in events(tmp_path / "killed", "validation"))
    if is_corpus:
        return
    mined, plain = (history(folder)["train"] for folder in (tmp_path / "whole", undisturbed[script]))
    assert mined[: STEPS // 2] == plain[: STEPS // 2]  # the first epoch's are BM25's
    assert mined[STEPS // 2] != plain[STEPS // 2]


ADAPTERS = ["--lora_rank", 4, "--lora_dropout", 0.1, "--learning_rate", 1e-2]


@pytest.mark.parametrize(
    ("script", "processes"),
    [
        ("train_summarize.py", 1),
        pytest.param("train_summarize.py", 2, marks=slow),
        pytest.param("train_retrieve.py", 1, marks=slow),
        pytest.param("train_retrieve.py", 2, marks=slow),
    ],
)
def test_killed_runs_of_adapters_end_with_the_adapters_of_an_undisturbed_one(script, processes, undisturbed, tmp_path):
    base = shutil.copytree(undisturbed[script], tmp_path / "base")
    flags = ["--model_name_or_path", base, *ADAPTERS, "--mixed_precision", "bf16", "--checkpointing_steps", 1]
    run(script, tmp_path / "whole", *flags, processes=processes)
    folder = tmp_path / "killed"
    process = start(script, folder, *flags, processes=processes)
    wait_until(lambda: len(events(folder, "train")) >= 3, process, folder)
    kill_all(process)
    assert not (folder / "adapter_model.safetensors").exists()
    checkpoints = folder / "checkpoints"
    of_checkpoint = weights(max(checkpoints.glob("step_*")))
    assert sum(".lora_" in name for name in of_checkpoint) == len(weights(tmp_path / "whole"))
    assert {name for name in of_checkpoint if ".lora_" not in name} <= {"model.final_logits_bias"}  # a buffer of BART
    run(script, folder, *flags, processes=processes)
    assert len(events(folder, "resume")) == 1
    assert_same_run(folder, tmp_path / "whole", steps=STEPS // processes)
    assert all(tensor.abs().max() > 0 for name, tensor in weights(folder).items() if "pooler" not in name)

    # other weights under the same name
    tensors = weights(base)
    name = next(name for name in tensors if name.endswith(("fc1.weight", "query.weight")))
    tensors[name][0, 0] += 1e-2
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    result = run(
        script, folder, *flags, "--num_train_epochs", 3, processes=processes, expect=2 if processes == 1 else 1
    )
    assert "belongs to another run: frozen weights " in result.stderr


@pytest.mark.parametrize(
    ("adapters", "processes"),
    [((), 1), pytest.param((), 2, marks=slow), pytest.param(ADAPTERS, 1, marks=slow),
     pytest.param(ADAPTERS, 2, marks=slow)],
)  # fmt: skip
def test_killed_runs_of_language_models_end_as_if_undisturbed(adapters, processes, language_model, tmp_path):
    script = "train_summarize.py"
    flags = ["--model_name_or_path", language_model, *adapters, "--max_source_length", 256, "--checkpointing_steps", 1]
    run(script, tmp_path / "whole", *flags, processes=processes)
    folder = tmp_path / "killed"
    process = start(script, folder, *flags, processes=processes)
    wait_until(lambda: len(events(folder, "train")) >= 3, process, folder)
    kill_all(process)
    run(script, folder, *flags, processes=processes)
    assert len(events(folder, "resume")) == 1
    assert_same_run(folder, tmp_path / "whole", steps=STEPS // processes)
    assert all(line["padding"] == 0 for line in events(folder, "train"))


@slow
def test_adapters_and_whole_weights_do_not_start_from_each_other(undisturbed, tmp_path):
    script, base = "train_summarize.py", undisturbed["train_summarize.py"]
    adapters = ["--model_name_or_path", base, *ADAPTERS, "--max_train_steps", 1]
    run(script, tmp_path / "adapters", *adapters)
    begin = ["--reset_optimizer", "--reset_lr_scheduler", "--reset_dataloader", "--reset_meters"]
    run(script, tmp_path / "further", *adapters, "--init_from", tmp_path / "adapters", *begin, "--learning_rate", 0)
    ours, theirs = weights(tmp_path / "further"), weights(tmp_path / "adapters")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    said = "do not train the same weights, or its adapters belong to another base model; name its run folder with"
    for flags in (
        [*adapters, "--init_from", base],
        ["--model_name_or_path", base, "--init_from", tmp_path / "adapters"],
        [*adapters, "--model_name_or_path", tmp_path / "other", "--init_from", tmp_path / "adapters"],
    ):
        if not (tmp_path / "other").exists():  # another base model
            run(script, tmp_path / "other", "--seed", 7, "--max_train_steps", 1)
        result = run(script, tmp_path / "refused", *flags, expect=2)
        assert said in result.stderr and "Traceback" not in result.stderr


def test_all_checkpoints_damaged_is_an_error_and_never_a_fresh_start(undisturbed, tmp_path):
    script = "train_summarize.py"
    run(script, tmp_path, "--max_train_steps", 2, "--checkpointing_steps", 1)
    for file in (tmp_path / "checkpoints").glob("step_*/optimizer.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    result = run(script, tmp_path, "--max_train_steps", 2, expect=2)
    assert "all 2 are damaged" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_file_system_that_is_full_ends_the_run_with_74_and_the_earlier_checkpoint(tmp_path, undisturbed):
    script = "train_summarize.py"
    run(script, tmp_path, "--stop_time_hours", 1e-9)  # one step
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))  # inherited: no file may grow over a megabyte
    try:
        result = run(script, tmp_path, expect=74)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "could not be written" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == kept
    run(script, tmp_path)
    assert history(tmp_path)["train"] == history(undisturbed[script])["train"]
    assert all(torch.equal(tensor, weights(undisturbed[script])[name]) for name, tensor in weights(tmp_path).items())


def test_fine_tuning_from_another_run_keeps_or_resets_its_state(tmp_path, undisturbed):
    script = "train_summarize.py"
    source = undisturbed[script]
    run(script, tmp_path / "reset", "--init_from", source, "--reset_optimizer", "--reset_lr_scheduler",
        "--reset_dataloader", "--reset_meters", "--max_train_steps", 1, "--learning_rate", 0)  # fmt: skip
    assert events(tmp_path / "reset", "train")[0]["step"] == 1
    ours, theirs = weights(tmp_path / "reset"), weights(source)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    run(script, tmp_path / "kept", "--init_from", source, "--num_train_epochs", 3, "--learning_rate", 0)
    assert events(tmp_path / "kept", "train")[0]["step"] == STEPS + 1
    ours = weights(tmp_path / "kept")  # not at the learning rate of that run
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    result = run(script, tmp_path / "ended", "--init_from", source, "--reset_dataloader", expect=2)
    assert (
        f"is at step {STEPS} of {STEPS}, and this run has {STEPS} steps more; add --reset_lr_scheduler" in result.stderr
    )
    # its own schedule from the beginning, although the batches are others too
    run(script, tmp_path / "halved", "--init_from", source, "--reset_lr_scheduler", "--num_train_epochs", 3,
        "--gradient_accumulation_steps", 1, "--num_warmup_steps", 0)  # fmt: skip
    assert events(tmp_path / "halved", "train")[0]["lr"] > 0.9 * 3e-4
    # other data, from the middle of an epoch: its own epoch is read from the start
    run(script, tmp_path / "short", "--stop_time_hours", 1e-9)
    run(script, tmp_path / "other", "--model_name_or_path", tmp_path / "short", "--init_from", tmp_path / "short",
        "--reset_lr_scheduler", "--num_train_epochs", 1, "--max_train_examples", 8)  # fmt: skip
    assert [line["examples"] for line in events(tmp_path / "other", "train")] == [8]


@pytest.mark.parametrize("script", [pytest.param("train_retrieve.py", marks=pytest.mark.slow), "train_summarize.py"])
def test_gradient_checkpointing_changes_no_weight_and_may_change_on_resume(script, undisturbed, tmp_path):
    run(script, tmp_path, "--gradient_checkpointing")
    ours, theirs = weights(tmp_path), weights(undisturbed[script])
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-6 for name in theirs)
    run(script, tmp_path)  # which resumes, and has nothing left to do
    assert events(tmp_path, "resume")
