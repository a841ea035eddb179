"""Progress of long phases: when lines and bars come, what they say, and what is left after an error."""

import contextlib
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from functools import partial

import pytest
from conftest import OFFLINE, alone, beir_flags, command, inject, launch, write_beir

from utils import progress
from utils.data.rows import read_rows
from utils.progress import Phase, close_bars, for_all
from utils.progress import progress as follow
from utils.training.log import RunLog


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def work(self, phase: Phase, seconds: float, count: int = 1, **share) -> None:
        self.now += seconds
        phase.advance(count, **share)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(progress, "clock", Clock())
    monkeypatch.setattr(progress, "_format", None)
    monkeypatch.setattr(progress, "_last_shown", 0.0)
    for name in ("RANK", "GROUP_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield progress.clock
    close_bars()


def as_terminal(monkeypatch) -> io.StringIO:
    """Makes standard error a terminal; its `getvalue()` is all that was written."""
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    return screen


def lines(capsys) -> list[str]:
    output, errors = capsys.readouterr()
    assert output == "" and "\r" not in errors and "\x1b" not in errors
    return errors.splitlines()


def screen_of(written: str) -> list[str]:
    """The lines of a terminal after what was written: a carriage return goes back to a line's start, "K" empties it."""
    shown = []
    for line in written.replace("\x1b[A", "").split("\n"):
        text = ""
        for part in line.split("\r"):
            text = part.removeprefix("\x1b[K") if part.startswith("\x1b[K") else part + text[len(part) :]
        shown.append(text.rstrip())
    return shown


# ---- lines of a log file


def test_a_line_comes_after_five_seconds_then_every_thirty_and_one_at_the_end(clock, capsys):
    with Phase("encoded", "passages", 12_276) as phase:
        for second in range(1, 42):
            clock.work(phase, 1, 299)
            expected = {5: "encoded 1,495 of 12,276 passages, 299 passages/s, 36 s left",
                        35: "encoded 10,465 of 12,276 passages, 299 passages/s, 6 s left"}  # fmt: skip
            assert lines(capsys) == [expected[second]] if second in expected else not lines(capsys), second
        phase.advance(17)
    assert lines(capsys) == ["encoded 12,276 passages in 41 s, 299 passages/s"]


def test_a_phase_of_less_than_five_seconds_says_nothing(clock, capsys):
    with Phase("encoded", "passages", 100) as phase:
        for _ in range(49):
            clock.work(phase, 0.1, 2)
    assert not lines(capsys)
    with Phase("encoded", "passages", 100):
        clock.now += 60  # nothing was encoded, because all was known
    assert not lines(capsys)
    with Phase("waited for", "checkpoint to be written") as phase:
        clock.now += 7
        phase.done = 1
    assert lines(capsys) == ["waited for 1 checkpoint to be written in 7 s"]


def test_no_line_is_written_shortly_before_the_end_and_long_times_have_hours(clock, capsys):
    with Phase("mined", "queries", 6) as phase:
        for _ in range(6):
            clock.work(phase, 1)
    assert lines(capsys) == ["mined 6 queries in 6 s, 1 queries/s"]
    with Phase("mined", "queries", 1000) as phase:
        clock.work(phase, 40)
        assert lines(capsys) == ["mined 1 of 1,000 queries, 0.025 queries/s, 11:06:00 left"]
        clock.work(phase, 7160, 999)
    assert lines(capsys) == ["mined 1,000 queries in 2:00:00, 0.14 queries/s"]


def test_the_total_is_estimated_from_the_share_of_a_file_that_was_read(clock, capsys):
    with Phase("read", "records of a.jsonl") as phase:
        clock.work(phase, 10, 1200, share=0.25)
        assert lines(capsys) == ["read 1,200 of about 4,800 records of a.jsonl, 120 records/s, 30 s left"]
        clock.work(phase, 30, 3000, share=1.0)
    with Phase("read", "records of a pipe") as phase:
        clock.work(phase, 10, 1200)
    assert lines(capsys) == ["read 4,200 records of a.jsonl in 40 s, 105 records/s",
                             "read 1,200 records of a pipe, 120 records/s",
                             "read 1,200 records of a pipe in 10 s, 120 records/s"]  # fmt: skip


def test_a_loop_advances_by_its_items_or_by_what_is_in_them(clock, capsys):
    def work(items):
        for item in items:
            clock.now += 10
            yield item

    batches = [["a", "b"], ["c"]]
    assert list(follow(work(batches), "generated", "summaries", total=3, size=len)) == batches
    assert list(follow(work([0]), "ranked", "examples", total=5, size=lambda _: 2048)) == [0]
    assert list(follow(work("ab"), "read", "texts")) == ["a", "b"]
    assert list(follow([], "read", "texts")) == []
    assert lines(capsys) == ["generated 2 of 3 summaries, 0.2 summaries/s, 5 s left",
                             "generated 3 summaries in 20 s, 0.15 summaries/s",
                             "ranked 5 examples in 10 s, 0.5 examples/s", "read 1 texts, 0.1 texts/s",
                             "read 2 texts in 20 s, 0.1 texts/s"]  # fmt: skip


# ---- phases within phases


def test_parts_of_a_phase_stand_in_brackets_once_it_knows_how_long_it_takes(clock, capsys):
    with Phase("ranked", "examples", 4000) as phase:
        for _ in range(2):
            with Phase("encoded", "passages", 1000) as inner:
                for _ in range(4):
                    clock.work(inner, 10, 250)
            phase.advance(2000)
    assert lines(capsys) == [
        "encoded 250 of 1,000 passages, 25 passages/s, 30 s left",
        "encoded 1,000 passages in 40 s, 25 passages/s",
        "ranked 2,000 of 4,000 examples, 50 examples/s, 10 s left (encoded 750 of 1,000 passages)",
        "ranked 4,000 examples in 80 s, 50 examples/s",
    ]


def test_a_phase_that_takes_longer_than_expected_does_not_fall_silent(clock, capsys):
    with Phase("ranked", "examples", 3) as phase:
        clock.work(phase, 10, 2)
        with Phase("encoded", "passages", 1000) as inner:
            for _ in range(8):
                clock.work(inner, 10, 10)
    assert lines(capsys)[:3] == [
        "ranked 2 of 3 examples, 0.2 examples/s, 5 s left",
        "ranked 2 of 3 examples, 0.2 examples/s (encoded 30 of 1,000 passages)",
        "ranked 2 of 3 examples, 0.2 examples/s (encoded 60 of 1,000 passages)",
    ]


def test_a_phase_within_one_that_counts_the_same_adds_to_it(clock, capsys):
    with Phase("encoded", "passages", 400):
        for _ in range(4):
            with Phase("encoded", "passages", 100) as part:
                for _ in range(100):
                    clock.work(part, 0.25, share=0.9)
    assert lines(capsys) == [
        "encoded 20 of 400 passages, 4 passages/s, 95 s left",
        "encoded 140 of 400 passages, 4 passages/s, 65 s left",
        "encoded 260 of 400 passages, 4 passages/s, 35 s left",
        "encoded 380 of 400 passages, 4 passages/s, 5 s left",
        "encoded 400 passages in 0:01:40, 4 passages/s",
    ]


# ---- which process, which format


def test_one_process_speaks_and_says_if_the_total_is_its_own(clock, capsys, monkeypatch):
    def work(**options):
        with Phase("scored", "extracts", 10, **options) as phase:
            clock.work(phase, 10, 10)
        return lines(capsys)

    all_extracts, own = (
        ["scored 10 extracts in 10 s, 1 extracts/s"],
        ["scored 10 extracts of this process in 10 s, 1 extracts/s"],
    )
    assert work(is_own=True) == all_extracts  # alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert work() == all_extracts and work(is_own=True) == own
    monkeypatch.setenv("RANK", "1")
    assert not work() and not work(is_own=True)
    with for_all():  # the main process waits for this one
        assert work(is_own=True) == all_extracts
        monkeypatch.setenv("GROUP_RANK", "1")  # on another machine
        assert not work(is_own=True)


def test_the_log_format_decides_between_bars_lines_and_silence(tmp_path, clock, monkeypatch):
    terminal = as_terminal(monkeypatch)
    for log_format, lines_of_end in (("none", 0), ("simple", 1), ("json", 1), ("tqdm", 1), (None, 1)):
        before = len(terminal.getvalue())
        RunLog(alone(), tmp_path, log_format)
        with Phase("read", "texts", 4) as phase:
            clock.work(phase, 5)
            clock.work(phase, 5)
        written = terminal.getvalue()[before:]
        assert written.count("read 2 texts in 10 s, 0.2 texts/s\n") == lines_of_end, log_format
        assert ("\r" in written) == (log_format in ("tqdm", None)) and bool(written) == bool(lines_of_end), log_format


def test_slow_steps_are_counted_when_nothing_else_was_logged_for_long(tmp_path, clock, capsys):
    log = RunLog(alone(), tmp_path, None)
    log.say("started")
    log.start_epoch(0, done=20, steps=100)
    for step in range(1, 7):
        clock.now += 10
        with Phase("tokenized", "texts", 1) as phase:
            phase.advance()
        log.advance()
        if step == 4:
            log("train", step=24)
    log.end_epoch()
    assert capsys.readouterr() == ("started\ntrain | step 24\n",
                                   "trained 3 of 80 steps of epoch 1, 0.1 steps/s, 0:12:50 left\n")  # fmt: skip


def test_a_bar_of_training_is_not_written_into_a_log_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)  # and standard error is a file
    log = RunLog(alone(), tmp_path, None)
    log.start_epoch(0, done=0, steps=2)
    log.advance()
    log.end_epoch()
    assert capsys.readouterr() == ("", "")


