"""Greedy and beam search for encoder-decoders that keeps keys and values once for each example, not for each beam.

Transformers' `generate` copies the encoder states for each beam, and at each step it copies all keys and values into
the new order of the beams. Here the keys and values of a source are computed and stored once, and the beams of an
example are several queries on them. The keys and values of generated tokens are stored once too, and never move: each
step appends a slot for each beam, each beam attends to all slots of its example, and a mask hides the slots that are
not in its own past. Finished examples leave the batch. In float32 the tokens are those of `generate`.

Leans on these internals of Transformers: `generate(custom_generate=...)` and the arguments it passes on,
`GenerationConfig._eos_token_tensor` and `_pad_token_tensor`, `config._attn_implementation`, the methods of a cache
layer (`DynamicLayer`) that models call, the layers of `EncoderDecoderCache`, and that attention functions get the
cache's keys as the same tensor object, and get no mask where no mask function has their name.
"""

import copy
import inspect
from functools import partial
from types import SimpleNamespace

import torch
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, LogitsProcessorList, NoRepeatNGramLogitsProcessor
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutput

# encoder-decoders whose decoder attends to all earlier tokens and to the whole source, without other masks
MODEL_TYPES = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "longt5", "m2m_100", "marian", "mbart", "mt5",
    "pegasus", "pegasus_x", "plbart", "t5", "umt5",
)  # fmt: skip
# settings that this search does not support, each with the values that switch it off
UNSUPPORTED = {"num_return_sequences": (None, 1), "return_dict_in_generate": (None, False), "max_time": (None,),
               "stop_strings": (None,), "guidance_scale": (None, 1)}  # fmt: skip
NEVER = -1e9  # score of what must not be chosen, as in `generate`
ATTENTION = "beams_share_keys"


class NotShared(Exception):
    """The model does not use the attention function that was set."""


@torch.no_grad()
def beam_search(model, hidden, mask, **generation) -> torch.Tensor:
    """Token ids as from `model.generate`, (examples, 1 + generated tokens), with the start token in front.

    Calls `model.generate` itself where this search does not apply: sampling and other modes, unknown arguments, weights
    that are sharded over processes (all must take equally many steps), and models that are not in MODEL_TYPES or whose
    attention cannot be replaced.

    Args:
        hidden: (examples, source tokens, hidden), the encoder's states.
        mask: (examples, source tokens), 1 at real tokens.
        generation: arguments of `generate`; the others come from the model's generation_config.
    """
    encoded = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask}
    config = copy.deepcopy(model.generation_config)
    unknown = config.update(**generation)
    if not unknown and is_supported(model, config):
        beams = SimpleNamespace(
            count=config.num_beams or 1,
            length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
            early_stopping=config.early_stopping or False,
        )
        # `generate` prepares settings and logits processors; told of one beam, it does not copy the encoder states
        plain = {**generation, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
        decoder = model.get_decoder()
        before = decoder.config._attn_implementation
        decoder.set_attn_implementation(ATTENTION)
        try:
            return model.generate(**encoded, **plain, custom_generate=partial(search, beams=beams, encoded=encoded))
        except NotShared:
            pass
        finally:
            decoder.set_attn_implementation(before)
    return model.generate(**encoded, **generation, synced_gpus=_is_sharded(model) or None)


def _is_sharded(model) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_supported(model, config) -> bool:
    return (
        not model.training  # dropout would differ
        and model.config.model_type in MODEL_TYPES
        and config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH)
        and all(getattr(config, name, None) in values for name, values in UNSUPPORTED.items())
        and not is_fsdp_managed_module(model)
        and not _is_sharded(model)
    )


# ---- the search


