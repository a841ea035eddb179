"""The search of train_retrieve.py: one hop, or two with a draft between them."""

from collections.abc import Callable, Iterator, Sequence

from utils.data.examples import Hop
from utils.retrieval.dense import remember_passages
from utils.retrieval.drafts import READ
from utils.retrieval.ranking import KEPT, RANKED_AT_ONCE, fuse_hops, search_text


def search_hops(
    rank_by: Callable,
    encode_texts: Callable,
    examples: Sequence,
    write_drafts: Callable | None = None,
    *,
    kept: int = KEPT,
) -> Iterator[list[Hop]]:
    """Ranks the passages of each example: with one hop or, with `write_drafts(examples, read, first)`, with two.

    Gives the `kept` best passages of each. Block by block, so that few vectors and rankings are held in memory.
    """
    for first in range(0, len(examples), RANKED_AT_ONCE):
        block, encode_once = examples[first : first + RANKED_AT_ONCE], remember_passages(encode_texts)
        one = rank_by(block, encode_once)
        if write_drafts is None:
            yield from ([Hop("", [], ranking[:kept])] for ranking in one)
            continue
        read = [[passage for passage, _ in ranking[:READ]] for ranking in one]
        drafts = write_drafts(block, read, first)
        two = rank_by(block, encode_once, queries=list(map(search_text, [e.query for e in block], drafts)))
        for draft, of_hop, *rankings in zip(drafts, read, one, two, strict=True):
            yield [Hop(draft, of_hop, rankings[0][:kept]), Hop("", [], fuse_hops(rankings)[:kept])]
