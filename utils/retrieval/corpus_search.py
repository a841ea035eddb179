"""Search in one corpus for all examples, with the same methods as `DocumentSearch`."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list

from utils.data.examples import Corpus, Document, Example, Ranking
from utils.models.encoder import weights_key
from utils.retrieval.bm25 import bm25_index, bm25_search, say_unmatched, unmatched
from utils.retrieval.document_search import DocumentSearch
from utils.retrieval.exact_search import dense_search, recall_lost
from utils.retrieval.ranking import reciprocal_rank_fusion, search_texts
from utils.retrieval.vectors import encode_corpus


class CorpusSearch:
    """Ranks the passages of the corpus, the same for all examples.

    Args:
        folder: where the passages' vectors are kept. They are encoded again when `weights_key()`, a checksum of the
            encoder, changes.
        index: "flat", "ivf" or "hnsw". The last two are approximate; the log says how many passages they miss.
        language: that of BM25's words (see `search_tokenizer`).
    """

    def __init__(
        self, corpus: Corpus, *, folder: Path, weights_key: Callable[[], str], index: str, language: str | None,
        accelerator, log,
    ):  # fmt: skip
        self.corpus, self.folder, self.weights_key, self.index = corpus, folder, weights_key, index
        self.accelerator, self.log, self.language = accelerator, log, language
        self.lexical = bm25_index(corpus, language=language)
        self.checked = ""  # the key of the vectors that the index was last compared with exact search on

    def bm25_rankings(
        self, examples: Sequence[Example], top_k: int, queries: Sequence[str] | None = None, say=None
    ) -> list[Ranking]:
        """Ranks passages by BM25 for each example's query, or for its search text in `queries`; `say` as there."""
        rankings = bm25_search(self.lexical, search_texts(examples, queries), top_k, self.language)
        if say:
            say_unmatched(unmatched(examples, rankings), len(examples), self.language, say)
        return rankings

    def dense_rankings(
        self, examples: Sequence[Example], encode, top_k: int, queries: Sequence[str] | None = None
    ) -> list[Ranking]:
        """Ranks passages by dot product with the vector of each example's query, or of its search text in `queries`.

        Call it on all processes; `encode(texts, kind)` runs on all, and the result is on all.
        """
        key = f"{self.corpus.id} {self.weights_key()} {self.accelerator.mixed_precision}"
        vectors = encode_corpus(self.corpus.passages, lambda texts: encode(texts, "passage"), self.folder,
                                key=key, accelerator=self.accelerator)  # fmt: skip
        query_vectors = encode(search_texts(examples, queries), "query")
        found = [None]
        if self.accelerator.is_main_process:
            found = [dense_search(query_vectors, vectors, top_k, index=self.index)]
            if self.index != "flat" and self.checked != key:
                self.checked = key
                lost = recall_lost(query_vectors, vectors, top_k, index=self.index)
                self.log.say(f"--index {self.index} misses {lost:.1f}% of the {top_k} passages that exact search finds")
        return broadcast_object_list(found)[0]

    def retriever_rankings(self, examples: Sequence[Example], encode, settings: dict, queries=None) -> list[Ranking]:
        """Ranks passages as the retriever's `settings` (flags of train_retrieve.py) say: by vectors, or with BM25 too.

        Gives the `top_k` best passages. BM25 is fused in by reciprocal rank.
        """
        top_k = settings["top_k"]
        dense = self.dense_rankings(examples, encode, top_k, queries)
        if settings["ranking"] == "dense":
            return dense
        both = zip(dense, self.bm25_rankings(examples, top_k, queries), strict=True)
        return [reciprocal_rank_fusion(pair)[:top_k] for pair in both]


def make_search(documents: Sequence[Document], retriever, *, index: str, folder: Path, language, log, accelerator):
    """Search in each example's own document, or in the corpus if that is the only document."""
    if not isinstance(documents[0], Corpus):
        return DocumentSearch(language)
    weights = functools.partial(weights_key, retriever)
    return CorpusSearch(documents[0], folder=folder, weights_key=weights, index=index, language=language,
                        accelerator=accelerator, log=log)  # fmt: skip