def search(model, start, *, logits_processor, generation_config, beams, encoded, **_) -> torch.Tensor:
    """The decoding loop, called by `generate`; start (examples, 1) holds the start tokens."""
    examples, device, max_length = len(start), start.device, generation_config.max_length
    eos = generation_config._eos_token_tensor
    eos = torch.tensor([-1], device=device) if eos is None else eos
    process = LogitsProcessorList(
        no_repeated_ngrams(p.ngram_size) if type(p) is NoRepeatNGramLogitsProcessor else p for p in logits_processor
    )
    source = SimpleNamespace(max_slots=None, positions=None, mask=None)
    past = SimpleNamespace(max_slots=1 + beams.count * (max_length - 2), positions=None, mask=None)
    source_mask = encoded["attention_mask"]
    if source_mask is not None and not source_mask.all():
        source.mask = torch.zeros(source_mask.shape, device=device)
        source.mask = source.mask.masked_fill(source_mask == 0, torch.finfo(torch.float32).min)[:, None, None]
    cache = EncoderDecoderCache(*(Cache(layer_class_to_replicate=partial(Layer, view)) for view in (past, source)))

    # `generate` fills unused positions with the same
    pad = generation_config._pad_token_tensor
    fill = pad if beams.count == 1 else pad or eos[0]
    running = fill.repeat(examples, beams.count, max_length)
    running[:, :, 0] = start
    scores = torch.full((examples, beams.count), NEVER, device=device)
    state = SimpleNamespace(
        example=torch.arange(examples, device=device),
        running=running,
        scores=scores.index_fill(1, torch.tensor([0], device=device), 0.0),  # beams start equal: only the first counts
        ended=running.clone(),
        ended_scores=scores,
        has_ended=torch.zeros_like(scores, dtype=torch.bool),
        ended_lengths=torch.ones_like(scores, dtype=torch.long),
    )
    result, lengths = running[:, 0].clone(), torch.ones(examples, dtype=torch.long)

    # Transformers renames the argument, model by model, from 5.24 on
    cache_argument = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    for length in range(1, max_length):
        tokens = state.running[:, : 1 if length == 1 else None, length - 1]  # one start token for all beams
        logits = model(
            encoder_outputs=encoded["encoder_outputs"],
            decoder_input_ids=tokens.reshape(-1, 1),
            use_cache=True,
            **{cache_argument: cache},
        ).logits[:, -1].float()  # fmt: skip
        layers = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
        if length == 1:
            if not layers or any(layer.reads != 1 for layer in layers):
                raise NotShared
            logits = logits.repeat_interleave(beams.count, 0)

        advance = advance_greedily if beams.count == 1 else advance_beams
        parents, done = advance(state, logits, process, length, eos, beams, max_length)
        if done.any():
            ends = state.example[done]
            result[ends], lengths[ends.cpu()] = state.ended[done, 0], state.ended_lengths[done, 0].cpu()
            if done.all():
                break
            # unfinished examples from the end move to the places of finished ones
            keep = fill_gaps(done)
            vars(state).update({name: keep(tensor) for name, tensor in vars(state).items()})
            parents = keep(parents)
            source.mask = None if source.mask is None else keep(source.mask)
            past.mask = None if past.mask is None else keep(past.mask)
            for layer in layers:
                layer.keep(keep)
        past.mask, past.positions = see_own_past(past.mask, parents, length)
    return result[:, : int(lengths.max())]


def see_own_past(mask, parents, length: int):
    """Mask (examples, 1, beams, slots) of the next step, and the position of each slot.

    A beam sees what its parent saw, and its own new slot. All beams share the slot of the start token.
    """
    examples, beams = parents.shape
    if mask is None:
        mask = torch.zeros(examples, 1, beams, 1, device=parents.device)
    seen = mask.take_along_dim(parents[:, None, :, None], 2)
    own = torch.full((beams, beams), -torch.inf, device=mask.device).fill_diagonal_(0.0)
    positions = torch.arange(1, length + 1, device=mask.device).repeat_interleave(beams)
    return torch.cat([seen, own.expand(examples, 1, -1, -1)], 3), torch.cat([positions.new_zeros(1), positions])


def fill_gaps(done):
    """A function that removes the finished rows of a tensor in place: rows from the end move into the gaps."""
    count = int((~done).sum())
    gaps, movers = done[:count].nonzero()[:, 0], (~done[count:]).nonzero()[:, 0] + count

    def keep(tensor):
        tensor[gaps] = tensor[movers]
        return tensor[:count]

    return keep


def advance_greedily(state, logits, process, length, eos, beams, max_length):
    tokens = process(state.running[:, 0, :length], logits).argmax(-1)
    state.running[:, 0, length] = tokens
    state.ended, state.ended_lengths = state.running, torch.full_like(state.ended_lengths, length + 1)
    return torch.zeros_like(tokens)[:, None], torch.isin(tokens, eos) | (length + 1 == max_length)


