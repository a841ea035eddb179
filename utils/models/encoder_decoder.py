"""Encoder-decoders as summarizers: building a small one, the forward pass, loss and generation.

A source is one or more token sequences. The encoder reads each sequence separately, and the decoder attends to the
tokens of all sequences of an example (Fusion-in-Decoder). Concatenated passages are the case of one sequence.
"""

import inspect
import warnings
from contextlib import nullcontext
from itertools import islice

import torch
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BartConfig, BartForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from utils.errors import UsageError, in_one_line
from utils.fast.beam_search import beam_search
from utils.fast.cpu import FunctionalDropout, laid_out_weights
from utils.fast.packing import laid_end_to_end, remove_padding_of_both
from utils.models.losses import label_smoothed_loss, vocabulary_loss
from utils.models.settings import Summarizer
from utils.models.sources import tokens_per_example

# most tokens, padding included, that generation encodes at once; fewer on a CPU, to fit its cache
ENCODED_ON_CPU, ENCODED_ON_GPU = 2048, 8192


def build_small_bart(
    tokenizer, *, d_model: int = 128, layers: int = 2, heads: int = 8, dropout: float = 0.0,
    attention_dropout: float = 0.0,
) -> BartForConditionalGeneration:  # fmt: skip
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
        attention_dropout=attention_dropout,
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


def start_token(model, name: str) -> int:
    """The token that the decoder starts with, in training as in `generate`. Raises UsageError if there is none."""
    for config, entry in ((model.generation_config, "decoder_start_token_id"), (model.config, "decoder_start_token_id"),
                          (model.generation_config, "bos_token_id")):  # fmt: skip
        if (token := getattr(config, entry, None)) is not None:
            return token
    raise UsageError(f"{name}: set decoder_start_token_id in its generation_config.json")


