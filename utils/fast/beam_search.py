"""Greedy and beam search of encoder-decoders that stores what is read once for each example, not once for each beam.

`model.generate` copies an example's encoder states for every beam, and at every step it copies all keys and values, the
source's too, into the new order of the beams. Here a source's keys and values are computed and stored once, and the
beams of an example are queries side by side on the same keys. What the beams wrote is stored once as well and never
moves: a step appends a slot for each beam, every beam reads all slots of its example, and a mask says which of them are
its own past. Examples that are done leave the batch. The model's own modules and the logits processors of Transformers
do the rest; in float32 the tokens are those of `generate`.
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
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module
from transformers.modeling_outputs import BaseModelOutput

# encoder-decoders whose decoder layers attend to all tokens before and to the whole source, without further masks
MODEL_TYPES = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "longt5", "m2m_100", "marian", "mbart", "mt5",
    "pegasus", "pegasus_x", "plbart", "t5", "umt5",
)  # fmt: skip
# settings that this search does not know; each with the values at which it does nothing
UNKNOWN_SETTINGS = {"num_return_sequences": (None, 1), "return_dict_in_generate": (None, False), "max_time": (None,),
                    "stop_strings": (None,), "guidance_scale": (None, 1)}  # fmt: skip
NEVER = -1e9  # the score that `generate` gives to what must not be chosen


class NotShared(Exception):
    """The model's attention does not go through Transformers' attention interface."""


class Layer(DynamicLayer):
    """Keys and values of one attention: (examples, heads, slots, width).

    `view` is what all layers of the kind have in common. The tensor of keys carries its layer to `attend`.
    """

    def __init__(self, view):
        super().__init__()
        self.view, self.slots, self.tokens, self.reads = view, 0, 0, 0

    def update(self, keys, values, *_, **__):
        rows, heads, _, width = keys.shape
        if self.view.max_slots is None:  # of the source, which come once
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
        slots = self.slots or None  # all of the source's
        self.keys, self.values = (stored[:, :, :slots] for stored in self.stored)
        self.keys.layer = self
        return self.keys, self.values

    def keep(self, select) -> None:
        self.stored = [select(stored) for stored in self.stored]
        self.show()

    def get_seq_length(self) -> int:
        return self.tokens


def attend(module, query, key, value, attention_mask, scaling=None, position_bias=None, **_):
    """Attention of the beams of an example, (examples * beams, heads, 1, width), to the same keys.

    Two products of matrices, because they are as fast as the fused kernel in float32, where queries are this few, and
    twice as fast in bfloat16 on a processor.
    """
    rows, heads, _, width = query.shape
    layer, examples = key.layer, len(key)
    layer.reads += 1
    query = query.reshape(examples, rows // examples, heads, width).transpose(1, 2)
    scores = query * (width**-0.5 if scaling is None else scaling) @ key.transpose(2, 3)
    if layer.view.positions is not None and position_bias is not None:
        scores = scores + position_bias[..., layer.view.positions]
    if layer.view.mask is not None:
        scores = scores + layer.view.mask.to(scores.dtype)  # of what is seen 0: nothing is rounded
    weights = scores.softmax(-1).to(value.dtype)  # computed in float32, also of bfloat16
    return (weights @ value).transpose(1, 2).reshape(rows, 1, heads, width), None


# There is no function of this name that makes masks, so that models make none.
AttentionInterface.register("beams_share_keys", attend)


@torch.no_grad()
def beam_search(model, hidden, mask, **generation) -> torch.Tensor:
    """Token ids as `model.generate` returns them, (examples, 1 + generated tokens), the first of them the start token.

    Args:
        hidden: (examples, source tokens, hidden) the encoder's states.
        mask: (examples, source tokens) 1 at real tokens.
        generation: what `generate` takes; the model's generation_config holds for what is not given.

    Goes through `generate` itself where the search would not be the same: sampling and other modes, arguments that are
    not settings, weights sharded over processes (which must all take the same number of steps), and models that are not
    in MODEL_TYPES or whose attention cannot be replaced.
    """
    encoded = {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden), "attention_mask": mask}
    config = copy.deepcopy(model.generation_config)
    unused = config.update(**generation)
    if unused or not is_supported(model, config):
        return model.generate(**encoded, **generation)
    beams = SimpleNamespace(
        count=config.num_beams or 1,
        length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
        early_stopping=config.early_stopping or False,
    )
    # `generate` prepares settings and processors as ever; it is told of one beam, so that it copies nothing for others
    plain = {**generation, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
    decoder = model.get_decoder()
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("beams_share_keys")
    try:
        return model.generate(**encoded, **plain, custom_generate=partial(search, beams=beams, encoded=encoded))
    except NotShared:
        decoder.set_attn_implementation(usual)
        return model.generate(**encoded, **generation)
    finally:
        decoder.set_attn_implementation(usual)


def is_supported(model, config) -> bool:
    return (
        not model.training  # with its dropout
        and model.config.model_type in MODEL_TYPES
        and config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH)
        and all(getattr(config, name, None) in values for name, values in UNKNOWN_SETTINGS.items())
        and not is_deepspeed_zero3_enabled()
        and not is_fsdp_managed_module(model)
        and not any(isinstance(parameter, DTensor) for parameter in model.parameters())
    )


def search(model, start, *, logits_processor, generation_config, beams, encoded, **_) -> torch.Tensor:
    """The decoding function for `generate`; start (examples, 1) holds the start tokens."""
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

    # what `generate` fills up with
    pad = generation_config._pad_token_tensor
    fill = pad if beams.count == 1 else pad or eos[0]
    running = fill.repeat(examples, beams.count, max_length)
    running[:, :, 0] = start
    scores = torch.full((examples, beams.count), NEVER, device=device)
    state = SimpleNamespace(
        example=torch.arange(examples, device=device),
        running=running,
        scores=scores.index_fill(1, torch.tensor([0], device=device), 0.0),  # at first all beams are the same
        ended=running.clone(),
        ended_scores=scores,
        has_ended=torch.zeros_like(scores, dtype=torch.bool),
        ended_lengths=torch.ones_like(scores, dtype=torch.long),
    )
    result, lengths = running[:, 0].clone(), torch.ones(examples, dtype=torch.long)

    # its name in Transformers from 5.24 on, for the models that were moved over to it
    cache_argument = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    for length in range(1, max_length):
        tokens = state.running[:, : 1 if length == 1 else None, length - 1]  # the first token is the same in all beams
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
            # the last ones take the places of those that are done
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
    """The mask of the next step, (examples, 1, beams, slots), and the position of each slot.

    A beam sees what its parent, (examples, beams), saw, and its own new slot. The first token has one slot for all.
    """
    examples, beams = parents.shape
    if mask is None:
        mask = torch.zeros(examples, 1, beams, 1, device=parents.device)
    seen = mask.take_along_dim(parents[:, None, :, None], 2)
    own = torch.full((beams, beams), -torch.inf, device=mask.device).fill_diagonal_(0.0)
    positions = torch.arange(1, length + 1, device=mask.device).repeat_interleave(beams)
    return torch.cat([seen, own.expand(examples, 1, -1, -1)], 3), torch.cat([positions.new_zeros(1), positions])


def fill_gaps(done):
    """A function that keeps the rows that are not done, in place: the last of them move to the gaps of the first."""
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
    """One step of beam search, as in Transformers; returns each beam's parent, and which examples are done."""
    examples, count = state.scores.shape
    past = state.running[:, :, :length].flatten(0, 1)
    totals = process(past, logits.log_softmax(-1)).view(examples, count, -1)
    totals += state.scores[..., None]
    # so many that `count` are left to run on when all others end
    points, index = totals.flatten(1).topk(max(2, 1 + len(eos)) * count)
    parents, tokens = index // totals.shape[-1], index % totals.shape[-1]
    candidates = state.running.take_along_dim(parents[..., None], 1)
    candidates[..., length] = tokens
    ends = torch.isin(tokens, eos) | (length + 1 == max_length)

    state.scores, chosen = (points + ends * NEVER).topk(count)
    state.running = candidates.take_along_dim(chosen[..., None], 1)
    parents = parents.take_along_dim(chosen, 1)

    ends[:, count:] = False  # the others are only there to run on
    points = points / length**beams.length_penalty
    state.ended_scores, best = torch.cat([state.ended_scores, points + ~ends * NEVER], 1).topk(count)
    for name, new in (("ended", candidates), ("has_ended", ends),
                      ("ended_lengths", torch.full_like(tokens, length + 1))):  # fmt: skip
        merged = torch.cat([getattr(state, name), new], 1)
        setattr(state, name, merged.take_along_dim(best[..., None] if merged.dim() == 3 else best, 1))

    # done where the best that runs on, were it to end now ("never": at any length), would be no better than the worst
    # that has ended
    final = max_length - 1 if beams.early_stopping == "never" and beams.length_penalty > 0 else length
    worst = torch.where(state.has_ended, state.ended_scores.min(1, keepdim=True)[0], NEVER)
    done = ~(state.scores[:, :1] / final**beams.length_penalty > worst).any(1) | (length + 1 == max_length)
    return parents, done | state.has_ended.all(1) if beams.early_stopping is True else done


def no_repeated_ngrams(size: int):
    """The logits processor of Transformers, without its loop over rows and tokens."""

    def process(tokens, scores):
        if tokens.shape[1] >= size:
            ngrams = tokens.unfold(1, size, 1)
            last = tokens[:, None, tokens.shape[1] - size + 1 :]
            rows, places = (ngrams[..., :-1] == last).all(-1).nonzero(as_tuple=True)
            scores[rows, ngrams[rows, places, -1]] = -torch.inf
        return scores

    return process
