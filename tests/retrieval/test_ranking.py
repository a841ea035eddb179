"""Ranking passages: BM25, dense, fusion, the baselines and the ROUGE oracle, against plain re-computations."""

import gc
import math
import random
import time
from collections import Counter

import bm25s
import numpy as np
import pytest
from rouge_score import rouge_scorer
from rouge_score.tokenizers import DefaultTokenizer

from utils.data.examples import Document, Example
from utils.data.words import rouge_words
from utils.retrieval.baselines import lead_ranking, oracle_ranking, random_ranking
from utils.retrieval.bm25 import _kept, bm25_rankings, bm25_scores
from utils.retrieval.dense import dense_rankings, remember_passages, retriever_rankings
from utils.retrieval.oracle import greedy_rouge_oracle
from utils.retrieval.ranking import (
    SHARPNESS,
    combine,
    fuse_hops,
    fuse_scores,
    hard_negatives,
    passage_scores,
    rank,
    reciprocal_rank_fusion,
    smooth,
)

COLOURS = Document(
    "colours", ["The remote is yellow .", "We talked about budgets .", "Yellow again , a yellow case .", "Bye ."]
)
MONEY = Document("money", ["Budgets grew .", "Nobody spoke of paint .", "The budget of the remotes ."])


def make_example(id="e", query="", document=COLOURS, summaries=("a yellow case",), evidence=None):
    return Example(
        id=id,
        query=query,
        document=document,
        summaries=list(summaries),
        evidence=evidence,
        evidence_words=None,
        retrieved=None,
    )


def random_text(generator, words, vocabulary="ab bc cd de running runs runner fg gh ij studies study"):
    return " ".join(generator.choices(vocabulary.split(), k=words))


# ---- rankings


def test_rank_puts_the_best_first_and_keeps_ties_in_document_order():
    assert rank(np.array([0.5, 2.0, 0.5, 2.0])) == [(1, 2.0), (3, 2.0), (0, 0.5), (2, 0.5)]
    assert rank(np.array([0.5, 2.0, 0.5, 2.0]), top_k=3) == [(1, 2.0), (3, 2.0), (0, 0.5)]
    assert rank(np.array([])) == []
    scores = np.random.default_rng(0).integers(0, 5, size=1000)
    assert [passage for passage, _ in rank(scores)] == sorted(range(1000), key=lambda passage: -scores[passage])


def test_reciprocal_rank_fusion_equals_the_formula():
    fused = reciprocal_rank_fusion([[(3, 9.0), (1, 8.0)], [(1, 0.2), (2, 0.1)]], k=60)
    assert [passage for passage, _ in fused] == [1, 3, 2]
    assert dict(fused) == pytest.approx({1: 1 / 62 + 1 / 61, 3: 1 / 61, 2: 1 / 62})


def test_passages_with_the_same_ranks_in_another_order_tie_exactly():
    rotations = [[(number + shift) % 7 for number in range(7)] for shift in range(7)]
    fused = reciprocal_rank_fusion([[(number, 0.0) for number in order] for order in rotations])
    assert [passage for passage, _ in fused] == list(range(7))
    assert len({score for _, score in fused}) == 1


def test_hops_are_fused_so_that_what_one_draft_alone_finds_comes_before_what_is_middling_at_both():
    first = [(passage, 1.0) for passage in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)]
    second = [(passage, 1.0) for passage in (9, 0, 4, 3, 5, 1, 2, 6, 7, 8)]
    fused = fuse_hops([first, second])
    assert [passage for passage, _ in fused[:2]] == [0, 9]
    assert dict(fused)[9] == pytest.approx(1 / 20 + 2 / 11)
    assert fuse_hops([first]) == first
    third = fuse_hops([first, second, first])
    assert dict(third)[9] == pytest.approx(1 / 20 + 1 / 11 + 2 / 20)


