"""Greedy and beam search that keeps keys and values once for each example, not for each beam.

Transformers' `generate` copies the source or the prompt for each beam, and at each step it copies all keys and values
into the new order of the beams. Here the keys and values of a source (`beam_search`, for encoder-decoders) or a prompt
(`prompted_search`, for decoder-only models) are computed and stored once, and the beams of an example are several
queries on them. The keys and values of generated tokens are stored once too, and never move: each step appends a slot
for each beam, each beam attends to all slots of its example, and a mask hides the slots that are not in its own past.
Finished examples leave the batch. In float32 the tokens are those of `generate`.

Leans on these internals of Transformers: `generate(custom_generate=...)` and the arguments it passes on,
`GenerationConfig._eos_token_tensor` and `_pad_token_tensor`, `config._attn_implementation`, the methods of a cache
layer (`DynamicLayer`) that models call, the layers of `EncoderDecoderCache`, and that attention functions get the
cache's keys as the same tensor object. For encoder-decoders: that attention functions get no mask where no mask
function has their name. For decoder-only models: that attention functions get as the same tensor object what the mask
function of their name returned, which itself gets the model's rule for which positions see which (`mask_function`);
that the layers of `DynamicCache(config=...)` tell what a model caches; `_can_set_attn_implementation`, the `rope_type`
of modules with rotary positions, and `prompt_ignore_length` of a logits processor. `generate` itself is called where
one of these is gone, the search fails, or a tiny model gets other tokens from it (`agrees`).
"""

import copy
import inspect
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from weakref import WeakSet

import torch
from torch.distributed.tensor import DTensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
)
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.generation import GenerationMode
from transformers.modeling_outputs import BaseModelOutput

from utils.fast.internals import EFFECTS, find, has, in_one_line, warn

DynamicLayer = find("transformers.cache_utils.DynamicLayer") or object
DynamicSlidingWindowLayer = find("transformers.cache_utils.DynamicSlidingWindowLayer")

# encoder-decoders whose decoder attends to all earlier tokens and to the whole source, without other masks
MODEL_TYPES = (
    "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "longt5", "m2m_100", "marian", "mbart", "mt5",
    "pegasus", "pegasus_x", "plbart", "t5", "umt5",
)  # fmt: skip
# settings that this search does not support, each with the values that switch it off
UNSUPPORTED = {"num_return_sequences": (None, 1), "return_dict_in_generate": (None, False), "max_time": (None,),
               "stop_strings": (None,), "guidance_scale": (None, 1), "watermarking_config": (None,)}  # fmt: skip
# the same, where a prompt is what would be compared with
UNSUPPORTED_WITH_PROMPTS = {"encoder_repetition_penalty": (None, 1), "encoder_no_repeat_ngram_size": (None, 0)}
NEVER = -1e9  # score of what must not be chosen, as in `generate`
ATTENTION = "beams_share_keys"
ATTENTION_TO_PROMPTS = "beams_share_prompts"  # the same, for models that make a mask
# arguments of attention functions that change nothing here: a sliding window is in the mask too
WITHOUT_EFFECT = {"dropout", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions",
                  "output_router_logits", "output_hidden_states", "return_dict"}  # fmt: skip
# most tokens, padding included, of prompts that are read at once; fewer on a CPU, to fit its cache
READ_ON_CPU, READ_ON_GPU = 2048, 16384
LEFT_TO_TRANSFORMERS = WeakSet()  # models with which the search was tried in vain


class NotShared(Exception):
    """The model does not use the attention function that was set, or asks it for what it cannot do."""


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
    return generate(model, partial(search_sources, encoded=encoded), reads_sources, encoded, generation)


@torch.no_grad()
def prompted_search(model, input_ids, attention_mask, **generation) -> torch.Tensor:
    """Generated token ids of a decoder-only model, (examples, generated tokens), without the prompts.

    They are those of `model.generate` for the same prompts padded on the left, also in what logits processors see. It
    is called itself where this search does not apply: as in `beam_search`, and for models that keep other states than
    keys and values, whose positions depend on other examples, or whose attention cannot be replaced.

    Args:
        input_ids, attention_mask: (examples, prompt tokens), padded on the right. A ValueError if they are not.
        generation: arguments of `generate`; the others come from the model's generation_config.
    """
    lengths = attention_mask.sum(1)
    if not attention_mask[:, 0].all() or (attention_mask[:, 1:] > attention_mask[:, :-1]).any():
        raise ValueError("each prompt needs a token, and its padding on the right")
    longest = int(lengths.max())
    columns = (torch.arange(longest, device=lengths.device) + lengths[:, None]) % longest
    padded_left = {"input_ids": input_ids.gather(1, columns), "attention_mask": attention_mask.gather(1, columns)}
    method = partial(search_prompts, prompts=(input_ids[:, :longest], lengths))
    return generate(model, method, reads_prompts, padded_left, generation)[:, longest:]


