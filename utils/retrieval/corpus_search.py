"""Search in one corpus for all examples, with the same methods as `DocumentSearch`."""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from accelerate.utils import gather_object

from utils.data.examples import Corpus, Document, Example, Ranking
from utils.models.encoder import weights_key
from utils.processes import add_up, from_main, wait_for_all
from utils.retrieval.bm25 import bm25_index, bm25_search, say_unmatched, unmatched
from utils.retrieval.dense import Encode
from utils.retrieval.document_search import DocumentSearch
from utils.retrieval.exact_search import add_passages, dense_search, merge, recall_lost
from utils.retrieval.faiss_index import approximate_index
from utils.retrieval.ranking import KEPT, fuse_scores, search_texts
from utils.retrieval.vectors import encode_corpus, find_vectors
from utils.tables import code_key

DEPTH = 200  # passages of a ranking at least, because rankings of searches and of hops are fused
MOST_SEARCHED = 512  # examples of a block


class CorpusSearch:
    """Ranks the passages of the corpus, the same for all examples.

    Args:
        folder: where the passages' vectors are kept. They are encoded again when `weights_key()`, a checksum of the
            encoder, or the code in utils/ changes.
        index: "flat", "ivf" or "hnsw". The last two are approximate; the log says how many passages they miss.
        language: that of BM25's words (see `search_tokenizer`).
        depth: passages of a ranking, if a call does not ask for another number.
        alone: each process searches by itself, and `encode` is its own. Call `prepare` on all of them first. Without
            it, the searches are called on all processes, as is `encode`, after the passages were encoded with the
            encoder as it then is. In exact search each process looks at its share of the vectors; the main one does
            the rest for all.
        trained_in: the folder of the vectors in the retriever's own run folder, which are used if they are still right.
    """

    def __init__(
        self, corpus: Corpus, *, folder: Path, weights_key: Callable[[], str], index: str, language: str | None,
        depth: int, alone: bool, trained_in: Path | None, accelerator, say: Callable[[str], None],
    ):  # fmt: skip
        self.corpus, self.folder, self.weights_key, self.index = corpus, folder, weights_key, index
        self.accelerator, self.say, self.language = accelerator, say, language
        self.depth, self.alone, self.trained_in = depth, alone, trained_in
        self.checked = ""  # the key of the vectors that the index was last compared with exact search on

    @cached_property
    def lexical(self):
        """The BM25 index. The first process that needs it builds it while the others wait."""
        return bm25_index(self.corpus, language=self.language)

    def prepare(self, encode: Encode) -> None:
        """Encodes the passages whose vectors are not there, and builds an approximate index; called on all processes.

        `encode(texts, kind)` runs on all of them.
        """
        key = f"{self.corpus.id} {self.weights_key()} {self.accelerator.mixed_precision} {code_key()}"
        if self.trained_in and self.index == "flat":  # other indexes would be written there
            found = find_vectors(self.trained_in, key=key, count=len(self.corpus.passages))
            if add_up([found is None]) == [0.0]:  # by every process
                self.vectors = found
                return
        self.vectors = encode_corpus(self.corpus.passages, lambda texts: encode(texts, "passage"), self.folder,
                                     key=key, accelerator=self.accelerator)  # fmt: skip
        if self.alone and self.index != "flat":  # now, once for all processes
            if self.accelerator.is_main_process:
                approximate_index(self.vectors, self.index)
            wait_for_all()

    def remember(self, encode: Encode) -> Encode:
        """`encode` itself: what is to be remembered of the passages is on the disk."""
        return encode

    def blocks(self, examples: Sequence[Example], size: int) -> list[list[int]]:
        """Numbers of examples in blocks, whose queries go through the vectors together; `size`: the least in a block.

        Many examples have larger blocks, up to `MOST_SEARCHED`, but enough of them for the processes to share.
        """
        size = max(size, min(len(examples) // 64, MOST_SEARCHED))
        numbers = list(range(len(examples)))
        return [numbers[first : first + size] for first in range(0, len(numbers), size)]

    def bm25_rankings(
        self, examples: Sequence[Example], top_k: int | None = None, queries: Sequence[str] | None = None, say=None
    ) -> list[Ranking]:
        """Ranks passages by BM25 for each example's query, or for its search text in `queries`; `say` as there."""
        rankings = bm25_search(self.lexical, search_texts(examples, queries), top_k or self.depth, self.language)
        if say:
            say_unmatched(unmatched(examples, rankings), len(examples), self.language, say)
        return rankings

    def dense_rankings(
        self, examples: Sequence[Example], encode: Encode, top_k: int | None = None,
        queries: Sequence[str] | None = None,
    ) -> list[Ranking]:  # fmt: skip
        """Ranks passages by dot product with the vector of each example's query, or of its search text in `queries`."""
        return self._search(encode, search_texts(examples, queries), top_k or self.depth)

    def retriever_rankings(
        self, examples: Sequence[Example], encode: Encode, settings: dict, queries: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> list[Ranking]:  # fmt: skip
        """Ranks passages as the retriever's `settings` (flags of train_retrieve.py) say: by vectors, or with BM25 too.

        BM25 is added by score, as within a document (see `fuse_scores`). Candidates are the `top_k` best passages of
        either search, at least `DEPTH`; each has both scores, standardized over the `DEPTH` best of either search.
        """
        top_k, queries = top_k or self.depth, search_texts(examples, queries)
        if settings.get("ranking") != "hybrid":
            return self.dense_rankings(examples, encode, top_k, queries)

        def fuse(query_vectors: np.ndarray, dense: list[Ranking]) -> list[Ranking]:
            lexical = bm25_search(self.lexical, queries, max(top_k, DEPTH), self.language, also=dense)
            best = [{passage for passage, _ in (*one[:DEPTH], *other[:DEPTH])}
                    for one, other in zip(dense, lexical, strict=True)]  # fmt: skip
            dense = add_passages(query_vectors, self.vectors, dense, lexical)
            weight = settings["bm25_weight"]
            return [fuse_scores(one, other, weight, among)[:top_k]
                    for one, other, among in zip(dense, lexical, best, strict=True)]  # fmt: skip

        return self._search(encode, queries, max(top_k, DEPTH), fuse)

    def _search(
        self, encode: Encode, queries: Sequence[str], top_k: int, finish: Callable | None = None
    ) -> list[Ranking]:
        """The `top_k` passages nearest to each query, or what `finish(query vectors, rankings)` makes of them."""
        if not self.alone:
            self.prepare(encode)
        query_vectors = encode(list(queries), "query")
        if self.alone:
            found = self._nearest(query_vectors, top_k)
            return finish(query_vectors, found) if finish else found
        parts, processes = None, self.accelerator.num_processes
        if self.index == "flat" and processes > 1:
            own = dense_search(query_vectors, self.vectors, top_k, process=self.accelerator.process_index,
                               processes=processes)  # fmt: skip
            wait_for_all()
            parts = gather_object([own])

        def search() -> list[Ranking]:
            found = merge(parts, top_k) if parts else self._nearest(query_vectors, top_k)
            return finish(query_vectors, found) if finish else found

        return from_main(self.accelerator, search)

    def _nearest(self, query_vectors: np.ndarray, top_k: int) -> list[Ranking]:
        if self.index != "flat" and self.checked != self.vectors.key and self.accelerator.is_main_process:
            self.checked = self.vectors.key
            lost = recall_lost(query_vectors, self.vectors, top_k, index=self.index)
            self.say(f"--index {self.index} misses {lost:.1f}% of the {top_k} passages that exact search finds")
        return dense_search(query_vectors, self.vectors, top_k, index=self.index)


def make_search(documents: Sequence[Document], retriever, *, index: str, folder: Path, language: str | None, top_k: int,
                say: Callable[[str], None], accelerator, alone: bool = False, trained_in: str = ""):  # fmt: skip
    """Search in each example's own document, or in the corpus if that is the only document.

    `top_k` passages are handed on. `retriever` may be None if only BM25 searches. `trained_in` is its run folder, if it
    has one. The rest is as in `CorpusSearch`.
    """
    if not isinstance(documents[0], Corpus):
        return DocumentSearch(language, max(top_k, KEPT))
    return CorpusSearch(documents[0], folder=folder, weights_key=partial(weights_key, retriever), index=index,
                        language=language, depth=max(top_k, DEPTH), alone=alone, accelerator=accelerator, say=say,
                        trained_in=Path(trained_in, "embeddings") if trained_in else None)  # fmt: skip
