"""The retriever: a SentenceTransformer, built from scratch or loaded; tokenizing and encoding of texts.

One encoder embeds queries and passages, each with its own prompt if the model has prompts. Texts are encoded in batches
of similar length, and without padding if the encoder supports that.
"""

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer, SimilarityFunction
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertModel

from utils.errors import UsageError, in_one_line
from utils.fast.cpu import laid_out_weights, use_fast_layers
from utils.fast.packing import is_packed, remove_padding
from utils.models.settings import write_settings
from utils.models.tokenizer import check_length, check_vocabulary, pad, train_tokenizer
from utils.models.tokenizer import tokenize as tokenize_cached

PROMPTS = {"query": "query", "passage": "document"}  # names of the prompts in sentence-transformers

# ---- models


def build_small_encoder(
    texts, *, vocab_size: int = 8192, hidden_size: int = 128, layers: int = 2, attention_dropout: float = 0.0
) -> SentenceTransformer:
    """A small BERT with random weights, mean pooling and unit length; its lowercase tokenizer is trained on `texts`."""
    own_tokenizer = train_tokenizer(texts, vocab_size=vocab_size, lowercase=True, max_length=512)
    config = BertConfig(
        vocab_size=len(own_tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=512,
        attention_probs_dropout_prob=attention_dropout,
        initializer_range=0.06,  # suits this width; BERT's 0.02 is made for hidden_size 768
        pad_token_id=own_tokenizer.pad_token_id,
    )
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


def load_retriever(name_or_path: str, attention_dropout: float | None = None) -> SentenceTransformer:
    """Loads a sentence-transformers or plain encoder checkpoint from a folder or the Hub; UsageError if it cannot."""
    config = {}
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).exists() for name in ("modules.json", "config.json")):
        raise UsageError(
            f"{name_or_path}: this folder holds no retriever; train_retrieve.py writes it at the end of training"
        )
    if attention_dropout is not None:  # two names, of BERT and of others; a configuration ignores the unknown one
        config = {"attention_probs_dropout_prob": attention_dropout, "attention_dropout": attention_dropout}
    try:
        retriever = SentenceTransformer(
            name_or_path, device="cpu", model_kwargs={"dtype": torch.float32}, config_kwargs=config
        )
    except Exception as error:  # libraries raise errors of many kinds for files that they cannot use
        raise UsageError(f"{name_or_path}: no retriever could be loaded: {in_one_line(error)}") from error
    transformer = next((module for module in retriever.modules() if hasattr(module, "get_input_embeddings")), None)
    if transformer is not None and hasattr(retriever.tokenizer, "all_special_ids"):  # not a static model
        check_vocabulary(retriever.tokenizer, transformer, name_or_path)
    is_unit = any(isinstance(module, Normalize) for module in retriever)
    if not is_unit and retriever.similarity_fn_name == SimilarityFunction.COSINE.value:
        retriever.append(Normalize())  # loss and search use the dot product, which must be the cosine
    use_fast_layers(retriever)
    remove_padding(retriever)
    return retriever


def set_max_seq_length(retriever: SentenceTransformer, tokens: int) -> None:
    """Cuts queries and passages to so many tokens. UsageError if the model has not as many positions."""
    check_length(retriever, "max_seq_length", tokens)
    retriever.max_seq_length = tokens


def weights_key(model: torch.nn.Module) -> str:
    """A checksum of a model's weights, and of a SentenceTransformer's prompts and maximum length."""
    others = [getattr(model, name, None) for name in ("prompts", "max_seq_length")]
    total = hashlib.sha256(json.dumps(others).encode())
    for name, tensor in sorted(model.state_dict().items()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


# ---- texts to batches of tokens


def tokenize(model: SentenceTransformer, texts: list[str], kind: str, whole: list | None = None) -> list[list[int]]:
    """Token ids of each text after the prompt of its `kind` ("query" or "passage"), cut at `model.max_seq_length`.

    The list `whole` grows by the number of tokens that each text has before it is cut.
    """
    prompt = model.prompts.get(PROMPTS[kind], "")
    texts = [prompt + text for text in texts]
    return tokenize_cached(model.tokenizer, texts, whole=whole, truncation=True, max_length=model.max_seq_length)


def in_chunks(
    retriever: SentenceTransformer, queries: list[list[int]], passages: list[list[int]], max_tokens: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Features of a training batch in chunks, each with `rows`: the numbers of its texts, where queries come first.

    A chunk has at most `max_tokens` tokens in texts of similar length; padding counts unless it is removed. With
    `max_tokens` 0, the batch is one chunk, or two (queries, passages) where padding is not removed.
    """
    token_ids, packed = queries + passages, is_packed(retriever[0])
    if max_tokens:
        parts = _longest_first(token_ids, max_tokens, is_padded=not packed)
    elif packed:
        parts = [range(len(token_ids))]
    else:  # queries are short: padding them to the length of passages would cost time
        parts = [range(len(queries)), range(len(queries), len(token_ids))]
    return [
        {**pad([token_ids[i] for i in part], retriever.tokenizer.pad_token_id), "rows": torch.tensor(part)}
        for part in parts
    ]


def count_tokens(retriever: SentenceTransformer, chunks: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """Number of tokens without padding, and number of token positions that are computed."""
    tokens = sum(int(chunk["attention_mask"].sum()) for chunk in chunks)
    return tokens, tokens if is_packed(retriever[0]) else sum(chunk["attention_mask"].numel() for chunk in chunks)


def _longest_first(token_ids: list[list[int]], max_tokens: int, *, is_padded: bool) -> list[list[int]]:
    """Numbers of the texts in batches of at most `max_tokens`; a longer text has a batch of its own."""
    batches, tokens, longest = [], 0, 0
    for number in sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i])):
        length = len(token_ids[number])
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
    token_ids = tokenize(model, texts, kind)
    max_tokens = max_tokens or (4096 if accelerator.device.type == "cpu" else 8192)
    if cost is not None:
        cost["encoder_tokens"] += sum(map(len, token_ids))
    process, processes = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    batches = _longest_first(token_ids, max_tokens, is_padded=True)
    was_training = model.training
    model.eval()
    numbers, parts = [], [np.empty((0, model.get_embedding_dimension()), dtype=np.float32)]
    try:
        with accelerator.autocast(), laid_out_weights(model):
            for first in range(0, len(batches), processes):
                if poll:
                    poll()
                # a sharded model needs all processes each time: those without a batch left repeat the last one
                batch = batches[min(first + process, len(batches) - 1)]
                features = pad([token_ids[i] for i in batch], model.tokenizer.pad_token_id)
                output = model({name: tensor.to(accelerator.device) for name, tensor in features.items()})
                parts.append(output["sentence_embedding"].float().cpu().numpy())
                numbers += batch
    finally:
        model.train(was_training)
    embeddings = np.empty((len(texts), model.get_embedding_dimension()), dtype=np.float32)
    mine = (numbers, np.concatenate(parts))
    for rows, vectors in gather_object([mine]) if processes > 1 else [mine]:
        embeddings[rows] = vectors
    return embeddings


def save_pretrained(retriever: SentenceTransformer, folder: str | Path, args) -> None:
    """A folder that `SentenceTransformer(folder)` loads unchanged, with the settings that ranking needs beside it."""
    retriever.save_pretrained(str(folder), create_model_card=False)
    write_settings(folder, args, ("model_name_or_path", "ranking", "bm25_weight", "smooth_window", "smooth_decay"))
