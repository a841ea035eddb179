"""The search against Transformers' `generate`, token by token; what it computes once; where it stands aside."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, NoRepeatNGramLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.bart import modeling_bart
from transformers.models.llama import modeling_llama

from utils.fast import beam_search as generation
from utils.fast.beam_search import MODEL_TYPES, beam_search, no_repeated_ngrams, prompted_search
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.sources import collate

VOCABULARY, PAD, EOS = 60, 1, 2
TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "vocab_size": VOCABULARY, "decoder_start_token_id": EOS}
LIKE_BART = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
             "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64, "d_model": 16,
             "init_std": 0.3}  # fmt: skip
LIKE_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "initializer_factor": 1.5}
LIKE_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "head_dim": 8,
              "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
              "initializer_range": 0.4}  # fmt: skip
LIKE_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.4}
LENGTHS = (7, 12, 5, 9, 1)  # of the sources


def build(kind: str, eos_bias: float = 1.5, **settings):
    """A tiny model with random weights and sources that end after different numbers of tokens."""
    torch.manual_seed(0)
    size = LIKE_T5 if "t5" in kind else LIKE_BART
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **{**TOKENS, **size, **settings})).eval()
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits + eos_bias * (torch.arange(VOCABULARY) == EOS))
    return model


def encoded(lengths=LENGTHS, seed=0):
    """States of an encoder, and their mask."""
    hidden = 2 * torch.randn(len(lengths), max(lengths), 16, generator=torch.Generator().manual_seed(seed))
    return hidden, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def transformers_generate(model, hidden, mask, **settings):
    return model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask, **settings
    )  # fmt: skip


def build_decoder(kind: str, seed: int = 0, eos_bias: float = 1.5, **settings):
    """A tiny decoder-only model with random weights; what it writes depends on the prompt, and ends at some time."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**TOKENS, **(LIKE_GPT2 if kind == "gpt2" else LIKE_LLAMA), **settings})
    config.tie_word_embeddings = False  # else each token makes itself likely
    model = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.update(pad_token_id=PAD, eos_token_id=EOS)
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits + eos_bias * (torch.arange(VOCABULARY) == EOS))
    return model


def prompts(lengths=LENGTHS, seed=0):
    """Token ids of prompts, padded on the right, and their mask."""
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return ids.masked_fill(mask == 0, PAD), mask


def transformers_continue(model, ids, mask, pad=PAD, **settings):
    """What Transformers writes after the prompts, which it wants padded on the left."""
    rows = [row[:length] for row, length in zip(ids, mask.sum(1), strict=True)]
    left = torch.stack([torch.cat([row.new_full((ids.shape[1] - len(row),), pad), row]) for row in rows])
    return model.generate(input_ids=left, attention_mask=mask.flip(1), **settings)[:, ids.shape[1] :]


@pytest.fixture
def searched(monkeypatch):
    """A list that grows with each search that was done to its end and not left to Transformers."""
    for kind in (generation.reads_sources, generation.reads_prompts):
        assert generation.agrees(kind)  # which searches once
    calls, search = [], generation.search

    def spy(*args, **kwargs):
        result = search(*args, **kwargs)
        calls.append(len(result))
        return result

    monkeypatch.setattr(generation, "search", spy)
    return calls


# ---- the same tokens

