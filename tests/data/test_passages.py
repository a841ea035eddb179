"""Texts split into passages and sentences, and passages merged into longer ones."""

import random

import pytest

from utils.data.passages import merge_passages, split_document, split_sentences
from utils.data.words import count_words


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("He met Mr. Smith. They talked.", ["He met Mr. Smith.", "They talked."]),
        (
            "J. K. Rowling of the U.S. Army wrote, e.g. Books. Yes.",
            ["J. K. Rowling of the U.S. Army wrote, e.g. Books.", "Yes."],
        ),
        ("See No. 5 and Fig. 2 there. No. He left.", ["See No. 5 and Fig. 2 there.", "No.", "He left."]),
        (
            'He said "Stop." Then he left. (Really.) Yes?! Well… So',
            ['He said "Stop."', "Then he left.", "(Really.)", "Yes?!", "Well…", "So"],
        ),
        ('"Go!" he said. "Now?" she asked.', ['"Go!" he said.', '"Now?" she asked.']),
        ("OK , we 're on . So um ... yeah . and then ?", ["OK , we 're on .", "So um ... yeah .", "and then ?"]),
        ("`` I know . '' He left .", ["`` I know . ''", "He left ."]),
        ("no capitals here. none at all. mr. jones left.", ["no capitals here.", "none at all.", "mr. jones left."]),
        ("It cost 3.5 dollars. 7 were sold.", ["It cost 3.5 dollars.", "7 were sold."]),
        ("1. Introduction\n2. Methods", ["1. Introduction", "2. Methods"]),
        ("First turn\n\nSecond turn", ["First turn", "Second turn"]),
        ("„Das ist gut.“ Dann ging er. »Ja.« Sie auch.", ["„Das ist gut.“", "Dann ging er.", "»Ja.«", "Sie auch."]),
        ("“I know.” So “he” left. « Oui. » Il part.", ["“I know.”", "So “he” left.", "« Oui. »", "Il part."]),
        ("Նա ասաց դա։ Հետո գնաց։", ["Նա ասաց դա։", "Հետո գնաց։"]),
        ("እሱ ሄደ። እሷ መጣች።", ["እሱ ሄደ።", "እሷ መጣች።"]),
    ],
)
def test_text_is_split_at_sentence_and_line_ends_only(text, sentences):
    longest = max(len(sentence.split()) for sentence in sentences)
    pieces = set()
    for passage_words in range(longest, longest + 3):
        passages = split_document(text, passage_words)
        assert " ".join(passages).split() == text.split()
        # any passage is a run of whole sentences
        runs = {
            " ".join(" ".join(sentences[i:j]).split())
            for i in range(len(sentences))
            for j in range(i + 1, len(sentences) + 1)
        }
        pieces |= {" ".join(passage.split()) for passage in passages}
        assert pieces <= runs

    assert split_sentences(text) == sentences


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("犬が吠えた。猫が座った。", ["犬が吠えた。", "猫が座った。"]),
        ("真的吗？！是。 好！", ["真的吗？！", "是。", "好！"]),
        ("「行こう。」彼は言った。“好。”她说。", ["「行こう。」", "彼は言った。", "“好。”", "她说。"]),
        ("「行こう。」 彼は言った。", ["「行こう。」", "彼は言った。"]),
        ("It is 3.5.2 here。And there.", ["It is 3.5.2 here。", "And there."]),
        ("東京は首都である．人口は3．5倍。", ["東京は首都である．", "人口は3．5倍。"]),
        ("東京は首都である． 人口は", ["東京は首都である．", "人口は"]),
        ("“好。”，他说。然后走了。", ["“好。”，他说。", "然后走了。"]),
        ("「行こう。」、彼は。", ["「行こう。」、彼は。"]),
    ],
)
def test_a_full_width_stop_ends_a_sentence_without_white_space(text, sentences):
    assert split_sentences(text) == sentences
    passages = split_document(text, max(map(count_words, sentences)))
    assert "".join(passages).replace(" ", "") == text.replace(" ", "")
    assert all(any(passage.endswith(sentence) for sentence in sentences) for passage in passages)


