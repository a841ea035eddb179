"""What this room leans on inside PyTorch and Transformers: a later version may rename it, or change what it does.

A part of the room that lacks one of these is left out. The scripts then compute the same, slower, and one warning names
what is gone. `tests/fast/test_internals.py` looks for each of them, and for what cannot be seen from a name.
"""

import functools
import inspect
import logging
import os
import pkgutil
from importlib.metadata import version

logger = logging.getLogger(__name__)

# for each part, the names that it uses, with the arguments that it passes or takes by name
INTERNALS = {
    "packing": {
        "transformers.integrations.sdpa_attention.sdpa_attention_forward":
            "module query key value attention_mask dropout scaling",
        "transformers.masking_utils.sdpa_mask":
            "q_length attention_mask local_size allow_is_causal_skip allow_is_bidirectional_skip",
        "transformers.masking_utils.eager_mask": "q_length attention_mask allow_is_bidirectional_skip",
        "transformers.PreTrainedConfig._attn_implementation": "",
        "transformers.PreTrainedModel.is_backend_compatible": "",
    },
    "kernel": {
        "torch.nn.attention.varlen.varlen_attn": "query key value cu_seq_q cu_seq_k max_q max_k scale window_size",
    },
    "search": {
        "transformers.GenerationMixin.generate": "custom_generate",
        "transformers.PreTrainedModel._can_set_attn_implementation": "",
        "transformers.cache_utils.Cache": "layer_class_to_replicate",
        "transformers.cache_utils.DynamicCache": "config",
        "transformers.cache_utils.DynamicLayer.get_seq_length": "",
        "transformers.cache_utils.DynamicLayer.update": "",
        "transformers.cache_utils.DynamicSlidingWindowLayer": "",
    },
}  # fmt: skip
EFFECTS = {"packing": "batches are padded", "search": "summaries are written by Transformers' `generate`"}


def find(name: str):
    """What a dotted name stands for; None if it is not there."""
    try:
        return pkgutil.resolve_name(name)
    except Exception:  # modules may raise anything when they are imported
        return None


@functools.cache
def missing(part: str) -> str:
    """What a part of this room lacks, with the version that lacks it; "" if all is there."""
    for name, arguments in INTERNALS[part].items():
        found = find(name)
        lost = set(arguments.split()) - set(inspect.signature(found).parameters) if found and arguments else ()
        if found is None or lost:
            package = name.partition(".")[0]
            return f"{name} of {package} {version(package)} " + (f"takes no {min(lost)}" if lost else "is gone")
    return ""


def has(part: str) -> bool:
    """Whether a part of this room lacks nothing; if it does, it warns once."""
    if missing(part):
        warn(missing(part), EFFECTS[part])
    return not missing(part)


@functools.cache
def warn(problem: str, effect: str) -> None:
    """Says once, on one process of each machine, why a part of this room is left out and what is done instead."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        logger.warning("%s: %s, which is slower", problem, effect)


def works(name: str, compute, expected, effect: str) -> bool:
    """Whether `compute()`, which calls the operation `name` of PyTorch, gives the tensor `expected`; else it warns."""
    try:
        problem = "" if (compute() - expected).abs().max() <= 1e-5 * expected.abs().max() else "gives other numbers"
    except Exception as error:  # operations raise errors of many kinds
        problem = in_one_line(error)
    if problem:
        warn(f"{name} of torch {version('torch')}: {problem}", effect)
    return not problem


def in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
