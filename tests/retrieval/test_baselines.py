"""The lead, random and oracle rankings."""

import pytest
from retrieval_cases import make_example

from utils.data.examples import Document
from utils.retrieval.baselines import lead_ranking, oracle_ranking, random_ranking


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
