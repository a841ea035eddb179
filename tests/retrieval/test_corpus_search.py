"""Corpus search as a whole: fusing BM25 and dense search, and two processes."""

import json

import numpy as np
import pytest
from accelerate import Accelerator
from conftest import ROOT, launch
from retrieval_cases import Encoder, make_corpus, make_example, random_texts

from utils.data.examples import Document
from utils.retrieval.bm25 import bm25_scores
from utils.retrieval.corpus_search import CorpusSearch
from utils.retrieval.dense import retriever_rankings
from utils.retrieval.ranking import fuse_hops
from utils.retrieval.two_hops import search_hops


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multistep-retrieve-summarize"


@pytest.fixture
def search(tmp_path):
    return CorpusSearch(make_corpus(tmp_path, random_texts(40)), folder=tmp_path / "v", weights_key=lambda: "k",
                        index="flat", language=None, depth=8, alone=False, trained_in=None,
                        accelerator=Accelerator(), say=print)  # fmt: skip


def encode(texts, kind):
    return Encoder()(texts)


QUERIES = ["bread", "the running river", "nothing of it"]  # the last has no word of the corpus


@pytest.mark.parametrize("weight", [0.0, 0.5, 3.0])
def test_a_corpus_is_ranked_as_a_document_of_the_same_passages_if_all_are_candidates(search, weight):
    settings = {"ranking": "hybrid", "bm25_weight": weight}
    texts = list(search.corpus.passages)
    of_corpus, of_document = (
        [make_example(query=query, document=document) for query in QUERIES]
        for document in (search.corpus, Document("d", texts))
    )
    found = search.retriever_rankings(of_corpus, encode, settings, top_k=40)
    expected = retriever_rankings(of_document, encode, settings, top_k=40)
    for ours, theirs in zip(found, expected, strict=True):
        assert [passage for passage, _ in ours] == [passage for passage, _ in theirs]
        assert [score for _, score in ours] == pytest.approx([score for _, score in theirs], abs=1e-5)


def test_candidates_of_either_search_have_the_exact_scores_of_both(search, monkeypatch):
    monkeypatch.setattr("utils.retrieval.corpus_search.DEPTH", 6)
    texts = list(search.corpus.passages)
    examples = [make_example(query=query, document=search.corpus) for query in QUERIES]
    found = search.retriever_rankings(examples, encode, {"ranking": "hybrid", "bm25_weight": 0.5}, top_k=5)
    dense, lexical = Encoder()(QUERIES) @ Encoder()(texts).T, bm25_scores(texts, QUERIES)
    for ranking, of_dense, of_bm25 in zip(found, dense, lexical, strict=True):
        by_bm25 = [passage for passage in np.argsort(-of_bm25, kind="stable")[:6] if of_bm25[passage]]
        candidates = sorted({*np.argsort(-of_dense)[:6], *by_bm25})
        assert len(candidates) > 6 or not of_bm25.any()
        a, b = (
            (scores - scores.mean()) / (scores.std() or 1) for scores in (of_dense[candidates], of_bm25[candidates])
        )
        expected = sorted(zip(a + 0.5 * b, candidates, strict=True), reverse=True)[:5]
        assert [passage for passage, _ in ranking] == [passage for _, passage in expected]
        assert [score for _, score in ranking] == pytest.approx([score for score, _ in expected], abs=1e-5)


def test_passages_are_encoded_again_only_after_the_encoder_or_the_code_has_changed(search, monkeypatch):
    times = []

    def prepare():
        times.clear()
        search.prepare(lambda texts, kind: times.append(kind) or Encoder()(texts))
        return len(times)

    assert (prepare(), prepare()) == (1, 0)
    search.weights_key = lambda: "trained"
    assert (prepare(), prepare()) == (1, 0)
    monkeypatch.setattr("utils.retrieval.corpus_search.code_key", lambda: "edited")
    assert (prepare(), prepare()) == (1, 0)


def test_a_process_that_searches_alone_asks_no_other_and_encodes_nothing_again(search):
    examples = [make_example(query=query, document=search.corpus) for query in QUERIES]
    together = search.dense_rankings(examples, encode)
    search.alone, search.accelerator, kinds = True, None, []

    def encode_alone(texts, kind):
        kinds.append(kind)
        return Encoder()(texts)

    assert search.dense_rankings(examples, encode_alone) == together and kinds == ["query"]
    assert [len(ranking) for ranking in together] == [8] * 3


