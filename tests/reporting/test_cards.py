"""Model cards: metadata that the Hub reads, what a run was, and code that runs."""

import hashlib
import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import yaml
from conftest import ROOT, alone, events, launch, run
from huggingface_hub import ModelCard
from torch import nn
from transformers import BertConfig, BertModel

from train_retrieve import RetrieveArguments
from utils.data.sample import sample_records
from utils.files import write_json, write_jsonl
from utils.reporting import cards
from utils.reporting.markdown import as_text
from utils.training.loop_state import LoopState

KINDS = {"train_retrieve.py": ("retriever", "sentence-transformers", "sentence-similarity"),
         "train_rerank.py": ("reranker", "sentence-transformers", "text-ranking"),
         "train_summarize.py": ("summarizer", "transformers", "summarization")}  # fmt: skip


def blocks(folder, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (folder / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def check_front(folder) -> dict:
    """The metadata of a card, as a strict reader of YAML sees it."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert front == ModelCard.load(folder / "README.md").data.to_dict()
    assert "license" not in front and "No licence is set" in text
    return front


@pytest.mark.parametrize("script", KINDS)
def test_a_card_says_what_the_model_is_and_its_code_runs(script, undisturbed, tmp_path, monkeypatch, capsys):
    folder, (kind, library, task) = undisturbed[script], KINDS[script]
    front, last = check_front(folder), events(folder, "validation")[-1]
    assert (front["library_name"], front["pipeline_tag"]) == (library, task) and kind in front["tags"]
    assert not {"base_model", "datasets"} & front.keys()
    [index] = front["model-index"]
    [result] = index["results"]
    assert result["dataset"] == {"name": "the embedded data set", "type": "embedded", "split": "validation"}
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    numbers = {name for name, value in last.items() if isinstance(value, float)} - {"epoch"}
    assert values.keys() == numbers and len(numbers) >= 7
    assert values == pytest.approx({name: last[name] for name in numbers}, abs=1e-3)
    text = (folder / "README.md").read_text()
    [flags] = blocks(folder, "json")
    assert json.loads(flags)["learning_rate"] == 3e-4 and "seed" not in json.loads(flags)
    assert str(folder.parent) not in text and "48 training examples" in text and "torch 2." in text

    monkeypatch.chdir(folder.parent)  # the card has no absolute path
    [code] = blocks(folder, "python")
    exec(compile(code, "card", "exec"), {})
    assert capsys.readouterr().out.strip() or kind == "summarizer"  # one that is untrained may write nothing

    (tmp_path / folder.name).symlink_to(folder)
    (tmp_path / "meeting.txt").write_text("Ann: Shall we sell the mill? Bob: Yes, we sell the mill.")
    [command] = blocks(folder, "bash")
    python, script, *flags = shlex.split(command)
    flags = [undisturbed["train_retrieve.py"] if flag == cards.MINILM else flag for flag in flags]
    result = subprocess.run([sys.executable, ROOT / script, *flags], cwd=tmp_path, capture_output=True,
                            text=True, timeout=240)  # fmt: skip
    assert python == "python" and result.returncode == 0, result.stderr
    assert "sell the mill" in result.stdout + result.stderr


def test_adapters_data_with_any_name_and_a_test_split(tmp_path, language_model, monkeypatch, capsys):
    """A card of a language model's adapters; its code loads them with peft."""
    names = {"train": "tr'ain \"a\": [b] `c`|---\n---\nx: y.jsonl", "validation": "- {v}: &a *b #c.jsonl",
             "test": "%t @ ! \\ \u202e.jsonl"}  # fmt: skip
    for split, name in names.items():
        write_jsonl(tmp_path / name, sample_records("train" if split == "train" else "validation", 2))
    template = tmp_path / "prompt.txt"
    template.write_text('Q: {query}\n"""{passages}"""\n```')
    folder = tmp_path / "run 'of' \"adapters\""
    flags = [flag for split, name in names.items() for flag in (f"--{split}_file", tmp_path / name)]
    result = launch("train_summarize.py", "--output_dir", folder, *flags, "--model_name_or_path", language_model,
                    "--lora_rank", 2, "--max_train_steps", 1, "--per_device_train_batch_size", 2, "--max_new_tokens", 3,
                    "--num_beams", 1, "--prompt_template", template, "--max_train_examples", 5)  # fmt: skip
    assert result.returncode == 0, result.stderr
    front, text = check_front(folder), (folder / "README.md").read_text()
    assert (front["library_name"], front["pipeline_tag"]) == ("peft", "text-generation") and "lora" in front["tags"]
    assert "base_model" not in front and f"a local folder, {as_text(language_model.name)}" in text  # nobody else has it
    assert front["model-index"][0]["name"] == folder.name
    validation, test = front["model-index"][0]["results"]
    assert validation["dataset"]["name"] == names["validation"] and test["dataset"]["split"] == "test"
    assert {metric["value"] for metric in test["metrics"]} == {
        round(value, 4) for name, value in events(folder, "test")[-1].items() if isinstance(value, float)
    }
    for name in names.values():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() in text
    assert str(tmp_path) not in text and "5 training examples, 12 validation examples, 12 test examples" in text
    assert json.loads(blocks(folder, "json")[0])["train_file"] == names["train"]

    monkeypatch.chdir(tmp_path)
    [code] = blocks(folder, "python")
    space = {}
    exec(compile(code, "card", "exec"), space)
    assert type(space["model"]).__name__ == "PeftModelForCausalLM"
    assert space["prompt"].startswith("<s>user\nQ: What did they decide?")
    assert len(space["ids"][0]) <= space["inputs"]["input_ids"].shape[1] + 3
    assert shlex.split(blocks(folder, "bash")[0])[-1] == folder.name


def test_a_card_that_is_missing_is_written_again_and_an_edited_one_is_kept(undisturbed, tmp_path):
    script = "train_summarize.py"
    folder = shutil.copytree(undisturbed[script], tmp_path / undisturbed[script].name, symlinks=True)
    card = folder / "README.md"
    made, steps = card.read_text(), len(events(folder, "train"))
    card.unlink()
    assert "nothing to train" in run(script, folder).stdout
    assert card.read_text() == made and len(events(folder, "train")) == steps
    edited = made.replace("---\n", "---\nlicense: mit\n", 1)
    card.write_text(edited)
    assert f"{card} was edited, or is not from here, and is kept" in run(script, folder).stdout
    assert card.read_text() == edited


def test_names_of_the_hub_are_in_the_metadata_and_the_last_weights_are_not_called_the_best(tmp_path):
    args = RetrieveArguments(output_dir=str(tmp_path), model_name_or_path="sentence-transformers/all-MiniLM-L6-v2",
                             train_file="owner/data", dataset_config_name="en", trust_remote_code=True)  # fmt: skip
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    run = SimpleNamespace(args=args, model=nn.Sequential(BertModel(config)), folder=tmp_path, accelerator=alone(),
                          model_step=None, state=LoopState(step=9, best=50.0, best_step=6))  # fmt: skip
    write_json(tmp_path / "arguments.json", asdict(args))
    (tmp_path / "metrics.jsonl").write_text('{"event": "test", "step": 9, "model_step": 9, "ndcg@10": 20.0}\n')
    scores = {"ndcg@10": 40.0, "recall@1": math.nan, "examples": 2, "bm25": {"ndcg@10": 30.0}, "hop2": {"ndcg@10": 60}}
    cards.card_writer(run, "retriever", {"train": range(3), "validation": range(2)}, scores)("anna/retriever")
    front, text = check_front(tmp_path), (tmp_path / "README.md").read_text()
    assert front["base_model"] == args.model_name_or_path and front["datasets"] == ["owner/data"]
    [result] = front["model-index"][0]["results"]
    assert result["dataset"] == {"name": "owner/data", "type": "owner/data", "config": "en", "split": "validation"}
    assert result["metrics"] == [{"type": "ndcg@10", "name": "ndcg@10", "value": 40.0}]
    assert "SentenceTransformer('anna/retriever', trust_remote_code=True)" in text
    assert "those of step 9, the last one; step 6 was the best one by ndcg@10 (50)" in text
    assert "| | validation | hop 2, imitated drafts | BM25 |" in text and "| ndcg@10 | 40 | 60 | 30 |" in text
    assert "Imitated drafts are made of the references." in text  # and no test split was given
    assert (
        "--retriever anna/retriever --summarizer extract --trust_remote_code" in text
        and "| `--train_file` | owner/data | on the Hub |" in text
    )


@pytest.mark.parametrize("change", [lambda text: "", lambda text: text + " ", lambda text: text[1:],
                                    lambda text: text.replace("a", "b"), lambda text: "# Mine\n"])  # fmt: skip
def test_any_edit_of_a_card_is_noticed_but_no_other_end_of_the_last_line(change, tmp_path):
    path = tmp_path / "README.md"
    assert not cards.is_edited(path)
    path.write_text(cards.seal("---\na: b\n---\n\n# a\n") + "\n")
    assert not cards.is_edited(path)
    path.write_text(change(path.read_text()))
    assert cards.is_edited(path) == (path.read_text().rstrip() != cards.seal("---\na: b\n---\n\n# a\n"))


def test_what_a_card_shows_of_flags_and_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/b.jsonl").write_text("b")
    (tmp_path / "data/sub").mkdir()
    (tmp_path / "data/sub/a.jsonl").write_text("a")
    assert cards.public(str(tmp_path / "data")) == cards.public("data/../data") == "data"
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "data/b.jsonl")
    assert cards.public("link.jsonl") == "link.jsonl"
    assert cards.public("/somewhere/else.jsonl") == "else.jsonl"
    assert (cards.public("facebook/bart-base"), cards.public(3), cards.public("")) == ("facebook/bart-base", 3, "")
    assert cards.is_hub_name("owner/data") and not cards.is_hub_name("data") and not cards.is_hub_name("a/b/c")
    assert cards.local_name("outputs/retrieve") == "outputs/retrieve"
    assert cards.local_name(str(tmp_path / "data")) == cards.local_name("sub/../data") == "data"
    printed = subprocess.run("find . -type f | LC_ALL=C sort | sed 's,^./,,' | xargs sha256sum | sha256sum", shell=True,
                             cwd=tmp_path / "data", capture_output=True, text=True).stdout  # fmt: skip
    assert cards._checksum(tmp_path / "data") == f"{printed.split()[0]} (2 files)"
