"""Ranking the passages of a document for a query: BM25, dense vectors, fusion of rankings, and the baselines.

Everywhere in the project a ranking is a list of `(passage number, score)`, best first. What works on many examples
groups them by document, so that a document is indexed or encoded once however many queries it has.
"""

import functools
import itertools
import math
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from weakref import WeakKeyDictionary

import bm25s
import numpy as np
import Stemmer

from utils.data import Document, Example

Ranking = list[tuple[int, float]]

BM25_SETTINGS = {"method": "lucene", "k1": 1.5, "b": 0.75}
# chosen on QMSum's training meetings:
SHARPNESS = 0.7  # of standardized scores, before neighbours share them
FADES_BACK = 2  # times as fast as forward: more of what is said of a matter follows its mention than comes before


# ----------------------------------------------------------------------------------------------------------------------
# rankings


def rank(scores: np.ndarray, top_k: int | None = None) -> Ranking:
    """Orders passages by score, best first; equal scores stay in document order."""
    scores = np.asarray(scores)
    best_first = np.argsort(-scores, kind="stable")[:top_k]
    return [(int(passage), float(scores[passage])) for passage in best_first]


def reciprocal_rank_fusion(
    rankings: Iterable[Ranking], k: int = 60, weights: Iterable[float] = itertools.repeat(1.0)
) -> Ranking:
    """Fuses rankings: a passage scores the sum of 1 / (k + its rank) over those that have it (Cormack et al., 2009).

    `weights` multiply the shares of each ranking.
    """
    shares: dict[int, list[float]] = {}
    for ranking, weight in zip(rankings, weights, strict=False):
        for position, (passage, _) in enumerate(ranking, start=1):
            shares.setdefault(passage, []).append(weight / (k + position))
    # fsum: passages with the same ranks in another order must tie exactly
    fused = [(passage, math.fsum(parts)) for passage, parts in shares.items()]
    return sorted(fused, key=lambda entry: (-entry[1], entry[0]))


def smooth(scores: np.ndarray, window: int = 1, decay: float = 0.5) -> np.ndarray:
    """Adds to each passage's score shares of those of its `window` neighbours on either side, in document order.

    A score fades by `decay` at each passage that it goes forward, and by the square of it backward. What neighbours a
    passage at an end of the document lacks add nothing.
    """
    scores = np.asarray(scores, dtype=np.float64)
    total = scores.copy()
    for distance in range(1, min(window, len(scores) - 1) + 1):
        share = decay**distance
        total[distance:] += share * scores[:-distance]
        total[:-distance] += share**FADES_BACK * scores[distance:]
    return total


def combine(
    dense: Ranking, lexical: Ranking | None, *, bm25_weight: float, smooth_window: int, smooth_decay: float
) -> Ranking:
    """A document's ranking from the retriever's, with BM25's (if given) and with the passages' neighbours in it.

    Neighbours share what the standardized scores are exponents of: one passage that stands out then lifts those around
    it more than several middling ones do, and each kind of score may find a place of its own.
    """
    if not smooth_window:
        return fuse_scores(dense, lexical, bm25_weight) if lexical is not None else dense
    shared = np.exp(SHARPNESS * _standardized(dense))
    if lexical is not None:
        shared += bm25_weight * np.exp(SHARPNESS * _standardized(lexical))
    return rank(smooth(shared, smooth_window, smooth_decay))


def fuse_hops(rankings: Sequence[Ranking]) -> Ranking:
    """Fuses the rankings of an example's hops, first to last, by reciprocal rank, of which the last hop's counts twice.

    k is small: with the usual 60, passages that are middling at every hop would outrank what one draft alone finds.
    """
    if len(rankings) == 1:
        return rankings[0]
    return reciprocal_rank_fusion(rankings, k=10, weights=[*[1.0] * (len(rankings) - 1), 2.0])


def search_text(query: str, draft: str) -> str:
    """What a hop searches with: the query, and from the second hop on the draft of the one before."""
    return f"{query} {draft}".strip()


def hard_negatives(ranking: Ranking, evidence: Iterable[int], pool: int, margin: float | None = None) -> list[int]:
    """The `pool` best passages of a ranking that are no evidence, best first.

    With `margin`, a passage must score at least that share below the best evidence: what comes closer is likely
    evidence that nobody marked (NV-Retriever, Moreira et al., 2024, arXiv:2407.15831).
    """
    evidence = set(evidence)
    best = max((score for passage, score in ranking if passage in evidence), default=math.inf)
    limit = math.inf if margin is None or best == math.inf else best - margin * abs(best)
    return [passage for passage, score in ranking if passage not in evidence and score <= limit][:pool]


def passage_scores(ranking: Ranking) -> np.ndarray:
    """(passages,) the scores of a ranking that holds every passage of the document, in document order."""
    scores = np.zeros(len(ranking))
    for passage, score in ranking:
        scores[passage] = score
    return scores


def fuse_scores(first: Ranking, second: Ranking, weight: float) -> Ranking:
    """Ranks all passages by standardized scores: those of `first` and `weight` times those of `second`.

    Standardized (mean 0, deviation 1 over the document's passages), scores of different kinds can be added, and keep
    what reciprocal ranks lose: by how much one passage is better than the next.
    """
    return rank(_standardized(first) + weight * _standardized(second))


