"""Drafts, the summaries that a hop writes and the next one searches with: for training, and without a summarizer.

A retriever that serves every hop is trained on queries alone and on queries with a draft. Drafts are made of the
references, or they are what `retrieve_and_summarize.py` wrote, with a summarizer or by extracting sentences.
"""

from collections.abc import Callable, Sequence

import numpy as np

from utils.data.examples import Example
from utils.data.passages import split_sentences

SHORTEST_SENTENCE = 4  # words; turns of a meeting such as "Yeah . OK ." are no draft


def reference_draft(summaries: Sequence[str], rng: np.random.Generator) -> str:
    """A draft as an early hop might write it: about half of a reference's sentences, less up to half of their words."""
    sentences = split_sentences(summaries[rng.integers(len(summaries))])
    kept = rng.random(len(sentences)) < 0.5
    kept[rng.integers(len(sentences))] = True
    words = " ".join(sentence for sentence, keep in zip(sentences, kept, strict=True) if keep).split()
    share = rng.uniform(0, 0.5)
    return " ".join(word for word, lot in zip(words, rng.random(len(words)), strict=True) if lot >= share)


def extract_drafts(
    examples: Sequence[Example],
    read: Sequence[Sequence[int]],
    encode: Callable[[list[str], str], np.ndarray],
    max_words: int,
) -> list[str]:
    """A draft for each example without a summarizer: the sentences of the passages `read` that are nearest its query.

    Sentences are taken from the nearest on until they have `max_words` words, and stand in the document's order.
    `encode(texts, kind)` is a retriever's, kind being "query" or "passage", and may be one trained on sentences.
    """
    sentences = [
        list(dict.fromkeys(
            sentence for passage in sorted(passages) for sentence in split_sentences(example.document.passages[passage])
            if len(sentence.split()) >= SHORTEST_SENTENCE
        ))
        for example, passages in zip(examples, read, strict=True)
    ]  # fmt: skip
    texts = list(dict.fromkeys(sentence for group in sentences for sentence in group))
    row = {text: number for number, text in enumerate(texts)}
    vectors = encode(texts, "passage") if texts else np.empty((0, 1))
    queries = encode([example.query for example in examples], "query")
    drafts = []
    for group, query in zip(sentences, queries, strict=True):
        if not group:
            drafts.append("")
            continue
        nearest = np.argsort(-(vectors[[row[text] for text in group]] @ query), kind="stable")
        lengths = np.array([len(group[number].split()) for number in nearest])
        fits = np.cumsum(lengths) <= max_words
        fits[0] = True  # one at least
        drafts.append(" ".join(group[number] for number in sorted(nearest[fits])))
    return drafts
