"""What the tests share: running the scripts as users do, on small embedded data, offline."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from utils.data.examples import Hop
from utils.files import write_jsonl

ROOT = Path(__file__).parent.parent

# The smallest runs that have everything in them: two epochs, accumulation, dropout, draws of negatives.
SMALL = {
    "train_retrieve.py": ["--sample_documents", 8, "--num_hard_negatives", 2],
    "train_rerank.py": ["--sample_documents", 8, "--num_hard_negatives", 2, "--retriever", "bm25", "--rerank_top_k", 4],
    "train_summarize.py": ["--sample_documents", 8, "--dropout", 0.1, "--max_new_tokens", 2, "--num_beams", 1],
}
LOOP = ["--num_train_epochs", 2, "--per_device_train_batch_size", 4, "--gradient_accumulation_steps", 2,
        "--log_steps", 1, "--learning_rate", 3e-4]  # fmt: skip
STEPS = 12  # 48 examples, 8 in a step, two epochs
SCRIPTS = ["train_retrieve.py", "train_summarize.py"]  # of the two stages
OFFLINE = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1"}

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # one core for each, so that their threads do not wait for a core
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
    torch.set_num_threads(1)


def small_flags(script, flags) -> list:
    """`SMALL` of a script; data of its own replace the embedded documents."""
    own = SMALL[Path(script).name]
    return own[2:] if "--train_file" in flags else own


def command(script, flags, processes: int) -> list[str]:
    """A script of the project with 1 process, or with 2 and more under torch's launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [sys.executable, *(launcher if processes > 1 else []), str(ROOT / script), *map(str, flags)]


def launch(script: str, *flags, processes: int = 1, cwd=ROOT, timeout: int = 240, **environment):
    """Runs a script of the project to its end; returns its result."""
    variables = {**os.environ, **OFFLINE, **environment}
    return subprocess.run(command(script, flags, processes), cwd=cwd, env=variables, capture_output=True, text=True,
                          timeout=timeout)  # fmt: skip


def start(script, folder, *flags, processes: int = 1) -> subprocess.Popen:
    """A small run in the background; what it prints goes to `folder/output.txt`."""
    folder.mkdir(exist_ok=True)
    flags = ["--output_dir", folder, *small_flags(script, flags), *LOOP, *flags]
    with (folder / "output.txt").open("wb") as output:
        return subprocess.Popen(command(script, flags, processes), env={**os.environ, **OFFLINE}, stdout=output,
                                stderr=subprocess.STDOUT)  # fmt: skip


def wait_until(condition, process, folder, seconds: float = 180) -> None:
    """Waits until `condition()`; an error with what the run printed if it ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline or process.poll() is not None:
            printed = (folder / "output.txt").read_text()[-3000:]
            raise AssertionError(f"what was waited for did not come, exit code {process.poll()}: {printed}")
        time.sleep(0.002)


def kill_all(process) -> None:
    """SIGKILL to a run at once: the launcher, the processes it started and their data loaders."""
    everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for each in everyone:
        try:
            each.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(everyone, timeout=30)
    process.wait(30)


def events(run_folder, name: str) -> list[dict]:
    """The lines of a run's metrics.jsonl with this event; the run may still be writing it."""
    path = Path(run_folder) / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = map(json.loads, text[: text.rfind("\n") + 1].splitlines())
    return [line for line in lines if line["event"] == name]