def generate(model, method, is_readable, inputs: dict, generation: dict) -> torch.Tensor:
    """`model.generate`, with `method` as its decoding loop where that applies and does not fail."""
    config, problem = copy.deepcopy(model.generation_config), ""
    unknown = config.update(**generation)
    try:
        if not unknown and is_supported(model, config) and is_readable(model, config) and agrees(is_readable):
            beams = SimpleNamespace(
                count=config.num_beams or 1,
                length_penalty=1.0 if config.length_penalty is None else config.length_penalty,
                early_stopping=config.early_stopping or False,
            )
            # `generate` prepares settings and logits processors; told of one beam, it does not copy the inputs
            plain = {**generation, "num_beams": 1, "length_penalty": 1.0, "early_stopping": False}
            return model.generate(**inputs, **plain, custom_generate=partial(method, beams=beams))
    except Exception as error:  # a later version of Transformers may raise anything
        is_expected = isinstance(error, NotShared)
        problem = "its attention is not replaced" if is_expected else in_one_line(error)
    ids = model.generate(**inputs, **generation, synced_gpus=_is_sharded(model) or None)
    if problem:  # not an error of `generate` too, such as that memory ran out
        LEFT_TO_TRANSFORMERS.add(model)
        if not is_expected or model.config.model_type in MODEL_TYPES:
            warn(f"the search fails with a model of type {model.config.model_type}: {problem}", EFFECTS["search"])
    return ids


_agreed: dict = {}  # for `reads_sources` and `reads_prompts`: the result of `agrees`


def agrees(is_readable) -> bool:
    """Whether a tiny model of this kind gets the tokens of `generate` from the search; if not, it warns. Tried once.

    Later versions of Transformers may search otherwise, or count positions by other methods of a cache.
    """
    if is_readable not in _agreed:
        _agreed[is_readable] = True  # during the trial
        model, problem = None, "it writes other tokens than `generate`"
        try:
            model, ours, theirs = _write_both(is_readable)
            _agreed[is_readable] = torch.equal(ours, theirs) and model not in LEFT_TO_TRANSFORMERS
        except Exception as error:  # a later version of Transformers may raise anything
            _agreed[is_readable], problem = False, in_one_line(error)
        if not _agreed[is_readable] and model not in LEFT_TO_TRANSFORMERS:  # else it has warned
            warn(f"the search fails with a tiny model: {problem}", EFFECTS["search"])
    return _agreed[is_readable]


def _write_both(is_readable) -> tuple:
    """A tiny model, and what it writes by the search and by `generate`. The random state stays as it is."""
    from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])
    settings = {"vocab_size": 40, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
                "tie_word_embeddings": False}  # fmt: skip
    # so many ends that summaries differ in length
    generation = {"num_beams": 3, "max_new_tokens": 12, "no_repeat_ngram_size": 2, "repetition_penalty": 1.1,
                  "eos_token_id": [2, *range(5, 12)]}  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        if is_readable is reads_prompts:
            model = LlamaForCausalLM(LlamaConfig(
                **settings, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1,
            )).eval()  # fmt: skip
        else:
            model = BartForConditionalGeneration(BartConfig(
                **settings, d_model=8, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, decoder_start_token_id=2,
                forced_eos_token_id=None,
            )).eval()  # fmt: skip
        for matrix in (parameter for parameter in model.parameters() if parameter.ndim > 1):
            matrix.data = torch.randn(matrix.shape, generator=generator)
        if is_readable is reads_prompts:
            ids = torch.randint(3, 40, mask.shape, generator=generator)
            ours = prompted_search(model, ids, mask, **generation)
            left = torch.stack([row.roll(5 - int(real.sum())) for row, real in zip(ids, mask, strict=True)])
            return model, ours, model.generate(left, attention_mask=mask.flip(1), **generation)[:, 5:]
        states = torch.randn(*mask.shape, 8, generator=generator)
        inputs = {"encoder_outputs": BaseModelOutput(last_hidden_state=states), "attention_mask": mask}
        return model, beam_search(model, states, mask, **generation), model.generate(**inputs, **generation)