# ---- a terminal


def test_a_terminal_has_a_bar_and_then_the_line_of_the_end(clock, monkeypatch):
    terminal = as_terminal(monkeypatch)
    with Phase("encoded", "passages", 400) as phase:
        clock.work(phase, 4, 40)
        assert terminal.getvalue() == ""
        clock.work(phase, 6, 60)
        [shown] = screen_of(terminal.getvalue())
        assert re.match(r"encoded passages:  25%\|.*\| 100/400 \[00:10<00:30, +10\.00 passages/s\]", shown)
        clock.work(phase, 30, 300)
    assert screen_of(terminal.getvalue()) == ["encoded 400 passages in 40 s, 10 passages/s", ""]


def test_one_bar_is_visible_at_a_time_and_the_one_of_training_comes_back(clock, tmp_path, monkeypatch):
    terminal = as_terminal(monkeypatch)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    log = RunLog(alone(), tmp_path, None)
    log.start_epoch(0, done=3, steps=9)
    with Phase("ranked", "examples", 40) as phase:
        with Phase("encoded", "passages", 10) as inner:
            clock.work(inner, 10, 5)
            [shown] = screen_of(terminal.getvalue())
            assert shown.startswith("encoded passages:  50%")
            clock.work(inner, 10, 5)
        clock.work(phase, 10, 20)
        assert screen_of(terminal.getvalue())[-1].startswith("ranked examples:  50%")
        with Phase("encoded", "passages", 10) as inner:
            clock.work(inner, 10, 5)
            assert "ranked examples:  50%" in screen_of(terminal.getvalue())[-1]
            assert screen_of(terminal.getvalue())[-1].endswith(", encoded 5 of 10 passages]")
    assert screen_of(terminal.getvalue())[-1].startswith("epoch 1:  33%")
    log.advance()
    log.end_epoch()
    assert screen_of(terminal.getvalue())[-1] == ""


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, GeneratorExit])
def test_after_an_error_or_ctrl_c_no_bar_and_no_line_is_left(error, clock, monkeypatch):
    terminal = as_terminal(monkeypatch)
    with pytest.raises(error), Phase("ranked", "examples", 40), Phase("encoded", "passages", 40) as phase:
        clock.work(phase, 10, 20)
        assert "encoded" in screen_of(terminal.getvalue())[-1]
        raise error
    assert screen_of(terminal.getvalue()) == [""]
    with pytest.raises(error):
        for _ in follow(range(9), "encoded", "passages"):
            clock.now += 10
            if clock.now > 1030:
                raise error
    close_bars()  # as a script does before it prints the error
    assert screen_of(terminal.getvalue())[-1] == ""
    assert not progress._phases


