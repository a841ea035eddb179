"""What loading, training and using any model needs: its settings in a file beside the weights, and its errors."""

import json
import os
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import DynamoBackend
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from torch.utils.checkpoint import noop_context_fn
from transformers import PreTrainedModel

from utils.errors import UsageError, in_one_line
from utils.fast.cpu import FunctionalDropout, use_fast_layers
from utils.fast.internals import warn
from utils.fast.packing import keep_from_compiling, keep_padding, laid_as_now
from utils.files import write_json
from utils.models.losses import has_own_logits

FILE = "settings.json"
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop")  # in configurations
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


def write_settings(folder: str | os.PathLike, args, names: tuple[str, ...], **others) -> None:
    """Writes the flags `names`, and `others`, into a model's folder."""
    write_json(Path(folder) / FILE, {name: getattr(args, name) for name in names} | others)


def saved_settings(folder: str | os.PathLike) -> dict:
    """The settings of a model's folder, or of a model on the Hub; empty if no script of this project trained it."""
    is_local = Path(folder).is_dir() or _is_run_folder(str(folder))
    try:
        file = Path(folder, FILE) if is_local else Path(hf_hub_download(str(folder), FILE))
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, EntryNotFoundError):
        return {}
    return found if isinstance(found, dict) and "model_name_or_path" in found else {}  # else it is another tool's file


def _is_run_folder(name: str) -> bool:
    """Whether it is no name to ask the Hub for."""
    return name.startswith("outputs/")


def check_made(flag: str, name: str, script: str) -> None:
    """Raises UsageError if a run folder is named that is not there."""
    if _is_run_folder(name) and not Path(name).is_dir():
        raise UsageError(f"{flag} {name}: no such folder; {script} makes it, or name another")


def load_error(error: Exception) -> str:
    """What a library says of a model that it cannot load; if the model brings its own code, the flag that runs it."""
    if "trust_remote_code" in str(error):
        return "it brings Python code of its own; read the code, then add --trust_remote_code to run it"
    return in_one_line(error)


def checkpoint_layers(model, context_fn=noop_context_fn) -> None:
    """Activation checkpointing: layers run again in the backward pass, instead of keeping their results.

    Chen et al., 2016, arXiv:1604.06174. `context_fn` is that of `torch.utils.checkpoint.checkpoint`. Raises UsageError
    if the model does not support it.
    """
    # Transformers is renaming `gradient_checkpointing_enable`
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    try:
        enable({"use_reentrant": False, "context_fn": context_fn})
    except ValueError as error:
        raise UsageError(f"--gradient_checkpointing: {in_one_line(error).rstrip('.')}; leave the flag out") from error


def attention_dropout(model: nn.Module) -> float:
    """The highest attention dropout in the configurations of a model and its parts."""
    configs = [part.config for part in model.modules() if hasattr(part, "config")]
    entries = [(config, name) for config in configs for name in ATTENTION_DROPOUTS]
    # T5 and its kin drop attention weights with their only dropout
    entries += [(config, "dropout_rate") for config in configs if hasattr(config, "relative_attention_num_buckets")]
    return max((getattr(config, name, None) or 0.0 for config, name in entries), default=0.0)


def settle_packing(model: nn.Module, accelerator, longest: int | None = None, is_trained: bool = False) -> nn.Module:
    """Has batches padded where the accelerator's GPU has no kernel that computes them packed. Returns the model.

    `model` is a summarizer, retriever or reranker, `longest` the most tokens of a sequence. The attribute `attends` of
    the model of Transformers says what was decided, for the log.
    """
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    dropout = attention_dropout(inner) if is_trained else 0.0
    dtype = PRECISIONS.get(accelerator.mixed_precision, torch.float32)
    problem = keep_padding(inner, accelerator.device, dtype, longest=longest, dropout=dropout)
    if problem and isinstance(model, Summarizer):
        model.is_packed = False
    inner.attends = f"attention dropout {dropout:g}"
    inner.attends += f", padded batches (a GPU does not compute them packed {problem})" if problem else ""
    return model


def place(model: nn.Module, accelerator) -> nn.Module:
    """Moves a model that is used, not trained, to the accelerator's device, where `settle_packing` decides."""
    return settle_packing(model, accelerator, getattr(model, "max_seq_length", None)).to(accelerator.device)


def compile_layers(model: nn.Module, args, accelerator) -> nn.Module:
    """With `--torch_compile`, compiles a model's layers in place, for training batches of any shape. Returns the model.

    Layers of a kind share what is compiled, and no parameter gets another name. It is compiled with the backend that
    `accelerate launch --dynamo_backend` names, else inductor. Raises UsageError if there are no repeated layers.
    """
    if not args.torch_compile:
        return model
    if not hasattr(model, "_compiled_call_impl"):
        warn("torch.nn.Module._compiled_call_impl is gone", "--torch_compile has no effect")
        return model
    plugin = accelerator.state.dynamo_plugin
    backend = "inductor" if plugin.backend == DynamoBackend.NO else plugin.backend.value.lower()
    plugin.backend = DynamoBackend.NO  # else `prepare` would wrap the whole model, and rename its parameters
    inner = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    lists = [(name, part) for name, part in inner.named_modules() if isinstance(part, nn.ModuleList)]
    stacks = [name for name, part in lists if len(set(map(type, part))) == 1]
    outer = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if not outer:
        raise UsageError(f"--torch_compile: {args.model_name_or_path} has no layers that repeat; leave the flag out")
    keep_from_compiling()
    for name in outer:
        for layer in inner.get_submodule(name):
            layer.compile(backend=backend, dynamic=True)
            layer._compiled_call_impl = partial(_call_layer, layer, layer._compiled_call_impl)
    return model


def _call_layer(layer: nn.Module, compiled, *arguments, **options):
    """Calls what was compiled in training only: generation with its caches would be compiled again and again."""
    return (compiled if layer.training else layer._call_impl)(*arguments, **options)


def same_contexts() -> tuple:
    """For `checkpoint_layers`: a layer runs again within the sequences and with the dropout of its first run."""
    return nullcontext(), _both(laid_as_now(), FunctionalDropout() if FunctionalDropout.active else nullcontext())


@contextmanager
def _both(first, second):
    with first, second:
        yield


class Summarizer(nn.Module):
    """What both kinds of summarizers share: they wrap a plain model of Transformers, and add no parameters to it."""

    def __init__(self, model, gradient_checkpointing: bool):
        super().__init__()
        self.model = model
        if gradient_checkpointing:
            checkpoint_layers(model, same_contexts)
        use_fast_layers(model)
        # the layers that FSDP shards one by one
        self._no_split_modules = {type(module).__name__ for module in model.modules()}
        self._no_split_modules &= set(getattr(model, "_no_split_modules", None) or ())
        self.has_own_logits = has_own_logits(model)

    def refuse_if(self, problem: str) -> None:
        """Raises UsageError if there is a problem with this type of model."""
        if problem:
            name, kind = self.model.config.name_or_path or "the model", self.model.config.model_type
            raise UsageError(f"{name}: models of type {kind} are not supported; choose another: {problem}")