def _is_sharded(model) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def is_supported(model, config) -> bool:
    return (
        not model.training  # dropout would differ
        and model not in LEFT_TO_TRANSFORMERS
        and config.get_generation_mode() in (GenerationMode.GREEDY_SEARCH, GenerationMode.BEAM_SEARCH)
        and _has_none(config, UNSUPPORTED)
        and not _is_sharded(model)
        and has("search")
    )


def _has_none(config, settings: dict) -> bool:
    return all(getattr(config, name, None) in values for name, values in settings.items())


def reads_sources(model, config) -> bool:
    return model.config.model_type in MODEL_TYPES


def reads_prompts(model, config) -> bool:
    """Whether an example's positions are its own, and keys and values are all that is cached."""
    cached = {type(layer) for layer in DynamicCache(config=model.config).layers} - {DynamicSlidingWindowLayer}
    kinds = [module.rope_type for module in model.modules() if hasattr(module, "rope_type")]
    kinds = {kind for each in kinds for kind in (each.values() if isinstance(each, dict) else [each])}
    return (
        _has_none(config, UNSUPPORTED_WITH_PROMPTS)
        and "position_ids" in inspect.signature(model.forward).parameters
        and cached <= {DynamicLayer}
        and not kinds & {"dynamic", "longrope"}  # these depend on the longest of the batch
        and model._can_set_attn_implementation()
    )


@contextmanager
def replaced_attention(model, name: str):
    decoder = model.get_decoder()
    decoder = decoder if hasattr(decoder, "config") else model  # a few models call their output layer a decoder
    before = decoder.config._attn_implementation
    decoder.set_attn_implementation(name)
    try:
        yield
    finally:
        decoder.set_attn_implementation(before)


# ---- the search


def search_sources(model, start, *, encoded, generation_config, beams, **settings) -> torch.Tensor:
    """The decoding loop of an encoder-decoder, called by `generate`; start (examples, 1) holds the start tokens."""
    slots = 1 + beams.count * (generation_config.max_length - 2)
    past = View(slots, torch.zeros_like(start), torch.zeros(len(start), 1, 1, 1, device=start.device))
    source, mask = View(), encoded["attention_mask"]
    if mask is not None and not mask.all():
        source.mask = torch.zeros(mask.shape, device=start.device)
        source.mask = source.mask.masked_fill(mask == 0, torch.finfo(torch.float32).min)[:, None, None]
    with replaced_attention(model, ATTENTION):
        cache = EncoderDecoderCache(*(Cache(layer_class_to_replicate=partial(Layer, view)) for view in (past, source)))
        caches = cache.self_attention_cache, cache.cross_attention_cache

        def inputs(tokens):
            states = encoded["encoder_outputs"]
            return {"encoder_outputs": states, "decoder_input_ids": tokens, cache_argument(model): cache}

        return search(model, start, inputs, caches, (past, source), generation_config, beams, **settings)


