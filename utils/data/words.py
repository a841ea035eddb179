"""Words of a text, of any script: as word budgets count them, as BM25 searches them and as ROUGE compares them.

In a script without spaces between words (Han, kana, Thai, Lao, Khmer, Myanmar and others) each letter counts as a word,
with its combining marks. BM25 searches pairs of neighbouring letters instead, as Lucene's CJKAnalyzer does, also of
Hangul. In all other scripts a word is a run of letters and digits or, in a budget, a run between white space.

This module imports fast; `bm25s`, `rouge_score` and `nltk` take longer.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from utils.errors import UsageError

# ---- characters, written as in the [...] of a regular expression


def _ranges(codes: Iterable[int]) -> str:
    """Ranges of characters, from ascending code points."""
    runs = itertools.groupby(enumerate(codes), key=lambda entry: entry[1] - entry[0])
    ends = [[code for _, code in run] for _, run in runs]
    return "".join(f"{chr(run[0])}-{chr(run[-1])}" for run in ends)


# Han, kana, Bopomofo and Yi
IDEOGRAPHS = (
    "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua000-\ua48c\uf900-\ufaff\uff66-\uff9d\U0001b000-\U0001b16f\U00020000-\U0003ffff"
)
# Thai, Lao, Tibetan, Myanmar, Khmer, Tai Le, New Tai Lue, Tai Tham and Tai Viet; of these the letters only
_BLOCKS = ((0x0E00, 0x10A0), (0x1780, 0x1800), (0x1950, 0x19E0), (0x1A20, 0x1AB0), (0xA9E0, 0xAA00), (0xAA60, 0xAAE0))
UNSPACED = IDEOGRAPHS + _ranges(code for block in _BLOCKS for code in range(*block) if chr(code).isalpha())
HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7af"
# combining marks: vowel signs, accents, points; without the variation selectors, which change no letter
MARKS = _ranges(
    code
    for code in range(0x300, 0x1F000)
    if unicodedata.category(chr(code)) in ("Mn", "Mc") and not 0xFE00 <= code <= 0xFE0F
)
FULL_STOPS = "。！？｡"  # they end a sentence without white space after them
OPENERS = "(\\[{«‘“„‹〈《「『【〔〖〘〝（［｛｢"

_find_unspaced = re.compile(f"[{UNSPACED}]").search


def has_unspaced(text: str) -> bool:
    """Whether a text has a letter of a script without spaces."""
    return not text.isascii() and _find_unspaced(text) is not None


# ---- words as budgets count them

# a letter of an unspaced script with the opening marks before it, or a run of other characters; then punctuation
_UNIT = re.compile(
    f"(?:[{OPENERS}]*[{UNSPACED}]|(?:(?![{OPENERS}]+[{UNSPACED}])[^\\s{UNSPACED}{FULL_STOPS}])+|[{FULL_STOPS}]+)"
    f"[^\\w\\s{OPENERS}]*"
)


def split_words(text: str) -> list[str]:
    """The words of a text with their punctuation, between white space; a letter of an unspaced script is a word."""
    if not has_unspaced(text):
        return text.split()
    return [word for run in text.split() for word in (_UNIT.findall(run) if has_unspaced(run) else (run,))]


def count_words(text: str) -> int:
    return len(split_words(text))


def join_sentences(sentences: Iterable[str]) -> str:
    """Joins sentences with a space, but without one after a Chinese or Japanese sentence."""
    text = ""
    for sentence in sentences:
        text += ("" if not text or _ENDS_WITHOUT_SPACE.search(text) else " ") + sentence
    return text


_ENDS_WITHOUT_SPACE = re.compile(f"[{IDEOGRAPHS}\u3001-\u303f\uff01-\uff65]\\Z")


# ---- words as BM25 searches them

# Snowball's stemmers by ISO 639 code
LANGUAGES = {
    "ar": "arabic", "hy": "armenian", "eu": "basque", "ca": "catalan", "cs": "czech", "da": "danish", "nl": "dutch",
    "en": "english", "eo": "esperanto", "et": "estonian", "fi": "finnish", "fr": "french", "de": "german",
    "el": "greek", "hi": "hindi", "hu": "hungarian", "id": "indonesian", "ga": "irish", "it": "italian",
    "lt": "lithuanian", "ne": "nepali", "no": "norwegian", "fa": "persian", "pl": "polish", "pt": "portuguese",
    "ro": "romanian", "ru": "russian", "sr": "serbian", "st": "sesotho", "es": "spanish", "sv": "swedish",
    "ta": "tamil", "tr": "turkish", "yi": "yiddish",
}  # fmt: skip
# those of which bm25s has a list of stop words
_WITH_STOPWORDS = frozenset(
    "danish dutch english french german italian norwegian portuguese russian spanish swedish turkish".split()
)


def language_name(language: str | None) -> str:
    """The name of a Snowball language from its name or ISO code, or "none"; None is English.

    Raises UsageError for another language.
    """
    name = "english" if language is None else language.lower()
    name = LANGUAGES.get(name, name)
    if name != "none" and name not in LANGUAGES.values():
        known = ", ".join(f"{code} ({known})" for code, known in LANGUAGES.items())
        raise UsageError(f"--language {language}: there is no stemmer for it; use none, or one of {known}")
    return name


def search_tokenizer(language: str | None = None):
    """A tokenizer of bm25s that gives the words of each text for BM25: in lower case, stemmed, without stop words.

    A word has two or more characters. Where letters of an unspaced script or Hangul stand side by side, each pair of
    neighbours is a word; a single one is a word, and so is a single digit or letter beside it. Full-width forms count
    as the usual ones. `language` is as in `language_name`; "none" has neither a stemmer nor stop words.
    """
    import Stemmer
    from bm25s.tokenization import Tokenizer

    name = language_name(language)
    stemmer = str if name == "none" else Stemmer.Stemmer(name)  # `str` leaves a word as it is
    splitter = _search_split if name != "turkish" else lambda text: _search_split(_turkish_lower(text))
    return Tokenizer(lower=name != "turkish", splitter=splitter, stemmer=stemmer,
                     stopwords=name if name in _WITH_STOPWORDS else None)  # fmt: skip


def _turkish_lower(text: str) -> str:
    """A text in lower case, where I becomes a dotless i."""
    return unicodedata.normalize("NFC", text).replace("I", "ı").replace("İ", "i").lower()


def search_words(texts: Sequence[str], language: str | None = None) -> list[list[str]]:
    """The words of each text for BM25, as `search_tokenizer` gives them."""
    # a new tokenizer for each call: it costs nothing, and threads must not share its stemmer
    tokenizer = search_tokenizer(language)
    return tokenizer.decode(list(tokenizer.streaming_tokenize(texts, allow_empty=False)))


_PAIRED = UNSPACED + HANGUL
_plain_words = re.compile(r"\b\w\w+\b").findall
# within a word: soft hyphens, joiners, marks of direction, variation selectors
_INVISIBLE = "\u00ad\u061c\u200d-\u200f\u2060\ufeff\ufe00-\ufe0f"
_SPECIAL = f"{_PAIRED}{MARKS}\u200c{_INVISIBLE}\uff00-\uffef"
# one range for all characters beyond U+FFFF: this runs over every text
_SPECIAL = re.sub("[\U00010000-\U0010ffff]-?", "", _SPECIAL) + "\U00010000-\U0010ffff"
_is_special = re.compile(f"[{_SPECIAL}]").search
_PIECE = re.compile(f"((?:[{_PAIRED}][{MARKS}]*)+)|[^\\W{_PAIRED}]+(?:[{MARKS}]+[^\\W{_PAIRED}]*)*")
_LETTER = re.compile(f"[{_PAIRED}][{MARKS}]*")


def _search_split(text: str) -> list[str]:
    """The words of a text in lower case."""
    if text.isascii():
        return _plain_words(text)
    text = unicodedata.normalize("NFC", text)  # which takes some letters apart, such as one of Bengali
    if not _is_special(text):
        return _plain_words(text)
    text, words, paired_until = _clean(text), [], -1
    for piece in _PIECE.finditer(text):
        if piece[1]:
            letters = _LETTER.findall(piece[1])
            words += map("".join, itertools.pairwise(letters)) if len(letters) > 1 else letters
            paired_until = piece.end()
        elif len(piece[0]) > 1 or paired_until == piece.start() or _LETTER.match(text, piece.end()):
            words.append(piece[0])
    return words


# a non-joiner between letters separates parts of Persian words
_NO_LETTER = re.compile(f"[{_INVISIBLE}\U000e0100-\U000e01ef]|\u200c(?<=[{MARKS}]\u200c)")
_FULL_WIDTH = re.compile("[\uff00-\uffef]+")


def _clean(text: str) -> str:
    """One spelling of a text in lower case: composed (NFC), with full-width and half-width forms as the usual ones."""
    text = _FULL_WIDTH.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    # lower() makes two characters of the Turkish capital I with a dot
    return _NO_LETTER.sub("", unicodedata.normalize("NFC", text)).replace("i\u0307", "i")


# ---- words as ROUGE compares them

_plain_rouge_words = re.compile(r"[^\W_]+").findall
_ROUGE_WORD = re.compile(f"[{UNSPACED}][{MARKS}]*|[^\\W_{UNSPACED}]+(?:[{MARKS}]+[^\\W_{UNSPACED}]*)*")


@functools.lru_cache(maxsize=2**14)
def rouge_words(text: str) -> tuple[str, ...]:
    """The words of a text for ROUGE: in lower case, stemmed. Each letter of an unspaced script is a word.

    For ASCII text they equal those of rouge-score with `use_stemmer=True`. rouge-score drops every character but a-z
    and 0-9; here letters and digits of all scripts count. The stemmer is Porter's in every language: it changes only
    English endings, and a score does not depend on a flag.
    """
    text = unicodedata.normalize("NFC", text.lower())
    words = _ROUGE_WORD.findall(_clean(text)) if _is_special(text) else _plain_rouge_words(text)
    return tuple(_porter_stem(word) if len(word) > 3 else word for word in words)


@functools.lru_cache(maxsize=2**17)
def _porter_stem(word: str) -> str:
    return _porter_stemmer().stem(word)


@functools.cache
def _porter_stemmer():
    from nltk.stem.porter import PorterStemmer  # here, because importing nltk takes more than a second

    return PorterStemmer()
