"""The words that ROUGE counts, against rouge-score."""

import random

from rouge_score.tokenizers import DefaultTokenizer

from utils.data.words import rouge_words


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
