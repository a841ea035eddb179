"""Ranks the passages of all splits from one source, as the summarizer reads them."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import pyarrow as pa

from utils.data.examples import Example, Ranking
from utils.data.hand_over import have_rankings
from utils.data.kept import content_key
from utils.data.trec import run_rankings
from utils.errors import UsageError
from utils.models.settings import place, saved_settings
from utils.processes import from_main
from utils.progress import progress
from utils.retrieval.baselines import lead_ranking, oracle_ranking, random_ranking
from utils.retrieval.bm25 import bm25_rankings, check_language, say_unmatched
from utils.retrieval.document_search import DocumentSearch
from utils.retrieval.ranking import RANKED_AT_ONCE
from utils.tables import Table, cached, find_cached, values, write_table

BASELINES = {"lead": lead_ranking, "oracle": oracle_ranking, "random": random_ranking}
RANKINGS = pa.schema([("passages", pa.large_list(pa.int64())), ("is_matched", pa.bool_())])
Hops = list[list[tuple[int, ...]]]  # for each example, the passages to read at each hop


def rank_splits(
    splits: dict[str, Sequence[Example]], args, *, accelerator, say: Callable[[str], None]
) -> tuple[dict[str, Hops], str]:
    """The `--top_k` best passages of each example of each split at each hop, and where they come from.

    `--retriever` is bm25, lead, oracle, random, a TREC run file, or a retriever's folder or Hub name. Without it the
    rankings are those in the examples, or BM25's if no example has one. Called on all processes.
    """
    name, top_k = args.retriever, args.top_k
    args.rerank_settings({})  # refuses flags without effect
    is_trained = name not in (None, "bm25", *BASELINES) and not Path(name).is_file()
    settings = args.ranking_settings(saved_settings(name) if is_trained else None)
    given = name is None and have_rankings(splits)
    source = name or ("the rankings in the files" if given else "bm25")
    check_language(args.language, source, settings if is_trained else {})
    if args.reranker and not (is_trained or source == "bm25"):
        remedy = "set --retriever bm25, or a retriever"
        raise UsageError(f"--reranker has no effect on passages from {source}, which no search ranks; {remedy}")
    if given:
        return {split: _given(examples, top_k) for split, examples in splits.items()}, source
    if args.reranker or is_trained:
        return _search(splits, source if is_trained else None, settings, args, accelerator, say), source
    if source == "bm25" or source in BASELINES:
        if not all(document.is_ordered for of in splits.values() for document in dict.fromkeys(values(of, "document"))):
            if source == "lead":
                raise UsageError("--retriever lead: the passages have no order, so none come first; name another")
            say(f"note: {source} chooses among the passages that each record holds, and evidence is always among them")
        return {split: _kept(examples, source, args, say) for split, examples in splits.items()}, source
    # a TREC run, in one call, which refuses ids that two splits have
    ranked = iter(run_rankings(source, list(itertools.chain(*splits.values()))))
    of_splits = {split: list(itertools.islice(ranked, len(examples))) for split, examples in splits.items()}
    return {split: [[_best(ranking, top_k)] for ranking in rankings] for split, rankings in of_splits.items()}, source


def _search(splits: dict, retriever_name: str | None, settings: dict, args, accelerator, say) -> dict[str, Hops]:
    """Rankings of a trained retriever or (None) of BM25, reranked if that is asked for, and kept on disk."""
    from utils.models.encoder import encode, load_retriever, weights_key  # imports sentence-transformers: seconds
    from utils.retrieval.reranking import load_scorer, rank_passages

    options = {"trust_remote_code": args.trust_remote_code, "truncate_dim": args.truncate_dim}
    encode_texts, key = None, [args.language]
    if retriever_name:
        retriever = place(load_retriever(retriever_name, **options), accelerator)
        encode_texts = partial(encode, retriever, accelerator=accelerator)
        key = [settings, weights_key(retriever), args.truncate_dim]
    make_scorer, of_reranker = load_scorer(args, accelerator=accelerator)
    score = make_scorer and make_scorer(say=say)
    of_search = (settings if retriever_name else {}) | of_reranker  # BM25 alone does not smooth
    search = DocumentSearch(args.language)
    rank = partial(rank_passages, search, score=score, top_k=args.top_k)
    found = {}
    for split, examples in splits.items():
        of_split = [*key, of_reranker, content_key(examples), args.top_k, accelerator.mixed_precision]
        # of the main process, because the cache may be one machine's own
        found[split] = from_main(accelerator, partial(_find_rankings, of_split))
        if found[split] is not None:
            continue
        if not retriever_name:
            search.bm25_rankings(examples, 1, say=say)  # says which questions have no word in a passage
        hops = []
        starts = range(0, len(examples), RANKED_AT_ONCE)
        for first in progress(starts, "ranked", "examples", total=len(examples), size=lambda _: RANKED_AT_ONCE):
            block = examples[first : first + RANKED_AT_ONCE]
            hops += [[_best(ranking, args.top_k)] for ranking in rank(block, encode_texts, of_search)]
        found[split] = hops
        if accelerator.is_main_process:
            cached("rankings", of_split, partial(_write_rankings, hops=hops))
    return found


def _find_rankings(key: list) -> Hops | None:
    folder = find_cached("rankings", key)
    return folder and [[tuple(row["passages"])] for row in Table(folder / "rankings.arrow").read()]


def _write_rankings(folder: Path, hops: Hops) -> None:
    rows = ({"passages": of_example[0], "is_matched": True} for of_example in hops)
    write_table(folder / "rankings.arrow", RANKINGS, rows)


def _best(ranking: Ranking, top_k: int) -> tuple[int, ...]:
    return tuple(passage for passage, _ in ranking[:top_k])


def _given(examples: Sequence[Example], top_k: int) -> Hops:
    """The rankings that the examples bring along; a file of hops has those of earlier hops too."""
    return [[_best(hop.retrieved, top_k) for hop in (*example.hops[:-1], example)] for example in examples]


def _kept(examples: Sequence[Example], source: str, args, say: Callable[[str], None]) -> Hops:
    """Rankings of BM25 or of a baseline, computed once and kept on disk."""

    def rank() -> Iterable[Ranking]:
        if source == "bm25":
            return bm25_rankings(examples, args.top_k, language=args.language)
        seed = {"seed": args.seed} if source == "random" else {}
        return (BASELINES[source](example, **seed) for example in progress(examples, "ranked", "examples"))

    def write(folder: Path) -> None:
        write_table(folder / "rankings.arrow", RANKINGS, (
            {"passages": _best(ranking, args.top_k), "is_matched": any(score for _, score in ranking)}
            for ranking in rank()
        ))  # fmt: skip

    key = [source, content_key(examples), args.top_k, args.language, args.seed if source == "random" else None]
    table = Table(cached("rankings", key, write) / "rankings.arrow")
    hops, without_words = [], []
    queries = zip(values(examples, "id"), values(examples, "query"), table.read(), strict=True)
    for example_id, query, row in queries:
        hops.append([tuple(row["passages"])])
        if source == "bm25" and query.strip() and not row["is_matched"]:
            without_words.append(example_id)
    say_unmatched(without_words, len(examples), args.language, say)
    return hops
