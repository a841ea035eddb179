"""One GPU, one command, one table: training, generation and FSDP2 of this project beside the plain way.

    python benchmarks/gpu.py --output benchmarks/gpu.json

Measured, in at most nine minutes on an H100 or H200:

- matmul: the bf16 peak of this card, by products of large square matrices. Shares of the peak are of this number.
- summarizer: training steps of a BART of bart-large's size, sources of 500 to 1,024 tokens. The plain loop is
  Transformers' model as it comes, on padded batches, with its own loss.
- retriever: training steps of an encoder of BERT-base's size, queries with positives and hard negatives. The plain loop
  is sentence-transformers' model as it comes, on padded batches, with its MultipleNegativesRankingLoss.
- reranker: training steps of a cross-encoder of BERT-base's size, queries with eight candidates each. The plain loop is
  sentence-transformers' model as it comes, on padded batches, with the binary cross entropy of each pair.
- language_model: training steps of decoder-only models of SmolLM2-135M's size and of 1.2 billion parameters, prompts of
  500 to 1,400 tokens; all weights, or adapters of rank 16 (LoRA). The plain loop is Transformers' model as it comes,
  with peft's adapters, on padded batches, with its own loss.
- parity: losses and gradients of packed batches against padded ones, all models, in float32, fp16 and bf16.
- generation: `EncoderDecoder.generate` with 4 beams against Transformers' `generate` on the same padded batch.
- fsdp2: a step under FSDP2, saved, restored in another process, and one more step in both.

Both training loops get the same batches in the same order, the same fused AdamW and clipping, bf16 autocast and no
dropout. A step is timed whole: copies to the GPU, forward, backward, clipping, optimizer. The loops take turns; medians
are printed. Tokens are real ones, without padding. Weights are random and token ids come from a seed: nothing is
downloaded. A section that fails becomes a row, and the others still run.

Results: not measured on a GPU yet.
"""

import argparse
import copy
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hardware import hardware

from utils.cli.script import end_run
from utils.fast.packing import is_packed
from utils.models.contrastive import contrastive_loss, embed
from utils.models.decoder_only import LanguageModel
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.lora import add_adapters
from utils.models.sources import collate
from utils.models.tokenizer import pad, train_tokenizer
from utils.training.batching import to_device
from utils.training.checkpoint_files import read, save
from utils.training.log import peak_memory_gb
from utils.training.sharding import gather_tensors, restore_tensors
from utils.training.step import parameter_groups

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAD, FIRST = 1, 4  # token ids: padding, and the first that is not special
NARROW = {"vocab_size": 1000, "d_model": 128, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
          "decoder_attention_heads": 2, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256}  # fmt: skip
NARROW_BERT = {"vocab_size": 1000, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
               "intermediate_size": 256}  # fmt: skip
LLAMA = {"tie_word_embeddings": True, "attention_dropout": 0.0, "pad_token_id": PAD, "bos_token_id": 0,
         "eos_token_id": 2}  # fmt: skip
