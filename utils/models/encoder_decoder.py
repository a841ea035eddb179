"""The summarizer: building, loading and saving an encoder-decoder, its forward pass, loss and generation.

A source is one or more token sequences. The encoder reads each sequence separately, and the decoder attends to the
tokens of all sequences of an example (Fusion-in-Decoder). Concatenated passages are the case of one sequence.
"""

from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from utils.errors import UsageError
from utils.fast.beam_search import beam_search
from utils.fast.cpu import FunctionalDropout, Linear, laid_out_weights, use_fast_layers
from utils.fast.packing import laid_as_now, laid_end_to_end, remove_padding_of_both
from utils.models.losses import label_smoothed_loss, vocabulary_loss
from utils.models.settings import checkpoint_layers, load_error
from utils.models.sources import tokens_per_example
from utils.models.tokenizer import check_length, check_vocabulary

# most tokens, padding included, that generation encodes at once; fewer on a CPU, to fit its cache
ENCODED_ON_CPU, ENCODED_ON_GPU = 2048, 8192


def build_small_bart(
    tokenizer, *, d_model: int = 128, layers: int = 2, heads: int = 8, dropout: float = 0.0
) -> BartForConditionalGeneration:
    """A BART of about a million parameters with random weights, which learns to copy within minutes on a CPU.

    Position embeddings start as sinusoids (Vaswani et al., 2017, arXiv:1706.03762): from these, attending to the next
    token is learned quickly.
    """
    init_std = 0.06  # suits this width; BART's 0.02 is made for d_model 768
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


