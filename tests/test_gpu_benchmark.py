"""benchmarks/gpu.py gives its whole table on a processor too, and one section's failure costs no other section."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import OFFLINE, ROOT
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from utils.fast import cpu

SCRIPT = ROOT / "benchmarks" / "gpu.py"
SECTIONS = ["matmul", "summarizer", "retriever", "parity", "generation", "fsdp2", "reranker", "language_model"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """What a tiny run of all sections printed and wrote."""
    output = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, str(SCRIPT), "--tiny", "--output", str(output)]
    environment = {**os.environ, **OFFLINE, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=480)
    assert result.returncode == 0, result.stderr
    return SimpleNamespace(printed=result.stdout, **json.loads(output.read_text()))


@pytest.fixture(scope="module")
def gpu():
    """The benchmark as a module, on the processor."""
    sys.path.insert(0, str(SCRIPT.parent))  # as for a script
    specification = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    module.DEVICE = torch.device("cpu")
    return module


def rows_of(report, section: str) -> dict[str, dict]:
    return {row["measure"]: row for row in report.sections[section]["rows"]}


def test_all_sections_are_measured_and_printed_under_the_hardware(report):
    assert list(report.sections) == SECTIONS
    failures = {name: section.get("traceback") for name, section in report.sections.items()}
    assert [section["status"] for section in report.sections.values()] == ["ok"] * len(SECTIONS), failures
    first, columns, *lines = report.printed.splitlines()
    assert first == report.head and "torch" in first
    assert columns.split() == ["section", "measure", "project", "plain", "ratio", "note"]
    assert {line.split()[0] for line in lines} == set(SECTIONS)
    assert all(any("peak memory" in row["measure"] for row in each["rows"]) for each in report.sections.values())


@pytest.mark.parametrize(
    ("section", "kind"),
    [("summarizer", ""), ("retriever", ""), ("reranker", ""), ("language_model", "tiny, all weights: "),
     ("language_model", "tiny, adapters: ")],
)  # fmt: skip
def test_training_counts_real_tokens_on_both_sides_and_the_project_packs(report, section, kind):
    names = (f"{kind}real tokens per second", f"{kind}share of the bf16 peak")
    speed, share = (rows_of(report, section)[name] for name in names)
    rounds = [project / plain for plain, project in zip(*speed["seconds"].values(), strict=True)]
    assert len(rounds) == 2 and min(rounds) > 0
    for side in ("project", "plain"):
        assert speed[side] > 0 and share[side] > 0
    # both sides did the same work
    assert math.isclose(speed["project"] / share["project"], speed["plain"] / share["plain"])
    assert "NOT PACKED" not in speed["note"] and "packed" in speed["note"]


MODELS = ["summarizer", "retriever", "reranker", "language model"]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_and_padded_batches_agree(report, model, dtype):
    row = rows_of(report, "parity")[f"{model}, {dtype}"]
    assert row["ok"], row["note"]
    assert 0 <= row["loss"] <= row["limits"][0] and 0 < row["gradient"] <= row["limits"][1]
    assert row["note"].endswith(": ok")


def test_float16_has_a_row_whatever_became_of_it(report):
    rows = rows_of(report, "parity")
    for model in MODELS:
        row = rows[f"{model}, float16"]
        assert row["ok"] or row["note"].startswith(("not supported on cpu", "failed", "loss"))


def test_generation_writes_what_transformers_writes_in_float32(report):
    row = rows_of(report, "generation")["float32, tokens per second"]
    assert row["identical"] == 1.0
    assert row["project"] > 0 and row["plain"] > 0


def test_step_after_a_restart_under_fsdp2_gives_the_same_parameters(report):
    row = rows_of(report, "fsdp2")["one more step after a restart"]
    assert row["identical"] and row["difference"] == 0 and row["tensors"] > 100
    assert "fully_shard" in row["by"]


def test_a_failing_section_becomes_a_row_and_the_others_run(gpu, monkeypatch, tmp_path, capsys):
    def fail(args):
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setitem(gpu.SECTIONS, "summarizer", fail)
    gpu.main(["--tiny", "--only", "summarizer", "matmul", "--output", str(tmp_path / "gpu.json")])
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert [sections[name]["status"] for name in ("summarizer", "matmul")] == ["failed", "ok"]
    assert sections["summarizer"]["rows"][0]["note"] == "failed: RuntimeError: for this card"
    assert "no kernel" in sections["summarizer"]["traceback"]
    printed = capsys.readouterr().out
    assert "failed: RuntimeError: for this card" in printed and "no kernel" not in printed
    assert "512 x 512" in printed


def test_sections_after_one_that_broke_the_gpu_run_in_another_process(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "is_broken", lambda: True)
    elsewhere = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: elsewhere.append(command) or run(
        [sys.executable, "-c", f"open({command[command.index('--output') + 1]!r}, 'w').write("
         "'{\"sections\": {\"parity\": {\"status\": \"ok\", \"rows\": []}}}')"], check=True))  # fmt: skip
    gpu.main(["--tiny", "--only", "matmul", "parity", "fsdp2", "--output", str(tmp_path / "gpu.json")])
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {name: section["status"] for name, section in sections.items()} == {
        "matmul": "ok", "parity": "ok", "fsdp2": "failed"}  # fmt: skip
    [command] = elsewhere
    assert command[command.index("--only") + 1 : command.index("--output")] == ["parity", "fsdp2"]
    assert "--tiny" in command and 400 < float(command[command.index("--budget_seconds") + 1]) < 480


def test_what_is_left_when_the_time_is_over_is_skipped_and_said(gpu, tmp_path, capsys):
    gpu.main(["--tiny", "--only", "matmul", "--budget_seconds", "0", "--output", str(tmp_path / "gpu.json")])
    assert "skipped: 0 s are over" in capsys.readouterr().out
    args = SimpleNamespace(size=gpu.TINY, budget_seconds=9, deadline=time.monotonic())
    row = gpu.summarizer(args)[0]
    assert "median of 1 rounds" in row["note"] and "1 skipped: 9 s are over" in row["note"]


def test_operations_of_the_formula_are_those_that_torch_counts_without_padding(gpu, monkeypatch):
    monkeypatch.setattr(cpu, "IS_FASTER", False)  # torch does not count the products of oneDNN
    size = SimpleNamespace(**{**vars(gpu.TINY), "source": (32, 32), "target": (8, 8)})
    _, plain = gpu.summarizers(size.bart)
    [batch] = gpu.summary_batches(size, 1)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        gpu.plain_summarizer_loss(plain, batch).backward()
    expected = gpu.summarizer_flops(plain.config, [32] * 4, [8] * 4)
    causal = 12 * 128 * 2 * 4 * 8 * 8 / 2  # the half that the causal mask hides, which torch counts
    assert math.isclose(counter.get_total_flops(), expected + causal, rel_tol=1e-6)

    for with_adapters in (False, True):
        _, plain = gpu.language_models(gpu.NARROW_LLAMA, with_adapters=False)
        ids = torch.full((3, 32), 9)
        if with_adapters:  # but for their own products: frozen weights
            plain.requires_grad_(False)
        embedded = plain.get_input_embeddings()(ids).detach().requires_grad_()
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            plain.model(inputs_embeds=embedded)[0].sum().backward()
        # torch counts the half that the causal mask hides
        causal = 6 * 128 * 2 * 3 * 32 * 32
        expected = gpu.language_model_flops(plain.config, [33] * 3, [0] * 3, with_adapters)
        assert math.isclose(counter.get_total_flops(), expected + causal, rel_tol=1e-6)

    encoder, _ = gpu.retrievers(size.bert)
    bert = encoder[0].auto_model
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        states = encoder[0]({"input_ids": torch.full((4, 16), 9), "attention_mask": torch.ones(4, 16).long()})
        states["token_embeddings"].sum().backward()
    pooler = 2 * 128 * 128  # of one row, the packed batch; forward only, for its output is not used
    assert counter.get_total_flops() == gpu.retriever_flops(bert.config, [16] * 4) + pooler
