"""Drafts for training, and drafts without a summarizer.

A hop writes a draft, and the next hop searches with it. The retriever is therefore trained on queries alone and on
queries with a draft. The drafts come from the references, or from a file that `retrieve_and_summarize.py` wrote.
"""

from collections.abc import Callable, Sequence

import numpy as np

from utils.data.examples import Example
from utils.data.passages import split_sentences

MIN_SENTENCE_WORDS = 4  # a short turn of a meeting, such as "Yeah . OK .", is of no use in a draft


def reference_draft(summaries: Sequence[str], rng: np.random.Generator) -> str:
    """Imitates an early draft: about half the sentences of a random reference, without up to half of their words."""
    sentences = split_sentences(summaries[rng.integers(len(summaries))])
    kept = rng.random(len(sentences)) < 0.5
    kept[rng.integers(len(sentences))] = True
    words = " ".join(sentence for sentence, keep in zip(sentences, kept, strict=True) if keep).split()
    dropped = rng.uniform(0, 0.5)  # share of the words
    return " ".join(word for word, lot in zip(words, rng.random(len(words)), strict=True) if lot >= dropped)


def extract_drafts(
    examples: Sequence[Example],
    read: Sequence[Sequence[int]],
    encode: Callable[[list[str], str], np.ndarray],
    max_words: int,
) -> list[str]:
    """Extracts a draft for each example: the sentences nearest to its query, from its passages in `read`.

    The nearest sentences are taken until `max_words` is reached (always at least one), and put in document order.
    `encode(texts, kind)` is a retriever's, with kind "query" or "passage"; the retriever may be trained on sentences.
    """
    sentences = [
        list(dict.fromkeys(
            sentence for passage in sorted(passages) for sentence in split_sentences(example.document.passages[passage])
            if len(sentence.split()) >= MIN_SENTENCE_WORDS
        ))
        for example, passages in zip(examples, read, strict=True)
    ]  # fmt: skip
    texts = list(dict.fromkeys(sentence for group in sentences for sentence in group))
    vectors = dict(zip(texts, encode(texts, "passage") if texts else (), strict=True))
    queries = encode([example.query for example in examples], "query")
    drafts = []
    for group, query in zip(sentences, queries, strict=True):
        if not group:
            drafts.append("")
            continue
        nearest = np.argsort(-(np.stack([vectors[text] for text in group]) @ query), kind="stable")
        fits = np.cumsum([len(group[number].split()) for number in nearest]) <= max_words
        fits[0] = True
        drafts.append(" ".join(group[number] for number in sorted(nearest[fits])))
    return drafts
