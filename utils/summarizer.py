"""The summarizer: building and loading it, how passages enter it, its loss, and generation.

A source is one or more token sequences. Concatenated passages are one sequence (``concat``); in Fusion-in-Decoder
every passage is a sequence with the query in front (``fid``). The encoder reads each sequence by itself and the decoder
attends to all of an example's tokens at once, so ``concat`` is ``fid`` with a single sequence and one path serves both.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BatchEncoding,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput

from utils.arguments import UsageError, saved_arguments
from utils.cpu import FunctionalDropout, Linear, laid_out_weights, multiply, use_fast_layers
from utils.generation import beam_search
from utils.packing import laid_end_to_end, remove_padding_of_both
from utils.tokenizer import tokenize

# tokens, with their padding, in generation: few on processors, whose cache they should fit
ENCODED_ON_CPU, ENCODED_AT_ONCE = 2048, 8192


def build_small_bart(
    tokenizer, *, d_model: int = 128, layers: int = 2, heads: int = 8, dropout: float = 0.0
) -> BartForConditionalGeneration:
    """A BART of about a million parameters with random weights, that learns to copy within minutes on a processor.

    Weights start at the width's own scale rather than at 0.02, made for d_model 768, and positions start as sinusoids
    (Vaswani et al., 2017, arXiv:1706.03762), from which attending to the next token is quickly learned.
    """
    init_std = 0.06
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=d_model,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=4 * d_model,
        decoder_ffn_dim=4 * d_model,
        max_position_embeddings=1024,
        dropout=dropout,
        init_std=init_std,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    model = BartForConditionalGeneration(config)
    for stack in (model.model.encoder, model.model.decoder):
        weight = stack.embed_positions.weight
        angles = torch.arange(len(weight))[:, None] / 10000 ** (torch.arange(0, d_model, 2) / d_model)
        weight.data.copy_(torch.cat([angles.sin(), angles.cos()], dim=1) * init_std * 2**0.5)
    return model


def load_model_and_tokenizer(name_or_path: str, dropout: float | None = None, name: str = "--model_name_or_path"):
    """A pretrained encoder-decoder and its tokenizer from a folder or the Hub.

    Raises a UsageError that names the flag `name` if there is none.
    """
    if Path(name_or_path).is_dir() and not Path(name_or_path, "config.json").exists():
        raise UsageError(f"{name} {name_or_path}: no model in this folder; a run writes it when its training is done")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
        config = AutoConfig.from_pretrained(name_or_path)
        for name in ("dropout", "dropout_rate"):  # BART's and T5's
            if dropout is not None and hasattr(config, name):
                setattr(config, name, dropout)
        model = AutoModelForSeq2SeqLM.from_pretrained(name_or_path, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{name} {name_or_path}: no encoder-decoder model could be loaded: {str(error).strip().splitlines()[0]}"
        ) from error
    return model, tokenizer


@dataclass
class Sources:
    """Turns a query and ranked passages into a source: a list of token sequences.

    `fusion` is "concat" or "fid". Sequences hold at most `max_source_length` tokens, special tokens included; a query
    takes at most half of it. With concat, passages are taken in rank order until the sequence is full, the last one
    cut short, and then stand in rank or document order as `passage_order` says ("rank" or "document").
    """

    tokenizer: object
    fusion: str
    max_source_length: int
    passage_order: str

    def __post_init__(self):
        self.passage_tokens: dict = {}  # a document is tokenized once, however many its queries
        tokenizer = self.tokenizer
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.separator = [separator]
        bare, whole = _tokenize(tokenizer, ["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.prefix, self.suffix = whole[:start], whole[start + len(bare) :]
        self.room = self.max_source_length - len(self.prefix) - len(self.suffix)

    def read(self, documents) -> None:
        """Tokenizes documents, each once, together: what is kept on disk is then read at once."""
        documents = [document for document in dict.fromkeys(documents) if document not in self.passage_tokens]
        tokens = iter(_tokenize(self.tokenizer, [text for document in documents for text in document.passages]))
        for document in documents:
            self.passage_tokens[document] = [next(tokens) for _ in document.passages]

    def build(self, query: str, document, passage_numbers: list[int]) -> tuple[list[list[int]], list[int]]:
        """The sequences, and the numbers of the passages that they hold, in their order."""
        if document not in self.passage_tokens:
            self.read([document])
        passages = self.passage_tokens[document]
        query_tokens = _tokenize(self.tokenizer, [query])[0][: self.room // 2] if query else []
        kept, free = [], self.room - len(query_tokens)
        for number in passage_numbers:
            room = free - len(self.separator)
            if room <= 0 and kept:
                break
            kept.append((number, passages[number][: max(room, 0)]))
            if self.fusion == "concat":
                free -= len(self.separator) + len(kept[-1][1])
        if self.passage_order == "document":
            kept.sort()
        if self.fusion == "concat":
            texts = [[query_tokens, *(passage for _, passage in kept)]]
        else:
            texts = [[query_tokens, passage] for _, passage in kept]
        bodies = [self.join(text) for text in texts]
        return [self.prefix + body + self.suffix for body in bodies], [number for number, _ in kept]

    def join(self, texts: list[list[int]]) -> list[int]:
        """Token sequences with a separator between them; empty ones are left out."""
        texts = [text for text in texts if text]
        return [token for text in texts for token in self.separator + text][len(self.separator) :]


def _tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenize(tokenizer, texts, add_special_tokens=False, verbose=False)


def collate(sources: list[list[list[int]]], targets: list[list[int]], pad_token_id: int) -> BatchEncoding:
    """Pads sources and targets into the keyword arguments of `Summarizer.forward`.

    `input_ids` and `attention_mask` are (sequences, tokens): all examples' sequences one below the other;
    `sequences_per_example` is (examples,), `labels` (examples, target tokens) with -100 as padding.
    """
    sequences = [torch.tensor(sequence) for source in sources for sequence in source]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
        "sequences_per_example": torch.tensor([len(source) for source in sources]),
    }
    labels = [torch.tensor(target) for target in targets]
    batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return BatchEncoding(batch)


def halves(batches: list[dict]) -> list[dict]:
    """Each batch as two with half of its examples; [] if none has more than one example."""
    parts = []
    for batch in batches:
        middle = len(batch["labels"]) // 2
        sequences = int(batch["sequences_per_example"][:middle].sum())
        cut = {name: sequences if name in ("input_ids", "attention_mask") else middle for name in batch}
        parts += [BatchEncoding({name: rows[: cut[name]] for name, rows in batch.items()})] if middle else []
        parts += [BatchEncoding({name: rows[cut[name] :] for name, rows in batch.items()})]
    return parts if len(parts) > len(batches) else []


class Summarizer(nn.Module):
    """Any encoder-decoder of Transformers, reading one or more sequences for each example.

    Fusion-in-Decoder (Izacard and Grave, 2021, arXiv:2007.01282). It adds no parameter: `.model` saves as it is.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model
        use_fast_layers(model)
        self.is_packed = remove_padding_of_both(model)
        head, capped = model.get_output_embeddings(), ("final_logit_softcapping", "logits_scaling", "logit_scale")
        # whether logits are more than a product of matrices and BART's bias, or the weights out of reach between layers
        self.has_own_logits = type(head) is not Linear or head.bias is not None or is_deepspeed_zero3_enabled()
        self.has_own_logits |= any(getattr(model.config, name, None) for name in capped)

    def encode(self, input_ids, attention_mask, sequences_per_example):
        """(sequences, tokens) -> (examples, tokens of an example, hidden) and its mask.

        An example's sequences are laid end to end without the padding between them, so that the decoder attends to
        real tokens only.
        """
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if len(sequences_per_example) == len(input_ids):
            return hidden, attention_mask
        examples = hidden[attention_mask.bool()].split(_tokens_per_example(attention_mask, sequences_per_example))
        hidden = nn.utils.rnn.pad_sequence(examples, batch_first=True)
        ones = [torch.ones(len(example), dtype=attention_mask.dtype, device=hidden.device) for example in examples]
        return hidden, nn.utils.rnn.pad_sequence(ones, batch_first=True)

    def forward(self, input_ids, attention_mask, sequences_per_example, labels, label_smoothing_factor=None):
        """Logits (target tokens, vocabulary) at the real target positions, in the order of ``labels[labels != -100]``.

        With `label_smoothing_factor`, their `label_smoothed_loss` instead, in less memory and time. The vocabulary is
        by far the widest layer: padded positions never reach it, and for the loss its output is not kept.
        """
        real = labels != -100
        vocabulary, states = self.model.get_output_embeddings(), []
        wants_logits = label_smoothing_factor is None or self.has_own_logits
        packs = self.is_packed and bool(real.any())  # not a dummy, which has no target

        def keep_real(module, inputs):
            states.append(inputs[0][0] if packs else inputs[0][real])
            return (states[0][None] if wants_logits else states[0][None, :1],)

        decoder_ids, targets = self.shift_right(labels), real.sum(1).tolist()
        handle = vocabulary.register_forward_pre_hook(keep_real)
        try:
            if packs:  # all sequences end to end, so that no layer sees padding
                lengths = attention_mask.sum(1).tolist()
                sources = _tokens_per_example(attention_mask, sequences_per_example)
                fast_dropout = FunctionalDropout if labels.device.type == "cpu" and self.training else nullcontext
                with laid_end_to_end(lengths), fast_dropout():
                    hidden = self.model.get_encoder()(input_ids=input_ids[attention_mask.bool()][None])
                with laid_end_to_end(targets, sources), fast_dropout():
                    output = self.model(
                        encoder_outputs=hidden, decoder_input_ids=decoder_ids[real][None], use_cache=False
                    )
            else:
                hidden, mask = self.encode(input_ids, attention_mask, sequences_per_example)
                output = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask,
                    decoder_input_ids=decoder_ids, use_cache=False,
                )  # fmt: skip
        finally:
            handle.remove()
        if label_smoothing_factor is None:
            return output.logits[0]
        if wants_logits:
            return label_smoothed_loss(output.logits[0], labels[real], label_smoothing_factor)
        bias = getattr(self.model, "final_logits_bias", None)
        return vocabulary_loss(states[0], labels[real], label_smoothing_factor, vocabulary.weight, bias)

    def shift_right(self, labels) -> torch.Tensor:
        """Decoder inputs: the start token, then the labels but the last; padding in place of -100."""
        config = self.model.config
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, sequences_per_example, **generation) -> torch.Tensor:
        """Token ids (examples, generated tokens); `generation` as in Transformers' `generate`.

        Sequences are padded on their right. They are encoded in order of length and in parts, so that there is little
        padding among them and that memory does not grow with the number of passages; the search is `beam_search`.
        """
        with laid_out_weights(self.model):
            hidden, mask = self._encode_in_parts(input_ids, attention_mask, sequences_per_example)
            return beam_search(self.model, hidden, mask, **generation)

    def _encode_in_parts(self, input_ids, attention_mask, sequences_per_example):
        """What `encode` returns, the longest sequences first, some at a time."""
        lengths = attention_mask.sum(1).tolist()
        longest_first = torch.tensor(sorted(range(len(lengths)), key=lambda i: -lengths[i]))
        states = [None] * len(lengths)
        at_once = max(1, (ENCODED_ON_CPU if input_ids.device.type == "cpu" else ENCODED_AT_ONCE) // input_ids.shape[1])
        # at once where layers are sharded over processes, which must then run them equally often
        is_sharded = any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        for part in longest_first.split(len(lengths) if is_sharded else at_once):
            longest = lengths[part[0]]
            hidden = self.model.get_encoder()(
                input_ids=input_ids[part, :longest], attention_mask=attention_mask[part, :longest]
            ).last_hidden_state
            for i, row in zip(part.tolist(), hidden, strict=True):
                states[i] = row[: lengths[i]]
        starts = [0, *sequences_per_example.cumsum(0).tolist()]
        examples = [torch.cat(states[start:end]) for start, end in pairwise(starts)]
        hidden = nn.utils.rnn.pad_sequence(examples, batch_first=True)
        tokens = torch.tensor([len(example) for example in examples], device=hidden.device)
        return hidden, (torch.arange(hidden.shape[1], device=hidden.device) < tokens[:, None]).long()


def _tokens_per_example(attention_mask, sequences_per_example) -> list[int]:
    tokens = attention_mask.sum(1).tolist()
    starts = [0, *sequences_per_example.cumsum(0).tolist()]
    return [sum(tokens[start:end]) for start, end in pairwise(starts)]


def label_smoothed_loss(logits, targets, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed label-smoothed cross entropy and the summed plain one, in nats; logits (tokens, vocabulary).

    Smoothing spreads its share over the whole vocabulary (Szegedy et al., 2016, arXiv:1512.00567).
    """
    log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
    nll = -log_probabilities.gather(1, targets[:, None]).sum()
    uniform = -log_probabilities.mean(-1).sum()
    return (1 - smoothing) * nll + smoothing * uniform, nll.detach()


def vocabulary_loss(hidden, targets, smoothing: float, weight, bias=None) -> tuple[torch.Tensor, torch.Tensor]:
    """`label_smoothed_loss` of ``hidden @ weight.T + bias``, of which a part exists at any time.

    The gradient is made along with the loss, in chunks of tokens, so that logits are computed once and never kept
    (Hsu et al., 2024, arXiv:2410.10989). hidden (tokens, width), weight (vocabulary, width), bias (1, vocabulary).
    """
    # autograd says what needs a gradient even where none is made, and nothing of that within the function
    return _VocabularyLoss.apply(hidden, targets, smoothing, weight, bias, torch.is_grad_enabled())


class _VocabularyLoss(torch.autograd.Function):
    LOGITS = 2**25  # in a chunk at most

    @staticmethod
    def forward(ctx, hidden, targets, smoothing, weight, bias, with_gradient):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        low_hidden, low_weight = hidden.to(dtype), weight.to(dtype)
        nll, uniform = hidden.new_zeros((), dtype=torch.float32), hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=torch.float32) if with_gradient else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if with_gradient else None
        scale = 2**10 if dtype == torch.float16 else 1  # in which the gradient of what is well predicted would vanish
        size = max(1, _VocabularyLoss.LOGITS // len(weight))
        for start in range(0, len(hidden), size):
            rows, labels = low_hidden[start : start + size], targets[start : start + size]
            logits = multiply(rows, low_weight.T)
            if bias is not None:
                logits = logits + bias
            log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
            nll -= log_probabilities.gather(1, labels[:, None]).sum()
            uniform -= log_probabilities.mean(-1).sum()
            if with_gradient:
                gradient = log_probabilities.exp_().sub_(smoothing / len(weight))
                gradient[torch.arange(len(labels), device=labels.device), labels] -= 1 - smoothing
                gradient = gradient.mul_(scale).to(dtype) if scale > 1 else gradient.to(dtype)
                grad_hidden[start : start + size] = multiply(gradient, low_weight)
                grad_weight += multiply(gradient.T, rows)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.scale, ctx.dtypes = scale, (hidden.dtype, weight.dtype)
        ctx.mark_non_differentiable(nll)
        return (1 - smoothing) * nll + smoothing * uniform, nll

    @staticmethod
    def backward(ctx, outer, _):
        for_hidden, for_weight = (
            gradient.mul_(outer / ctx.scale).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return for_hidden, None, None, for_weight, None, None


@torch.no_grad()
def passage_likelihoods(folder, examples, candidates, accelerator, *, batch_size: int = 16) -> list[np.ndarray]:
    """How likely a trained summarizer finds each example's references, given its query and each candidate alone.

    For each example (candidates,) the mean log-likelihood in nats of a reference's token, and of that the mean over
    the references; a candidate is a passage number, or a list of them that are read together. The work is divided over
    the processes, the result on all of them.
    """
    pretrained, tokenizer = load_model_and_tokenizer(folder, name="--teacher")
    summarizer = Summarizer(pretrained).to(accelerator.device).eval()
    saved = saved_arguments(folder)
    sources = Sources(tokenizer, "concat", saved.get("max_source_length", 512), "rank")
    rows = []  # example, candidate, source, target
    for number, (example, passages) in enumerate(zip(examples, candidates, strict=True)):
        targets = tokenizer(text_target=example.summaries, truncation=True,
                            max_length=saved.get("max_target_length", 128))["input_ids"]  # fmt: skip
        for place, passage in enumerate(passages):
            numbers = passage if isinstance(passage, list) else [passage]
            source = sources.build(example.query, example.document, numbers)[0]
            rows += [(number, place, source, target) for target in targets]
    rows.sort(key=lambda row: (-len(row[2][0]), -len(row[3])))
    batches = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    found = []
    for batch in batches[accelerator.process_index :: accelerator.num_processes]:
        inputs = collate([row[2] for row in batch], [row[3] for row in batch], tokenizer.pad_token_id)
        labels = inputs["labels"].to(accelerator.device)
        with accelerator.autocast():
            logits = summarizer(**inputs.to(accelerator.device))
        real = labels != -100
        tokens = torch.zeros(labels.shape, device=labels.device)
        log_probabilities = logits.log_softmax(-1, dtype=torch.float32)
        tokens[real] = log_probabilities.gather(1, labels[real][:, None])[:, 0]
        means = (tokens.sum(1) / real.sum(1)).tolist()
        found += [(number, place, mean) for (number, place, _, _), mean in zip(batch, means, strict=True)]
    if accelerator.num_processes > 1:
        found = gather_object(found)
    totals = [np.zeros(len(passages)) for passages in candidates]
    for number, place, mean in sorted(found):
        totals[number][place] += mean / len(examples[number].summaries)
    return totals


def save_pretrained(summarizer: Summarizer, tokenizer, folder: str | Path, weights: dict) -> None:
    """The folder that `AutoModelForSeq2SeqLM.from_pretrained` and `AutoTokenizer.from_pretrained` load unchanged.

    `weights` is the summarizer's state dict.
    """
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    summarizer.model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