SMALL_LLAMA = LLAMA | {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                       "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192}  # fmt: skip
LARGE_LLAMA = SMALL_LLAMA | {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
                             "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8}  # fmt: skip
NARROW_LLAMA = LLAMA | {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
                        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # fmt: skip
# lengths are (shortest, longest) in tokens; BartConfig's defaults are bart-large's, BertConfig's are BERT-base's
FULL = SimpleNamespace(
    matrices=(4096, 8192, 16384), products=20, rounds=5, steps=8, bart={}, examples=16, source=(500, 1024),
    target=(64, 128), bert={}, queries=64, negatives=3, query=(8, 32), passage=(64, 256), written=16, new_tokens=64,
    llamas={"135M": SMALL_LLAMA, "1.2B": LARGE_LLAMA}, prompt=(500, 1400), prompts=8, asked=16, candidates=8,
)  # fmt: skip
TINY = SimpleNamespace(
    matrices=(256, 512), products=3, rounds=2, steps=2, bart=NARROW, examples=4, source=(20, 40), target=(5, 10),
    bert=NARROW_BERT, queries=4, negatives=2, query=(4, 8), passage=(10, 40), written=3, new_tokens=8,
    llamas={"tiny": NARROW_LLAMA}, prompt=(20, 40), prompts=4, asked=2, candidates=3,
)  # fmt: skip
# relative differences of (loss, gradient) between packed and padded batches at most; bf16 keeps 8 bits, fp16 11
LIMITS = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 1e-2), torch.bfloat16: (2e-3, 2e-2)}
HIGHEST = [0.0]  # peak GPU memory of the running section, in gigabytes

# ----------------------------------------------------------------------------------------------------------------------
# models, batches, losses


def summarizers(sizes: dict, **settings) -> tuple:
    """The same BART twice: the project's Summarizer, and Transformers' model as it comes."""
    torch.manual_seed(0)
    plain = BartForConditionalGeneration(BartConfig(**sizes, dropout=0.0, attention_dropout=0.0, **settings)).train()
    return EncoderDecoder(copy.deepcopy(plain)).to(DEVICE), plain.to(DEVICE)


def retrievers(sizes: dict) -> tuple:
    """The same BERT twice: loaded by the project, and by sentence-transformers within its loss."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from utils.models.encoder import load_retriever

    torch.manual_seed(0)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=PAD)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        train_tokenizer(["a text of a few words"], lowercase=True, max_length=512).save_pretrained(folder)
        ours, plain = load_retriever(folder, attention_dropout=0.0), SentenceTransformer(folder, device="cpu")
    return ours.to(DEVICE).train(), MultipleNegativesRankingLoss(plain, scale=20.0).to(DEVICE).train()


def rerankers(sizes: dict) -> tuple:
    """The same cross-encoder twice: loaded by the project, and by sentence-transformers."""
    from sentence_transformers import CrossEncoder

    from utils.models.cross_encoder import load_reranker

    torch.manual_seed(0)
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, pad_token_id=PAD,
                        num_labels=1)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        BertForSequenceClassification(config).save_pretrained(folder)
        train_tokenizer(["a text of a few words"], lowercase=True, max_length=512).save_pretrained(folder)
        ours, plain = load_reranker(folder, attention_dropout=0.0), CrossEncoder(folder, device="cpu")
    return ours.to(DEVICE).train(), plain.to(DEVICE).train()


def language_models(sizes: dict, with_adapters: bool) -> tuple:
    """The same Llama twice: as the project's summarizer, and as it comes; both with the same adapters, if with any."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        plain = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    ours = LanguageModel(copy.deepcopy(plain))
    if with_adapters:
        from peft import LoraConfig, get_peft_model

        args = SimpleNamespace(lora_rank=16, lora_alpha=None, lora_dropout=0.0, lora_target_modules="all-linear",
                               merge_lora=False, output_dir="none", model_name_or_path="none")  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            plain.config.save_pretrained(folder)
            ours.model.name_or_path = folder  # adapters name their base model
            accelerator = SimpleNamespace(mixed_precision="bf16", distributed_type=DistributedType.NO)
            add_adapters(ours, args, accelerator)
        config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
        plain = get_peft_model(plain, config)
    return ours.to(DEVICE).train(), plain.to(DEVICE).train()


def texts(rng, length: tuple[int, int], count: int, sizes: dict) -> list[list[int]]:
    ids = sizes.get("vocab_size", 30000)
    return [rng.integers(FIRST, ids, tokens).tolist() for tokens in rng.integers(length[0], length[1] + 1, count)]


def summary_batches(size, steps: int) -> list[dict]:
    """Padded sources and targets, for both sides."""
    rng, batches = np.random.default_rng(0), []
    for _ in range(steps):
        sources = [[text] for text in texts(rng, size.source, size.examples, size.bart)]
        batch = dict(collate(sources, texts(rng, size.target, size.examples, size.bart), PAD))
        batches.append({**batch, "layout": EncoderDecoder.lay_out(**batch)})
    return batches


def prompt_batches(model, sizes: dict, size, steps: int) -> tuple[list[dict], list[dict]]:
    """Prompts and targets: as train_summarize.py collates them, and as padded rows of both with labels."""
    rng, ours, plain = np.random.default_rng(0), [], []
    for _ in range(steps):
        prompts, targets = (texts(rng, length, size.prompts, sizes) for length in (size.prompt, size.target))
        batch = dict(collate([[prompt] for prompt in prompts], targets, PAD))
        ours.append({**batch, "layout": model.lay_out(**batch)})
        rows = pad([prompt + target for prompt, target in zip(prompts, targets, strict=True)], PAD)
        labels = [[-100] * len(prompt) + target for prompt, target in zip(prompts, targets, strict=True)]
        plain.append({**rows, "labels": pad(labels, -100)["input_ids"]})
    return ours, plain


def candidate_batches(reranker, size, steps: int) -> tuple[list[dict], list[dict]]:
    """Queries with their candidates, the first of which is right: as train_rerank.py collates them, and as pairs."""
    from utils.models.cross_encoder import collate_pairs

    rng, ours, plain = np.random.default_rng(0), [], []
    for _ in range(steps):
        queries = texts(rng, size.query, size.asked, size.bert)
        rows = [(query, texts(rng, size.passage, size.candidates, size.bert), 1) for query in queries]
        batch = collate_pairs(reranker, rows, False)
        ours.append(batch)
        labels = torch.zeros(size.asked, size.candidates)
        labels[:, 0] = 1
        pairs = {name: tensor for name, tensor in batch["pairs"].items() if name != "packing"}
        plain.append({"pairs": pairs, "labels": labels.flatten()})
    return ours, plain


def pair_batches(retriever, size, steps: int) -> tuple[list[dict], list[dict]]:
    """Queries, positives and hard negatives: as train_retrieve.py collates them, and as a padded column of each."""
    from utils.models.encoder import in_chunks

    rng, ours, plain = np.random.default_rng(0), [], []
    for _ in range(steps):
        queries = texts(rng, size.query, size.queries, size.bert)
        passages = [texts(rng, size.passage, size.queries, size.bert) for _ in range(1 + size.negatives)]
        keys = torch.arange(size.queries * len(passages))
        keys = {"passage_keys": keys, "evidence_keys": keys[: size.queries, None]}
        ours.append({"texts": in_chunks(retriever, queries, list(itertools.chain(*passages))), **keys})
        plain.append({"columns": [pad(column, PAD) for column in (queries, *passages)], **keys})
    return ours, plain


def summarizer_loss(model, batch, smoothing: float = 0.1):
    return model(**batch, label_smoothing_factor=smoothing)[0] / (batch["labels"] != -100).sum()


def plain_summarizer_loss(model, batch):
    return model(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")}).loss


def plain_language_model_loss(model, batch):
    return model(**batch).loss


def reranker_loss(model, batch):
    from utils.models.cross_encoder import rerank_loss

    scores = model(batch["pairs"])["scores"][:, 0]
    return rerank_loss(scores, batch["candidates"], batch["positives"], "binary")[0] / len(batch["positives"])


def plain_reranker_loss(model, batch):
    logits = model(dict(batch["pairs"]))["scores"][:, 0].float()
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, batch["labels"])


def pair_loss(queries, passages, batch):
    keys = {name: batch[name] for name in ("passage_keys", "evidence_keys")}
    return contrastive_loss(queries, passages, **keys, temperature=0.05)[0] / len(queries)


def retriever_loss(model, batch):
    queries = len(batch["evidence_keys"])
    return pair_loss(*embed(model, batch["texts"]).split([queries, len(batch["passage_keys"])]), batch)


def plain_retriever_loss(model, batch):
    return model(batch["columns"], None)


def padded_retriever_loss(model, batch):
    """The project's loss of the plain model's embeddings."""
    columns = [model.model(dict(column))["sentence_embedding"] for column in batch["columns"]]
    queries, *passages = (torch.nn.functional.normalize(column, dim=-1) for column in columns)
    return pair_loss(queries, torch.cat(passages), batch)


def summarizer_flops(config, sources: list[int], targets: list[int]) -> float:
    """Floating-point operations of a training step on these examples, forward and backward, without padding.

    6 for each weight of a matrix and token that it multiplies. Source tokens meet the encoder, and the keys and values
    of the cross-attention; target tokens meet the rest of the decoder, and the vocabulary. Attention adds 12 x width in
    each layer for each pair of tokens that attend: half of the pairs in the decoder's own attention, which is causal.
    """
    d = config.d_model
    for_source = (
        config.encoder_layers * (4 * d * d + 2 * d * config.encoder_ffn_dim) + config.decoder_layers * 2 * d * d
    )
    for_target = config.decoder_layers * (6 * d * d + 2 * d * config.decoder_ffn_dim) + d * config.vocab_size
    attended = config.encoder_layers * sum(s * s for s in sources)
    attended += config.decoder_layers * sum(t * t / 2 + s * t for s, t in zip(sources, targets, strict=True))
    return 6 * (for_source * sum(sources) + for_target * sum(targets)) + 12 * d * attended


def retriever_flops(config, lengths: list[int]) -> float:
    """Like `summarizer_flops`, of an encoder alone and without its pooler, whose output is not used."""
    d, layers = config.hidden_size, config.num_hidden_layers
    weights = layers * (4 * d * d + 2 * d * config.intermediate_size)
    return 6 * weights * sum(lengths) + 12 * d * layers * sum(length * length for length in lengths)


def language_model_flops(config, prompts: list[int], targets: list[int], with_adapters: bool = False) -> float:
    """Like `summarizer_flops`, of a decoder whose vocabulary meets the targets only.

    Adapters count for nothing; frozen weights need no gradient: 4 in place of 6 for each.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    size = d // config.num_attention_heads
    of_layer = 2 * d * d + 2 * d * config.num_key_value_heads * size + 3 * d * config.intermediate_size
    lengths = [prompt + target - 1 for prompt, target in zip(prompts, targets, strict=True)]
    weights = layers * of_layer * sum(lengths) + d * config.vocab_size * sum(targets)
    return (4 if with_adapters else 6) * weights + 6 * d * layers * sum(length * length for length in lengths)


# ----------------------------------------------------------------------------------------------------------------------
# measuring


def row(measure: str, project=None, plain=None, ratio=None, note: str = "", **more) -> dict:
    return {"measure": measure, "project": project, "plain": plain, "ratio": ratio, "note": note, **more}


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def take_peak() -> int:
    """Bytes of the GPU that were allocated at most since the last call; 0 on a processor."""
    if DEVICE.type == "cpu":
        return 0
    peak = torch.cuda.max_memory_allocated()
    HIGHEST[0] = max(HIGHEST[0], peak / 1e9)
    torch.cuda.reset_peak_memory_stats()
    return peak


def seconds_of(function, *arguments) -> float:
    synchronize()
    began = time.perf_counter()
    function(*arguments)
    synchronize()
    return time.perf_counter() - began


def is_late(args) -> bool:
    return time.monotonic() > args.deadline


@functools.cache
def matrix_rates(sizes: tuple, products: int) -> dict[int, float]:
    """TFLOP/s of bf16 products of square matrices of random numbers: for each size, the best of three runs."""
    rates = {}
    for n in sizes:
        a, b, out = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
        multiply = functools.partial(torch.mm, a, b, out=out)
        runs = [seconds_of(lambda: [multiply() for _ in range(products)]) for _ in range(4)]  # noqa: B023
        rates[n] = 2 * n**3 * products / min(runs[1:]) / 1e12
    return rates


def train(model, optimizer, loss_of, batches: list[dict]) -> None:
    for batch in batches:
        batch = to_device(batch, DEVICE)
        with torch.autocast(DEVICE.type, torch.bfloat16):  # with which its cache of cast weights ends
            loss = loss_of(model, batch)
        loss.backward()
        gnorm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))  # waits for the GPU, as the scripts do
        if not np.isfinite(gnorm):
            raise ValueError("the gradient norm is not finite")
        optimizer.step()
        optimizer.zero_grad()


def compare_training(sides: dict, masks: list, flops: float, packs: bool, args) -> list[dict]:
    """Rows of a training section. `sides`: (model, loss, batches) of "project" and "plain"; `masks`: real tokens."""
    tokens, slots = (sum(counts) for counts in zip(*((int(mask.sum()), mask.numel()) for mask in masks), strict=True))
    seconds, peaks = {side: [] for side in sides}, dict.fromkeys(sides, 0)
    optimizers = {
        side: torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-5, fused=True)
        for side, (model, *_) in sides.items()
    }
    for repeat in range(1 + args.size.rounds):  # the first is a warm-up
        if repeat > 1 and is_late(args):
            break
        for side, (model, loss_of, batches) in sides.items():
            take_peak()
            resting = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
            taken = seconds_of(train, model, optimizers[side], loss_of, batches)
            if repeat:
                seconds[side].append(taken)
                # both models rest on the GPU: only this side's weights and states count
                states = [t for state in optimizers[side].state.values() for t in state.values() if torch.is_tensor(t)]
                own = sum(tensor.nbytes for tensor in (*model.parameters(), *states))
                peaks[side] = max(peaks[side], (take_peak() - resting + own) / 1e9)
    ratios = [slow / fast for slow, fast in zip(seconds["plain"], seconds["project"], strict=True)]
    note = f"median of {len(ratios)} rounds of {args.size.steps} steps, ratio {min(ratios):.2f} to {max(ratios):.2f}"
    if len(ratios) < args.size.rounds:
        note += f"; {args.size.rounds - len(ratios)} skipped: {args.budget_seconds:.0f} s are over"
    note += f"; {'packed' if packs else 'NOT PACKED'}, plain batches are {1 - tokens / slots:.0%} padding"
    peak = 1e12 * max(matrix_rates(args.size.matrices, args.size.products).values())
    middle = [median(seconds[side]) for side in sides]
    rows = [
        row("real tokens per second", *(tokens / each for each in middle), median(ratios), note, seconds=seconds),
        row("share of the bf16 peak", *(flops / each / peak for each in middle),
            note=f"{flops / args.size.steps / 1e12:.3g} TFLOP in a step"),
    ]  # fmt: skip
    if DEVICE.type == "cuda":
        rows.append(row("peak memory, GB", *peaks.values(), peaks["project"] / peaks["plain"],
                        "weights, optimizer, gradients, activations"))  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# sections: each returns its rows


def matmul(args) -> list[dict]:
    rates = matrix_rates(args.size.matrices, args.size.products)
    return [row(f"bf16, {n} x {n}, TFLOP/s", plain=rate) for n, rate in rates.items()]


def summarizer(args) -> list[dict]:
    ours, plain = summarizers(args.size.bart)
    batches = summary_batches(args.size, args.size.steps)
    sources, targets = [b["attention_mask"] for b in batches], [b["labels"] != -100 for b in batches]
    lengths = ([length for mask in masks for length in mask.sum(1).tolist()] for masks in (sources, targets))
    sides = {"project": (ours, summarizer_loss, batches), "plain": (plain, plain_summarizer_loss, batches)}
    flops = summarizer_flops(plain.config, *lengths)
    return compare_training(sides, sources + targets, flops, ours.is_packed, args)


def retriever(args) -> list[dict]:
    ours, plain = retrievers(args.size.bert)
    packed, padded = pair_batches(ours, args.size, args.size.steps)
    masks = [column["attention_mask"] for batch in padded for column in batch["columns"]]
    flops = retriever_flops(ours[0].auto_model.config, [length for mask in masks for length in mask.sum(1).tolist()])
    sides = {"project": (ours, retriever_loss, packed), "plain": (plain, plain_retriever_loss, padded)}
    return compare_training(sides, masks, flops, is_packed(ours[0]), args)


def reranker(args) -> list[dict]:
    ours, plain = rerankers(args.size.bert)
    packed, padded = candidate_batches(ours, args.size, args.size.steps)
    masks = [batch["pairs"]["attention_mask"] for batch in padded]
    flops = retriever_flops(ours[0].auto_model.config, [length for mask in masks for length in mask.sum(1).tolist()])
    sides = {"project": (ours, reranker_loss, packed), "plain": (plain, plain_reranker_loss, padded)}
    return compare_training(sides, masks, flops, is_packed(ours[0]), args)


def language_model(args) -> list[dict]:
    rows = []
    for (name, sizes), with_adapters in itertools.product(args.size.llamas.items(), (False, True)):
        if rows and is_late(args):
            rows.append(row(f"{name}", note=f"skipped: {args.budget_seconds:.0f} s are over"))
            continue
        ours, plain = language_models(sizes, with_adapters)
        packed, padded = prompt_batches(ours, sizes, args.size, args.size.steps)
        prompts, targets = (
            [length for batch in packed for length in mask(batch).sum(1).tolist()]
            for mask in (lambda batch: batch["attention_mask"], lambda batch: batch["labels"] != -100)
        )
        flops = language_model_flops(ours.model.config, prompts, targets, with_adapters)
        masks = [batch["attention_mask"] for batch in padded]
        sides = {"project": (ours, summarizer_loss, packed), "plain": (plain, plain_language_model_loss, padded)}
        kind = f"{name}, {'adapters' if with_adapters else 'all weights'}"
        for each in compare_training(sides, masks, flops, ours.is_packed, args):
            rows.append(each | {"measure": f"{kind}: {each['measure']}"})
        del ours, plain, sides
        gc.collect()
    return rows


def gradient(model, loss_of, batch, dtype) -> tuple[float, torch.Tensor]:
    """The loss, and the gradients of all parameters end to end; fp16's loss is scaled, as in training."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        loss = loss_of(model, to_device(batch, DEVICE))
    scale = 2**10 if dtype == torch.float16 else 1
    (loss * scale).backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    return loss.item(), torch.cat(gradients).double() / scale


def parity(args) -> list[dict]:
    """Small models; the padded side is the library's model, with Transformers' own loss and with the retriever's."""
    size = SimpleNamespace(**{**vars(TINY), "source": (10, 150), "passage": (10, 150), "examples": 8, "queries": 8})
    size.prompt, size.prompts, size.asked = (10, 150), 8, 4
    (ours, plain), (encoder, padded_encoder) = summarizers(size.bart), retrievers(size.bert)
    (cross_encoder, padded_cross_encoder), (llama, padded_llama) = (
        rerankers(size.bert), language_models(NARROW_LLAMA, with_adapters=False))  # fmt: skip
    candidates, prompts = candidate_batches(cross_encoder, size, 2), prompt_batches(llama, NARROW_LLAMA, size, 2)
    sides = {
        ("summarizer", ours.is_packed): (
            (ours, functools.partial(summarizer_loss, smoothing=0.0), summary_batches(size, 2)),
            (plain, plain_summarizer_loss, summary_batches(size, 2)),
        ),
        ("retriever", is_packed(encoder[0])): (
            (encoder, retriever_loss, pair_batches(encoder, size, 2)[0]),
            (padded_encoder, padded_retriever_loss, pair_batches(encoder, size, 2)[1]),
        ),
        ("reranker", is_packed(cross_encoder[0])): (
            (cross_encoder, reranker_loss, candidates[0]),
            (padded_cross_encoder, plain_reranker_loss, candidates[1]),
        ),
        ("language model", llama.is_packed): (
            (llama, functools.partial(summarizer_loss, smoothing=0.0), prompts[0]),
            (padded_llama, plain_language_model_loss, prompts[1]),
        ),
    }
    cases = [(*name, dtype, *both) for name, both in sides.items() for dtype in LIMITS]
    return [parity_row(*case) for case in cases]


def parity_row(name: str, packs: bool, dtype, packed: tuple, padded: tuple) -> dict:
    measure, limits = f"{name}, {str(dtype)[6:]}", LIMITS[dtype]
    try:
        differences = []
        for batch, padded_batch in zip(packed[2], padded[2], strict=True):
            loss, grad = gradient(*packed[:2], batch, dtype)
            expected, expected_grad = gradient(*padded[:2], padded_batch, dtype)
            differences.append((abs(loss / expected - 1), float((grad - expected_grad).norm() / expected_grad.norm())))
    except RuntimeError as error:  # fp16 is the rarest: what it lacks must not hide the others
        where = f"not supported on {DEVICE.type}" if "autocast" in str(error) else "failed"
        return row(measure, note=f"{where}: {last_line(error)}", ok=False)
    worst = [max(column) for column in zip(*differences, strict=True)]
    is_close = all(value <= limit for value, limit in zip(worst, limits, strict=True))
    note = f"loss {worst[0]:.1e} (at most {limits[0]:.0e}), gradient {worst[1]:.1e} (at most {limits[1]:.0e}): "
    note += ("ok" if is_close else "DIFFERS") if packs else "NOT PACKED"
    return row(measure, note=note, loss=worst[0], gradient=worst[1], limits=limits, ok=packs and is_close)


def generation(args) -> list[dict]:
    width = args.size.bart.get("d_model", 1024)
    # wide enough a draw for outputs to depend on their sources
    ours, plain = summarizers(args.size.bart, init_std=1.2 * width**-0.5, forced_eos_token_id=2)
    ours.eval(), plain.eval()
    sources = texts(np.random.default_rng(0), args.size.source, args.size.written, args.size.bart)
    batch = to_device(dict(collate([[source] for source in sources], [[2]] * len(sources), PAD)), DEVICE)
    batch.pop("labels")
    padded = {name: batch[name] for name in ("input_ids", "attention_mask")}
    beams = {"num_beams": 4, "do_sample": False}
    ways = {"project": functools.partial(ours.generate, **batch, **beams),
            "plain": lambda **limit: plain.generate(**padded, **beams, **limit)[:, 1:]}  # fmt: skip
    return [generation_row(ways, dtype, args) for dtype in (torch.float32, torch.bfloat16)]


def generation_row(ways: dict, dtype, args) -> dict:
    rates, outputs = {way: [] for way in ways}, {}

    def generate(way: str, new_tokens: int) -> None:
        rows = ways[way](max_new_tokens=new_tokens).tolist()
        outputs[way] = [[token for token in row if token != PAD] for row in rows]

    with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
        for way in ways:  # a warm-up
            generate(way, 4)
        for repeat in range(3):
            if repeat and is_late(args):
                break
            for way in ways:
                seconds = seconds_of(generate, way, args.size.new_tokens)
                rates[way].append(sum(map(len, outputs[way])) / seconds)
    same = [ours == plain for ours, plain in zip(outputs["project"], outputs["plain"], strict=True)]
    project, plain = (median(rates[way]) for way in ways)
    note = f"{sum(same)} of {len(same)} outputs identical, 4 beams, median of {len(rates['plain'])} turns"
    measure = f"{str(dtype)[6:]}, tokens per second"
    return row(measure, project, plain, project / plain, note, identical=sum(same) / len(same))


def fsdp2(args) -> list[dict]:
    """Two launches of `fsdp_step`: the first trains and saves, the second restores and compares."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", __file__]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    environment |= {"ACCELERATE_USE_CPU": "1"} if DEVICE.type == "cpu" else {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for _ in range(2):
            result = subprocess.run([*command, "--fsdp_step", name], env=environment, capture_output=True, text=True,
                                    timeout=120)  # fmt: skip
            if result.returncode:
                error = folder / "error.txt"
                raise RuntimeError(error.read_text() if error.exists() else result.stderr)
        found = json.loads((folder / "result.json").read_text())
    note = "identical bit for bit" if found["difference"] == 0 else f"largest difference {found['difference']:.1e}"
    note += f": {found['tensors']} tensors of model and optimizer, sharded by {found['by']}"
    return [row("one more step after a restart", note=note, identical=found["difference"] == 0, **found)]


def fsdp_step(folder: Path) -> None:
    """Run by torch's launcher: a step under FSDP2, saved, and another; where a step is saved already, on from there."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    is_first = not (folder / "checkpoints").exists()
    layers = ["BartEncoderLayer", "BartDecoderLayer"]
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, reshard_after_forward=True, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=layers, state_dict_type="FULL_STATE_DICT", cpu_ram_efficient_loading=False,
    )  # fmt: skip
    accelerator = Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    model, by = summarizers(NARROW)[0].cpu(), "accelerate"
    if not is_first:  # weights that are to be replaced
        torch.nn.init.normal_(model.model.model.shared.weight, std=0.02)
    if DEVICE.type == "cpu":  # where accelerate leaves FSDP2 out without a word
        by = "torch's fully_shard: accelerate has no FSDP2 on cpu"
        mesh, low = init_device_mesh("cpu", (1,)), MixedPrecisionPolicy(torch.bfloat16)
        for module in (*(part for part in model.modules() if type(part).__name__ in layers), model):
            fully_shard(module, mesh=mesh, mp_policy=low)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3, fused=True)
    if DEVICE.type == "cuda":
        model, optimizer = accelerator.prepare(model, optimizer)

    def step(batch: dict) -> None:
        with accelerator.autocast():
            loss = summarizer_loss(model, to_device(batch, DEVICE))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    first, second = summary_batches(TINY, 2)
    if is_first:
        step(first)
        tensors = gather_tensors(accelerator, model, optimizer)
        save(folder / "checkpoints", 1, tensors, state={}, fingerprint={}, limit=1, is_best=False)
    else:
        restore_tensors(accelerator, model, optimizer, read(folder / "checkpoints" / "last")[0])
    step(second)
    tensors = {f"{group}/{name}": tensor for group, part in gather_tensors(accelerator, model, optimizer).items()
               for name, tensor in part.items()}  # fmt: skip
    if is_first:
        save_file(tensors, folder / "undisturbed.safetensors")
    else:
        expected = load_file(folder / "undisturbed.safetensors")
        differences = [(tensors[name].double() - expected[name].double()).abs().max().item() for name in expected]
        found = {"difference": max(differences), "tensors": len(tensors), "by": by}
        (folder / "result.json").write_text(json.dumps(found))
    end_run(accelerator)


