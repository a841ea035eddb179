"""One document's hops on a terminal, in a pipe, and as JSON."""

import itertools
import json
import os
import pty
import re
import sys

import pytest
from reporting_cases import HOSTILE, example, hop, hops_records

from utils.reporting.terminal import _columns, lay_out, show, wrapped

COLOUR = re.compile("\x1b\\[[0-9]*m")


def columns(line: str) -> int:
    return sum(map(_columns, COLOUR.sub("", line)))


@pytest.mark.parametrize("width", [40, 72, 200])
def test_lines_fit_the_terminal_and_a_passage_takes_three(width):
    texts = ["word " * 200, "会议决定" * 100, "w" * 10_000, HOSTILE["emoji"], ""]
    draft = "a draft of some words " * 20
    record = example(0, passages=texts, prediction="x", hops=[hop(draft, [0, 1, 2, 3, 4])])
    lines = list(lay_out(record, width, has_colour=True))
    assert max(map(columns, lines)) <= width
    starts = [number for number, line in enumerate(lines) if re.match(r" +\d +\d\.\d{3}", COLOUR.sub("", line))]
    assert [b - a for a, b in itertools.pairwise(starts)][:3] == [3, 3, 3]
    assert lines[starts[0] + 2].endswith(" …")
    assert " ".join(" ".join(lines).split()).endswith(draft.strip()) or width == 40  # the draft is whole


def test_passages_that_the_hop_before_did_not_read_are_marked():
    lines = list(lay_out(hops_records()[0], 100, has_colour=False))
    assert lines[0] == "hop 1 read" and not any("\x1b" in line for line in lines)
    marked = [line[2:6].strip() for line in lines if line.startswith("+")]
    assert marked == ["2"]


def test_no_text_of_a_document_controls_the_terminal():
    text = HOSTILE["nul"]
    record = example(0, passages=[text], prediction=text, hops=[hop(text, [0])])
    for width in (None, 80):
        lines = list(lay_out(record, width, has_colour=False))
        assert not any(set(line) & set("\x00\x1b\x07") for line in lines) and "␛[31m" in lines[1]


def test_wrapped_text_loses_no_word():
    text = "one two " + "x" * 37 + " 会议决定了很多 three"
    assert "".join("".join(wrapped(text, 12)).split()) == "".join(text.split())
    assert list(wrapped("", 20)) == []


def on_a_terminal(record, monkeypatch) -> str:
    """What `show` prints to a terminal."""
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", terminal)
        show(record, as_json=False)
        text = os.read(reader, 65536).decode()
        monkeypatch.undo()
    os.close(reader)
    return text


def test_colour_only_on_a_terminal_that_wants_it(monkeypatch, capsys):
    record = {**hops_records()[0], "prediction": "bell \x07"}
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = on_a_terminal(record, monkeypatch)
    assert "\x1b[1mhop 1 read\x1b[0m" in text and "bell ␇" in text and "\x07" not in text
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_a_terminal(record, monkeypatch)
    show(record, as_json=False)
    said = capsys.readouterr()
    assert said.out == "bell \x07\n" and "\x1b" not in said.err and "hop 2 read" in said.err


def test_json_is_the_whole_record_and_nothing_else(capsys):
    record = {**hops_records()[0], "query": HOSTILE["surrogate"]}
    show(record, as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == record and not said.err
