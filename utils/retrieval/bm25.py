"""BM25 over the passages of documents, and over a corpus."""

import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import bm25s
import numpy as np
import scipy.sparse
import Stemmer
from filelock import FileLock

from utils.data.examples import Corpus, Document, Example, Ranking, blocks
from utils.data.words import search_words
from utils.files import cache_folder, write_whole
from utils.retrieval.ranking import examples_by_document, rank, search_texts

BM25_SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75}


def bm25_scores(passages: Sequence[str], queries: Sequence[str], stopwords: str = "en") -> np.ndarray:
    """Scores all passages of one document for each query with BM25 (Lucene's variant, k1 = 1.5, b = 0.75).

    `stopwords` names a list of bm25s ("en", the longer "en_plus", ...). Passages that share no word with the query
    score 0.

    Returns: (queries, passages), float32.
    """
    return _scores_of(_index(search_words(passages, stopwords)), len(passages), search_words(queries, stopwords))


def _index(words: Sequence[list[str]]) -> bm25s.BM25 | None:
    """Of one document, from the words of each passage; None if no passage has a word."""
    if not any(words):
        return None
    index = bm25s.BM25(**BM25_SETTINGS)
    index.index(words, show_progress=False)
    return index


def _scores_of(index: bm25s.BM25 | None, passages: int, queries: Sequence[list[str]]) -> np.ndarray:
    """(queries, passages), from the words of each query."""
    scores = np.zeros((len(queries), passages), dtype=np.float32)
    if index is None:
        return scores
    for row, words in enumerate(queries):
        scores[row] = index.get_scores_from_ids(index.get_tokens_ids(words))  # words that no passage has are left out
    return scores


_kept: WeakKeyDictionary[Document, bm25s.BM25 | None] = WeakKeyDictionary()
KEPT = 2000  # indexes at most: a document is searched in each hop and each validation, but a collection may be large


def _indexes(documents: Sequence[Document]) -> list[bm25s.BM25 | None]:
    new = [document for document in documents if document not in _kept]
    words = iter(search_words([passage for document in new for passage in document.passages]))
    made = {document: _index(list(itertools.islice(words, len(document.passages)))) for document in new}
    _kept.update(itertools.islice(made.items(), max(0, KEPT - len(_kept))))
    return [made[document] if document in made else _kept[document] for document in documents]


def bm25_rankings(
    examples: Sequence[Example], top_k: int | None = None, queries: Sequence[str] | None = None
) -> list[Ranking]:
    """Ranks each example's passages by BM25 for its query, or for the search text given in `queries`."""
    query_words = search_words(search_texts(examples, queries))
    rankings: list[Ranking] = [[] for _ in examples]
    documents = examples_by_document(examples)
    for first in range(0, len(documents), 500):  # whose words are in memory at a time
        block = documents[first : first + 500]
        for (document, numbers), index in zip(block, _indexes([document for document, _ in block]), strict=True):
            scores = _scores_of(index, len(document.passages), [query_words[number] for number in numbers])
            for number, row in zip(numbers, scores, strict=True):
                rankings[number] = rank(row, top_k)
    return rankings


BM25_BLOCK = 2**13  # passages tokenized at once


def bm25_index(corpus: Corpus, folder: str | os.PathLike | None = None, *, stopwords: str = "en") -> bm25s.BM25:
    """The BM25 index of a corpus, with the words and settings of `bm25_scores`, mapped into memory.

    It is built once, under a checksum of passages and settings in `folder` (default: `cache_folder()`), whole or not at
    all; of several processes the first builds it and the others wait. One that is damaged is made anew. Building takes
    some 20 bytes of memory for each word of the corpus, stopwords left out.
    """
    settings = [corpus.id, stopwords, BM25_SETTINGS, bm25s.__version__]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    path = Path(folder or cache_folder()) / f"bm25_{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        index = _load_bm25(path, len(corpus.passages))
        if index is None:
            write_whole(path, _build_bm25(corpus.passages, stopwords).save)
            index = _load_bm25(path, len(corpus.passages))
    return index


def _build_bm25(passages: Sequence[str], stopwords: str) -> bm25s.BM25:
    """What `bm25s.BM25.index` makes, without lists of all words in Python: words are counted as sparse matrices."""
    # the words of `search_words`, each stemmed once
    tokenizer = bm25s.tokenization.Tokenizer(stopwords=stopwords, stemmer=Stemmer.Stemmer("english"))
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
        starts = starts.astype(np.int32)  # or scipy makes all numbers as wide as these
    words = np.concatenate(words)

    counts = scipy.sparse.csr_array(
        (np.ones(len(words), dtype=np.float32), words, starts), shape=(len(passages), len(vocabulary))
    )
    del words
    counts.sum_duplicates()
    counts = counts.tocsc()  # a column holds the passages that have the word, in order, and how often they do
    containing = np.diff(counts.indptr)
    idf = np.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5)).astype(np.float32)
    idf = np.repeat(idf, containing)
    k1, b = BM25_SETTINGS["k1"], BM25_SETTINGS["b"]
    damping = k1 * ((1 - b) + b * lengths / max(lengths.mean(), 1))  # of each passage
    for start in range(0, counts.nnz, 2**22):  # in place, a part at a time
        part = slice(start, start + 2**22)
        frequency = counts.data[part]
        counts.data[part] = idf[part] * (frequency / (damping[counts.indices[part]] + frequency))

    index = bm25s.BM25(**BM25_SETTINGS)
    index.scores = {
        "data": counts.data,
        "indices": counts.indices,
        "indptr": counts.indptr,
        "num_docs": len(passages),
    }
    index.vocab_dict, index.nonoccurrence_array = vocabulary, None
    return index


def _load_bm25(path: Path, passages: int) -> bm25s.BM25 | None:
    """None if there is no index, or one that is not whole."""
    try:
        index = bm25s.BM25.load(path, mmap=True, show_progress=False)
        ends = index.scores["indptr"]
        sizes = {len(index.scores["data"]), len(index.scores["indices"]), int(ends[-1])}
        whole = index.scores["num_docs"] == passages and len(sizes) == 1 and len(ends) == len(index.vocab_dict) + 1
    except (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return index if whole else None


def bm25_search(index: bm25s.BM25, queries: Sequence[str], top_k: int, *, stopwords: str = "en") -> list[Ranking]:
    """The `top_k` best passages for each query, of those that share a word with it; maybe none.

    `stopwords` are those of the index.
    """
    rankings = []
    for words in search_words(queries, stopwords):
        known = index.get_tokens_ids(words)
        scores = index.get_scores_from_ids(known) if known else np.zeros(0, dtype=np.float32)
        passages = np.flatnonzero(scores)
        scores = scores[passages]
        if len(passages) > top_k:
            # more than top_k where several are as good as the last: the first of them in the corpus are taken
            good = scores >= np.partition(scores, -top_k)[-top_k]
            passages, scores = passages[good], scores[good]
        best_first = np.argsort(-scores, kind="stable")[:top_k]
        rankings.append(list(zip(passages[best_first].tolist(), scores[best_first].tolist(), strict=True)))
    return rankings