def search_prompts(model, padded_left, *, prompts, generation_config, beams, **settings) -> torch.Tensor:
    """The decoding loop of a decoder-only model, called by `generate`.

    The prompts are read without their last tokens, with which the search starts.
    """
    input_ids, lengths = prompts
    longest, device = input_ids.shape[1], input_ids.device
    positions = torch.arange(longest, device=device).repeat(len(input_ids), 1)
    hidden = positions >= lengths[:, None] - 1
    positions[:, -1], hidden[:, -1] = lengths - 1, False
    mask = torch.zeros(hidden.shape, device=device).masked_fill(hidden, -torch.inf)[:, None, None]
    past = View(longest + beams.count * (generation_config.max_length - longest - 1), positions, mask, has_rules=True)
    cache = Cache(layer_class_to_replicate=partial(Layer, past))
    read_prompts(model, input_ids, lengths, past, cache)
    for layer, usual in zip(cache.layers, DynamicCache(config=model.config).layers, strict=False):
        layer.window = getattr(usual, "sliding_window", None)

    def inputs(tokens):
        position_ids = past.positions[:, -1:].repeat_interleave(len(tokens) // len(past.positions), 0)
        return {"input_ids": tokens, "position_ids": position_ids, cache_argument(model): cache}

    with replaced_attention(model, ATTENTION_TO_PROMPTS):
        return search(model, padded_left, inputs, (cache,), (past,), generation_config, beams, **settings)


def read_prompts(model, input_ids, lengths, view, cache) -> None:
    """Stores keys and values of the prompts but for their last tokens: a few prompts at a time, the longest first."""
    first = model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: (inputs[0][:, :1],))
    order, at_once = lengths.argsort(descending=True), READ_ON_CPU if input_ids.device.type == "cpu" else READ_ON_GPU
    try:
        while len(order):
            tokens = max(1, int(lengths[order[0]]) - 1)
            view.part, order = order.tensor_split([max(1, at_once // tokens)])
            positions = torch.arange(tokens, device=order.device).repeat(len(view.part), 1)
            # no token sees the padding on its right
            model(
                input_ids=input_ids[view.part, :tokens], position_ids=positions, use_cache=True,
                **{cache_argument(model): cache},
            )  # fmt: skip
    finally:
        first.remove()
        view.part = None


def cache_argument(model) -> str:
    """Transformers renames it, model by model, from 5.24 on."""
    return "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"


def search(model, start, inputs, caches, views, generation_config, beams, *, logits_processor, **_) -> torch.Tensor:
    """The decoding loop: start (examples, tokens) -> (examples, tokens + generated tokens).

    `inputs(tokens)` gives the model's arguments for the newest tokens (examples * beams, 1).
    """
    (examples, begin), device, max_length = start.shape, start.device, generation_config.max_length
    eos, pad = generation_config._eos_token_tensor, generation_config._pad_token_tensor
    eos = torch.tensor([-1], device=device) if eos is None else eos
    process = LogitsProcessorList(
        no_repeated_ngrams(p.ngram_size) if type(p) is NoRepeatNGramLogitsProcessor else p for p in logits_processor
    )
    # these get the padding on the left of each row, one row for an example
    penalties = [p for p in process if isinstance(getattr(p, "prompt_ignore_length", None), torch.Tensor)]
    # `generate` fills unused positions with the same
    fill = eos[0] if pad is None or (beams.count > 1 and not pad) else pad
    running = fill.repeat(examples, beams.count, max_length)
    running[:, :, :begin] = start[:, None]
    scores = torch.full((examples, beams.count), NEVER, device=device)
    state = SimpleNamespace(
        example=torch.arange(examples, device=device),
        running=running,
        scores=scores.index_fill(1, torch.tensor([0], device=device), 0.0),  # beams start equal: only the first counts
        ended=running.clone(),
        ended_scores=scores,
        has_ended=torch.zeros_like(scores, dtype=torch.bool),
        ended_lengths=torch.ones_like(scores, dtype=torch.long),
        padding=penalties[0].prompt_ignore_length if penalties else torch.zeros(examples, device=device),
    )
    result, lengths = running[:, 0].clone(), torch.ones(examples, dtype=torch.long)
    limits = SimpleNamespace(**vars(beams), begin=begin, max_length=max_length, eos=eos)

    for length in range(begin, max_length):
        tokens = state.running[:, : 1 if length == begin else None, length - 1]  # one start token for all beams
        logits = model(**inputs(tokens.reshape(-1, 1)), use_cache=True).logits[:, -1].float()
        layers = [layer for cache in caches for layer in cache.layers]
        if length == begin:
            if not layers or any(layer.reads != 1 for layer in layers):
                raise NotShared
            logits = logits.repeat_interleave(beams.count, 0)

        for penalty in penalties:
            penalty.prompt_ignore_length = state.padding.repeat_interleave(beams.count)
        advance = advance_greedily if beams.count == 1 else advance_beams
        parents, done = advance(state, logits, process, length, limits)
        if done.any():
            ends = state.example[done]
            result[ends], lengths[ends.cpu()] = state.ended[done, 0], state.ended_lengths[done, 0].cpu()
            if done.all():
                break
            # unfinished examples from the end move to the places of finished ones
            keep = fill_gaps(done)
            vars(state).update({name: keep(tensor) for name, tensor in vars(state).items()})
            parents = keep(parents)
            for shared in (*views, *layers):
                shared.keep(keep)
        views[0].append_slots(parents)
    return result[:, : int(lengths.max())]


def fill_gaps(done):
    """A function that removes the finished rows of a tensor in place: rows from the end move into the gaps."""
    count = int((~done).sum())
    gaps, movers = done[:count].nonzero()[:, 0], (~done[count:]).nonzero()[:, 0] + count

    def keep(tensor):
        tensor[gaps] = tensor[movers]
        return tensor[:count]

    return keep


def advance_greedily(state, logits, process, length, limits):
    tokens = process(state.running[:, 0, :length], logits).argmax(-1)
    state.running[:, 0, length] = tokens
    state.ended, state.ended_lengths = state.running, torch.full_like(state.ended_lengths, length + 1)
    return torch.zeros_like(tokens)[:, None], torch.isin(tokens, limits.eos) | (length + 1 == limits.max_length)


def advance_beams(state, logits, process, length, limits):
    """One step of beam search as in Transformers; returns the parent of each beam, and which examples are done."""
    examples, count = state.scores.shape
    past = state.running[:, :, :length].flatten(0, 1)
    totals = process(past, logits.log_softmax(-1)).view(examples, count, -1)
    totals += state.scores[..., None]
    # enough candidates that `count` of them go on even if all others end
    points, index = totals.flatten(1).topk(max(2, 1 + len(limits.eos)) * count)
    parents, tokens = index // totals.shape[-1], index % totals.shape[-1]
    candidates = state.running.take_along_dim(parents[..., None], 1)
    candidates[..., length] = tokens
    ends = torch.isin(tokens, limits.eos) | (length + 1 == limits.max_length)

    state.scores, chosen = (points + ends * NEVER).topk(count)
    state.running = candidates.take_along_dim(chosen[..., None], 1)
    parents = parents.take_along_dim(chosen, 1)

    ends[:, count:] = False  # only the best `count` may end, the others may go on
    points = points / (length + 1 - limits.begin) ** limits.length_penalty
    state.ended_scores, best = torch.cat([state.ended_scores, points + ~ends * NEVER], 1).topk(count)
    for name, new in (("ended", candidates), ("has_ended", ends),
                      ("ended_lengths", torch.full_like(tokens, length + 1))):  # fmt: skip
        merged = torch.cat([getattr(state, name), new], 1)
        setattr(state, name, merged.take_along_dim(best[..., None] if merged.dim() == 3 else best, 1))

    # done if the best open beam, ending now ("never": at any length), would be no better than the worst finished one
    final = limits.max_length if limits.early_stopping == "never" and limits.length_penalty > 0 else length + 1
    worst = torch.where(state.has_ended, state.ended_scores.min(1, keepdim=True)[0], NEVER)
    done = ~(state.scores[:, :1] / (final - limits.begin) ** limits.length_penalty > worst).any(1)
    done |= length + 1 == limits.max_length
    return parents, done | state.has_ended.all(1) if limits.early_stopping is True else done


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


@dataclass
class View:
    """What the attention layers share: all self-attention layers, or all cross-attention layers."""

    max_slots: int | None = None  # None: those of the source
    positions: torch.Tensor | None = None  # (examples, slots), the newest tokens in the last slots
    mask: torch.Tensor | None = None  # (examples, 1, beams, slots), 0 at what a beam sees
    has_rules: bool = False  # the model has rules for which positions see which: causal, sliding windows
    part: torch.Tensor | None = None  # the numbers of the examples whose prompts are being read
    masks: dict = field(default_factory=dict)  # `mask` with a rule and a window, for each of them

    def append_slots(self, parents) -> None:
        """A slot for the next token of each beam. A beam sees what its parent (examples, beams) saw, and its own."""
        examples, beams = parents.shape
        seen = self.mask.expand(-1, -1, beams, -1).take_along_dim(parents[:, None, :, None], 2)
        own = torch.full((beams, beams), -torch.inf, device=seen.device).fill_diagonal_(0.0)
        self.mask, self.masks = torch.cat([seen, own.expand(examples, 1, -1, -1)], 3), {}
        self.positions = torch.cat([self.positions, self.positions[:, -1:].repeat(1, beams) + 1], 1)

    def follow_rule(self, attention_mask, window: int | None):
        """The mask of a layer for which the model made `attention_mask`, and of which it would cache a window."""
        if not self.has_rules:
            return self.mask
        rule = getattr(attention_mask, "rule", None)
        if (rule, window) not in self.masks:
            zero, positions = self.positions.new_zeros(1, 1, 1, 1), self.positions[:, None, None]
            if rule is None or rule(zero, zero, zero, zero + 1).any():  # prompts would see their padding
                raise NotShared
            if window is not None and rule(zero, zero, zero + window, zero).any():  # the cache would have lost it
                raise NotShared
            seen = rule(zero, zero, positions[..., -1:], positions)
            self.masks[rule, window] = self.mask.masked_fill(~seen, -torch.inf)
        return self.masks[rule, window]

    def keep(self, select) -> None:
        self.positions, self.mask = (x if x is None else select(x) for x in (self.positions, self.mask))


class Layer(DynamicLayer):
    """Keys and values (examples, heads, slots, width) of one attention layer.

    The attribute `layer` of the tensor of keys leads `attend` back here.
    """

    def __init__(self, view):
        super().__init__()
        self.view, self.window, self.stored = view, None, None
        self.slots, self.tokens, self.reads = 0, 0, 0

    def update(self, keys, values, *_, **__):
        rows, _, tokens, _ = keys.shape
        if self.view.max_slots is None:  # the source: called once
            self.stored = [keys.contiguous(), values.contiguous()]
            return self.show()
        if self.stored is None:
            examples = rows if self.view.part is None else len(self.view.positions)
            self.stored = [
                torch.empty(examples, x.shape[1], self.view.max_slots, x.shape[3], dtype=_dtype(x), device=x.device)
                for x in (keys, values)
            ]
        if self.view.part is not None:  # a part of the prompts, of which all but the last token are stored
            self.slots = self.tokens = self.view.positions.shape[1] - 1
            for stored, new in zip(self.stored, (keys, values), strict=True):
                stored[self.view.part, :, :tokens] = new.to(stored.dtype)
                stored[self.view.part, :, tokens : self.slots] = 0.0  # hidden, but read
            return keys, values
        examples, first = len(self.stored[0]), self.slots
        self.slots += rows // examples
        self.tokens += 1
        for stored, new in zip(self.stored, (keys, values), strict=True):
            stored[:, :, first : self.slots] = new.reshape(examples, -1, *new.shape[1::2]).transpose(1, 2)
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
        return self.tokens if self.view.part is None else 0


def _dtype(x) -> torch.dtype:
    """What autocast computes products in: then it does not cast all keys at each step."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def attend(module, query, key, value, attention_mask, scaling=None, position_bias=None, softcap=None, **others):
    """Attention function of Transformers: queries (examples * beams, heads, 1, width), keys stored by `Layer`.

    Two matrix products: with so few queries they are as fast as the fused kernel in float32, and twice as fast in
    bfloat16 on a CPU. Where several heads share their keys, they are further queries on them.
    """
    layer = getattr(key, "layer", None)
    if layer is None or any(others[name] is not None for name in others.keys() - WITHOUT_EFFECT):
        raise NotShared
    layer.reads += 1
    rows, heads, _, width = query.shape
    examples, key_heads = key.shape[:2]
    shape = rows // examples, heads // key_heads  # beams, heads that share their keys
    query = query.reshape(examples, shape[0], key_heads, shape[1], width).transpose(1, 2).flatten(2, 3)
    scores = query * (width**-0.5 if scaling is None else scaling) @ key.transpose(2, 3)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if layer.view.positions is not None and position_bias is not None:
        if layer.view.has_rules:
            raise NotShared  # each example has positions of its own
        scores = scores + position_bias[..., layer.view.positions[0]]
    mask = layer.view.follow_rule(attention_mask, layer.window)
    if mask is not None:
        # 0 or hidden: no rounding
        scores = (scores.unflatten(2, shape) + mask.to(scores.dtype)[:, :, :, None]).flatten(2, 3)
    weights = scores.softmax(-1).to(value.dtype)  # computed in float32 for bfloat16 too
    return (weights @ value).unflatten(2, shape).transpose(1, 2).reshape(rows, 1, heads, -1), None


def keep_rule(mask_function, use_vmap=False, device=None, **_):
    """Mask function of Transformers: no mask, but the model's rule, to be followed by `View`."""
    mask = torch.zeros(1, 1, 1, 1, device=device)
    mask.rule = None if use_vmap else mask_function  # else it is not for tensors of positions
    return mask


# no mask function is registered under the first name, so that models make no mask
AttentionInterface.register(ATTENTION, attend)
AttentionInterface.register(ATTENTION_TO_PROMPTS, attend)
AttentionMaskInterface.register(ATTENTION_TO_PROMPTS, keep_rule)