SETTINGS = {
    "greedy": {},
    "greedy, no 2-gram twice": {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
    "greedy, repetition": {"repetition_penalty": 1.7},
    "beams": {"num_beams": 4},
    "two beams, short": {"num_beams": 2, "length_penalty": 0.5},
    "long": {"num_beams": 4, "length_penalty": 2.0},
    "minimum": {"num_beams": 3, "min_new_tokens": 7},
    "no 2-gram twice": {"num_beams": 4, "no_repeat_ngram_size": 2, "min_new_tokens": 9},
    "no token twice": {"num_beams": 4, "no_repeat_ngram_size": 1},
    "early": {"num_beams": 4, "early_stopping": True, "length_penalty": 2.0},
    "never early": {"num_beams": 4, "early_stopping": "never", "length_penalty": 1.5},
    "forced": {"num_beams": 4, "forced_bos_token_id": 9, "forced_eos_token_id": EOS},
    "several ends": {"num_beams": 3, "eos_token_id": [EOS, 5, 6]},
    "suppressed": {"num_beams": 4, "suppress_tokens": [7, 8, 11], "bad_words_ids": [[13], [20, 21]]},
    "one token": {"num_beams": 4, "max_new_tokens": 1},
    "one token, greedy": {"max_new_tokens": 1},
    "no end": {"num_beams": 4, "eos_token_id": None, "max_new_tokens": 5},
}


@pytest.mark.parametrize("kind", ["bart", "t5", "pegasus"])
def test_tokens_are_those_of_transformers(kind, searched):
    model, inputs = build(kind), encoded()
    lengths, results = set(), {}
    for name, settings in SETTINGS.items():
        settings = {"max_new_tokens": 14, **settings}
        if settings.get("eos_token_id", 0) is None:
            model.generation_config.eos_token_id = settings.pop("eos_token_id")
        ids = beam_search(model, *inputs, **settings)
        assert torch.equal(ids, transformers_generate(model, *inputs, **settings)), name
        results[name] = ids.tolist()
        lengths |= {(row != PAD).sum().item() for row in ids}
    assert len(searched) == len(SETTINGS)
    assert len(lengths) > 5  # outputs do end at different lengths
    assert results["early"] != results["long"]


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_listed_kind_of_model_is_searched_and_gives_the_same_tokens(kind, searched):
    model, inputs = build(kind), encoded()
    settings = {"num_beams": 3, "max_new_tokens": 10, "no_repeat_ngram_size": 3}
    assert torch.equal(beam_search(model, *inputs, **settings), transformers_generate(model, *inputs, **settings))
    assert searched


@pytest.mark.parametrize("passages", [(1, 1, 1, 1), (3, 1, 2, 4), (2,)], ids=["concat", "fid", "one example"])
@pytest.mark.parametrize("beams", [1, 4])
def test_the_summarizer_gives_the_tokens_of_transformers(passages, beams, searched, monkeypatch):
    monkeypatch.setattr("utils.models.encoder_decoder.ENCODED_ON_CPU", 30)  # several parts
    summarizer = EncoderDecoder(build("bart"))
    generator = torch.Generator().manual_seed(3)
    sources = [
        [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in LENGTHS[:count]]
        for count in passages
    ]
    batch = collate(sources, [[EOS]] * len(sources), PAD)
    del batch["labels"]
    settings = {"num_beams": beams, "max_new_tokens": 12, "min_new_tokens": 2}
    with torch.no_grad():
        expected = transformers_generate(summarizer.model, *summarizer.encode(**batch), **settings)
    assert torch.equal(summarizer.generate(**batch, **settings), expected[:, 1:])
    assert searched == [len(passages)]


def test_the_models_own_settings_hold_for_what_is_not_given(searched):
    model, inputs = build("bart"), encoded()
    plain = beam_search(model, *inputs, num_beams=1, max_new_tokens=12)
    model.generation_config.update(num_beams=4, length_penalty=2.0, no_repeat_ngram_size=2, max_new_tokens=12,
                                   forced_bos_token_id=4, early_stopping=True)  # fmt: skip
    ids = beam_search(model, *inputs)
    assert torch.equal(ids, transformers_generate(model, *inputs))
    assert ids.tolist() != plain.tolist()
    assert len(searched) == 2


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_repeated_ngrams_are_those_of_transformers(size):
    tokens = torch.randint(0, 4, (40, 9), generator=torch.Generator().manual_seed(size))
    for length in range(1, 10):
        expected = NoRepeatNGramLogitsProcessor(size)(tokens[:, :length], torch.zeros(40, 4))
        assert torch.equal(no_repeated_ngrams(size)(tokens[:, :length], torch.zeros(40, 4)), expected)


DECODERS = {
    "llama": {},
    "llama, own heads": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen2, windows": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                    "rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                                        "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}},
    "mistral": {"sliding_window": 4},
    "llama4_text": {"attention_chunk_size": 4, "num_local_experts": 2, "intermediate_size_mlp": 32},
    "phi": {},
    "gpt2": {},
    "gpt_neox": {},
    "roberta": {"is_decoder": True},
    "modernbert-decoder": {"local_attention": 8, "global_attn_every_n_layers": 2, "head_dim": 4},
}  # fmt: skip


@pytest.mark.parametrize("kind", DECODERS)
def test_decoder_only_models_of_many_kinds_write_the_tokens_of_transformers(kind, searched):
    written = set()
    for seed in range(3):
        model, inputs = build_decoder(kind.split(",")[0], seed, **DECODERS[kind]), prompts(seed=seed)
        for settings in ({}, {"num_beams": 3, "no_repeat_ngram_size": 2}):
            ids = prompted_search(model, *inputs, max_new_tokens=12, **settings)
            assert torch.equal(ids, transformers_continue(model, *inputs, max_new_tokens=12, **settings)), settings
            written |= {tuple(row) for row in ids.tolist()}
    assert len(searched) == 6
    assert len(written) > 15  # outputs differ, and so depend on the prompts


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_decoder_only_models_follow_all_settings_of_the_search(kind, searched):
    model, inputs = build_decoder(kind, **DECODERS[kind]), prompts()
    lengths = set()
    for name, settings in SETTINGS.items():
        settings = {"max_new_tokens": 14, **settings}
        if settings.get("eos_token_id", 0) is None:
            model.generation_config.eos_token_id = settings.pop("eos_token_id")
        ids = prompted_search(model, *inputs, **settings)
        assert torch.equal(ids, transformers_continue(model, *inputs, **settings)), name
        lengths |= {(row != PAD).sum().item() for row in ids}
    assert len(searched) == len(SETTINGS)
    assert len(lengths) > 5


@pytest.mark.parametrize("beams", [1, 4])
def test_padding_that_is_also_the_end_counts_for_what_it_counts_for_in_transformers(beams, searched):
    model, settings = build_decoder("llama"), {"num_beams": beams, "max_new_tokens": 12}
    model.generation_config.update(pad_token_id=None)
    for lengths in (LENGTHS, (1, 1), (9,)):
        ids, mask = prompts(lengths)
        inputs = ids.masked_fill(mask == 0, EOS), mask
        for penalty in ({}, {"repetition_penalty": 4.0}, {"no_repeat_ngram_size": 1}):
            ids = prompted_search(model, *inputs, **settings, **penalty)
            assert torch.equal(ids, transformers_continue(model, *inputs, pad=EOS, **settings, **penalty)), penalty
    assert len(searched) == 9


def test_columns_that_hold_only_padding_change_nothing(searched):
    model, (ids, mask) = build_decoder("llama"), prompts()
    wider = [torch.nn.functional.pad(x, (0, 5), value=value) for x, value in ((ids, PAD), (mask, 0))]
    settings = {"num_beams": 3, "max_new_tokens": 8}
    assert torch.equal(prompted_search(model, *wider, **settings), prompted_search(model, ids, mask, **settings))


@pytest.mark.parametrize("fault", ["padded on the left", "empty"])
def test_prompts_that_are_not_padded_on_the_right_are_refused(fault):
    ids, mask = prompts((3, 5))
    mask = mask.flip(1) if fault == "padded on the left" else mask * torch.tensor([[0], [1]])
    with pytest.raises(ValueError, match="padding on the right"):
        prompted_search(build_decoder("llama"), ids, mask, max_new_tokens=3)


# ---- what is computed how often


def test_prompts_are_read_once_whatever_the_beams_a_few_at_a_time_the_longest_first(monkeypatch, searched):
    monkeypatch.setattr(generation, "READ_ON_CPU", 16)
    model, inputs, read, vocabulary = build_decoder("llama"), prompts(), [], []
    model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, _, keys: read.append(keys.shape[:2]))
    model.lm_head.register_forward_hook(lambda module, inputs, logits: vocabulary.append(logits.shape[1]))
    ids = prompted_search(model, *inputs, num_beams=4, max_new_tokens=8)
    # one token less than the prompt, with which the search starts; then all beams at once
    assert read[:6] == [(1, 11), (2, 8), (2, 4), (5, 1), (20, 1), read[5]]
    assert set(vocabulary) == {1}
    assert torch.equal(ids, transformers_continue(model, *inputs, num_beams=4, max_new_tokens=8))


