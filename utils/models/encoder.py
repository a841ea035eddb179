"""The retriever: a SentenceTransformer, built from scratch or loaded; tokenizing and encoding of texts.

One encoder embeds queries and passages, each with its own prompt if the model has prompts. Texts are encoded in batches
of similar length, and without padding if the encoder supports that.
"""

import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SimilarityFunction
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch.distributed.tensor import DTensor
from torch.nn.functional import normalize
from transformers import BertConfig, BertModel

from utils.errors import UsageError
from utils.fast.cpu import laid_out_weights, use_fast_layers
from utils.fast.packing import is_packed, plan_packing, remove_padding
from utils.models.lora import base_model, check_loaded, holds
from utils.models.settings import ATTENTION_DROPOUTS, checkpoint_layers, load_error, write_settings
from utils.models.tokenizer import check_length, check_vocabulary, pad, position_limit, tokenizer_key, train_tokenizer
from utils.models.tokenizer import tokenize as tokenize_cached
from utils.processes import wait_for_all
from utils.progress import Phase
from utils.tables import Texts

TASKS = {"query": "query", "passage": "document"}  # what sentence-transformers calls the kinds of texts
PROMPT_NAMES = {"query": ("query",), "passage": ("document", "passage", "corpus")}  # of a model, the first it has
DROPOUTS = ("hidden_dropout_prob", "dropout", "dropout_rate", "hidden_dropout", "resid_pdrop", "embd_pdrop",
            "embedding_dropout", "mlp_dropout")  # fmt: skip
UNLIMITED = 2**30  # tokens; tokenizers accept no infinity
PROBES = ["Who agreed?", "The committee agreed on the new budget for the old town hall, after a long discussion.", "5"]

# ---- models


def small_bert(
    tokenizer, hidden_size: int, layers: int, attention_dropout: float, dropout: float | None, **more
) -> BertConfig:
    """The configuration of a small BERT with the tokenizer's vocabulary; `dropout` is 0.1 if it is None."""
    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=512,
        attention_probs_dropout_prob=attention_dropout,
        hidden_dropout_prob=0.1 if dropout is None else dropout,
        initializer_range=0.06,  # suits this width; BERT's 0.02 is made for hidden_size 768
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )


