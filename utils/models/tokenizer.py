"""Training a tokenizer, tokenizing with a cache on disk, and padding."""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import tokenizers
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast

from utils.errors import UsageError
from utils.files import digest
from utils.progress import progress
from utils.tables import Table, cached, table_writer

ORDINARY_TOKENS = 10  # fewer, besides special ones, are no vocabulary
CACHED_FROM = 2**20  # characters in total; tokenizing fewer is faster than reading the cache
TOKENIZED_AT_ONCE = 2**13  # texts


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int = 8192,
    lowercase: bool = False,
    max_length: int = 1024,
    key: str | None = None,
) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer with BART's format `<s> text </s>`, or `<s> text </s> text </s>`.

    Deterministic. With `key`, a checksum of the texts, it is kept in the cache for later runs.
    """
    options = {"vocab_size": vocab_size, "lowercase": lowercase, "max_length": max_length}
    if key is None:
        return _train_tokenizer(texts, **options)

    def write(folder: Path) -> None:
        _train_tokenizer(texts, **options).save_pretrained(folder)

    folder = cached("tokenizer", [key, options, tokenizers.__version__], write)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool, max_length: int):
    bpe = ByteLevelBPETokenizer(add_prefix_space=True, lowercase=lowercase)
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    bpe.train_from_iterator(
        progress(texts, "trained the tokenizer on", "texts"), vocab_size=vocab_size, min_frequency=2,
        special_tokens=list(special.values()), show_progress=False,
    )  # fmt: skip
    bpe.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")],
    )  # fmt: skip
    own_tokenizer = tokenizers.Tokenizer.from_str(bpe.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=own_tokenizer, model_max_length=max_length, cls_token="<s>", sep_token="</s>", **special
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


def check_length(stack: torch.nn.Module, name: str, length: int, multiple: int = 1) -> None:
    """Raises UsageError if the flag `name` asks an encoder or decoder for more tokens than it has positions for.

    It pads to a `multiple`.
    """
    limit = position_limit(stack)
    limit = limit and limit // multiple * multiple
    if limit is not None and length > limit:
        raise UsageError(f"--{name} {length}: the model has positions for {limit} tokens only")


def pad(token_ids: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, both (texts, tokens), padded on the right."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in token_ids]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def tokenizer_key(tokenizer) -> str | None:
    """A checksum of all that decides a tokenizer's ids; None if it is not known, because Python code computes them."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return None
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # the tokenizer's own settings, because the backend holds those of its last call
    rules |= {"truncation": tokenizer.truncation_side, "padding": tokenizer.model_max_length}
    rules |= {name: getattr(tokenizer, name, None) for name in ("src_lang", "tgt_lang")}
    return digest([rules, tokenizers.__version__])


def tokenize(
    tokenizer,
    texts: Iterable[str],
    *,
    keep: bool = True,
    as_target: bool = False,
    if_empty: list[int] | None = None,
    tail: Sequence[int] = (),
    whole: list[np.ndarray] | None = None,
    **options,
) -> Sequence[list[int]]:
    """Token ids of each text; `options` are those of the tokenizer's call.

    With `keep`, the ids of large collections are kept in the cache (see `cached`) under a checksum of texts, tokenizer
    and options, for later runs and other processes. They are mapped into memory, so that memory does not grow with
    them. `texts` must be iterable several times.

    Args:
        as_target: texts to be generated, which some tokenizers treat differently.
        if_empty: takes the place of no tokens.
        tail: tokens that follow each text, not counted by the tokenizer's `max_length`.
        whole: this list grows by an array (texts,) with the number of tokens of each text before truncation.
    """
    side = "text_target" if as_target else "text"

    def tokenize_now(some: list[str]) -> tuple[list[list[int]], list[int]]:
        encoded = tokenizer(**{side: some}, **options)
        lengths = whole_lengths(tokenizer, some, encoded, options)
        texts_ids = [[*ids, *tail] if tail else ids for ids in encoded["input_ids"]]
        return [ids or if_empty or [] for ids in texts_ids], [length + len(tail) for length in lengths]

    sizes = itertools.accumulate(map(len, texts), initial=0)
    rules = tokenizer_key(tokenizer) if keep and any(size >= CACHED_FROM for size in sizes) else None
    if rules is None:
        texts, ids, lengths = list(texts), [], []
        parts = [texts[first : first + TOKENIZED_AT_ONCE] for first in range(0, len(texts), TOKENIZED_AT_ONCE)]
        for part in progress(parts, "tokenized", "texts", total=len(texts), size=len):
            of_part, lengths_of_part = tokenize_now(part)
            ids += of_part
            lengths += lengths_of_part
        if whole is not None:
            whole.append(np.array(lengths, dtype=np.int64))
        return ids
    checksum, count = hashlib.blake2b(digest_size=16), 0
    for text in texts:
        checksum.update(json.dumps(text).encode())
        count += 1

    def write(folder: Path) -> None:
        number = pa.uint16() if len(tokenizer) <= 2**16 else pa.int32()
        schema = pa.schema([("ids", pa.large_list(number)), ("whole", pa.int32())])
        with table_writer(folder / "ids.arrow", schema) as add:
            remaining = iter(texts)
            blocks = iter(lambda: list(itertools.islice(remaining, TOKENIZED_AT_ONCE)), [])
            for block in progress(blocks, "tokenized", "texts", total=count, size=len):
                for ids, length in zip(*tokenize_now(block), strict=True):
                    add({"ids": ids, "whole": length})

    folder = cached("tokens", [checksum.hexdigest(), rules, side, if_empty, list(tail), options], write)
    table = Table(folder / "ids.arrow")
    if whole is not None:
        whole.append(table.array("whole"))
    return table.column("ids")


def whole_lengths(tokenizer, texts: list[str], encoded, options: dict) -> list[int]:
    """Number of tokens that each text has before truncation, special tokens included.

    `encoded` is what the tokenizer made of the texts with `options`. A fast tokenizer keeps what it cut off.
    """
    lengths = [len(ids) for ids in encoded["input_ids"]]
    if not options.get("truncation"):
        return lengths
    if getattr(encoded, "encodings", None):
        # each part that was cut off has its own
        special = tokenizer.num_special_tokens_to_add() if options.get("add_special_tokens", True) else 0
        parts = [encoding.overflowing for encoding in encoded.encodings]
        return [n + sum(len(part) - special for part in of_text) for n, of_text in zip(lengths, parts, strict=True)]
    cut = [i for i, length in enumerate(lengths) if length == options["max_length"]]
    uncut = {name: value for name, value in options.items() if name not in ("truncation", "max_length")}
    again = tokenizer([texts[i] for i in cut], **uncut)["input_ids"] if cut else []
    for i, ids in zip(cut, again, strict=True):
        lengths[i] = len(ids)
    return lengths


def describe_cut(flag: str, limit: int, lengths: dict[str, Sequence[int]]) -> str:
    """How many texts of each kind have more than `limit` tokens, with the flag that sets it; "" if none has.

    `lengths` holds, for each kind, the number of tokens of each text before it is cut.
    """
    parts = []
    for name, of_each in lengths.items():
        of_each = np.asarray(of_each)
        if count := int((of_each > limit).sum()):
            share = f"{100 * count / len(of_each):.1f}%"
            parts.append(f"{count:,} of {len(of_each):,} {name} ({share}, the longest has {of_each.max():,})")
    return f"cut to {limit} tokens by --{flag}: {', '.join(parts)}" if parts else ""
