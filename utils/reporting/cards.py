"""The model card of a published model, README.md: what the model is, its data, scores, flags and versions."""

import dataclasses
import hashlib
import json
import os
import re
import shlex
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from utils.cli.script import environment
from utils.data.loading import describe_splits
from utils.files import size_and_digest, write_lines
from utils.models.settings import saved_settings
from utils.reporting.examples import visible
from utils.reporting.folder import is_number, read_folder
from utils.reporting.markdown import as_text

FILE = "README.md"
SUITE = "multistep-retrieve-summarize"
# the last line of a card, with a checksum of what stands above it: an edited card is never overwritten
SEAL = f"<!-- This card was made by {SUITE}, and is kept once it is edited. Checksum: "
WHAT = {"retriever": "A retriever (bi-encoder)", "reranker": "A reranker (cross-encoder)",
        "summarizer": "A summarizer of passages"}  # fmt: skip
TASKS = {"retriever": "sentence-similarity", "reranker": "text-ranking"}
TAGS = {"retriever": ["sentence-transformers", "feature-extraction"], "reranker": ["sentence-transformers", "reranker"],
        "summarizer": ["summarization"]}  # fmt: skip
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
FLAGS = {"retriever": "--retriever {} --summarizer extract",
         "reranker": f"--retriever {MINILM} --reranker {{}} --summarizer extract",
         "summarizer": "--retriever bm25 --summarizer {}"}  # fmt: skip
LIBRARIES = ("python", "torch", "accelerate", "transformers", "sentence-transformers")
OWN = ("output_dir", "cache_dir", "push_to_hub", "hub_model_id", "hub_private_repo")  # flags that no card shows
TEXTS = ("query_prompt", "passage_prompt", "source_prefix", "prompt_template")  # flags that never name a file


def card_writer(run, kind: str, splits: dict, scores: dict) -> Callable[[str], None]:
    """A function that writes the card into the run folder, for a model that is loaded by the name that it is given.

    `kind` is "retriever", "reranker" or "summarizer", `scores` are those of the published model. Reads the data files
    once, for their checksums. Does not touch a README.md that is not from here, or was edited.
    """
    args, model = run.args, next(part for part in run.model.modules() if isinstance(part, PreTrainedModel))
    is_encoder_decoder, settings = model.config.is_encoder_decoder, saved_settings(run.folder)
    adapters = bool(args.lora_rank) and not args.merge_lora
    base, is_local = args.model_name_or_path, args.model_name_or_path and not is_hub_name(args.model_name_or_path)
    task = TASKS.get(kind, "summarization" if is_encoder_decoder else "text-generation")
    files, about = _data_files(args), environment(run.accelerator)
    versions = {name: about[name] for name in LIBRARIES} | ({"peft": version("peft")} if adapters else {})

    folder = read_folder(run.folder)
    tests = [event for event in folder.of("test") if event.get("model_step") == _step(run) and args.test_file]
    columns = {"validation": scores} | {label: scores[key] for key, label in folder.beside.items() if key in scores}
    columns |= {"test": tests[-1]} if tests else {}
    metrics = [name for name, value in scores.items() if is_number(value) and name != "examples"]  # which is a count
    results = [
        EvalResult(task_type=task, dataset_split=split, metric_type=metric, metric_name=metric,
                   metric_value=round(float(columns[split][metric]), 4), **_data_set(args, split))
        for split in ("validation", "test") if split in columns
        for metric in metrics if is_number(columns[split].get(metric))
    ]  # fmt: skip
    shown = {
        "what": WHAT[kind], "script": about["script"], "model_type": model.config.model_type,
        "parameters": f"{sum(parameter.numel() for parameter in run.model.parameters()):,}",
        "started_from": _started_from(base, is_local, adapters), "kind": kind, "adapters": adapters,
        "is_encoder_decoder": is_encoder_decoder, "fusion": settings.get("fusion"),
        "auto_class": "AutoModelForSeq2SeqLM" if is_encoder_decoder else "AutoModelForCausalLM",
        "trust": ", trust_remote_code=True" if args.trust_remote_code else "",
        "source_prefix": repr(settings["source_prefix"]) if settings.get("source_prefix") else "",
        "prompt_template": repr(settings.get("prompt_template")),
        "weights": _weights(run), "unit": "token" if kind == "summarizer" else "query", "columns": list(columns),
        "rows": [(name, [_cell(column.get(name)) for column in columns.values()]) for name in metrics],
        "examples": describe_splits(splits),
        "files": [(flag, as_text(public(value)), digest or "on the Hub") for flag, (value, digest) in files.items()],
        "arguments": json.dumps(_flags(args), indent=2, ensure_ascii=False),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
    }  # fmt: skip

    def write(name: str) -> None:
        path = run.folder / FILE
        if is_edited(path):
            return
        data = ModelCardData(
            library_name="sentence-transformers" if kind != "summarizer" else "peft" if adapters else "transformers",
            pipeline_tag=task, tags=[SUITE, kind, *TAGS[kind], *(["lora"] if adapters else [])],
            base_model=None if is_local else base, model_name=name.rpartition("/")[2], eval_results=results or None,
            datasets=list(dict.fromkeys(value for value, _ in files.values() if is_hub_name(value))) or None,
        )  # fmt: skip
        flags = FLAGS[kind].format(shlex.quote(name) if name.isprintable() else "FOLDER")
        flags += " --trust_remote_code" if args.trust_remote_code else ""
        card = ModelCard.from_template(data, template_path=str(Path(__file__).with_name("card.md")),
                                       title=as_text(name), name=repr(name), flags=flags, **shown)  # fmt: skip
        write_lines(path, [seal(visible(str(card)))])

    return write