def test_two_hops_over_a_corpus_fuse_its_rankings_and_hold_no_vectors(search):
    kinds = []

    def counted(texts, kind):
        kinds.append((kind, len(texts)))
        return Encoder()(texts)

    examples = [make_example(query=query, document=search.corpus) for query in QUERIES]
    settings = {"ranking": "hybrid", "bm25_weight": 0.5, "hop_weight": 0.6}
    found = list(search_hops(search, counted, settings, examples, lambda block, read, first: ["wheat", "", "bread"]))
    assert kinds == [("passage", 40), ("query", 3), ("query", 3)]
    assert search.remember(counted) is counted
    one = search.retriever_rankings(examples, encode, settings)
    two = search.retriever_rankings(examples, encode, settings, ["bread wheat", QUERIES[1], f"{QUERIES[2]} bread"])
    for hops, *rankings in zip(found, one, two, strict=True):
        assert hops[0].retrieved == rankings[0] and hops[0].read == [passage for passage, _ in rankings[0][:5]]
        assert hops[1].retrieved == fuse_hops(rankings, 0.6)[:8]


def test_many_examples_have_larger_blocks_and_few_have_enough_for_all_processes(search):
    for count, size, blocks in ((187, 32, 6), (20_000, 32, 65), (100_000, 32, 196), (7, 32, 1)):
        numbers = search.blocks(range(count), size)
        assert len(numbers) == blocks and [n for block in numbers for n in block] == list(range(count))


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {root!r})
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from accelerate import Accelerator
from utils.retrieval import bm25, corpus_search
from utils.retrieval.bm25 import bm25_index, bm25_search
from utils.retrieval.corpus_search import CorpusSearch
from utils.retrieval.exact_search import dense_search
from utils.retrieval.vectors import encode_corpus
from utils.data.corpus import load_corpus

accelerator, folder = Accelerator(), {folder!r}
rank, calls, builds, build = accelerator.process_index, [], [], bm25._build_index
bm25._build_index = lambda *args: builds.append(1) or build(*args)

def encode(texts):
    calls.append(len(texts))
    return np.array([[len(text), text.count("e")] for text in texts], dtype=np.float32)

corpus = load_corpus(folder + "/corpus.jsonl")
lexical = bm25_search(bm25_index(corpus), ["bread"], 5)
settings = {{"key": "k", "accelerator": accelerator, "shard_size": 16}}
encode_corpus(corpus.passages, encode, folder + "/v", **settings)
accelerator.wait_for_everyone()
if rank == 0:
    open(folder + "/v/00000001.npy", "wb").close()
accelerator.wait_for_everyone()
vectors = encode_corpus(corpus.passages, encode, folder + "/v", **settings)
dense = dense_search(np.ones((1, 2)), vectors, 5)

# search: each process in its own share of the vectors
noted_calls, opened, open_shard, search_exactly = calls[:], set(), np.lib.format.open_memmap, corpus_search.dense_search

def search_noted(*arguments, **options):
    np.lib.format.open_memmap = lambda path, mode: opened.add(path.name) or open_shard(path, mode=mode)
    try:
        return search_exactly(*arguments, **options)
    finally:
        np.lib.format.open_memmap = open_shard

corpus_search.dense_search = search_noted
corpus_search.encode_corpus = partial(encode_corpus, shard_size=16)
search = CorpusSearch(corpus, folder=Path(folder, "of_search"), weights_key=lambda: "k", index="flat", language=None,
                      depth=8, alone=False, trained_in=None, accelerator=accelerator, say=print)
examples = [SimpleNamespace(query=query) for query in {queries!r}]
searched = [search.dense_rankings(examples, lambda texts, kind: encode(texts)),
            search.retriever_rankings(examples, lambda texts, kind: encode(texts), {settings!r})]
found = {{"calls": noted_calls, "builds": len(builds), "lexical": lexical, "dense": dense,
         "dimension": vectors.dimension, "searched": searched, "opened": sorted(opened)}}
with open(f"{{folder}}/{{rank}}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()
"""


def encode_letters(texts, kind):
    return np.array([[len(text), text.count("e")] for text in texts], dtype=np.float32)


def test_two_processes_build_once_encode_together_and_find_in_their_shares_what_one_process_finds(tmp_path, search):
    settings = {"ranking": "hybrid", "bm25_weight": 0.5}
    text = TWO_PROCESSES.format(root=str(ROOT), folder=str(tmp_path), queries=QUERIES, settings=settings)
    (tmp_path / "run.py").write_text(text)
    result = launch(tmp_path / "run.py", processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["calls"] == second["calls"] == [16, 16, 8, 16]  # the second time the damaged shard only
    assert first.pop("builds") + second.pop("builds") == 1
    # of three files; the first process also reads what BM25 finds
    assert [first.pop("opened"), second.pop("opened")] == [["00000000.npy", "00000002.npy"], ["00000001.npy"]]
    assert first == second and first["dimension"] == 2
    examples = [make_example(query=query, document=search.corpus) for query in QUERIES]
    one = [
        search.dense_rankings(examples, encode_letters),
        search.retriever_rankings(examples, encode_letters, settings),
    ]
    assert first["searched"] == json.loads(json.dumps(one))
    assert [len(ranking) for ranking in first["dense"] + first["lexical"]] == [5, 5]