def test_smoothing_shares_scores_with_neighbours_and_further_with_those_that_follow():
    assert smooth(np.array([0.0, 0.0, 4.0, 0.0, 0.0]), window=2, decay=0.5).tolist() == [0.25, 1, 4, 2, 1]
    assert smooth(np.array([1.0, 0.0, 0.0, 4.0]), window=1, decay=0.5).tolist() == [1, 0.5, 1, 4]
    scores = np.random.default_rng(1).normal(size=9)
    for window in (0, 1, 3, 20):
        expected = [
            sum(
                (0.7 ** (here - there) if there <= here else 0.49 ** (there - here)) * scores[there]
                for there in range(9) if abs(here - there) <= window
            ) for here in range(9)
        ]  # fmt: skip
        assert smooth(scores, window=window, decay=0.7) == pytest.approx(expected)
    assert smooth(np.array([])).shape == (0,)


def test_neighbours_share_what_stands_out_of_each_kind_of_score():
    options = {"bm25_weight": 0.5, "smooth_window": 1, "smooth_decay": 0.5}
    peak_and_plateau = np.array([0.0, 0, 0, 4, 0, 0, 0, 3, 3, 0, 0, 0])
    assert smooth(peak_and_plateau, 1, 0.5).argmax() in (7, 8)
    ranking = combine(rank(peak_and_plateau), None, **options)
    assert ranking[0][0] == 3
    assert combine(rank(100 * peak_and_plateau - 7), None, **options) == [
        (passage, pytest.approx(score)) for passage, score in ranking
    ]

    dense, lexical = np.random.default_rng(2).normal(size=(2, 9))
    shared = sum(
        weight * np.exp(SHARPNESS * (scores - scores.mean()) / scores.std())
        for weight, scores in ((1.0, dense), (0.5, lexical))
    )
    ranking = combine(rank(dense), rank(lexical), **options)
    assert passage_scores(ranking) == pytest.approx(smooth(shared, 1, 0.5))
    scores = [score for _, score in ranking]
    assert scores == sorted(scores, reverse=True)


# ---- BM25


def lucene_bm25(passages, query, k1=1.5, b=0.75):
    """BM25 by its formula, on lists of words."""
    mean_length = sum(map(len, passages)) / len(passages)
    scores = []
    for words in passages:
        counts, score = Counter(words), 0.0
        for word in query:
            containing = sum(word in other for other in passages)
            idf = math.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(words) / mean_length))
        scores.append(score)
    return scores


def test_bm25_equals_the_formula():
    generator = random.Random(3)
    passages = [random_text(generator, generator.randint(1, 12), "xa xb xc xd xe xf") for _ in range(8)]
    queries = ["xa xb", "xc", "xd xd xe"]
    expected = [lucene_bm25([passage.split() for passage in passages], query.split()) for query in queries]
    assert bm25_scores(passages, queries) == pytest.approx(np.array(expected), rel=1e-5)


def test_bm25_matches_word_forms_and_ignores_stopwords():
    scores = bm25_scores(MONEY.passages, ["budgeting", "of the", "the budgets"])
    assert (scores[0] > 0).tolist() == [True, False, True]
    assert not scores[1].any()
    assert scores[2] == pytest.approx(scores[0])


@pytest.mark.parametrize("passages", [[], [""], ["the of and", "a"], ["?!", "..."]])
def test_bm25_of_passages_without_words_is_zero(passages):
    scores = bm25_scores(passages, ["yellow remote", ""])
    assert scores.shape == (2, len(passages)) and not scores.any()


@pytest.mark.parametrize("query", ["", "the", "zebra", "?"])
def test_bm25_of_a_query_without_known_words_ranks_in_document_order(query):
    (ranking,) = bm25_rankings([make_example(query=query)])
    assert ranking == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]


def test_bm25_is_silent(capfd, caplog):
    caplog.set_level("DEBUG")
    bm25_scores(COLOURS.passages, ["yellow", ""])
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "NOTSET")] == []