def build_small_encoder(
    texts,
    *,
    vocab_size: int = 8192,
    hidden_size: int = 128,
    layers: int = 2,
    attention_dropout: float = 0.0,
    dropout: float | None = None,
    key: str | None = None,
) -> SentenceTransformer:
    """A small BERT with random weights, mean pooling and unit length; its lowercase tokenizer is trained on `texts`.

    `key` is as in `train_tokenizer`.
    """
    own_tokenizer = train_tokenizer(texts, vocab_size=vocab_size, lowercase=True, max_length=512, key=key)
    config = small_bert(own_tokenizer, hidden_size, layers, attention_dropout, dropout)
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers loads its Transformer module from a folder
        config.save_pretrained(folder)
        # not the model's save_pretrained, which writes nothing on the other processes
        save_file(BertModel(config).state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        own_tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    retriever = SentenceTransformer(modules=[transformer, Pooling(hidden_size), Normalize()], device="cpu")
    use_fast_layers(retriever)
    remove_padding(retriever)
    return retriever


def load_retriever(
    name_or_path: str,
    attention_dropout: float | None = None,
    dropout: float | None = None,
    trust_remote_code: bool = False,
    truncate_dim: int | None = None,
) -> SentenceTransformer:
    """Loads a sentence-transformers model, or a plain encoder or decoder-only checkpoint, from a folder or the Hub.

    A plain checkpoint reads texts as they are, also if it has a chat template. Its pooling is that of
    sentence-transformers: the last token of language models, else the mean. `truncate_dim` replaces the model's own.
    UsageError if it cannot be loaded, if `dropout` cannot be set, or if training and search here would not compute the
    embeddings of sentence-transformers' own `encode_query` and `encode_document`.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).exists() for name in ("modules.json", "config.json",
                                                                          "adapter_config.json")):  # fmt: skip
        raise UsageError(
            f"{name_or_path}: this folder holds no retriever; train_retrieve.py writes it at the end of training"
        )
    base_model(name_or_path, "")
    # a configuration ignores the names that it does not know
    config = dict.fromkeys(ATTENTION_DROPOUTS, attention_dropout) if attention_dropout is not None else {}
    config |= dict.fromkeys(DROPOUTS, dropout) if dropout is not None else {}
    try:
        retriever = SentenceTransformer(
            name_or_path, device="cpu", model_kwargs={"dtype": torch.float32}, config_kwargs=config,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except Exception as error:  # libraries raise errors of many kinds for files that they cannot use
        raise UsageError(f"{name_or_path}: no retriever could be loaded: {load_error(error)}") from error
    check_loaded(retriever, name_or_path, "")
    _check_modules(retriever, name_or_path)
    if truncate_dim is not None:
        retriever.truncate_dim = None
        if truncate_dim > retriever.get_embedding_dimension():
            size = retriever.get_embedding_dimension()
            raise UsageError(f"--truncate_dim {truncate_dim}: the embeddings of {name_or_path} have {size} dimensions")
        retriever.truncate_dim = truncate_dim
    if dropout is not None and not any(hasattr(retriever[0].auto_model.config, name) for name in DROPOUTS):
        raise UsageError(f"--dropout: {name_or_path} has no dropout that could be set; leave the flag out")
    if attention_dropout and not any(hasattr(retriever[0].auto_model.config, name) for name in ATTENTION_DROPOUTS):
        raise UsageError(f"--attention_dropout: {name_or_path} has none that could be set; leave the flag out")
    check_vocabulary(retriever.tokenizer, retriever[0].auto_model, name_or_path)
    limit = position_limit(retriever)
    if limit is not None and (retriever.max_seq_length or limit) >= limit:
        retriever.max_seq_length = limit  # a longer text has no positions
    if is_unit(retriever) and not any(isinstance(module, Normalize) for module in retriever):
        retriever.append(Normalize())  # loss and search use the dot product, which must be the cosine
    use_fast_layers(retriever)
    remove_padding(retriever)
    _check_embeddings(retriever, name_or_path)
    return retriever


def _check_modules(retriever: SentenceTransformer, name: str) -> None:
    """Settles chat template and padding token. Raises UsageError if the model is of a kind that is not supported."""
    first = type(retriever[0]).__name__
    if not isinstance(retriever[0], Transformer):
        remedy = "save one of its encoders as a model of its own" if first == "Router" else "choose a Transformer model"
        raise UsageError(f"{name}: its first module is a {first}, which is not supported as a retriever; {remedy}")
    if "message" in retriever[0].modality_config:
        if holds(name, "modules.json"):
            raise UsageError(
                f"{name}: texts would be put into its chat template; remove message from the modality_config in its "
                "sentence_bert_config.json"
            )
        del retriever[0].modality_config["message"]  # a plain checkpoint, which no one trained as a retriever with it
    if retriever[0].modality_config.keys() != {"text"} or not callable(retriever.tokenizer):
        others = ", ".join(map(str, retriever[0].modality_config))
        raise UsageError(f"{name}: reads {others}, but only models of texts are supported; choose another")
    if retriever.tokenizer.pad_token_id is None and retriever.tokenizer.eos_token_id is not None:
        retriever.tokenizer.pad_token = retriever.tokenizer.eos_token  # what is masked may be any token
    if retriever.tokenizer.pad_token_id is None:
        raise UsageError(f"{name}: the tokenizer has no padding token; set pad_token in its tokenizer_config.json")
    if retriever.similarity_fn_name not in (SimilarityFunction.COSINE.value, SimilarityFunction.DOT_PRODUCT.value):
        raise UsageError(
            f"{name}: its similarity is {retriever.similarity_fn_name}, but only cosine and dot are supported; "
            "choose another model"
        )
    if retriever[0].query_expansion is not None:
        raise UsageError(f"{name}: expands queries as ColBERT does, which is not supported; choose another model")


@torch.no_grad()
def _check_embeddings(retriever: SentenceTransformer, name: str) -> None:
    """Raises UsageError if a few texts have other tokens or embeddings here than in sentence-transformers."""
    modules = ", ".join(type(module).__name__ for module in retriever)
    problem = f"{name}: training would compute other embeddings than sentence-transformers ({modules}); choose another"
    retriever.eval()
    for kind, encode_theirs in (("query", retriever.encode_query), ("passage", retriever.encode_document)):
        token_ids = tokenize(retriever, PROBES, kind)
        prompt = prompt_of(retriever, kind)
        for text, ids in zip(PROBES, token_ids, strict=True):
            theirs = retriever.preprocess([text], prompt=prompt, task=TASKS[kind])
            if theirs["input_ids"][0].tolist() != ids:
                raise UsageError(problem)
        # one at a time, because the padding of a batch changes the embeddings of some models
        theirs = encode_theirs(PROBES, batch_size=1, show_progress_bar=False, convert_to_tensor=True,
                               normalize_embeddings=is_unit(retriever))  # fmt: skip
        ours = _embeddings(retriever, _features(retriever, token_ids, kind))
        if ours.shape != theirs.shape or not (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max():
            raise UsageError(problem)


def prompt_of(retriever: SentenceTransformer, kind: str) -> str:
    """The prompt of `encode_query` or `encode_document` ("passage"); "" if there is none."""
    name = next((name for name in PROMPT_NAMES[kind] if name in retriever.prompts), retriever.default_prompt_name)
    return retriever.prompts.get(name) or ""


def set_prompts(retriever: SentenceTransformer, query: str | None, passage: str | None) -> None:
    """Replaces the prompts of a model, which are saved with it; None leaves one as it is.

    Raises UsageError if a prompt leaves no room for a text.
    """
    for kind, prompt in (("query", query), ("passage", passage)):
        if prompt is None:
            continue
        retriever.prompts[PROMPT_NAMES[kind][0]] = prompt
        if len(tokenize(retriever, [""], kind)[0]) >= _longest(retriever, kind):
            raise UsageError(f"--{kind}_prompt takes all of the {_longest(retriever, kind)} tokens of a {kind}")


def set_max_seq_length(retriever: SentenceTransformer, tokens: int) -> None:
    """Cuts queries and passages to so many tokens. UsageError if the model has not as many positions."""
    check_length(retriever, "max_seq_length", tokens)
    retriever.max_seq_length = tokens
    for task in TASKS.values():
        if getattr(retriever[0], f"{task}_length", None):
            setattr(retriever[0], f"{task}_length", tokens)


def set_up(retriever: SentenceTransformer, args) -> None:
    """Applies the flags of train_retrieve.py about length, prompts and memory. UsageError if the model refuses one."""
    if retriever.truncate_dim is not None:
        raise UsageError(
            f"{args.model_name_or_path}: its embeddings are cut to {retriever.truncate_dim} dimensions, and only whole "
            "ones can be trained; remove truncate_dim from its config_sentence_transformers.json"
        )
    if (sizes := matryoshka(retriever, args)["matryoshka_dims"]) and sizes[0] > retriever.get_embedding_dimension():
        raise UsageError(
            f"--matryoshka_dims {args.matryoshka_dims}: the embeddings have {retriever.get_embedding_dimension()} "
            "dimensions only"
        )
    if args.max_seq_length:
        set_max_seq_length(retriever, args.max_seq_length)
    set_prompts(retriever, args.query_prompt, args.passage_prompt)
    if args.gradient_checkpointing:
        checkpoint_layers(retriever[0].auto_model)


def is_unit(retriever: SentenceTransformer) -> bool:
    """Whether its similarity is the cosine, so that embeddings have unit length, also after they were cut."""
    return retriever.similarity_fn_name == SimilarityFunction.COSINE.value


def matryoshka(retriever: SentenceTransformer, args) -> dict:
    """The arguments of the contrastive loss that `--matryoshka_dims` decides."""
    sizes = args.matryoshka_dims.split(",") if args.matryoshka_dims else []
    return {"matryoshka_dims": list(map(int, sizes)), "is_unit": is_unit(retriever)}


def weights_key(model: torch.nn.Module) -> str:
    """A checksum of a model's weights, and of a SentenceTransformer's tokenizer, prompts, lengths and other modules.

    Called on all processes if the model is sharded.
    """
    others = [getattr(model, name, None) for name in ("prompts", "max_seq_length", "truncate_dim")]
    if isinstance(model, SentenceTransformer):
        others += [tokens_key(model), model.similarity_fn_name, list(map(str, list(model)[1:]))]
    total = hashlib.sha256(json.dumps(others).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor):
            tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
        total.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


# ---- texts to batches of tokens


def tokenize(
    model: SentenceTransformer, texts: Iterable[str], kind: str, *, keep: bool = True, whole: list | None = None
) -> Sequence[list[int]]:
    """Token ids of each text after the prompt of its `kind` ("query" or "passage"), cut at the maximum length.

    A text without any token, which has no vector, becomes one padding token. With `keep`, the ids of large collections
    are kept on disk; `texts` must then be iterable twice. `whole` is as in the tokenizer's `tokenize`.
    """
    prompt = prompt_of(model, kind)
    options = {"truncation": True, "max_length": _longest(model, kind)}
    instead = [model.tokenizer.pad_token_id]
    with_prompt = Texts(lambda: (prompt + text for text in texts))
    return tokenize_cached(model.tokenizer, with_prompt, keep=keep, if_empty=instead, whole=whole, **options)


def tokens_key(model: SentenceTransformer) -> list:
    """What decides the result of `tokenize`, beside the texts."""
    return [tokenizer_key(model.tokenizer), [[prompt_of(model, kind), _longest(model, kind)] for kind in TASKS]]


def _longest(model: SentenceTransformer, kind: str) -> int:
    """Maximum tokens of a text; some models have other ones for queries and for passages."""
    return min(getattr(model[0], f"{TASKS[kind]}_length", None) or model.max_seq_length or UNLIMITED, UNLIMITED)


def _features(model: SentenceTransformer, token_ids: list[list[int]], kind: str) -> dict:
    """A padded batch of texts of one kind, as the model's input."""
    return {**pad(token_ids, model.tokenizer.pad_token_id), **_prompt_length(model, kind)}


def _prompt_length(model: SentenceTransformer, kind: str) -> dict[str, int]:
    """Number of the prompt's tokens if pooling leaves them out; else {}."""
    prompt = prompt_of(model, kind)
    if prompt and any(isinstance(module, Pooling) and not module.include_prompt for module in model):
        return {"prompt_length": model.preprocess(["a"], prompt=prompt)["prompt_length"]}
    return {}


def in_chunks(
    retriever: SentenceTransformer, queries: list[list[int]], passages: list[list[int]], max_tokens: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Features of a training batch in chunks, each with `rows`: the numbers of its texts, where queries come first.

    A chunk has at most `max_tokens` tokens in texts of similar length; padding counts unless it is removed. With
    `max_tokens` 0, the batch is one chunk, or two (queries, passages) where padding is not removed. No chunk has both
    kinds if pooling leaves out their prompts.
    """
    token_ids, packed = queries + passages, is_packed(retriever[0])
    lengths = [_prompt_length(retriever, kind) for kind in TASKS]
    sides = [range(len(queries)), range(len(queries), len(token_ids))]
    if not any(lengths) and (packed or max_tokens):  # else apart: padding queries, which are short, would cost time
        lengths, sides = [{}], [range(len(token_ids))]
    chunks = []
    for side, length in zip(sides, lengths, strict=True):
        parts = [side]
        if max_tokens:
            batches = longest_first([len(token_ids[i]) for i in side], max_tokens, is_padded=not packed)
            parts = [[side[i] for i in batch] for batch in batches]
        for part in parts:
            features = pad([token_ids[i] for i in part], retriever.tokenizer.pad_token_id)
            if packed:  # planned here, in the host's memory: a GPU would have to be waited for
                features["packing"] = plan_packing(features["attention_mask"], retriever.device)
            chunks.append({**features, **length, "rows": torch.tensor(part)})
    return chunks


def count_tokens(retriever: SentenceTransformer, chunks: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """Number of tokens without padding, and number of token positions that are computed."""
    tokens = sum(int(chunk["attention_mask"].sum()) for chunk in chunks)
    return tokens, tokens if is_packed(retriever[0]) else sum(chunk["attention_mask"].numel() for chunk in chunks)


def longest_first(lengths: Sequence[int], max_tokens: int, *, is_padded: bool) -> list[list[int]]:
    """Numbers of texts in batches of at most `max_tokens`; a longer text has a batch of its own."""
    batches, tokens, longest = [], 0, 0
    for number in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[number]
        width = longest if is_padded else length
        if not batches or tokens + width > max_tokens:
            batches.append([])
            tokens, longest, width = 0, length, length
        batches[-1].append(number)
        tokens += width
    return batches


# ---- texts to embeddings


@torch.no_grad()
def encode(
    model: SentenceTransformer,
    texts: list[str],
    kind: str,
    *,
    accelerator,
    max_tokens: int | None = None,
    poll=None,
    alone: bool = False,
    cost: dict | None = None,
) -> np.ndarray:
    """Embeddings (texts, hidden) in float32; the processes share the work, and each of them gets all embeddings.

    A batch has at most `max_tokens` tokens, padding included (default: 4,096 on a CPU, to fit its cache, else 8,192).
    `poll()` is called before each batch, equally often on all processes, and may raise. With `alone`, this process
    encodes its own texts and the others take no part. `cost["encoder_tokens"]` grows by the number of tokens.
    """
    token_ids = tokenize(model, texts, kind, keep=False)
    max_tokens = max_tokens or (4096 if accelerator.device.type == "cpu" else 8192)
    if cost is not None:
        cost["encoder_tokens"] += sum(map(len, token_ids))
    process, processes = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    batches = longest_first(list(map(len, token_ids)), max_tokens, is_padded=True)
    if processes > 1:
        wait_for_all()
    was_training = model.training
    model.eval()
    parts = [np.empty((0, model.get_embedding_dimension()), dtype=np.float32)]
    unit = "queries" if kind == "query" else "passages"
    try:
        with (
            accelerator.autocast(), laid_out_weights(model),
            Phase("encoded", unit, len(texts), is_own=alone) as phase,
        ):  # fmt: skip
            for first in range(0, len(batches), processes):
                if poll:
                    poll()
                # a sharded model needs all processes each time: those without a batch left repeat the last one
                batch = batches[min(first + process, len(batches) - 1)]
                features = _features(model, [token_ids[i] for i in batch], kind)
                parts.append(_embeddings(model, send_to_device(features, accelerator.device)).cpu().numpy())
                phase.advance(sum(map(len, batches[first : first + processes])))
    finally:
        model.train(was_training)
    if processes == 1 or not batches:
        numbers, vectors = list(itertools.chain(*batches)), np.concatenate(parts)
    else:
        rows = [list(itertools.chain(*batches[number::processes])) for number in range(processes)]
        numbers, most = list(itertools.chain(*rows)), max(map(len, rows))
        own = np.concatenate(parts)[: len(rows[process])]  # without a batch that was repeated
        filled = torch.from_numpy(np.pad(own, ((0, most - len(own)), (0, 0)))).to(accelerator.device)
        of_each = accelerator.gather(filled).cpu().numpy().reshape(processes, most, -1)
        vectors = np.concatenate([part[: len(rows[number])] for number, part in enumerate(of_each)])
    embeddings = np.empty((len(texts), model.get_embedding_dimension()), dtype=np.float32)
    embeddings[numbers] = vectors
    return embeddings


def _embeddings(model: SentenceTransformer, features: dict) -> torch.Tensor:
    """Embeddings (texts, hidden) of a batch in float32, cut to the model's `truncate_dim`."""
    embeddings = model(features)["sentence_embedding"].float()
    if model.truncate_dim is None:
        return embeddings
    cut = embeddings[:, : model.truncate_dim]
    return normalize(cut) if is_unit(model) else cut


def save_pretrained(retriever: SentenceTransformer, folder: str | Path, args) -> None:
    """A folder that `SentenceTransformer(folder)` loads unchanged, with the settings that ranking needs beside it."""
    retriever.save_pretrained(str(folder), create_model_card=False)
    ranking = ("ranking", "bm25_weight", "smooth_window", "smooth_decay", "hop_weight", "language")
    write_settings(folder, args, ("model_name_or_path", *ranking))