def load_model_and_tokenizer(
    name_or_path: str,
    dropout: float | None = None,
    name: str = "--model_name_or_path",
    trust_remote_code: bool = False,
):
    """Loads an encoder-decoder and its tokenizer from a folder or the Hub; a UsageError names the flag `name`."""
    if Path(name_or_path).is_dir() and not Path(name_or_path, "config.json").exists():
        raise UsageError(
            f"{name} {name_or_path}: this folder holds no model; train_summarize.py writes it at the end of training"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code)
        for entry in ("dropout", "dropout_rate"):  # as BART and T5 call it
            if dropout is not None and hasattr(config, entry):
                setattr(config, entry, dropout)
        model = AutoModelForSeq2SeqLM.from_pretrained(
            name_or_path, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # libraries raise errors of many kinds for files that they cannot use
        message = f"{name} {name_or_path}: no encoder-decoder model could be loaded: {load_error(error)}"
        raise UsageError(message) from error
    check_vocabulary(tokenizer, model, f"{name} {name_or_path}")
    return model, tokenizer


def check_lengths(model, max_source_length: int, max_target_length: int, max_new_tokens: int) -> None:
    """Raises UsageError if a flag asks for more tokens than the model's encoder or decoder has positions for."""
    check_length(model.get_encoder(), "max_source_length", max_source_length)
    check_length(model.get_decoder(), "max_target_length", max_target_length)
    check_length(model.get_decoder(), "max_new_tokens", max_new_tokens)


class Summarizer(nn.Module):
    """Fusion-in-Decoder (Izacard and Grave, 2021, arXiv:2007.01282) around any encoder-decoder of Transformers.

    It adds no parameters: `.model` can be saved and loaded without this class.
    """

    def __init__(self, model, gradient_checkpointing: bool = False):
        super().__init__()
        self.model = model
        if gradient_checkpointing:
            checkpoint_layers(model, _same_contexts)
        use_fast_layers(model)
        self.is_packed = remove_padding_of_both(model)
        # vocabulary_loss knows a matrix product plus BART's bias
        head, scaled = model.get_output_embeddings(), ("final_logit_softcapping", "logits_scaling", "logit_scale")
        self.has_own_logits = type(head) is not Linear or head.bias is not None
        self.has_own_logits |= any(getattr(model.config, name, None) for name in scaled)

    def forward(self, input_ids, attention_mask, sequences_per_example, labels, label_smoothing_factor=None):
        """Logits (target tokens, vocabulary) at the real target positions, in the order of ``labels[labels != -100]``.

        With `label_smoothing_factor`: their `label_smoothed_loss` instead, with less memory and time.
        """
        real = labels != -100
        vocabulary, states = self.model.get_output_embeddings(), []
        wants_logits = label_smoothing_factor is None or self.has_own_logits
        packs = self.is_packed and bool(real.any())  # a dummy has no target

        # The output layer is by far the widest. It gets real positions only, or a single one for vocabulary_loss.
        def keep_real(module, inputs):
            states.append(inputs[0][0] if packs else inputs[0][real])
            return (states[0][None] if wants_logits else states[0][None, :1],)

        decoder_ids, targets = self._shift_right(labels), real.sum(1).tolist()
        handle = vocabulary.register_forward_pre_hook(keep_real)
        try:
            if packs:  # no layer sees padding
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

    def _shift_right(self, labels) -> torch.Tensor:
        """Decoder inputs: the start token, then the labels without the last one; padding in place of -100.

        Not the models' own method, because mBART's starts with the language code instead.
        """
        config = self.model.config
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, config.pad_token_id)], dim=1)

    def encode(self, input_ids, attention_mask, sequences_per_example):
        """(sequences, tokens) -> (examples, tokens of an example, hidden) and its mask.

        The padding between the sequences of an example is removed.
        """
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if len(sequences_per_example) == len(input_ids):
            return hidden, attention_mask
        tokens = tokens_per_example(attention_mask, sequences_per_example)
        return _pad_states(hidden[attention_mask.bool()].split(tokens))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, sequences_per_example, **generation) -> torch.Tensor:
        """Token ids (examples, generated tokens); `generation` as in Transformers' `generate`.

        Inputs are padded on the right.
        """
        with laid_out_weights(self.model):
            hidden, mask = self._encode_in_parts(input_ids, attention_mask, sequences_per_example)
            return beam_search(self.model, hidden, mask, **generation)

    def _encode_in_parts(self, input_ids, attention_mask, sequences_per_example):
        """Like `encode`, a few sequences at a time, the longest first.

        There is little padding, and memory does not grow with the number of passages.
        """
        lengths = attention_mask.sum(1).tolist()
        longest_first = torch.tensor(sorted(range(len(lengths)), key=lambda i: -lengths[i]))
        states = [None] * len(lengths)
        at_once = (ENCODED_ON_CPU if input_ids.device.type == "cpu" else ENCODED_ON_GPU) // input_ids.shape[1]
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            at_once = len(lengths)  # a model sharded over processes must run equally often on each
        for part in longest_first.split(max(1, at_once)):
            longest = lengths[part[0]]
            hidden = self.model.get_encoder()(
                input_ids=input_ids[part, :longest], attention_mask=attention_mask[part, :longest]
            ).last_hidden_state
            for i, row in zip(part.tolist(), hidden, strict=True):
                states[i] = row[: lengths[i]]
        rows = iter(states)
        return _pad_states([torch.cat(list(islice(rows, count))) for count in sequences_per_example.tolist()])


def _same_contexts() -> tuple:
    """For `checkpoint_layers`: a layer runs again within the sequences and with the dropout of its first run."""
    is_fast = any(isinstance(mode, FunctionalDropout) for mode in _get_current_function_mode_stack())
    return nullcontext(), _both(laid_as_now(), FunctionalDropout() if is_fast else nullcontext())


@contextmanager
def _both(first, second):
    with first, second:
        yield


def _pad_states(examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states of each example, (tokens, hidden) -> (examples, most tokens, hidden) and the attention mask."""
    ones = [example.new_ones(len(example), dtype=torch.long) for example in examples]
    return pad_sequence(examples, batch_first=True), pad_sequence(ones, batch_first=True)


def save_pretrained(summarizer: Summarizer, tokenizer, folder: str | Path, weights: dict) -> None:
    """Writes a folder for `AutoModelForSeq2SeqLM` and `AutoTokenizer`; `weights` is the summarizer's state dict."""
    weights = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    summarizer.model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