def read_jsonl(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def one_hop(rankings) -> list[list[Hop]]:
    """The hops of examples that were searched once."""
    return [[Hop("", [], ranking)] for ranking in rankings]


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


def write_beir(folder, **documents: int) -> dict[str, str]:
    """The embedded transcripts, so many for each split, as one corpus in BEIR's layout, with questions and qrels."""
    from utils.data.sample import sample_examples

    corpus = {}
    for split, count in documents.items():
        examples = sample_examples(split, count)
        queries = [{"_id": e.id, "text": e.query, "summary": e.summaries[0]} for e in examples]
        qrels = ["query-id\tcorpus-id\tscore\n"]
        for example in examples:
            ids = [f"{split} {example.document.passage_id(n)}" for n in range(len(example.document.passages))]
            corpus |= dict(zip(ids, example.document.passages, strict=True))
            qrels += [f"{example.id}\t{ids[passage]}\t1\n" for passage in example.evidence]
        write_jsonl(folder / f"queries.{split}.jsonl", queries)
        (folder / f"qrels.{split}.tsv").write_text("".join(qrels))
    write_jsonl(folder / "corpus.jsonl", [{"_id": key, "title": "", "text": text} for key, text in corpus.items()])
    return corpus


def beir_flags(folder) -> list:
    """Flags of train_retrieve.py for what `write_beir` wrote."""
    flags = ["--corpus_file", folder / "corpus.jsonl", "--id_column", "_id", "--query_column", "text"]
    for split in ("train", "validation"):
        flags += [f"--{split}_file", folder / f"queries.{split}.jsonl"]
        flags += [f"--{split}_qrels_file", folder / f"qrels.{split}.tsv"]
    return flags


CHAT = ("{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] | trim }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}")  # fmt: skip


@pytest.fixture(scope="session")
def language_model(tmp_path_factory):
    """A folder with a GPT-2, wide enough to train without padding, and a tokenizer with a chat template."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from utils.data.sample import sample_records
    from utils.models.tokenizer import train_tokenizer

    folder = tmp_path_factory.mktemp("language_model")
    records = sample_records("train", 60)
    tokenizer = train_tokenizer([text for r in records for text in (*r["passages"], r["query"], r["summary"])])
    tokenizer.chat_template, tokenizer.pad_token = CHAT, None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=768, n_embd=256, n_layer=1, n_head=4, n_inner=256,
                        attn_pdrop=0.0, bos_token_id=0, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def run(script, folder, *flags, expect=0, **options):
    result = launch(script, "--output_dir", folder, *small_flags(script, flags), *LOOP, *flags, **options)
    assert result.returncode == expect, (result.returncode, result.stdout[-2000:], result.stderr[-4000:])
    return result


INJECTED = """
import os, pkgutil, runpy, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import torch
owner = pkgutil.resolve_name({owner!r})
plain, calls, rank = getattr(owner, {name!r}), 0, int(os.environ.get("RANK", 0))
def injected(*args, **kwargs):
    global calls
    calls += 1
    if {when}:
        {what}
    return plain(*args, **kwargs)
setattr(owner, {name!r}, injected)
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def inject(folder, script: str, target: str, when: str, what: str) -> Path:
    """A script to run instead of `script`, where `what` happens before calls of `target` (module:name) `when` it says.

    `args`, `calls` (counted from 1) and `rank` are known to both.
    """
    owner, name = re.fullmatch(r"(.+)[:.](\w+)", target).groups()
    wrapper = folder / script
    wrapper.write_text(INJECTED.format(root=str(ROOT), owner=owner, name=name, when=when, what=what,
                                       script=str(ROOT / script)))  # fmt: skip
    return wrapper


# what an injection of both scripts can stand before
LOSS = {"train_retrieve.py": "utils.models.contrastive:contrastive_loss",
        "train_summarize.py": "utils.models.encoder_decoder:vocabulary_loss"}  # fmt: skip
LOSS["train_rerank.py"] = "utils.models.cross_encoder:rerank_loss"
FORWARD = {"train_retrieve.py": "sentence_transformers:SentenceTransformer.forward",
           "train_summarize.py": "utils.models.encoder_decoder:EncoderDecoder.forward"}  # fmt: skip


def weights(folder) -> dict[str, torch.Tensor]:
    """Those of the adapters, in the folder of a run that trained adapters."""
    adapters = folder / "adapter_model.safetensors"
    return load_file(adapters if adapters.exists() else folder / "model.safetensors")


def history(folder) -> dict[str, list]:
    """What a run's log says of training and validation, without times and memory."""
    keep = ("step", "epoch", "loss", "lr", "gnorm", "clip", "examples", "tokens", "padding", "skipped")
    of_steps = {event: [[line.get(name) for name in keep] for line in events(folder, event)]
                for event in ("train", "epoch")}  # fmt: skip
    return {**of_steps, "validation": events(folder, "validation")}


def assert_same_run(folder, reference, steps: int = STEPS) -> None:
    """The same weights to the last bit, and the same history without repeated steps."""
    ours, theirs = weights(folder), weights(reference)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert history(folder) == history(reference)
    assert [line["step"] for line in events(folder, "train")] == list(range(1, steps + 1))


def assert_close(ours: dict, theirs: dict) -> None:
    """Weights within 1e-5 of their norm, tensor by tensor.

    Biases of keys are left out: softmax cancels them, so that their gradient is rounding, which AdamW scales up.
    """
    assert ours.keys() == theirs.keys()
    for name in ours:
        if not name.endswith(("k_proj.bias", "key.bias")):
            assert torch.linalg.norm(ours[name] - theirs[name]) <= 1e-5 * torch.linalg.norm(theirs[name]), name


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """For each script, a run that nothing happens to."""
    folders = {script: tmp_path_factory.mktemp("undisturbed") for script in SMALL}
    for script, folder in folders.items():
        run(script, folder)
    return folders


def alone(**changes):
    """What an Accelerator of one process on the processor is to these functions."""
    fields = {"num_processes": 1, "process_index": 0, "is_main_process": True, "device": torch.device("cpu"),
              "mixed_precision": "no", "distributed_type": DistributedType.NO, "trackers": [], "scaler": None,
              "state": SimpleNamespace(), "unwrap_model": lambda model: model}  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})
