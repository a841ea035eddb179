"""What the tests share: running the scripts as users do, on small embedded data, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def launch(script: str, *flags, processes: int = 1, cwd=ROOT, timeout: int = 240, **environment):
    """Runs a script of the project with 1 process, or with 2 and more under torch's launcher; returns its result."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", **environment}
    return subprocess.run(
        [*command, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def events(run_folder, name: str) -> list[dict]:
    """The lines of a run's metrics.jsonl with this event."""
    lines = map(json.loads, (Path(run_folder) / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    """Run folders of both stages on small embedded data, made once: {"retrieve": folder, "summarize": folder}."""
    folder = tmp_path_factory.mktemp("smoke")
    retrieve, summarize = folder / "retrieve", folder / "summarize"
    flags = {
        "retrieve": ["--output_dir", retrieve, "--sample_documents", 110, "--num_train_epochs", 2, "--log_steps", 10],
        "summarize": [
            "--output_dir", summarize, "--train_file", retrieve / "retrieved.train.jsonl",
            "--validation_file", retrieve / "retrieved.validation.jsonl",
            "--num_train_epochs", 2, "--log_steps", 10, "--max_new_tokens", 24,
        ],
    }  # fmt: skip
    for stage in flags:
        result = launch(f"train_{stage}.py", *flags[stage])
        assert result.returncode == 0, result.stderr
    return {"retrieve": retrieve, "summarize": summarize, "flags": flags}