@pytest.mark.parametrize("beams", [1, 4])
def test_prompted_examples_that_are_done_leave_the_batch(beams, searched):
    model, inputs, rows = build_decoder("gemma2", eos_bias=4, **DECODERS["gemma2"]), prompts(), []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, _: rows.append(len(inputs[0])))
    ids = prompted_search(model, *inputs, num_beams=beams, max_new_tokens=30)
    hook.remove()
    assert rows[:2] == [len(LENGTHS), len(LENGTHS)]  # prompts, then their last tokens
    assert rows[2:] == sorted(rows[2:], reverse=True)
    assert 0 < rows[-1] < rows[2] <= len(LENGTHS) * beams
    assert torch.equal(ids, transformers_continue(model, *inputs, num_beams=beams, max_new_tokens=30))


def test_keys_of_the_source_are_computed_once_for_each_example_whatever_the_beams():
    model, inputs, seen = build("bart"), encoded(), []
    for layer in model.model.decoder.layers:
        layer.encoder_attn.k_proj.register_forward_hook(lambda module, inputs, keys: seen.append(keys.shape))
    beam_search(model, *inputs, num_beams=4, max_new_tokens=8)
    assert seen == [(len(LENGTHS), max(LENGTHS), 16)] * 2


@pytest.mark.parametrize("beams", [1, 4])
def test_examples_that_are_done_leave_the_batch(beams):
    model, inputs, rows = build("bart", eos_bias=2.5), encoded(), []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, inputs, _: rows.append(len(inputs[0])))
    ids = beam_search(model, *inputs, num_beams=beams, max_new_tokens=30)
    hook.remove()
    assert rows[:2] == [len(LENGTHS), len(LENGTHS) * beams]
    assert rows[1:] == sorted(rows[1:], reverse=True)
    assert 0 < rows[-1] < rows[1]
    assert torch.equal(ids, transformers_generate(model, *inputs, num_beams=beams, max_new_tokens=30))


