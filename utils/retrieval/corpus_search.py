"""Search over one corpus for all examples: BM25, dense or both."""

from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list

from utils.data.examples import Corpus, Example, Ranking
from utils.retrieval.bm25 import bm25_index, bm25_search
from utils.retrieval.exact_search import dense_search, recall_lost
from utils.retrieval.ranking import reciprocal_rank_fusion
from utils.retrieval.vectors import encode_corpus


class CorpusSearch:
    """Ranks the passages of one corpus for examples: the functions of `utils/search.py` that do so for documents.

    Args:
        folder: of the passages' vectors, which are encoded anew when `weights_key()`, the encoder's checksum, changes.
        index: "flat", "ivf" or "hnsw"; of the latter two the log says how much they miss.
    """

    def __init__(self, corpus: Corpus, *, folder: Path, weights_key: Callable[[], str], index: str, accelerator, log):
        self.corpus, self.folder, self.weights_key, self.index = corpus, folder, weights_key, index
        self.accelerator, self.log, self.checked = accelerator, log, ""
        self.lexical = bm25_index(corpus)

    def bm25_rankings(
        self, examples: Sequence[Example], top_k: int, queries: Sequence[str] | None = None
    ) -> list[Ranking]:
        return bm25_search(self.lexical, queries or [example.query for example in examples], top_k)

    def dense_rankings(
        self, examples: Sequence[Example], encode, top_k: int, queries: Sequence[str] | None = None
    ) -> list[Ranking]:
        """Called on all processes, as `encode(texts, kind)` is; the result is on all of them."""
        key = f"{self.corpus.id} {self.weights_key()} {self.accelerator.mixed_precision}"
        vectors = encode_corpus(self.corpus.passages, lambda texts: encode(texts, "passage"), self.folder,
                                key=key, accelerator=self.accelerator)  # fmt: skip
        query_vectors = encode(queries or [example.query for example in examples], "query")
        found = [None]
        if self.accelerator.is_main_process:
            found = [dense_search(query_vectors, vectors, top_k, index=self.index)]
            if self.index != "flat" and self.checked != key:
                self.checked = key
                lost = recall_lost(query_vectors, vectors, top_k, index=self.index)
                self.log.say(f"--index {self.index} misses {lost:.1f}% of the {top_k} passages that exact search finds")
        return broadcast_object_list(found)[0]

    def retriever_rankings(self, examples: Sequence[Example], encode, settings: dict, queries=None) -> list[Ranking]:
        """The `top_k` of `settings` passages; with ranking "hybrid", fused with BM25's by reciprocal rank."""
        top_k = settings["top_k"]
        dense = self.dense_rankings(examples, encode, top_k, queries)
        if settings["ranking"] == "dense":
            return dense
        both = zip(dense, self.bm25_rankings(examples, top_k, queries), strict=True)
        return [reciprocal_rank_fusion(pair)[:top_k] for pair in both]
