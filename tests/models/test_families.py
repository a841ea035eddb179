"""Families of encoder-decoders, tiny and random, in float32: loss, gradients and tokens are those of Transformers."""

import json

import pytest
import sentencepiece
import torch
from conftest import alone
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    GenerationConfig,
    GPT2Config,
    LongformerConfig,
    M2M100Tokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedTokenizerFast,
    RobertaConfig,
)
from transformers.models.bart.modeling_bart import BartAttention

from utils.data.examples import Document
from utils.errors import UsageError
from utils.fast import packing
from utils.models.encoder_decoder import EncoderDecoder, start_token
from utils.models.generation import DEFAULTS, describe_generation, settle_generation
from utils.models.languages import language_codes, set_languages
from utils.models.settings import settle_packing
from utils.models.sources import Sources, collate, count_generated, decode
from utils.models.summarizer import REFUSED, load_model_and_tokenizer, save_pretrained, set_up
from utils.models.tokenizer import train_tokenizer

VOCABULARY, PAD, EOS = 60, 1, 2
TOKENS = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 0}
LIKE_BART = {**TOKENS, "vocab_size": VOCABULARY, "decoder_start_token_id": EOS, "encoder_layers": 1,
             "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "max_position_embeddings": 64, "d_model": 16, "init_std": 0.3}  # fmt: skip
LIKE_T5 = {**TOKENS, "vocab_size": VOCABULARY, "decoder_start_token_id": PAD, "d_model": 16, "d_kv": 8, "d_ff": 32,
           "num_layers": 2, "num_heads": 2, "initializer_factor": 1.5}  # fmt: skip
LIKE_BERT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": PAD,
             "initializer_range": 0.3}  # fmt: skip
LIKE_GEMMA = {**TOKENS, "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8,
              "max_position_embeddings": 64, "sliding_window": 8, "initializer_range": 0.3,
              "final_logit_softcapping": 2.0}  # fmt: skip
LIKE_PROPHETNET = {**TOKENS, "vocab_size": VOCABULARY, "decoder_start_token_id": EOS, "hidden_size": 16,
                   "encoder_ffn_dim": 32, "num_encoder_layers": 1, "num_encoder_attention_heads": 2,
                   "decoder_ffn_dim": 32, "num_decoder_layers": 1, "num_decoder_attention_heads": 2,
                   "max_position_embeddings": 64}  # fmt: skip


def two_in_one(encoder, decoder):
    config = EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    for name, token in (("decoder_start_token_id", EOS), ("pad_token_id", PAD), ("eos_token_id", EOS)):
        setattr(config, name, token)
    return config


FAMILIES = {
    **{kind: lambda kind=kind: AutoConfig.for_model(kind, **LIKE_BART)
       for kind in ("bart", "blenderbot", "blenderbot-small", "m2m_100", "marian", "mbart", "mvp", "pegasus",
                    "pegasus_x", "plbart")},
    **{kind: lambda kind=kind: AutoConfig.for_model(kind, **LIKE_T5) for kind in ("t5", "mt5", "umt5", "longt5")},
    "bigbird_pegasus": lambda: AutoConfig.for_model("bigbird_pegasus", **LIKE_BART, attention_type="original_full"),
    "led": lambda: AutoConfig.for_model("led", **LIKE_BART, max_encoder_position_embeddings=64,
                                        max_decoder_position_embeddings=64, attention_window=[4]),
    "t5gemma": lambda: AutoConfig.for_model("t5gemma", encoder=LIKE_GEMMA, decoder=LIKE_GEMMA, vocab_size=VOCABULARY,
                                            **TOKENS),
    "bert to bert": lambda: two_in_one(BertConfig(**LIKE_BERT), BertConfig(**LIKE_BERT)),
    "bert to gpt2": lambda: two_in_one(BertConfig(**LIKE_BERT), GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3)),
    "longformer to roberta": lambda: two_in_one(LongformerConfig(**LIKE_BERT, attention_window=4),
                                                RobertaConfig(**LIKE_BERT)),
}  # fmt: skip
NOT_TRAINED = {
    "switch_transformers": lambda: AutoConfig.for_model("switch_transformers", **LIKE_T5, num_experts=2),
    "nllb-moe": lambda: AutoConfig.for_model("nllb-moe", **LIKE_BART, num_experts=2),
    "prophetnet": lambda: AutoConfig.for_model("prophetnet", **LIKE_PROPHETNET),
    "fsmt": lambda: AutoConfig.for_model(
        "fsmt", langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY,
        **{name: value for name, value in LIKE_BART.items() if name != "vocab_size"}),
}  # fmt: skip


