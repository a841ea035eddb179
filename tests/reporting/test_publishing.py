"""Publishing on the Hub, with the real client against a stand-in: what arrives, and what is said if it does not."""

import json
import os
import socket
from types import SimpleNamespace

import pytest
from conftest import ROOT, SMALL, alone, events, launch
from hub_stand_in import TOKEN, hub
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import LocalEntryNotFoundError

from utils.reporting import cards, publishing

SCRIPT = "train_retrieve.py"


def nobody() -> str:
    """An address at which no server is."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def launch_online(script, folder, url, *flags, token=TOKEN, **options):
    """A run of one step that publishes."""
    flags = [*SMALL[script], "--max_train_steps", 1, "--per_device_train_batch_size", 4, "--push_to_hub", *flags]
    variables = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": token,
                 "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1"}  # fmt: skip
    return launch(script, "--output_dir", folder, *flags, **options, **variables)


def test_a_model_that_the_hub_does_not_take_is_published_by_the_same_command_without_training(tmp_path, undisturbed):
    folder, base = tmp_path / "run", undisturbed[SCRIPT]  # trained further: its card is no hindrance
    assert (base / "README.md").exists()
    flags = ["--model_name_or_path", base, "--hub_model_id", "anna/retriever", "--hub_private_repo"]
    with hub() as server:
        result = launch_online(SCRIPT, folder, server.url, *flags, token="hf_ofNobody")
        assert result.returncode == publishing.NOT_PUBLISHED, result.stderr
        errors = [line for line in result.stderr.splitlines() if "error" in line]
        assert len(errors) == 1 and "Traceback" not in result.stderr
        assert f"the model is in {folder}, but it was not published: 401" in errors[0]
        assert "hf auth login" in errors[0] and "run the same command again" in errors[0]
        assert (folder / "model.safetensors").exists() and (folder / "README.md").exists()
        assert server.repositories == {}
        trained = events(folder, "train")

        result = launch_online(SCRIPT, folder, server.url, *flags)
        assert result.returncode == 0, result.stderr
        assert f"published {server.url}/anna/retriever" in result.stdout
        assert events(folder, "train") == trained and "nothing to train" in result.stdout
        [(name, repository)] = server.repositories.items()

    assert name == "anna/retriever" and repository["private"]
    files = repository["files"]
    assert {"README.md", "settings.json", "model.safetensors", "config.json", "modules.json", "1_Pooling/config.json",
            "tokenizer.json"} <= files.keys()  # fmt: skip
    kept = {"arguments", "command", "environment", "checkpoints", "metrics", "retrieved", "report", ".lock", "rejected"}
    assert not [path for path in files if path.split("/")[0].split(".json")[0].split(".")[0] in kept]
    for path, content in files.items():
        if path not in ("settings.json", ".gitattributes"):
            assert content == (folder / path).read_bytes(), path
        assert str(tmp_path).encode() not in content and str(base).encode() not in content, path
    settings = json.loads((folder / "settings.json").read_text())
    assert json.loads(files["settings.json"]) == {**settings, "model_name_or_path": base.name}
    assert "SentenceTransformer('anna/retriever')" in files["README.md"].decode()
    # the token is sent, and nowhere written
    assert server.tokens == {"hf_ofNobody", TOKEN}
    for path in folder.rglob("*"):
        assert path.is_dir() or not any(token.encode() in path.read_bytes() for token in server.tokens), path


def test_only_one_of_two_processes_publishes_and_both_end(tmp_path):
    flags = ["--mixed_precision", "no"]
    result = launch_online("train_summarize.py", tmp_path / "letters", nobody(), *flags, processes=2)
    assert result.returncode == 1  # the launcher's
    assert result.stderr.count("error: the model is in") == 1 and f'File "{ROOT}/utils' not in result.stderr
    assert "look at the network" in result.stderr
    with hub() as server:
        result = launch_online("train_summarize.py", tmp_path / "letters", server.url, *flags, processes=2)
        assert result.returncode == 0, result.stderr
    assert server.commits == 1 and result.stdout.count("published") == 1
    [(name, repository)] = server.repositories.items()
    assert name == "anna/letters" and not repository["private"]  # the run folder's name
    assert repository["files"]["model.safetensors"] == (tmp_path / "letters/model.safetensors").read_bytes()
    assert b"from_pretrained(name)" in repository["files"]["README.md"]
    assert b"name = 'anna/letters'" in repository["files"]["README.md"]


@pytest.fixture
def server(monkeypatch):
    """A stand-in for this process."""
    with hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def present(tmp_path, monkeypatch):
    """Presents a model, as at the end of a run, whose card says `text`; returns the exit code."""

    def writer(run, *_):
        def write(name):
            if not cards.is_edited(run.folder / "README.md"):
                (run.folder / "README.md").write_text(cards.seal(f"---\nlibrary_name: peft\n---\n{run.text} {name}"))

        return write

    monkeypatch.setattr(cards, "card_writer", writer)

    def now(text="card", private=None, files=("adapter_model.safetensors",)):
        args = SimpleNamespace(output_dir=str(tmp_path), push_to_hub=True, hub_model_id="bob/m",
                               hub_private_repo=private)  # fmt: skip
        (tmp_path / "settings.json").write_text(json.dumps({"model_name_or_path": None}))
        for file in files:
            (tmp_path / file).write_text(text)
        published = [os.path.relpath(tmp_path / file, tmp_path) for file in (*files, "settings.json")]
        run = SimpleNamespace(args=args, folder=tmp_path, text=text, published=published, accelerator=alone(),
                              log=SimpleNamespace(say=print))  # fmt: skip
        return publishing.present(run, "summarizer", {}, {})

    return now


def test_a_card_that_was_edited_on_the_hub_is_kept_there_unless_the_one_here_was_edited_too(
    server, present, tmp_path, capsys
):
    assert present("first") == 0
    files = server.repositories["bob/m"]["files"]
    assert b"first bob/m" in files["README.md"]
    assert present("second") == 0 and b"second bob/m" in files["README.md"]
    edited = files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    files["README.md"] = edited
    assert present("third") == 0
    assert files["README.md"] == edited and files["adapter_model.safetensors"] == b"third"
    assert "the README.md on the Hub was edited, or is not from here, and is kept" in capsys.readouterr().out
    mine = "---\nlicense: cc0-1.0\nlibrary_name: peft\n---\nmine"
    (tmp_path / "README.md").write_text(mine)
    assert present("fourth") == 0 and files["README.md"] == mine.encode()


def test_a_hub_that_is_gone_amid_the_upload_keeps_its_card(server, present, monkeypatch, capsys):
    def gone(*_, **__):
        raise LocalEntryNotFoundError("the Hub is not reached")

    assert present("first") == 0
    monkeypatch.setattr(HfApi, "hf_hub_download", gone)
    assert present("second") == publishing.NOT_PUBLISHED
    assert "the Hub is not reached; look at the network" in capsys.readouterr().err
    assert b"first bob/m" in server.repositories["bob/m"]["files"]["README.md"]


def test_a_whole_model_replaces_adapters_on_the_hub_and_other_files_stay(server, present):
    assert present("a", files=("adapter_model.safetensors", "adapter_config.json")) == 0
    files = server.repositories["bob/m"]["files"]
    files["notes.txt"] = b"kept"
    assert present("b", files=("model.safetensors", "config.json")) == 0
    assert files.keys() == {".gitattributes", "README.md", "settings.json", "notes.txt", "model.safetensors",
                            "config.json"}  # fmt: skip


def test_a_public_repository_does_not_get_what_was_to_be_private(server, present, capsys):
    assert present("a") == 0
    assert present("b", private=True) == publishing.NOT_PUBLISHED
    assert "bob/m is there already, and is public; change that on the Hub" in capsys.readouterr().err
    assert server.repositories["bob/m"]["files"]["adapter_model.safetensors"] == b"a"
