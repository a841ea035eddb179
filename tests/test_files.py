"""Files and folders that are written completely or not at all."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from utils.files import TEMPORARY, digest, remove, size_and_digest, write_json, write_jsonl, write_lines, write_whole


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path):
    write_lines(tmp_path / "file", ["old"])

    def lines():
        yield "new"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write_lines(tmp_path / "file", lines())
    assert (tmp_path / "file").read_text() == "old\n"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    for content in ("old", "new"):

        def write(folder, content=content):
            folder.mkdir()
            write_json(folder / f"{content}.json", {"is": content})

        write_whole(tmp_path / "folder", write)
        assert os.listdir(tmp_path / "folder") == [f"{content}.json"]
    assert os.listdir(tmp_path) == ["folder"]


def test_a_killed_write_leaves_the_old_content_and_the_next_one_cleans_up(tmp_path):
    write_lines(tmp_path / "file", ["old"])
    program = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
from utils.files import write_whole
def write(temporary):
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
write_whole({str(tmp_path / "file")!r}, write)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old\n"
    assert (tmp_path / f"{TEMPORARY}file").read_text() == "half"
    write_lines(tmp_path / "file", ["new"])
    assert (tmp_path / "file").read_text() == "new\n"
    assert os.listdir(tmp_path) == ["file"]


def test_any_text_can_be_written_and_a_lone_surrogate_is_escaped(tmp_path):
    write_jsonl(tmp_path / "file", [{"text": "é 東京 \ud83d"}])
    assert (tmp_path / "file").read_text(encoding="utf-8") == '{"text": "é 東京 \\ud83d"}\n'


def test_removing_what_is_not_there_is_no_error_and_a_link_goes_without_its_target(tmp_path):
    remove(tmp_path / "absent")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    remove(tmp_path / "link")
    assert os.listdir(tmp_path) == ["folder"]


def test_checksums_tell_contents_apart(tmp_path):
    write_lines(tmp_path / "file", ["content"])
    assert size_and_digest(tmp_path / "file")["size"] == 8
    assert digest([[1, 2], [3]]) == digest([[1, 2], [3]]) != digest([[1, 2, 3]])
