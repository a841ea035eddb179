"""The reranker: a CrossEncoder of sentence-transformers, which reads a query and a passage together and scores them.

Queries and passages are tokenized apart, each once, and put together as the tokenizer would (`pairs_of`). Pairs are
scored in batches of similar length, and without padding if the encoder supports that.
"""

import itertools
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object, send_to_device
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, BertForSequenceClassification
from transformers.utils import logging

from utils.errors import UsageError
from utils.fast.cpu import laid_out_weights, use_fast_layers
from utils.fast.packing import is_packed, plan_packing, remove_padding_of_classifier
from utils.models.encoder import DROPOUTS, longest_first, small_bert
from utils.models.lora import base_model, check_loaded
from utils.models.settings import ATTENTION_DROPOUTS, checkpoint_layers, load_error, write_settings
from utils.models.tokenizer import check_length, check_vocabulary, pad, position_limit, tokenizer_key, train_tokenizer
from utils.models.tokenizer import tokenize as tokenize_cached
from utils.processes import wait_for_all
from utils.progress import Phase
from utils.tables import Texts

PROBES = [
    ("Who agreed?", "The committee agreed on the new budget for the old town hall, after a long discussion."),
    ("What did they decide about the budget of the town?", "5"),
]

# ---- models


def build_small_reranker(
    texts,
    *,
    vocab_size: int = 8192,
    hidden_size: int = 128,
    layers: int = 3,
    attention_dropout: float = 0.0,
    dropout: float | None = None,
    key: str | None = None,
) -> CrossEncoder:
    """A small BERT with random weights and one score; its lowercase tokenizer is trained on `texts`.

    `key` is as in `train_tokenizer`.
    """
    tokenizer = train_tokenizer(texts, vocab_size=vocab_size, lowercase=True, max_length=512, key=key)
    config = small_bert(tokenizer, hidden_size, layers, attention_dropout, dropout, num_labels=1)
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers loads its model from a folder
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(folder)
        # not the model's save_pretrained, which writes nothing on the other processes
        save_file(BertForSequenceClassification(config).state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        tokenizer.save_pretrained(folder)
        names = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
        reranker = CrossEncoder(folder, device="cpu", activation_fn=nn.Identity(), processor_kwargs=names)
    _make_fast(reranker)
    return reranker


def load_reranker(
    name_or_path: str,
    flag: str = "--reranker",
    attention_dropout: float | None = None,
    dropout: float | None = None,
    trust_remote_code: bool = False,
    needs_head: bool = True,
) -> CrossEncoder:
    """Loads a cross-encoder from a folder or the Hub; its scores are logits.

    A plain encoder gets a new head with random weights, which `needs_head` refuses. UsageError, which begins with
    `flag`, if the model cannot be loaded or would give other scores here than in sentence-transformers' `predict`.
    """
    name, folder = f"{flag} {name_or_path}", Path(name_or_path)
    if folder.is_dir() and not any((folder / file).exists() for file in ("config.json", "adapter_config.json")):
        raise UsageError(f"{name}: this folder holds no reranker; train_rerank.py writes it at the end of training")
    base_model(name_or_path, flag)
    has_head = is_reranker(name_or_path, trust_remote_code)
    if needs_head and has_head is False:
        raise UsageError(f"{name}: is an encoder that scores no pairs; train_rerank.py makes a reranker of it")
    config = dict.fromkeys(ATTENTION_DROPOUTS, attention_dropout) if attention_dropout is not None else {}
    config |= dict.fromkeys((*DROPOUTS, "classifier_dropout"), dropout) if dropout is not None else {}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # a new head is no surprise
    try:
        reranker = CrossEncoder(
            name_or_path, device="cpu", activation_fn=nn.Identity(), trust_remote_code=trust_remote_code,
            model_kwargs={"dtype": torch.float32}, config_kwargs=config or None,
        )  # fmt: skip
    except Exception as error:  # libraries raise errors of many kinds for files that they cannot use
        raise UsageError(f"{name}: no reranker could be loaded: {load_error(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
    check_loaded(reranker, name_or_path, flag)
    if len(reranker) > 1 or getattr(reranker[0], "transformer_task", None) != "sequence-classification":
        raise UsageError(f"{name}: is no classifier of sequences; choose another cross-encoder")
    if reranker[0].modality_config.keys() != {"text"} or not hasattr(reranker.tokenizer, "backend_tokenizer"):
        raise UsageError(f"{name}: does not read plain pairs of texts with a fast tokenizer; choose another")
    if reranker.num_labels != 1:
        raise UsageError(f"{name}: gives {reranker.num_labels} scores for a pair, but only one is supported")
    if reranker.tokenizer.pad_token_id is None:
        raise UsageError(f"{name}: the tokenizer has no padding token; set pad_token in its tokenizer_config.json")
    if dropout is not None and not any(hasattr(reranker[0].auto_model.config, name) for name in DROPOUTS):
        raise UsageError(f"--dropout: {name_or_path} has no dropout that could be set; leave the flag out")
    if attention_dropout and not any(hasattr(reranker[0].auto_model.config, name) for name in ATTENTION_DROPOUTS):
        raise UsageError(f"--attention_dropout: {name_or_path} has none that could be set; leave the flag out")
    check_vocabulary(reranker.tokenizer, reranker[0].auto_model, name_or_path)
    limit = position_limit(reranker)
    if limit is not None and (not has_head or (reranker.max_seq_length or limit) >= limit):
        reranker.max_seq_length = limit  # a longer pair has no positions; an encoder's own limit is of one text
    _make_fast(reranker)
    _check_scores(reranker, name)
    return reranker


def is_reranker(name_or_path: str, trust_remote_code: bool = False) -> bool | None:
    """Whether a model's configuration says that it classifies sequences, with a head that was trained.

    None if there is no configuration; what loads the model then says so.
    """
    try:
        base = base_model(name_or_path, "")
        names = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code).architectures or []
    except (OSError, ValueError):
        return None
    return any(name.endswith("ForSequenceClassification") for name in names)


def _make_fast(reranker: CrossEncoder) -> None:
    reranker.template = template_of(reranker.tokenizer)
    use_fast_layers(reranker)
    remove_padding_of_classifier(reranker)


@torch.no_grad()
def _check_scores(reranker: CrossEncoder, name: str) -> None:
    """Raises UsageError if a few pairs have other tokens or scores here than in sentence-transformers."""
    reranker.eval()
    queries, passages = (tokenize(reranker, texts, kind) for texts, kind in zip(zip(*PROBES, strict=True), KINDS,
                                                                                  strict=True))  # fmt: skip
    ours = pairs_of(reranker, list(zip(queries, passages, strict=True)))
    theirs = [reranker.preprocess([pair], prompt=_prompt(reranker)) for pair in PROBES]
    same = all(
        features["input_ids"][0].tolist() == ids[: len(features["input_ids"][0])].tolist()
        for features, ids in zip(theirs, ours["input_ids"], strict=True)
    )
    # one at a time, because the padding of a batch changes the scores of some models
    expected = torch.from_numpy(reranker.predict(PROBES, batch_size=1, show_progress_bar=False))
    if not same or not (reranker(ours)["scores"][:, 0] - expected).abs().max() <= 1e-4 * expected.abs().max():
        raise UsageError(f"{name}: would score pairs otherwise here than in sentence-transformers; choose another")


def set_up(reranker: CrossEncoder, args) -> None:
    """Applies the flags of train_rerank.py about length and memory. UsageError if the model refuses one."""
    if args.max_seq_length:
        check_length(reranker, "max_seq_length", args.max_seq_length)
        reranker.max_seq_length = args.max_seq_length
    if limit_of_texts(reranker) < 2:
        raise UsageError(f"--max_seq_length {args.max_seq_length}: leaves no room for a query and a passage")
    if args.gradient_checkpointing:
        checkpoint_layers(reranker[0].auto_model)


def save_pretrained(reranker: CrossEncoder, folder: str | Path, args) -> None:
    """A folder that `CrossEncoder(folder)` loads unchanged, with the settings that reranking needs beside it."""
    reranker.save_pretrained(str(folder), create_model_card=False)
    write_settings(folder, args, ("model_name_or_path", "rerank_top_k", "rerank_weight"))


# ---- texts to pairs of tokens

KINDS = ("query", "passage")
UNLIMITED = 2**30  # tokens; tokenizers accept no infinity


@dataclass(frozen=True)
class Template:
    """How a tokenizer puts two texts together: the special tokens around them, and the token types of all parts."""

    start: list[int]
    middle: list[int]
    end: list[int]
    types: list[int] | None  # of start, query, middle, passage, end; None: the model has no token types

    @property
    def special(self) -> int:
        return len(self.start) + len(self.middle) + len(self.end)


def template_of(tokenizer) -> Template:
    """The template of a tokenizer, found from a pair of texts."""
    pair = ("what", "this")
    first, second = tokenizer(list(pair), add_special_tokens=False)["input_ids"]
    encoded = tokenizer(*pair)
    ids, types = encoded["input_ids"], encoded.get("token_type_ids")
    at = _find(ids, first, 0)
    then = _find(ids, second, at + len(first))
    parts = [0, at, at + len(first), then, then + len(second), len(ids)]
    if types is not None:
        # an empty part has no type
        types = [types[start] if start < end else 0 for start, end in itertools.pairwise(parts)]
    return Template(ids[: parts[1]], ids[parts[2] : parts[3]], ids[parts[4] :], types)


def _find(ids: list[int], part: list[int], start: int) -> int:
    places = (place for place in range(start, len(ids)) if ids[place : place + len(part)] == part)
    return next(places, start)  # if it is not there, the model is refused by `_check_scores`


def limit_of_texts(reranker: CrossEncoder) -> int:
    """The most tokens of a query and a passage together, special tokens aside."""
    limit = reranker.max_seq_length or reranker.tokenizer.model_max_length
    return min(limit, UNLIMITED) - reranker.template.special


def _prompt(reranker: CrossEncoder) -> str:
    return reranker.prompts.get(reranker.default_prompt_name) or ""


def tokenize(
    reranker: CrossEncoder, texts: Iterable[str], kind: str, *, keep: bool = True, whole: list | None = None
) -> Sequence[list[int]]:
    """Token ids of each query or passage, without special tokens, cut at the maximum length of a pair.

    A model's prompt stands before each query. `keep` and `whole` are as in the tokenizer's `tokenize`.
    """
    prompt = _prompt(reranker) if kind == "query" else ""
    options = {"add_special_tokens": False, "truncation": True, "max_length": limit_of_texts(reranker)}
    return tokenize_cached(reranker.tokenizer, Texts(lambda: (prompt + text for text in texts)), keep=keep,
                           whole=whole, **options)  # fmt: skip


def tokens_key(reranker: CrossEncoder) -> list:
    """What decides the result of `tokenize`, beside the texts."""
    return [tokenizer_key(reranker.tokenizer), _prompt(reranker), limit_of_texts(reranker)]


def cut_to(limit: int, query: int, passage: int) -> tuple[int, int]:
    """The tokens that are left of a query and a passage, so that both have `limit`: the longer one is cut first."""
    if query + passage <= limit:
        return query, passage
    if query <= passage:
        query = min(query, limit // 2)
        return query, limit - query
    passage = min(passage, limit // 2)
    return limit - passage, passage


def pairs_of(reranker: CrossEncoder, pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """A padded batch of pairs of a query's and a passage's tokens, as the tokenizer would put them together."""
    template, limit = reranker.template, limit_of_texts(reranker)
    rows, types = [], []
    for query, passage in pairs:
        left, right = cut_to(limit, len(query), len(passage))
        parts = [template.start, query[:left], template.middle, passage[:right], template.end]
        rows.append([token for part in parts for token in part])
        if template.types is not None:
            types.append(torch.tensor([kind for kind, part in zip(template.types, parts, strict=True) for _ in part]))
    features = pad(rows, reranker.tokenizer.pad_token_id)
    return features | ({"token_type_ids": pad_sequence(types, batch_first=True)} if types else {})


def count_tokens(reranker: CrossEncoder, features: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Number of tokens without padding, and number of token positions that are computed."""
    tokens = int(features["attention_mask"].sum())
    return tokens, tokens if is_packed(reranker[0]) else features["attention_mask"].numel()


# ---- pairs to scores


@torch.no_grad()
def score(
    reranker: CrossEncoder,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    accelerator,
    max_tokens: int | None = None,
    poll=None,
    alone: bool = False,
) -> np.ndarray:
    """(pairs,) float32 scores (logits) of pairs of tokens; the processes share the work, and all get all scores.

    A batch has at most `max_tokens` tokens, padding included (default: 4,096 on a CPU, to fit its cache, else 8,192).
    `poll()` is called before each batch, equally often on all processes, and may raise. With `alone`, this process
    scores its own pairs and the others take no part.
    """
    max_tokens = max_tokens or (4096 if accelerator.device.type == "cpu" else 8192)
    process, processes = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    batches = longest_first([sum(map(len, pair)) for pair in pairs], max_tokens, is_padded=not is_packed(reranker[0]))
    if processes > 1:
        wait_for_all()
    was_training = reranker.training
    reranker.eval()
    found = []
    try:
        with (
            accelerator.autocast(), laid_out_weights(reranker),
            Phase("reranked", "pairs", len(pairs), is_own=alone) as phase,
        ):  # fmt: skip
            for first in range(0, len(batches), processes):
                if poll:
                    poll()
                # a sharded model needs all processes each time: those without a batch left repeat the last one
                batch = batches[min(first + process, len(batches) - 1)]
                features = send_to_device(pairs_of(reranker, [pairs[i] for i in batch]), accelerator.device)
                scores = reranker(features)["scores"][:, 0].float().tolist()
                if first + process < len(batches):
                    found += zip(batch, scores, strict=True)
                phase.advance(sum(map(len, batches[first : first + processes])))
    finally:
        reranker.train(was_training)
    if processes > 1:
        found = gather_object(found)
    scores = np.empty(len(pairs), dtype=np.float32)
    for number, value in found:
        scores[number] = value
    return scores


# ---- training


def collate_pairs(reranker: CrossEncoder, rows: list[tuple[list[int], list[list[int]], int]], dummy: bool) -> dict:
    """A batch of queries with their candidates; a row is the query's tokens, those of the passages, and how many of
    these are positives, which come first.

    Returns `pairs`, features of all pairs with the plan of their packing, and per query the numbers of its pairs,
    (queries, most candidates) padded with -1, as `candidates`, and the number of its positives (0: a dummy, which
    counts for nothing) as `positives`.
    """
    counts = [len(passages) for _, passages, _ in rows]
    numbers = torch.arange(sum(counts)).split(counts)
    pairs = pairs_of(reranker, [(query, passage) for query, passages, _ in rows for passage in passages])
    if is_packed(reranker[0]):  # planned here, in the host's memory: a GPU would have to be waited for
        pairs["packing"] = plan_packing(pairs["attention_mask"], reranker.device)
    return {
        "pairs": pairs,
        "candidates": pad_sequence(numbers, batch_first=True, padding_value=-1),
        "positives": torch.tensor([0 if dummy else positives for *_, positives in rows]),
    }


def rerank_loss(
    scores: torch.Tensor, candidates: torch.Tensor, positives: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of the queries of a batch, and how many of them score a positive highest.

    Args:
        scores: (pairs,), the logits of all pairs.
        candidates, positives: as in `collate_pairs`.
        kind: "listwise": cross entropy of each positive against the query's negatives, mean over the positives
            (Gao et al., 2021, arXiv:2101.08751). "binary": cross entropy of each pair by itself, mean over the pairs
            (Nogueira and Cho, 2019, arXiv:1901.04085).
    """
    exists = candidates >= 0
    table = scores.float()[candidates.clamp_min(0)]  # (queries, most candidates)
    is_positive = torch.arange(table.shape[1], device=table.device) < positives[:, None]
    if kind == "listwise":
        # not -inf: a query without any negative must not give nan
        negatives = table.masked_fill(is_positive | ~exists, -1e9).logsumexp(1, keepdim=True)
        losses = (torch.logaddexp(negatives, table) - table) * is_positive
        losses = losses.sum(1) / positives.clamp_min(1)
    else:
        losses = nn.functional.binary_cross_entropy_with_logits(table, is_positive.float(), reduction="none") * exists
        losses = losses.sum(1) / exists.sum(1) * (positives > 0)
    best = table.masked_fill(~exists, float("-inf")).argmax(1)
    return losses.sum(), (best < positives).sum()


def count_queries(batch: dict) -> int:
    """Number of queries of a micro-batch that are not dummies."""
    return int((batch["positives"] > 0).sum())


def halves(batches: list[dict]) -> list[dict]:
    """Splits each batch into two halves of its queries; [] if no batch has more than one query."""
    parts = []
    for batch in batches:
        middle = len(batch["positives"]) // 2
        pairs = int(batch["candidates"][:middle].max()) + 1 if middle else 0
        for queries, rows, first in (
            (slice(middle), slice(pairs), 0),
            (slice(middle, None), slice(pairs, None), pairs),
        ):
            candidates = batch["candidates"][queries]
            if len(candidates):
                parts.append({
                    "pairs": {name: tensor[rows] for name, tensor in batch["pairs"].items() if name != "packing"},
                    "candidates": torch.where(candidates >= 0, candidates - first, -1),
                    "positives": batch["positives"][queries],
                })  # fmt: skip
    return parts if len(parts) > len(batches) else []