def test_text_is_written_above_the_bar(clock, monkeypatch):
    terminal = as_terminal(monkeypatch)
    with Phase("encoded", "passages", 40) as phase:
        clock.work(phase, 10, 20)
        progress.write("a warning", progress.sys.stderr)
        first, second = screen_of(terminal.getvalue())
        assert first == "a warning" and second.startswith("encoded passages:  50%")


def test_bars_of_datasets_are_for_terminals_only(tmp_path, clock, monkeypatch, capfd):
    import datasets

    path = tmp_path / "queries.parquet"
    datasets.Dataset.from_dict({"id": ["a", "b"]}).to_parquet(path)
    capfd.readouterr()
    for is_terminal in (False, True):
        monkeypatch.setattr("utils.data.rows.has_bars", lambda: is_terminal)  # noqa: B023
        datasets.enable_progress_bars()
        assert [row.share for row in read_rows(path, "train", None, ())] == [0.5, 1]
        assert datasets.are_progress_bars_disabled() != is_terminal
        assert is_terminal or capfd.readouterr().err == ""


# ---- the scripts

SLOW = "import utils.progress; utils.progress.SHOWN_AFTER = 0.1; time.sleep(0.02)"


def slow_reading(folder, **documents) -> tuple:
    """A script that reads slowly and calls that long, and the flags with which it reads a corpus."""
    write_beir(folder, **documents)
    (folder / "scripts").mkdir()
    script = inject(folder / "scripts", "train_retrieve.py", "utils.data.rows:_share", "True", SLOW)
    return script, ["--output_dir", folder / "run", "--cache_dir", folder / "cache", *beir_flags(folder)]


