"""Flags as users mistype them: one line, exit code 2, at once; and --help without the imports that take seconds."""

import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.cli.arguments import GROUPS, RankingOverrides
from utils.errors import UsageError

ROOT = Path(__file__).parents[2]
SCRIPTS = ["train_retrieve.py", "train_summarize.py"]


def run(script, *flags, cwd=ROOT):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / script), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


def parse_flags(monkeypatch, capsys, *flags, script="train_summarize"):
    """Parses flags within this process: (arguments, what was printed to standard error)."""
    module = pytest.importorskip(script)
    arguments_class = {"train_summarize": "SummarizeArguments", "train_retrieve": "RetrieveArguments"}[script]
    from utils.cli.arguments import parse

    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    try:
        return parse(getattr(module, arguments_class), module.__doc__), ""
    except SystemExit as leaving:
        assert leaving.code == 2
        return None, capsys.readouterr().err


def check_one_line(error: str):
    assert error.count("\n") == 1
    assert "Traceback" not in error
    assert "usage" not in error


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistyped_flag_is_answered_at_once_with_the_flag_that_was_meant(script, tmp_path):
    started = time.perf_counter()
    result = run(script, "--learning_rat", "1e-3", cwd=tmp_path)
    assert time.perf_counter() - started < 5
    assert result.returncode == 2
    assert result.stdout == ""
    check_one_line(result.stderr)
    assert result.stderr.startswith(f"{script}: error: ")
    assert "did you mean --learning_rate?" in result.stderr
    assert not list(tmp_path.iterdir())  # and nothing was written


