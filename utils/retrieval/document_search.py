"""Search in each example's own document, with the same methods as `CorpusSearch`."""

from utils.retrieval.bm25 import bm25_rankings
from utils.retrieval.dense import dense_rankings, retriever_rankings


class DocumentSearch:
    """Ranks the passages of each example's own document."""

    bm25_rankings = staticmethod(bm25_rankings)
    dense_rankings = staticmethod(dense_rankings)
    retriever_rankings = staticmethod(retriever_rankings)
