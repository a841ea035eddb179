"""Search in each example's own document, with the same methods as `CorpusSearch`."""

from collections.abc import Sequence
from functools import partial

from utils.data.examples import Example
from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.dense import dense_rankings, remember_passages, retriever_rankings
from utils.retrieval.ranking import KEPT, examples_by_document


class DocumentSearch:
    """Ranks the passages of each example's own document.

    `language` is that of BM25's words. Rankings are whole, if a call does not ask for another number of passages;
    `depth` passages of them are used.
    """

    def __init__(self, language: str | None = None, depth: int = KEPT):
        self.bm25_rankings, self.depth = partial(bm25_rankings, language=language), depth

    dense_rankings = staticmethod(dense_rankings)
    retriever_rankings = staticmethod(retriever_rankings)
    remember = staticmethod(remember_passages)

    def prepare(self, encode) -> None:
        """Nothing: passages are encoded with the queries about them."""

    def blocks(self, examples: Sequence[Example], size: int) -> list[list[int]]:
        """Numbers of examples, at least `size` in each block but the last; those about one document stay together."""
        blocks: list[list[int]] = []
        for _, numbers in examples_by_document(examples):
            if not blocks or len(blocks[-1]) >= size:
                blocks.append([])
            blocks[-1] += numbers
        return blocks
