"""BM25 search over the passages of documents, and over a corpus."""

import hashlib
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import bm25s
import numpy as np
import scipy.sparse
from filelock import FileLock

from utils.data.examples import Corpus, Document, Example, Ranking, blocks
from utils.data.words import language_name, search_tokenizer, search_words
from utils.errors import UsageError
from utils.files import cache_folder, write_whole
from utils.progress import for_all, progress
from utils.retrieval.ranking import examples_by_document, rank, search_texts
from utils.tables import code_key, values

BM25_SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75}


# ---- search in documents


def bm25_rankings(
    examples: Sequence[Example],
    top_k: int | None = None,
    queries: Sequence[str] | None = None,
    language: str | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Ranking]:
    """Ranks passages by BM25 for each example's query, or for its search text in `queries`.

    `language` decides what the words are (see `search_tokenizer`; default: English). With `say`, one line tells how
    many questions have no word in a passage.
    """
    rankings: list[Ranking] = [[] for _ in examples]
    scored = bm25_score(examples, search_texts(examples, queries), language)
    for number, scores in progress(scored, "ranked", "examples with BM25", total=len(examples)):
        rankings[number] = rank(scores, top_k)
    if say:
        say_unmatched(unmatched(examples, rankings), len(examples), language, say)
    return rankings


def bm25_score(
    examples: Sequence[Example], queries: Sequence[str], language: str | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each example and its scores (passages,), float32, document by document."""
    documents = examples_by_document(examples)
    for first in range(0, len(documents), 500):  # tokenizing many documents at once is faster, but takes memory
        block = documents[first : first + 500]
        documents_of_block = [document for document, _ in block]
        words_of_queries = [queries[number] for _, numbers in block for number in numbers]
        query_words = iter(search_words(words_of_queries, language))
        for (document, numbers), index in zip(
            block, _indexes(documents_of_block, language_name(language)), strict=True
        ):
            words = list(itertools.islice(query_words, len(numbers)))
            yield from zip(numbers, _scores(index, len(document.passages), words), strict=True)


def bm25_scores(passages: Sequence[str], queries: Sequence[str], language: str | None = None) -> np.ndarray:
    """Scores all passages of one document for each query with BM25 (Lucene's variant, k1 = 1.5, b = 0.75).

    Returns (queries, passages), float32. A passage that shares no word with the query scores 0.
    """
    return _scores(_index(search_words(passages, language)), len(passages), search_words(queries, language))


def unmatched(examples: Sequence[Example], rankings: Sequence[Ranking]) -> list[str]:
    """The ids of the examples whose question shares no word with any passage."""
    ids, queries = values(examples, "id"), values(examples, "query")
    return [
        example_id
        for example_id, query, ranking in zip(ids, queries, rankings, strict=True)
        if query.strip() and not any(score for _, score in ranking)
    ]


def say_unmatched(ids: Sequence[str], examples: int, language: str | None, say: Callable[[str], None] | None) -> None:
    """Says how many of so many questions BM25 found no word of in any passage, if there are such questions."""
    if say and ids:
        say(
            f"warning: BM25 finds no passage for {len(ids)} of {examples} questions, such as that of '{ids[0]}': they "
            f"share no word with a passage; set --language (now {language_name(language)})"
        )


def check_language(language: str | None, source: str, settings: dict) -> None:
    """Raises UsageError if `--language` has no effect on passages from `source`, or another one was saved with it.

    `settings` are those of the retriever's folder, if `source` is one; they decide how it ranks.
    """
    if language is None or source == "bm25":
        return
    own = settings.get("language")
    if own is None and settings.get("ranking") != "hybrid":
        raise UsageError(f"--language {language} has no effect on passages from {source}, without BM25; leave it out")
    if language_name(own) != language_name(language):
        raise UsageError(
            f"--language {language}: the retriever {source} was trained with --language {language_name(own)} and "
            "ranks with it; leave the flag out, or train another retriever"
        )


# A document is searched at each hop and each validation, so the indexes of those searched last are kept.
_index_cache: OrderedDict[Document, tuple[str, bm25s.BM25 | None]] = OrderedDict()  # with its language
MAX_CACHED_INDEXES = 500


def _indexes(documents: Sequence[Document], language: str) -> list[bm25s.BM25 | None]:
    new = [document for document in documents if _index_cache.get(document, ("",))[0] != language]
    words = iter(search_words([passage for document in new for passage in document.passages], language))
    built = {document: (language, _index(list(itertools.islice(words, len(document.passages))))) for document in new}
    found = [built[document] if document in built else _index_cache[document] for document in documents]
    for document, index in zip(documents, found, strict=True):
        _index_cache[document] = index
        _index_cache.move_to_end(document)
    while len(_index_cache) > MAX_CACHED_INDEXES:
        _index_cache.popitem(last=False)
    return [index for _, index in found]


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


def bm25_index(corpus: Corpus, folder: str | os.PathLike | None = None, language: str | None = None) -> bm25s.BM25:
    """Returns the BM25 index of a corpus, mapped into memory. It gives the same scores as `bm25_scores`.

    The index is built once and kept in `folder` (default: `cache_folder()`), under a checksum of passages, language and
    settings. The first of several processes builds it, and the others wait. A damaged index is built again. Building
    takes about 20 bytes of memory per word of the corpus, without stopwords.
    """
    settings = [corpus.id, language_name(language), BM25_SETTINGS, bm25s.__version__, code_key()]
    key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()
    path = Path(folder or cache_folder()) / f"bm25_{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")), for_all():
        index = _load_index(path, len(corpus.passages))
        if index is None:
            write_whole(path, _build_index(corpus.passages, language).save)
            index = _load_index(path, len(corpus.passages))
    return index


def bm25_search(
    index: bm25s.BM25,
    queries: Sequence[str],
    top_k: int,
    language: str | None = None,
    also: Sequence[Ranking] | None = None,
) -> list[Ranking]:
    """Ranks the `top_k` best passages for each query. Passages that share no word with the query are left out.

    `language` is that of the index. The passages of each query's ranking in `also` are ranked in any case.
    """
    rankings = []
    words_of_queries = progress(search_words(queries, language), "searched", "queries with BM25", total=len(queries))
    for number, words in enumerate(words_of_queries):
        known = index.get_tokens_ids(words)
        all_scores = index.get_scores_from_ids(known) if known else np.zeros(0, dtype=np.float32)
        passages = np.flatnonzero(all_scores)
        scores = all_scores[passages]
        if len(passages) > top_k:
            # This keeps all passages that tie with the last one; the stable sort then takes the first of them.
            good = scores >= np.partition(scores, -top_k)[-top_k]
            passages, scores = passages[good], scores[good]
        best_first = np.argsort(-scores, kind="stable")[:top_k]
        rankings.append(list(zip(passages[best_first].tolist(), scores[best_first].tolist(), strict=True)))
        if also:
            further = sorted({passage for passage, _ in also[number]} - dict(rankings[-1]).keys())
            of_further = [float(all_scores[passage]) if known else 0.0 for passage in further]
            rankings[-1] += sorted(zip(further, of_further, strict=True), key=lambda entry: -entry[1])
    return rankings


def _build_index(passages: Sequence[str], language: str | None = None) -> bm25s.BM25:
    """Builds the same index as `bm25s.BM25.index`, with sparse matrices instead of Python lists of all words."""
    tokenizer = search_tokenizer(language)
    words, lengths = [], []
    for block in progress(blocks(passages, BM25_BLOCK), "indexed", "passages", total=len(passages), size=len):
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