def advance_beams(state, logits, process, length, eos, beams, max_length):
    """One step of beam search as in Transformers; returns the parent of each beam, and which examples are done."""
    examples, count = state.scores.shape
    past = state.running[:, :, :length].flatten(0, 1)
    totals = process(past, logits.log_softmax(-1)).view(examples, count, -1)
    totals += state.scores[..., None]
    # enough candidates that `count` of them go on even if all others end
    points, index = totals.flatten(1).topk(max(2, 1 + len(eos)) * count)
    parents, tokens = index // totals.shape[-1], index % totals.shape[-1]
    candidates = state.running.take_along_dim(parents[..., None], 1)
    candidates[..., length] = tokens
    ends = torch.isin(tokens, eos) | (length + 1 == max_length)

    state.scores, chosen = (points + ends * NEVER).topk(count)
    state.running = candidates.take_along_dim(chosen[..., None], 1)
    parents = parents.take_along_dim(chosen, 1)

    ends[:, count:] = False  # only the best `count` may end, the others may go on
    points = points / length**beams.length_penalty
    state.ended_scores, best = torch.cat([state.ended_scores, points + ~ends * NEVER], 1).topk(count)
    for name, new in (("ended", candidates), ("has_ended", ends),
                      ("ended_lengths", torch.full_like(tokens, length + 1))):  # fmt: skip
        merged = torch.cat([getattr(state, name), new], 1)
        setattr(state, name, merged.take_along_dim(best[..., None] if merged.dim() == 3 else best, 1))

    # done if the best open beam, ending now ("never": at any length), would be no better than the worst finished one
    final = max_length - 1 if beams.early_stopping == "never" and beams.length_penalty > 0 else length
    worst = torch.where(state.has_ended, state.ended_scores.min(1, keepdim=True)[0], NEVER)
    done = ~(state.scores[:, :1] / final**beams.length_penalty > worst).any(1) | (length + 1 == max_length)
    return parents, done | state.has_ended.all(1) if beams.early_stopping is True else done


def no_repeated_ngrams(size: int):
    """Transformers' logits processor, without its loop over rows and tokens (which 5.24 no longer has)."""

    def process(tokens, scores):
        if tokens.shape[1] >= size:
            ngrams = tokens.unfold(1, size, 1)
            last = tokens[:, None, tokens.shape[1] - size + 1 :]
            rows, places = (ngrams[..., :-1] == last).all(-1).nonzero(as_tuple=True)
            scores[rows, ngrams[rows, places, -1]] = -torch.inf
        return scores

    return process


# ---- keys and values that beams share


class Layer(DynamicLayer):
    """Keys and values (examples, heads, slots, width) of one attention layer.

    `view` is shared by all self-attention layers, or all cross-attention layers: `max_slots` (None: of the source),
    the `positions` of the slots, and the `mask`. The attribute `layer` of the tensor of keys leads `attend` back here.
    """

    def __init__(self, view):
        super().__init__()
        self.view, self.slots, self.tokens, self.reads = view, 0, 0, 0

    def update(self, keys, values, *_, **__):
        rows, heads, _, width = keys.shape
        if self.view.max_slots is None:  # the source: called once
            self.stored = [keys.contiguous(), values.contiguous()]
        else:
            if not self.tokens:
                self.stored = [x.new_empty(rows, heads, self.view.max_slots, width) for x in (keys, values)]
            examples, first = len(self.stored[0]), self.slots
            self.slots += rows // examples
            self.tokens += 1
            for stored, new in zip(self.stored, (keys, values), strict=True):
                stored[:, :, first : self.slots] = new.reshape(examples, -1, heads, width).transpose(1, 2)
        return self.show()

    def show(self):
        slots = self.slots or None  # None: all slots of the source
        self.keys, self.values = (stored[:, :, :slots] for stored in self.stored)
        self.keys.layer = self
        return self.keys, self.values

    def keep(self, select) -> None:
        self.stored = [select(stored) for stored in self.stored]
        self.show()

    def get_seq_length(self) -> int:
        return self.tokens


def attend(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
    """Attention function of Transformers: queries (examples * beams, heads, 1, width), keys stored by `Layer`.

    Two matrix products: with so few queries they are as fast as the fused kernel in float32, and twice as fast in
    bfloat16 on a CPU.
    """
    rows, heads, _, width = query.shape
    layer, examples = key.layer, len(key)
    layer.reads += 1
    query = query.reshape(examples, rows // examples, heads, width).transpose(1, 2)
    scores = query * (width**-0.5 if scaling is None else scaling) @ key.transpose(2, 3)
    if layer.view.positions is not None and position_bias is not None:
        scores = scores + position_bias[..., layer.view.positions]
    if layer.view.mask is not None:
        scores = scores + layer.view.mask.to(scores.dtype)  # 0 or hidden: no rounding
    weights = scores.softmax(-1).to(value.dtype)  # computed in float32 for bfloat16 too
    return (weights @ value).transpose(1, 2).reshape(rows, 1, heads, width), None


# no mask function is registered under this name, so that models make no mask
AttentionInterface.register(ATTENTION, attend)
