"""A second look at the best passages of a ranking: a reranker reads each with the query, and its scores are added.

Nogueira and Cho, 2019, arXiv:1901.04085. The scores are standardized and smoothed over neighbours like those of the
search (see `combine`), so that neither kind of score outweighs the other.
"""

import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from utils.data.examples import Example, Ranking
from utils.models import cross_encoder
from utils.models.encoder import weights_key
from utils.models.settings import check_made, place, saved_settings
from utils.retrieval.ranking import SHARPNESS, search_texts, smooth, standardized

Score = Callable[[list[tuple[str, str]]], np.ndarray]  # of pairs of search text and passage


def rerank(
    examples: Sequence[Example],
    rankings: Sequence[Ranking],
    score: Score,
    settings: dict,
    queries: Sequence[str] | None = None,
) -> list[Ranking]:
    """Ranks anew, with the scores of the `rerank_top_k` best passages for each example's query or search text.

    `rankings` are a search's, of all passages where it smooths. `settings` are those of the reranker and the search:
    `rerank_top_k`, `rerank_weight`, and `smooth_window` and `smooth_decay` where the search smooths. Passages beyond
    the `rerank_top_k` best count as if they had the lowest score of these.
    """
    heads = [[passage for passage, _ in ranking[: settings["rerank_top_k"]]] for ranking in rankings]
    pairs = []
    for example, search, head in zip(examples, search_texts(examples, queries), heads, strict=True):
        pairs += [(search, example.document.passages[passage]) for passage in head]
    scores, ranked, start = score(pairs), [], 0
    for ranking, head in zip(rankings, heads, strict=True):
        ranked.append(_fuse(ranking, scores[start : start + len(head)], settings))
        start += len(head)
    return ranked


def _fuse(ranking: Ranking, scores: np.ndarray, settings: dict) -> Ranking:
    """Adds the reranker's scores of the best passages, (passages,), to the scores of the whole ranking."""
    if len(scores) < 2:  # nothing to compare
        return ranking
    weight, window = settings["rerank_weight"], settings.get("smooth_window") or 0
    found = standardized(scores.astype(np.float64))
    own = np.array([score for _, score in ranking])
    added = np.full(len(ranking), found.min())
    added[: len(scores)] = found
    if window:
        passages = np.array([passage for passage, _ in ranking])
        in_order = np.empty(len(ranking))
        in_order[passages] = np.exp(SHARPNESS * added)
        total = own + weight * smooth(in_order, window, settings["smooth_decay"])[passages]
    else:
        head = own[: len(scores)]
        total = (own - head.mean()) / (head.std() or 1.0) + weight * added
    best_first = np.argsort(-total, kind="stable")  # ties stay in the order of the search
    return [(ranking[place][0], float(total[place])) for place in best_first]


def rank_passages(
    search, examples: Sequence[Example], encode, settings: dict, queries: Sequence[str] | None = None, *,
    score: Score | None = None, top_k: int | None = None,
) -> list[Ranking]:  # fmt: skip
    """Ranks passages for each example's query or search text: by BM25 if `encode` is None, else by the retriever.

    `search` is that of `make_search`. With `score`, the best passages are reranked. Gives the `top_k` best, or
    as many as the search gives.
    """
    if encode is None:
        rankings = search.bm25_rankings(examples, None if score else top_k, queries)
    else:
        rankings = search.retriever_rankings(examples, encode, settings, queries, None if score else top_k)
    return [r[:top_k] for r in rerank(examples, rankings, score, settings, queries)] if score else rankings


def load_scorer(args, *, accelerator) -> tuple[Callable[..., Score] | None, dict]:
    """What makes a scorer as `--reranker` and its flags say, and its settings; (None, {}) without a reranker.

    Call it with the options of `scorer`, such as `poll`. The settings hold a checksum of the reranker.
    """
    settings = args.rerank_settings(saved_settings(args.reranker) if args.reranker else {})
    if not args.reranker:
        return None, {}
    check_made("--reranker", args.reranker, "train_rerank.py")
    reranker = cross_encoder.load_reranker(args.reranker, trust_remote_code=args.trust_remote_code)
    key = [weights_key(reranker), cross_encoder.tokens_key(reranker)]
    make = functools.partial(scorer, place(reranker, accelerator), accelerator=accelerator)
    return make, settings | {"reranker": key}


def scorer(
    reranker, *, accelerator, poll=None, alone: bool = False, cost: dict | None = None, say: Callable | None = None
) -> Score:
    """Scores pairs of texts with a cross-encoder; each text is tokenized once, and each pair is scored once in a call.

    `cost` grows by `pairs`, `pair_tokens` and `pair_seconds`: how many are scored, and how long that takes. The first
    call says with `say` what a query costs. Other parameters are as in `cross_encoder.score`.
    """
    said = [say is None]

    def score(pairs: list[tuple[str, str]]) -> np.ndarray:
        began, tokens = time.perf_counter(), {}
        for kind, texts in zip(cross_encoder.KINDS, zip(*pairs, strict=True), strict=False):
            distinct = list(dict.fromkeys(texts))
            ids = cross_encoder.tokenize(reranker, distinct, kind, keep=False)
            tokens[kind] = dict(zip(distinct, ids, strict=True))
        places: dict[tuple[str, str], int] = {}
        numbers = [places.setdefault(pair, len(places)) for pair in pairs]
        of_pairs = [(tokens["query"][query], tokens["passage"][passage]) for query, passage in places]
        if cost is not None:
            cost["pairs"] = cost.get("pairs", 0) + len(of_pairs)
            cost["pair_tokens"] = cost.get("pair_tokens", 0) + sum(len(part) for pair in of_pairs for part in pair)
        found = cross_encoder.score(reranker, of_pairs, accelerator=accelerator, poll=poll, alone=alone)
        seconds = time.perf_counter() - began
        if cost is not None:
            cost["pair_seconds"] = cost.get("pair_seconds", 0.0) + seconds
        if pairs and not said[0]:
            said[0] = True
            queries = len({query for query, _ in places})
            say(f"the reranker scored {len(places) / queries:.1f} passages a query in {seconds / queries:.2g} s")
        return found[numbers]

    return score


def describe_cost(hops: Sequence[dict]) -> str:
    """What reranking cost at a hop, on average: `hops` are the costs of each (see `scorer`) with its `examples`."""
    pairs, seconds, asked = (sum(hop[name] for hop in hops) for name in ("pairs", "pair_seconds", "examples"))
    return f"the reranker scored {pairs / asked:.1f} passages a query and hop in {seconds / asked:.2g} s"


def remember_scores(score: Score) -> Score:
    """Wraps `score` so that it scores each pair only once. Its memory is freed with the wrapper."""
    known: dict[tuple[str, str], float] = {}

    def score_once(pairs: list[tuple[str, str]]) -> np.ndarray:
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in known]:
            known.update(zip(new, score(new).tolist(), strict=True))
        return np.array([known[pair] for pair in pairs], dtype=np.float32)

    return score_once