def test_bm25_rankings_index_each_document_once_and_stay_with_their_examples(monkeypatch):
    indexed = []
    index = bm25s.BM25.index
    monkeypatch.setattr(bm25s.BM25, "index", lambda self, *args, **kw: indexed.append(1) or index(self, *args, **kw))
    colours, money = (Document(document.id, document.passages) for document in (COLOURS, MONEY))
    examples = [
        make_example("1", "yellow case", colours),
        make_example("2", "budget", money),
        make_example("3", "budgets", colours),
        make_example("4", "paint", money),
    ]
    rankings = bm25_rankings(examples, top_k=2)
    assert [ranking[0][0] for ranking in rankings] == [2, 0, 1, 1]
    assert all(len(ranking) == 2 for ranking in rankings)
    assert bm25_rankings(examples, top_k=2) == rankings  # as a later hop does
    assert len(indexed) == 2


def test_indexes_beyond_those_kept_are_made_anew_and_go_with_their_documents(monkeypatch):
    gc.collect()  # documents of other tests
    monkeypatch.setattr("utils.retrieval.bm25.KEPT", len(_kept) + 1)
    documents = [Document(str(number), [f"paint number {number}", "yellow case"]) for number in range(3)]
    examples = [make_example(str(number), "yellow", document) for number, document in enumerate(documents)]
    rankings = bm25_rankings(examples)
    assert [ranking[0][0] for ranking in rankings] == [1, 1, 1]
    assert [document in _kept for document in documents] == [True, False, False]
    assert bm25_rankings(examples) == rankings
    kept = len(_kept)
    del documents, examples, rankings
    gc.collect()
    assert len(_kept) == kept - 1


def test_search_texts_given_replace_the_queries():
    examples = [make_example("1", "yellow case"), make_example("2", "yellow case")]
    rankings = bm25_rankings(examples, queries=["budgets", "bye"])
    assert [ranking[0][0] for ranking in rankings] == [1, 3]
    with pytest.raises(ValueError, match="1 queries for 2 examples"):
        bm25_rankings(examples, queries=["budgets"])


# ---- dense


def test_dense_rankings_equal_dot_products_and_encode_each_text_once():
    generator = np.random.default_rng(5)
    vectors, encoded = {}, []

    def encode(texts, kind):
        encoded.extend((kind, text) for text in texts)
        return np.stack([vectors.setdefault((kind, text), generator.normal(size=6)) for text in texts])

    examples = [
        make_example("1", "q1", COLOURS),
        make_example("2", "q2", MONEY),
        make_example("3", "q2", COLOURS),
        make_example("4", "q1", COLOURS),
    ]
    rankings = dense_rankings(examples, encode, top_k=3)
    assert sorted(encoded) == sorted(
        [("passage", text) for text in COLOURS.passages + MONEY.passages] + [("query", "q1"), ("query", "q2")]
    )
    for example, ranking in zip(examples, rankings, strict=True):
        scores = [vectors["query", example.query] @ vectors["passage", text] for text in example.document.passages]
        expected = sorted(range(len(scores)), key=lambda passage: -scores[passage])[:3]
        assert [passage for passage, _ in ranking] == expected
        assert [score for _, score in ranking] == pytest.approx([scores[passage] for passage in expected])
    assert dense_rankings([], encode) == []


def test_passages_are_encoded_once_for_all_hops_and_queries_each_time():
    asked = []

    def encode(texts, kind):
        asked.append((kind, list(texts)))
        return np.array([[float(len(text))] for text in texts])

    encode_once = remember_passages(encode)
    assert encode_once(["a", "bb", "a"], "passage").tolist() == [[1], [2], [1]]
    assert encode_once(["bb", "ccc"], "passage").tolist() == [[2], [3]]
    assert encode_once(["a"], "query").tolist() == encode_once(["a"], "query").tolist() == [[1]]
    assert asked == [("passage", ["a", "bb"]), ("passage", ["ccc"]), ("query", ["a"]), ("query", ["a"])]


