"""Padding removed inside an encoder: the sequences of a batch laid end to end, with attention within each.

`remove_padding(retriever)` hooks the packing around the encoder of a SentenceTransformer: its token-wise layers see
(1, real tokens, hidden), and what goes in and out stays padded (texts, tokens). Nothing of it is saved with the model.
The idea is that of "Efficient Sequence Packing without Cross-contamination" (Krell et al., 2021, arXiv:2107.02027).
"""

import logging
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from sentence_transformers.sentence_transformer.modules import Transformer
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None

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


def _outside(window: int, length: int, device) -> torch.Tensor:
    """(length, length), true where a token lies outside another's sliding window."""
    places = torch.arange(length, device=device)
    return (places[:, None] - places).abs() >= window


class _Attention(torch.autograd.Function):
    """Softmax attention by matrix products of each group, in which weights stay in the cache; softmax in float32.

    On processors this is several times faster than PyTorch's fused kernel, above all in bf16 and backward.
    """

    @staticmethod
    def forward(ctx, query, key, value, groups, scale, window):
        out, weights = torch.empty_like(query), []
        keep = any(ctx.needs_input_grad)
        for group in groups:
            length = group[2]
            q, k, v = (_split(tensor, *group) for tensor in (query, key, value))
            scores = torch.baddbmm(q.new_empty(1, 1, 1), q, k.transpose(1, 2), beta=0, alpha=scale)
            scores[:, :, length:] = float("-inf")
            if window and length > window:
                scores[:, :length, :length].masked_fill_(_outside(window, length, q.device), float("-inf"))
            probabilities = scores.softmax(-1, dtype=torch.float32).to(q.dtype)
            _join(out, torch.bmm(probabilities, v), *group)
            if keep:
                weights.append(probabilities)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.groups, ctx.scale = groups, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, *weights = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]
        for group, p in zip(ctx.groups, weights, strict=True):
            q, k, v, g = (_split(tensor, *group) for tensor in (query, key, value, gradient))
            dp = torch.bmm(g, v.transpose(1, 2))
            ds = torch.ops.aten._softmax_backward_data(dp, p, -1, p.dtype).mul_(ctx.scale)
            for out, rows in zip(
                gradients,
                (torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), g)),
                strict=True,
            ):
                _join(out, rows, *group)
        return *gradients, None, None, None


def _each_by_itself(query, key, value, lengths, scale, window, dropout) -> torch.Tensor:
    """PyTorch's own kernel, one sequence after the other: for dropout, long sequences, and float32 on a GPU."""
    parts = []
    for q, k, v in zip(
        *(tensor.transpose(0, 1)[None].split(lengths, 2) for tensor in (query, key, value)), strict=True
    ):
        mask = ~_outside(window, q.shape[2], q.device) if window and q.shape[2] > window else None
        parts.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale))
    return torch.cat(parts, 2)[0].transpose(0, 1)


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
    longest = max(packing.lengths)
    if varlen_attn and query.is_cuda and query.dtype != torch.float32 and not dropout and not window:
        starts = torch.tensor([0, *accumulate(packing.lengths)], dtype=torch.int32, device=query.device)
        out = varlen_attn(query, key, value, starts, starts, longest, longest, scale=scale)
    elif query.device.type == "cpu" and not dropout and longest <= LONGEST_KEPT:
        out = _Attention.apply(query, key, value, packing.groups, scale, window)
    else:
        out = _each_by_itself(query, key, value, packing.lengths, scale, window, dropout)
    return out[None], None


def _mask(*arguments, attention_mask=None, **options):
    # a packed batch comes without a mask; sentence-transformers gives one with every other
    return None if attention_mask is None else sdpa_mask(*arguments, attention_mask=attention_mask, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)


# ----------------------------------------------------------------------------------------------------------------------
# around the encoder


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
    if not encoder.is_backend_compatible():
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