class EncoderDecoder(Summarizer):
    """Fusion-in-Decoder (Izacard and Grave, 2021, arXiv:2007.01282) around any encoder-decoder of Transformers.

    It adds no parameters: `.model` can be saved and loaded without this class.
    """

    def __init__(self, model, gradient_checkpointing: bool = False):
        super().__init__(model, gradient_checkpointing)
        # Longformer has a mask of its own
        self.has_global_attention = "global_attention_mask" in inspect.signature(model.get_encoder().forward).parameters
        self.is_packed = not self.has_global_attention and remove_padding_of_both(model)
        self._check_loss()

    @staticmethod
    def lay_out(attention_mask, sequences_per_example, labels, **_) -> dict:
        """What `forward` must know of a batch on the host: lengths, and the places of real tokens.

        Made of a batch in the host's memory, before it goes to a GPU, it saves `forward` from waiting for the GPU.
        """
        real = labels != -100
        return {
            "lengths": attention_mask.sum(1).tolist(), "targets": real.sum(1).tolist(),
            "sources": tokens_per_example(attention_mask, sequences_per_example),
            "read": attention_mask.flatten().nonzero()[:, 0], "written": real.flatten().nonzero()[:, 0],
        }  # fmt: skip

    def forward(
        self, input_ids, attention_mask, sequences_per_example, labels, label_smoothing_factor=None, layout=None
    ):
        """Logits (target tokens, vocabulary) at the real target positions, in the order of ``labels[labels != -100]``.

        With `label_smoothing_factor`: their `label_smoothed_loss` instead, with less memory and time. `layout` is that
        of `lay_out`.
        """
        layout = layout or self.lay_out(attention_mask, sequences_per_example, labels)
        lengths, targets, sources = (layout[name] for name in ("lengths", "targets", "sources"))
        vocabulary, states = self.model.get_output_embeddings(), []
        wants_logits = label_smoothing_factor is None or self.has_own_logits
        packs = self.is_packed and all(targets)  # a dummy has no target, nor has an example without a reference

        # The output layer is by far the widest. It gets real positions only, or a single one for vocabulary_loss.
        def keep_real(module, inputs):
            states.append(inputs[0][0] if packs else _take(inputs[0], layout["written"]))
            return (states[0][None] if wants_logits else states[0][None, :1],)

        decoder_ids = self._shift_right(labels)
        handle = vocabulary.register_forward_pre_hook(keep_real)
        try:
            if packs:  # no layer sees padding
                fast_dropout = FunctionalDropout if labels.device.type == "cpu" and self.training else nullcontext
                with laid_end_to_end(lengths), fast_dropout():
                    hidden = self.model.get_encoder()(input_ids=_take(input_ids, layout["read"])[None])
                with laid_end_to_end(targets, sources), fast_dropout():
                    output = self.model(
                        encoder_outputs=hidden, decoder_input_ids=_take(decoder_ids, layout["written"])[None],
                        use_cache=False,
                    )  # fmt: skip
            else:
                hidden, mask = self.encode(input_ids, attention_mask, sequences_per_example, layout)
                output = self.model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask,
                    decoder_input_ids=decoder_ids, use_cache=False,
                )  # fmt: skip
        finally:
            handle.remove()
        if label_smoothing_factor is None:
            return output.logits[0]
        if wants_logits:
            return label_smoothed_loss(output.logits[0], _take(labels, layout["written"]), label_smoothing_factor)
        bias = getattr(self.model, "final_logits_bias", None)
        labels = _take(labels, layout["written"])
        return vocabulary_loss(states[0], labels, label_smoothing_factor, vocabulary.weight, bias)

    def _shift_right(self, labels) -> torch.Tensor:
        """Decoder inputs: the start token, then the labels without the last one; padding in place of -100.

        Not the models' own method, because mBART's starts with the language code instead.
        """
        first = start_token(self.model, "the model")
        pad = getattr(self.model.config, "pad_token_id", None)
        pad = first if pad is None else pad  # only padding follows it
        start = torch.full_like(labels[:, :1], first)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, pad)], dim=1)

    @torch.no_grad()
    def _check_loss(self) -> None:
        """Raises UsageError if the loss of random examples is not the model's own: for models that were not tried."""
        model, head, was_training, states = self.model, self.model.get_output_embeddings(), self.model.training, []
        ids = torch.randint(model.get_input_embeddings().weight.shape[0], (2, 6),
                            generator=torch.Generator().manual_seed(0)).to(model.device)  # fmt: skip
        mask, labels = torch.ones_like(ids), ids[:, :4].contiguous()
        inputs = {"attention_mask": mask, "decoder_input_ids": self._shift_right(labels)}
        model.eval()
        try:
            with warnings.catch_warnings(action="ignore"):  # an EncoderDecoderModel warns of its loss
                own = model(input_ids=ids, **self._global_attention(ids, mask), **inputs, labels=labels).loss
            handle = head.register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
            try:
                encoded = BaseModelOutput(last_hidden_state=self._read(ids, mask))
                logits = model(encoder_outputs=encoded, **inputs, use_cache=False).logits
            finally:
                handle.remove()
            if states[0].dim() != 3:
                raise ValueError("its output layer reads something else than (examples, tokens, hidden)")
            if not self.has_own_logits:  # as vocabulary_loss computes them
                logits = states[0] @ head.weight.T + getattr(model, "final_logits_bias", 0)
            ours = label_smoothed_loss(logits.flatten(0, 1), labels.flatten(), 0.0)[0] / labels.numel()
            problem = "" if (own - ours).abs() <= 0.01 * own.abs() else f"its own loss is {own:.4f}, here {ours:.4f}"
        except Exception as error:  # models of others may raise anything
            problem = in_one_line(error)
        finally:
            model.train(was_training)
        self.refuse_if(problem)

    def _global_attention(self, input_ids, attention_mask) -> dict:
        """A keyword of Longformer's: the first token and the query see all tokens and are seen by all.

        The query's end is where two separators follow each other (see `Sources`).
        """
        if not self.has_global_attention:
            return {}
        ends, eos = attention_mask < 0, self.model.generation_config.eos_token_id
        for end in eos if isinstance(eos, list) else [eos]:
            ends |= (input_ids == end) & (attention_mask != 0)
        twice = ends[:, :-1] & ends[:, 1:]
        seen_by_all = torch.zeros_like(attention_mask)
        seen_by_all[:, :-1] = (twice.cumsum(1) == 0) & twice.any(1, keepdim=True)
        seen_by_all[:, 0] = 1
        return {"global_attention_mask": seen_by_all}

    def _read(self, input_ids, attention_mask) -> torch.Tensor:
        """The encoder's states, (sequences, tokens, hidden)."""
        options = self._global_attention(input_ids, attention_mask)
        return self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state

    def encode(self, input_ids, attention_mask, sequences_per_example, layout=None):
        """(sequences, tokens) -> (examples, tokens of an example, hidden) and its mask; `layout` as in `lay_out`.

        The padding between the sequences of an example is removed.
        """
        hidden = self._read(input_ids, attention_mask)
        if len(sequences_per_example) == len(input_ids):
            return hidden, attention_mask
        tokens = layout["sources"] if layout else tokens_per_example(attention_mask, sequences_per_example)
        places = layout["read"] if layout else attention_mask.flatten().nonzero()[:, 0]
        return _pad_states(_take(hidden, places).split(tokens))

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, sequences_per_example, **generation) -> torch.Tensor:
        """Generated token ids (examples, tokens); `generation` as in Transformers' `generate`.

        What is not given is taken from the model's generation_config. Inputs are padded on the right.
        """
        own = self.model.generation_config
        if own.encoder_no_repeat_ngram_size or (own.encoder_repetition_penalty or 1) != 1:
            # these look at the source's tokens, and are left to Transformers
            tokens = tokens_per_example(attention_mask, sequences_per_example)
            parts = input_ids[attention_mask.bool()].split(tokens)
            generation["input_ids"] = pad_sequence(parts, batch_first=True, padding_value=own.pad_token_id or 0)
        with laid_out_weights(self.model):
            hidden, mask = self._encode_in_parts(input_ids, attention_mask, sequences_per_example)
            return beam_search(self.model, hidden, mask, **generation)[:, 1:]  # without the start token

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
            hidden = self._read(input_ids[part, :longest], attention_mask[part, :longest])
            for i, row in zip(part.tolist(), hidden, strict=True):
                states[i] = row[: lengths[i]]
        rows = iter(states)
        return _pad_states([torch.cat(list(islice(rows, count))) for count in sequences_per_example.tolist()])


def _take(tensor, places) -> torch.Tensor:
    """(rows, tokens, ...) -> (places, ...), by the place of each token in the flattened batch."""
    return tensor.flatten(0, 1).index_select(0, places)


def _pad_states(examples) -> tuple[torch.Tensor, torch.Tensor]:
    """Encoder states of each example, (tokens, hidden) -> (examples, most tokens, hidden) and the attention mask."""
    ones = [example.new_ones(len(example), dtype=torch.long) for example in examples]
    return pad_sequence(examples, batch_first=True), pad_sequence(ones, batch_first=True)
