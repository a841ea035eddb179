"""Meters, log formats and the log of a resumed run."""

import copy
import json
import math
import re
import time
from threading import Thread
from types import SimpleNamespace

import pytest
import torch
from conftest import alone
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

from retrieve_and_summarize import SHOWN
from utils.training.log import Meters, RunLog, score_table


def test_a_model_is_described_with_what_of_it_is_trained(tmp_path, capsys):
    model = nn.Sequential(nn.Linear(9, 100), nn.Linear(100, 1))
    log = RunLog(alone(), tmp_path, "simple")
    log.say_model(model)
    model[0].requires_grad_(False)
    log.say_model(model)
    log.say_model(nn.Sequential(model, Pooling(100, "lasttoken")))
    model[1].attends = "attention dropout 0"  # as `settle_packing` says
    log.say_model(model)
    assert capsys.readouterr().out.splitlines() == [
        "1,101 parameters, 1 process on cpu, float32",
        "101 of 1,101 parameters are trained, 1 process on cpu, float32",
        "101 of 1,101 parameters are trained, pooling: lasttoken, 1 process on cpu, float32",
        "101 of 1,101 parameters are trained, attention dropout 0, 1 process on cpu, float32",
    ]


def test_tensors_are_added_up_like_numbers_and_read_with_the_meters():
    meters, numbers = Meters(alone()), Meters(alone())
    for value in (0.1, 0.2, 3.3):
        meters.add(loss=torch.tensor(value), count=2)
        numbers.add(loss=torch.tensor(value).item(), count=2)
    assert torch.is_tensor(meters.sums["loss"])
    assert meters.state(alone()) == numbers.state(alone())
    assert isinstance(meters.sums["loss"], float)


def test_meters_add_up_their_steps_and_start_anew_once_read():
    meters = Meters(alone())
    for gnorm in (0.5, 1.5, 2.5):
        meters.add_step(gnorm, max_grad_norm=1.0)
        meters.seconds += 2.0
        meters.add(loss=6 * math.log(2), nll=4 * math.log(2), count=2, examples=4, tokens=30, slots=40)
    middle = copy.deepcopy(json.loads(json.dumps(meters.state(alone()))))
    line = meters.read(alone())
    expected = {
        "loss": 3, "nll_loss": 2, "ppl": 4, "gnorm": 1.5, "clip": 2 / 3, "examples": 12, "tokens": 90,
        "tokens_per_second": 15, "tokens_per_step": 30, "padding": 0.25, "steps_per_second": 0.5,
        "examples_per_step": 4, "train_wall": 6,
    }  # fmt: skip
    assert {name: line[name] for name in expected} == pytest.approx(expected)
    assert line["memory_gb"] > 0
    assert meters.read(alone())["examples"] == 0
    again = Meters(alone(), middle)  # from a checkpoint
    memory = {"memory_gb": 0}
    assert again.read(alone()) | memory == line | memory
    other = Meters(alone(is_main_process=False), middle)  # has the names, to add up with the main process
    assert other.sums == dict.fromkeys(middle["sums"], 0.0) and other.steps == 0
    meters.add_step(9.0, max_grad_norm=0)
    assert meters.read(alone())["clip"] == 0  # 0: never clipped


def log_something(folder, log_format, **changes):
    log = RunLog(alone(**changes), folder, log_format)
    log.begin(0)
    log.start_epoch(0, done=0, steps=2)
    log("train", step=1, loss=0.123456789)
    log.advance()
    log.end_epoch()
    log.say("in words")


