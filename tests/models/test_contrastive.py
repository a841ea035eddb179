"""The contrastive loss against plain loops, and its gradient over two real processes against that over one."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from workers import run_worker

from utils.models.contrastive import contrastive_loss


def reference_loss(queries, passages, passage_keys, evidence_keys, temperature, evidence_weights=None):
    """InfoNCE over the queries that count, one number at a time."""
    total, right = 0.0, 0
    keys = passage_keys.tolist()
    for i, (query, evidence) in enumerate(zip(queries.tolist(), evidence_keys.tolist(), strict=True)):
        if evidence[0] < 0:
            continue
        scores = {}  # by key: a passage that is there twice counts once
        for key, passage in zip(keys, passages.tolist(), strict=True):
            if key != -2 and key not in scores:
                scores[key] = sum(a * b for a, b in zip(query, passage, strict=True)) / temperature
        given = [1.0] * len(evidence) if evidence_weights is None else evidence_weights[i].tolist()
        weights = {key: weight for key, weight in zip(evidence, given, strict=True) if key in scores}
        for positive, weight in weights.items():
            rivals = [score for key, score in scores.items() if key not in evidence or key == positive]
            highest = max(rivals)
            loss = highest + math.log(sum(math.exp(score - highest) for score in rivals)) - scores[positive]
            total += loss * weight / sum(weights.values())
        right += max(scores, key=scores.get) in weights
    return total, right


def random_batch(seed=0, queries=5, passages=12, hidden=8):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(queries + passages, hidden, generator=generator, dtype=torch.float64)
    vectors = torch.nn.functional.normalize(vectors, dim=1).float()
    evidence = torch.tensor([[i, 100 + i, -1] for i in range(queries)])
    return {
        "queries": vectors[:queries].requires_grad_(),
        "passages": vectors[queries:].clone().requires_grad_(),
        "passage_keys": torch.arange(passages),
        "evidence_keys": evidence,
        "temperature": 0.05,
    }


def check(batch):
    loss, right = contrastive_loss(**batch)
    expected, expected_right = reference_loss(**batch)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert right.item() == expected_right
    return loss.item()


@pytest.mark.parametrize("temperature", [0.02, 0.05, 1.0])
def test_the_loss_equals_a_plain_loop(temperature):
    check({**random_batch(), "temperature": temperature})


def test_all_evidence_in_the_batch_is_positive_and_none_of_it_negative():
    batch = random_batch()
    plain = check(batch)
    batch["passage_keys"][7] = 100  # now the second positive of query 0
    batch["passage_keys"][3] = 101  # the positive drawn by query 3 is one of query 1 too
    batch["evidence_keys"][3] = torch.tensor([101, -1, -1])
    assert check(batch) != plain
    weights = torch.tensor([[1.0, 3.0, 9.0]] * 5)
    assert check({**batch, "evidence_weights": weights}) != check(batch)
    check({**batch, "evidence_weights": torch.tensor([[1.0, 0.0, 0.0]] * 5)})


def test_a_distribution_is_matched_with_its_passages_as_rivals():
    batch = random_batch()
    soft = torch.tensor([[0.5, 0.3, 0.2]] * 5)
    batch |= {"evidence_keys": torch.tensor([[i, i + 3, 11] for i in range(5)]), "evidence_weights": soft}
    loss, _ = contrastive_loss(**batch, is_distribution=torch.tensor([True] * 5))
    log_probabilities = (batch["queries"] @ batch["passages"].T / batch["temperature"]).log_softmax(1)
    expected = -sum((soft[i] * log_probabilities[i, batch["evidence_keys"][i]]).sum() for i in range(5))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # query by query: the others have positives as ever
    mixed, _ = contrastive_loss(**batch, is_distribution=torch.tensor([True, False, True, False, False]))
    plain, _ = contrastive_loss(**batch)
    assert plain.item() < mixed.item() < loss.item()
    assert contrastive_loss(**batch, is_distribution=torch.tensor([False] * 5))[0].item() == plain.item()


def test_similarities_that_are_the_distribution_have_no_gradient():
    target = torch.tensor([[0.6, 0.3, 0.1]])
    queries = torch.ones(1, 1, requires_grad=True)
    passages = target.log().T.clone().requires_grad_()
    keys = {"passage_keys": torch.arange(3), "evidence_keys": torch.arange(3)[None], "evidence_weights": target}
    loss, _ = contrastive_loss(queries, passages, **keys, temperature=1.0, is_distribution=torch.tensor([True]))
    loss.backward()
    assert passages.grad.abs().max() < 1e-6
    assert loss.item() == pytest.approx(-(target * target.log()).sum().item(), rel=1e-5)


def test_weights_matter_between_positives_only():
    batch = random_batch()
    assert check({**batch, "evidence_weights": torch.full((5, 3), 0.1)}) == pytest.approx(check(batch), rel=1e-6)


def test_a_passage_that_is_there_twice_counts_once():
    batch = random_batch()
    plain = check(batch)
    twice = {**batch, "passages": torch.cat([batch["passages"], batch["passages"][[2, 8]]]).detach(),
             "passage_keys": torch.tensor([*range(12), 2, 8])}  # fmt: skip
    assert check(twice) == pytest.approx(plain, rel=1e-6)


def test_two_queries_may_share_their_positive():
    batch = random_batch()
    batch["evidence_keys"][4, 0] = 2
    check(batch)
    batch["passages"].retain_grad()
    contrastive_loss(**batch)[0].backward()
    assert batch["passages"].grad[2].abs().max() > 0


def test_evidence_without_any_negative_gives_no_loss_and_no_nan():
    batch = random_batch(queries=2, passages=2)
    batch["evidence_keys"] = torch.tensor([[0, 1, -1], [1, 0, -1]])
    loss, right = contrastive_loss(**batch)
    loss.backward()
    assert (loss.item(), right.item()) == (pytest.approx(0, abs=1e-6), 2)
    assert batch["queries"].grad.isfinite().all()


def test_padded_evidence_excludes_no_passage():
    batch = random_batch()
    wide = torch.nn.functional.pad(batch["evidence_keys"], (0, 4), value=-1)
    assert check({**batch, "evidence_keys": wide}) == check(batch)


def test_padding_passages_are_no_negatives():
    batch = random_batch()
    cut = {name: value[:9] if name.startswith("passage") else value for name, value in batch.items()}
    batch["passage_keys"][9:] = -2
    assert check(batch) == pytest.approx(check(cut), rel=1e-6)


def test_dummy_queries_count_for_nothing_and_have_zero_gradients():
    batch = random_batch()
    batch["evidence_keys"][3:] = -1
    loss = check(batch)
    contrastive_loss(**batch)[0].backward()
    assert loss > 0
    assert batch["queries"].grad[3:].abs().max() == 0
    assert batch["queries"].grad[:3].abs().min() > 0

    batch = random_batch()
    batch["evidence_keys"][:] = -1
    batch["passage_keys"][:] = -2
    loss, right = contrastive_loss(**batch)
    loss.backward()
    assert (loss.item(), right.item()) == (0, 0)
    assert batch["queries"].grad.abs().max() == batch["passages"].grad.abs().max() == 0


def test_bf16_embeddings_are_compared_in_float32():
    batch = random_batch()
    halves = {**batch, "queries": batch["queries"].bfloat16(), "passages": batch["passages"].bfloat16()}
    rounded = {**batch, "queries": halves["queries"].float(), "passages": halves["passages"].float()}
    assert contrastive_loss(**halves)[0].item() == contrastive_loss(**rounded)[0].item()


def test_excluded_passages_are_no_negatives_and_evidence_stays():
    batch = random_batch()
    excluded = torch.zeros(5, 12, dtype=torch.bool)
    excluded[:, 7] = excluded[:, 2] = True  # the second is the positive of query 2
    kept = [passage for passage in range(12) if passage != 7]
    without = {**batch, "passages": batch["passages"][kept].detach(), "passage_keys": torch.tensor(kept)}
    both = [contrastive_loss(**batch, is_excluded=excluded)[0], contrastive_loss(**without)[0]]
    assert both[0].item() < both[1].item()  # 2 is no negative of the other queries
    batch["evidence_keys"][:, 1] = without["evidence_keys"][:, 1] = torch.tensor([2, 2, -1, 2, 2])
    weights = {"evidence_weights": torch.tensor([[1.0, 0.0, 0.0]] * 5)}
    loss, right = contrastive_loss(**batch, **weights, is_excluded=excluded)
    expected, expected_right = reference_loss(**without, **weights)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and right.item() == expected_right
    soft = {"evidence_weights": torch.tensor([[0.7, 0.3, 0.0]] * 5), "is_distribution": torch.tensor([True] * 5)}
    pair = [contrastive_loss(**each, **soft, **options)[0].item()
            for each, options in ((batch, {"is_excluded": excluded}), (without, {}))]  # fmt: skip
    assert pair[0] == pytest.approx(pair[1], rel=1e-5)


# ---- embeddings cut to several sizes


class Given(torch.nn.Module):
    """Stands in for a model of sentence-transformers; its texts are their embeddings."""

    def forward(self, features):
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return 8


def test_the_loss_of_cut_embeddings_is_that_of_sentence_transformers():
    batch = random_batch(queries=5, passages=10)
    batch["passages"] = (batch["passages"].detach() * 3).requires_grad_()  # not of unit length, as cosine forgives
    batch["evidence_keys"] = torch.arange(5)[:, None]
    sizes = [8, 5, 2]
    loss, _ = contrastive_loss(**batch, matryoshka_dims=sizes)
    ours = torch.autograd.grad(loss / 5, (batch["queries"], batch["passages"]))
    sides = [batch["queries"], batch["passages"][:5], batch["passages"][5:]]
    model = Given()
    plain = MultipleNegativesRankingLoss(model, scale=1 / batch["temperature"])
    theirs = MatryoshkaLoss(model, plain, sizes, [1 / 3] * 3)
    expected = theirs([{"sentence_embedding": side} for side in sides], torch.empty(0))
    assert loss.item() / 5 == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(expected, (batch["queries"], batch["passages"]))
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-6)


def test_cut_embeddings_for_the_dot_product_keep_their_lengths():
    batch, cut = random_batch(), random_batch()
    batch["passages"], cut["passages"] = (2 * each["passages"].detach() for each in (batch, cut))
    losses = []
    for size in (8, 3):
        sides = {side: cut[side][:, :size].detach() for side in ("queries", "passages")}
        losses.append(reference_loss(**{**cut, **sides})[0])
    found, right = contrastive_loss(**batch, matryoshka_dims=[8, 3], is_unit=False)
    assert found.item() == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert right == contrastive_loss(**batch)[1]  # of the longest
    assert contrastive_loss(**batch, matryoshka_dims=[8, 3])[0].item() != pytest.approx(found.item(), rel=1e-2)


def test_a_distribution_is_matched_at_every_size():
    batch = random_batch()
    batch |= {"evidence_keys": torch.tensor([[i, i + 3, 11] for i in range(5)]),
              "evidence_weights": torch.tensor([[0.5, 0.3, 0.2]] * 5)}  # fmt: skip
    options = {"is_distribution": torch.tensor([True, False, True, False, True]), "is_unit": False}
    both, large, small = (contrastive_loss(**batch, **options, matryoshka_dims=sizes)[0].item()
                          for sizes in ([8, 4], [8], [4]))  # fmt: skip
    assert both == pytest.approx((large + small) / 2, rel=1e-6)
    assert large == contrastive_loss(**batch, **options)[0].item()


# ---- two processes

WORKER = '''
import os
import sys

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from utils.models.contrastive import (
    backward_by_chunk, contrastive_loss, embed, embed_without_graph, gather_keys, gather_passages, own_gradient
)
from utils.models.encoder import build_small_encoder, in_chunks, tokenize
from utils.training.exchange import average_gradients, exchanging
from utils.training.sharding import prepare


def encoder(texts):
    torch.manual_seed(0)
    return build_small_encoder(texts, vocab_size=300, hidden_size=32, layers=1)


def set_dropout(model, p):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p


def gradients(accelerator, retriever, model, parts, max_tokens=0, cached=False):
    """One step as in train_retrieve.py; parts[process] = (example numbers, whether each is a dummy)."""
    torch.manual_seed(accelerator.process_index)
    numbers, dummy = parts[accelerator.process_index]
    negatives = [40 + 2 * i + j for i in numbers for j in range(2)]
    keys = torch.tensor([*numbers, *negatives])
    evidence = torch.tensor([[i, (i + 1) % 3 + 20] for i in numbers])
    batch = {
        "texts": in_chunks(retriever, [queries[i] for i in numbers], [passages[i] for i in keys], max_tokens),
        "passage_keys": torch.full((len(keys),), -2) if dummy else keys,
        "evidence_keys": torch.full((len(numbers), 1), -1) if dummy else evidence,
    }
    count = accelerator.reduce((batch["evidence_keys"][:, 0] >= 0).sum(), "sum")
    assert dummy or (len(batch["texts"]) > 3 if max_tokens else len(batch["texts"]) == 1)
    if cached:
        embeddings, states = embed_without_graph(model, batch["texts"])
    else:
        embeddings = embed(model, batch["texts"])
    own_queries, own_passages = embeddings.detach().split([len(numbers), len(keys)])
    all_keys = gather_keys(batch["passage_keys"])
    all_passages = gather_passages(own_passages, len(all_keys))
    loss, right = contrastive_loss(
        own_queries.requires_grad_(),
        all_passages,
        passage_keys=all_keys,
        evidence_keys=batch["evidence_keys"],
        temperature=0.05,
    )
    accelerator.backward(loss * accelerator.num_processes / count)
    gradient = torch.cat([own_queries.grad, own_gradient(all_passages.grad, len(keys))])
    if accelerator.num_processes > 1:
        model.exchange.is_due = True
    with exchanging(model, overlaps=not cached):
        if cached:
            backward_by_chunk(model, batch["texts"], gradient, states)
        else:
            embeddings.backward(gradient)
    average_gradients(accelerator, model)
    found = {name: p.grad.clone() for name, p in retriever.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = accelerator.reduce(torch.stack([loss.detach(), right.float()]), "sum")
    return {**found, "total": total}


texts = [f"word{i % 7} letter{i % 11} " + "abc " * (i % 13) + f"end{i}" for i in range(120)]
accelerator = Accelerator()
process = f"{accelerator.num_processes}.{accelerator.process_index}"
retriever = encoder(texts)
queries, passages = tokenize(retriever, texts[::-1], "query"), tokenize(retriever, texts, "passage")
model, _ = prepare(accelerator, retriever, torch.optim.SGD(retriever.parameters()))
model.train()
for name, first, second in (("even", (0, 8), (8, 16)), ("uneven", (0, 8), (8, 13)), ("dummy", (0, 8), None)):
    parts = [(list(range(*first)), False), (list(range(*second)), False) if second else ([0], True)]
    if accelerator.num_processes == 1:
        parts = [(sum((numbers for numbers, dummy in parts if not dummy), []), False)]
    set_dropout(model, 0.0)
    variants = {"": {}, "cached.": {"max_tokens": 40, "cached": True}}
    for variant, options in variants.items():
        found = gradients(accelerator, retriever, model, parts, **options)
        save_file(found, f"{sys.argv[1]}/{name}.{variant}{process}.safetensors")
set_dropout(model, 0.2)
for cached in (False, True):
    found = gradients(accelerator, retriever, model, parts, max_tokens=40, cached=cached)
    name = "cached" if cached else "plain"
    save_file(found, f"{sys.argv[1]}/dropout.{name}.{process}.safetensors")
accelerator.end_training()
sys.stdout.flush()
os._exit(0)
'''


@pytest.fixture(scope="module")
def gradient_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    run_worker(WORKER, folder)
    return folder


def check_gradients(found, expected):
    assert len(expected) > 20
    assert np.linalg.norm(expected["0.model.embeddings.word_embeddings.weight"]) > 1e-3
    assert found.keys() == expected.keys()  # every parameter that has a gradient, and "total": loss and number right
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", ["", "cached."], ids=["plain", "cached"])
@pytest.mark.parametrize("case", ["even", "uneven", "dummy"])
def test_two_processes_give_the_gradient_of_one_with_all_examples(gradient_files, case, variant):
    """8 + 8 examples against 16, 8 + 5 against 13, and 8 + a dummy against 8, in float32."""
    one = load_file(gradient_files / f"{case}.1.0.safetensors")
    for process in range(2):
        check_gradients(load_file(gradient_files / f"{case}.{variant}2.{process}.safetensors"), one)


@pytest.mark.parametrize("name", ["1.0", "2.0", "2.1"])
def test_gradient_caching_gives_the_plain_gradient_with_dropout_on(gradient_files, name):
    plain, cached = (load_file(gradient_files / f"dropout.{kind}.{name}.safetensors") for kind in ("plain", "cached"))
    check_gradients(cached, plain)
    without = load_file(gradient_files / f"dummy.{name}.safetensors")
    assert abs(plain["total"][0] / without["total"][0] - 1) > 1e-3  # it does drop


def test_gradient_caching_gives_the_plain_gradient_on_one_process(gradient_files):
    for case in ("even", "uneven", "dummy"):
        one, cached = (load_file(gradient_files / f"{case}.{kind}1.0.safetensors") for kind in ("", "cached."))
        check_gradients(cached, one)
