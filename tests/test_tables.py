"""What is kept on disk: read as written, made once, and never used if it is incomplete or damaged."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
from conftest import ROOT

from utils import files, tables
from utils.errors import DataError
from utils.tables import Table, cached, lengths, table_writer, write_table

SCHEMA = pa.schema([("text", pa.large_string()), ("ids", pa.large_list(pa.uint16())), ("number", pa.int64())])
ROWS = [{"text": f"Wörter {n} \u0935\u094d", "ids": list(range(n % 7)), "number": n * n} for n in range(2500)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    tables._private_folder.cache_clear()  # of tests of other files
    yield
    files.choose_cache_folder(None)
    tables._private_folder.cache_clear()


@pytest.fixture
def table(tmp_path):
    write_table(tmp_path / "t.arrow", SCHEMA, iter(ROWS))
    return Table(tmp_path / "t.arrow")


def test_a_table_gives_back_what_was_written_by_number_slice_and_column(table):
    assert len(table) == 2500
    assert list(table.read()) == ROWS
    assert [table.row(number) for number in (0, 1023, 1024, 2499)] == [ROWS[n] for n in (0, 1023, 1024, 2499)]
    texts, ids = table.column("text"), table.column("ids")
    assert texts == [row["text"] for row in ROWS]
    assert texts[1000:1050] == [row["text"] for row in ROWS[1000:1050]]
    assert texts[-1] == ROWS[-1]["text"] and texts[[5, 2000]] == [ROWS[5]["text"], ROWS[2000]["text"]]
    assert ids[2499] == ROWS[2499]["ids"] and ids[0] == []
    assert lengths(ids).tolist() == [len(row["ids"]) for row in ROWS] == lengths([row["ids"] for row in ROWS]).tolist()
    assert table.array("number").tolist() == [row["number"] for row in ROWS]
    for place in (2500, -2501):
        with pytest.raises(IndexError):
            texts[place]
    assert texts != texts[:-1] and texts != [*texts[:-1], "other"]


def test_an_empty_table_is_read(tmp_path):
    write_table(tmp_path / "t.arrow", SCHEMA, [])
    table = Table(tmp_path / "t.arrow")
    assert (len(table), list(table.read()), list(table.column("text"))) == (0, [], [])
    assert lengths(table.column("ids")).tolist() == table.array("number").tolist() == []


def test_what_was_read_of_a_table_does_not_stay_in_the_memory_of_the_process(tmp_path):
    rng = np.random.default_rng(0)
    with table_writer(tmp_path / "t.arrow", pa.schema([("text", pa.large_string())])) as add:
        for number in range(40_000):
            add({"text": f"{number} " * 300})
    texts, process = Table(tmp_path / "t.arrow").column("text"), psutil.Process()
    assert (tmp_path / "t.arrow").stat().st_size > 60e6
    before = process.memory_full_info().pss
    for number in rng.integers(len(texts), size=30_000):
        assert texts[number].startswith(f"{number} ")
    assert sum(map(len, texts)) > 60e6
    assert process.memory_full_info().pss - before < 20e6


def count_builds(folder: Path, name: str, key: list, seconds: float = 0.0) -> Path:
    def write(temporary):
        time.sleep(seconds)
        (temporary / "data").write_text("whole")
        with (folder / "builds").open("a") as builds:
            builds.write(f"{os.getpid()}\n")

    path = cached(name, key, write)
    assert (path / "data").read_text() == "whole"
    return path


def builds(folder: Path) -> int:
    return len((folder / "builds").read_text().splitlines())


def test_a_key_is_built_once_and_another_key_or_other_code_anew(tmp_path, monkeypatch):
    first = count_builds(tmp_path, "thing", ["a", 1])
    assert count_builds(tmp_path, "thing", ["a", 1]) == first
    assert builds(tmp_path) == 1
    assert count_builds(tmp_path, "thing", ["a", 2]) != first
    monkeypatch.setattr(tables, "code_key", lambda: "edited")
    assert count_builds(tmp_path, "thing", ["a", 1]) != first
    assert builds(tmp_path) == 3


def test_two_processes_that_want_the_same_build_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=count_builds, args=(tmp_path, "thing", ["a"], 0.5)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert builds(tmp_path) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no list"])
def test_what_is_damaged_is_built_anew(tmp_path, damage):
    path = count_builds(tmp_path, "thing", ["a"])
    if damage == "cut":
        (path / "data").write_text("who")
    elif damage == "flipped":
        (path / "data").write_text("whale")
    elif damage == "missing":
        (path / "data").unlink()
    else:
        (path / tables.INFO).write_text("{")
    count_builds(tmp_path, "thing", ["a"])
    assert builds(tmp_path) == 2


KILLED = """
import os, signal, sys
from pathlib import Path
from utils.tables import cached

def write(folder):
    (folder / "data").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

cached("thing", ["a"], write)
"""


def test_what_a_kill_left_half_written_is_never_used(tmp_path):
    result = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, env=os.environ, timeout=60)
    assert result.returncode == -9
    assert list((tmp_path / "home").rglob("data"))  # it got so far
    count_builds(tmp_path, "thing", ["a"])
    assert builds(tmp_path) == 1
    assert not [path for path in (tmp_path / "home").rglob("*") if path.name.startswith(files.TEMPORARY)]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "data").write_text("half")
        raise DataError("bad data")

    with pytest.raises(DataError, match="bad data"):
        cached("thing", ["a"], fail)
    count_builds(tmp_path, "thing", ["a"])


def test_a_chosen_folder_that_cannot_be_written_to_is_refused_and_the_default_one_replaced(tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    files.choose_cache_folder(tmp_path / "file")
    with pytest.raises(DataError, match=r"--cache_dir .*/file: cannot be written to: .*; name another folder"):
        count_builds(tmp_path, "thing", ["a"])
    files.choose_cache_folder(None)
    (tmp_path / "home").write_text("not a folder either")
    path = count_builds(tmp_path, "thing", ["a"])
    assert count_builds(tmp_path, "thing", ["a"]) == path
    assert builds(tmp_path) == 1
    assert [record.message.count("--cache_dir") for record in caplog.records] == [1]


def test_without_a_key_everything_is_built_anew_in_a_folder_that_goes_with_the_process(tmp_path):
    paths = [count_builds(tmp_path, "thing", None) for _ in range(2)]
    assert builds(tmp_path) == 2 and paths[0] != paths[1]
    assert not (tmp_path / "home").exists()
    tables.remove_private_folder()
    assert not any(path.exists() for path in paths)
    tables.remove_private_folder()  # there is none


def test_a_folder_that_is_whole_serves_without_write_access(tmp_path, monkeypatch):
    path = count_builds(tmp_path, "thing", ["a"])
    monkeypatch.setattr(tables, "FileLock", None)  # none is taken
    assert count_builds(tmp_path, "thing", ["a"]) == path
