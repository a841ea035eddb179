"""Where a summarizer's passages come from, and flags about it that have no effect."""

from dataclasses import dataclass

import pytest
from accelerate import Accelerator
from retrieval_cases import make_example

from utils.cli.arguments import RankingOverrides, RerankerArguments
from utils.errors import UsageError
from utils.retrieval.splits import rank_splits


@dataclass
class Flags(RerankerArguments, RankingOverrides):
    retriever: str | None = None
    top_k: int = 2
    language: str | None = None
    seed: int = 1
    trust_remote_code: bool = False


def given():
    example = make_example("1", "yellow")
    example.retrieved = [(1, 2.0), (0, 1.0)]
    return {"train": [example]}


@pytest.mark.parametrize(
    ("flags", "source"),
    [({}, "the rankings in the files"), ({"retriever": "lead"}, "lead"), ({"retriever": "oracle"}, "oracle")],
)
def test_a_reranker_is_refused_where_no_search_ranks(flags, source):
    accelerator = Accelerator(cpu=True)
    args = Flags(reranker="some/model", **flags)
    with pytest.raises(UsageError, match=f"--reranker has no effect on passages from {source}"):
        rank_splits(given(), args, accelerator=accelerator, say=print)
    args = Flags(rerank_top_k=5, **flags)
    with pytest.raises(UsageError, match="--rerank_top_k has no effect without --reranker"):
        rank_splits(given(), args, accelerator=accelerator, say=print)
    hops, named = rank_splits(given(), Flags(**flags), accelerator=accelerator, say=print)
    assert named == source and hops["train"][0][0]


def test_of_passages_in_no_order_none_comes_first_and_what_else_chooses_among_them_is_told():
    example = make_example("1", "yellow")
    example.document.is_ordered = False
    accelerator, said = Accelerator(cpu=True), []
    with pytest.raises(UsageError, match="--retriever lead: the passages have no order"):
        rank_splits({"train": [example]}, Flags(retriever="lead"), accelerator=accelerator, say=said.append)
    assert not said
    rank_splits({"train": [example]}, Flags(retriever="bm25"), accelerator=accelerator, say=said.append)
    assert said == ["note: bm25 chooses among the passages that each record holds, and evidence is always among them"]
