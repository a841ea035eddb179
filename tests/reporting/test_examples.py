"""What a report says of an example: support, evidence found and missed, what a hop did."""

import pytest
from reporting_cases import PASSAGES, example, hop, hops_records

from utils.errors import DataError
from utils.reporting.examples import MOST_CHARACTERS, cut, view, visible


def views(**options):
    return [view(record, "a:1", **options) for record in hops_records()]


def one(prediction, passages, **fields):
    """An example of one hop that reads all passages."""
    hops = [hop(prediction, list(range(len(passages))))]
    return view(example(0, passages=passages, hops=hops, prediction=prediction, **fields), "a:1")


def test_a_passage_supports_a_sentence_if_it_has_half_of_its_words():
    passages = ["Draper found cracked walls.", "Draper found silver handles in the porch.", "Nothing at all."]
    (sentence,) = one("Draper found silver handles.", passages).sentences
    assert sentence.support == [(1, 1.0), (0, 0.5)] and sentence.best == 1.0
    (sentence,) = one("Draper bought golden handles.", passages).sentences
    assert sentence.support == [(1, 0.5)]  # Draper, handles
    (sentence,) = one("Draper bought golden eggs.", passages).sentences
    assert sentence.is_unsupported and sentence.best == 0.25


def test_stop_words_endings_and_case_do_not_count_and_repeated_words_must_be_repeated():
    (sentence,) = one("The FENCES are in the porch.", ["A fence and a porch"]).sentences
    assert sentence.best == 1.0
    (sentence,) = one("Fences, fences, fences.", ["one fence"]).sentences
    assert sentence.best == pytest.approx(1 / 3)


def test_only_passages_that_the_summary_was_written_from_support_it():
    hops = [hop("x", [2]), hop("y", [0, 1])]
    record = example(0, passages=PASSAGES, prediction="Wooden fences cracked.", evidence=[2], hops=hops)
    shown = view(record, "a:1")
    assert shown.unsupported == 1 and not shown.sentences[0].support
    assert [p.number for p in shown.shown] == [0, 1, 2] and not shown.shown[2].supports


def test_a_sentence_without_words_is_not_judged():
    (sentence,) = one("They are there.", PASSAGES).sentences
    assert sentence.best is None and not sentence.is_unsupported


def test_scripts_without_spaces_are_judged_by_pairs_of_letters():
    (sentence,) = one("他们决定卖掉磨坊。", ["安说：他们决定卖掉磨坊。", "完全不同"]).sentences
    assert sentence.support == [(0, 1.0)]


def test_evidence_found_and_missed_and_its_rank():
    helped, hurt, _ = views()
    assert [p.number for p in helped.found] == [1, 2] and not helped.missed
    assert [p.number for p in hurt.missed] == [2] and hurt.missed[0].rank == 3 and hurt.missed[0].hops == [1]
    assert [p.number for p in hurt.shown] == [0, 1, 2]  # read last, read earlier


def test_hop_helped_and_hurt_by_rouge_of_draft_and_summary():
    helped, hurt, same = views()
    assert (helped.effect, hurt.effect, same.effect) == ("helped", "hurt", "")
    assert helped.change > 80 and hurt.change < -80 and helped.change_of == "ROUGE-L"
    assert same.change is None  # one hop


def test_where_drafts_are_no_summaries_hops_are_judged_by_the_evidence_they_read():
    helped, hurt, _ = views(drafts_are_summaries=False)
    assert (helped.change, hurt.change, helped.change_of) == (50.0, -100.0, "evidence read")
    without = {name: value for name, value in hops_records()[0].items() if name not in ("summary", "evidence")}
    assert view(without, "a:1").change is None


def test_a_hop_says_what_it_found_and_through_which_words_of_the_draft():
    first, second = views()[0].hops
    assert [passage.number for passage, _ in first.new] == [1, 0] and not any(words for _, words in first.new)
    assert [(passage.number, words) for passage, words in second.new] == [(2, ["Norwood"])]
    assert first.rouge is not None and first.draft.startswith("Norwood")


def test_of_many_words_those_that_few_passages_have_are_named():
    draft = "The committee saw that many people talked in March, as Norwood, Farrow, Draper and Beckett said."
    common = "The committee saw many people talk in March."
    passages = [common, f"{common} Norwood, Farrow, Draper and Beckett came.", common]
    record = example(0, passages=passages, prediction="x", hops=[hop(draft, [0]), hop("x", [0, 1])])
    (_, words), *rest = view(record, "a:1").hops[1].new
    assert words == ["Norwood", "Farrow", "Draper", "Beckett"] and not rest


def test_what_the_question_says_itself_is_not_what_a_draft_led_through():
    passages = ["Ann spoke.", "Norwood repaired the fences."]
    record = example(0, passages=passages, prediction="x", query="Which fences?",
                     hops=[hop("Norwood and fences.", [0]), hop("x", [0, 1])])  # fmt: skip
    assert view(record, "a:1").hops[1].new[0][1] == ["Norwood"]


def test_words_of_scripts_without_spaces_lead_to_a_passage():
    record = example(0, passages=["甲", "磨坊卖掉了"], prediction="x", hops=[hop("磨坊", [0]), hop("x", [0, 1])])
    assert view(record, "a:1").hops[1].new[0][1] == ["磨坊"]


def test_predictions_of_the_summarizer_have_the_passages_that_were_read():
    record = {"id": 7, "doc_id": "d", "query": "", "prediction": "Fences cracked.", "summary": ["Fences cracked.", "x"],
              "evidence": [4, 9], "passages": [{"passage": 4, "text": "Wooden fences cracked."}]}  # fmt: skip
    shown = view(record, "a:1")
    assert [(p.number, p.text) for p in shown.shown] == [(4, "Wooden fences cracked."), (9, None)]
    assert [p.number for p in shown.missed] == [9] and shown.sentences[0].support == [(4, 1.0)]
    assert shown.scores["rougeL"] == 100


def test_passages_of_a_corpus_have_their_names():
    shown = one("x", ["text", "more"], passage_ids=["c7", "c9"])
    assert [p.name for p in shown.shown] == ["c7", "c9"]


@pytest.mark.parametrize("damage", [{"hops": [{"draft": "x"}]}, {"passages": 3}, {"prediction": None}, {"evidence": 5}])
def test_a_record_of_another_tool_is_named(damage):
    with pytest.raises(DataError, match=r"^file:3: not a record of these scripts"):
        view({**hops_records()[0], **damage}, "file:3")


def test_control_characters_and_halves_of_pairs_are_shown_and_long_texts_cut():
    assert visible("a\x00b\x1b[0m\r\nc\td\x85") == "a␀b␛[0m\nc\td\ufffd"
    assert visible("\ud83d") == "\\ud83d"
    assert cut("x" * MOST_CHARACTERS) == "x" * MOST_CHARACTERS
    assert cut("x" * (MOST_CHARACTERS + 5)).endswith("x … (5 more characters)")
