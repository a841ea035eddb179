"""The settings beside a model's weights, and what is read from its configuration."""

import json

import pytest
from transformers import T5Config, T5ForConditionalGeneration

from utils.models.settings import attention_dropout, saved_settings


def test_settings_of_a_model_on_the_hub_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, content in (("a", {"model_name_or_path": None, "top_k": 20}), ("b", {"top_k": 20})):
        folder = tmp_path / f"models--anna--{name}"
        for file, text in {"refs/main": "1" * 40, f"snapshots/{'1' * 40}/settings.json": json.dumps(content)}.items():
            (folder / file).parent.mkdir(parents=True)
            (folder / file).write_text(text)
    assert saved_settings("anna/a") == {"model_name_or_path": None, "top_k": 20}
    assert saved_settings("anna/b") == {}  # a file of another tool
    assert saved_settings("anna/c") == saved_settings("no name: of ? a model") == {}
    monkeypatch.setattr("utils.models.settings.hf_hub_download", lambda *_: pytest.fail("asked the Hub"))
    assert saved_settings("outputs/absent") == saved_settings(str(tmp_path)) == {}


def test_attention_dropout_of_t5_is_its_dropout():
    config = T5Config(vocab_size=60, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, dropout_rate=0.2)
    assert attention_dropout(T5ForConditionalGeneration(config)) == 0.2
