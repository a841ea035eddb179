"""BM25 in documents and in a corpus, against the formula."""

import math
import random
from collections import Counter

import bm25s
import numpy as np
import pytest
from retrieval_cases import COLOURS, MONEY, make_corpus, make_example, random_text, random_texts

from utils.data.examples import Document
from utils.retrieval.bm25 import _build_index, _index_cache, bm25_index, bm25_rankings, bm25_scores, bm25_search
from utils.retrieval.ranking import rank


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multistep-retrieve-summarize"


# ---- in documents


def lucene_bm25(passages, query, k1=1.5, b=0.75):
    """BM25 by its formula, on lists of words."""
    mean_length = sum(map(len, passages)) / len(passages)
    scores = []
    for words in passages:
        counts, score = Counter(words), 0.0
        for word in query:
            containing = sum(word in other for other in passages)
            idf = math.log(1 + (len(passages) - containing + 0.5) / (containing + 0.5))
            score += idf * counts[word] / (counts[word] + k1 * (1 - b + b * len(words) / mean_length))
        scores.append(score)
    return scores


def test_bm25_equals_the_formula():
    generator = random.Random(3)
    passages = [random_text(generator, generator.randint(1, 12), "xa xb xc xd xe xf") for _ in range(8)]
    queries = ["xa xb", "xc", "xd xd xe"]
    expected = [lucene_bm25([passage.split() for passage in passages], query.split()) for query in queries]
    assert bm25_scores(passages, queries) == pytest.approx(np.array(expected), rel=1e-5)


def test_bm25_matches_word_forms_and_ignores_stopwords():
    scores = bm25_scores(MONEY.passages, ["budgeting", "of the", "the budgets"])
    assert (scores[0] > 0).tolist() == [True, False, True]
    assert not scores[1].any()
    assert scores[2] == pytest.approx(scores[0])


@pytest.mark.parametrize("passages", [[], [""], ["the of and", "a"], ["?!", "..."]])
def test_bm25_of_passages_without_words_is_zero(passages):
    scores = bm25_scores(passages, ["yellow remote", ""])
    assert scores.shape == (2, len(passages)) and not scores.any()


@pytest.mark.parametrize("query", ["", "the", "zebra", "?"])
def test_bm25_of_a_query_without_known_words_ranks_in_document_order(query):
    (ranking,) = bm25_rankings([make_example(query=query)])
    assert ranking == [(0, 0.0), (1, 0.0), (2, 0.0), (3, 0.0)]


def test_bm25_is_silent(capfd, caplog):
    caplog.set_level("DEBUG")
    bm25_scores(COLOURS.passages, ["yellow", ""])
    assert capfd.readouterr() == ("", "")
    assert [record for record in caplog.records if record.levelname not in ("DEBUG", "NOTSET")] == []


def test_bm25_rankings_index_each_document_once_and_stay_with_their_examples(monkeypatch):
    indexed = []
    index = bm25s.BM25.index
    monkeypatch.setattr(bm25s.BM25, "index", lambda self, *args, **kw: indexed.append(1) or index(self, *args, **kw))
    colours, money = (Document(document.id, document.passages) for document in (COLOURS, MONEY))
    examples = [
        make_example("1", "yellow case", colours),
        make_example("2", "budget", money),
        make_example("3", "budgets", colours),
        make_example("4", "paint", money),
    ]
    rankings = bm25_rankings(examples, top_k=2)
    assert [ranking[0][0] for ranking in rankings] == [2, 0, 1, 1]
    assert all(len(ranking) == 2 for ranking in rankings)
    assert bm25_rankings(examples, top_k=2) == rankings  # as a later hop does
    assert len(indexed) == 2


def test_the_indexes_of_the_documents_searched_last_are_kept(monkeypatch):
    monkeypatch.setattr("utils.retrieval.bm25.MAX_CACHED_INDEXES", 2)
    documents = [Document(str(number), [f"paint number {number}", "yellow case"]) for number in range(3)]
    examples = [make_example(str(number), "yellow", document) for number, document in enumerate(documents)]
    rankings = bm25_rankings(examples)
    assert [ranking[0][0] for ranking in rankings] == [1, 1, 1]
    assert [document in _index_cache for document in documents] == [False, True, True]
    bm25_rankings(examples[1:2])
    bm25_rankings(examples[:1])
    assert [document in _index_cache for document in documents] == [True, True, False]
    assert bm25_rankings(examples) == rankings


def test_search_texts_given_replace_the_queries():
    examples = [make_example("1", "yellow case"), make_example("2", "yellow case")]
    rankings = bm25_rankings(examples, queries=["budgets", "bye"])
    assert [ranking[0][0] for ranking in rankings] == [1, 3]
    with pytest.raises(ValueError, match="1 queries for 2 examples"):
        bm25_rankings(examples, queries=["budgets"])


# ---- in a corpus


@pytest.mark.parametrize("top_k", [1, 7, 400])
def test_bm25_search_equals_the_scores_of_all_passages_with_ties_in_order_of_the_corpus(tmp_path, monkeypatch, top_k):
    texts = [*random_texts(300), "the of", "?!"]
    monkeypatch.setattr("utils.retrieval.bm25.BM25_BLOCK", 64)
    queries = ["running mills", "bread bread water", "studying the wheels of bakers", "stone"]
    index = bm25_index(make_corpus(tmp_path, texts))
    expected = [[entry for entry in rank(scores, top_k) if entry[1] > 0] for scores in bm25_scores(texts, queries)]
    assert bm25_search(index, queries, top_k) == expected
    assert len(set(dict(expected[-1]).values())) < len(expected[-1]) or top_k == 1  # there are ties


def test_a_query_without_a_known_word_finds_nothing(tmp_path):
    index = bm25_index(make_corpus(tmp_path, ["A mill.", "?!"]))
    assert bm25_search(index, ["", "the", "?!", "unheard", "mill"], 5)[:4] == [[], [], [], []]
    assert bm25_search(index, [], 5) == []
    without_words = bm25_index(make_corpus(tmp_path, ["the of and", "?!"]))
    assert bm25_search(without_words, ["the mill"], 5) == [[]]


def test_bm25_index_is_built_once_and_mapped_and_made_anew_for_other_texts_or_where_it_is_damaged(
    tmp_path, cache, monkeypatch
):
    builds, build = [], _build_index
    monkeypatch.setattr("utils.retrieval.bm25._build_index", lambda *args: builds.append(1) or build(*args))
    texts = random_texts(50)
    corpus = make_corpus(tmp_path, texts)
    expected = bm25_search(bm25_index(corpus, tmp_path / "a"), ["bread"], 9)
    index = bm25_index(corpus, tmp_path / "a")
    assert len(builds) == 1
    assert isinstance(index.scores["data"], np.memmap) and isinstance(index.scores["indices"], np.memmap)
    assert index.scores["data"].dtype.itemsize == index.scores["indices"].dtype.itemsize == 4
    (folder,) = (path for path in (tmp_path / "a").iterdir() if path.is_dir())
    for file in folder.iterdir():
        whole = file.read_bytes()
        for damaged in (None, whole[:-1], b""):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            builds.clear()
            assert bm25_search(bm25_index(corpus, tmp_path / "a"), ["bread"], 9) == expected
            assert len(builds) == 1, file
    assert not list((tmp_path / "a").glob(".*"))
    builds.clear()
    for each in (corpus, make_corpus(tmp_path, texts[1:])):
        bm25_index(each)
    assert len(builds) == len([path for path in cache.glob("bm25_*") if path.is_dir()]) == 2
