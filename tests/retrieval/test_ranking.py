"""Ordering, smoothing, fusing and choosing hard negatives, against plain recomputations."""

import numpy as np
import pytest

from utils.retrieval.ranking import (
    SHARPNESS,
    TRUST,
    agreement,
    combine,
    fuse_hops,
    fuse_scores,
    hard_negatives,
    rank,
    reciprocal_rank_fusion,
    scores_of,
    smooth,
    standardized,
)


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


def test_a_later_hop_counts_with_its_weight_where_it_agrees():
    rng = np.random.default_rng(0)
    first = rank(rng.normal(size=40))
    second = rank(scores_of(first, range(40)) + 0.3 * rng.normal(size=40))
    assert agreement(first, second) >= TRUST[1]
    for weight in (0.0, 0.25, 0.75, 1.0):
        one, two = (standardized(scores_of(ranking, range(40))) for ranking in (first, second))
        fused = fuse_hops([first, second], weight)
        assert fused == rank((1 - weight) * one + weight * two)
        third = (1 - weight) * standardized(scores_of(fused, range(40))) + weight * one
        assert fuse_hops([first, second, first], weight) == rank(third)
    assert [passage for passage, _ in fuse_hops([first, second], 0.0)] == [passage for passage, _ in first]
    assert [passage for passage, _ in fuse_hops([first, second], 1.0)] == [passage for passage, _ in second]


def test_a_hop_whose_best_passages_were_the_worst_before_changes_nothing():
    first = rank(np.arange(40.0))
    led_astray = rank(-np.arange(40.0))
    assert [passage for passage, _ in fuse_hops([first, led_astray], 1.0)] == [passage for passage, _ in first]
    half = np.arange(40.0)
    half[30:33] -= 40.0  # three of the ten best are now the worst
    half[10:13] += 40.0
    assert agreement(first, rank(half)) == pytest.approx(0.7)
    share = (0.7 - TRUST[0]) / (TRUST[1] - TRUST[0])
    mixed = (1 - share) * standardized(np.arange(40.0)) + share * standardized(half)
    assert 0 < share < 1 and dict(fuse_hops([first, rank(half)], 1.0)) == pytest.approx(dict(rank(mixed)))


def test_agreement_is_by_chance_a_half_and_ties_agree():
    first = rank(np.arange(7.0))  # its upper half: 6, 5, 4, 3
    assert agreement(first, rank(np.array([9.0, 0, 8, 7, 6, 0, 0]))) == 0.5  # 0, 2, 3, 4
    assert agreement(first, [(6, 1.0)]) == 1 and agreement(first, [(0, 1.0)]) == 0
    assert agreement([(passage, 0.0) for passage in range(7)], first) == 1
    rng = np.random.default_rng(0)
    by_chance = [agreement(rank(rng.normal(size=60)), rank(rng.normal(size=60))) for _ in range(2000)]
    assert np.mean(by_chance) == pytest.approx(0.5, abs=0.02)


def test_a_passage_that_one_hop_did_not_find_has_its_lowest_score_there():
    first, second = [(7, 3.0), (2, 2.0), (5, 1.0)], [(7, 0.9), (2, 0.5), (9, 0.4)]
    one, two = standardized(np.array([2.0, 1.0, 3.0, 1.0])), standardized(np.array([0.5, 0.4, 0.9, 0.4]))
    expected = rank(0.5 * one + 0.5 * two)
    passages = [2, 5, 7, 9]
    assert fuse_hops([first, second], 0.5) == [(passages[place], score) for place, score in expected]
    assert fuse_hops([first, []], 0.5) == fuse_hops([[], first], 0.5) == fuse_hops([first], 0.5) == first
    assert fuse_hops([[], []], 0.5) == []


def test_a_hop_without_any_preference_leaves_the_order_to_the_other():
    equal, ordered = [(passage, 0.0) for passage in range(6)], rank(np.arange(6.0))
    for hops in ([equal, ordered], [ordered, equal]):
        assert [passage for passage, _ in fuse_hops(hops, 0.75)] == [5, 4, 3, 2, 1, 0]


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
    assert smooth(np.array([]), window=1, decay=0.5).shape == (0,)


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
    assert [score for _, score in sorted(ranking)] == pytest.approx(smooth(shared, 1, 0.5))
    scores = [score for _, score in ranking]
    assert scores == sorted(scores, reverse=True)


def test_scores_may_be_standardized_over_some_of_the_passages_only():
    dense, lexical = [(0, 9.0), (1, 7.0), (2, 0.0), (3, -50.0)], [(1, 3.0), (0, 2.0), (2, 1.0), (3, 0.0)]
    few = fuse_scores(dense[:3], lexical[:3], 0.5)
    more = fuse_scores(dense, lexical, 0.5, among=[0, 1, 2])
    assert more[:3] == [(passage, pytest.approx(score)) for passage, score in few] and more[3][0] == 3


def test_hard_negatives_are_the_best_passages_without_evidence():
    ranking = [(4, 0.9), (2, 0.8), (0, 0.7), (1, 0.2), (3, -0.1)]
    assert hard_negatives(ranking, [2], pool=3) == [4, 0, 1]
    assert hard_negatives(ranking, [2, 4], pool=9) == [0, 1, 3]


def test_what_scores_close_to_the_best_evidence_is_no_hard_negative():
    ranking = [(4, 0.9), (2, 0.8), (0, 0.77), (1, 0.75), (3, -0.1)]
    assert hard_negatives(ranking, [2, 3], pool=9, margin=0.05) == [1]  # 0.76 and less
    assert hard_negatives(ranking, [2, 3], pool=9, margin=0) == [0, 1]
    assert hard_negatives([(0, -0.4), (1, -0.5), (2, -0.6)], [0], pool=9, margin=0.4) == [2]
    assert hard_negatives(ranking, [7], pool=2, margin=0.05) == []  # its evidence comes later
