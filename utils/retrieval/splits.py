"""Ranks the passages of all splits from one source, as the summarizer reads them."""

import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from utils.data.examples import Example, Ranking
from utils.data.hand_over import given_rankings
from utils.data.trec import run_rankings
from utils.models.settings import saved_settings
from utils.retrieval.baselines import lead_ranking, oracle_ranking, random_ranking
from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.dense import retriever_rankings


def rank_splits(
    splits: dict[str, Sequence[Example]], retriever: str | None, *, seed: int, accelerator
) -> dict[str, list[Ranking]]:
    """A ranking of the passages of each example of each split.

    `retriever` is bm25, lead, oracle, random, a TREC run file, or a retriever's folder or Hub name. With None the
    rankings are those in the examples, or BM25's if no example has one. Called on all processes.
    """
    baselines = {"lead": lead_ranking, "oracle": oracle_ranking, "random": partial(random_ranking, seed=seed)}
    if retriever in baselines:
        rank = baselines[retriever]
        return {split: [rank(example) for example in examples] for split, examples in splits.items()}
    if retriever is None and (given := given_rankings(splits)):
        return given
    if retriever in (None, "bm25"):
        return {split: bm25_rankings(examples) for split, examples in splits.items()}
    if Path(retriever).is_file():
        # in one call, which refuses ids that two splits have
        ranked = iter(run_rankings(retriever, list(itertools.chain(*splits.values()))))
        return {split: list(itertools.islice(ranked, len(examples))) for split, examples in splits.items()}
    from utils.models.encoder import encode, load_retriever  # imports sentence-transformers, which takes seconds

    encode_texts = partial(encode, load_retriever(retriever).to(accelerator.device), accelerator=accelerator)
    settings = saved_settings(retriever)
    return {split: retriever_rankings(examples, encode_texts, settings) for split, examples in splits.items()}