@pytest.mark.parametrize("beams", [1, 4])
def test_where_all_end_early_the_result_is_no_wider_than_the_longest(beams):
    model, inputs, settings = build("bart", eos_bias=9.0), encoded(), {"num_beams": beams, "max_new_tokens": 30}
    ids = beam_search(model, *inputs, **settings)
    assert ids.shape[1] < 31
    assert torch.equal(ids, transformers_generate(model, *inputs, **settings))


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_in_bfloat16_outputs_are_as_likely_as_in_float32(cast):
    model, (hidden, mask) = build("bart"), encoded()
    settings = {"num_beams": 4, "max_new_tokens": 12, "min_new_tokens": 3}
    exact = beam_search(model, hidden, mask, **settings)

    @torch.no_grad()
    def log_likelihood(ids):
        logits = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask, decoder_input_ids=ids
        ).logits  # fmt: skip
        each = logits[:, :-1].log_softmax(-1).take_along_dim(ids[:, 1:, None], 2)[..., 0]
        return each.masked_fill(ids[:, 1:] == PAD, 0.0).sum(1) / (ids[:, 1:] != PAD).sum(1)

    expected = log_likelihood(exact)
    if cast == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            ids = beam_search(model, hidden, mask, **settings)
    else:
        ids = beam_search(build("bart").bfloat16(), hidden.bfloat16(), mask, **settings)
    assert (log_likelihood(ids) > expected - 0.1).all()
    random = torch.randint(3, VOCABULARY, exact.shape, generator=torch.Generator().manual_seed(0))
    assert (log_likelihood(random) < expected - 0.5).all()


@pytest.mark.parametrize("cast", ["autocast", "weights"])
def test_in_bfloat16_a_decoder_only_model_writes_what_is_as_likely(cast, searched):
    model, (ids, mask) = build_decoder("llama"), prompts((7, 12, 5, 9))
    settings = {"num_beams": 4, "max_new_tokens": 6, "min_new_tokens": 6}

    @torch.no_grad()
    def log_likelihood(written):
        total = []
        for prompt, length, new in zip(ids, mask.sum(1), written, strict=True):
            logits = model(input_ids=torch.cat([prompt[:length], new])[None]).logits[0, length - 1 : -1]
            total.append(logits.log_softmax(-1).gather(1, new[:, None]).mean())
        return torch.stack(total)

    expected = log_likelihood(prompted_search(model, ids, mask, **settings))
    if cast == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            written = prompted_search(model, ids, mask, **settings)
    else:
        written = prompted_search(build_decoder("llama").bfloat16(), ids, mask, **settings)
    assert len(searched) == 2
    assert (log_likelihood(written) > expected - 0.1).all()
    assert (log_likelihood(written.flip(0)) < expected - 0.5).all()  # the model does look at the prompt


# ---- where it stands aside

ASIDE = {
    "mamba": {"state_size": 4, "conv_kernel": 2},  # a state
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 4},  # some layers
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1},  # sinks in the attention
    "llama": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},  # positions of the batch
    "bloom": {"n_layer": 2, "n_head": 2},  # attention of its own
    "xglm": {"d_model": 16, "num_layers": 2, "attention_heads": 2, "ffn_dim": 32},  # the same
    "moshi": {"sliding_window": 4, "ffn_dim": 32},  # the cache forgets what the mask shows
}


@pytest.mark.parametrize("kind", ASIDE)
@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_that_cannot_be_searched_is_left_to_transformers(kind, beams, searched):
    model, inputs = build_decoder(kind, **ASIDE[kind]), prompts()
    usual = model.config._attn_implementation
    for _ in range(2):
        ids = prompted_search(model, *inputs, num_beams=beams, max_new_tokens=8)
        assert torch.equal(ids, transformers_continue(model, *inputs, num_beams=beams, max_new_tokens=8))
    assert not searched
    assert model.config._attn_implementation == usual


