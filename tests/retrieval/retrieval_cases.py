"""Documents, examples, corpora and an encoder for the tests of this room."""

import random

import numpy as np
from accelerate import Accelerator

from utils.data.corpus import load_corpus
from utils.data.examples import Document, Example
from utils.files import write_jsonl
from utils.retrieval.vectors import encode_corpus

COLOURS = Document(
    "colours", ["The remote is yellow .", "We talked about budgets .", "Yellow again , a yellow case .", "Bye ."]
)
MONEY = Document("money", ["Budgets grew .", "Nobody spoke of paint .", "The budget of the remotes ."])


def make_example(id="e", query="", document=COLOURS, summaries=("a yellow case",), evidence=None):
    return Example(
        id=id,
        query=query,
        document=document,
        summaries=list(summaries),
        evidence=evidence,
        evidence_words=None,
        retrieved=None,
    )


def random_text(generator, words, vocabulary="ab bc cd de running runs runner fg gh ij studies study"):
    return " ".join(generator.choices(vocabulary.split(), k=words))


WORDS = "mill river bread runner running studies wheat flour stone water wheel baker".split()
PASSAGES = [f"passage {number}" for number in range(60)]


def make_corpus(tmp_path, texts):
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": f"d{n}", "text": text} for n, text in enumerate(texts)])
    return load_corpus(tmp_path / "corpus.jsonl")


def random_texts(count, longest=8):
    generator = random.Random(5)
    return [" ".join(generator.choices(WORDS, k=generator.randint(1, longest))) for _ in range(count)]


class Encoder:
    """Vectors that depend on the text alone; counts the calls, and fails in the `fails_at`-th."""

    def __init__(self, dimension=6, fails_at=None):
        self.dimension, self.fails_at, self.calls = dimension, fails_at, []

    def __call__(self, texts):
        if len(self.calls) == self.fails_at:
            raise RuntimeError("killed")
        self.calls.append(texts)
        rows = [np.random.default_rng(list(text.encode())).normal(size=self.dimension) for text in texts]
        return np.array(rows, dtype=np.float32)


def encode_all(passages, encoder, folder, key="k", **options):
    options = {"shard_size": 16} | options
    return encode_corpus(passages, encoder, folder, key=key, accelerator=Accelerator(), **options)


def all_vectors(vectors):
    return np.concatenate([shard for _, shard in vectors.shards()])
