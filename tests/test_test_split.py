"""The test split: scored and written once, at the end, with the final model; it decides nothing."""

import shutil

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, events, history, inject, read_jsonl, run, weights

from utils.data.loading import load_examples
from utils.data.sample import sample_records
from utils.evaluation.retrieval import retrieval_scores
from utils.evaluation.rouge import rouge_scores
from utils.files import write_jsonl

OUTPUT = {"train_retrieve.py": "retrieved.test.jsonl", "train_summarize.py": "predictions.test.jsonl"}


slow = pytest.mark.slow
one_fast = pytest.mark.parametrize("script", [pytest.param("train_retrieve.py", marks=slow), "train_summarize.py"])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Flags of three splits. Of the 12 test examples, 5 have neither reference nor evidence."""
    folder = tmp_path_factory.mktemp("splits")
    for split, documents in (("train", 8), ("validation", 1), ("test", 2)):
        records = sample_records(split, documents)
        if split == "test":
            records = [{k: v for k, v in record.items() if number % 5 not in (0, 4) or k not in ("summary", "evidence")}
                       for number, record in enumerate(records)]  # fmt: skip
        write_jsonl(folder / f"{split}.jsonl", records)
    bare = [{k: v for k, v in record.items() if k not in ("summary", "evidence")} for record in records]
    write_jsonl(folder / "bare.jsonl", bare)
    return {split: [f"--{split}_file", folder / f"{split}.jsonl"] for split in ("train", "validation", "test")} | {
        "bare": ["--test_file", folder / "bare.jsonl"]
    }


@pytest.fixture(scope="module")
def without(files, tmp_path_factory):
    """For each script, a finished run without a test split."""
    folders = {script: tmp_path_factory.mktemp("without") / "run" for script in SCRIPTS}
    for script, folder in folders.items():
        run(script, folder, *files["train"], *files["validation"])
    return folders


def scores_of(script, folder, examples) -> tuple[dict, int]:
    """Means over the written examples that can be scored, computed anew, and how many these are."""
    written = read_jsonl(folder / OUTPUT[script])
    assert [line["id"] for line in written] == [example.id for example in examples]  # each once, in order
    if script == "train_summarize.py":
        scores = [rouge_scores(line["prediction"], line["summary"]) for line in written if line["summary"]]
        return {name: np.mean([score[name] for score in scores]) for name in scores[0]}, len(scores)
    scores = []
    for line, example in zip(written, examples, strict=True):
        if example.evidence:
            words = [len(text.split()) for text in example.document.passages]
            scores.append(retrieval_scores([entry["passage"] for entry in line["retrieved"]], example.evidence, words))
    return {name: np.mean([score[name] for score in scores]) for name in ("recall@5", "ndcg@10")}, len(scores)


@one_fast
def test_a_finished_run_scores_a_test_split_that_is_added_later_and_trains_nothing(script, files, without, tmp_path):
    folder = shutil.copytree(without[script], tmp_path / "run", symlinks=True)
    result = run(script, folder, *files["train"], *files["validation"], *files["test"])
    assert "nothing to train" in result.stdout
    assert "changed since the last start: --test_file None -> " in result.stdout
    assert history(folder)["train"] == history(without[script])["train"]
    examples = load_examples(files["test"][1], require_summary=False)
    scores, count = scores_of(script, folder, examples)
    assert count == 7
    (logged,) = events(folder, "test")
    assert {name: logged[name] for name in scores} == pytest.approx(scores, rel=1e-5)
    need = "gold passages" if script == "train_retrieve.py" else "a reference"
    assert f"test: 7 of 12 examples have {need}; only these are scored" in result.stdout
    rows = [line for line in result.stdout.splitlines() if line.startswith("test: ")][1:]
    assert len(rows) == (2 if script == "train_retrieve.py" else 3)
    if script == "train_retrieve.py":
        assert f"{logged['bm25']['ndcg@10']:.1f}" in rows[0] and f"{logged['ndcg@10']:.1f}" in rows[1]
    else:
        assert f"{logged['oracle']['rougeL']:.1f}" in rows[1]

    # started again, it is there once
    run(script, folder, *files["train"], *files["validation"], *files["test"])
    assert events(folder, "test") == [logged]
    # and stays, when the run is started without it
    run(script, folder, *files["train"], *files["validation"])
    assert events(folder, "test") == [logged]


@slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_test_split_changes_nothing_of_training_and_is_scored_with_the_best_model(script, files, without, tmp_path):
    choice = ["--load_best_model_at_end", "--eval_steps", 2]
    if script == "train_summarize.py":  # the first validation, whose loss is the highest, shall be the best
        choice += ["--metric_for_best", "loss", "--greater_is_better", "true"]
    for name, more in (("with", files["test"]), ("without", [])):
        run(script, tmp_path / name, *files["train"], *files["validation"], *choice, *more)
    ours, theirs = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert history(tmp_path / "with") == history(tmp_path / "without")
    if script == "train_summarize.py":
        (logged,) = events(tmp_path / "with", "test")
        assert (logged["step"], logged["model_step"]) == (12, 2)
        # the published model writes the same
        published = ["--model_name_or_path", tmp_path / "with", "--learning_rate", 0, "--max_train_steps", 1]
        run(script, tmp_path / "again", *files["train"], *files["validation"], *files["test"], *published)
        (again,) = events(tmp_path / "again", "test")
        assert again["loss"] == pytest.approx(logged["loss"], rel=1e-5)


@one_fast
def test_without_any_reference_the_output_is_written_and_nothing_scored(script, files, without, tmp_path):
    folder = shutil.copytree(without[script], tmp_path / "run", symlinks=True)
    result = run(script, folder, *files["train"], *files["validation"], *files["bare"])
    assert "test: 0 of 12 examples have " in result.stdout and "; nothing is scored" in result.stdout
    assert len(read_jsonl(folder / OUTPUT[script])) == 12
    assert not events(folder, "test")


@pytest.mark.parametrize(
    ("script", "target", "when"),
    [
        ("train_summarize.py", "utils.training.log:score_table", "True"),  # after the scores were logged
        pytest.param("train_summarize.py", "utils.data.hand_over:write_predictions", "args[1] == 'test'", marks=slow),
        pytest.param("train_retrieve.py", "utils.training.log:score_table", "True", marks=slow),
        pytest.param("train_retrieve.py", "utils.data.hand_over:write_hand_over", "args[1] == 'test'", marks=slow),
    ],
)
def test_a_run_killed_while_it_scores_the_test_split_goes_on(script, target, when, files, without, tmp_path):
    folder = shutil.copytree(without[script], tmp_path / "run", symlinks=True)
    flags = [*files["train"], *files["validation"], *files["test"]]
    is_written = when == "True"
    run(inject(tmp_path, script, target, when, "os._exit(9)"), folder, *flags, expect=9)
    assert (folder / OUTPUT[script]).exists() == is_written and len(events(folder, "test")) == is_written
    run(script, folder, *flags)
    assert len(events(folder, "test")) == 1
    assert len(read_jsonl(folder / OUTPUT[script])) == 12


@slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_score_the_test_split_as_one_does(script, files, without, tmp_path):
    flags = [*files["train"], *files["validation"], *files["test"], "--model_name_or_path", without[script],
             "--learning_rate", 0, "--max_train_steps", 1, "--per_device_eval_batch_size", 3]  # fmt: skip
    for processes in (1, 2):
        run(script, tmp_path / str(processes), *flags, processes=processes)
    (one,), (two,) = (events(tmp_path / str(processes), "test") for processes in (1, 2))
    assert one == two
    first, second = (read_jsonl(tmp_path / str(processes) / OUTPUT[script]) for processes in (1, 2))
    assert first == second and len(first) == 12


@slow
def test_the_hand_over_of_the_test_split_is_what_stage_2_reads(files, without, tmp_path):
    retrieve = shutil.copytree(without["train_retrieve.py"], tmp_path / "retrieve", symlinks=True)
    run("train_retrieve.py", retrieve, *files["train"], *files["validation"], *files["test"], "--trec_run")
    assert (retrieve / "run.test.trec").exists() and (retrieve / "qrels.test.trec").exists()
    handed = [flag for split in ("train", "validation", "test")
              for flag in (f"--{split}_file", retrieve / f"retrieved.{split}.jsonl")]  # fmt: skip
    run("train_summarize.py", tmp_path / "summarize", *handed, "--max_train_steps", 1)
    ranked = read_jsonl(retrieve / "retrieved.test.jsonl")
    for line, of_stage_1 in zip(read_jsonl(tmp_path / "summarize/predictions.test.jsonl"), ranked, strict=True):
        best = [entry["passage"] for entry in of_stage_1["retrieved"][:5]]
        assert [entry["passage"] for entry in line["passages"]] == sorted(best)
    result = run("train_summarize.py", tmp_path / "mixed", *handed[:4], *files["test"], expect=2)
    assert "12 of 66 examples (train, validation, test) have no 'retrieved'" in result.stderr
    result = run("train_summarize.py", tmp_path / "oracle", *handed, "--retriever", "oracle", expect=2)
    assert "has neither evidence nor a reference, which the oracle needs" in result.stderr