def test_each_log_format_prints_what_it_says_and_the_file_is_the_same(tmp_path, capsys, monkeypatch):
    line = '{"event": "train", "step": 1, "loss": 0.123457}\n'
    expected = {"simple": "train | step 1 | loss 0.1235\nin words\n", "json": line, "none": ""}
    for log_format, output in expected.items():
        log_something(tmp_path, log_format)
        assert capsys.readouterr() == (output, ""), log_format
        assert (tmp_path / "metrics.jsonl").read_text() == line
    for log_format in ("tqdm", None):  # a terminal has a progress bar without asking
        monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        log_something(tmp_path, log_format)
        output, bar = capsys.readouterr()
        assert output == expected["simple"]
        assert "epoch 1" in bar and "0/2" in bar
    log_something(tmp_path / "absent", "json", is_main_process=False)  # the others neither print nor write
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("log_format", ["json", "simple"])
def test_lines_of_the_thread_that_writes_checkpoints_are_printed_whole_and_in_the_order_of_the_file(
    log_format, tmp_path, monkeypatch
):
    printed = []

    def write(text):
        time.sleep(0.001)  # others get their turn between a line and its end
        printed.append(text)

    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=write, flush=lambda: None, isatty=lambda: False))
    log = RunLog(alone(), tmp_path, log_format)
    threads = [Thread(target=lambda: [log("event", step=step) for step in range(20)]) for _ in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    written = (tmp_path / "metrics.jsonl").read_text()
    expected = {"json": written, "simple": re.sub(r".*: (.*)}", r"event | step \1", written)}[log_format]
    assert "".join(printed) == expected and written.count("\n") == 40


def test_the_log_of_a_killed_run_goes_on_without_repeated_or_broken_lines(tmp_path):
    events = [("train", 1), ("train", 2), ("stop", 2), ("train", 3)]
    lines = [json.dumps({"event": event, "step": step}) for event, step in events]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + '\n{"event": "tra')
    RunLog(alone(), tmp_path, "none").begin(2)
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:2]
    for validates, kept in ((False, 4), (True, 3)):  # the validation of step 2 was logged and then lost
        added = [
            lines[0],
            json.dumps({"event": "validation", "step": 1}),
            lines[1],
            json.dumps({"event": "validation", "step": 2}),
        ]
        (tmp_path / "metrics.jsonl").write_text("\n".join(added) + "\n")
        RunLog(alone(), tmp_path, "none").begin(2, validates)
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == added[:kept]
    RunLog(alone(), tmp_path, "none").begin(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_table_has_scores_with_one_decimal_and_counts_as_whole_numbers():
    rows = {"hop 1": {"recall": 81.25, "examples": 300}, "2": {"recall": 90.0, "examples": 7}}
    head, first, second = score_table(rows, ("recall", "examples")).splitlines()
    assert head.split() == ["recall", "examples"]
    assert first.split() == ["hop", "1", "81.2", "300"] and second.split() == ["2", "90.0", "7"]
    assert len(head) == len(first) == len(second)
    _, first, second = score_table({"hop 1": {"recall": 81.25}, "2": {"new": 9.0}}, ("recall", "new")).splitlines()
    assert first.split() == ["hop", "1", "81.2", "-"] and second.split() == ["2", "-", "9.0"]
    wide = score_table({"hop 2": dict.fromkeys(SHOWN, 12345.678)}, SHOWN)
    assert max(map(len, wide.splitlines())) <= 120


def test_lines_of_training_and_validation_fit_a_terminal_and_the_file_has_everything(tmp_path, capsys):
    log = RunLog(alone(), tmp_path, "simple")
    meters = {"loss": 2.123456, "accuracy": 0.51234, "gnorm": 1.0, "examples": 1600, "tokens_per_second": 31234.5}
    log("train", step=123400, epoch=12.123456, lr=0.000123456, skipped=100, **meters, seconds_left=45296.4)
    log("train", step=1, epoch=0.5, lr=0.1, seconds_left=None)
    log("validation", step=1, epoch=1.0, **{f"recall@{k}": 98.76543 for k in range(20)}, bm25={"recall@1": 9.0})
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == (
        "train | step 123400 | epoch 12.12 | loss 2.123 | lr 0.0001235 | tokens/s 31,234 | skipped 100 | left 12:34:56"
    )
    assert second == "train | step 1 | epoch 0.5 | lr 0.1"
    assert len(first) <= 120 and 100 < len(third) <= 120 and third.endswith(" 98.77")
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert written[0]["examples"] == 1600 and written[2]["recall@19"] == 98.7654 and written[2]["bm25"]
