"""Drafts for training and without a summarizer, and files of drafts."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from retrieval_cases import make_corpus

from utils.data.examples import Document, Example
from utils.data.hand_over import read_drafts
from utils.errors import DataError
from utils.retrieval.drafts import Imitations, extract_drafts, imitate_draft, imitations, without_last_word


def make_example(id, query, passages):
    return Example(id, query, Document(id, passages), ["a summary"], None, None, None)


def test_an_imitated_draft_keeps_the_words_that_were_read_and_invents_the_others():
    read = ["Bob: ask Norwood, who runs the mill.", "They like loose tents."]
    reference, other = "Norwood said that loose tents sank.", "Ashby told us about a"
    # "said that" and "sank." were not read; after its last word the other reference begins anew
    assert imitate_draft(reference, read, other) == "Norwood told us loose tents Ashby"
    assert imitate_draft(reference, [reference], other) == reference
    assert imitate_draft(reference, [], other) == "Ashby told us about a Ashby"
    assert imitate_draft(reference, read, "") == "Norwood loose tents"
    # scripts without spaces are words of one character
    assert (
        imitate_draft("\u4ed6\u5356\u78e8\u574a", ["\u78e8\u574a"], "\u5979\u4e70\u8239") == "\u5979\u4e70\u78e8\u574a"
    )


def test_words_of_scripts_without_spaces_keep_their_marks_and_are_cut_off_one_by_one():
    assert imitate_draft("ที่นี่", ["ที่"], "มี") == "ที่มี"
    for text in ("修好了。\n预算", "apples\npears\nplums", "a\tb\tc", "一　二 \n"):  # any white space
        lengths = [len(text)]
        while text:
            text = without_last_word(text)
            lengths.append(len(text))
        assert lengths == sorted(set(lengths), reverse=True)
    assert [without_last_word(text) for text in ("a b  c", "a", "修好 了吗。", "")] == ["a b ", "", "修好 了", ""]


def test_imitated_drafts_know_what_each_example_read_and_depend_on_the_seed_alone():
    examples = [make_example(str(number), "q", ["a summary", "of something"]) for number in range(4)]
    for number, example in enumerate(examples):
        example.summaries = [f"a summary {number}", f"of something {number}"]
    by_seed = [Imitations(examples, seed)(examples, [[0, 1]] * 4) for seed in range(40)]
    assert by_seed[3] == Imitations(examples, 3)(examples, [[0, 1]] * 4)
    first = [drafts[2].rpartition(" ") for drafts in by_seed]
    assert {words for words, *_ in first} == {"a summary", "of something"}  # each reference in turn
    assert {number for *_, number in first} == {"0", "1", "3"}  # a number was not read: it is another example's
    examples[2].summaries = []
    assert Imitations(examples, 3)(examples, [[0]] * 4)[2] == ""


def bag_of_words(texts, kind):
    """(texts, 3) how often each word of interest is in a text."""
    return np.array([[text.lower().count(word) for word in ("mill", "bridge", "coffee")] for text in texts], float)


def test_extracted_drafts_are_the_sentences_nearest_the_query_in_the_documents_order():
    passages = [
        "Ann: The coffee is cold again. The old mill was sold.",
        "Bob: Yes.\nBob: Our mill burned down, the mill.",
        "Cid: Mill, mill, mill and mill.",
    ]
    examples = [make_example("a", "the mill?", passages), make_example("b", "a bridge?", ["Ann: no word of it here"])]
    draft, other = extract_drafts(examples, [[1, 0], [0]], bag_of_words, max_words=12)
    assert draft == "The old mill was sold. Bob: Our mill burned down, the mill."  # passage 2 was not read
    assert other == "Ann: no word of it here"
    one, _ = extract_drafts(examples, [[0, 1], []], bag_of_words, max_words=3)
    assert 1 <= len(one.split()) <= 3 and one in " ".join(passages[:2])  # a longer sentence is cut
    assert _ == ""


def test_extracted_drafts_of_a_script_without_spaces_are_whole_sentences_side_by_side():
    passages = ["是。委员会修理mill。天气很好。mill在河边。", "然后他们走了。"]
    (draft,) = extract_drafts([make_example("a", "mill？", passages)], [[0, 1]], bag_of_words, max_words=10)
    assert draft == "委员会修理mill。mill在河边。"  # 6 and 4 words
    (draft,) = extract_drafts([make_example("a", "mill？", ["Yes.", "是。"])], [[0, 1]], bag_of_words, max_words=10)
    assert draft == "Yes. 是。"  # short ones, if there are no others


def test_each_sentence_is_encoded_once_for_all_questions():
    encoded = []

    def encode(texts, kind):
        encoded.extend(texts)
        return bag_of_words(texts, kind)

    passages = ["Ann: The coffee is cold. Ann likes the old mill."]
    examples = [make_example(str(number), f"mill {number}", passages) for number in range(3)]
    extract_drafts(examples, [[0]] * 3, encode, max_words=50)
    assert len(encoded) == 2 + 3


# ---- files


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_drafts_are_matched_by_id_from_hops_or_from_any_tools_predictions(tmp_path, caplog):
    examples = [make_example(id, "q", ["one", "two", "three"]) for id in ("a", "b", "c", "d")]
    hops = [{"draft": "first", "read": [2, 0]}, {"draft": " ", "read": []}, {"draft": "second"}]
    path = write(tmp_path / "d.jsonl", {"id": "b", "prediction": "theirs"}, {"id": "a", "hops": hops},
                 {"id": "d", "draft": "mine"}, {"id": "zzz", "draft": "of another file"})  # fmt: skip
    assert read_drafts(path, examples) == [
        [("first", [2, 0]), ("second", [])],
        [("theirs", [])],
        [],
        [("mine", [])],
    ]
    assert f"{path} has no draft for 1 of 4 examples, such as 'c'" in caplog.text


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"id": "a"}, "d.jsonl:2: no 'draft', nor 'prediction' or 'hops' with drafts"),
        ({"draft": "x"}, "d.jsonl:2: no 'id'"),
        ({"id": "a", "hops": "x"}, "d.jsonl:2: 'hops' must be a list of"),
        ({"id": "a", "hops": [{"draft": "x", "read": [1]}]}, "d.jsonl:2: 'read' holds 1, but there is 1 passage"),
        ({"id": "a", "query": "Who?", "draft": "x"}, 'd.jsonl:2: \'a\' asks "Who?" here, but "q" in the examples'),
        (
            {"id": "a", "passages": ["x", "y"], "hops": [{"draft": "x", "read": [0]}]},
            "d.jsonl:2: 'a' has 2 passages here, but 1 in the examples; the drafts were made with other flags",
        ),
    ],
)
def test_a_bad_draft_is_named_with_its_line(tmp_path, bad, message):
    path = write(tmp_path / "d.jsonl", {"id": "b", "draft": "good"}, bad)
    with pytest.raises(DataError) as error:
        read_drafts(path, [make_example("a", "q", ["one"]), make_example("b", "q", ["one"])])
    assert message in str(error.value)
    assert "--skip_bad_examples" not in str(error.value)  # which is about examples


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    return make_corpus(tmp_path, [f"text {number}" for number in range(5)])  # d0 to d4


def test_drafts_of_a_corpus_read_what_its_ids_name(tmp_path, corpus):
    examples = [Example(id, "q", corpus, [], None, None, None) for id in "abc"]
    hops = [{"draft": "first", "read": [1, 0]}, {"draft": "second"}]
    path = write(tmp_path / "d.jsonl", {"id": "c", "draft": "of any tool"},
                 {"id": "a", "hops": hops, "passages": ["x", "y"], "passage_ids": ["d1", "d4"]},
                 {"id": "b", "hops": [{"draft": "by id", "read": ["d3"]}]},
                 {"id": "zzz", "hops": [{"draft": "of another corpus", "read": ["other"]}]})  # fmt: skip
    assert read_drafts(path, examples) == [[("first", [4, 1]), ("second", [])], [("by id", [3])], [("of any tool", [])]]


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"read": ["d9"]}, "d.jsonl:2: a draft read passage 'd9', but the corpus holds no such '_id'"),
        ({"read": [1]}, "d.jsonl:2: 'read' holds numbers, but no 'passage_ids' names the passages"),
        ({"read": [2], "passage_ids": ["d0", "d1"]}, "d.jsonl:2: 'read' holds 2, but there are 2 passages"),
        ({"read": [1], "passage_ids": ["d0", "d9"]}, "d.jsonl:2: a draft read passage 'd9'"),
        ({"read": "d1"}, "d.jsonl:2: 'read'"),
    ],
)
def test_a_draft_that_read_what_the_corpus_does_not_hold_is_refused(tmp_path, corpus, bad, message):
    ids = {"passage_ids": bad["passage_ids"]} if "passage_ids" in bad else {}
    hop = {"draft": "x", "read": bad["read"]}
    path = write(tmp_path / "d.jsonl", {"id": "b", "draft": "good"}, {"id": "a", "hops": [hop]} | ids)
    with pytest.raises(DataError) as error:
        read_drafts(path, [Example(id, "q", corpus, [], None, None, None) for id in "ab"])
    assert str(error.value).startswith(f"{tmp_path}/{message}") and len(str(error.value).splitlines()) == 2


def test_imitations_need_references_and_training_with_drafts():
    examples = [make_example("a", "q", ["a summary"]), make_example("b", "q", ["nothing"])]
    examples[0].summaries = []
    args = SimpleNamespace(draft_share=0.5, seed=1)
    assert imitations(examples, args)(examples, [[0], [0]])[0] == ""
    assert imitations(examples[:1], args) is None
    assert imitations(examples, SimpleNamespace(draft_share=0, seed=1)) is None


def test_words_that_were_not_read_are_never_those_of_the_own_reference():
    examples = [make_example(str(n), "q", ["nothing"]) for n in range(5)]
    for n, example in enumerate(examples):
        example.summaries = [f"word{n}"]
    for seed in range(20):
        drafts = imitations(examples, SimpleNamespace(draft_share=1, seed=seed))(examples, [[0]] * 5)
        assert all(draft and draft != example.summaries[0] for draft, example in zip(drafts, examples, strict=True))
    assert imitations(examples[:1], SimpleNamespace(draft_share=1, seed=1))(examples[:1], [[0]]) == [""]


def test_a_file_without_a_draft_for_any_example_is_refused(tmp_path):
    path = write(tmp_path / "d.jsonl", {"id": "x", "draft": "good"})
    with pytest.raises(DataError, match="no draft for any of 1 examples, such as 'a'"):
        read_drafts(path, [make_example("a", "q", ["one"])])