SECTIONS = {"matmul": matmul, "summarizer": summarizer, "retriever": retriever, "parity": parity,
            "generation": generation, "fsdp2": fsdp2, "reranker": reranker,
            "language_model": language_model}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# the table


def last_line(error) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


def run_section(name: str, args) -> dict:
    """The section's rows, seconds and peak memory; what it raises becomes a row."""
    if is_late(args):
        return {"status": "skipped", "rows": [row("", note=f"skipped: {args.budget_seconds:.0f} s are over")]}
    take_peak()
    HIGHEST[0], began = 0.0, time.perf_counter()
    try:
        result = {"status": "ok", "rows": SECTIONS[name](args)}
    except Exception as error:
        result = {"status": "failed", "rows": [row("", note=f"failed: {type(error).__name__}: {last_line(error)}")],
                  "traceback": traceback.format_exc()}  # fmt: skip
    gc.collect()
    what, gigabytes = "process, so far", peak_memory_gb(SimpleNamespace(device=torch.device("cpu")))
    if DEVICE.type == "cuda" and not is_broken():
        take_peak()
        torch.cuda.empty_cache()
        what, gigabytes = "section", HIGHEST[0]
    seconds = time.perf_counter() - began
    result["rows"].append(row(f"peak memory of the {what}, GB", gigabytes, note=f"the section took {seconds:.1f} s"))
    return result