def test_a_retriever_ranks_as_its_settings_say():
    def encode(texts, kind):
        return np.array([[len(text), 1.0] for text in texts])

    examples = [make_example("1", "yellow case", COLOURS), make_example("2", "budget", MONEY)]
    dense, lexical = dense_rankings(examples, encode), bm25_rankings(examples)
    assert retriever_rankings(examples, encode, {}) == dense
    assert retriever_rankings(examples, encode, {"ranking": "dense", "bm25_weight": 0.7}) == dense
    hybrid = {"ranking": "hybrid", "bm25_weight": 0.7, "smooth_window": 0, "smooth_decay": 0.5}
    fused = [fuse_scores(*both, 0.7) for both in zip(dense, lexical, strict=True)]
    assert retriever_rankings(examples, encode, hybrid) == fused
    smoothed = [combine(*both, bm25_weight=0.7, smooth_window=1, smooth_decay=0.5)
                for both in zip(dense, lexical, strict=True)]  # fmt: skip
    assert retriever_rankings(examples, encode, {**hybrid, "smooth_window": 1}) == smoothed != fused
    other = retriever_rankings(examples, encode, hybrid, queries=["bye", "paint"])
    assert other != fused


# ---- baselines


def test_lead_ranking_is_the_document_order():
    assert [passage for passage, _ in lead_ranking(make_example(), top_k=3)] == [0, 1, 2]
    scores = [score for _, score in lead_ranking(make_example())]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) == 4


def test_random_ranking_depends_on_the_example_id_and_seed_only():
    document = Document("d", [str(number) for number in range(30)])
    first, again, other = (random_ranking(make_example(id, document=document)) for id in ("a", "a", "b"))
    assert first == again != other
    assert random_ranking(make_example("a", document=document), seed=1) != first
    assert sorted(passage for passage, _ in first) == list(range(30))
    # the same in every process and on every machine
    assert [p for p, _ in random_ranking(make_example("a"))] == [2, 0, 1, 3]


def test_oracle_ranking_is_the_evidence_in_document_order_and_nothing_else():
    example = make_example(evidence=[3, 0])
    assert [passage for passage, _ in oracle_ranking(example)] == [0, 3]
    assert [passage for passage, _ in oracle_ranking(example, top_k=1)] == [0]


@pytest.mark.parametrize("evidence", [None, []])
def test_oracle_ranking_without_evidence_is_the_rouge_oracle(evidence):
    assert [passage for passage, _ in oracle_ranking(make_example(evidence=evidence))] == [2]


# ---- greedy ROUGE oracle


def rouge_sum(passages, chosen, summaries):
    """ROUGE-1 F1 + ROUGE-2 F1 by rouge-score's own counting; n-grams do not span passages."""
    tokenize = DefaultTokenizer(use_stemmer=True).tokenize
    total = 0.0
    for n in (1, 2):
        ngrams = Counter()
        for passage in chosen:
            ngrams.update(rouge_scorer._create_ngrams(tokenize(passages[passage]), n))
        references = [rouge_scorer._create_ngrams(tokenize(summary), n) for summary in summaries]
        total += max(rouge_scorer._score_ngrams(reference, ngrams).fmeasure for reference in references)
    return round(total, 10)  # rounding errors make no difference


def greedy_by_brute_force(passages, summaries, max_passages):
    chosen = []
    while len(chosen) < max_passages:
        rest = [passage for passage in range(len(passages)) if passage not in chosen]
        best = max(rest, key=lambda passage: rouge_sum(passages, [*chosen, passage], summaries), default=None)
        if best is None or rouge_sum(passages, [*chosen, best], summaries) <= rouge_sum(passages, chosen, summaries):
            break
        chosen.append(best)
    return chosen