@pytest.mark.parametrize("text", ["１．はじめに", "１．　方法", "図1．結果を示す。", "Ｊ．Ｓ．バッハは"])
def test_a_full_width_point_after_a_number_or_a_letter_ends_no_sentence(text):
    assert split_sentences(text) == [" ".join(text.split())]


def test_a_chinese_document_is_split_at_its_sentence_ends():
    sentences = [f"第{number}次会议讨论了旧磨坊的屋顶。" for number in range(1, 99)]
    passages = split_document("".join(sentences), 40)  # a sentence has 14 words
    assert passages == ["".join(sentences[start : start + 2]) for start in range(0, 98, 2)]


def test_a_long_sentence_without_spaces_is_cut_at_a_pause_or_a_space_in_the_second_half_of_a_passage():
    assert split_document("一二三，四五六七八九十", 4) == ["一二三，", "四五六七", "八九十"]
    assert split_document("一，二三四五六", 4) == ["一，二三四", "五六"]
    assert split_document("ซ่อม สะพาน", 5) == ["ซ่อม", "สะพาน"]


def test_passages_are_filled_and_a_line_is_kept_whole_when_it_costs_little():
    assert split_document("A b c. D e f.\nG h.", 8) == ["A b c. D e f.\nG h."]
    assert split_document("A b c d e.\nF g h. I j k.", 8) == ["A b c d e.", "F g h. I j k."]
    assert split_document("A b.\nC d e. F g h.", 6) == ["A b.\nC d e.", "F g h."]


def test_only_a_sentence_longer_than_a_passage_is_cut():
    assert split_document("Short one. " + "W " * 5 + "end.", 3) == ["Short one.", "W W W", "W W end."]


def test_no_word_is_lost_and_no_passage_is_too_long():
    generator = random.Random(0)
    tokens = "a B x. Y. . ? ... ) \" '' Mr. 1. no. \n \n\n \u2028 é\x1c 。".split(" ")
    for _ in range(300):
        text = " ".join(generator.choices(tokens, k=generator.randint(0, 60)))
        size = generator.randint(1, 12)
        passages = split_document(text, size)
        assert [word for passage in passages for word in passage.split()] == text.split()
        assert all(0 < len(passage.split()) <= size for passage in passages)


def test_text_without_spaces_is_neither_lost_nor_spaced_and_no_passage_is_too_long():
    generator = random.Random(0)
    tokens = [*"第1次会，。！？」「（）的 A.\n　・ー々カﾊﾞ”\"😀", "ซ่", "မြ", "န်", "။", "ភា", "។", " Mr.", " (x) ",
              "\u0301", "\ufe0f", "１２", "한국 ", "v2.0"]  # fmt: skip
    for _ in range(500):
        text = "".join(generator.choices(tokens, k=generator.randint(0, 60)))
        size = generator.randint(1, 9)
        passages = split_document(text, size)
        spaced = " ".join(text.split())
        for pieces in (passages, split_sentences(text)):
            assert "".join("".join(pieces).split()) == "".join(text.split())
            assert all(" ".join(piece.split()) in spaced for piece in pieces)
        assert all(0 < count_words(passage) <= size for passage in passages)
        if passages:
            chunks, placed = merge_passages(passages, 20)
            assert sum(sum(words.values()) for words in placed) == sum(map(count_words, chunks))


def test_merging_keeps_all_words_and_says_where_they_went():
    chunks, placed = merge_passages(["a b", "c", "D e f. G h i.", "j k"], 4)
    assert chunks == ["a b\nc", "D e f.", "G h i.", "j k"]
    assert placed == [{0: 2}, {0: 1}, {1: 3, 2: 3}, {3: 2}]
    assert merge_passages(["一二", "三", "四五"], 3) == (["一二\n三", "四五"], [{0: 2}, {0: 1}, {1: 2}])