@pytest.mark.parametrize("change", ["mask", "keys", "a new argument"])
def test_attention_that_the_search_does_not_know_is_left_to_transformers_and_not_tried_again(
    change, searched, monkeypatch
):
    usual = modeling_llama.ALL_ATTENTION_FUNCTIONS

    class Changed:
        def get_interface(self, name, default):
            def attend(module, query, key, value, mask, **settings):
                key = key * 1.0 if change == "keys" else key
                mask = mask + 0.0 if change == "mask" and mask is not None else mask
                if change == "a new argument":
                    settings["temperature"] = 1.0
                return usual.get_interface(name, default)(module, query, key, value, mask, **settings)

            return attend

    monkeypatch.setattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS", Changed())
    model, inputs, passes = build_decoder("llama"), prompts(), []
    expected = transformers_continue(model, *inputs, num_beams=3, max_new_tokens=8)
    model.register_forward_hook(lambda *_: passes.append(1))
    for most in (9, 8):  # the first time, prompts are read in vain
        passes.clear()
        assert torch.equal(prompted_search(model, *inputs, num_beams=3, max_new_tokens=8), expected)
        assert len(passes) == most
    assert not searched


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True},
        {"num_beams": 4, "num_return_sequences": 2},
        {"encoder_no_repeat_ngram_size": 2},
        {"encoder_repetition_penalty": 1.5, "num_beams": 2},
    ],
    ids=str,
)
def test_what_the_search_of_a_decoder_does_not_know_is_left_to_transformers(settings, searched):
    model, inputs = build_decoder("llama"), prompts()
    torch.manual_seed(1)
    ids = prompted_search(model, *inputs, max_new_tokens=8, **settings)
    torch.manual_seed(1)
    assert torch.equal(ids, transformers_continue(model, *inputs, max_new_tokens=8, **settings))
    assert not searched


def test_a_model_in_training_keeps_its_dropout(searched):
    beam_search(build("bart").train(), *encoded(), max_new_tokens=4)
    assert not searched


@pytest.mark.parametrize("settings", [
    {"do_sample": True}, {"num_beams": 4, "do_sample": True}, {"num_beams": 4, "num_return_sequences": 2},
    {"num_beams": 2, "prefix_allowed_tokens_fn": lambda batch, ids: list(range(2, 30))},
], ids=["sampling", "beam sampling", "several results", "a function"])  # fmt: skip
def test_what_the_search_does_not_know_is_left_to_transformers(settings, searched):
    model, inputs = build("bart"), encoded()
    torch.manual_seed(1)
    ids = beam_search(model, *inputs, max_new_tokens=8, **settings)
    torch.manual_seed(1)
    assert torch.equal(ids, transformers_generate(model, *inputs, max_new_tokens=8, **settings))
    assert not searched


def test_a_model_that_is_not_listed_is_left_to_transformers(searched):
    model, inputs = build("led", attention_window=4), encoded()
    settings = {"num_beams": 3, "max_new_tokens": 8}
    assert not generation.reads_sources(model, None)
    assert torch.equal(beam_search(model, *inputs, **settings), transformers_generate(model, *inputs, **settings))
    assert not searched


def test_a_model_whose_attention_cannot_be_replaced_is_left_to_transformers(searched, monkeypatch):
    class Fixed:
        def get_interface(self, name, default):
            return default

    monkeypatch.setattr(modeling_bart, "ALL_ATTENTION_FUNCTIONS", Fixed())
    model, inputs = build("bart", attn_implementation="eager"), encoded()
    settings = {"num_beams": 3, "max_new_tokens": 8}
    assert torch.equal(beam_search(model, *inputs, **settings), transformers_generate(model, *inputs, **settings))
    assert not searched


# ---- nothing stays changed


def test_the_model_attends_as_before_also_after_an_error(monkeypatch):
    model, inputs = build("bart"), encoded()
    usual = model.config._attn_implementation
    beam_search(model, *inputs, num_beams=2, max_new_tokens=3)
    assert model.config._attn_implementation == usual
    monkeypatch.setattr(generation, "advance_beams", None)
    ids = beam_search(model, *inputs, num_beams=2, max_new_tokens=3)
    assert torch.equal(ids, transformers_generate(model, *inputs, num_beams=2, max_new_tokens=3))
    assert model.config._attn_implementation == usual
