"""A tokenizer for models built from scratch, trained on their own text; token ids that are kept between runs."""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from utils.files import cache_folder


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 8192, lowercase: bool = False, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of BART's kind, `<s> text </s>`; the same text gives the same tokenizer."""
    bpe = ByteLevelBPETokenizer(add_prefix_space=True, lowercase=lowercase)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    bpe.train_from_iterator(
        texts, vocab_size=vocab_size, min_frequency=2, special_tokens=list(special.values()), show_progress=False
    )
    bpe.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, model_max_length=max_length, cls_token="<s>", sep_token="</s>", **special
    )


KEPT_FROM = 2**20  # characters in all: fewer are tokenized sooner than looked up


def tokenize(tokenizer, texts: list[str], **options) -> list[list[int]]:
    """Token ids of each text, `options` being those of the tokenizer's call.

    Large collections are tokenized once: what comes out is kept in `$HF_HOME/multistep-retrieve-summarize` for later
    runs and the other processes of this one, under a checksum of texts, tokenizer and options. A file there that is
    damaged is made anew, and a folder that cannot be written to costs no more than the time.
    """
    if not texts:
        return []
    if sum(map(len, texts)) < KEPT_FROM or not hasattr(tokenizer, "backend_tokenizer"):
        return tokenizer(texts, **options)["input_ids"]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"truncation": tokenizer.truncation_side, "padding": tokenizer.model_max_length}  # not of the last call
    key = hashlib.sha256(json.dumps([rules, options, texts]).encode()).hexdigest()
    path = cache_folder() / f"tokens_{key[:32]}.safetensors"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))  # the first of several processes does the work
        if (kept := _read_tokens(path, len(texts))) is not None:
            return kept
        token_ids = tokenizer(texts, **options)["input_ids"]
        with contextlib.suppress(OSError, SafetensorError):
            _write_tokens(path, token_ids)
    return token_ids


def _write_tokens(path: Path, token_ids: list[list[int]]) -> None:
    tensors = {
        "ids": torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int32),
        "lengths": torch.tensor([len(ids) for ids in token_ids], dtype=torch.int32),
    }
    tensors["sha256"] = _checksum(tensors)
    temporary = path.with_suffix(".tmp")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_tokens(path: Path, count: int) -> list[list[int]] | None:
    """None if there is no such file, or a damaged one."""
    try:
        tensors = load_file(path)
        if not torch.equal(tensors["sha256"], _checksum(tensors)) or len(tensors["lengths"]) != count:
            return None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return [part.tolist() for part in tensors["ids"].split(tensors["lengths"].tolist())]


def _checksum(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    total = hashlib.sha256(tensors["ids"].numpy().tobytes() + tensors["lengths"].numpy().tobytes())
    return torch.tensor(list(total.digest()), dtype=torch.uint8)