def test_rouge_oracle_makes_the_choices_of_a_brute_force_greedy_search():
    generator = random.Random(11)
    lengths = set()
    for _ in range(60):
        passages = [random_text(generator, generator.randint(0, 9)) for _ in range(generator.randint(1, 10))]
        summaries = [random_text(generator, generator.randint(1, 15)) for _ in range(generator.randint(1, 3))]
        max_passages = generator.choice([1, 2, 10])
        choice = greedy_rouge_oracle(passages, summaries, max_passages=max_passages)
        assert choice == greedy_by_brute_force(passages, summaries, max_passages)
        lengths.add(len(choice))
    assert {1, 2, 3} <= lengths  # the cases are not all trivial


def test_rouge_oracle_returns_the_order_chosen_and_stops_when_nothing_helps():
    passages = ["a cat", "unrelated words", "the dog sat on the mat", "the dog sat on the mat"]
    assert greedy_rouge_oracle(passages, "the dog sat on the mat with a cat") == [2, 0]
    assert greedy_rouge_oracle(passages, "the dog sat on the mat with a cat", max_passages=1) == [2]
    assert greedy_rouge_oracle(passages, "zebra") == []
    assert greedy_rouge_oracle([], "zebra") == []
    assert greedy_rouge_oracle(passages, "") == []


def test_rouge_oracle_of_500_turns_takes_less_than_200_ms():
    generator = random.Random(1)
    vocabulary = " ".join(f"{random_text(generator, 1)}{number}" for number in range(2000))
    passages = [random_text(generator, 20, vocabulary) for _ in range(500)]
    summary = " ".join(random_text(generator, 8, passage) for passage in passages[::50])
    greedy_rouge_oracle(passages[:1], summary)  # imports nltk
    seconds = []
    for _ in range(3):  # the best of three: other work on the machine is not its fault
        rouge_words.cache_clear()
        started = time.perf_counter()
        assert len(greedy_rouge_oracle(passages, summary)) > 5
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.2


# ---- words


def test_rouge_words_of_ascii_text_are_those_of_rouge_score():
    reference = DefaultTokenizer(use_stemmer=True)
    generator = random.Random(7)
    characters = [chr(code) for code in range(128)] + list("aeinrst ") * 8
    texts = ["".join(generator.choices(characters, k=200)) for _ in range(200)]
    texts += ["The parties' agencies were RUNNING, flies_died; 3.14 a__b isn't skies dying", "", "_"]
    for text in texts:
        assert list(rouge_words(text)) == reference.tokenize(text)


def test_rouge_words_keep_other_scripts():
    assert rouge_words("Café GRÖSSE") == rouge_words("cafe\u0301 größe".replace("ß", "ss"))
    assert rouge_words("Москва, Ελλάδα") == ("москва", "ελλάδα")
    assert rouge_words("東京は 2024年") == ("東", "京", "は", "2024", "年")


# ----------------------------------------------------------------------------------------------------------------------
# hard negatives


def test_hard_negatives_are_the_best_passages_without_evidence():
    ranking = [(4, 0.9), (2, 0.8), (0, 0.7), (1, 0.2), (3, -0.1)]
    assert hard_negatives(ranking, [2], pool=3) == [4, 0, 1]
    assert hard_negatives(ranking, [2, 4], pool=9) == [0, 1, 3]


def test_what_scores_close_to_the_best_evidence_is_no_hard_negative():
    ranking = [(4, 0.9), (2, 0.8), (0, 0.77), (1, 0.75), (3, -0.1)]
    assert hard_negatives(ranking, [2, 3], pool=9, margin=0.05) == [1]  # 0.76 and less
    assert hard_negatives(ranking, [2, 3], pool=9, margin=0) == [0, 1]
    assert hard_negatives([(0, -0.4), (1, -0.5), (2, -0.6)], [0], pool=9, margin=0.4) == [2]
    assert hard_negatives(ranking, [7], pool=2, margin=0.05) == [4, 2]  # its evidence is not in the ranking
