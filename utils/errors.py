"""The exceptions that end a script with a readable line; `exit_code` is what the script then exits with."""

import dataclasses
import signal
from collections.abc import Iterable


class UsageError(ValueError):
    """Flags or files that a run cannot start from; the message is one line and names the remedy."""

    exit_code = 2


class DataError(ValueError):
    """Data that cannot be used; `str(error)` is the complete message, with place and remedy."""

    exit_code = 2


def in_one_line(error: BaseException) -> str:
    """The whole message of a library's error, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


class BadRecord(Exception):
    """What is wrong with one record; caught where the file and the line are known."""


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be used; names the folder, the file and what is wrong with it."""

    exit_code = 2


class Diverged(Exception):
    """Training cannot continue: too many dropped steps, a loss scale below its floor, or processes that disagree."""

    exit_code = 3


class CheckpointError(Exception):
    """A write failed, for example because the disk is full; everything written before is intact."""

    exit_code = 74


class Interrupted(Exception):
    """One of the processes received a signal where no step can be finished and saved.

    Attributes:
        number: the signal's number.
        exit_code: 128 + number.
    """

    def __init__(self, number: int):
        super().__init__(f"{signal.Signals(number).name}; run the same command again to resume")
        self.number, self.exit_code = number, 128 + number


def refuse(args, names: Iterable[str], why: str, *, where) -> None:
    """Raises UsageError if one of these flags is not at its default `where` it has no effect; `why` says that."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    for name in names if where else ():
        if getattr(args, name) != defaults[name]:
            raise UsageError(f"--{name} has no effect {why}")
