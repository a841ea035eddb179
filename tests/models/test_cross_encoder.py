"""The reranker against plain sentence-transformers: tokens and scores of pairs, losses, packing, saving."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sentence_transformers import CrossEncoder
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    logging,
)  # fmt: skip
from workers import run_worker

from utils.errors import UsageError
from utils.fast.packing import is_packed
from utils.models.cross_encoder import (
    build_small_reranker,
    collate_pairs,
    count_tokens,
    cut_to,
    halves,
    limit_of_texts,
    load_reranker,
    pairs_of,
    rerank_loss,
    save_pretrained,
    score,
    set_up,
    tokenize,
)  # fmt: skip
from utils.models.encoder import build_small_encoder
from utils.models.tokenizer import train_tokenizer

logging.disable_progress_bar()
TEXTS = ["Who agreed?", "The committee agreed on the new budget for the old town hall, after a long discussion. ",
         "naïve café, 5 €", "budget", "Who looks after the orchard library, and what did they report?"]  # fmt: skip
PAIRS = [
    (TEXTS[0], TEXTS[1]),
    (TEXTS[0], TEXTS[1] * 9),  # the passage is cut
    (TEXTS[4] * 9, "budget"),  # the query is cut
    (TEXTS[4] * 9, TEXTS[1] * 9),  # both are
    ("", TEXTS[2]),
    (TEXTS[3], ""),
]
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 1}
KINDS = {
    "bert": (BertForSequenceClassification, BertConfig, {"max_position_embeddings": 64}),
    "roberta": (RobertaForSequenceClassification, RobertaConfig, {"max_position_embeddings": 66, "pad_token_id": 1,
                                                                  "type_vocab_size": 1}),
    "electra": (ElectraForSequenceClassification, ElectraConfig, {"embedding_size": 16, "max_position_embeddings": 64}),
    "modernbert": (ModernBertForSequenceClassification, ModernBertConfig,
                   {"max_position_embeddings": 64, "local_attention": 16}),
    "modernbert-mean": (ModernBertForSequenceClassification, ModernBertConfig,
                        {"max_position_embeddings": 64, "local_attention": 16, "classifier_pooling": "mean"}),
}  # fmt: skip
PACKED = {"bert", "roberta", "electra", "modernbert", "modernbert-mean"}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a cross-encoder of each kind; RoBERTa's tokenizer has no token types, and two tokens between."""
    made = {}
    for name, (model_class, config_class, options) in KINDS.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        tokenizer = train_tokenizer(TEXTS * 3, vocab_size=400, max_length=64)
        if name == "roberta":
            from tokenizers.processors import RobertaProcessing

            tokenizer.backend_tokenizer.post_processor = RobertaProcessing(("</s>", 2), ("<s>", 0))
        tokenizer.save_pretrained(folder)
        if name in ("bert", "electra"):
            names = ["input_ids", "token_type_ids", "attention_mask"]
            AutoTokenizer.from_pretrained(folder, model_input_names=names).save_pretrained(folder)
        torch.manual_seed(1)
        special = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": 2, "cls_token_id": 0,
                   "sep_token_id": 2}  # fmt: skip
        config = config_class(vocab_size=len(tokenizer), **SIZES, **{**special, **options})
        model = model_class(config)
        for parameter in model.parameters():  # else all scores are nearly the same
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return made


