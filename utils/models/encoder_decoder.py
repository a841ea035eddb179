"""The summarizer: building and loading it, how passages enter it, its loss, and generation.

A source is one or more token sequences. Concatenated passages are one sequence (``concat``); in Fusion-in-Decoder
every passage is a sequence with the query in front (``fid``). The encoder reads each sequence by itself and the decoder
attends to all of an example's tokens at once, so ``concat`` is ``fid`` with a single sequence and one path serves both.
"""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutput

from utils.errors import UsageError
from utils.fast.beam_search import beam_search
from utils.fast.cpu import FunctionalDropout, Linear, laid_out_weights, use_fast_layers
from utils.fast.packing import laid_end_to_end, remove_padding_of_both
from utils.models.losses import label_smoothed_loss, vocabulary_loss
from utils.models.sources import tokens_per_example

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
        examples = hidden[attention_mask.bool()].split(tokens_per_example(attention_mask, sequences_per_example))
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
                sources = tokens_per_example(attention_mask, sequences_per_example)
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


def save_pretrained(summarizer: Summarizer, tokenizer, folder: str | Path, weights: dict) -> None:
    """The folder that `AutoModelForSeq2SeqLM.from_pretrained` and `AutoTokenizer.from_pretrained` load unchanged.

    `weights` is the summarizer's state dict.
    """
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    summarizer.model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
