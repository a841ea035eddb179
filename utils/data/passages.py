"""Splits documents into passages and texts into sentences, and merges short passages.

In this module a word is a run of characters between white space.
"""

import re
from collections.abc import Iterator, Sequence

_STOPS = ".!?…。！？।؟۔"
_CLOSERS = "\"'”’»)]}"
_OPENERS = "\"'“‘«([{"
# The end of a Chinese or Japanese sentence that `_ends_sentence` misses: no white space follows its stop and closing
# marks, or one of these marks is full-width.
_FULL_WIDTH_END = re.compile(f"[。！？][{_STOPS}]*+[{re.escape(_CLOSERS)}」』）]*+(?:(?=\\S)|(?<=[」』）]))")
# Abbreviations before a name never end a sentence.
_TITLES = frozenset(
    "mr mrs ms messrs mme dr prof st mt sen rep gov gen col maj sgt capt lt cmdr rev hon pres vs cf viz".split()
)
# These end no sentence before a number ("No. 5", "Fig. 2", "Jan. 3") and do otherwise ("No. He left.").
_NUMBERED = frozenset(
    "no nos fig figs eq sec sect ch vol art p pp ca approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)


def split_document(text: str, passage_words: int) -> list[str]:
    """Splits a text into passages of at most `passage_words` words, at sentence and line ends; no word is lost.

    A line (a turn, a paragraph) that does not fit into the current passage starts a new one if the current passage is
    at least half full and the line fits into one passage. A sentence is cut, between words, only if it is longer than
    a passage.
    """
    passages: list[str] = []
    pieces: list[str] = []  # the current passage; every piece but the first begins with its separator
    filled = 0  # words in the current passage
    any_case = text.islower()  # in a text without capitals a sentence may begin with a small letter
    for line in text.splitlines():
        words = line.split()
        separator = "\n"
        keep_whole = len(words) <= passage_words < filled + len(words) and 2 * filled >= passage_words
        for sentence in _sentences(words, any_case):
            for start in range(0, len(sentence), passage_words):
                part = sentence[start : start + passage_words]
                if filled + len(part) > passage_words or keep_whole:
                    passages.append("".join(pieces))
                    pieces, filled, keep_whole = [], 0, False
                pieces.append((separator if pieces else "") + " ".join(part))
                filled += len(part)
                separator = " "
    if pieces:
        passages.append("".join(pieces))
    return passages


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; a line end always ends a sentence, and two sentences stay together in doubt.

    Unlike `split_document`, which keeps words whole, it also splits at a full-width stop inside a word, because Chinese
    and Japanese have no white space between sentences.
    """
    any_case = text.islower()
    lines = _FULL_WIDTH_END.sub(r"\g<0>\n", text).splitlines()
    return [" ".join(sentence) for line in lines for sentence in _sentences(line.split(), any_case)]


def _sentences(words: list[str], any_case: bool) -> Iterator[list[str]]:
    """The sentences of one line, as lists of words."""
    start = 0
    for end in range(1, len(words)):
        if _ends_sentence(words, start, end - 1, any_case):
            yield words[start:end]
            start = end
    if words:
        yield words[start:]


def _ends_sentence(words: list[str], start: int, last: int, any_case: bool) -> bool:
    """Whether a sentence that begins at word `start` ends after word `last`, which is not the last of the line."""
    following = words[last + 1]
    if all(character in "'”’»)]}" for character in following):
        return False  # in tokenized text a closing mark is a word of its own (a straight " may also open)
    while last > start and all(character in _CLOSERS for character in words[last]):
        last -= 1
    core = words[last].rstrip(_CLOSERS)
    stem = core.rstrip(_STOPS)
    stop = core[len(stem) :]
    if not stop:
        return False
    if not stem and stop.strip("…") and stop.count(".") < 2:
        return True  # a stop that is a word of its own ("OK , we 're on ."), but not dots ("well ... you know")
    if not any_case and following.lstrip(_OPENERS)[:1].islower():
        return False  # "Go!" he said
    if stop != ".":
        return True
    stem = stem.lstrip(_OPENERS)
    if last == start and stem.isdigit():
        return False  # "1. Introduction"
    letters = stem.split(".")
    if all(len(letter) == 1 and letter.isalpha() for letter in letters) and (len(letters) > 1 or stem.isupper()):
        return False  # "J.", "U.S.", "e.g."
    return not (stem.lower() in _TITLES or (stem.lower() in _NUMBERED and following[0].isdigit()))


def merge_passages(passages: Sequence[str], passage_words: int) -> tuple[list[str], list[dict[int, int]]]:
    """Merges consecutive passages into chunks of at most `passage_words` words, one passage a line; splits longer ones.

    Returns the chunks and, for each given passage, {chunk number: words of the passage in this chunk}.
    """
    chunks: list[list[str]] = []
    placed: list[dict[int, int]] = []
    filled = passage_words  # so that the first passage opens the first chunk
    for passage in passages:
        placed.append({})
        fits = len(passage.split()) <= passage_words
        for part in [passage] if fits else split_document(passage, passage_words):
            words = len(part.split())
            if filled + words > passage_words:
                chunks.append([])
                filled = 0
            chunks[-1].append(part)
            filled += words
            placed[-1][len(chunks) - 1] = words
    return ["\n".join(chunk) for chunk in chunks], placed
