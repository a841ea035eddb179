"""The search of train_retrieve.py and train_rerank.py: one hop, or two with a draft between them."""

from collections.abc import Callable, Iterator, Sequence

from utils.data.examples import Hop
from utils.progress import progress
from utils.retrieval.drafts import READ
from utils.retrieval.ranking import RANKED_AT_ONCE, fuse_hops, search_text
from utils.retrieval.reranking import Score, rank_passages


def search_hops(
    search,
    encode_texts: Callable | None,
    settings: dict,
    examples: Sequence,
    write_drafts: Callable | None = None,
    *,
    score: Score | None = None,
) -> Iterator[list[Hop]]:
    """Ranks the passages of each example: with one hop or, with `write_drafts(examples, read, first)`, with two.

    `search` (see `make_search`) ranks as `settings` say, and `score` reranks (see `rank_passages`). Gives the
    `search.depth` best passages of each hop. Block by block, so that few vectors and rankings are held in memory.
    """
    kept = search.depth
    starts = range(0, len(examples), RANKED_AT_ONCE)
    for first in progress(starts, "ranked", "examples", total=len(examples), size=lambda _: RANKED_AT_ONCE):
        block, encode_once = examples[first : first + RANKED_AT_ONCE], encode_texts and search.remember(encode_texts)
        one = rank_passages(search, block, encode_once, settings, score=score)
        if write_drafts is None:
            yield from ([Hop("", [], ranking[:kept])] for ranking in one)
            continue
        read = [[passage for passage, _ in ranking[:READ]] for ranking in one]
        drafts = write_drafts(block, read, first)
        queries = list(map(search_text, [e.query for e in block], drafts))
        two = rank_passages(search, block, encode_once, settings, queries, score=score)
        for draft, of_hop, *rankings in zip(drafts, read, one, two, strict=True):
            fused = fuse_hops(rankings, settings["hop_weight"])
            yield [Hop(draft, of_hop, rankings[0][:kept]), Hop("", [], fused[:kept])]
