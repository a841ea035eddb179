"""Splits documents into passages and texts into sentences, and merges short passages.

A word is a run of characters between white space or, in a script without spaces, a letter (see `split_words`).
"""

import itertools
import re
from collections.abc import Iterator, Sequence

from utils.data.words import FULL_STOPS, count_words, has_unspaced, split_words

_STOPS = f".!?…{FULL_STOPS}．।॥؟۔།။។։።፧"
_CLOSERS = "\"'”’»)]}"
_CLOSERS_ELSEWHERE = "“‘«‹›"  # after a stop, as in „Ja.“ and »Ja.«; in other languages they open
_OPENERS = "\"'“‘«([{"
# The end of a Chinese or Japanese sentence that `_ends_sentence` misses: no white space follows its stop and closing
# marks, or one of these marks is full-width. Burmese and Khmer stops likewise. Where a pause follows, the
# sentence goes on.
_PAUSES = ",;:，、；：､"  # where a sentence that is too long is cut, if its script has no spaces
_FULL_WIDTH_END = re.compile(
    f"(?:[{FULL_STOPS}။។]|(?<![0-9A-Za-z０-９Ａ-Ｚａ-ｚ])．)[{_STOPS}]*+[{re.escape(_CLOSERS)}」』）｣]*+(?![{_PAUSES}])(?:(?=\\S)|(?<=[」』）｣]))"
)
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
    pieces: list[str] = []  # the current passage; each but the first begins with the white space before it, if any
    filled = 0  # words in the current passage
    any_case = text.islower()  # in a text without capitals a sentence may begin with a small letter
    for line in text.splitlines():
        sentences = list(_sentences(line, any_case))
        words = sum(map(len, sentences))
        starts_line = True
        keep_whole = words <= passage_words < filled + words and 2 * filled >= passage_words
        for part in itertools.chain.from_iterable(_parts(sentence, passage_words) for sentence in sentences):
            if filled + len(part) > passage_words or keep_whole:
                passages.append("".join(pieces))
                pieces, filled, keep_whole = [], 0, False
            piece = ("\n" if starts_line else "") + "".join(part)
            pieces.append(piece if pieces else piece.lstrip())
            filled += len(part)
            starts_line = False
    if pieces:
        passages.append("".join(pieces))
    return passages


def split_sentences(text: str) -> list[str]:
    """The sentences of a text; a line end always ends a sentence, and two sentences stay together in doubt.

    A full-width stop ends a sentence without white space after it, because Chinese and Japanese have none there.
    """
    any_case = text.islower()
    return ["".join(sentence).strip() for line in text.splitlines() for sentence in _sentences(line, any_case)]


def _sentences(line: str, any_case: bool) -> Iterator[list[str]]:
    """The sentences of one line, as lists of words; a word after white space begins with a space."""
    is_unspaced = has_unspaced(line)
    segments = [line] if line.isascii() else _FULL_WIDTH_END.sub(r"\g<0>\n", line).split("\n")
    for number, segment in enumerate(segments):
        words, start = segment.split(), 0
        space = " " if number and segment[:1].isspace() else ""
        for end in range(1, len(words) + 1):
            if end == len(words) or _ends_sentence(words, start, end - 1, any_case):
                sentence = [" " + word for word in words[start:end]]
                if is_unspaced:
                    sentence = [word for run in sentence for word in _words_of(run)]
                sentence[0] = space + sentence[0][1:]
                yield sentence
                start, space = end, " "


def _words_of(run: str) -> list[str]:
    """The words of a run between white space, which begins with a space; the first of them keeps it."""
    first, *others = split_words(run)
    return [" " + first, *others]


def _parts(sentence: list[str], most: int) -> Iterator[list[str]]:
    """Parts of at most `most` words, cut at white space or a pause, if there is one in the second half of the part."""
    start = 0
    while len(sentence) - start > most:
        places = range(start + most, start + most // 2, -1)
        good = (place for place in places if sentence[place][0] == " " or sentence[place - 1][-1] in _PAUSES)
        end = next(good, start + most)
        yield sentence[start:end]
        start = end
    yield sentence[start:]


def _ends_sentence(words: list[str], start: int, last: int, any_case: bool) -> bool:
    """Whether a sentence that begins at word `start` ends after word `last`, which is not the last of the line."""
    following = words[last + 1]
    if all(character in "'”’»)]}" for character in following):
        return False  # in tokenized text a closing mark is a word of its own (a straight " may also open)
    while last > start and all(character in _CLOSERS for character in words[last]):
        last -= 1
    core = words[last].rstrip(_CLOSERS + _CLOSERS_ELSEWHERE).replace("．", ".")
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
        fits = count_words(passage) <= passage_words
        for part in [passage] if fits else split_document(passage, passage_words):
            words = count_words(part)
            if filled + words > passage_words:
                chunks.append([])
                filled = 0
            chunks[-1].append(part)
            filled += words
            placed[-1][len(chunks) - 1] = words
    return ["\n".join(chunk) for chunk in chunks], placed
