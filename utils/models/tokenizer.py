"""Training a tokenizer, tokenizing with a cache on disk, and padding."""

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
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from utils.errors import UsageError
from utils.files import cache_folder, write_whole

ORDINARY_TOKENS = 10  # fewer, besides special ones, are no vocabulary
CACHED_FROM = 2**20  # characters in total; tokenizing fewer is faster than reading the cache


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int = 8192, lowercase: bool = False, max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with BART's format `<s> text </s>`; deterministic."""
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


def check_vocabulary(tokenizer, model, name: str) -> None:
    """Raises UsageError if the tokenizer cannot be that of the model.

    If a folder has no tokenizer files, Transformers makes a tokenizer that has special tokens only, without an error.
    """
    tokens, embeddings = len(tokenizer), model.get_input_embeddings().weight.shape[0]
    if tokens > embeddings:
        raise UsageError(
            f"{name}: the tokenizer has {tokens:,} tokens, but the model has embeddings for {embeddings:,}; "
            "put the model's own tokenizer into its folder"
        )
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < ORDINARY_TOKENS:
        raise UsageError(
            f"{name}: the tokenizer has {tokens} tokens and knows no words; its files are missing from the folder"
        )


def position_limit(stack: torch.nn.Module) -> int | None:
    """The most tokens that an encoder or decoder has positions for; None if it computes them for any length."""
    for name, module in stack.named_modules():
        if isinstance(module, torch.nn.Embedding) and "position" in name.rpartition(".")[2]:
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.weight.shape[0] - max(first, getattr(module, "offset", 0))
    return None


def check_length(stack: torch.nn.Module, name: str, length: int) -> None:
    """Raises UsageError if the flag `name` asks an encoder or decoder for more tokens than it has positions for."""
    limit = position_limit(stack)
    if limit is not None and length > limit:
        raise UsageError(f"--{name} {length}: the model has positions for {limit} tokens only")


def pad(token_ids: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (texts, tokens), padded on the right."""
    rows = [torch.tensor(ids) for ids in token_ids]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def tokenize(tokenizer, texts: list[str], *, whole: list[int] | None = None, **options) -> list[list[int]]:
    """Token ids of each text; `options` are those of the tokenizer's call.

    The list `whole` grows by the number of tokens that each text has before truncation.

    The token ids of large collections are cached in `$HF_HOME/multistep-retrieve-summarize`, for later runs and for
    other processes of this run. The key is a checksum of texts, tokenizer and options. A damaged cache file is written
    anew. Without write access to the folder, texts are tokenized each time.
    """
    if not texts:
        return []
    if sum(map(len, texts)) < CACHED_FROM or not hasattr(tokenizer, "backend_tokenizer"):
        encoded = tokenizer(texts, **options)
        if whole is not None:
            whole += whole_lengths(tokenizer, texts, encoded, options)
        return encoded["input_ids"]
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # the tokenizer's own settings, because the backend holds those of its last call
    rules |= {"truncation": tokenizer.truncation_side, "padding": tokenizer.model_max_length}
    key = hashlib.sha256(json.dumps([rules, options, texts]).encode()).hexdigest()
    path = cache_folder() / f"tokens_{key[:32]}.safetensors"
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_suffix(".lock")))  # one process tokenizes, the others wait
        token_ids, tensors = None, _read_tokens(path, len(texts))
        if tensors is None:
            encoded = tokenizer(texts, **options)
            token_ids = encoded["input_ids"]
            tensors = {
                "ids": torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int32),
                "lengths": torch.tensor([len(ids) for ids in token_ids], dtype=torch.int32),
                "whole": torch.tensor(whole_lengths(tokenizer, texts, encoded, options), dtype=torch.int32),
            }
            tensors["sha256"] = _checksum(tensors)
            with contextlib.suppress(OSError, SafetensorError):
                write_whole(path, lambda temporary: save_file(tensors, temporary))
    if whole is not None:
        whole += tensors["whole"].tolist()
    return token_ids or [part.tolist() for part in tensors["ids"].split(tensors["lengths"].tolist())]


def whole_lengths(tokenizer, texts: list[str], encoded, options: dict) -> list[int]:
    """Number of tokens that each text has before truncation, special tokens included.

    `encoded` is what the tokenizer made of the texts with `options`. A fast tokenizer keeps what it cut off.
    """
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if not options.get("truncation"):
        return lengths
    if getattr(encoded, "encodings", None):
        special = tokenizer.num_special_tokens_to_add()  # each part that was cut off has its own
        parts = [encoding.overflowing for encoding in encoded.encodings]
        return [n + sum(len(part) - special for part in of_text) for n, of_text in zip(lengths, parts, strict=True)]
    cut = [i for i, length in enumerate(lengths) if length == options["max_length"]]
    again = tokenizer([texts[i] for i in cut])["input_ids"] if cut else []
    for i, ids in zip(cut, again, strict=True):
        lengths[i] = len(ids)
    return lengths


def describe_cut(flag: str, limit: int, lengths: dict[str, list[int]]) -> str:
    """How many texts of each kind have more than `limit` tokens, with the flag that sets it; "" if none has.

    `lengths` holds, for each kind, the number of tokens of each text before it is cut.
    """
    cut = {name: sum(length > limit for length in of_each) for name, of_each in lengths.items()}
    parts = [
        f"{count:,} of {len(lengths[name]):,} {name} ({100 * count / len(lengths[name]):.1f}%, the longest has "
        f"{max(lengths[name]):,})"
        for name, count in cut.items()
        if count
    ]
    return f"cut to {limit} tokens by --{flag}: {', '.join(parts)}" if parts else ""


def _read_tokens(path: Path, count: int) -> dict[str, torch.Tensor] | None:
    """The cached tensors of `count` texts; None if the file is missing or damaged."""
    try:
        tensors = load_file(path)
        if not torch.equal(tensors["sha256"], _checksum(tensors)) or len(tensors["lengths"]) != count:
            return None
    except (OSError, SafetensorError, KeyError, ValueError):
        return None
    return tensors


def _checksum(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    total = hashlib.sha256()
    for name in ("ids", "lengths", "whole"):
        total.update(tensors[name].numpy().tobytes())
    return torch.tensor(list(total.digest()), dtype=torch.uint8)