@pytest.mark.parametrize("sizes", ["64,128", "64,64", "64,0", "64,x", "64,", "-4", "6.5"])
def test_sizes_of_cut_embeddings_must_descend(sizes, monkeypatch, capsys):
    arguments, error = parse_flags(monkeypatch, capsys, f"--matryoshka_dims={sizes}", script="train_retrieve")
    assert arguments is None
    assert f"--matryoshka_dims {sizes}: must be numbers of at least 1, the largest first" in error
    check_one_line(error)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_without_imports_that_take_seconds(script):
    program = f"""if True:
        import runpy, sys
        sys.argv = ["{script}", "--help"]
        try:
            runpy.run_path(r"{ROOT / script}", run_name="__main__")
        except SystemExit as leaving:
            slow = ("torch", "transformers", "accelerate")
            print("code", leaving.code, [name for name in slow if name in sys.modules])
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.stdout.endswith("code 0 []\n"), result.stdout[-200:] + result.stderr[-2000:]
    for flag in ("--train_file", "--output_dir", "--num_train_epochs", "--max_tokens", "--seed", "--top_k"):
        assert f"{flag} " in result.stdout
    assert ("--num_beams " in result.stdout) == (script == "train_summarize.py")
    assert ("--temperature " in result.stdout) == (script == "train_retrieve.py")


def test_help_is_grouped_by_purpose_with_the_most_used_flags_first_and_fits_the_terminal():
    flags = set()
    for script in (*SCRIPTS, "train_rerank.py", "retrieve_and_summarize.py"):
        text = run(script, "--help").stdout
        assert max(map(len, text.splitlines())) <= 120
        groups = re.split(r"\n\n([a-z ,]+):\n", text.partition("\noptions:")[2])
        titles, bodies = groups[1::2], groups[2::2]
        of_groups = [re.findall(r"^  --(\w+)", body, re.MULTILINE) for body in bodies]
        assert titles[0] == "most used" and 10 <= len(of_groups[0]) <= 14 and of_groups[0][0].endswith("_file")
        assert "other" not in titles  # each flag has a purpose
        flags.update(itertools.chain(*of_groups))
    known = list(itertools.chain(*(names.split() for names in GROUPS.values())))
    assert sorted(known) == sorted(flags)  # and none is named twice, or no more there


@pytest.mark.parametrize("flag", ["--learn", "--learning_r", "--num_train", "--output"])
def test_abbreviations_are_refused(monkeypatch, capsys, flag):
    arguments, error = parse_flags(monkeypatch, capsys, flag, "3")
    assert arguments is None
    check_one_line(error)
    assert flag in error


def test_a_stray_word_is_refused(monkeypatch, capsys):
    _, error = parse_flags(monkeypatch, capsys, "--learning_rate", "0.1", "stray")
    check_one_line(error)
    assert "stray" in error


@pytest.mark.parametrize("script", ["train_summarize", "train_retrieve"])
def test_a_run_that_nothing_would_end_is_refused(monkeypatch, capsys, script):
    _, error = parse_flags(monkeypatch, capsys, "--num_train_epochs", "0", script=script)
    check_one_line(error)
    assert "--num_train_epochs" in error
    assert "--max_train_steps" in error
    arguments, _ = parse_flags(monkeypatch, capsys, "--num_train_epochs", "0", "--max_train_steps", "5")
    assert (arguments.num_train_epochs, arguments.max_train_steps) == (0, 5)


@pytest.mark.parametrize(("flags", "message"), [
    (["--label_smoothing_factor", "1.5"], "--label_smoothing_factor 1.5: must be less than 1"),
    (["--length_penalty", "nan"], "--length_penalty nan: must be a finite number"),
    (["--learning_rate", "inf"], "--learning_rate inf: must be a finite number"),
    (["--dropout", "1.5"], "--dropout 1.5: must be less than 1"),
    (["--adam_beta1", "1.5"], "--adam_beta1 1.5: must be less than 1"),
    (["--language", "xx"], "--language xx: there is no stemmer for it; use none, or one of ar (arabic)"),
    (["--min_new_tokens", "9", "--max_new_tokens", "8"], "--min_new_tokens 9: must be at most --max_new_tokens 8"),
    (["--lora_rank", "4"], "--lora_rank needs a pretrained model: set --model_name_or_path"),
    (["--lora_alpha", "4"], "--lora_alpha has no effect without --lora_rank"),
    (["--lora_dropout", "0.1"], "--lora_dropout has no effect without --lora_rank"),
    (["--lora_target_modules", "fc1"], "--lora_target_modules has no effect without --lora_rank"),
    (["--merge_lora"], "--merge_lora has no effect without --lora_rank"),
    (["--hub_model_id", "anna/m"], "--hub_model_id has no effect without --push_to_hub"),
    (["--hub_private_repo", "false"], "--hub_private_repo has no effect without --push_to_hub"),
    (["--reset_lr_scheduler"], "--reset_lr_scheduler has no effect without --init_from"),
    (["--reset_meters"], "--reset_meters has no effect without --init_from"),
    (["--evidence_column", "gold"], "--evidence_column has no effect without --train_file"),
    (["--documents_file", "d.jsonl"], "--documents_file has no effect without --train_file"),
    (["--passage_words", "50"], "--passage_words has no effect without --train_file"),
    (["--seed", "4294967296"], "--seed 4294967296: must be at most 4294967295"),
    (["--sample_documents", "9", "--train_file", "t.jsonl"], "--sample_documents has no effect with --train_file"),
])  # fmt: skip
def test_values_that_make_no_sense_are_refused_by_name(monkeypatch, capsys, flags, message):
    _, error = parse_flags(monkeypatch, capsys, *flags)
    check_one_line(error)
    assert message in error


@pytest.mark.parametrize(("typed", "meant"), [
    ("--lr", "--learning_rate"), ("--epochs", "--num_train_epochs"), ("--fp16", "--mixed_precision fp16"),
    ("--batch_size=8", "--per_device_train_batch_size"), ("--save_steps", "--checkpointing_steps"),
])  # fmt: skip
def test_names_of_other_scripts_are_answered_with_those_of_this_suite(monkeypatch, capsys, typed, meant):
    _, error = parse_flags(monkeypatch, capsys, typed)
    check_one_line(error)
    assert f"did you mean {meant}?" in error


def test_drafts_that_would_not_be_used_are_refused(monkeypatch, capsys):
    flags = ["--drafts_file", "drafts.jsonl", "--draft_share"]
    _, error = parse_flags(monkeypatch, capsys, *flags, "0", script="train_retrieve")
    check_one_line(error)
    assert "--drafts_file has no effect with --draft_share 0" in error
    assert parse_flags(monkeypatch, capsys, *flags, "0.1", script="train_retrieve")[0].draft_share == 0.1
    flags = ["--found_weight", "0.1", "--draft_share"]
    assert "--found_weight has no effect" in parse_flags(monkeypatch, capsys, *flags, "0", script="train_retrieve")[1]
    assert parse_flags(monkeypatch, capsys, *flags, "0.1", script="train_retrieve")[0].found_weight == 0.1
    assert parse_flags(monkeypatch, capsys, "--draft_share", "0", script="train_retrieve")[0]


@pytest.mark.parametrize(("flag", "value", "needed"), [
    ("bm25_weight", "0.2", ["--ranking", "hybrid"]),
    ("smooth_decay", "0.7", ["--smooth_window", "2"]),
    ("negatives_margin", "0.1", ["--mine_negatives_every", "1"]),
    ("teacher_candidates", "9", ["--teacher", "outputs/rerank"]),
    ("teacher_temperature", "0.2", ["--teacher", "outputs/rerank"]),
    ("index", "ivf", ["--corpus_file", "corpus.jsonl"]),
])  # fmt: skip
def test_flags_of_a_retriever_are_refused_without_the_flag_they_belong_to(monkeypatch, capsys, flag, value, needed):
    flags = [f"--{flag}", value]
    _, error = parse_flags(monkeypatch, capsys, *flags, script="train_retrieve")
    check_one_line(error)
    assert f"--{flag} has no effect without {needed[0]}" in error
    arguments, _ = parse_flags(monkeypatch, capsys, *flags, *needed, script="train_retrieve")
    assert str(getattr(arguments, flag)) == value


@pytest.mark.parametrize(("flags", "message"), [
    (["--num_hard_negatives", "21"], "--num_hard_negatives 21: must be at most --negatives_pool 20"),
    (["--mine_negatives_every", "3"], "--mine_negatives_every 3: must be less than --num_train_epochs 3"),
])  # fmt: skip
def test_negatives_that_would_never_be_drawn_are_refused(monkeypatch, capsys, flags, message):
    _, error = parse_flags(monkeypatch, capsys, *flags, script="train_retrieve")
    check_one_line(error)
    assert message in error


@pytest.mark.parametrize(("flags", "message"), [
    (["--documents_file", "d.jsonl"], "--documents_file has no effect without --input_file"),
    (["--document", "a.txt", "--merge_passages"], "--merge_passages has no effect without --input_file"),
    (["--document", "a.txt", "--max_examples", "3"], "--max_examples has no effect with one document or question"),
    (["--passage_words", "50"], "--passage_words has no effect without a text"),
])  # fmt: skip
def test_flags_of_files_are_refused_where_hops_read_none(flags, message):
    result = run("retrieve_and_summarize.py", *flags)
    assert result.returncode == 2
    check_one_line(result.stderr)
    assert message in result.stderr


@pytest.mark.parametrize("flag", [["--supervision", "rouge"], ["--smooth_window", "2"],
                                  ["--group_by_document", "true"]])  # fmt: skip
def test_flags_that_a_corpus_cannot_have_are_refused(monkeypatch, capsys, flag):
    _, error = parse_flags(monkeypatch, capsys, *flag, "--corpus_file", "corpus.jsonl", script="train_retrieve")
    check_one_line(error)
    assert f"{flag[0]} has no effect in a corpus" in error


def test_queries_of_one_document_cannot_be_together_where_every_epoch_is_in_order_of_length(monkeypatch, capsys):
    flags = ["--group_by_document", "--num_train_epochs", "2", "--curriculum_epochs"]
    _, error = parse_flags(monkeypatch, capsys, *flags, "2", script="train_retrieve")
    check_one_line(error)
    assert "--group_by_document has no effect" in error
    assert parse_flags(monkeypatch, capsys, *flags, "1", script="train_retrieve")[0].group_by_document


TRAINED = {"ranking": "hybrid", "bm25_weight": 0.3, "smooth_window": 4, "smooth_decay": 0.7, "hop_weight": 0.8}
DEFAULTS = {"ranking": "dense", "bm25_weight": 0.5, "smooth_window": 0, "smooth_decay": 0.5, "hop_weight": 0.5}


@pytest.mark.parametrize(("flags", "saved", "expected"), [
    ({}, TRAINED, TRAINED),
    ({"bm25_weight": 0.9, "smooth_window": 0}, TRAINED, {**TRAINED, "bm25_weight": 0.9, "smooth_window": 0}),
    ({}, {}, DEFAULTS),
    ({"ranking": "hybrid"}, {}, {**DEFAULTS, "ranking": "hybrid", "language": None}),
    ({"smooth_window": 2}, {}, {**DEFAULTS, "smooth_window": 2}),
    ({}, None, DEFAULTS),
    ({"ranking": "hybrid"}, None, "--ranking needs a --retriever that is a trained model"),
    ({"bm25_weight": 0.9}, {}, "--bm25_weight has no effect without --ranking hybrid"),
    ({"smooth_decay": 0.9}, {}, "--smooth_decay has no effect without --smooth_window"),
    ({"ranking": "dense", "bm25_weight": 0.9}, TRAINED, "--bm25_weight has no effect without --ranking hybrid"),
])  # fmt: skip
def test_a_retriever_ranks_as_flags_say_then_as_trained_then_by_default(flags, saved, expected):
    if isinstance(expected, dict):
        assert RankingOverrides(**flags).ranking_settings(saved) == expected
    else:
        with pytest.raises(UsageError, match=expected):
            RankingOverrides(**flags).ranking_settings(saved)


def test_the_weight_of_later_hops_is_that_of_the_flag_then_of_training_then_the_default():
    from retrieve_and_summarize import HopArguments

    for flags, saved, weight in (({"hop_weight": 0.0}, TRAINED, 0.0), ({}, TRAINED, 0.8), ({}, {}, 0.5),
                                 ({"hop_weight": 0.3}, None, 0.3), ({}, None, 0.5)):  # fmt: skip
        assert HopArguments(**flags).ranking_settings(saved)["hop_weight"] == weight


def test_the_flags_of_a_corpus_are_those_of_the_retriever_only(monkeypatch, capsys):
    assert parse_flags(monkeypatch, capsys, "--corpus_file", "c.jsonl", script="train_retrieve")[0].corpus_file
    assert "unrecognized arguments: --corpus_file" in parse_flags(monkeypatch, capsys, "--corpus_file", "c.jsonl")[1]


@pytest.mark.parametrize("flag", ["per_device_train_batch_size", "per_device_eval_batch_size",
                                  "gradient_accumulation_steps", "log_steps"])  # fmt: skip
@pytest.mark.parametrize("value", ["0", "-3"])
def test_counts_below_one_are_refused_by_name(monkeypatch, capsys, flag, value):
    _, error = parse_flags(monkeypatch, capsys, f"--{flag}", value)
    check_one_line(error)
    assert f"--{flag} {value}" in error


@pytest.mark.parametrize("flag", ["num_train_epochs", "max_train_steps", "max_tokens", "num_warmup_steps",
                                  "max_grad_norm", "learning_rate", "weight_decay", "eval_steps",
                                  "dataloader_num_workers", "seed"])  # fmt: skip
def test_negative_values_are_refused_by_name(monkeypatch, capsys, flag):
    _, error = parse_flags(monkeypatch, capsys, f"--{flag}", "-1")
    check_one_line(error)
    assert f"--{flag} -1" in error


@pytest.mark.parametrize(("script", "flag", "choice"), [
    ("train_summarize", "fusion", "fid"), ("train_summarize", "passage_order", "rank"),
    ("train_summarize", "log_format", "json"), ("train_retrieve", "ranking", "hybrid"),
])  # fmt: skip
def test_an_unknown_choice_is_refused_with_the_known_ones(monkeypatch, capsys, script, flag, choice):
    _, error = parse_flags(monkeypatch, capsys, f"--{flag}", "nonsense", script=script)
    check_one_line(error)
    assert f"--{flag} nonsense" in error
    assert choice in error
    arguments, _ = parse_flags(monkeypatch, capsys, f"--{flag}", choice, script=script)
    assert getattr(arguments, flag) == choice


def test_a_value_of_the_wrong_type_is_refused_by_name(monkeypatch, capsys):
    _, error = parse_flags(monkeypatch, capsys, "--top_k", "many")
    check_one_line(error)
    assert "--top_k" in error
    assert "many" in error


def test_switches_can_be_switched_on_and_off(monkeypatch, capsys):
    assert parse_flags(monkeypatch, capsys)[0].merge_passages is False
    own = ["--train_file", "t.jsonl", "--validation_file", "v.jsonl"]
    assert parse_flags(monkeypatch, capsys, "--merge_passages", *own)[0].merge_passages is True
    assert parse_flags(monkeypatch, capsys, "--merge_passages", "False")[0].merge_passages is False
    assert parse_flags(monkeypatch, capsys)[0].nan_detector is True
    assert parse_flags(monkeypatch, capsys, "--no_nan_detector")[0].nan_detector is False
    assert parse_flags(monkeypatch, capsys)[0].greater_is_better is None
    assert parse_flags(monkeypatch, capsys, "--greater_is_better", "true")[0].greater_is_better is True
    _, error = parse_flags(monkeypatch, capsys, "--merge_passages", "maybe")
    check_one_line(error)
    assert "--merge_passages" in error and "maybe" in error


def test_the_summarizer_is_there_without_sentence_transformers_whose_import_takes_seconds():
    program = "import sys, utils.models.encoder_decoder; print('sentence_transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout == "False\n", result.stderr[-2000:]
