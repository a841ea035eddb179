"""Padding removed inside an encoder: the sequences of a batch laid end to end, with attention within each.

`remove_padding(retriever)` hooks the packing around the encoder of a SentenceTransformer: its token-wise layers see
(1, real tokens, hidden), and what goes in and out stays padded (texts, tokens). `remove_padding_of_both(model)` lets an
encoder-decoder take sequences that are `laid_end_to_end`, which must also span whatever computes the forward pass anew,
such as activation checkpointing. Nothing of either is saved with the model.
The idea is that of "Efficient Sequence Packing without Cross-contamination" (Krell et al., 2021, arXiv:2107.02027).
"""

import logging
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from sentence_transformers.sentence_transformer.modules import Transformer
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

logger = logging.getLogger(__name__)
LONGEST_KEPT = 512  # tokens; attention weights of longer sequences are computed anew in the backward pass
NAME = "packed"


@dataclass
class Packing:
    """Where the tokens of a batch lie.

    Attributes:
        shape: (texts, tokens) of the padded batch.
        index: (real tokens,) their places in the flattened padded batch, text by text, in order of length; then, on
            processors, copies of one that round a large batch's number of tokens up, and are a text to themselves.
        real: how many are no such copies.
        lengths: tokens of each text.
        groups: (start, texts, length) of consecutive texts of equal length, few enough for the processor's cache.
        features: the padded batch.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    real: int
    lengths: list[int]
    groups: list[tuple[int, int, int]]
    features: dict = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(texts, tokens, ...) -> (1, real tokens, ...)"""
        return tensor.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(1, real tokens, ...) -> (texts, tokens, ...), zeros as padding."""
        texts, tokens = self.shape
        rows = tensor.new_zeros(texts * tokens, *tensor.shape[2:])
        return rows.index_copy(0, self.index[: self.real], tensor[0, : self.real]).unflatten(0, (texts, tokens))


def plan_packing(attention_mask: torch.Tensor) -> Packing:
    """The packing of a batch whose `attention_mask` (texts, tokens) is 1 at real tokens."""
    texts, tokens = attention_mask.shape
    lengths, order = attention_mask.sum(1).sort(stable=True)
    lengths = lengths.tolist()
    real = attention_mask[order].flatten().nonzero()[:, 0]
    index = order[real // tokens] * tokens + real % tokens
    count = len(index)
    # a new number of rows has oneDNN compile new kernels, milliseconds and a megabyte for each layer
    extra = -count % 64 if count >= 2048 and index.device.type == "cpu" else 0
    index = torch.cat([index, index[-1:].expand(extra)])
    lengths += [extra] * bool(extra)
    groups, start = [], 0
    for length, run in groupby(lengths):
        rest = len(list(run))
        while rest:  # powers of two: oneDNN compiles a kernel for each shape that it meets
            here = 1 << (min(rest, max(1, 128 // max(length, 1))).bit_length() - 1)
            groups.append((start, here, length))
            start, rest = start + here * length, rest - here
    return Packing((texts, tokens), index, count, lengths, groups)


# ----------------------------------------------------------------------------------------------------------------------
# attention within each sequence; queries, keys and values are (tokens, heads, d)


def _split(tensor: torch.Tensor, start: int, texts: int, length: int) -> torch.Tensor:
    """A group's part of (tokens, heads, d) -> (texts * heads, length rounded up, d), zeros as padding."""
    rows = tensor[start : start + texts * length].unflatten(0, (texts, length)).transpose(1, 2)
    # bf16 lengths in steps of 16, so that oneDNN has few kernels to compile
    return pad(rows, (0, 0, 0, -length % 16 if tensor.dtype == torch.bfloat16 else 0)).flatten(0, 1)


def _join(out: torch.Tensor, rows: torch.Tensor, start: int, texts: int, length: int) -> None:
    """The reverse of `_split`, written into `out`."""
    part = out[start : start + texts * length].unflatten(0, (texts, length)).transpose(1, 2)
    part.copy_(rows.unflatten(0, (texts, -1))[:, :, :length])


