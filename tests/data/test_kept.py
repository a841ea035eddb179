"""Examples on disk: read once, the same as what was read, and read anew when what decides them has changed."""

import json
import os
import threading

import pytest

from utils.data import loading
from utils.data.corpus import load_corpus
from utils.data.examples import Document, Example, Hop
from utils.data.kept import content_key, keep_examples
from utils.data.loading import load_examples
from utils.errors import DataError

GOOD = {"id": "a", "query": "what?", "passages": ["One.", "Two."], "summary": "s", "evidence": [1]}


@pytest.fixture
def reads(tmp_path, monkeypatch):
    """An entry for each file that is read, not for those that are kept from before."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    counted, plain = [], loading.read_rows
    monkeypatch.setattr(loading, "read_rows", lambda path, *args: counted.append(path) or plain(path, *args))
    return counted


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_a_file_is_read_once_and_again_after_its_content_or_a_flag_that_decides_has_changed(reads, tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b"})
    first, second = load_examples(path), load_examples(path)
    assert list(first) == [*first] and [e.query for e in second] == ["what?"] * 2
    assert first.id == second.id and len(reads) == 1
    assert len(load_examples(path, max_examples=1)) == 1 and len(reads) == 2
    assert load_examples(path, merge_passages=True)[0].document.passages == ["One.\nTwo."] and len(reads) == 3
    write(path, GOOD, {**GOOD, "id": "b", "summary": "t"})
    third = load_examples(path)
    assert third[1].summaries == ["t"] and len(reads) == 4
    assert third.id != first.id
    write(path, GOOD, {**GOOD, "id": "b"})
    assert load_examples(path).id == first.id and len(reads) == 4


def test_bad_records_are_reported_again_by_a_run_that_reads_nothing(reads, tmp_path, caplog):
    path = write(tmp_path / "d.jsonl", GOOD, {**GOOD, "id": "b", "summary": 5})
    rejected = tmp_path / "rejected.jsonl"
    for _ in range(2):
        caplog.clear()
        assert len(load_examples(path, skip_bad_examples=True, rejected_file=rejected)) == 1
        assert "1 bad records skipped, the first at" in caplog.text
        assert json.loads(rejected.read_text())["record"]["summary"] == 5
        rejected.unlink()
    assert len(reads) == 1
    with pytest.raises(DataError, match=r"d.jsonl:2: 'summary' must be a string"):
        load_examples(path)
    with pytest.raises(DataError, match=r"d.jsonl:2"):  # what fails is not kept
        load_examples(path)


def test_bad_judgements_are_reported_again_too(reads, tmp_path, caplog):
    corpus = load_corpus(write(tmp_path / "corpus.jsonl", *({"_id": f"d{n}", "text": "x"} for n in (1, 2))))
    path = write(tmp_path / "queries.jsonl", *({"_id": f"q{n}", "text": "what?"} for n in (1, 2)))
    qrels, rejected = tmp_path / "qrels.tsv", tmp_path / "rejected.jsonl"
    qrels.write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td9\t1\n")
    for _ in range(2):
        caplog.clear()
        examples = load_examples(path, corpus=corpus, qrels_file=qrels, id_column="_id", query_column="text",
                                 require_summary=False, skip_bad_examples=True, rejected_file=rejected)  # fmt: skip
        assert [bool(example.evidence) for example in examples] == [True, False]
        assert f"1 bad records skipped, the first at {qrels}:3" in caplog.text
        assert "holds no such '_id'" in json.loads(rejected.read_text())["reason"]
        rejected.unlink()


def test_examples_come_back_with_all_that_they_hold(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    shared = Document("d", ["Eins \u20ac.", "Zwei.", "\u0939\u093f\u0928\u094d\u0926\u0940"])
    examples = [
        Example("1", "q", shared, ["s", "t"], [0, 2], [1, 1], [(2, 0.1), (0, -1e-9)],
                [Hop("draft", [2, 0], [(2, 0.5)]), Hop("", [], [])]),
        Example("2", "", Document("e", ["x"]), [], None, None, None),
        Example("3", "r", shared, ["u"], None, None, []),
    ]  # fmt: skip
    kept = keep_examples("examples", ["a"], lambda: examples)
    for example, original in zip(kept, examples, strict=True):
        for name in Example.__slots__:
            if name != "document":
                assert getattr(example, name) == getattr(original, name), name
        assert (example.document.id, example.document.passages) == (original.document.id, original.document.passages)
    assert kept[0].document is kept[2].document is kept.column("document")[2]
    assert kept[-1].id == "3" and [e.id for e in kept[1:]] == ["2", "3"]
    assert list(kept.column("query")) == ["q", "", "r"] and list(kept.column("retrieved"))[1] is None
    other = keep_examples("examples", ["b"], lambda: examples[:2])
    assert content_key(other) != content_key(kept) == content_key(keep_examples("examples", ["c"], lambda: examples))
    assert content_key(examples) == content_key(list(examples)) != content_key(examples[:2])


def test_what_comes_through_a_pipe_is_read_once_and_kept_for_this_process_only(reads, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(json.dumps(GOOD) + "\n",))
    writer.start()
    assert [e.id for e in load_examples(tmp_path / "pipe")] == ["a"]
    writer.join(10)
    assert len(reads) == 1 and not (tmp_path / "home").exists()
