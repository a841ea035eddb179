"""One example's hops for a person at a terminal, or its record for a program."""

import itertools
import json
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator

from utils.reporting.examples import visible

LINES = 3  # of a passage; a file has the rest
CHARACTERS = 90  # of a passage where the output is no terminal: one line each
BOLD, DIM, GREEN, BLUE = "1", "2", "32", "34"


def show(record: dict, *, as_json: bool) -> None:
    """Prints the hops to standard error and the summary to standard output, or there only the record as JSON."""
    if as_json:
        print(json.dumps(record), flush=True)
        return
    is_terminal = sys.stderr.isatty()
    width = shutil.get_terminal_size().columns if is_terminal else None
    has_colour = is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    for line in lay_out(record, width, has_colour=has_colour):
        print(line, file=sys.stderr)
    sys.stderr.flush()
    print(visible(record["prediction"]) if sys.stdout.isatty() else record["prediction"], flush=True)


def lay_out(record: dict, width: int | None, *, has_colour: bool) -> Iterator[str]:
    """Lines of at most `width` columns (None: as long as they are) with the passages and the draft of each hop.

    Passages that the hop before did not read are marked with +.
    """
    names = record.get("passage_ids") or range(len(record["passages"]))
    before = None
    for number, hop in enumerate(record["hops"], 1):
        yield _coloured(f"hop {number} read", BOLD, has_colour)
        scores = {entry["passage"]: entry["score"] for entry in hop["retrieved"]}
        for passage in hop["read"]:
            text = " ".join(visible(record["passages"][passage]).split())
            is_new = before is not None and passage not in before
            start = f"{'+' if is_new else ' '} {visible(str(names[passage])):>4}  {scores[passage]:.3f}  "
            if width is None:
                lines = [text if len(text) <= CHARACTERS else text[: CHARACTERS - 3] + "..."]
            else:
                lines = list(itertools.islice(wrapped(text, width - len(start)), LINES + 1))
                if len(lines) > LINES:
                    lines = [*lines[: LINES - 1], next(wrapped(lines[LINES - 1], width - len(start) - 2)) + " …"]
            yield _coloured(start, GREEN if is_new else DIM, has_colour) + (lines[0] if lines else "")
            yield from (" " * len(start) + line for line in lines[1:])
        draft, start = " ".join(visible(hop["draft"]).split()), "  draft: "
        lines = [draft] if width is None else list(wrapped(draft, width - len(start))) or [""]
        yield _coloured(start, BLUE, has_colour) + lines[0]
        yield from (" " * len(start) + line for line in lines[1:])
        before = set(hop["read"])


def _coloured(text: str, code: str, has_colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if has_colour else text


def wrapped(text: str, width: int) -> Iterator[str]:
    """Lines of at most `width` columns, broken between words and, where a word is longer, within it."""
    width, line, used = max(width, 10), "", 0
    for word in text.split():
        columns = sum(map(_columns, word))
        if line and used + 1 + columns <= width:
            line, used = f"{line} {word}", used + 1 + columns
            continue
        if line:
            yield line
        while columns > width:
            ends = itertools.accumulate(map(_columns, word))
            cut = next((i for i, end in enumerate(ends) if end > width), len(word))
            yield word[:cut]
            word = word[cut:]
            columns = sum(map(_columns, word))
        line, used = word, columns
    if line:
        yield line


def _columns(character: str) -> int:
    """How many columns a character takes on a terminal: none for combining marks, two for wide ones."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