def _hide(scores: torch.Tensor, queries: int, keys: int, causal: bool, window: int | None) -> None:
    """Fills with minus infinity what a query must not see: padding, later tokens, what lies outside its window."""
    scores[:, :, keys:] = float("-inf")
    if causal or (window and keys > window):
        scores[:, :queries, :keys].masked_fill_(_unseen(queries, causal, window, scores.device), float("-inf"))


def _unseen(length: int, causal: bool, window: int | None, device) -> torch.Tensor:
    """(length, length), true where a token must not see another."""
    ahead = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    return (ahead > 0 if causal else ahead.new_zeros((), dtype=torch.bool)) | (ahead.abs() >= (window or length))


class _Attention(torch.autograd.Function):
    """Softmax attention by matrix products of each group, in which weights stay in the cache; softmax in float32.

    On processors this is several times faster than PyTorch's fused kernel, above all in bf16 and backward. `groups`:
    pairs of a group of queries and the group of keys that they attend to.
    """

    @staticmethod
    def forward(ctx, query, key, value, groups, scale, causal, window):
        out, weights = torch.empty_like(query), []
        keep = any(ctx.needs_input_grad)
        for queries, keys in groups:
            q, k, v = _split(query, *queries), _split(key, *keys), _split(value, *keys)
            scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
            _hide(scores, queries[2], keys[2], causal, window)
            probabilities = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            _join(out, torch.bmm(probabilities, v), *queries)
            if keep:
                weights.append(probabilities)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *weights = ctx.saved_tensors
        for_query, for_key, for_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        for (queries, keys), p in zip(ctx.groups, weights, strict=True):
            q, k, v, g = (
                _split(query, *queries), _split(key, *keys), _split(value, *keys), _split(gradient, *queries)
            )  # fmt: skip
            dp = torch.bmm(g, v.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            _join(for_query, torch.bmm(ds, k), *queries)
            _join(for_key, torch.bmm(ds.transpose(1, 2), q), *keys)
            _join(for_value, torch.bmm(p.transpose(1, 2), g), *keys)
        return for_query, for_key, for_value, None, None, None, None


def _each_by_itself(query, key, value, lengths, key_lengths, scale, causal, window, dropout) -> torch.Tensor:
    """PyTorch's own kernel, one sequence after the other: for dropout, long sequences, and float32 on a GPU."""
    parts = []
    each = (
        tensor.transpose(0, 1)[None].split(of, 2)
        for tensor, of in ((query, lengths), (key, key_lengths), (value, key_lengths))
    )
    for q, k, v in zip(*each, strict=True):
        windowed = window and q.shape[2] > window
        mask = ~_unseen(q.shape[2], causal, window, q.device) if windowed else None
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale
            )
        )
    return torch.cat(parts, 2)[0].transpose(0, 1)


def _attend(query, key, value, lengths, key_lengths, groups, *, scale, causal=False, window=None, dropout=0.0):
    """(tokens, heads, d) -> (tokens, heads, d), each sequence of queries to its own sequence of keys."""
    longest, longest_key = max(lengths), max(key_lengths)
    has_kernel = query.is_cuda and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if has_kernel and query.dtype != torch.float32 and not dropout and not window:
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)
        key_starts = torch.tensor([0, *accumulate(key_lengths)], dtype=torch.int32, device=query.device)
        seen = (-1, 0) if causal else (-1, -1)
        return varlen_attn(query, key, value, starts, key_starts, longest, longest_key, scale=scale, window_size=seen)
    if query.device.type == "cpu" and not dropout and longest * longest_key <= LONGEST_KEPT**2:
        return _Attention.apply(query, key, value, groups, scale, causal, window)
    return _each_by_itself(query, key, value, lengths, key_lengths, scale, causal, window, dropout)


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, packing=None, **options):
    """An attention function of Transformers: (1, heads, tokens, d) -> (1, tokens, heads, d), within each sequence."""
    if packing is None:  # a call that nobody packed
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    window = options.get("sliding_window")
    unknown = [name for name in ("position_bias", "softcap", "s_aux", "cache") if options.get(name) is not None]
    if attention_mask is not None or unknown or getattr(module, "is_causal", False) or query.shape != key.shape:
        raise NotImplementedError(f"attention of {type(module).__name__} cannot be packed")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    groups = [(group, group) for group in packing.groups]
    lengths = packing.lengths
    out = _attend(query, key, value, lengths, lengths, groups, scale=scale, window=window, dropout=dropout)
    return out[None], None