def build(config, seed: int = 0):
    torch.manual_seed(seed)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


def random_batch(seed: int = 0):
    """Three examples of one sequence each; the first begins with a query, which two separators end."""
    generator = torch.Generator().manual_seed(seed)
    sources, targets = (
        [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
        for lengths in ((12, 7, 9), (5, 8, 3))
    )
    sources[0][3:5] = [EOS, EOS]
    return collate([[source] for source in sources], [[*target, EOS] for target in targets], PAD)


def plain_inputs(summarizer, batch):
    """The same sources for Transformers' own forward and `generate`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if summarizer.has_global_attention:
        seen_by_all = torch.zeros_like(batch["input_ids"])
        seen_by_all[0, :3] = 1  # the query
        seen_by_all[:, 0] = 1
        inputs["global_attention_mask"] = seen_by_all
    return inputs


@pytest.mark.filterwarnings("ignore:Version v4.12.0")
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_step_has_the_loss_and_the_gradients_of_transformers(kind):
    summarizer, batch = EncoderDecoder(build(FAMILIES[kind]())), random_batch()
    labels = batch["labels"]
    trained = [(name, p) for name, p in summarizer.model.named_parameters() if p.requires_grad]
    names, parameters = zip(*trained, strict=True)
    own = summarizer.model(**plain_inputs(summarizer, batch), labels=labels).loss
    ours, _ = summarizer(**batch, label_smoothing_factor=0.0)
    ours = ours / (labels != -100).sum()
    assert ours.item() == pytest.approx(own.item(), rel=1e-5)
    pairs = zip(*(torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (ours, own)), strict=True)
    for name, (our_gradient, own_gradient) in zip(names, pairs, strict=True):
        if own_gradient is None:
            assert our_gradient is None or not our_gradient.any(), name  # a pooler's
        else:
            torch.testing.assert_close(our_gradient, own_gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", FAMILIES)
def test_padded_as_on_a_gpu_a_family_has_the_same_loss_and_writes_the_same(kind, monkeypatch):
    summarizer, batch = EncoderDecoder(build(FAMILIES[kind]())), random_batch()
    settle_generation(summarizer.model, {**dict.fromkeys(DEFAULTS), "max_new_tokens": 9}, kind)
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    loss, ids = summarizer(**batch, label_smoothing_factor=0.0)[0], summarizer.generate(**inputs)
    # float32, which a GPU does not compute packed; masks are made without a look at their values
    settle_packing(summarizer, alone(device=torch.device("cuda")))
    monkeypatch.setattr(packing, "_is_waited_for", lambda device: True)
    assert not summarizer.is_packed
    assert "padded_" not in summarizer.model.config.to_json_string()
    torch.testing.assert_close(summarizer(**batch, label_smoothing_factor=0.0)[0], loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(summarizer.generate(**inputs), ids)


@pytest.mark.parametrize("flags", [
    pytest.param({}, id="defaults"),
    pytest.param({"num_beams": 1}, id="greedy", marks=pytest.mark.slow),
    pytest.param({"num_beams": 3, "no_repeat_ngram_size": 2}, id="beams", marks=pytest.mark.slow),
])  # fmt: skip
@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_model_writes_in_plain_transformers_what_it_writes_here(kind, flags, tmp_path):
    summarizer, batch = EncoderDecoder(build(FAMILIES[kind]())), random_batch()
    settle_generation(summarizer.model, {**dict.fromkeys(DEFAULTS), "max_new_tokens": 9, **flags}, kind)
    inputs = plain_inputs(summarizer, batch)
    del batch["labels"]
    ids = summarizer.generate(**batch)
    summarizer.model.save_pretrained(tmp_path)
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    theirs = plain.generate(**inputs)
    assert torch.equal(ids, theirs[:, 1:])
    assert ids.shape[1] <= 9 and theirs[0, 0] == start_token(plain, kind)


@pytest.mark.parametrize("kind", NOT_TRAINED)
def test_a_family_with_a_loss_of_its_own_is_refused_in_one_line(kind, tmp_path):
    model = build(NOT_TRAINED[kind]())
    with pytest.raises(UsageError, match=f"models of type {kind} are not supported; choose another: ") as caught:
        EncoderDecoder(model)  # what no one has tried is found by its loss
    assert "\n" not in str(caught.value)
    assert all(not hooked._forward_pre_hooks for hooked in model.modules() if hooked is model.get_output_embeddings())
    model.config.save_pretrained(tmp_path)
    train_tokenizer(["a few words"]).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=f"--teacher {tmp_path}: .*{kind} are not supported: {REFUSED[kind]}"):
        load_model_and_tokenizer(str(tmp_path), name="--teacher")


def test_a_loss_that_is_not_the_models_own_is_refused():
    class Squared(type(build(FAMILIES["bart"]()))):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is not None:
                output.loss = output.loss**2
            return output

    with pytest.raises(UsageError, match="its own loss is "):
        EncoderDecoder(Squared(FAMILIES["bart"]()))


def test_the_layers_that_fsdp_shards_are_those_of_the_model():
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy

    summarizer = EncoderDecoder(build(FAMILIES["bart"]()))
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    policy = fsdp2_prepare_auto_wrap_policy(plugin, summarizer)
    assert sum(map(policy, summarizer.modules())) >= 3
    assert policy(summarizer.model.model.encoder.layers[0]) and not policy(summarizer.model)


@pytest.mark.parametrize("kind", ["bart", "t5", "t5gemma", "bert to gpt2"])
def test_dropout_reaches_every_layer(kind, tmp_path):
    FAMILIES[kind]().save_pretrained(tmp_path)
    build(FAMILIES[kind]()).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    model, _ = load_model_and_tokenizer(str(tmp_path), dropout=0.3)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    rates |= {module.dropout for module in model.modules() if isinstance(getattr(module, "dropout", None), float)}
    assert 0.3 in rates and not rates - {0.3, 0.0, 0.1}  # the other two are of attention weights


def test_attention_dropout_of_a_checkpoint_is_replaced_in_training_only(tmp_path):
    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                        decoder_attention_heads=2, encoder_ffn_dim=8, decoder_ffn_dim=8, vocab_size=60,
                        attention_dropout=0.1, dropout=0.2)  # fmt: skip
    BartForConditionalGeneration(config).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    for asked, expected in ((None, 0.1), (0.0, 0.0), (0.3, 0.3)):
        model, _ = load_model_and_tokenizer(str(tmp_path), attention_dropout=asked)
        rates = {module.dropout for module in model.modules() if isinstance(module, BartAttention)}
        assert (rates, model.config.dropout) == ({expected}, 0.2)


def test_attention_dropout_of_a_model_that_has_none_of_its_own_is_refused(tmp_path):
    FAMILIES["t5"]().save_pretrained(tmp_path)
    build(FAMILIES["t5"]()).save_pretrained(tmp_path)
    letters().save_pretrained(tmp_path)
    load_model_and_tokenizer(str(tmp_path), attention_dropout=0.0)
    with pytest.raises(UsageError, match="no attention_dropout that --attention_dropout could set"):
        load_model_and_tokenizer(str(tmp_path), attention_dropout=0.1)


# ---- global attention


@torch.no_grad()
@pytest.mark.parametrize("kind", ["led", "longformer to roberta"])
def test_a_longformer_sees_the_query_from_everywhere_in_every_sequence(kind):
    summarizer = EncoderDecoder(build(FAMILIES[kind]()))
    generator = torch.Generator().manual_seed(1)
    passages = torch.randint(3, VOCABULARY, (2, 30), generator=generator).tolist()
    tokenizer = letters()
    sources = Sources(tokenizer, "fid", 40, "rank", "", summarizer.has_global_attention)
    with_query, _ = sources.build("a b", Document("d", ["c d e f g h", "h g f e d c b a"]), [0, 1])
    assert [ids[:4] for ids in with_query] == [[*tokenizer("a b")["input_ids"][:-1], EOS, EOS]] * 2
    without, _ = sources.build("", Document("d", ["c d e f"]), [0])
    assert without == [tokenizer("c d e f")["input_ids"]]
    batch = collate([with_query, without], [[5, EOS], [6, EOS]], PAD)
    mask = summarizer._global_attention(batch["input_ids"], batch["attention_mask"])["global_attention_mask"]
    assert mask.sum(1).tolist() == [2, 2, 1] and mask[:2, :2].all() and mask[2, 0] == 1
    # the last token is beyond the window of the first one: only global attention carries it there
    far = [[[4, EOS, EOS, *passages[0]]], [[5, EOS, EOS, *passages[0]]]]
    mask = torch.ones(1, 33, dtype=torch.long)
    hidden = [summarizer._read(torch.tensor(source), mask) for source in far]
    assert (hidden[0][:, -1] - hidden[1][:, -1]).abs().max() > 1e-4


def test_a_source_that_a_longformer_would_pad_beyond_its_positions_is_refused():
    model = build(AutoConfig.for_model("led", **LIKE_BART, max_encoder_position_embeddings=62,
                                       max_decoder_position_embeddings=64, attention_window=[4]))  # fmt: skip
    with pytest.raises(UsageError, match="--max_source_length 61: the model has positions for 60 tokens only"):
        set_up(model, letters(), settings(max_source_length=61))
    set_up(model, letters(), settings(max_source_length=60))


# ---- generation settings


def settings(**flags):
    lengths = {"max_source_length": 40, "max_target_length": 40, "max_new_tokens": 9}
    return {**dict.fromkeys((*DEFAULTS, "source_lang", "target_lang")), **lengths, **flags}


def settled(own: dict, **flags) -> GenerationConfig:
    model = build(AutoConfig.for_model("bart", **{**LIKE_BART, "max_position_embeddings": 200}))
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    settle_generation(model, {**dict.fromkeys(DEFAULTS), **flags}, "it")
    return model.generation_config


def test_a_checkpoint_keeps_its_own_settings_and_flags_come_first(tmp_path):
    own = {"num_beams": 6, "length_penalty": 2.0, "no_repeat_ngram_size": 3, "min_length": 12, "max_length": 30,
           "early_stopping": True, "forced_bos_token_id": 0, "repetition_penalty": 1.2}  # fmt: skip
    config = settled(own)
    assert {name: getattr(config, name) for name in own} == own
    assert (config.min_new_tokens, config.max_new_tokens) == (None, None)
    config = settled(own, max_new_tokens=20, min_new_tokens=0, num_beams=2)
    assert (config.max_new_tokens, config.max_length, config.min_new_tokens, config.min_length) == (
        20,
        None,
        None,
        None,
    )
    assert (config.num_beams, config.length_penalty, config.early_stopping) == (2, 2.0, True)
    config = settled(own, num_beams=1)
    config.save_pretrained(tmp_path)  # refused by Transformers while it has settings of beams
    assert (config.length_penalty, config.early_stopping, config.no_repeat_ngram_size) == (None, None, 3)
    config = settled({"num_beams": 6})  # where it says nothing, the defaults
    assert (config.num_beams, config.length_penalty, config.max_new_tokens) == (6, 1.0, 128)
    config = settled({"do_sample": True, "temperature": 0.7, "top_k": 10, "output_scores": True})
    config.save_pretrained(tmp_path)
    assert (config.do_sample, config.temperature, config.top_k, config.output_scores) == (False, None, None, None)


@pytest.mark.parametrize("own", [
    {"min_length": 6, "max_length": 12}, {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0},
    {"num_beams": 3, "encoder_no_repeat_ngram_size": 1}, {"num_beams": 3, "encoder_repetition_penalty": 3.0},
    {"num_beams": 1, "repetition_penalty": 1.7}, {"suppress_tokens": [58], "bad_words_ids": [[8], [9, 10]]},
    {"num_beams": 3, "forced_bos_token_id": 9, "no_repeat_ngram_size": 2}, {"begin_suppress_tokens": [58]},
    {"num_beams": 2, "exponential_decay_length_penalty": (3, 1.5)},
], ids=lambda own: ", ".join(own))  # fmt: skip
def test_settings_of_a_checkpoint_have_their_effect(own):
    written = []
    for settings in ({}, own):
        model, batch = build(AutoConfig.for_model("bart", **{**LIKE_BART, "init_std": 0.5})), random_batch()
        head = model.get_output_embeddings()
        summarizer = EncoderDecoder(model)
        head.register_forward_hook(lambda module, inputs, logits: logits + 9.0 * (torch.arange(VOCABULARY) == EOS))
        inputs = plain_inputs(summarizer, batch)
        del batch["labels"]
        model.generation_config.update(**{"max_length": 12, **settings})
        settle_generation(model, dict.fromkeys(DEFAULTS), "it")
        written.append(summarizer.generate(**batch))
        assert torch.equal(written[-1], model.generate(**inputs)[:, 1:])
    assert written[0].tolist() != written[1].tolist()


def test_ngrams_of_a_source_in_several_sequences_are_not_repeated():
    summarizer, generator = EncoderDecoder(build(FAMILIES["bart"]())), torch.Generator().manual_seed(0)
    source = torch.randint(3, VOCABULARY, (2, 40), generator=generator).tolist()
    batch = collate([source], [[5]], PAD)
    del batch["labels"]
    summarizer.model.generation_config.update(encoder_no_repeat_ngram_size=1)
    ids = summarizer.generate(**batch, num_beams=3, max_new_tokens=6)
    assert not set(ids[0].tolist()) & {token for sequence in source for token in sequence}


@pytest.mark.parametrize(("own", "flags", "message"), [
    ({"num_beam_groups": 2, "num_beams": 4}, {}, "it: its generation_config.json sets num_beam_groups"),
    ({"penalty_alpha": 0.6}, {}, "sets penalty_alpha"),
    ({"num_return_sequences": 2}, {}, "sets num_return_sequences"),
    ({"stop_strings": ["."]}, {}, "sets stop_strings"),
    ({"min_length": 30}, {"max_new_tokens": 20}, "it: at least 29 and at most 20 tokens are to be generated; set both"),
    ({"max_length": 10}, {"min_new_tokens": 10}, "it: at least 10 and at most 9 tokens"),
    ({"max_length": 1}, {}, "at most 0 tokens"),
    ({"max_length": 280}, {}, "--max_new_tokens 279: the model has positions for 200 tokens only"),
])  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(own, flags, message):
    with pytest.raises(UsageError, match=message):
        settled(own, **flags)


def test_what_is_used_is_said_in_one_line_with_a_prefix_that_the_checkpoint_names():
    model = build(FAMILIES["t5"]())
    model.generation_config.update(early_stopping=True)
    model.config.task_specific_params = {"summarization": {"prefix": "summarize: "}}
    settle_generation(model, {**dict.fromkeys(DEFAULTS), "max_new_tokens": 9}, "it")
    said = describe_generation(model, None)
    for part in ("num_beams 4", "max_new_tokens 9", "early_stopping True", "--source_prefix 'summarize: '"):
        assert part in said
    assert "token_id" not in said and "\n" not in said
    assert "--source_prefix" not in describe_generation(model, "summarize: ")


def test_without_a_start_token_or_an_end_a_model_is_refused(tmp_path):
    model, tokenizer = build(FAMILIES["bert to bert"]()), letters()
    save_pretrained(EncoderDecoder(model), tokenizer, tmp_path, EncoderDecoder(model).state_dict())
    path = tmp_path / "generation_config.json"
    original = json.loads(path.read_text())
    path.write_text(json.dumps({**original, "eos_token_id": None}))
    with pytest.raises(UsageError, match="set eos_token_id in its generation_config"):
        load_model_and_tokenizer(str(tmp_path))
    path.write_text(json.dumps({**original, "decoder_start_token_id": None}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": None}))
    model, tokenizer = load_model_and_tokenizer(str(tmp_path))
    with pytest.raises(UsageError, match="set decoder_start_token_id in its generation_config"):
        set_up(model, tokenizer, settings())


# ---- languages

PIECES = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{letter}", -2.0) for letter in "abcdefgh")]


def mbart25(folder):
    from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

    return MBartTokenizer(vocab=[*PIECES, *((code, 0.0) for code in FAIRSEQ_LANGUAGE_CODES), ("<mask>", 0.0)])


def mbart50(folder):
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES

    return MBart50Tokenizer(vocab=[*PIECES, *((code, 0.0) for code in FAIRSEQ_LANGUAGE_CODES), ("<mask>", 0.0)])


def nllb(folder):
    return NllbTokenizer(vocab={piece: number for number, (piece, _) in enumerate(PIECES)}, merges=[])


def m2m(folder):
    from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES

    texts = [f"{a} {b} {c}" for a in "abcdefgh" for b in "hgfedcba" for c in "abcd"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spm"), vocab_size=20, hard_vocab_limit=False,
        minloglevel=2)  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    names = ["<s>", "<pad>", "</s>", "<unk>", *(pieces.id_to_piece(i) for i in range(3, len(pieces)))]
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    codes = [f"__{code}__" for code in FAIRSEQ_LANGUAGE_CODES["m2m100"]]  # as in its files on the Hub
    return M2M100Tokenizer(str(folder / "vocab.json"), str(folder / "spm.model"), additional_special_tokens=codes)


MULTILINGUAL = {
    "mbart-25": (mbart25, "mbart", None, ("de_DE", "fr_XX")),
    "mbart-50": (mbart50, "mbart", EOS, ("de_DE", "fr_XX")),
    "nllb": (nllb, "m2m_100", EOS, ("deu_Latn", "fra_Latn")),
    "m2m": (m2m, "m2m_100", EOS, ("de", "fr")),
}


@pytest.mark.parametrize("kind", MULTILINGUAL)
def test_languages_are_in_sources_labels_decoder_inputs_and_summaries(kind, tmp_path):
    make, architecture, start, (source_lang, target_lang) = MULTILINGUAL[kind]
    tokenizer = make(tmp_path)
    tokens = {"vocab_size": len(tokenizer) + 110, "decoder_start_token_id": start}
    summarizer = EncoderDecoder(build(AutoConfig.for_model(architecture, **{**LIKE_BART, **tokens, "dropout": 0.0})))
    set_up(summarizer.model, tokenizer, settings(source_lang=source_lang, target_lang=target_lang, min_new_tokens=4))
    source, target = (language_codes(tokenizer)[code] for code in (source_lang, target_lang))
    assert len({source, target, tokenizer.unk_token_id}) == 3

    sources = Sources(tokenizer, "concat", 30, "rank")
    (sequence,), _ = sources.build("a b", Document("d", ["c d e"]), [0])
    assert sequence.count(source) == 1 and target not in sequence
    (labels,) = tokenizer(text_target=["a b c"])["input_ids"]
    assert labels.count(target) == 1 and source not in labels
    batch = collate([[sequence]], [labels], tokenizer.pad_token_id)
    own = summarizer.model(batch["input_ids"], batch["attention_mask"], labels=batch["labels"]).loss
    ours, _ = summarizer(**batch, label_smoothing_factor=0.0)
    assert (ours / len(labels)).item() == pytest.approx(own.item(), rel=1e-5)
    decoder_ids = summarizer._shift_right(batch["labels"])[0].tolist()
    assert decoder_ids[:2] == [EOS, target] if start else decoder_ids[0] == target

    del batch["labels"]
    ids = summarizer.generate(**batch)
    assert not start or ids[0, 0] == target
    save_pretrained(summarizer, tokenizer, tmp_path / "saved", summarizer.state_dict())
    plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "saved").eval()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    theirs = plain.generate(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert torch.equal(ids, theirs[:, 1:])
    assert decode(loaded, ids) == [loaded.decode(ids[0], skip_special_tokens=True).strip()]
    assert loaded.convert_ids_to_tokens(target) not in decode(loaded, ids)[0]


def test_languages_are_asked_for_checked_and_refused_where_there_are_none(tmp_path):
    model, tokenizer = build(AutoConfig.for_model("mbart", **LIKE_BART)), mbart50(tmp_path)
    with pytest.raises(
        UsageError, match=r"m: the tokenizer has languages: set --source_lang and --target_lang \(ar_AR"
    ):
        set_languages(model, tokenizer, "de_DE", None, "m")
    with pytest.raises(UsageError, match=r"--source_lang de: m has no such language; some are .*de_DE"):
        set_languages(model, tokenizer, "de", "fr_XX", "m")
    with pytest.raises(UsageError, match=r"--target_lang xx_YY: m has no such language; some are .._.."):
        set_languages(model, tokenizer, "de_DE", "xx_YY", "m")
    with pytest.raises(UsageError, match="--source_lang and --target_lang: the tokenizer of m has no languages"):
        set_languages(model, letters(), None, "fr_XX", "m")
    set_languages(model, letters(), None, None, "m")


# ---- prefixes, texts, counts


def letters():
    """Words of one letter, with T5's and Pegasus's format."""
    words = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *"abcdefgh", "summarize:", "<n>"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("fusion", ["concat", "fid"])
def test_a_prefix_stands_before_every_sequence_and_counts(fusion):
    tokenizer, document = letters(), Document("d", ["c d e f g h", "h g f e"])
    sequences, _ = Sources(tokenizer, fusion, 9, "rank", "summarize: ").build("a b", document, [0, 1])
    (passage, other), prefix = ([tokenizer.encode(text)[:-1] for text in document.passages],
                                tokenizer("summarize: a b")["input_ids"][:-1])  # fmt: skip
    expected = [[*prefix, EOS, *passage[:4], EOS], [*prefix, EOS, *other, EOS]]
    assert sequences == expected[: len(sequences)] and len(sequences) == (2 if fusion == "fid" else 1)
    (sequence,), _ = Sources(tokenizer, fusion, 9, "rank", "summarize: ").build("", document, [1])
    assert sequence == tokenizer("summarize: h g f e")["input_ids"]
    with pytest.raises(UsageError, match="--source_prefix takes 9 of --max_source_length 9 tokens"):
        Sources(tokenizer, fusion, 9, "rank", "a b c d e f g h")


@pytest.mark.parametrize("fusion", ["concat", "fid"])
@pytest.mark.parametrize("query", ["a b", ""])
def test_an_example_without_passages_is_read_as_its_query_alone(fusion, query):
    tokenizer = letters()
    sequences, numbers = Sources(tokenizer, fusion, 16, "rank").build(query, Document("d", ["c d"]), [])
    assert (sequences, numbers) == ([tokenizer(query)["input_ids"]], [])


def test_tokens_are_counted_up_to_the_end_whatever_fills_the_rest():
    ids = torch.tensor([[5, 6, 2, 0, 0], [5, 0, 7, 8, 2], [3, 4, 5, 6, 7], [2, 2, 2, 2, 2]])
    assert count_generated(ids, 2) == 3 + 5 + 5 + 1
    assert count_generated(ids, [2, 6]) == 2 + 5 + 4 + 1


def test_a_line_break_of_pegasus_is_one():
    tokenizer = letters()
    ids = torch.tensor([tokenizer("a b <n> c <n>")["input_ids"]])
    assert decode(tokenizer, ids) == ["a b\nc"]
