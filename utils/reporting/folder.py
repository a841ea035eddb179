"""What a run folder holds for a report: events, flags, environment, and files of examples."""

import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from utils.errors import DataError, UsageError
from utils.models.settings import saved_settings


@dataclass
class RunFolder:
    """What is known of one run.

    Attributes:
        events: the lines of `metrics.jsonl`.
        files: by split, the file of its examples: `predictions.<split>.jsonl`, else `retrieved.<split>.jsonl`.
        hops: by split, the scores of each hop (`hops.<split>.json`).
        note: what is left out, and why; "" if nothing is.
    """

    path: Path
    name: str
    events: list[dict]
    arguments: dict
    environment: dict
    command: str
    files: dict[str, Path] = field(default_factory=dict)
    hops: dict[str, list[dict]] = field(default_factory=dict)
    note: str = ""

    @property
    def is_over(self) -> bool:
        """Whether training was done; a run that was stopped by a signal, or goes on, is not."""
        return any(event["event"] == "done" for event in self.events)

    def of(self, event: str) -> list[dict]:
        return [line for line in self.events if line["event"] == event]

    def curve(self, event: str, *names: str) -> tuple[list, list]:
        """Steps, and the values under `name` (or `outer`, `inner`) of each such event that has one."""
        steps, values = [], []
        for line in self.of(event):
            value = line
            for name in names:
                value = value.get(name) if isinstance(value, dict) else None
            if is_number(value):
                steps.append(line["step"])
                values.append(float(value))
        return steps, values

    @property
    def metric(self) -> str | None:
        """The validation score that selects the best checkpoint."""
        return self.arguments.get("metric_for_best")

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and score of the best validation; of equal ones the first (see `LoopState.note_validation`)."""
        is_greater = self.arguments.get("greater_is_better")
        sign = 1 if (self.metric not in ("loss", "nll_loss", "ppl") if is_greater is None else is_greater) else -1
        scores = zip(*self.curve("validation", self.metric), strict=True) if self.metric else ()
        return max(scores, key=lambda entry: sign * entry[1], default=None)

    @property
    def language(self) -> str | None:
        """The language of BM25's words: that of a trained retriever, else of the flag."""
        retriever = self.arguments.get("retriever")
        saved = saved_settings(retriever) if retriever and Path(retriever).is_dir() else {}
        return saved.get("language") or self.arguments.get("language")

    @property
    def beside(self) -> dict[str, str]:
        """What else a validation scores: key and name. Imitated drafts are made of the references."""
        drafts = "given" if self.arguments.get("validation_drafts_file") else "imitated"
        return {"hop2": f"hop 2, {drafts} drafts", "bm25": "BM25", "retriever": "retriever alone",
                "lead": "lead extract", "oracle": "oracle extract"}  # fmt: skip

    @property
    def drafts_are_summaries(self) -> bool:
        """Whether drafts and summaries are written by the same model, or both are extracts."""
        drafter, extracts = self.arguments.get("drafter"), self.arguments.get("summarizer") == "extract"
        return drafter in (None, "extract" if extracts else "summarizer")

    @property
    def flags(self) -> list[tuple[str, str]]:
        """The flags of the command, with what they were set to; every other flag has its default."""
        try:
            words = shlex.split(self.command)
        except ValueError:
            words = []
        given = (word[2:].partition("=")[0] for word in words if word.startswith("--"))
        names = (name if name in self.arguments else name.removeprefix("no_") for name in given)
        return [(name, shown(self.arguments[name])) for name in dict.fromkeys(names) if name in self.arguments]


def is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def shown(value) -> str:
    return str(value).lower() if isinstance(value, bool) else "not set" if value is None else str(value)


def read_folder(path: Path) -> RunFolder:
    """Reads a run folder, but not yet its examples. Raises UsageError if it holds no run."""
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder; name the --output_dir of a run")
    run = RunFolder(
        path, path.resolve().name, list(_events(path / "metrics.jsonl")), _json(path / "arguments.json", {}),
        _json(path / "environment.json", {}), _text(path / "command.txt").strip(),
    )  # fmt: skip
    files = {}
    for kind in ("retrieved", "predictions"):  # the latter replace the former
        files |= {file.name.split(".", 1)[1].removesuffix(".jsonl"): file for file in path.glob(f"{kind}.*.jsonl")}
    if not (files or run.events or run.arguments):
        raise UsageError(f"{path}: holds no run; name a folder with metrics.jsonl or predictions.<split>.jsonl")
    if not run.events and run.arguments:  # of retrieve_and_summarize.py, where each command replaces the flags
        began = (path / "arguments.json").stat().st_mtime_ns
        older = sorted(split for split, file in files.items() if file.stat().st_mtime_ns < began)
        if older:
            names = " and ".join(files[split].name for split in older)
            run.note = f"Of an earlier command than the one below, with other flags: {names}"
    others = sorted(files.keys() - {"train"}, key=lambda split: (split != "validation", split))
    splits = others or list(files)  # what was trained on says little
    if run.events and not run.is_over:
        if splits:
            run.note = f"{files[splits[0]].name} is of an earlier end of this run, and is shown when the run ends again"
        splits = []
    run.files = {split: files[split] for split in splits}
    run.hops = {split: _json(path / f"hops.{split}.json", []) for split in splits}
    return run


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json(path: Path, default):
    try:
        content = json.loads(_text(path) or "null")
    except ValueError as error:
        raise DataError(f"{path}: {error}; the run writes this file again when it is started again") from None
    return content if isinstance(content, type(default)) else default


def _events(path: Path) -> Iterator[dict]:
    """The lines that are whole: the run may be writing, or may have been killed as it wrote."""
    for line in _text(path).splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str) and isinstance(event.get("step"), int):
            yield event


def read_records(path: Path) -> Iterator[tuple[str, dict]]:
    """Place and content of each line. Raises DataError for one that is not an example of this suite."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{place}: {error}; write the file again") from None
            if not isinstance(record, dict) or not {"id", "passages"} <= record.keys():
                raise DataError(f"{place}: no 'id' and 'passages'; a report needs files that these scripts wrote")
            yield place, record
