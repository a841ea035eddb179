"""Removes padding inside a model: the sequences of a batch lie end to end, and each attends to itself only.

All layers other than attention see (1, real tokens, hidden). The idea is that of "Efficient Sequence Packing without
Cross-contamination" (Krell et al., 2021, arXiv:2107.02027). Nothing of it is saved with the model.

* `remove_padding(retriever)`: for the model of a SentenceTransformer, be it an encoder or decoder-only. Its inputs and
  outputs stay padded. Only on a CPU, and only before pooling, outputs are flat, as sentence-transformers can pool them.
* `remove_padding_of_classifier(reranker)`: for the encoder of a CrossEncoder.
* `remove_padding_of_both(model)`: for an encoder-decoder, which then accepts sequences within `laid_end_to_end`.
* `remove_padding_of_decoder(model)`: the same for a decoder-only language model.

Leans on these internals. PyTorch: `varlen_attn`, `torch.ops.aten._softmax_backward_data`. Transformers:
`AttentionInterface`, `AttentionMaskInterface`, `sdpa_attention_forward`, `sdpa_mask`, `eager_mask`,
`config._attn_implementation` and `_attn_implementation_internal`, `is_backend_compatible`; the
`eager_attention_forward` in a model's own file; that masks are asked for their window as `local_size`; that models hand
unknown keyword arguments (`packing`) down to the attention function; and the `embed_positions` of BART-like models.
Sentence-transformers: the attributes `auto_model`, `modality_config` and `model_forward_params` of its `Transformer`,
and that its pooling understands `cu_seq_lens_q`. Where one of these has changed, batches stay padded.
"""

import inspect
import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, groupby

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from utils.fast.internals import EFFECTS, find, has, in_one_line, missing, warn, works

# None in a version that has none: then nothing is packed (see `internals`)
varlen_attn = find("torch.nn.attention.varlen.varlen_attn")
sdpa_attention_forward = find("transformers.integrations.sdpa_attention.sdpa_attention_forward")
sdpa_mask, eager_mask = (find(f"transformers.masking_utils.{name}") for name in ("sdpa_mask", "eager_mask"))

logger = logging.getLogger(__name__)
NAME, BOTH = "packed", "packed_encoder_decoder"  # attention functions: of retrievers, and of encoder-decoders
LONGEST_CHECKED = 600  # tokens of a random sequence on which a model with a sliding window is tried
LONGEST_KEPT = 512  # tokens; longer sequences use PyTorch's kernel, which does not keep attention weights
# newer versions of PyTorch
HAS_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters
# model types that can be packed: if one cannot, a library has changed
TYPES = ("bart", "bert", "blenderbot", "deepseek_v3", "distilbert", "gemma2", "gemma3_text", "gpt2", "llama", "marian",
         "mbart", "mistral", "mixtral", "modernbert", "pegasus", "qwen2", "qwen3", "roberta")  # fmt: skip
STEP = 16  # lengths are rounded up to a multiple, because oneDNN compiles a kernel for each new shape

# ---- attention within sequences

_met: set[tuple] = set()  # sizes of heads and values, windows and caps of scores that attention was called with


@dataclass
class Layout:
    """Order of the rows for attention on a CPU: heads apart, lengths rounded up, sequences of equal length together.

    Attributes:
        groups: sequences that are computed together, few enough for the CPU's cache. Each group is (first query row,
            first key row, sequences * key heads, queries * query heads of a key head, keys, bias that hides the
            padding of the keys or None).
        rows, key_rows: (laid out rows,), the index of each in (tokens * heads, d).
        places, key_places: (tokens * heads,), the inverse: where each row was laid out.
        padding: indices of the laid out query rows that are padding.
    """

    groups: list[tuple[int, int, int, int, int, torch.Tensor | None]]
    rows: torch.Tensor
    key_rows: torch.Tensor
    places: torch.Tensor
    key_places: torch.Tensor
    padding: torch.Tensor


