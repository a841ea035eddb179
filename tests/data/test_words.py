"""Words of any script: in budgets, for BM25 against bm25s, and for ROUGE against rouge-score."""

import random

import bm25s
import pytest
import Stemmer
from rouge_score.tokenizers import DefaultTokenizer

from utils.data.words import (
    LANGUAGES,
    count_words,
    join_sentences,
    language_name,
    rouge_words,
    search_tokenizer,
    search_words,
    split_words,
)
from utils.errors import UsageError

# ---- in budgets


@pytest.mark.parametrize(
    "text, words",
    [
        ("第1次会议，（好）。", "第|1|次|会|议，|（好）。"),
        ("「はい。」 そう", "「は|い。」|そ|う"),
        ("我用BERT-base模型(v2.0)写f(x)", "我|用|BERT-base|模|型|(v2.0)|写|f(x)"),
        ("ที่นี่ มี", "ที่|นี่|มี"),
        ("မြန်မာ", "မြ|န်|မာ"),
        ("好😀 😀😀", "好😀|😀😀"),
        ("葛\U000e0100飾", "葛\U000e0100|飾"),
    ],
)
def test_a_letter_of_a_script_without_spaces_is_a_word_with_its_marks_and_punctuation(text, words):
    assert split_words(text) == words.split("|")
    assert count_words(text) == len(words.split("|"))


@pytest.mark.parametrize(
    "text",
    [
        "It 's (not) f(x) – “so” .",
        "Москва, Ελλάδα!",
        "다리를 5월에 수리한다.",
        "पुल की मरम्मत कब होगी?",
        "كَتَبَ الوَلَدُ",
        "שָׁלוֹם עוֹלָם",
        "",
    ],
)
def test_words_of_scripts_with_spaces_stand_between_them(text):
    assert split_words(text) == text.split()


def test_sentences_are_joined_without_a_space_where_their_script_has_none():
    assert join_sentences(["修好了。", "「はい」", "OK.", "So"]) == "修好了。「はい」OK. So"
    assert join_sentences(["수리했다.", "했다", "มา", "Nice 😀", "yes"]) == "수리했다. 했다 มา Nice 😀 yes"
    assert join_sentences([]) == ""


# ---- for BM25


def test_search_words_of_latin_text_are_those_of_bm25s():
    generator = random.Random(5)
    pieces = "The cafés’ naïve “running” Mr. I a x_y 3.5 10 Straße İ-no Москва Ελλάδα ½ don’t – of\u00a0it .".split(" ")
    texts = [" ".join(generator.choices([piece for piece in pieces if piece != "İ-no"], k=30)) for _ in range(100)]
    texts += ["", "?!", "the of"]
    stemmer = Stemmer.Stemmer("english")
    options = {"stopwords": "en", "stemmer": stemmer, "return_ids": False, "show_progress": False}
    assert search_words(texts) == search_words(texts, "en") == bm25s.tokenize(texts, **options)


@pytest.mark.parametrize(
    "text, words",
    [
        ("第20座桥，在5月。桥", "第 20 座桥 在 5 月 桥"),  # single letters and digits only beside unspaced ones
        ("Aの人々 a 7", "a の人 人々"),
        ("다리는 물", "다리 리는 물"),
        ("ที่นี่", "ที่นี่"),
        ("ＢＭ２５ ﾊﾞｽ", "bm25 バス"),  # forms of other widths
        ("पुल की मरम्मत", "पुल की मरम्मत"),
        ("cafe\u0301 İki", "café iki"),
        ("葛\U000e0100飾", "葛飾"),
    ],
)
def test_search_words_are_pairs_of_letters_without_spaces_and_whole_words_with_marks(text, words):
    assert search_words([text], "none") == [words.split()]


def test_a_language_has_its_stemmer_and_stop_words_by_name_or_code():
    texts = ["Die Brücken und das Haus", "running of the mills"]
    german = [["bruck", "haus"], ["running", "of", "the", "mill"]]
    assert search_words(texts, "de") == search_words(texts, "German") == german
    assert search_words(texts, "none") == [text.lower().split() for text in texts]
    assert search_words(texts)[1] == ["run", "mill"]
    names = set(Stemmer.algorithms()) - {"porter", "dutch_porter"}  # which are no languages
    assert set(LANGUAGES.values()) == names
    for name in names:
        search_tokenizer(name)  # whose stop words bm25s knows
    for unknown in ("xx", "porter", "zh", ""):
        with pytest.raises(
            UsageError, match=f"--language {unknown}: there is no stemmer for it; use none, or one of ar"
        ):
            language_name(unknown)


# ---- for ROUGE


def test_rouge_words_of_ascii_text_are_those_of_rouge_score():
    reference = DefaultTokenizer(use_stemmer=True)
    generator = random.Random(7)
    characters = [chr(code) for code in range(128)] + list("aeinrst ") * 8
    texts = ["".join(generator.choices(characters, k=200)) for _ in range(200)]
    texts += ["The parties' agencies were RUNNING, flies_died; 3.14 a__b isn't skies dying", "", "_"]
    for text in texts:
        assert list(rouge_words(text)) == reference.tokenize(text)


def test_rouge_words_keep_other_scripts():
    assert rouge_words("Café GRÖSSE") == rouge_words("cafe\u0301 größe".replace("ß", "ss"))
    assert rouge_words("Москва, Ελλάδα") == ("москва", "ελλάδα")
    assert rouge_words("東京は 2024年") == ("東", "京", "は", "2024", "年")
    assert rouge_words("人々・ＡＢＣ") == ("人", "々", "abc")


@pytest.mark.parametrize(("spelled", "otherwise"), [
    ("\u09b8\u09ae\u09df", "\u09b8\u09ae\u09af\u09bc"),  # Bengali: NFC takes the last letter apart
    ("\u0938\u095c\u0915", "\u0938\u0921\u093c\u0915"),  # Hindi
    ("\ufb2aלום", "ש\u05c1לום"),  # Hebrew
    ("Ver\u00adfas\u00adsung", "Verfassung"),  # soft hyphens
    ("\ufeffWort\u2060spiel\u200e", "Wortspiel"),
    ("Caf\u0065\u0301", "Café"),
])  # fmt: skip
def test_spellings_that_look_alike_are_one_word(spelled, otherwise):
    assert rouge_words(spelled) == rouge_words(otherwise) and len(rouge_words(spelled)) == 1
    both = search_words([spelled, otherwise, f"{spelled} ক়"], "none")  # beside a mark, too
    assert both[0] == both[1] == both[2][:1]


def test_turkish_capitals_are_those_of_its_small_letters():
    words = search_words(["IŞIK HIZI", "Işık hızı", "ışık hızı", "İstanbul", "istanbul", "I\u0307stanbul"], "tr")
    assert words[0] == words[1] == words[2] and words[3] == words[4] == words[5]
    assert words[0] != search_words(["isik hizi"], "tr")[0]


def test_rouge_words_keep_their_combining_marks():
    for text in ("पुल की मरम्मत", "كَتَبَ الوَلَدُ", "שָׁלוֹם עוֹלָם", "x\u0302y"):
        assert rouge_words(text) == tuple(text.split())
    assert rouge_words("ที่นี่") == ("ที่", "นี่")
