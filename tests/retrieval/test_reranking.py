"""A second look at the best passages: what is scored, and how the scores are added."""

import numpy as np
import pytest

from utils.data.examples import Corpus, Document, Example
from utils.retrieval.ranking import rank
from utils.retrieval.reranking import rank_passages, remember_scores, rerank

PASSAGES = [f"passage {number}" for number in range(12)]
SETTINGS = {"rerank_top_k": 4, "rerank_weight": 1.0}


def example(query="q", document=None):
    return Example("a", query, document or Document("d", PASSAGES), ["s"], None, None, None)


def preferring(*favourites, log=None):
    """Scores pairs: the later in `favourites` a passage stands, the higher; others -1."""

    def score(pairs):
        if log is not None:
            log.append(pairs)
        texts = [PASSAGES[number] for number in favourites]
        return np.array([texts.index(text) if text in texts else -1 for _, text in pairs], dtype=np.float32)

    return score


RANKING = rank(np.array([9.0, 8.5, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5, 0.0]))


def numbers(ranking):
    return [passage for passage, _ in ranking]


def test_only_the_best_passages_are_scored_with_the_search_text():
    log = []
    rerank([example(), example("r")], [RANKING, RANKING[::-1]], preferring(log=log), SETTINGS, ["q draft", "r draft"])
    assert log == [[("q draft", PASSAGES[i]) for i in range(4)] + [("r draft", PASSAGES[i]) for i in (11, 10, 9, 8)]]


def test_scores_are_added_once_both_are_standardized():
    settings = SETTINGS | {"rerank_top_k": 12}
    score = preferring(3, 2, 1)
    found = dict(rerank([example()], [RANKING], score, settings)[0])
    own = np.array([score for _, score in sorted(RANKING)])
    added = score([("q", text) for text in PASSAGES])
    for weight in (1.0, 2.5):
        found = dict(rerank([example()], [RANKING], score, settings | {"rerank_weight": weight})[0])
        expected = (own - own.mean()) / own.std() + weight * (added - added.mean()) / added.std()
        np.testing.assert_allclose([found[i] for i in range(12)], expected, rtol=1e-6)


@pytest.mark.parametrize(("weight", "first"), [(0.0, [0, 1, 2, 3]), (100.0, [2, 1, 3, 0])])
def test_the_weight_decides_between_search_and_reranker(weight, first):
    ranking = rerank([example()], [RANKING], preferring(0, 3, 1, 2), SETTINGS | {"rerank_weight": weight})[0]
    assert numbers(ranking) == first + list(range(4, 12))  # the rest stays behind, in order
    scores = [score for _, score in ranking]
    assert scores == sorted(scores, reverse=True)


def test_scores_are_smoothed_over_neighbours_where_the_search_smooths():
    flat = [(passage, 1.0) for passage in (6, 5, 7, 0, 1, 2, 3, 4, 8, 9, 10, 11)]
    settings = SETTINGS | {"rerank_top_k": 12, "smooth_window": 2, "smooth_decay": 0.5}
    ranking = rerank([example()], [flat], preferring(7), settings)[0]
    # the one that the reranker likes lifts its neighbours; a score fades twice as fast backward
    assert numbers(ranking)[:3] == [7, 8, 6] or numbers(ranking)[:3] == [7, 8, 9]
    scores = dict(ranking)
    assert scores[8] - scores[0] > scores[6] - scores[0] > 0
    assert numbers(rerank([example()], [flat], preferring(7), SETTINGS)[0])[1:3] == [6, 5]  # not smoothed


def test_short_and_empty_rankings_stay_as_they_are():
    calls = []
    assert rerank([example(), example()], [[], [(3, 1.0)]], preferring(3, log=calls), SETTINGS) == [[], [(3, 1.0)]]


def test_a_corpus_is_reranked_too():
    class Texts(list):
        """Reads like a memory-mapped column: a list of numbers gives several texts."""

        def __getitem__(self, place):
            return [list.__getitem__(self, i) for i in place] if isinstance(place, list) else super().__getitem__(place)

    corpus = Corpus("c", type("Column", (), {"__getitem__": lambda self, place: Texts(PASSAGES)[place]})(), PASSAGES)
    ranking = rerank([example(document=corpus)], [RANKING], preferring(0, 3, 1, 2),
                     SETTINGS | {"rerank_weight": 100.0})[0]  # fmt: skip
    assert numbers(ranking)[:4] == [2, 1, 3, 0]


def test_a_search_is_by_bm25_or_the_retriever_and_is_reranked_with_the_search_texts_of_later_hops():
    log, asked = [], []

    class Search:
        def bm25_rankings(self, examples, top_k=None, queries=None):
            asked.append(("bm25", top_k, queries))
            return [RANKING[:top_k] for _ in examples]

        def retriever_rankings(self, examples, encode, settings, queries=None, top_k=None):
            asked.append((settings["ranking"], top_k, queries))
            return [RANKING[:top_k] for _ in examples]

    score, settings = preferring(0, 3, 1, 2, log=log), SETTINGS | {"ranking": "dense", "rerank_weight": 100.0}
    plain = rank_passages(Search(), [example()], None, {}, top_k=5)
    assert plain == [RANKING[:5]]
    reranked = rank_passages(Search(), [example()], encode_nothing, settings, score=score, top_k=5)
    assert numbers(reranked[0]) == [2, 1, 3, 0, 4]
    rank_passages(Search(), [example()], None, settings, ["q and a draft"], score=score)
    # a search that is reranked gives all that it has
    assert asked == [("bm25", 5, None), ("dense", None, None), ("bm25", None, ["q and a draft"])]
    assert [pairs[0][0] for pairs in log] == ["q", "q and a draft"]


def encode_nothing(texts, kind):
    raise AssertionError("a stand-in")


def test_each_pair_is_scored_once():
    log = []
    score = remember_scores(preferring(1, 2, log=log))
    first = score([("q", PASSAGES[1]), ("q", PASSAGES[2]), ("q", PASSAGES[1])])
    assert first.tolist() == [0, 1, 0]
    assert score([("q", PASSAGES[2]), ("r", PASSAGES[2])]).tolist() == [1, 1]
    assert [len(pairs) for pairs in log] == [2, 1]