def is_broken() -> bool:
    """Whether an error has made the GPU unusable for the rest of this process, as one within a kernel does."""
    try:
        synchronize()
    except RuntimeError:
        return True
    return False


def run_elsewhere(names: list[str], args) -> dict:
    """Runs sections in a process of their own."""
    with tempfile.TemporaryDirectory() as folder:
        output, left = Path(folder) / "gpu.json", max(0.0, args.deadline - time.monotonic())
        command = [sys.executable, __file__, "--only", *names, "--output", output, "--budget_seconds", left]
        subprocess.run([*map(str, command), *["--tiny"] * args.tiny], stdout=subprocess.DEVNULL)
        found = json.loads(output.read_text())["sections"] if output.exists() else {}
    lost = {"status": "failed", "rows": [row("", note="failed: the process ended without a result")], "traceback": ""}
    return {name: found.get(name, lost) for name in names}


def table(sections: dict) -> str:
    cells = [("section", "measure", "project", "plain", "ratio", "note")]
    for name, section in sections.items():
        for each in section["rows"]:
            numbers = [shown(each[column]) for column in ("project", "plain", "ratio")]
            cells.append((name, each["measure"], *numbers, each["note"]))
    widths = [max(map(len, column)) for column in list(zip(*cells, strict=True))[:5]]
    template = "{{:<{}}}  {{:<{}}}  {{:>{}}}  {{:>{}}}  {{:>{}}}  {{}}".format(*widths)
    return "\n".join(template.format(*line).rstrip() for line in cells)