def _mask(*arguments, attention_mask=None, **options):
    # a packed batch comes without a mask; sentence-transformers gives one with every other
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)


# ----------------------------------------------------------------------------------------------------------------------
# around the encoder of a SentenceTransformer


def _pack(transformer, arguments):
    features = arguments[0]
    mask = features.get("attention_mask")
    if mask is None or mask.ndim != 2 or not is_packed(transformer):
        return None
    packing = plan_packing(mask)
    packing.features = features
    packed = {
        name: packing.pack(value) if torch.is_tensor(value) and value.shape == mask.shape else value
        for name, value in features.items()
        if name != "attention_mask"
    }
    places = packing.index[None] % mask.shape[1] + _first_position(transformer.auto_model)
    return ({**packed, "position_ids": places, "packing": packing},)


def _unpack(transformer, arguments, output):
    packing = output.pop("packing", None)
    if packing is None:
        return None
    output |= packing.features  # as they came: ids and mask
    output.pop("position_ids")
    output["token_embeddings"] = packing.unpack(output["token_embeddings"])
    if "all_layer_embeddings" in output:
        output["all_layer_embeddings"] = tuple(map(packing.unpack, output["all_layer_embeddings"]))
    return output


def _first_position(encoder) -> int:
    """0, or for RoBERTa and its kin the position after the padding's id."""
    for module in encoder.modules():
        if isinstance(getattr(module, "padding_idx", None), int) and hasattr(module, "position_embeddings"):
            return module.padding_idx + 1
    return 0


def is_packed(transformer) -> bool:
    """Whether batches go through this sentence-transformers `Transformer` module without their padding."""
    return isinstance(transformer, Transformer) and transformer.auto_model.config._attn_implementation == NAME


@torch.no_grad()
def remove_padding(retriever) -> bool:
    """Packs the batches of a SentenceTransformer's encoder from now on, where that changes nothing in its outputs.

    False, and the batches stay padded, for an encoder whose attention cannot be replaced, and for one that answers
    otherwise on three random texts, longer than its sliding window if it has one.
    """
    transformer = retriever[0]
    if not isinstance(transformer, Transformer) or transformer.modality_config.keys() != {"text"}:
        return False
    encoder, config = transformer.auto_model, transformer.auto_model.config
    if not encoder.is_backend_compatible() or not hasattr(config, "vocab_size"):
        return False
    before, was_training = config._attn_implementation, transformer.training
    longest = 2 * (getattr(config, "sliding_window", None) or 0) + 40
    longest = min(longest, getattr(config, "max_position_embeddings", longest + 8) - 8)
    mask = (torch.arange(longest) < torch.tensor([[longest], [5], [20]])).long()
    ids = torch.randint(
        config.vocab_size // 2, config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)
    )
    features = {"input_ids": ids.to(encoder.device), "attention_mask": mask.to(encoder.device)}
    transformer.eval()
    handles = []
    try:
        expected = transformer(dict(features))["token_embeddings"]
        encoder.set_attn_implementation(NAME)
        if transformer.model_forward_params is not None:  # the names that sentence-transformers hands on
            transformer.model_forward_params |= {"position_ids", "packing"}
        handles = [transformer.register_forward_pre_hook(_pack), transformer.register_forward_hook(_unpack)]
        packed = transformer(dict(features))["token_embeddings"]
        if ((packed - expected)[mask.bool()]).abs().max() <= 1e-4 * expected.abs().max():
            return True
    except Exception as error:  # whatever a foreign model says to it, its batches stay padded
        logger.info("batches stay padded: %s", error)
    finally:
        transformer.train(was_training)
    for handle in handles:
        handle.remove()
    encoder.set_attn_implementation(before)
    return False