def lay_out(lengths: list[int], key_lengths: list[int], heads: int, key_heads: int | None = None) -> Layout:
    """Layout of sequences of queries that lie end to end, each with its own sequence of keys.

    With fewer `key_heads` (default: `heads`), each is read by as many query heads in a row.
    """
    key_heads = key_heads or heads
    pairs = list(zip(lengths, key_lengths, strict=True))
    if any(keys and not length for length, keys in pairs):
        raise ValueError("a sequence without a query has keys")
    shapes = [(-(-length // STEP) * STEP, -(-keys // STEP) * STEP) for length, keys in pairs]
    starts, key_starts = np.cumsum([0, *lengths]), np.cumsum([0, *key_lengths])
    groups, rows, key_rows, real, key_real = [], [], [], [], []
    at = key_at = 0
    by_shape = sorted((i for i, length in enumerate(lengths) if length), key=shapes.__getitem__)
    for (longest, longest_key), run in groupby(by_shape, key=shapes.__getitem__):
        run = list(run)
        while run:
            count = 1 << (min(len(run), max(1, 128 // max(longest, longest_key))).bit_length() - 1)
            part, run = run[:count], run[count:]
            here = _rows(starts[part], np.take(lengths, part), longest, heads)
            there = _rows(key_starts[part], np.take(key_lengths, part), longest_key, key_heads)
            hidden = None
            if not there[1].all():
                hidden = torch.zeros(count * key_heads, 1, longest_key)
                hidden[torch.from_numpy(~there[1]).view(-1, 1, longest_key)] = float("-inf")
            groups.append((at, key_at, count * key_heads, longest * heads // key_heads, longest_key, hidden))
            for every, one in zip((rows, real, key_rows, key_real), (*here, *there), strict=True):
                every.append(one)
            at, key_at = at + len(here[0]), key_at + len(there[0])
    rows, real, key_rows, key_real = map(np.concatenate, (rows, real, key_rows, key_real))
    places, key_places = (np.empty(count, dtype=np.int64) for count in (starts[-1] * heads, key_starts[-1] * key_heads))
    places[rows[real]], key_places[key_rows[key_real]] = real.nonzero()[0], key_real.nonzero()[0]
    tensors = (rows, key_rows, places, key_places, (~real).nonzero()[0])
    return Layout(groups, *map(torch.from_numpy, tensors))


def _rows(starts, lengths, longest: int, heads: int):
    """Rows of some sequences, (sequences * heads * longest,), and which are real; padding repeats the last row."""
    places = np.arange(longest)
    tokens = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
    rows = tokens[:, None, :] * heads + np.arange(heads)[:, None]
    return rows.ravel(), np.broadcast_to((places < lengths[:, None])[:, None], rows.shape).ravel()


def _unseen(length: int, causal: bool, window: int | None, device) -> torch.Tensor:
    """(length, length) bool, True where a query must not see a key."""
    ahead = torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
    return (ahead > 0 if causal else ahead.new_zeros((), dtype=torch.bool)) | (ahead.abs() >= (window or length))


def _softmax_backward(gradient, weights):
    return torch.ops.aten._softmax_backward_data(gradient, weights, -1, weights.dtype)


def _plain_softmax_backward(gradient, weights):
    return weights * (gradient - (gradient * weights).sum(-1, keepdim=True))


_sample = torch.tensor([[0.5, 0.25, 0.25]])
if not works(
    "torch.ops.aten._softmax_backward_data", lambda: _softmax_backward(_sample.square(), _sample),
    _plain_softmax_backward(_sample.square(), _sample), "the gradient of packed attention takes several steps",
):  # fmt: skip
    _softmax_backward = _plain_softmax_backward


class _Attention(torch.autograd.Function):
    """Softmax attention on a CPU by matrix products, group by group, so that the weights fit the cache.

    Several times faster than PyTorch's fused kernel, above all in bfloat16 and in the backward pass.
    """

    @staticmethod
    def forward(ctx, query, key, value, layout, scale, causal, window):
        dtype = query.dtype
        q = query.flatten(0, 1).index_select(0, layout.rows)
        k, v = (tensor.to(dtype).flatten(0, 1).index_select(0, layout.key_rows) for tensor in (key, value))
        out, weights, keep = q.new_empty(len(q), v.shape[1]), [], any(ctx.needs_input_grad)
        with torch.autocast("cpu", enabled=False):
            for (q_g, out_g), (k_g, v_g), hidden in _groups(layout, (q, out), (k, v)):
                bias = q.new_empty(1, 1, 1) if hidden is None else hidden.to(dtype)
                scores = torch.baddbmm(bias, q_g, k_g.transpose(1, 2), beta=float(hidden is not None), alpha=scale)
                length = scores.shape[2]
                if causal or (window and length > window):
                    unseen = _unseen(length, causal, window, scores.device)
                    # not -inf: padding may see no key
                    scores.view(-1, length, length).masked_fill_(unseen, torch.finfo(dtype).min)
                probabilities = scores.softmax(-1)  # computed in float32 for bfloat16 too
                torch.bmm(probabilities, v_g, out=out_g)
                if keep:
                    weights.append(probabilities)
        if keep:
            ctx.save_for_backward(q, k, v, *weights)
        ctx.layout, ctx.scale = layout, scale
        ctx.kinds = [(tensor.shape[1], tensor.dtype) for tensor in (query, key, value)]
        return out.index_select(0, layout.places).unflatten(0, (-1, query.shape[1]))

    @staticmethod
    def backward(ctx, gradient):
        q, k, v, *weights = ctx.saved_tensors
        layout = ctx.layout
        g = gradient.flatten(0, 1).index_select(0, layout.rows).index_fill_(0, layout.padding, 0)
        for_query, for_key, for_value = (torch.empty_like(rows) for rows in (q, k, v))
        groups = _groups(layout, (q, g, for_query), (k, v, for_key, for_value))
        for p, ((q_g, g_g, query_out), (k_g, v_g, key_out, value_out), _) in zip(weights, groups, strict=True):
            dp = torch.bmm(g_g, v_g.transpose(1, 2))
            ds = _softmax_backward(dp, p).mul_(ctx.scale)
            torch.bmm(ds, k_g, out=query_out)
            torch.bmm(ds.transpose(1, 2), q_g, out=key_out)
            torch.bmm(p.transpose(1, 2), g_g, out=value_out)
        places = (layout.places, layout.key_places, layout.key_places)
        gradients = (
            rows.index_select(0, place).unflatten(0, (-1, heads)).to(dtype)
            for rows, place, (heads, dtype) in zip((for_query, for_key, for_value), places, ctx.kinds, strict=True)
        )
        return *gradients, None, None, None, None


def _groups(layout: Layout, rows: tuple, key_rows: tuple):
    """For each group: its parts of the tensors, (sequences * heads, tokens, d), and its bias."""
    for at, key_at, count, length, key_length, hidden in layout.groups:
        yield (
            [tensor[at : at + count * length].view(count, length, -1) for tensor in rows],
            [tensor[key_at : key_at + count * key_length].view(count, key_length, -1) for tensor in key_rows],
            hidden,
        )


def _each_by_itself(query, key, value, lengths, key_lengths, scale, causal, window, dropout, softcap) -> torch.Tensor:
    """PyTorch's kernel, one sequence at a time: for dropout, long sequences, windows, and float32 on a GPU.

    PyTorch has no kernel for `softcap`: that is computed step by step.
    """
    parts, groups = [], query.shape[1] // key.shape[1]
    each = (
        tensor.transpose(0, 1)[None].split(of, 2)
        for tensor, of in ((query, lengths), (key, key_lengths), (value, key_lengths))
    )
    for q, k, v in zip(*each, strict=True):
        if softcap:
            k, v = (tensor.repeat_interleave(groups, 1) for tensor in (k, v))
            scores = softcap * (q @ k.mT * (scale / softcap)).tanh()
            scores = scores.masked_fill(_unseen(q.shape[2], causal, window, q.device), float("-inf"))
            weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
            parts.append(nn.functional.dropout(weights, dropout) @ v)
            continue
        windowed = window and q.shape[2] > window
        mask = ~_unseen(q.shape[2], causal, window, q.device) if windowed else None
        parts.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and mask is None, scale=scale,
                enable_gqa=groups > 1,
            )
        )  # fmt: skip
    return torch.cat(parts, 2)[0].transpose(0, 1)


def kernel_problem(device, dtype, head_size: int, value_size: int, *, dropout=0.0, window=None, softcap=None) -> str:
    """Why a GPU has no fused kernel for attention within sequences that lie end to end; "" if it has one."""
    if missing("kernel"):
        return f"because {missing('kernel')}"
    if dtype == torch.float32:
        return "in float32"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "before Ampere"
    if head_size != value_size or head_size > 256 or head_size % 8:
        return f"for heads of {head_size} and {value_size}"
    options = {"attention dropout": dropout, "attention windows": window, "capped attention scores": softcap}
    return next((f"with {name}" for name, option in options.items() if option), "")


def _has_kernel(query, value, **options) -> bool:
    return query.is_cuda and not kernel_problem(query.device, query.dtype, query.shape[2], value.shape[2], **options)


def on_device(values, device: torch.device, dtype=None) -> torch.Tensor:
    """A small tensor of numbers that the host knows; a GPU's copy is not waited for."""
    values = torch.as_tensor(values, dtype=dtype)
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _starts(lengths: list[int], device, layouts: dict) -> torch.Tensor:
    """(sequences + 1,) int32: where each sequence begins, made once in a forward pass."""
    key = ("starts", id(lengths))
    if key not in layouts:
        layouts[key] = on_device([0, *accumulate(lengths)], device, torch.int32)
    return layouts[key]


def _attend(
    query, key, value, lengths, key_lengths, layouts, *, scale, causal=False, window=None, dropout=0.0, softcap=None
):
    """(tokens, heads, d) -> (tokens, heads, d); each sequence of queries attends to its own sequence of keys.

    Keys and values may have fewer heads (grouped-query attention): each then serves as many query heads in a row.
    With `softcap`, a score becomes ``softcap * tanh(score / softcap)``. `layouts` is a cache that the layers of a
    forward pass share.
    """
    longest, longest_key = max(lengths), max(key_lengths)
    _met.add((query.shape[2], value.shape[2], window, softcap))
    if window and longest <= window:  # hides nothing
        window = None
    if _has_kernel(query, value, dropout=dropout, window=window, softcap=softcap):
        return _fused(query, key, value, lengths, key_lengths, layouts, scale, causal)
    # of a causal float32 sequence, PyTorch's kernel computes half, and is faster from half the length on
    longest_kept = LONGEST_KEPT // 2 if causal and not window and query.dtype == torch.float32 else LONGEST_KEPT
    if query.device.type == "cpu" and not (dropout or softcap) and longest * longest_key <= longest_kept**2:
        kind = (query.shape[1], key.shape[1], key_lengths is lengths)
        if kind not in layouts:
            layouts[kind] = lay_out(lengths, key_lengths, *kind[:2])
        return _Attention.apply(query, key, value, layouts[kind], scale, causal, window)
    return _each_by_itself(query, key, value, lengths, key_lengths, scale, causal, window, dropout, softcap)


def _fused(query, key, value, lengths, key_lengths, layouts, scale, causal) -> torch.Tensor:
    """PyTorch's kernel for a GPU, all sequences at once; see `_attend`."""
    options = {"scale": scale, "window_size": (-1, 0) if causal else (-1, -1)}
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and HAS_GROUPS:
        options["enable_gqa"] = True
    elif groups > 1:
        key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    starts, key_starts = (_starts(each, query.device, layouts) for each in (lengths, key_lengths))
    return varlen_attn(query, key, value, starts, key_starts, max(lengths), max(key_lengths), **options)


def _attend_packed(query, key, value, lengths, key_lengths, layouts, scaling, **options):
    """`_attend` with the shapes of Transformers: (1, heads, tokens, d) -> (1, tokens, heads, d)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return _attend(query, key, value, lengths, key_lengths, layouts, scale=scale, **options)[None]


def _attend_within(
    module, query, key, value, attention_mask, lengths, layouts, windows, *, dropout, scaling, is_causal=None,
    sliding_window=None, softcap=None, **options,
):  # fmt: skip
    """Attention function of a single stack whose sequences of `lengths` lie end to end; notes the layer's window."""
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    # biases, sinks, indices of keys to read
    unknown = [name for name, option in options.items() if torch.is_tensor(option) and name != "position_ids"]
    if attention_mask is not None or unknown or query.shape[2] != key.shape[2]:
        raise NotImplementedError(f"attention of {type(module).__name__} cannot be packed")
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings are computed in float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    windows.add(sliding_window)
    out = _attend_packed(
        query, key, value, lengths, lengths, layouts, scaling,
        causal=causal, window=sliding_window, dropout=dropout, softcap=softcap,
    )  # fmt: skip
    return out, None


def _check_windows(of_layers: set, of_masks: set, longest: int) -> None:
    """Raises NotImplementedError if layers lack a window of the masks that `longest` tokens did not show."""
    if any(window is not None and window >= longest for window in of_layers ^ of_masks):
        raise NotImplementedError("its attention windows cannot be packed")


@torch.no_grad()
def _keep_if_equal(module, attending, name: str, hooks: list, padded, packed) -> bool:
    """Gives the model `attending` the attention `name`; undone, with `hooks`, and False if it fails or outputs change.

    `module` is put in evaluation mode meanwhile. `padded()` and `packed()` compute its outputs at real tokens. Both
    must be what `padded()` was before. If not, and a model of this type should be packed, it warns.
    """
    before, was_training = attending.config._attn_implementation, module.training
    problem = "its outputs differ with attention and mask functions of one's own"
    module.eval()
    try:
        expected = padded()
        attending.set_attn_implementation(name)
        _met.clear()
        outputs = (compute() for compute in dict.fromkeys((packed, padded)))
        if all((output - expected).abs().max() <= 1e-4 * expected.abs().max() for output in outputs):
            # what `keep_padding` looks at
            attending.packed_attention, attending.attention_before = frozenset(_met), before
            return True
    except Exception as error:  # models of others may raise anything
        problem = in_one_line(error)
        logger.info("batches stay padded: %s", problem)
    finally:
        module.train(was_training)
    if attending.config.model_type in TYPES:
        warn(f"a model of type {attending.config.model_type} cannot be packed: {problem}", EFFECTS["packing"])
    for hook in hooks:
        hook.remove()
    attending.set_attn_implementation(before)
    return False


# ---- padded batches


def _is_waited_for(device) -> bool:
    """Whether the host would wait for this device when it reads a value from it."""
    return torch.device(device).type != "cpu"


def _padded_mask(plain, *arguments, attention_mask=None, **options):
    """The mask function `plain` of Transformers. On a GPU, the mask is made without a look at its values.

    Transformers looks whether any token is hidden at all, for which the host would wait in each forward pass.
    """
    is_one = options.get("q_length") == 1  # a token that is generated, for which it does not look
    if attention_mask is not None and not is_one and _is_waited_for(attention_mask.device):
        options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return plain(*arguments, attention_mask=attention_mask, **options)


def _eager(module, *arguments, **options):
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **options)


PLAIN = (("sdpa", sdpa_attention_forward, sdpa_mask), ("eager", _eager, eager_mask))
PADDED = {"sdpa": "padded_sdpa", "eager": "padded_eager"}  # attention functions of models that are not packed
for _name, _plain, _plain_mask in PLAIN:
    AttentionInterface.register(PADDED[_name], _plain)
    AttentionMaskInterface.register(PADDED[_name], partial(_padded_mask, _plain_mask))


def keep_padding(model, device: torch.device, dtype, *, longest: int | None, dropout: float = 0.0) -> str:
    """Says why a packed `model` must compute padded batches on a GPU, which then has no kernel for it; else "".

    Without one, each sequence would be a call of its own in each layer. On a CPU all is packed. A model that was never
    packed gets masks that are made without waiting for the GPU.

    Args:
        model: the one of Transformers.
        dtype: in which it computes there.
        longest: most tokens of a sequence (None: any number); a window that is as long hides nothing.
        dropout: of attention, in training.
    """
    if device.type == "cpu" or not has("packing"):
        return ""
    if not hasattr(model, "packed_attention"):
        for part in (part for part in model.modules() if isinstance(part, PreTrainedModel)):
            name, file = part.config._attn_implementation, sys.modules[type(part).__module__]
            calls_by_name = hasattr(file, "ALL_ATTENTION_FUNCTIONS")  # else only the mask depends on the name
            if name == "eager" and calls_by_name and not hasattr(file, "eager_attention_forward"):
                continue
            # each part's own: the setter would also set the parts of this part
            part.config._attn_implementation_internal = PADDED.get(name, name)
        return ""
    problems = []
    for head_size, value_size, window, softcap in model.packed_attention:
        window = None if window and longest and longest <= window else window
        problems.append(kernel_problem(device, dtype, head_size, value_size, dropout=dropout, window=window,
                                       softcap=softcap))  # fmt: skip
    if any(problems) and model.config._attn_implementation == NAME:
        model.set_attn_implementation(PADDED.get(model.attention_before, model.attention_before))
    return max(problems, default="")


# ---- models of sentence-transformers

_windows: dict[str, set] = {"layers": set(), "masks": set()}  # those met in packed batches
_running: list[tuple] = []  # the batches that are computed packed now, innermost last, each with its padded form


@dataclass
class Packing:
    """Where the tokens of a padded batch are.

    Attributes:
        shape: (texts, tokens) of the padded batch.
        index: places of the real tokens in the flattened padded batch. On a CPU, in a large batch, copies of the last
            one follow, as a text of their own, and round the number of tokens up.
        real: number of real tokens.
        lengths: tokens of each text, the text of copies included.
        layouts: the cache of `_attend`.
    """

    shape: tuple[int, int]
    index: torch.Tensor
    real: int
    lengths: list[int]
    layouts: dict = field(default_factory=dict)

    def to(self, device, non_blocking: bool = False) -> "Packing":
        """The same for a batch on another device."""
        return replace(self, index=self.index.to(device, non_blocking=non_blocking), layouts={})

    def pin_memory(self, *_) -> "Packing":
        return replace(self, index=self.index.pin_memory(), layouts={})

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(texts, tokens, ...) -> (1, real tokens, ...)"""
        return tensor.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, tensor: torch.Tensor) -> torch.Tensor:
        """(1, real tokens, ...) -> (texts, tokens, ...), padded with zeros."""
        texts, tokens = self.shape
        rows = tensor.new_zeros(texts * tokens, *tensor.shape[2:])
        return rows.index_copy(0, self.index[: self.real], tensor[0, : self.real]).unflatten(0, (texts, tokens))


def plan_packing(attention_mask: torch.Tensor, device=None) -> Packing:
    """The packing of a batch; `attention_mask` (texts, tokens) is 1 at real tokens.

    Of a mask on a GPU it waits for the GPU. So plan it from a mask in the host's memory; `device` is the one that will
    compute the batch (default: the mask's).
    """
    is_for_cpu = torch.device(device or attention_mask.device).type == "cpu"
    lengths = attention_mask.sum(1).tolist()
    index = attention_mask.flatten().nonzero()[:, 0]
    count = len(index)
    # oneDNN compiles new kernels for a new number of rows: milliseconds and a megabyte for each layer
    extra = -count % 64 if count >= 2048 and is_for_cpu else 0
    index = torch.cat([index, index[-1:].expand(extra)])
    lengths += [extra] * bool(extra)
    return Packing(tuple(attention_mask.shape), index, count, lengths)


def packed_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, packing=None, **options):
    """Attention function of retrievers; without `packing`, the usual one."""
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    return _attend_within(module, query, key, value, attention_mask, packing.lengths, packing.layouts,
                          _windows["layers"], dropout=dropout, scaling=scaling, **options)  # fmt: skip


def _mask(*arguments, **options):
    if not _running:
        return _padded_mask(sdpa_mask, *arguments, **options)
    _windows["masks"].add(options.get("local_size"))
    return None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, _mask)


def _pack(transformer, arguments):
    features = dict(arguments[0])
    mask, packing = features.get("attention_mask"), features.pop("packing", None)
    if mask is None or mask.ndim != 2 or not is_packed(transformer):
        return (features,)
    packing = packing or plan_packing(mask)
    packed = {
        name: packing.pack(value) if torch.is_tensor(value) and value.shape == mask.shape else value
        for name, value in features.items()
    }
    places = packing.pack(mask.cumsum(1) - 1) + _first_position(transformer.auto_model)
    _running.append((packing, features))
    return ({**packed, "position_ids": places, "packing": packing},)


def _unpack(transformer, arguments, output):
    """Called after a forward pass that failed, too; `output` is then None."""
    packing = arguments[0].get("packing")
    if packing is None or not _running or _running[-1][0] is not packing:
        return None
    _, features = _running.pop()
    if output is None:
        return None
    output.pop("packing", None)
    output |= features  # the padded ids and mask
    output.pop("position_ids")
    if transformer.is_pooled_packed and output["token_embeddings"].device.type == "cpu":
        output["token_embeddings"] = output["token_embeddings"][:, : packing.real]
        output["cu_seq_lens_q"] = torch.tensor([0, *accumulate(packing.lengths[: packing.shape[0]])])
    else:
        output["token_embeddings"] = packing.unpack(output["token_embeddings"])
    if "all_layer_embeddings" in output:
        output["all_layer_embeddings"] = tuple(map(packing.unpack, output["all_layer_embeddings"]))
    return output


def _first_position(encoder) -> int:
    """Number of a text's first position: 0, or for RoBERTa-like models the padding's id plus 1."""
    for module in encoder.modules():
        if isinstance(getattr(module, "padding_idx", None), int) and hasattr(module, "position_embeddings"):
            return module.padding_idx + 1
    return 0


def is_packed(transformer) -> bool:
    """Whether this sentence-transformers `Transformer` module computes its batches without padding."""
    encoder = getattr(transformer, "auto_model", None)
    return encoder is not None and getattr(encoder.config, "_attn_implementation", None) == NAME


def remove_padding(retriever) -> bool:
    """Makes the model of a SentenceTransformer compute without padding, if that changes no embedding.

    False, and the model is unchanged, if its attention cannot be replaced or its outputs for three random texts differ.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer  # takes seconds

    transformer = retriever[0]
    if not has("packing"):
        return False
    if not isinstance(transformer, Transformer) or transformer.modality_config.keys() != {"text"}:
        return False
    encoder, config = transformer.auto_model, transformer.auto_model.config
    if not encoder.is_backend_compatible() or not hasattr(config, "vocab_size"):
        return False
    # longer than a sliding window that is not too long
    longest = min((getattr(config, "sliding_window", None) or 0) + 40, LONGEST_CHECKED)
    longest = min(longest, getattr(config, "max_position_embeddings", longest + 8) - 8)
    mask = (torch.arange(longest) < torch.tensor([[longest], [5], [20]])).long()
    ids = torch.randint(
        config.vocab_size // 2, config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)
    )
    features = {"input_ids": ids.to(encoder.device), "attention_mask": mask.to(encoder.device)}

    def embed():
        for found in _windows.values():
            found.clear()
        states = transformer(dict(features))["token_embeddings"][mask.bool()]
        _check_windows(_windows["layers"], _windows["masks"], longest)
        return states

    # the arguments that sentence-transformers passes on
    if getattr(transformer, "model_forward_params", None) is not None:
        transformer.model_forward_params |= {"position_ids", "packing"}
    # the hooks do nothing until the attention is NAME
    hooks = [transformer.register_forward_pre_hook(_pack),
             transformer.register_forward_hook(_unpack, always_call=True)]  # fmt: skip
    transformer.is_pooled_packed = False  # padded outputs are compared
    is_removed = _keep_if_equal(transformer, encoder, NAME, hooks, embed, embed)
    if is_removed and len(retriever) > 1 and isinstance(retriever[1], Pooling):
        transformer.is_pooled_packed = _pools_packed(retriever[1], features)
    return is_removed


@torch.no_grad()
def _pools_packed(pooling, features: dict) -> bool:
    """Whether a module for pooling gives the same for token embeddings that lie end to end; else it warns."""
    mask = features["attention_mask"].cpu()
    states = torch.rand(*mask.shape, pooling.embedding_dimension, generator=torch.Generator().manual_seed(0))
    flat = {"token_embeddings": states[mask.bool()][None], "cu_seq_lens_q": torch.tensor([0, *mask.sum(1).cumsum(0)])}

    def pool(of_tokens):
        # a prompt's tokens, which are left out if the module is so set
        return pooling({**features, "attention_mask": mask, "prompt_length": 2, **of_tokens})["sentence_embedding"]

    try:
        problem = "gives other embeddings"
        if (pool(flat) - pool({"token_embeddings": states})).abs().max() <= 1e-4:
            return True
    except Exception as error:  # it may expect anything
        problem = in_one_line(error)
    warn(f"Pooling of sentence-transformers {problem} for cu_seq_lens_q", "packed tokens are padded before pooling")
    return False


# ---- classifiers of sequences


def remove_padding_of_classifier(reranker) -> bool:
    """Makes the encoder of a CrossEncoder compute without padding, if that changes no score. Else False, as above.

    Its inputs stay padded. The encoder's outputs are padded again for the head, which reads the first token of each
    sequence, or a mean over its tokens.
    """
    model, config = reranker[0].auto_model, reranker[0].auto_model.config
    encoder = model.base_model
    if not has("packing") or encoder is model or not model.is_backend_compatible() or not hasattr(config, "vocab_size"):
        return False
    names = list(inspect.signature(encoder.forward).parameters)
    given: list[Packing] = []  # of the batch that the CrossEncoder begins with

    def take(module, arguments):
        features = dict(arguments[0])
        given[:] = [features.pop("packing")] if "packing" in features else []
        return (features,)

    def pack(module, arguments, options):
        options = dict(zip(names, arguments, strict=False)) | options
        mask = options.get("attention_mask")
        if mask is None or mask.ndim != 2 or config._attn_implementation != NAME:
            return None
        packing = given.pop() if given else plan_packing(mask)
        _running.append((packing, options))
        packed = {
            name: packing.pack(value) if torch.is_tensor(value) and value.shape == mask.shape else value
            for name, value in options.items()
        }
        places = packing.index[None] % mask.shape[1] + _first_position(encoder)
        return (), {**packed, "position_ids": places, "packing": packing}

    def first_tokens(module, arguments):
        if not _running:
            return None
        packing, _ = _running[-1]
        starts = _starts(packing.lengths, arguments[0].device, packing.layouts)[: packing.shape[0]]
        return arguments[0][0].index_select(0, starts)[:, None], *arguments[1:]

    def unpack(module, arguments, options, output):
        packing = options.get("packing")
        if packing is not None and _running and _running[-1][0] is packing:
            _running.pop()
            if output is not None:  # the forward pass has not failed
                output.last_hidden_state = packing.unpack(output.last_hidden_state)
        return output

    hooks = [reranker[0].register_forward_pre_hook(take), encoder.register_forward_pre_hook(pack, with_kwargs=True),
             encoder.register_forward_hook(unpack, with_kwargs=True, always_call=True)]  # fmt: skip
    if isinstance(getattr(encoder, "pooler", None), nn.Module):
        hooks.append(encoder.pooler.register_forward_pre_hook(first_tokens))
    longest = min((getattr(config, "sliding_window", None) or 0) + 40, LONGEST_CHECKED)
    longest = min(longest, getattr(config, "max_position_embeddings", longest + 8) - 8)
    mask = (torch.arange(longest) < torch.tensor([[longest], [5], [20]])).long().to(model.device)
    ids = torch.randint(
        config.vocab_size // 2, config.vocab_size, mask.shape, generator=torch.Generator().manual_seed(0)
    )

    def scores():
        for found in _windows.values():
            found.clear()
        logits = model(input_ids=ids.to(model.device), attention_mask=mask).logits
        _check_windows(_windows["layers"], _windows["masks"], longest)
        return logits

    return _keep_if_equal(model, model, NAME, hooks, scores, scores)


# ---- models with a decoder

_now: list[dict] = []  # the active `laid_end_to_end` contexts, innermost last


def laid_end_to_end(lengths: list[int], key_lengths: list[int] | None = None):
    """Within it, a model prepared by one of the functions below takes (1, sum of lengths): sequences end to end.

    For the decoder, `key_lengths` are the numbers of encoder tokens that each of its sequences attends to. With
    activation checkpointing it must be active in the recomputed forward pass too (`laid_as_now`).
    """
    now = {"self": lengths, "cross": key_lengths or lengths, "layouts": {}}
    return _laid(now | {"windows": set(), "windows of masks": set()})


def laid_as_now():
    """The innermost `laid_end_to_end` that is active now, to be entered again later; without one, no change."""
    return _laid(*_now[-1:])


@contextmanager
def _laid(*now: dict):
    _now.extend(now)
    try:
        yield
    finally:
        del _now[len(_now) - len(now) :]


# ---- encoder-decoders


def _attention_of_both(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    if not _now:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    if options.get("position_bias") is not None:
        raise NotImplementedError(f"attention of {type(module).__name__} cannot be packed")
    now, causal = _now[-1], bool(getattr(module, "is_causal", False))
    keys = now["self"] if causal else now["cross"]
    out = _attend_packed(query, key, value, now["self"], keys, now["layouts"], scaling, causal=causal, dropout=dropout)
    return out, None


def _mask_of_both(*arguments, **options):
    return None if _now else _padded_mask(sdpa_mask, *arguments, **options)


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
    lengths, layouts = _now[-1]["self"], _now[-1]["layouts"]
    if "places" not in layouts:
        layouts["places"] = on_device(np.concatenate([np.arange(length) for length in lengths]), output.device)
    return output.index_select(-2, layouts["places"])  # not [places], whose gradient adds up in any order


def remove_padding_of_both(model) -> bool:
    """Makes an encoder-decoder accept sequences that are `laid_end_to_end`; other calls stay as they are.

    False, and the model is unchanged, if its attention or positions cannot be replaced or its outputs for three random
    examples differ.
    """
    encoder, decoder, config = model.get_encoder(), model.get_decoder(), model.config
    positions = [getattr(stack, "embed_positions", None) for stack in (encoder, decoder)]
    if not has("packing") or not hasattr(config, "vocab_size"):
        return False
    if not all(isinstance(module, nn.Module) for module in positions):
        if config.model_type in TYPES:
            warn(f"a model of type {config.model_type} has no embed_positions", EFFECTS["packing"])
        return False
    generator = torch.Generator().manual_seed(0)
    lengths, targets = [9, 3, 6], [4, 7, 2]
    ids, labels = (torch.randint(3, config.vocab_size, (3, 9), generator=generator).to(model.device) for _ in range(2))
    mask = torch.arange(9, device=model.device) < torch.tensor(lengths, device=model.device)[:, None]
    real = torch.arange(9, device=model.device) < torch.tensor(targets, device=model.device)[:, None]

    def padded():
        return model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=labels).logits[real]

    def packed():
        with laid_end_to_end(lengths):
            hidden = encoder(input_ids=ids[mask][None])
        with laid_end_to_end(targets, lengths):
            return model(encoder_outputs=hidden, decoder_input_ids=labels[real][None], use_cache=False).logits[0]

    hooks = [module.register_forward_pre_hook(_ask_for_all_positions, with_kwargs=True) for module in positions]
    hooks += [module.register_forward_hook(_take_each_position) for module in positions]
    return _keep_if_equal(model, model, BOTH, hooks, padded, packed)


# ---- decoder-only models


def _attention_of_decoder(plain, module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    if not _now:
        return plain(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    now = _now[-1]
    return _attend_within(module, query, key, value, attention_mask, now["self"], now["layouts"], now["windows"],
                          dropout=dropout, scaling=scaling, **options)  # fmt: skip


def _mask_of_decoder(plain, *arguments, **options):
    if not _now:
        return _padded_mask(plain, *arguments, **options)
    _now[-1]["windows of masks"].add(options.get("local_size"))
    return None


DECODER = {"sdpa": "packed_decoder_sdpa", "eager": "packed_decoder_eager"}  # by what computes padded batches
for _name, _plain, _plain_mask in PLAIN:
    AttentionInterface.register(DECODER[_name], partial(_attention_of_decoder, _plain))
    AttentionMaskInterface.register(DECODER[_name], partial(_mask_of_decoder, _plain_mask))


def remove_padding_of_decoder(model) -> bool:
    """Makes a decoder-only language model accept sequences that are `laid_end_to_end`; other calls stay as they are.

    It is then called with `input_ids`, `position_ids` and an `attention_mask` of ones, all (1, sum of lengths), and
    `use_cache=False`; positions start at 0 in each sequence. Without a mask, Transformers would look for sequences in
    the positions, for which the host waits. False, and the model is unchanged, if its attention cannot be replaced or
    its states of three random sequences differ.
    """
    config, name = model.config.get_text_config(), DECODER.get(getattr(model.config, "_attn_implementation", None))
    if not has("packing") or name is None or not model.is_backend_compatible() or not hasattr(config, "vocab_size"):
        return False
    # longer than a sliding window that is not too long
    longest = min((getattr(config, "sliding_window", None) or 0) + 40, LONGEST_CHECKED)
    longest = min(longest, getattr(config, "max_position_embeddings", longest))
    lengths = [min(5, longest), longest, min(20, longest)]
    places = torch.arange(longest).expand(3, -1)
    real = places < torch.tensor(lengths)[:, None]
    ids = torch.randint(config.vocab_size, real.shape, generator=torch.Generator().manual_seed(0))
    ids, places, real = (tensor.to(model.device) for tensor in (ids, places, real))
    body = model.base_model  # without the output layer, by far the widest

    def padded():
        return body(input_ids=ids, attention_mask=real.long(), use_cache=False)[0][real]

    def packed():
        inputs = {"input_ids": ids[real][None], "position_ids": places[real][None]}
        with laid_end_to_end(lengths):
            states = body(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)[0][0]
            _check_windows(_now[-1]["windows"], _now[-1]["windows of masks"], longest)
        return states

    return _keep_if_equal(model, model, name, [], padded, packed)


# ---- torch.compile


def keep_from_compiling() -> None:
    """Leaves packed attention out of what `torch.compile` compiles: it reads lengths that differ in each batch."""
    for name in (NAME, BOTH, *DECODER.values()):
        AttentionInterface.register(name, _apart(AttentionInterface()[name]))


def _apart(attention):
    @torch.compiler.disable
    def attend(*arguments, **options):
        return attention(*arguments, **options)

    return attend