def shown(value) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes: to try the command, also on a processor")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="SECTION",
                        help=f"some of {', '.join(SECTIONS)}")  # fmt: skip
    parser.add_argument("--budget_seconds", type=float, default=480, help="after which what remains is skipped")
    parser.add_argument("--fsdp_step", type=Path, help=argparse.SUPPRESS)  # a process of section fsdp2
    args = parser.parse_args(arguments)
    if args.fsdp_step:
        try:
            fsdp_step(args.fsdp_step)
        except Exception:
            (args.fsdp_step / "error.txt").write_text(traceback.format_exc())
            raise

    args.deadline, args.size = time.monotonic() + args.budget_seconds, TINY if args.tiny else FULL
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    head = f"{hardware()}, transformers {transformers.__version__}{', tiny' if args.tiny else ''}"
    sections, waiting = {}, list(args.only)
    while waiting:
        name = waiting.pop(0)
        print(f"{name} ...", file=sys.stderr, flush=True)
        sections[name] = run_section(name, args)
        if waiting and is_broken():
            sections |= run_elsewhere(waiting, args)
            waiting = []
        args.output.write_text(json.dumps({"head": head, "tiny": args.tiny, "sections": sections}, indent=1) + "\n")
    print(f"{head}\n{table(sections)}")


if __name__ == "__main__":
    main()
