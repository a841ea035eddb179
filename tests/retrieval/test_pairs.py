"""Positives, negatives and drafts of the retriever's training pairs, as they are drawn."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from retrieval_cases import make_corpus
from sentence_transformers import CrossEncoder

from utils.data.examples import Document, Example
from utils.data.loading import load_examples
from utils.errors import UsageError
from utils.models.contrastive import contrastive_loss
from utils.models.encoder import build_small_encoder, tokenize
from utils.retrieval.bm25 import bm25_index, bm25_rankings, bm25_search
from utils.retrieval.drafts import imitate_draft
from utils.retrieval.pairs import Pairs, gold_passages, positives
from utils.retrieval.ranking import search_texts

PASSAGES = ["the mill was sold", "a bridge over the river", "coffee for Ann", "the mill burned down", "nothing at all"]
SECOND = ["tea for Bob", "the bridge is closed", "a long talk about the price of the bridge and of the mill"]


@pytest.fixture(scope="module")
def encoder():
    return build_small_encoder([*PASSAGES, *SECOND, "what about it?"], vocab_size=300, hidden_size=32, layers=1)


def make_pairs(encoder, documents=None, examples=None, lexical=bm25_rankings, **flags):
    documents = documents or [example.document for example in examples or ()]
    documents = documents or [Document("d1", PASSAGES), Document("d2", SECOND)]
    examples = examples or [
        Example("a", "the mill", documents[0], ["The mill burned down."], [0, 3], [1, 3], None),
        Example("b", "the bridge", documents[1], ["The bridge is closed."], None, None, None),
        Example("c", "who left?", documents[0], ["Zoe!"], None, None, None),  # nothing to be learned from
        Example("d", "coffee", documents[0], ["Coffee is for Ann."], [2], [3], None),
    ]
    defaults = {"seed": 1, "draft_share": 0.0, "drafts_file": None, "found_weight": 0.5, "negatives_pool": 2,
                "num_positives": 1, "num_hard_negatives": 1, "negatives_margin": 0.05, "supervision": "evidence",
                "oracle_passages": 5, "teacher": None, "language": None, "mine_negatives_every": 0, "guide": None,
                "trust_remote_code": False}  # fmt: skip
    args = SimpleNamespace(**defaults | flags)
    return Pairs(args, examples, documents, encoder, search=lexical, accelerator=Accelerator(cpu=True))


def draws(pairs, number, epochs=400):
    return [pairs.draw(pairs[number], epoch) for epoch in range(epochs)]


@pytest.fixture(scope="module")
def reranker(tmp_path_factory):
    from utils.models.cross_encoder import build_small_reranker, save_pretrained

    folder = tmp_path_factory.mktemp("reranker")
    torch.manual_seed(5)
    model = build_small_reranker([*PASSAGES, *SECOND], vocab_size=300, hidden_size=32, layers=1)
    model[0].auto_model.classifier.weight.data *= 30  # scores that differ
    save_pretrained(model, folder, SimpleNamespace(model_name_or_path=None, rerank_top_k=5, rerank_weight=1.0))
    return folder


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_a_reranker_teaches_all_examples_with_their_evidence_among_the_candidates(encoder, reranker, temperature):
    options = {"teacher": str(reranker), "teacher_candidates": 2, "teacher_temperature": temperature}
    pairs = make_pairs(encoder, **options)
    assert [pair.example.id for pair in pairs] == ["a", "b", "c", "d"]  # also where no evidence is known
    assert "positives from the teacher: 4" in pairs.describe()
    plain = CrossEncoder(str(reranker), device="cpu", activation_fn=torch.nn.Identity())
    for pair, evidence in zip(pairs, ([0, 3], [], [], [2]), strict=True):
        best = {passage for passage, _ in bm25_rankings([pair.example], 2)[0]}
        candidates = sorted(best | set(evidence))
        assert pair.is_distribution and pair.evidence == [pair.document + number for number in candidates]
        texts = [pair.example.document.passages[number] for number in candidates]
        scores = torch.tensor(plain.predict([(pair.example.query, text) for text in texts]))
        expected = (scores / (temperature or 1.0)).softmax(0)
        assert expected.max() - expected.min() > 1e-3 or len(candidates) == 1
        np.testing.assert_allclose(pair.weights, expected, atol=1e-4)


def test_a_summarizer_as_teacher_is_refused_where_all_examples_have_evidence(encoder, tmp_path):
    examples = [Example("a", "the mill", Document("d1", PASSAGES), ["It burned."], [0, 3], [1, 3], None)]
    with pytest.raises(UsageError, match="has no effect: it is a summarizer, and all training examples have evidence"):
        make_pairs(encoder, examples=examples, teacher=str(tmp_path), teacher_candidates=2)


def test_positives_are_marked_evidence_or_what_the_oracle_chooses(encoder):
    pairs = make_pairs(encoder)
    assert [pair.example.id for pair in pairs] == ["a", "b", "d"]
    assert [pair.number for pair in pairs] == [0, 1, 2]
    # numbered through both documents; those of the second begin at 5
    assert [pair.document for pair in pairs] == [0, 5, 0]
    assert [pair.evidence for pair in pairs] == [[0, 3], [6], [2]]
    chosen = make_pairs(encoder, supervision="rouge")
    assert [pair.evidence for pair in chosen] == [[3], [6], [2]]
    example = pairs[0].example
    assert positives(example, "evidence", 1) == ([0, 3], [1, 3])
    assert positives(example, "rouge", 1) == ([3], [1])


def test_queries_drafts_and_passages_that_are_cut_are_told_and_nothing_where_all_fits(encoder, monkeypatch):
    fits, unmatched = make_pairs(encoder, draft_share=0.5).describe().split("\n")
    assert fits == "positives from gold evidence: 2, the ROUGE oracle: 1"
    assert unmatched.startswith("warning: BM25 finds no passage for 1 of 4 questions, such as that of 'c'")
    query = len(encoder.tokenizer("the bridge")["input_ids"])
    passages = [len(encoder.tokenizer(text)["input_ids"]) for text in PASSAGES + SECOND]
    limit = sorted(passages)[-2]
    monkeypatch.setattr(encoder, "max_seq_length", limit)
    pairs = make_pairs(encoder)
    cut = f"1 of 8 passages (12.5%, the longest has {max(passages)})"
    assert pairs.describe() == f"{fits}\n{unmatched}\ncut to {limit} tokens by --max_seq_length: {cut}"
    monkeypatch.setattr(encoder, "max_seq_length", query)
    assert " of 4 queries with a draft (100.0%, " in make_pairs(encoder, draft_share=0.5).describe()


def test_each_epoch_draws_positives_by_their_gold_words_and_negatives_that_are_no_evidence(encoder):
    pairs = make_pairs(encoder)
    drawn = draws(pairs, 0)
    assert all(search == pairs[0].query for search, *_ in drawn)
    positive, negative = zip(*(keys for *_, keys in drawn), strict=True)
    shares = {key: times / len(drawn) for key, times in Counter(positive).items()}
    assert shares == pytest.approx({0: 0.25, 3: 0.75}, abs=0.07)
    assert set(negative) == set(pairs[0].negatives[0]) and len(set(negative)) == 2
    assert not {0, 3} & set(negative)
    assert str(pairs.draw(pairs[0], 7)) == str(make_pairs(encoder).draw(pairs[0], 7))
    assert str(drawn[:20]) != str([make_pairs(encoder, seed=2).draw(pairs[0], epoch) for epoch in range(20)])
    both = make_pairs(encoder, num_positives=4, num_hard_negatives=0)
    assert {tuple(sorted(keys)) for *_, keys in draws(both, 0, 9)} == {(0, 3)}


def test_given_negatives_are_the_hard_negatives(encoder, tmp_path):
    records = [
        {"query": "the mill", "positive_passages": [PASSAGES[0]], "negative_passages": [*PASSAGES[1:4], PASSAGES[0]]},
        {"query": "the bridge", "positive_passages": SECOND[:2], "negative_passages": SECOND[2:]},
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, records)))
    examples = load_examples(tmp_path / "d.jsonl", require_summary=False)
    pairs = make_pairs(encoder, examples=examples, negatives_pool=3)
    texts = [text for example in examples for text in example.document.passages]
    negatives = [[texts[key] for key in pair.negatives[0]] for pair in pairs]
    assert negatives[0][0] == PASSAGES[3]  # best by BM25
    assert list(map(sorted, negatives)) == [sorted(PASSAGES[1:4]), SECOND[2:]]
    assert [sorted(texts[key] for key in pair.evidence) for pair in pairs] == [[PASSAGES[0]], sorted(SECOND[:2])]


def test_validation_in_which_every_ranking_is_perfect_is_refused():
    everything = Example("a", "q", Document("d1", PASSAGES), [], [0, 1, 2, 3, 4], [1] * 5, None)
    args = SimpleNamespace(corpus_file=None, supervision="evidence", oracle_passages=5)
    with pytest.raises(UsageError, match="every passage of the validation examples is evidence"):
        gold_passages([everything], args)
    assert gold_passages([everything], args, required=False) == [[0, 1, 2, 3, 4]]  # of a test split, after training
    part = Example("b", "q", everything.document, [], [1], [1], None)
    assert gold_passages([everything, part], args) == [[0, 1, 2, 3, 4], [1]]


def test_imitated_drafts_are_searched_with_in_their_share(encoder, monkeypatch):
    monkeypatch.setattr("utils.retrieval.pairs.READ", 1)
    pairs = make_pairs(encoder, draft_share=0.3)
    drawn = draws(pairs, 0)
    with_draft = [(search, weights) for search, weights, _ in drawn if search != pairs[0].query]
    assert len(with_draft) / len(drawn) == pytest.approx(0.3, abs=0.07)
    assert pairs[0].read == [0]  # evidence 0 is read: evidence 3 weighs more
    others = ["The bridge is closed.", "Coffee is for Ann."]  # not its own
    imitated = [imitate_draft("The mill burned down.", PASSAGES[:1], other) for other in others]
    searches = tokenize(encoder, [f"the mill {draft}" for draft in imitated], "query")
    assert {tuple(search) for search, _ in with_draft} == {tuple(search) for search in searches}
    assert all(weights == pytest.approx(np.array([0.25 * 0.5, 0.75]) / 0.875) for _, weights in with_draft)
    # hard negatives are those of what is searched with
    assert pairs.searches(pairs[0].example, []) == ["the mill", "the mill The mill burned down."]
    pairs.set_negatives([[[1], [2]]] * 3)
    drawn = draws(pairs, 0)
    assert {keys[-1] for search, _, keys in drawn if search != pairs[0].query} == {2}
    assert sum(keys[-1] == 1 for *_, keys in drawn) / len(drawn) == pytest.approx(0.7, abs=0.07)


def test_real_drafts_turn_the_weights_to_what_they_were_not_written_from(encoder, tmp_path):
    path = tmp_path / "drafts.jsonl"
    path.write_text("".join(
        json.dumps({"id": id, "hops": [{"draft": "It was sold.", "read": [0]}]}) + "\n" for id in "abd"
    ))  # fmt: skip
    pairs = make_pairs(encoder, draft_share=1.0, drafts_file=str(path), found_weight=0.5)
    search, weights, _ = pairs.draw(pairs[0], 0)
    assert search == tokenize(encoder, ["the mill It was sold."], "query")[0]
    assert weights == pytest.approx(np.array([0.25 * 0.5, 0.75]) / 0.875)
    assert pairs.draw(pairs[2], 0)[1] == pytest.approx([1.0])  # its evidence is missing whole


def test_missing_evidence_without_gold_words_leaves_the_weights_as_they_are(encoder, monkeypatch):
    monkeypatch.setattr("utils.retrieval.pairs.READ", 1)
    pairs = make_pairs(encoder, draft_share=1.0, found_weight=0.0)
    pair = pairs[0]
    pair.weights = np.array([1.0, 0.0])  # evidence 0 is read; evidence 3, which is missing, has no gold words
    assert pairs.draw(pair, 0)[1] == pytest.approx([1.0, 0.0])


def test_mined_negatives_are_the_models_best_and_can_be_set_back(encoder):
    pairs, asked = make_pairs(encoder, draft_share=0.5), []

    def ranked(examples, top_k, queries):
        assert top_k is None  # evidence may rank anywhere, and sets the limit
        asked.extend(queries)
        rankings = {  # what scores 4.9 is too close to the evidence that scores 5
            "a": [(0, 5.0), (1, 4.9), (4, 3.0), (3, 2.0), (2, 1.0)],
            "b": [(1, 5.0), (2, 4.0), (0, 3.0)],
            "d": [(4, 6.0), (2, 5.0), (1, 4.9), (3, 2.0), (0, 1.0)],
        }
        return [rankings[example.id] for example in examples]

    before = pairs.negatives()
    pairs.mine(ranked)
    assert asked == ["the mill", "the bridge", "coffee", "the mill The mill burned down.",
                     "the bridge The bridge is closed.", "coffee Coffee is for Ann."]  # fmt: skip
    assert pairs.negatives() == [[[4, 2]] * 2, [[7, 5]] * 2, [[3, 0]] * 2]
    pairs.set_negatives(before)
    assert pairs.negatives() == before


def test_lengths_are_those_of_the_longest_that_any_epoch_draws(encoder):
    pairs = make_pairs(encoder, draft_share=0.5, num_hard_negatives=2)
    for number, (longest_search, longest_passages) in enumerate(pairs.lengths()):
        drawn = draws(pairs, number, 100)
        assert max(len(search) for search, *_ in drawn) <= longest_search
        totals = [sum(len(pairs.passage_tokens[key]) for key in keys) for *_, keys in drawn]
        assert max(totals) <= longest_passages


# ---- passages with equal texts

TWINS = ["the mill was sold", "a bridge", "the mill was sold", "the mill burned", "the mill burned"]


def least_loss(pairs) -> float:
    """The loss of a batch of all pairs whose queries are as near to their positives as vectors can be."""
    *_, drawn = zip(*(pairs.draw(pair, 0) for pair in pairs), strict=True)
    keys = list(dict.fromkeys(itertools.chain(*drawn)))
    texts = {tuple(pairs.passage_tokens[key]): None for key in keys}  # a vector for each different text
    vectors = torch.eye(len(texts))[[list(texts).index(tuple(pairs.passage_tokens[key])) for key in keys]]
    queries = vectors[[keys.index(of_pair[0]) for of_pair in drawn]]
    evidence = torch.nn.utils.rnn.pad_sequence([torch.tensor(pair.evidence) for pair in pairs], True, -1.0)
    loss, _ = contrastive_loss(
        queries, vectors, passage_keys=torch.tensor(keys), evidence_keys=evidence.long(), temperature=0.01
    )
    return loss.item()


@pytest.mark.parametrize("is_corpus", [False, True], ids=["documents", "corpus"])
def test_a_passage_with_the_text_of_the_evidence_is_no_negative(encoder, tmp_path, is_corpus):
    document, lexical = Document("d", TWINS), bm25_rankings
    if is_corpus:
        document = make_corpus(tmp_path, TWINS)
        index = bm25_index(document)

        def lexical(examples, top_k, queries=None):
            return bm25_search(index, search_texts(examples, queries), top_k)

    example = Example("a", "the mill", document, ["It was sold."], [2], [4], None)
    pairs = make_pairs(encoder, [document], [example], lexical, negatives_pool=5, num_hard_negatives=5)
    pair = pairs[0]
    assert pair.evidence == [0]  # the first passage with this text stands for all
    assert pair.negatives[0] == ([3] if is_corpus else [3, 1])  # each text once; BM25 finds no word of 1 in a corpus
    assert least_loss(pairs) < 1e-6
    scores = [5.0, 1.0, 5.0, 3.0, 3.0]
    pairs.mine(lambda examples, top_k, queries: [sorted(enumerate(scores), key=lambda entry: -entry[1])])
    assert pairs[0].negatives[0] == [3, 1]


def test_equal_texts_of_other_documents_are_no_negatives_of_each_other(encoder):
    documents = [Document("d1", ["nothing", "the mill was sold"]), Document("d2", ["the mill was sold", "a bridge"])]
    examples = [
        Example("a", "the mill", documents[0], ["Sold."], [1], [4], None),
        Example("b", "what was sold?", documents[1], ["A mill."], [0], [4], None),
    ]
    pairs = make_pairs(encoder, documents, examples)
    assert [pair.evidence for pair in pairs] == [[1], [1]]
    assert least_loss(pairs) < 1e-6


def test_evidence_with_equal_texts_is_drawn_once_with_the_weight_of_both(encoder, monkeypatch):
    monkeypatch.setattr("utils.retrieval.pairs.READ", 1)
    document = Document("d", TWINS)
    example = Example("a", "the mill was sold", document, ["The mill burned."], [0, 2, 3], [1, 2, 3], None)
    pairs = make_pairs(encoder, [document], [example], num_positives=3, num_hard_negatives=0, draft_share=0.5)
    assert pairs[0].evidence == [0, 3]
    assert pairs[0].weights == pytest.approx([0.5, 0.5])
    drawn = draws(pairs, 0, 40)
    assert all(sorted(keys) == [0, 3] for *_, keys in drawn)
    # a draft that was written from the twin of evidence has used it
    assert pairs[0].read[0] in (0, 2)
    assert {tuple(weights.round(3)) for _, weights, _ in drawn} == {(0.5, 0.5), (0.333, 0.667)}


def test_examples_without_summaries_are_searched_for_without_drafts_and_the_log_says_so(encoder, tmp_path):
    document = make_corpus(tmp_path, PASSAGES)
    for summaries, searches in (([], 1), (["It was sold."], 2)):
        example = Example("a", "the mill", document, summaries, [0], [3], None)
        pairs = make_pairs(encoder, [document], [example], draft_share=0.5)
        assert len(pairs[0].negatives) == searches
        assert ("no training example has a summary to imitate" in pairs.describe()) == (searches == 1)
        have_drafts = {len(search) > len(pairs[0].query) for search, *_ in draws(pairs, 0, 20)}
        assert have_drafts == ({False} if searches == 1 else {False, True})