def test_slow_phases_of_a_script_stand_in_its_log_without_a_bar(tmp_path):
    script, flags = slow_reading(tmp_path, train=2, validation=1)
    (tmp_path / "queries.validation.jsonl").write_text("no JSON\n")  # so that the run ends after reading
    result = launch(script, *flags)
    assert result.returncode == 2 and not result.stdout
    announced, ended, *more, error = result.stderr.splitlines()[:-1]
    corpus = tmp_path / "corpus.jsonl"
    assert re.fullmatch(rf"read \d+ of about \d+ records of {corpus}, [\d,]+ records/s, \d+ s left", announced)
    assert re.fullmatch(rf"read \d+ records of {corpus} in \d+ s, [\d,]+ records/s", ended)
    files = ["qrels.train.tsv", "queries.train.jsonl", "qrels.validation.tsv"]
    assert [re.sub(r".*/(\S+) in \d+ s, .*", r"\1", line) for line in more] == files
    assert error.startswith("train_retrieve.py: error: ") and "queries.validation.jsonl:1: invalid JSON" in error
    assert "\r" not in result.stderr and "\x1b" not in result.stderr


def test_ctrl_c_on_a_terminal_leaves_its_message_and_no_bar(tmp_path):
    script, flags = slow_reading(tmp_path, train=10, validation=1)
    here, there = pty.openpty()
    fcntl.ioctl(there, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 200, 0, 0))  # rows and columns
    # a shell's background jobs ignore the signal, and so do their children
    process = subprocess.Popen(
        command(script, flags, 1),
        env={**os.environ, **OFFLINE},
        stdout=there,
        stderr=there,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
    )
    os.close(there)
    written = ""
    while "records of" not in written:
        written += os.read(here, 2**16).decode()
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # which says that the other side is closed
        while part := os.read(here, 2**16).decode():
            written += part
    assert process.wait(30) == 130
    assert "%|" in written and " left" not in written  # a bar, and no lines
    assert screen_of(written.replace("\r\n", "\n"))[-2:] == ["train_retrieve.py: interrupted", ""]
