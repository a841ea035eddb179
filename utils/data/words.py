"""Words of a text, of any script: as BM25 counts them and as ROUGE counts them.

This module imports fast; `rouge_score` and `evaluate` take seconds.
"""

import functools
import re
import unicodedata
from collections.abc import Sequence

import bm25s
import Stemmer

STOPWORDS = "en"  # the name of a list of bm25s


def search_words(texts: Sequence[str]) -> list[list[str]]:
    """The words of each text for BM25: two or more characters, in lower case, stemmed, without stopwords."""
    # a new stemmer for each call: it costs nothing, and threads must not share one
    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(list(texts), stopwords=STOPWORDS, stemmer=stemmer, return_ids=False, show_progress=False)


# Scripts without spaces (kana, Han): each character is a word.
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
ROUGE_WORD = re.compile(f"[{UNSPACED}]|[^\\W_{UNSPACED}]+")


@functools.lru_cache(maxsize=2**14)
def rouge_words(text: str) -> tuple[str, ...]:
    """The words of a text for ROUGE: in lower case, stemmed.

    For ASCII text they equal those of rouge-score with `use_stemmer=True`. rouge-score drops every character but a-z
    and 0-9; here letters and digits of all scripts count.
    """
    words = ROUGE_WORD.findall(unicodedata.normalize("NFC", text.lower()))
    return tuple(_porter_stem(word) if len(word) > 3 else word for word in words)


@functools.lru_cache(maxsize=2**17)
def _porter_stem(word: str) -> str:
    return _porter_stemmer().stem(word)


@functools.cache
def _porter_stemmer():
    from nltk.stem.porter import PorterStemmer  # here, because importing nltk takes more than a second

    return PorterStemmer()
