"""Scores of rankings by question, and comparisons of runs."""

import numpy as np
import pytest
from reporting_cases import PASSAGES, hops_records, retrieved_records

from utils.data.words import count_words
from utils.evaluation.retrieval import retrieval_scores
from utils.reporting import rankings
from utils.reporting.comparison import compare
from utils.reporting.rankings import STEP, beside, gold_words_by_budget, rank_records


def ranked(records, **options):
    return rank_records((("a:1", record) for record in records), **options)


def test_curves_pass_through_the_scores_of_the_log():
    found = ranked(retrieved_records())
    of_run = found.scores["this run"]
    assert of_run["recall@1"].tolist() == [100, 0] and found.recall["this run"][[0, 3]].tolist() == [50, 100]
    assert of_run["recall@5"].mean() == found.recall["this run"][4]
    words = list(map(count_words, PASSAGES))
    for budget in (STEP // 4, STEP // 2, STEP):
        for order, evidence in (([2, 0, 1, 3], [2, 3]), ([3, 1], [0, 1])):
            score = retrieval_scores(order, evidence, words, word_budget=budget)[f"gold_words@{budget}"]
            assert gold_words_by_budget(order, evidence, words, None, np.array([budget]))[0] == pytest.approx(
                score / 100
            )


def test_gained_and_lost_over_bm25():
    found = ranked(retrieved_records())
    assert found.own == "this run"
    gained, lost = found.changes("mrr@10", "BM25", "this run", 5)
    assert [number for number, _ in gained] == [0] and [number for number, _ in lost] == [1]
    assert found.ranks["BM25"][1] == {1: 1} and found.ranks["this run"][1] == {1: 4}


def test_each_hop_is_scored_and_a_search_that_ended_earlier_counts_with_its_last_hop():
    found = ranked(hops_records())
    assert list(found.scores) == ["BM25", "hop 1", "hop 2"] and found.own == "hop 2"
    assert found.scores["hop 1"]["recall@1"].tolist() == [50, 100, 100]
    assert found.scores["hop 2"]["recall@1"].tolist() == [50, 0, 100]


def test_a_second_hop_with_imitated_drafts_is_not_the_retrievers_own():
    records = hops_records()
    for record in records:
        del record["prediction"]
    assert ranked(records).own == "hop 1"


def test_examples_of_a_corpus_have_no_bm25_and_those_without_evidence_are_left_out():
    records = retrieved_records()
    records[0]["passage_ids"] = ["a", "b", "c", "d"]
    assert list(ranked(records).scores) == ["this run"]
    del records[0]["evidence"], records[1]["retrieved"]
    assert ranked(records) is None


def test_a_question_for_which_nothing_was_found_scores_0():
    records = retrieved_records()
    records[1]["retrieved"] = []
    found = ranked(records)
    assert found.scores["this run"]["recall@20"].tolist() == [100, 0] and found.recall["this run"][-1] == 50


def test_of_a_long_file_the_first_questions_are_scored(monkeypatch):
    monkeypatch.setattr(rankings, "MOST_SCORED", 1)
    found = ranked(retrieved_records())
    assert [e.id for e in found.examples] == ["q0"] and found.is_cut


def test_two_runs_on_the_questions_that_both_have():
    first, second = ranked(retrieved_records()[:1]), ranked(retrieved_records()[::-1])
    both = beside(first, second)
    assert [e.id for e in both.examples] == ["q0"]
    assert both.changes("mrr@10", "first run", "last run", 5) == ([], [])


def test_paired_intervals_leave_out_what_runs_have_in_common():
    draws = np.random.default_rng(0).normal(50, 20, 60)
    first = {f"q{i}": value for i, value in enumerate(draws)}
    second = {f"q{i}": value + 1 + (i % 3) / 10 for i, value in enumerate(draws)} | {"only here": 0.0}
    rows, what = compare([first, second], {f"q{i}": f"d{i // 2}" for i in range(60)})
    assert what == "60 questions about 30 documents, drawn by document"
    assert rows[0].difference is None and rows[1].difference == pytest.approx(1.1)
    low, high = rows[1].difference_interval
    assert 1.0 < low < 1.1 < high < 1.2 and rows[1].is_clear
    assert rows[0].interval[1] - rows[0].interval[0] > 5 and not rows[0].is_clear


def test_no_question_in_common():
    assert compare([{"a": 1.0}, {"b": 1.0}], {}) == ([], "no question in common")
