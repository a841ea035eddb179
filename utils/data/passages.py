"""Splitting a document into passages, a text into sentences, and merging passages into longer ones.

*Words* are runs of characters between white space, everywhere.
"""

from collections.abc import Iterator, Sequence

_STOPS = ".!?…。！？।؟۔"
_CLOSERS = "\"'”’»)]}"
_OPENERS = "\"'“‘«([{"
# Followed by a name, hence never the end of a sentence ...
_TITLES = frozenset(
    "mr mrs ms messrs mme dr prof st mt sen rep gov gen col maj sgt capt lt cmdr rev hon pres vs cf viz".split()
)
# ... or by a number ("No. 5", "Fig. 2", "Jan. 3"), and otherwise the end of one ("No. He left.")
_NUMBERED = frozenset(
    "no nos fig figs eq sec sect ch vol art p pp ca approx jan feb mar apr jun jul aug sep sept oct nov dec".split()
)


def split_document(text: str, passage_words: int) -> list[str]:
    """Splits a text into passages of at most `passage_words` words, on sentence and line ends; no word is lost.

    A line (a turn, a paragraph) that does not fit into what is left of a passage starts a new one if the passage is
    half full already and the line fits there whole. Only a sentence longer than a passage is cut between words.
    """
    passages: list[str] = []
    pieces: list[str] = []  # of the passage being filled, each after the first with its separator in front
    filled = 0
    any_case = text.islower()  # without capitals, a small letter after a stop may well begin a sentence
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
    """The sentences of a text, none of which goes over the end of a line; in doubt, two stay together."""
    any_case = text.islower()
    return [" ".join(sentence) for line in text.splitlines() for sentence in _sentences(line.split(), any_case)]


def _sentences(words: list[str], any_case: bool) -> Iterator[list[str]]:
    """The sentences of one line as lists of words; in doubt, two sentences stay together."""
    start = 0
    for end in range(1, len(words)):
        if _ends_sentence(words, start, end - 1, any_case):
            yield words[start:end]
            start = end
    if words:
        yield words[start:]


def _ends_sentence(words: list[str], start: int, last: int, any_case: bool) -> bool:
    """Whether a sentence that began at word `start` ends with word `last`, which another word follows."""
    following = words[last + 1]
    if all(character in "'”’»)]}" for character in following):
        return False  # tokenized text: the closing quote or bracket stands alone (a straight " may open as well)
    while last > start and all(character in _CLOSERS for character in words[last]):
        last -= 1
    core = words[last].rstrip(_CLOSERS)
    stem = core.rstrip(_STOPS)
    stop = core[len(stem) :]
    if not stop:
        return False
    if not stem and stop.strip("…") and stop.count(".") < 2:
        return True  # a stop that stands alone ("OK , we 're on ."), other than dots ("well ... you know")
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
    """Merges consecutive passages, one a line, into chunks of at most `passage_words` words; splits longer ones.

    Returns the chunks and, for each given passage, how many of its words went into which chunk.
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
