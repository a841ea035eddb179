"""BM25 search over the passages of documents, and over a corpus."""

import hashlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import bm25s
import numpy as np
import scipy.sparse
import Stemmer
from filelock import FileLock

from utils.data.examples import Corpus, Document, Example, Ranking, blocks
from utils.data.words import STOPWORDS, search_words
from utils.files import cache_folder, write_whole
from utils.retrieval.ranking import examples_by_document, rank, search_texts

BM25_SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75}


# ---- search in documents


def bm25_rankings(
    examples: Sequence[Example], top_k: int | None = None, queries: Sequence[str] | None = None
) -> list[Ranking]:
    """Ranks passages by BM25 for each example's query, or for its search text in `queries`."""
    rankings: list[Ranking] = [[] for _ in examples]
    for number, scores in bm25_score(examples, search_texts(examples, queries)):
        rankings[number] = rank(scores, top_k)
    return rankings


def bm25_score(examples: Sequence[Example], queries: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each example and its scores (passages,), float32, document by document."""
    documents = examples_by_document(examples)
    for first in range(0, len(documents), 500):  # tokenizing many documents at once is faster, but takes memory
        block = documents[first : first + 500]
        query_words = iter(search_words([queries[number] for _, numbers in block for number in numbers]))
        for (document, numbers), index in zip(block, _indexes([document for document, _ in block]), strict=True):
            words = list(itertools.islice(query_words, len(numbers)))
            yield from zip(numbers, _scores(index, len(document.passages), words), strict=True)


def bm25_scores(passages: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """Scores all passages of one document for each query with BM25 (Lucene's variant, k1 = 1.5, b = 0.75).

    Returns (queries, passages), float32. A passage that shares no word with the query scores 0.
    """
    return _scores(_index(search_words(passages)), len(passages), search_words(queries))


# A document is searched at each hop and each validation, so the indexes of those searched last are kept.
_index_cache: OrderedDict[Document, bm25s.BM25 | None] = OrderedDict()
MAX_CACHED_INDEXES = 500


def _indexes(documents: Sequence[Document]) -> list[bm25s.BM25 | None]:
    new = [document for document in documents if document not in _index_cache]
    words = iter(search_words([passage for document in new for passage in document.passages]))
    built = {document: _index(list(itertools.islice(words, len(document.passages)))) for document in new}
    found = [built[document] if document in built else _index_cache[document] for document in documents]
    for document, index in zip(documents, found, strict=True):
        _index_cache[document] = index
        _index_cache.move_to_end(document)
    while len(_index_cache) > MAX_CACHED_INDEXES:
        _index_cache.popitem(last=False)
    return found


def _index(passage_words: Sequence[list[str]]) -> bm25s.BM25 | None:
    """The index of one document; None if its passages have no words, because bm25s cannot index those."""
    if not any(passage_words):
        return None
    index = bm25s.BM25(**BM25_SETTINGS)
    index.index(passage_words, show_progress=False)
    return index


def _scores(index: bm25s.BM25 | None, passages: int, query_words: Sequence[list[str]]) -> np.ndarray:
    """(queries, passages), float32"""
    scores = np.zeros((len(query_words), passages), dtype=np.float32)
    if index is not None:
        for row, words in enumerate(query_words):
            scores[row] = index.get_scores_from_ids(index.get_tokens_ids(words))  # which drops unknown words
    return scores


# ---- search in a corpus

BM25_BLOCK = 2**13  # passages tokenized at once


def bm25_index(corpus: Corpus, folder: str | os.PathLike | None = None) -> bm25s.BM25:
    """Returns the BM25 index of a corpus, mapped into memory. It gives the same scores as `bm25_scores`.

    The index is built once and kept in `folder` (default: `cache_folder()`), under a checksum of passages and settings.
    The first of several processes builds it, and the others wait. A damaged index is built again. Building takes about
    20 bytes of memory per word of the corpus, without stopwords.
    """
    settings = [corpus.id, STOPWORDS, BM25_SETTINGS, bm25s.__version__]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    path = Path(folder or cache_folder()) / f"bm25_{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        index = _load_index(path, len(corpus.passages))
        if index is None:
            write_whole(path, _build_index(corpus.passages).save)
            index = _load_index(path, len(corpus.passages))
    return index


def bm25_search(index: bm25s.BM25, queries: Sequence[str], top_k: int) -> list[Ranking]:
    """Ranks the `top_k` best passages for each query. Passages that share no word with the query are left out."""
    rankings = []
    for words in search_words(queries):
        known = index.get_tokens_ids(words)
        scores = index.get_scores_from_ids(known) if known else np.zeros(0, dtype=np.float32)
        passages = np.flatnonzero(scores)
        scores = scores[passages]
        if len(passages) > top_k:
            # This keeps all passages that tie with the last one; the stable sort then takes the first of them.
            good = scores >= np.partition(scores, -top_k)[-top_k]
            passages, scores = passages[good], scores[good]
        best_first = np.argsort(-scores, kind="stable")[:top_k]
        rankings.append(list(zip(passages[best_first].tolist(), scores[best_first].tolist(), strict=True)))
    return rankings


def _build_index(passages: Sequence[str]) -> bm25s.BM25:
    """Builds the same index as `bm25s.BM25.index`, with sparse matrices instead of Python lists of all words."""
    # the words of `search_words`; this tokenizer stems each different word only once
    tokenizer = bm25s.tokenization.Tokenizer(stopwords=STOPWORDS, stemmer=Stemmer.Stemmer("english"))
    words, lengths = [], []
    for block in blocks(passages, BM25_BLOCK):
        ids = list(tokenizer.streaming_tokenize(block, allow_empty=False))
        lengths.append(np.fromiter(map(len, ids), np.int64, count=len(ids)))
        words.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32, count=int(lengths[-1].sum())))
    vocabulary = tokenizer.stem_to_sid
    del tokenizer
    starts = np.concatenate([[0], *lengths]).cumsum()
    lengths = np.diff(starts)
    if starts[-1] < 2**31:
        starts = starts.astype(np.int32)  # scipy would make all index arrays as wide as this one
    words = np.concatenate(words)

    shape = (len(passages), len(vocabulary))
    counts = scipy.sparse.csr_array((np.ones(len(words), dtype=np.float32), words, starts), shape=shape)
    del words
    counts.sum_duplicates()
    counts = counts.tocsc()  # a column holds the passages that contain a word, in order, with the word's counts
    containing = np.diff(counts.indptr)
    idf = np.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5)).astype(np.float32)
    idf = np.repeat(idf, containing)
    k1, b = BM25_SETTINGS["k1"], BM25_SETTINGS["b"]
    damping = k1 * ((1 - b) + b * lengths / max(lengths.mean(), 1))  # (passages,)
    for start in range(0, counts.nnz, 2**22):  # in place and in parts, to save memory
        part = slice(start, start + 2**22)
        frequency = counts.data[part]
        counts.data[part] = idf[part] * (frequency / (damping[counts.indices[part]] + frequency))

    index = bm25s.BM25(**BM25_SETTINGS)
    index.scores = {"data": counts.data, "indices": counts.indices, "indptr": counts.indptr, "num_docs": len(passages)}
    index.vocab_dict, index.nonoccurrence_array = vocabulary, None
    return index


def _load_index(path: Path, passages: int) -> bm25s.BM25 | None:
    """None if there is no index, or an incomplete one."""
    try:
        index = bm25s.BM25.load(path, mmap=True, show_progress=False)
        ends = index.scores["indptr"]
        sizes = {len(index.scores["data"]), len(index.scores["indices"]), int(ends[-1])}
        whole = index.scores["num_docs"] == passages and len(sizes) == 1 and len(ends) == len(index.vocab_dict) + 1
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return index if whole else None