def seal(text: str) -> str:
    """A card with its last line."""
    text = text.rstrip("\n") + "\n\n"
    return f"{text}{SEAL}{hashlib.sha256(text.encode()).hexdigest()} -->"


def is_edited(path: Path) -> bool:
    """Whether a file is there that is not a card as it was made here."""
    if not path.exists():
        return False
    text, _, digest = path.read_bytes().rpartition(SEAL.encode())
    return digest.decode(errors="replace").strip() != f"{hashlib.sha256(text).hexdigest()} -->"


def public(value):
    """A flag's value as others may read it: of a file or folder of this machine, only the name."""
    if isinstance(value, str) and value and (os.path.isabs(value) or os.path.exists(value)):
        return os.path.basename(os.path.abspath(value))
    return value


def is_hub_name(value: str) -> bool:
    """Whether a data flag names a data set of the Hub; a file or folder of that name comes first."""
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return not os.path.exists(value)


def local_name(output_dir: str) -> str:
    """How the model is called where it was trained: the run folder as it was given, if that tells no absolute path."""
    path = Path(output_dir)
    return public(os.path.abspath(output_dir)) if path.is_absolute() or ".." in path.parts else output_dir


def _data_files(args) -> dict[str, tuple[str, str]]:
    """By flag, each file, folder or data set that was read, and its SHA-256; "" for a data set of the Hub."""
    files = {}
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        is_run = field.name == "retriever" and value is not None and Path(value).is_file()  # a TREC run
        if value and (field.name.endswith("_file") or is_run):
            files[field.name] = (value, "" if is_hub_name(value) else _checksum(Path(value)))
    return files


def _checksum(path: Path) -> str:
    """SHA-256 of a file; of a folder, that of what `sha256sum` prints of its files."""
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        lines = (f"{size_and_digest(each)['sha256']}  {each.relative_to(path)}\n" for each in files)
        return f"{hashlib.sha256(''.join(lines).encode(errors='backslashreplace')).hexdigest()} ({len(files)} files)"
    return size_and_digest(path)["sha256"] if path.is_file() else "no longer there"


def _data_set(args, split: str) -> dict[str, str]:
    """The data set of scores, for the metadata, where a type has letters, digits, dots and dashes."""
    value = getattr(args, f"{split}_file") or args.train_file
    if value is None:
        return {"dataset_type": "embedded", "dataset_name": "the embedded data set"}
    name = " ".join(visible(public(value)).split())
    is_named = is_hub_name(value)
    return {"dataset_type": value if is_named else re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-.") or "data",
            "dataset_name": name, "dataset_config": args.dataset_config_name if is_named else None}  # fmt: skip


def _flags(args) -> dict:
    """The flags that differ from their defaults."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)
             if getattr(args, field.name) != field.default and field.name not in OWN}  # fmt: skip
    return {name: value if name in TEXTS else public(value) for name, value in given.items()}


def _started_from(base: str | None, is_local, adapters: bool) -> str:
    beside = "; these are adapters beside it" if adapters else ""
    if base is None:
        return "random weights"
    where = "a local folder, " if is_local else ""
    return f"{where}{as_text(public(base))}{beside}"


def _step(run) -> int:
    """The step whose weights were published."""
    return run.model_step or run.state.step


def _weights(run) -> str:
    """Which weights these are, in a sentence."""
    state, metric = run.state, run.args.metric_for_best
    if state.best is None:
        return f"The weights are those of step {_step(run):,}, the last one."
    if _step(run) == state.best_step:
        return f"The weights are those of step {_step(run):,}, the best one by {metric}."
    best = f"step {state.best_step:,} was the best one by {metric} ({state.best:.4g})"
    return f"The weights are those of step {_step(run):,}, the last one; {best}."


def _cell(value) -> str:
    return f"{value:.4g}" if is_number(value) else ""
