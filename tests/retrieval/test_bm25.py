"""BM25 in documents and in a corpus, against the formula."""

import math
import random
from collections import Counter

import bm25s
import numpy as np
import pytest
from retrieval_cases import COLOURS, MONEY, make_corpus, make_example, random_text, random_texts

from utils.data.examples import Document
from utils.errors import UsageError
from utils.retrieval.bm25 import (
    _build_index,
    _index_cache,
    bm25_index,
    bm25_rankings,
    bm25_scores,
    bm25_search,
    check_language,
)
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


# ---- languages

ZH = ["第7次会议讨论了屋顶。", "委员会决定在5月修理桥梁。", "秘书整理了会议记录。"]
HI = ["समिति ने छत पर चर्चा की", "उन्होंने मई में पुल की मरम्मत का निर्णय लिया", "सचिव ने कार्यवृत्त तैयार किया"]
TH = ["คณะกรรมการหารือเรื่องหลังคา", "พวกเขาจะซ่อมสะพานในเดือนพฤษภาคม", "เลขานุการเขียนรายงาน"]
KO = ["위원회는 지붕을 논의했다.", "다리를 5월에 수리하기로 했다.", "서기가 회의록을 썼다."]


@pytest.mark.parametrize(
    "passages, query",
    [
        (ZH, "什么时候修理桥？"),
        (["屋根について話した。", "橋は五月に修理される。", "秘書が議事録を作った。"], "橋の修理はいつですか？"),
        (HI, "पुल की मरम्मत कब होगी?"),
        (TH, "จะซ่อมสะพานเมื่อไร"),
        (KO, "다리는 언제 수리합니까?"),
        (["عَنِ السَّقْفِ", "سَيُصْلَحُ الجِسْرُ", "كَتَبَ المَحْضَرَ"], "متى سَيُصْلَحُ الجِسْرُ؟"),
        (["עַל הַגַּג", "הַגֶּשֶׁר יְתֻקַּן", "כָּתַב"], "מָתַי יְתֻקַּן הַגֶּשֶׁר?"),
    ],
)
def test_bm25_finds_the_passage_in_scripts_with_marks_or_without_spaces(passages, query):
    (scores,) = bm25_scores(passages, [query])
    assert scores.argmax() == 1 and scores[1] > 0


def test_the_language_decides_what_bm25_matches(tmp_path):
    passages = ["Und wann wird das repariert, fragte er.", "Die Brücken sind aus Stein.", "Wird das Haus verkauft?"]
    examples = [make_example("d", "Wann wird das mit der Brücke?", Document("d", passages))]
    # the index that is kept for a document has one language
    best = [bm25_rankings(examples, language=language)[0][0][0] for language in ("en", "de", None, "german")]
    assert best == [0, 1, 0, 1]
    corpus = make_corpus(tmp_path, passages)
    for language, passage in (("en", 0), ("de", 1)):  # each language has an index of its own on disk
        index = bm25_index(corpus, language=language)
        assert bm25_search(index, [examples[0].query], 3, language)[0][0][0] == passage


def test_questions_without_a_word_in_a_passage_are_reported_in_one_line():
    said = []
    examples = [
        make_example("1", "yellow"),
        make_example("2", "zebra"),
        make_example("3", ""),
        make_example("4", "gnu"),
    ]
    bm25_rankings(examples, language="de", say=said.append)
    (line,) = said
    assert "no passage for 2 of 4 questions, such as that of '2'" in line and "--language (now german)" in line
    bm25_rankings(examples[:1], say=said.append)
    assert len(said) == 1


def test_a_language_without_effect_or_other_than_the_saved_one_is_refused():
    check_language("de", "bm25", {})
    check_language(None, "lead", {})
    check_language("german", "folder", {"ranking": "hybrid", "language": "de"})
    check_language("en", "folder", {"ranking": "hybrid", "language": None})
    with pytest.raises(UsageError, match="--language de has no effect on passages from lead"):
        check_language("de", "lead", {})
    with pytest.raises(UsageError, match="has no effect on passages from folder"):
        check_language("de", "folder", {"ranking": "dense", "language": None})
    with pytest.raises(UsageError, match="--language fr: the retriever folder was trained with --language german"):
        check_language("fr", "folder", {"ranking": "dense", "language": "de"})


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
