"""A run folder belongs to one run: what is refused changes nothing, and what is written was computed."""

import json
import shutil

import pytest
from conftest import assert_same_run, events, inject, launch, run, start, wait_until

from utils.models.settings import saved_settings

SCRIPT = "train_summarize.py"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(SCRIPT, folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of a finished run with links resolved, as `scp -r` makes it."""
    return shutil.copytree(finished, tmp_path / "run", symlinks=False)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--train_file", "absent.jsonl", "--validation_file", "absent.jsonl"], "no such file"),
        (["--learning_rate", 1e-6], "--learning_rate 0.0003 there, 1e-06 here"),
        (["--label_smoothing_factor", 0], "--label_smoothing_factor 0.1 there, 0.0 here"),
        (["--dropout", 0.3], "--dropout 0.1 there, 0.3 here"),
        (["--fusion", "fid"], "--fusion concat there, fid here"),
        (["--seed", 7], "--seed 42 there, 7 here"),
        (["--init_from", "absent", "--resume_from_checkpoint", "none"], "--init_from"),
    ],
)
def test_a_refused_command_names_the_flag_and_changes_nothing(finished, flags, said):
    before = contents(finished)
    result = run(SCRIPT, finished, *flags, expect=2)
    assert said in result.stderr and "Traceback" not in result.stderr
    assert contents(finished) == before


def test_another_pretrained_model_of_the_same_size_is_another_run(finished, tmp_path):
    run(SCRIPT, tmp_path / "run", "--model_name_or_path", finished, "--max_train_steps", 2)
    other = shutil.copytree(finished, tmp_path / "other")
    result = run(SCRIPT, tmp_path / "run", "--model_name_or_path", other, "--max_train_steps", 2, expect=2)
    assert f"--model_name_or_path {finished} there, {other} here" in result.stderr


def test_flags_that_only_move_the_end_may_change_are_said_and_hold(copied):
    result = run(SCRIPT, copied, "--num_train_epochs", 3, "--log_steps", 5)
    assert "changed since the last start: " in result.stdout
    assert "--num_train_epochs 2 -> 3" in result.stdout and "--log_steps 1 -> 5" in result.stdout
    assert json.loads((copied / "arguments.json").read_text())["num_train_epochs"] == 3
    assert events(copied, "epoch")[-1]["epoch"] == 3


@pytest.mark.parametrize("resume", ["auto", "none"])
def test_a_folder_of_the_other_stage_is_refused_and_kept(finished, resume):
    before = contents(finished)
    result = run("train_retrieve.py", finished, "--resume_from_checkpoint", resume, expect=2)
    assert f"--output_dir {finished}: holds a run of {SCRIPT}" in result.stderr
    assert contents(finished) == before


def test_a_second_run_at_the_same_time_is_refused_at_once(tmp_path):
    first = start(SCRIPT, tmp_path / "run", "--num_train_epochs", 50)
    try:
        wait_until(lambda: (tmp_path / "run" / ".lock").exists(), first, tmp_path / "run")
        result = run(SCRIPT, tmp_path / "run", expect=2)
        assert "another run is working in this folder" in result.stderr
    finally:
        first.kill()
        first.wait(30)
    run(SCRIPT, tmp_path / "run", "--max_train_steps", 1)  # the lock of a killed run is gone


def test_a_run_copied_with_its_links_resolved_resumes(copied, tmp_path):
    assert (copied / "checkpoints/last").is_dir() and not (copied / "checkpoints/last").is_symlink()
    run(SCRIPT, copied, "--num_train_epochs", 3)
    assert (copied / "checkpoints/last").is_symlink() and (copied / "checkpoints/best").is_symlink()
    run(SCRIPT, tmp_path / "whole", "--num_train_epochs", 3)
    assert events(copied, "resume")[0]["step"] == 12
    assert events(copied, "epoch")[-1]["examples"] == events(tmp_path / "whole", "epoch")[-1]["examples"]


def test_the_published_model_brings_its_settings(finished):
    settings = saved_settings(finished)
    arguments = json.loads((finished / "arguments.json").read_text())
    assert {"fusion", "top_k", "source_prefix"} <= settings.keys()
    assert all(arguments[name] == value for name, value in settings.items())
    generation = json.loads((finished / "generation_config.json").read_text())
    assert (generation["num_beams"], generation["max_new_tokens"]) == (1, 2)


def test_an_error_in_validation_loses_no_step(tmp_path, undisturbed):
    rouge = "utils.evaluation.rouge:rouge_of_each"
    wrapper = inject(tmp_path, SCRIPT, rouge, "calls == 1", "raise RuntimeError('validation failed')")
    result = run(wrapper, tmp_path / "run", expect=1)
    assert "validation failed" in result.stderr
    assert (tmp_path / "run/checkpoints/last").resolve().name == "step_00000006"  # the first epoch's end
    run(SCRIPT, tmp_path / "run")
    assert_same_run(tmp_path / "run", undisturbed[SCRIPT])


def test_an_error_of_another_process_alone_is_shown_and_one_of_all_is_shown_once(tmp_path):
    fail = "from utils.errors import UsageError; raise UsageError('only here')"
    for when, said in (
        ("rank == 1", f"{SCRIPT}: process 1: error: only here"),
        ("True", f"{SCRIPT}: error: only here"),
    ):
        wrapper = inject(tmp_path, SCRIPT, "utils.data.loading:load_splits", when, fail)
        result = run(wrapper, tmp_path / "run", processes=2, expect=1)  # the launcher's code
        assert result.stderr.count("error: only here") == 1 and said in result.stderr


def test_a_full_disk_in_a_library_is_74_and_one_line(tmp_path):
    wrapper = inject(tmp_path, "train_retrieve.py", "transformers.configuration_utils:PretrainedConfig.save_pretrained",
                     "True", "raise RuntimeError('I/O error: No space left on device (os error 28)')")  # fmt: skip
    result = launch(wrapper, "--output_dir", tmp_path / "run", "--sample_documents", 8)
    assert result.returncode == 74
    assert "Traceback" not in result.stderr and "No space left on device" in result.stderr
