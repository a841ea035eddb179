"""The guide: its embeddings are those of its own model, and it excludes what it finds as similar as the evidence."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from retrieval_cases import make_corpus
from sentence_transformers import SentenceTransformer
from test_pairs import PASSAGES, SECOND, encoder, make_pairs  # noqa: F401

from utils.data.examples import Example
from utils.models.encoder import build_small_encoder
from utils.retrieval import guide
from utils.retrieval.bm25 import bm25_index, bm25_search
from utils.retrieval.ranking import search_texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A guide with a prompt for questions."""
    folder = tmp_path_factory.mktemp("guide")
    torch.manual_seed(1)
    model = build_small_encoder([*PASSAGES, *SECOND, "Find: what about it?"], vocab_size=300, hidden_size=32, layers=1)
    model.prompts = {"query": "Find: ", "document": ""}
    model.save_pretrained(str(folder), create_model_card=False)
    return str(folder)


def expected(folder, questions, evidence, texts):
    """(questions, texts) bool; `evidence` are the texts of each question's evidence."""
    plain = SentenceTransformer(folder, device="cpu")
    of_questions, of_texts = plain.encode_query(questions), plain.encode_document(texts)
    best = [(plain.encode_document(own) @ vector).max() for own, vector in zip(evidence, of_questions, strict=True)]
    return of_questions @ of_texts.T >= np.array(best)[:, None] - 1e-6


def test_a_batch_excludes_what_the_guide_finds_as_similar_as_the_best_evidence(encoder, folder):  # noqa: F811
    from train_retrieve import collate_pairs

    pairs = make_pairs(encoder, guide=folder, draft_share=1.0, num_hard_negatives=2)
    batch = collate_pairs(list(pairs)[::-1], False, epoch=0, pairs=pairs, retriever=encoder, max_tokens=0)
    keys = batch["passage_keys"]
    texts = [[*PASSAGES, *SECOND][key] for key in keys]
    questions, evidence = ["coffee", "the bridge", "the mill"], [[PASSAGES[2]], [SECOND[1]], [PASSAGES[0], PASSAGES[3]]]
    found = pairs.excluded(batch, keys).numpy()
    np.testing.assert_array_equal(found, expected(folder, questions, evidence, texts))
    assert 3 < found.sum() < found.size  # more than the evidence itself, and not all
    dummy = collate_pairs([pairs[0]], True, epoch=0, pairs=pairs, retriever=encoder, max_tokens=0)
    assert pairs.excluded(dummy, dummy["passage_keys"]).shape == (1, len(dummy["passage_keys"]))
    assert make_pairs(encoder).excluded(batch, keys) is None
    assert make_pairs(encoder).digest() != pairs.digest()


def test_an_empty_question_excludes_nothing(encoder, folder):  # noqa: F811
    from train_retrieve import collate_pairs

    document = make_pairs(encoder)[0].example.document
    example = Example("a", " ", document, ["The mill burned down."], [0], [1], None)
    pairs = make_pairs(encoder, [document], [example], guide=folder, draft_share=1.0)
    batch = collate_pairs(list(pairs), False, epoch=0, pairs=pairs, retriever=encoder, max_tokens=0)
    assert not pairs.excluded(batch, batch["passage_keys"]).any()


def test_passages_of_a_corpus_that_are_mined_later_are_read_too_and_none_twice(
    encoder, folder, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    from train_retrieve import collate_pairs

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))  # where nothing is kept yet
    asked = []
    plain = guide.encode
    monkeypatch.setattr(guide, "encode", lambda model, texts, kind, **options: (
        asked.extend(texts if kind == "passage" else []), plain(model, texts, kind, **options))[1])  # fmt: skip
    corpus = make_corpus(tmp_path, PASSAGES)
    index = bm25_index(corpus)
    example = Example("a", "the mill burned", corpus, ["It was sold."], [0], [4], None)
    pairs = make_pairs(encoder, [corpus], [example], guide=folder, num_hard_negatives=5, negatives_pool=5,
                       lexical=lambda examples, top_k, queries=None: bm25_search(
                           index, search_texts(examples, queries), top_k))  # fmt: skip
    before = len(asked)
    assert before < len(PASSAGES)
    pairs.mine(lambda examples, top_k, queries: [[(4, 5.0), (2, 4.5), (1, 4.0), (3, 3.0), (0, 1e3)]])
    assert sorted(asked) == sorted(set(asked)) and len(asked) > before
    batch = collate_pairs(list(pairs), False, epoch=0, pairs=pairs, retriever=encoder, max_tokens=0)
    keys = batch["passage_keys"]
    assert len(keys) == 5
    found = pairs.excluded(batch, keys).numpy()
    np.testing.assert_array_equal(
        found, expected(folder, ["the mill burned"], [[PASSAGES[0]]], [PASSAGES[key] for key in keys])
    )


def test_embeddings_are_kept_for_the_next_run(folder, monkeypatch):
    questions = ["a question that no other test asks", ""]
    first = guide.Guide(folder, questions, accelerator=Accelerator(cpu=True))
    monkeypatch.setattr(guide, "encode", None)
    again = guide.Guide(folder, questions, accelerator=Accelerator(cpu=True))
    np.testing.assert_array_equal(first.questions, again.questions)