def _standardized(ranking: Ranking) -> np.ndarray:
    """(passages,) scores in document order, of mean 0 and deviation 1."""
    scores = passage_scores(ranking)
    return (scores - scores.mean()) / (scores.std() or 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# lexical and dense search


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
    query_words = search_words(_search_texts(examples, queries))
    rankings: list[Ranking] = [[] for _ in examples]
    documents = _examples_by_document(examples)
    for first in range(0, len(documents), 500):  # whose words are in memory at a time
        block = documents[first : first + 500]
        for (document, numbers), index in zip(block, _indexes([document for document, _ in block]), strict=True):
            scores = _scores_of(index, len(document.passages), [query_words[number] for number in numbers])
            for number, row in zip(numbers, scores, strict=True):
                rankings[number] = rank(row, top_k)
    return rankings


def dense_rankings(
    examples: Sequence[Example],
    encode: Callable[[list[str], str], np.ndarray],
    top_k: int | None = None,
    queries: Sequence[str] | None = None,
) -> list[Ranking]:
    """Ranks each example's passages by the dot product of their vectors with that of its query (or of `queries`).

    `encode(texts, kind)` returns (texts, dimensions), kind being "query" or "passage". It is called once with all
    passages of all documents and once with all different queries, so that it can batch by length.
    """
    queries = _search_texts(examples, queries)
    if not examples:
        return []
    documents = _examples_by_document(examples)
    passage_vectors = encode([passage for document, _ in documents for passage in document.passages], "passage")
    query_numbers = {text: number for number, text in enumerate(dict.fromkeys(queries))}
    query_vectors = encode(list(query_numbers), "query")

    rankings: list[Ranking] = [[] for _ in examples]
    start = 0
    for document, numbers in documents:
        end = start + len(document.passages)
        rows = [query_numbers[queries[number]] for number in numbers]
        scores = np.asarray(query_vectors[rows]) @ np.asarray(passage_vectors[start:end]).T
        for number, row in zip(numbers, scores, strict=True):
            rankings[number] = rank(row, top_k)
        start = end
    return rankings


def remember_passages(encode: Callable[[list[str], str], np.ndarray]) -> Callable[[list[str], str], np.ndarray]:
    """`encode(texts, kind)` that encodes a passage once, however many hops ask for it; as long as it is kept."""
    known: dict[str, np.ndarray] = {}

    def encode_once(texts: list[str], kind: str) -> np.ndarray:
        if kind != "passage":
            return encode(texts, kind)
        if new := [text for text in dict.fromkeys(texts) if text not in known]:
            known.update(zip(new, encode(new, kind), strict=True))
        return np.stack([known[text] for text in texts])

    return encode_once


def retriever_rankings(examples: Sequence[Example], encode, settings: dict, queries=None) -> list[Ranking]:
    """`dense_rankings`, with BM25 and neighbours where the retriever's `settings` say so.

    These are the flags of train_retrieve.py by name, of which those that are absent change nothing.
    """
    dense = dense_rankings(examples, encode, queries=queries)
    is_hybrid = settings.get("ranking") == "hybrid"
    lexical = bm25_rankings(examples, queries=queries) if is_hybrid else [None] * len(examples)
    weights = {
        "bm25_weight": settings.get("bm25_weight", 0.0),
        "smooth_window": settings.get("smooth_window", 0),
        "smooth_decay": settings.get("smooth_decay", 0.0),
    }
    return [combine(*both, **weights) for both in zip(dense, lexical, strict=True)]


def search_words(texts: Sequence[str], stopwords: str = "en") -> list[list[str]]:
    """The words that BM25 counts in each text: those of two characters and more, lower-cased, stemmed, no stopwords."""
    # a stemmer of PyStemmer must not be shared between threads, and costs nothing to make
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(list(texts), stopwords=stopwords, stemmer=stemmer, return_ids=False, show_progress=False)


def _search_texts(examples: Sequence[Example], queries: Sequence[str] | None) -> Sequence[str]:
    if queries is None:
        return [example.query for example in examples]
    if len(queries) != len(examples):
        raise ValueError(f"{len(queries)} queries for {len(examples)} examples; one for each is wanted")
    return queries


def _examples_by_document(examples: Sequence[Example]) -> list[tuple[Document, list[int]]]:
    """Groups the numbers of the examples that share one document (the same object), in order of first appearance."""
    groups: dict[int, tuple[Document, list[int]]] = {}
    for number, example in enumerate(examples):
        groups.setdefault(id(example.document), (example.document, []))[1].append(number)
    return list(groups.values())


# ----------------------------------------------------------------------------------------------------------------------
# baselines: rankings that read no query


def lead_ranking(example: Example, top_k: int | None = None) -> Ranking:
    """Ranks the passages in document order."""
    return _in_order(range(len(example.document.passages)), top_k)


def random_ranking(example: Example, top_k: int | None = None, seed: int = 42) -> Ranking:
    """Shuffles the passages, in the same way for the same example id and seed in every process and run."""
    passages = list(range(len(example.document.passages)))
    random.Random(f"{seed} {example.id}").shuffle(passages)
    return _in_order(passages, top_k)


def oracle_ranking(example: Example, top_k: int | None = None) -> Ranking:
    """Ranks the evidence, in document order, and nothing else; without evidence, the greedy ROUGE oracle's choice."""
    if example.evidence:
        return _in_order(sorted(example.evidence), top_k)
    return _in_order(greedy_rouge_oracle(example.document.passages, example.summaries, max_passages=top_k), top_k)


def _in_order(passages: Iterable[int], top_k: int | None) -> Ranking:
    return [(passage, 1 / position) for position, passage in enumerate(passages, start=1)][:top_k]


# ----------------------------------------------------------------------------------------------------------------------
# greedy ROUGE oracle


def greedy_rouge_oracle(
    passages: Sequence[str], summaries: str | Sequence[str], max_passages: int | None = None
) -> list[int]:
    """Chooses passages one by one, each time the one that raises ROUGE-1 F1 + ROUGE-2 F1 most, until none raises it.

    Greedy labels of extractive summarization (Nallapati et al., 2017, arXiv:1611.04230). N-grams are counted once, in
    each passage by itself: none spans two passages. With several summaries each of the two F1 is the maximum over
    them, as in evaluation. Of equally good passages the first in the document is taken.

    Returns passage numbers in the order chosen; empty if no passage shares a word with a summary.
    """
    if isinstance(summaries, str):
        summaries = [summaries]
    passage_words = [rouge_words(passage) for passage in passages]
    summary_words = [rouge_words(summary) for summary in summaries]
    counts = [_count_ngrams(passage_words, summary, n) for n in (1, 2) for summary in summary_words]

    chosen: list[int] = []
    best = 0.0
    while passages and len(chosen) < (len(passages) if max_passages is None else max_passages):
        f1 = [_f1_with_each_passage(*count, chosen) for count in counts]
        unigram_f1, bigram_f1 = f1[: len(summaries)], f1[len(summaries) :]
        gain_of = np.max(unigram_f1, axis=0) + np.max(bigram_f1, axis=0)
        gain_of[chosen] = 0
        candidate = int(gain_of.argmax())
        if gain_of[candidate] <= best:
            break
        best = gain_of[candidate]
        chosen.append(candidate)
    return chosen


def _count_ngrams(
    passages: list[tuple[str, ...]], summary: tuple[str, ...], n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts the n-grams of tokenized passages that a tokenized summary has, and all n-grams.

    Returns the counts in the passages (passages, n-grams of the summary) and in the summary (n-grams of the summary),
    and the number of all n-grams in each passage (passages).
    """
    summary_counts = Counter(zip(*(summary[i:] for i in range(n)), strict=False))
    columns = {ngram: column for column, ngram in enumerate(summary_counts)}
    found = [
        (row, columns[ngram])
        for row, words in enumerate(passages)
        for ngram in zip(*(words[i:] for i in range(n)), strict=False)
        if ngram in columns
    ]
    passage_counts = np.zeros((len(passages), len(columns)), dtype=np.int64)
    if found:
        np.add.at(passage_counts, tuple(np.array(found).T), 1)
    lengths = np.array([max(len(words) - n + 1, 0) for words in passages], dtype=np.int64)
    return passage_counts, np.array(list(summary_counts.values()), dtype=np.int64), lengths


def _f1_with_each_passage(
    passage_counts: np.ndarray, summary_counts: np.ndarray, lengths: np.ndarray, chosen: list[int]
) -> np.ndarray:
    """ROUGE-n F1 of the chosen passages and one more, for each passage as that one: (passages,)."""
    overlaps = np.minimum(passage_counts[chosen].sum(axis=0) + passage_counts, summary_counts).sum(axis=1)
    sizes = lengths[chosen].sum() + lengths + summary_counts.sum()
    # F1 = 2PR / (P + R), with P = overlap / words chosen and R = overlap / words of the summary
    return 2 * overlaps / np.maximum(sizes, 1)


# ----------------------------------------------------------------------------------------------------------------------
# words as ROUGE counts them; here and not in metrics.py, which takes seconds to import

# Scripts written without spaces (kana, Han): each character is a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
ROUGE_WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")


@functools.lru_cache(maxsize=2**14)
def rouge_words(text: str) -> tuple[str, ...]:
    """Lower-cased, stemmed words; of ASCII text exactly those of rouge-score with `use_stemmer=True`.

    rouge-score drops every character but a-z and 0-9; here letters and digits of all scripts count.
    """
    words = ROUGE_WORD.findall(unicodedata.normalize("NFC", text.lower()))
    return tuple(_porter_stem(word) if len(word) > 3 else word for word in words)


@functools.lru_cache(maxsize=2**17)
def _porter_stem(word: str) -> str:
    return _porter_stemmer().stem(word)


@functools.cache
def _porter_stemmer():
    from nltk.stem.porter import PorterStemmer  # here: importing nltk takes more than a second

    return PorterStemmer()
