"""Corpus search as a whole: fusing BM25 and dense search, and two processes."""

import json

import pytest
from conftest import ROOT, launch
from retrieval_cases import Encoder, encode_all, make_corpus, random_texts

from utils.retrieval.bm25 import bm25_index, bm25_search
from utils.retrieval.exact_search import dense_search
from utils.retrieval.ranking import reciprocal_rank_fusion


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "multistep-retrieve-summarize"


def test_lexical_and_dense_rankings_are_fused_by_rank(tmp_path):
    texts = random_texts(40)
    corpus = make_corpus(tmp_path, texts)
    lexical = bm25_search(bm25_index(corpus), ["bread"], 5)
    dense = dense_search(Encoder()(["bread"]), encode_all(corpus.passages, Encoder(), tmp_path / "v"), 5)
    (fused,) = [reciprocal_rank_fusion(both)[:5] for both in zip(lexical, dense, strict=True)]
    assert fused[0][0] in (lexical[0][0][0], dense[0][0][0]) and len(fused) == 5


TWO_PROCESSES = """
import json, sys
sys.path.insert(0, {root!r})
import numpy as np
from accelerate import Accelerator
from utils.retrieval import bm25
from utils.retrieval.bm25 import bm25_index, bm25_search
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
found = {{"calls": calls, "builds": len(builds), "lexical": lexical, "dense": dense, "dimension": vectors.dimension}}
with open(f"{{folder}}/{{rank}}.json", "w") as file:
    json.dump(found, file)
accelerator.end_training()
"""


def test_two_processes_build_once_encode_together_and_find_the_same(tmp_path):
    make_corpus(tmp_path, random_texts(40))
    (tmp_path / "run.py").write_text(TWO_PROCESSES.format(root=str(ROOT), folder=str(tmp_path)))
    result = launch(tmp_path / "run.py", processes=2)
    assert result.returncode == 0, result.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["calls"] == second["calls"] == [16, 16, 8, 16]  # the second time the damaged shard only
    assert first.pop("builds") + second.pop("builds") == 1
    assert first == second and first["dimension"] == 2
    assert [len(ranking) for ranking in first["dense"] + first["lexical"]] == [5, 5]