# ----------------------------------------------------------------------------------------------------------------------
# encoder-decoders

BOTH = "packed_encoder_decoder"
_now: list[dict[str, list[int]]] = []  # lengths of what is being attended, innermost last


@contextmanager
def laid_end_to_end(lengths: list[int], key_lengths: list[int] | None = None):
    """Within it, attention of an encoder-decoder given to `remove_padding_of_both` is within sequences of `lengths`.

    Its inputs are then (1, sum of lengths). `key_lengths`: those of the encoder's tokens that each sequence of the
    decoder reads.
    """
    _now.append({"self": lengths, "cross": key_lengths or lengths})
    try:
        yield
    finally:
        _now.pop()


def _attention_of_both(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    if not _now:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    if options.get("position_bias") is not None:
        raise NotImplementedError(f"attention of {type(module).__name__} cannot be packed")
    causal = bool(getattr(module, "is_causal", False))
    lengths = _now[-1]["self"]
    key_lengths = lengths if causal else _now[-1]["cross"]
    groups = [((start, 1, length), (key_start, 1, key_length)) for start, length, key_start, key_length in zip(
        accumulate([0, *lengths]), lengths, accumulate([0, *key_lengths]), key_lengths, strict=False)]  # fmt: skip
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _attend(query, key, value, lengths, key_lengths, groups, scale=scale, causal=causal, dropout=dropout)
    return out[None], None


def _mask_of_both(*arguments, **options):
    return None if _now else sdpa_mask(*arguments, **options)


AttentionInterface.register(BOTH, _attention_of_both)
AttentionMaskInterface.register(BOTH, _mask_of_both)


def _ask_for_all_positions(module, arguments, options):
    if not _now:
        return None
    longest = max(_now[-1]["self"])
    first, *others = arguments
    first = first.new_zeros(1, longest) if torch.is_tensor(first) else (1, longest)
    return (first, *others), {name: value for name, value in options.items() if name != "position_ids"}


def _take_each_position(module, arguments, output):
    if not _now:
        return None
    places = torch.cat([torch.arange(length, device=output.device) for length in _now[-1]["self"]])
    return output[..., places, :]


@torch.no_grad()
def remove_padding_of_both(model) -> bool:
    """Makes an encoder-decoder take sequences that are `laid_end_to_end`; with others it does what it did.

    False, and nothing is changed, for a model whose attention or positions cannot be replaced, and for one that answers
    otherwise on three random examples.
    """
    encoder, decoder, config = model.get_encoder(), model.get_decoder(), model.config
    positions = [getattr(stack, "embed_positions", None) for stack in (encoder, decoder)]
    if None in positions or not hasattr(config, "vocab_size"):
        return False
    before, was_training, handles = config._attn_implementation, model.training, []
    generator = torch.Generator().manual_seed(0)
    lengths, targets = [9, 3, 6], [4, 7, 2]
    ids, labels = (torch.randint(3, config.vocab_size, (3, 9), generator=generator).to(model.device) for _ in range(2))
    mask = torch.arange(9, device=model.device) < torch.tensor(lengths, device=model.device)[:, None]
    real = torch.arange(9, device=model.device) < torch.tensor(targets, device=model.device)[:, None]
    model.eval()
    try:
        expected = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=labels).logits[real]
        for module in positions:
            handles.append(module.register_forward_pre_hook(_ask_for_all_positions, with_kwargs=True))
            handles.append(module.register_forward_hook(_take_each_position))
        model.set_attn_implementation(BOTH)
        with laid_end_to_end(lengths):
            hidden = encoder(input_ids=ids[mask][None])
        with laid_end_to_end(targets, lengths):
            packed = model(encoder_outputs=hidden, decoder_input_ids=labels[real][None], use_cache=False).logits[0]
        if (packed - expected).abs().max() <= 1e-4 * expected.abs().max():
            return True
    except Exception as error:  # whatever a foreign model says to it, its batches stay padded
        logger.info("batches stay padded: %s", error)
    finally:
        model.train(was_training)
    for handle in handles:
        handle.remove()
    model.set_attn_implementation(before)
    return False
