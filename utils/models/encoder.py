"""The retriever: a SentenceTransformer, built from scratch or loaded; tokenizing, encoding and saving.

Queries and passages go through one encoder, each with its own prompt where the model has one. A text is tokenized once
and encoded in batches of similar length, without padding where the encoder can do without.
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

from utils.errors import UsageError
from utils.fast.cpu import laid_out_weights, use_fast_layers
from utils.fast.packing import is_packed, remove_padding
from utils.models.tokenizer import tokenize as tokenize_cached
from utils.models.tokenizer import train_tokenizer

PROMPTS = {"query": "query", "passage": "document"}  # the names that sentence-transformers looks up


def build_small_encoder(
    texts, *, vocab_size: int = 8192, hidden_size: int = 128, layers: int = 2, attention_dropout: float = 0.0
) -> SentenceTransformer:
    """A small BERT with random weights, mean pooling and unit length, and a lowercase tokenizer trained on `texts`."""
    own_tokenizer = train_tokenizer(texts, vocab_size=vocab_size, lowercase=True, max_length=512)
    config = BertConfig(
        vocab_size=len(own_tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=4 * hidden_size,
        max_position_embeddings=512,
        attention_probs_dropout_prob=attention_dropout,
        initializer_range=0.06,  # the width's own scale; BERT's 0.02 is made for hidden_size 768
        pad_token_id=own_tokenizer.pad_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers takes its first module from a folder only
        config.save_pretrained(folder)  # the model's own save_pretrained writes on the first of several processes only
        save_file(BertModel(config).state_dict(), f"{folder}/model.safetensors", {"format": "pt"})
        own_tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    retriever = SentenceTransformer(modules=[transformer, Pooling(hidden_size), Normalize()], device="cpu")
    use_fast_layers(retriever)
    remove_padding(retriever)
    return retriever


def load_retriever(name_or_path: str, attention_dropout: float | None = None) -> SentenceTransformer:
    """A sentence-transformers or plain encoder checkpoint from a folder or the Hub; UsageError if there is none."""
    config = {}
    folder = Path(name_or_path)
    if folder.is_dir() and not any((folder / name).exists() for name in ("modules.json", "config.json")):
        raise UsageError(f"{name_or_path}: no retriever in this folder; a run writes it when its training is done")
    if attention_dropout is not None:  # BERT's name and the others'; a configuration ignores the one it does not have
        config = {"attention_probs_dropout_prob": attention_dropout, "attention_dropout": attention_dropout}
    try:
        retriever = SentenceTransformer(
            name_or_path, device="cpu", model_kwargs={"dtype": torch.float32}, config_kwargs=config
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name_or_path}: no retriever could be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    is_unit = any(isinstance(module, Normalize) for module in retriever)
    if not is_unit and retriever.similarity_fn_name == SimilarityFunction.COSINE.value:
        retriever.append(Normalize())  # with which the dot product, of loss and search, is the cosine
    use_fast_layers(retriever)
    remove_padding(retriever)
    return retriever


def weights_key(model: torch.nn.Module) -> str:
    """A checksum of a model's weights and, of a SentenceTransformer, all else that decides a text's embedding."""
    others = [getattr(model, name, None) for name in ("prompts", "max_seq_length")]
    total = hashlib.sha256(json.dumps(others).encode())
    for name, tensor in sorted(model.state_dict().items()):
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        total.update(name.encode() + local.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def tokenize(model: SentenceTransformer, texts: list[str], kind: str) -> list[list[int]]:
    """Token ids of each text after the prompt of its `kind` ("query" or "passage"), cut at the model's length."""
    prompt = model.prompts.get(PROMPTS[kind], "")
    texts = [prompt + text for text in texts]
    return tokenize_cached(model.tokenizer, texts, truncation=True, max_length=model.max_seq_length)


def pad(token_ids: list[list[int]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The encoder's features, `input_ids` and `attention_mask`, both (texts, tokens)."""
    rows = [torch.tensor(ids) for ids in token_ids]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id),
        "attention_mask": torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


def in_chunks(
    retriever: SentenceTransformer, queries: list[list[int]], passages: list[list[int]], max_tokens: int = 0
) -> list[dict[str, torch.Tensor]]:
    """Features of a training batch, with `rows`: their numbers in the batch, in which queries come first.

    With `max_tokens`, texts of similar length and so many tokens at most, padding included where there is any; else
    all at once, or queries apart from passages where padding them to one length would cost.
    """
    token_ids, packed = queries + passages, is_packed(retriever[0])
    parts = [range(len(queries)), range(len(queries), len(token_ids))]
    if packed:
        parts = [range(len(token_ids))]
    if max_tokens:
        parts, tokens = [[]], 0
        for number in sorted(range(len(token_ids)), key=lambda i: -len(token_ids[i])):
            width = len(token_ids[number if packed or not parts[-1] else parts[-1][0]])
            if parts[-1] and tokens + width > max_tokens:
                width, tokens = len(token_ids[number]), 0
                parts.append([])
            parts[-1].append(number)
            tokens += width
    return [
        {**pad([token_ids[i] for i in part], retriever.tokenizer.pad_token_id), "rows": torch.tensor(part)}
        for part in parts
    ]


def count_tokens(retriever: SentenceTransformer, chunks: list[dict[str, torch.Tensor]]) -> tuple[int, int]:
    """Tokens without padding, and tokens as they are computed."""
    tokens = sum(int(chunk["attention_mask"].sum()) for chunk in chunks)
    return tokens, tokens if is_packed(retriever[0]) else sum(chunk["attention_mask"].numel() for chunk in chunks)


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
    """Embeddings (texts, hidden) in float32, the work divided over the processes and the result on all of them.

    Sorted by length and batched by `max_tokens`, padding included; without it 4,096 on processors, whose cache they
    should fit, else 8,192. `poll()` is called before each batch, on all processes equally often: it may raise.
    `alone`: this process encodes texts of its own, the others take no part.
    `cost["encoder_tokens"]` grows by the tokens of the texts.
    """
    token_ids = tokenize(model, texts, kind)
    max_tokens = max_tokens or (4096 if accelerator.device.type == "cpu" else 8192)
    if cost is not None:
        cost["encoder_tokens"] += sum(map(len, token_ids))
    process, processes = (0, 1) if alone else (accelerator.process_index, accelerator.num_processes)
    batches: list[list[int]] = []
    for number in sorted(range(len(texts)), key=lambda i: -len(token_ids[i])):
        if not batches or (len(batches[-1]) + 1) * len(token_ids[batches[-1][0]]) > max_tokens:
            batches.append([])
        batches[-1].append(number)
    was_training = model.training
    model.eval()
    numbers, parts = [], [np.empty((0, model.get_embedding_dimension()), dtype=np.float32)]
    try:
        with accelerator.autocast(), laid_out_weights(model):
            for first in range(0, len(batches), processes):
                if poll:
                    poll()
                # every process takes part, with a batch that is done already if need be: the model may be sharded
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
