"""The search of train_retrieve.py keeps as many passages as are asked for, with one hop and with two."""

import pytest
from retrieval_cases import make_example

from utils.retrieval.document_search import DocumentSearch
from utils.retrieval.two_hops import search_hops


@pytest.mark.parametrize("write_drafts", [None, lambda examples, read, first: ["a draft"] * len(examples)])
def test_each_hop_keeps_as_many_passages_as_are_asked_for(write_drafts):
    ranking = [(number, -float(number)) for number in range(2000)]
    examples = [make_example("1", "yellow"), make_example("2", "case")]

    class Search(DocumentSearch):
        def retriever_rankings(self, block, encode, settings, queries=None, top_k=None):
            return [ranking for _ in block]

    def encode(texts, kind):
        raise AssertionError("the search is a stand-in")

    for kept in (3, 1500):
        found = list(search_hops(Search(depth=kept), encode, {"hop_weight": 0.5}, examples, write_drafts))
        assert [[len(hop.retrieved) for hop in hops] for hops in found] == [[kept] * (2 if write_drafts else 1)] * 2
