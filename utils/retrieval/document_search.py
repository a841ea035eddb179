"""Search in each example's own document, with the same methods as `CorpusSearch`."""

from functools import partial

from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.dense import dense_rankings, retriever_rankings


class DocumentSearch:
    """Ranks the passages of each example's own document; `language` is that of BM25's words."""

    def __init__(self, language: str | None = None):
        self.bm25_rankings = partial(bm25_rankings, language=language)

    dense_rankings = staticmethod(dense_rankings)
    retriever_rankings = staticmethod(retriever_rankings)
