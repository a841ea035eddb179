"""Drafts for training, and drafts without a summarizer.

A hop writes a draft, and the next hop searches with it. The retriever is therefore trained on queries alone and on
queries with a draft. These drafts are imitations, made from the references, or come from a file that
`retrieve_and_summarize.py` wrote.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from utils.data.examples import Example
from utils.data.passages import split_document, split_sentences
from utils.data.words import MARKS, UNSPACED, count_words, join_sentences, rouge_words, split_words
from utils.tables import values

READ = 5  # passages that an imitated draft is written from
WORD = re.compile(f"(\\s*)([{UNSPACED}][{MARKS}]*|[^\\s{UNSPACED}]+)")  # and the space before it
MIN_SENTENCE_WORDS = 4  # a short turn of a meeting, such as "Yeah . OK .", is of no use in a draft


def imitate_draft(reference: str, read: Iterable[str], invented: str) -> str:
    """Imitates the draft of a summarizer that read the passages `read`: it knows their words and invents the rest.

    Keeps the words of the reference that are in `read`. In place of each other word stands the word at its place in
    `invented`, the reference of another example, which is repeated if it is shorter.
    """
    known = {word for text in read for word in rouge_words(text)}
    others = itertools.cycle([word for _, word in WORD.findall(invented)] or [""])
    draft = ""
    for (space, word), other in zip(WORD.findall(reference), others, strict=False):
        if word := word if known.issuperset(rouge_words(word)) else other:
            draft += space + word
    return draft


class Imitations:
    """Imitates a draft for each of some examples, as written from the passages that it read; "" without a reference."""

    def __init__(self, examples: Sequence[Example], seed: int):
        rng, self.summaries = np.random.default_rng(seed), values(examples, "summaries")
        others, count = rng.permutation(len(examples)), len(examples)
        self.others = [(i + 1) % count if other == i else other for i, other in enumerate(others)]
        self.own = [rng.integers(len(of_example)) if of_example else 0 for of_example in self.summaries]

    def __call__(self, examples: Sequence[Example], read: Sequence[Sequence[int]], first: int = 0) -> list[str]:
        """`examples` are those from number `first` on."""
        drafts = []
        for number, (example, passages) in enumerate(zip(examples, read, strict=True), first):
            texts = [example.document.passages[passage] for passage in passages]
            reference = example.summaries[self.own[number]] if example.summaries else ""
            other = self.summaries[self.others[number]] if self.others[number] != number else []
            drafts.append(imitate_draft(reference, texts, (other or [""])[0]))
        return drafts


def imitations(examples: Sequence[Example], args) -> Imitations | None:
    """What imitates the drafts of a split; None if queries train without drafts, or no example has a reference."""
    return Imitations(examples, args.seed) if args.draft_share and any(values(examples, "summaries")) else None


def without_last_word(draft: str) -> str:
    """Cuts the last word off a draft, with the space before it."""
    draft = draft.rstrip()
    head, _, last = draft.rpartition(" ")
    words = split_words(last)
    return draft.removesuffix(words[-1]) if len(words) > 1 else head


def first_drafts(drafts: Sequence[list], examples: Sequence[Example], read: Sequence, first: int = 0) -> list[str]:
    """The first draft of each example in `drafts` (see `read_drafts`), or "", whatever was read."""
    return [of_example[0][0] if of_example else "" for of_example in drafts[first : first + len(examples)]]


def extract_drafts(
    examples: Sequence[Example],
    read: Sequence[Sequence[int]],
    encode: Callable[[list[str], str], np.ndarray],
    max_words: int,
) -> list[str]:
    """Extracts a draft for each example: the sentences nearest to its query, from its passages in `read`.

    The nearest sentences are taken until `max_words` is reached, and put in document order. A longer one is cut.
    `encode(texts, kind)` is a retriever's, with kind "query" or "passage"; the retriever may be trained on sentences.
    """
    sentences = []
    for example, passages in zip(examples, read, strict=True):
        texts = (split_document(sentence, max_words) for passage in sorted(passages)
                 for sentence in split_sentences(example.document.passages[passage]))  # fmt: skip
        of_example = list(dict.fromkeys(itertools.chain.from_iterable(texts)))
        sentences.append([text for text in of_example if count_words(text) >= MIN_SENTENCE_WORDS] or of_example)
    texts = list(dict.fromkeys(sentence for group in sentences for sentence in group))
    vectors = dict(zip(texts, encode(texts, "passage") if texts else (), strict=True))
    queries = encode([example.query for example in examples], "query")
    drafts = []
    for group, query in zip(sentences, queries, strict=True):
        if not group:
            drafts.append("")
            continue
        nearest = np.argsort(-(np.stack([vectors[text] for text in group]) @ query), kind="stable")
        fits = np.cumsum([count_words(group[number]) for number in nearest]) <= max_words
        fits[0] = True
        drafts.append(join_sentences(group[number] for number in sorted(nearest[fits])))
    return drafts
