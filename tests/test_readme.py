"""The README tells the truth: its commands, flags, files and data record."""

import itertools
import json
import re
import subprocess

import pytest
from accelerate.commands.launch import launch_command_parser
from conftest import ROOT

from utils.cli.arguments import GROUPS
from utils.data.loading import load_examples

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_quick_start_shows_the_commands_that_its_target_runs():
    printed = subprocess.run(["make", "-n", "quickstart"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    commands = [line for line in printed.splitlines() if line.startswith("accelerate")]
    section = README.partition("## Quick start")[2].partition("\n## ")[0]
    target, shown = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)[:2]
    assert target == "make quickstart\n"
    assert len(commands) == 3 and shown.splitlines() == commands


def test_flags_in_the_readme_exist():
    known = set(itertools.chain(*(names.split() for names in GROUPS.values()))) | {"help"}
    known |= {action.dest for action in launch_command_parser()._actions}
    known |= {"documents", "output", "plots"}  # of utils/data/sample.py and utils/reporting
    named = {name if name in known else name.removeprefix("no_") for name in re.findall(r"--(\w+)", README)}
    assert len(named) > 30 and named <= known, named - known


def test_files_in_the_readme_exist():
    linked = [path for path in re.findall(r"\]\(([^)]+)\)", README) if not path.startswith("http")]
    launched = re.findall(r"\S+\.yaml", README)
    rooms = re.search(r"```\n(train_retrieve.py .*?)```", README, re.DOTALL)[1]
    room, modules = "", []
    for line in rooms.splitlines():
        room = re.match(r"utils/\w+/", line)[0] if re.match(r"utils/\w+/", line) else room
        modules += [room + name if line.startswith(("utils/", " ")) and "/" not in name else name
                    for name in re.findall(r"[\w/]+\.py", line)]  # fmt: skip
    assert len(linked) > 20 and len(launched) > 5 and len(modules) > 40
    for path in (*linked, *launched, *modules):
        assert (ROOT / path).exists(), path


def test_the_data_record_is_read(tmp_path):
    (tmp_path / "train.jsonl").write_text(re.search(r"```json\n(.*?)```", README, re.DOTALL)[1])
    [example] = load_examples(tmp_path / "train.jsonl")
    record = json.loads((tmp_path / "train.jsonl").read_text())
    assert example.query == record["query"] and example.evidence == [1] and len(example.document.passages) == 2


@pytest.mark.parametrize("word", ["TODO", "@", "FIXME"])
def test_nothing_is_left_to_be_filled_in(word):
    assert word not in re.sub(r"\w+@\d+", "", README)  # recall@5
