"""The embedded data set: reproducible, exact in its evidence, and a fair test of searching twice."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.data import sample
from utils.data.loading import load_examples
from utils.data.sample import sample_examples, sample_records
from utils.retrieval.bm25 import bm25_scores

ROOT = Path(__file__).parents[2]
FRAME_WORDS = {
    word
    for frames in (*sample.AGREED, *sample.REPORTED)
    for word in re.findall(r"[a-z]+", " ".join(re.sub(r"\{\w+\}", " ", frame) for frame in frames[1:]).lower())
}


@pytest.fixture(scope="module")
def records():
    return sample_records("validation", 60)


def words(text):
    return set(re.findall(r"\w+", text.lower()))


def subject(record):
    """The two words after "the" that name a thing that is discussed."""
    (found,) = {f"{kind} {name}" for kind in sample.SUBJECT_KINDS for name in sample.SUBJECTS
                if f"the {kind} {name}" in record["query"]}  # fmt: skip
    return found


def facts(record):
    """The exact strings that the reference tells: things, costs, months, reports."""
    summary = record["summary"]
    phrases = re.findall(rf"(?:{'|'.join(sample.QUALITIES)}) (?:{'|'.join(sample.THINGS)})\b", summary)
    costs = re.findall(r"\w+ thousand pounds", summary)
    months = re.findall(rf"\b(?:{'|'.join(sample.MONTHS)})\b", summary)
    happenings = re.findall(rf"\b(?:{'|'.join(sample.HAPPENINGS)})\b(?: in the \w+)?", summary)
    return phrases + costs + months + happenings


def test_the_same_split_gives_the_same_data_and_another_split_other_data(records):
    assert sample_records("validation", 60) == records
    assert sample_records("validation", 2) == records[: len(sample_records("validation", 2))]
    train = sample_records("train", 60)
    assert {r["summary"] for r in train} != {r["summary"] for r in records}


def test_no_document_of_one_split_is_in_another(records):
    documents = [{tuple(r["passages"]) for r in part} for part in (records, sample_records("train", 60))]
    assert [len(part) for part in documents] == [60, 60]
    assert not documents[0] & documents[1]


def test_documents_are_long_enough_to_need_a_search_and_carry_six_questions(records):
    assert min(len(record["passages"]) for record in records) >= 40
    assert len(records) == 60 * 6
    assert len({record["id"] for record in records}) == len(records)
    assert len({(record["doc_id"], record["query"]) for record in records}) == len(records)


def test_questions_of_one_and_two_hops_are_both_there(records):
    hops = [len(record["evidence_hops"]) for record in records]
    assert set(hops) == {1, 2}
    assert 0.3 < np.mean(np.array(hops) == 2) < 0.7


def test_hops_share_out_the_evidence(records):
    for record in records:
        assert sorted(place for hop in record["evidence_hops"] for place in hop) == record["evidence"]
        assert len(set(record["evidence"])) == len(record["evidence"])


def test_the_evidence_says_all_that_the_reference_tells(records):
    for record in records:
        found = words(" ".join(record["passages"][place] for place in record["evidence"]))
        assert words(record["summary"]) - FRAME_WORDS <= found, record["id"]
        assert facts(record)
        for fact in facts(record):
            assert any(fact in record["passages"][place] for place in record["evidence"]), (record["id"], fact)


def test_every_evidence_passage_is_needed(records):
    for record in records:
        for place in record["evidence"]:
            told = [fact for fact in facts(record) if fact in record["passages"][place]]
            opens_hop_2 = len(record["evidence_hops"]) == 2 and place in record["evidence_hops"][0]
            assert told or opens_hop_2, (record["id"], record["passages"][place])


def test_nothing_but_the_evidence_answers(records):
    """No other passage names the subject together with a fact, and none tells the report of a second hop."""
    for record in records:
        others = [text for place, text in enumerate(record["passages"]) if place not in record["evidence"]]
        if len(record["evidence_hops"]) == 2:
            report = max(re.findall(r"(?:that|, ) ?(.+)\.$", record["summary"]), key=len)
            assert not any(report in text for text in others), record["id"]
            owner = record["summary"].removeprefix("According to ").split()[0].rstrip(",")
            assert not any(subject(record) in text and owner in text.partition(": ")[2] for text in others)
        for text in others:
            if subject(record) in text:
                assert not any(fact in text for fact in facts(record)), (record["id"], text)


def test_the_first_hop_names_the_person_and_the_second_never_the_subject(records):
    for record in records:
        if len(record["evidence_hops"]) == 1:
            assert all(subject(record) in record["passages"][place] for place in record["evidence"])
            continue
        (first,), (second,) = record["evidence_hops"]
        speaker, _, text = record["passages"][second].partition(": ")
        assert subject(record) in record["passages"][first]
        assert speaker in record["passages"][first].partition(": ")[2]  # named in what is said, not as its speaker
        assert speaker in record["summary"]
        assert not words(subject(record)) & words(text)
        assert not words(subject(record)) & words(speaker)


def test_every_question_has_distractors_that_share_its_words(records):
    for record in records:
        others = [text for place, text in enumerate(record["passages"]) if place not in record["evidence"]]
        assert any(subject(record) in text for text in others), record["id"]
    shared = [max(len(words(record["query"]) & words(text)) for place, text in enumerate(record["passages"])
                  if place not in record["evidence"]) for record in records]  # fmt: skip
    assert np.mean(shared) > 4


def test_references_have_one_to_three_sentences(records):
    counts = {len(re.findall(r"[.!?](?:\s|$)", record["summary"])) for record in records}
    assert counts == {1, 2, 3}


def coverage(records, with_reference, top_k=5):
    """Share of each hop's evidence among BM25's best passages, over the two-hop questions: (first, second)."""
    found = []
    for record in records:
        if len(record["evidence_hops"]) < 2:
            continue
        query = f"{record['query']} {record['summary']}" if with_reference else record["query"]
        best = set(np.argsort(-bm25_scores(record["passages"], [query])[0], kind="stable")[:top_k].tolist())
        found.append([len(best & set(hop)) / len(hop) for hop in record["evidence_hops"]])
    assert len(found) > 100
    return np.mean(found, axis=0)


def test_the_query_alone_finds_the_first_hop_but_not_the_second(records):
    first, second = coverage(records, with_reference=False)
    assert first >= 0.85
    assert second <= 0.5


def test_query_and_reference_find_both_hops(records):
    first, second = coverage(records, with_reference=True)
    assert first >= 0.9
    assert second >= 0.9


def test_the_query_alone_finds_the_evidence_of_one_hop_questions(records):
    found = []
    for record in records:
        if len(record["evidence_hops"]) == 1:
            best = np.argsort(-bm25_scores(record["passages"], [record["query"]])[0], kind="stable")[:5].tolist()
            found.append(len(set(best) & set(record["evidence"])) / len(record["evidence"]))
    assert np.mean(found) >= 0.85


def test_examples_of_one_transcript_share_its_document():
    examples = sample_examples("train", 2)
    assert len({id(example.document) for example in examples}) == 2
    for example, record in zip(examples, sample_records("train", 2), strict=True):
        assert (example.id, example.query, example.summaries) == (record["id"], record["query"], [record["summary"]])
        assert example.document.passages == record["passages"]
        assert example.evidence == record["evidence"]
        assert example.evidence_words == [len(record["passages"][place].split()) for place in record["evidence"]]


def test_the_module_prints_records_that_load_examples_reads_back(tmp_path):
    result = subprocess.run([sys.executable, "-m", "utils.data.sample", "--documents", "2"], cwd=ROOT,
                            capture_output=True, text=True, timeout=60)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == sample_records("validation", 2)
    file = tmp_path / "sample.jsonl"
    file.write_text(result.stdout)
    loaded, made = load_examples(file), sample_examples("validation", 2)
    assert [(e.id, e.query, e.summaries, e.evidence, e.document.passages) for e in loaded] == [
        (e.id, e.query, e.summaries, e.evidence, e.document.passages) for e in made
    ]
    assert len({id(example.document) for example in loaded}) == 2