def tokens_of(reranker, pairs):
    queries, passages = zip(*pairs, strict=True)
    return list(zip(tokenize(reranker, queries, "query"), tokenize(reranker, passages, "passage"), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_scores_of_pairs_are_those_of_sentence_transformers(kind, folders, accelerator):
    reranker = load_reranker(str(folders[kind]))
    plain = CrossEncoder(str(folders[kind]), device="cpu", activation_fn=nn.Identity())
    assert limit_of_texts(reranker) == 64 - (4 if kind == "roberta" else 3)
    tokens = tokens_of(reranker, PAIRS)
    ours, theirs = pairs_of(reranker, tokens), plain.preprocess(PAIRS)
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert (name in ours) == (name in theirs)
        assert name not in ours or torch.equal(ours[name], theirs[name])
    expected = plain.predict(PAIRS, batch_size=1)
    assert np.ptp(expected) > 1e-2
    np.testing.assert_allclose(score(reranker, tokens, accelerator=accelerator), expected, atol=1e-5)
    assert score(reranker, [], accelerator=accelerator).shape == (0,)
    assert is_packed(reranker[0]) == (kind in PACKED)


@pytest.mark.parametrize("kind", sorted(PACKED))
def test_packed_batches_have_the_scores_and_gradients_of_padded_ones(kind, folders):
    found = []
    for packed in (True, False):
        reranker = load_reranker(str(folders[kind])).train()
        for module in reranker.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if not packed:
            reranker[0].auto_model.set_attn_implementation("sdpa")
        batch = pairs_of(reranker, tokens_of(reranker, PAIRS))
        slots = count_tokens(reranker, batch)
        assert (slots[0] == slots[1]) == packed
        scores = reranker(batch)["scores"][:, 0]
        scores.square().sum().backward()
        found.append([scores.detach(), *(p.grad for p in reranker.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * max(1.0, float(theirs.abs().max())), rtol=1e-4)


def test_the_longer_text_is_cut_first_as_tokenizers_do(folders):
    tokenizer = load_reranker(str(folders["bert"])).tokenizer
    for query, passage in [(3, 90), (90, 3), (30, 31), (31, 30), (40, 40), (61, 61), (30, 30), (0, 99), (20, 41)]:
        ids = tokenizer(" budget" * query, " agreed" * passage, truncation=True, max_length=64)
        types = ids["token_type_ids"]
        left, right = cut_to(61, query, passage)
        assert (left, right) == (len(types) - sum(types) - 2, sum(types) - 1), (query, passage)


def test_listwise_loss_is_the_cross_entropy_of_each_positive_against_the_negatives():
    scores = torch.randn(9, requires_grad=True)
    candidates = torch.tensor([[0, 1, 2, 3], [4, 5, 6, -1], [7, 8, -1, -1]])
    positives = torch.tensor([1, 2, 0])  # the last is a dummy
    loss, right = rerank_loss(scores, candidates, positives, "listwise")
    first = nn.functional.cross_entropy(scores[None, :4], torch.tensor([0]))
    second = sum(nn.functional.cross_entropy(scores[None, [i, 6]], torch.tensor([0])) for i in (4, 5)) / 2
    torch.testing.assert_close(loss, first + second)
    assert right == (scores[:4].argmax() == 0).int() + (scores[4:7].argmax() < 2).int()
    torch.testing.assert_close(torch.autograd.grad(loss, scores)[0][7:], torch.zeros(2))
    # without a negative there is nothing to learn, and nothing that is not a number
    alone, _ = rerank_loss(scores, torch.tensor([[0]]), torch.tensor([1]), "listwise")
    assert alone == 0


def test_binary_loss_is_that_of_sentence_transformers(folders):
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    reranker = load_reranker(str(folders["bert"]))
    rows = [(TEXTS[0], [TEXTS[1], TEXTS[2], TEXTS[3]]), (TEXTS[4], [TEXTS[3], TEXTS[1], TEXTS[2]])]
    queries, passages = zip(*[(query, passage) for query, group in rows for passage in group], strict=True)
    expected = BinaryCrossEntropyLoss(reranker)([list(queries), list(passages)],
                                                torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))  # fmt: skip
    tokens = [(tokenize(reranker, [q], "query")[0], tokenize(reranker, group, "passage"), n)
              for (q, group), n in zip(rows, (1, 2), strict=True)]  # fmt: skip
    batch = collate_pairs(reranker, tokens, dummy=False)
    loss, _ = rerank_loss(reranker(batch["pairs"])["scores"][:, 0], batch["candidates"], batch["positives"], "binary")
    torch.testing.assert_close(loss / 2, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["listwise", "binary"])
def test_halves_of_a_batch_add_up_to_it(kind, folders):
    reranker = load_reranker(str(folders["bert"])).eval()

    def gradients(batches):
        reranker.zero_grad()
        for batch in batches:
            scores = reranker(dict(batch["pairs"]))["scores"][:, 0]
            rerank_loss(scores, batch["candidates"], batch["positives"], kind)[0].backward()
        return [p.grad.clone() for p in reranker.parameters() if p.grad is not None]

    rows = []
    for n in range(3):
        passages = [TEXTS[(n + i) % 5] for i in range(2 + n)]
        rows.append((tokenize(reranker, [TEXTS[n]], "query")[0], tokenize(reranker, passages, "passage"), 1))
    whole = [collate_pairs(reranker, rows, dummy=False)]
    two = halves(whole)
    assert [len(part["positives"]) for part in two] == [1, 2]
    for ours, theirs in zip(gradients(two), gradients(whole), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    assert [len(part["positives"]) for part in halves(two)] == [1, 1, 1]
    assert halves(halves(two)) == []
    dummy = collate_pairs(reranker, rows[:1], dummy=True)
    assert not any(gradient.any() for gradient in gradients([dummy]))


def test_a_saved_reranker_scores_the_same_in_sentence_transformers(tmp_path, accelerator):
    reranker = build_small_reranker(TEXTS * 3, vocab_size=400, hidden_size=32, layers=1)
    assert is_packed(reranker[0])
    flags = {"model_name_or_path": None, "rerank_top_k": 7, "rerank_weight": 2.0}
    save_pretrained(reranker, tmp_path, SimpleNamespace(**flags))
    expected = score(reranker, tokens_of(reranker, PAIRS), accelerator=accelerator)
    np.testing.assert_allclose(CrossEncoder(str(tmp_path), device="cpu").predict(PAIRS), expected, atol=1e-5)
    again = load_reranker(str(tmp_path))
    np.testing.assert_allclose(score(again, tokens_of(again, PAIRS), accelerator=accelerator), expected, atol=1e-6)


WORKER = """
import json, sys
from pathlib import Path
from accelerate import Accelerator
from utils.models.cross_encoder import load_reranker, score, tokenize
folder, accelerator = Path(sys.argv[1]), Accelerator(cpu=True)
reranker = load_reranker(str(folder / "model"))
texts = [" budget" * n + " town" for n in range(41)]
tokens = [[tokenize(reranker, [text], kind)[0] for kind in ("query", "passage")] for text in texts]
scores = score(reranker, tokens, accelerator=accelerator, max_tokens=100)
name = f"{accelerator.num_processes}.{accelerator.process_index}.json"
(folder / name).write_text(json.dumps(scores.tolist()))
"""


def test_two_processes_score_as_one(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "model")
    run_worker(WORKER, tmp_path)
    one, *two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1.0", "2.0", "2.1"))
    assert len(set(one)) > 30  # the longest are cut to the same length
    for of_process in two:
        np.testing.assert_allclose(of_process, one, atol=1e-5)


def test_unusable_models_are_refused_in_one_line(folders, tmp_path):
    with pytest.raises(UsageError, match="this folder holds no reranker"):
        load_reranker(str(tmp_path))
    build_small_encoder(TEXTS * 3, vocab_size=400, hidden_size=32, layers=1).save_pretrained(str(tmp_path / "r"))
    with pytest.raises(UsageError, match="makes a reranker of it"):
        load_reranker(str(tmp_path / "r"))
    assert load_reranker(str(tmp_path / "r"), needs_head=False).num_labels == 1
    three = tmp_path / "three"
    shutil.copytree(folders["bert"], three)
    config = BertConfig.from_pretrained(three, num_labels=3)
    BertForSequenceClassification(config).save_pretrained(three)
    with pytest.raises(UsageError, match="gives 3 scores for a pair"):
        load_reranker(str(three))
    reranker = load_reranker(str(folders["bert"]))
    with pytest.raises(UsageError, match="--max_seq_length 65: the model has positions for 64 tokens only"):
        set_up(reranker, SimpleNamespace(max_seq_length=65, gradient_checkpointing=False))
    with pytest.raises(UsageError, match="--max_seq_length 4: leaves no room"):
        set_up(reranker, SimpleNamespace(max_seq_length=4, gradient_checkpointing=False))
