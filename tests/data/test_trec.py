"""TREC files: round trips, the order in which trec_eval sees a ranking, malformed lines, and stage 2 reading a run."""

import math
import random
import re

import numpy as np
import pytest
import pytrec_eval
from conftest import launch, read_jsonl

from utils.data.examples import Document, Example
from utils.data.loading import load_examples
from utils.data.sample import sample_records
from utils.data.trec import by_passage_number, read_qrels, read_run, run_rankings, write_qrels, write_run
from utils.errors import DataError
from utils.files import write_jsonl


def make_example(id="q1", passages=4, doc_id="m1", evidence=(), query="?"):
    document = Document(doc_id, [f"passage {number}" for number in range(passages)])
    return Example(id, query, document, [], list(evidence) or None, None, None)


def error_of(read, path, *arguments) -> list[str]:
    with pytest.raises(DataError) as raised:
        read(path, *arguments)
    return str(raised.value).splitlines()


def order_of_trec_eval(path, docids: dict[str, set]) -> dict[str, list]:
    """How trec_eval orders the docids of each query: by the rank of each, asked for as the only relevant one."""
    with open(path, encoding="utf-8") as file:
        run = pytrec_eval.parse_run(file)
    order = {}
    for query in run:
        ranks = {}
        for docid in docids[query]:
            evaluator = pytrec_eval.RelevanceEvaluator({query: {docid: 1}}, {"recip_rank"})
            ranks[docid] = 1 / evaluator.evaluate({query: run[query]})[query]["recip_rank"]
        order[query] = sorted(ranks, key=ranks.get)
    return order


# ---- writing


def test_a_run_is_written_line_by_line_as_trec_has_it(tmp_path):
    examples = [make_example("q1"), make_example("q2", doc_id="m2"), make_example("q3")]
    write_run(tmp_path / "a.run", examples, [[(3, 2.5), (0, -1.0)], [(1, 0.91)], []], tag="my system")
    assert (tmp_path / "a.run").read_text() == (
        "q1 Q0 m1#3 1 2.5 my%20system\nq1 Q0 m1#0 2 -1 my%20system\nq2 Q0 m2#1 1 0.910000026 my%20system\n"
    )
    write_qrels(tmp_path / "qrels", [make_example("q1", evidence=[0, 2]), make_example("q2")])
    assert (tmp_path / "qrels").read_text() == "q1 0 m1#0 1\nq1 0 m1#2 1\n"


@pytest.mark.parametrize(
    "id", ["two words", "100%", "a%20b", "%2520", " x\t", "line\nbreak\r", "no\u00a0break\u2028\x85\x1c", "Straße 東京"]
)
def test_ids_with_white_space_and_percent_signs_survive_a_round_trip(tmp_path, id):
    example = make_example(id, doc_id=f"doc {id}", evidence=[2])
    write_run(tmp_path / "a.run", [example], [[(2, 1.0), (1, 0.5)]], tag="t")
    write_qrels(tmp_path / "qrels", [example])
    for name, columns in (("a.run", 6), ("qrels", 4)):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert all(len(line.split()) == columns for line in text.splitlines())
    assert read_run(tmp_path / "a.run") == {id: [(f"doc {id}#2", 1.0), (f"doc {id}#1", 0.5)]}
    assert read_qrels(tmp_path / "qrels") == {id: {f"doc {id}#2": 1}}
    assert run_rankings(tmp_path / "a.run", [example]) == [[(2, 1.0), (1, 0.5)]]


AWKWARD = {
    "ties": [1.0] * 12,
    "zeros": [3.0, *[0.0] * 11],
    "equal at float32": [1 + number * 1e-9 for number in range(12, 0, -1)],
    "a tie, and one just below it": [2.0, 2.0, 2.0, float(np.nextafter(np.float32(2), np.float32(0))), 1.0],
    "ties below zero": [-5.0] * 12,
    "near zero": [1e-45] * 6,
    "more than float32 holds": [1e300, 1e299, 1e39, 5.0],
    "rising": [1.0, 2.0, 3.0, 3.0],
}


@pytest.mark.parametrize("scores", AWKWARD.values(), ids=AWKWARD)
def test_trec_eval_sees_the_order_of_the_ranking_whatever_the_scores(tmp_path, scores):
    example = make_example(passages=len(scores))
    passages = list(range(len(scores)))  # ties in the wrong order for trec_eval, which has m1#9 before m1#10 and m1#1
    write_run(tmp_path / "a.run", [example], [list(zip(passages, scores, strict=True))], tag="t")
    expected = [f"m1#{passage}" for passage in passages]
    assert order_of_trec_eval(tmp_path / "a.run", {"q1": set(expected)}) == {"q1": expected}
    assert [docid for docid, _ in read_run(tmp_path / "a.run")["q1"]] == expected


def test_scores_are_lowered_by_the_least_step_of_float32_and_others_kept(tmp_path):
    write_run(tmp_path / "a.run", [make_example()], [[(0, 2.0), (1, 2.0), (2, 2.0), (3, 1.5)]], tag="t")
    written = np.array([score for _, score in read_run(tmp_path / "a.run")["q1"]], dtype=np.float32)
    step = np.nextafter(np.float32(2), np.float32(0))
    assert written.tolist() == [2.0, step, np.nextafter(step, np.float32(0)), 1.5]


def test_what_cannot_be_written_leaves_the_old_file_as_it_was(tmp_path):
    path = tmp_path / "a.run"
    path.write_text("old")
    for score in (math.nan, math.inf, -math.inf, -1e39):
        with pytest.raises(ValueError, match=f"'q1': the score of passage 1 is {re.escape(str(score))}"):
            write_run(path, [make_example()], [[(0, 1.0), (1, score)]], tag="t")
    with pytest.raises(ValueError):
        write_run(path, [make_example()], [], tag="t")
    with pytest.raises(ValueError, match="tag"):
        write_run(path, [make_example()], [[]], tag="")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---- reading


def test_a_run_of_another_tool_is_read_in_the_order_of_trec_eval(tmp_path):
    generator = random.Random(1)
    docids = [f"d{number}" for number in range(30)] + ["é", "z", "Z", "東", "\U0001f600", "%41"]
    lines, found = [], {}
    for query in ("q1", "q2"):
        found[query] = set(docids)
        for docid in docids:
            score = generator.choice([0, 1, 1.5, 1.50000001, -2, 1e30, 1e-40])
            lines.append(f"{query}\tQ0 {docid}  {generator.randint(1, 99)} {score} tag\r\n")
    generator.shuffle(lines)
    (tmp_path / "a.run").write_text("\ufeff" + "\n".join(lines), encoding="utf-8", newline="")
    (tmp_path / "b.run").write_text("".join(lines), encoding="utf-8", newline="")
    expected = order_of_trec_eval(tmp_path / "b.run", found)
    run = read_run(tmp_path / "a.run")
    for query in found:
        assert [docid for docid, _ in run[query]] == [docid.replace("%41", "A") for docid in expected[query]]


def test_beir_qrels_are_read_like_those_of_trec(tmp_path):
    (tmp_path / "test.tsv").write_text("query-id\tcorpus-id\tscore\nPLAIN-2\tMED 10\t1\nPLAIN-2\ta%20b\t0\nq\td\t2\n")
    assert read_qrels(tmp_path / "test.tsv") == {"PLAIN-2": {"MED 10": 1, "a%20b": 0}, "q": {"d": 2}}
    (tmp_path / "qrels").write_text("PLAIN-2 0 MED%2010 1\nPLAIN-2 0 x -1\n\nq 0 d 2\n")
    assert read_qrels(tmp_path / "qrels") == {"PLAIN-2": {"MED 10": 1, "x": -1}, "q": {"d": 2}}


def test_only_ascii_white_space_separates_the_columns_of_runs_and_qrels(tmp_path):
    name = "a\u00a0b\u3000c\u2003"
    (tmp_path / "qrels").write_text(f"{name}\t0 {name}\v1\n", encoding="utf-8")
    (tmp_path / "a.run").write_text(f"{name}\tQ0 {name}\v1 2.5 t\n", encoding="utf-8")
    assert read_qrels(tmp_path / "qrels") == {name: {name: 1}}
    assert read_run(tmp_path / "a.run") == {name: [(name, 2.5)]}


def test_malformed_lines_are_all_named_with_what_is_wanted(tmp_path):
    path = tmp_path / "a.run"
    path.write_bytes(b"q Q0 d 1 2.5 t\nq Q0 d2 1\n\nq Q0 d3 1 high t\nq Q0 d4 1 nan t\nq Q0 d 9 1 t\nq Q0 \xff 1 1 t\n")
    wanted = "it must have 'qid Q0 docid rank score tag'"
    assert error_of(read_run, path) == [
        f"{path}:2: has 4 columns; {wanted}",
        f"{path}:4: the score is 'high'; it must be a finite number",
        f"{path}:5: the score is 'nan'; it must be a finite number",
        f"{path}:6: docid 'd' appears twice for query 'q'",
        f"{path}:7: invalid UTF-8: 0xff at byte 6 of the line; save the file as UTF-8",
        "fix the lines, or write the file again",
    ]


def test_only_the_first_20_bad_lines_are_spelled_out(tmp_path):
    (tmp_path / "a.run").write_text("bad\n" * 23)
    lines = error_of(read_run, tmp_path / "a.run")
    assert len(lines) == 22 and lines[20] == "and 3 more"


def test_files_without_lines_are_one_line_of_error(tmp_path):
    (tmp_path / "empty").write_bytes(b"\n\n")
    (line,) = error_of(read_run, tmp_path / "empty")
    assert line.startswith(f"{tmp_path / 'empty'}: is empty; it must hold at least one line of 'qid Q0 ")
    assert error_of(read_run, tmp_path / "none") == [f"{tmp_path / 'none'}: cannot be read: No such file or directory"]
    assert error_of(read_run, tmp_path) == [f"{tmp_path}: cannot be read: Is a directory"]


# ---- passage numbers


def test_docids_are_passage_ids_or_passage_numbers(tmp_path):
    path = tmp_path / "a.run"
    path.write_text("q2 Q0 0 1 1 t\nq1 Q0 m1#3 2 1.5 t\nq1 Q0 1 1 2.5 t\nother Q0 x 1 1 t\n")
    assert run_rankings(path, [make_example("q1"), make_example("q2")]) == [[(1, 2.5), (3, 1.5)], [(0, 1.0)]]


def test_ids_that_are_numbers_are_not_taken_for_passage_numbers():
    class Numbered(Document):
        def passage_id(self, number):
            return str(10 - number)

    example = Example("q", "", Numbered("c", ["a"] * 10), [], None, None, None)
    assert by_passage_number("a.run", {"q": [("9", 1.0)]}, [example]) == [[(1, 1.0)]]
    assert "'0' is none of the 10 passages" in error_of(by_passage_number, "a.run", {"q": [("0", 1.0)]}, [example])[0]


def test_numbers_do_not_name_passages_that_are_in_no_order():
    example = Example("q", "", Document("d", ["a"] * 10, is_ordered=False), [], None, None, None)
    assert "'1' is none of the 10 passages" in error_of(by_passage_number, "a.run", {"q": [("1", 1.0)]}, [example])[0]


def test_examples_without_lines_and_unknown_passages_are_all_named(tmp_path):
    path = tmp_path / "a.run"
    path.write_text("q1 Q0 m1#4 1 4 t\nq1 Q0 m2#0 1 3 t\nq1 Q0 4 1 2 t\nq1 Q0 m1#2 1 1 t\nq1 Q0 2 1 0 t\n")
    lines = error_of(run_rankings, path, [make_example(id) for id in ("q1", "q2", "q3")])
    assert lines[:2] == [f"{path}: no line for example '{id}'" for id in ("q2", "q3")]
    assert "of all splits" in lines[2]
    lines = error_of(run_rankings, path, [make_example("q1")])
    for line, docid in zip(lines, ("m1#4", "m2#0", "4"), strict=False):
        assert line.startswith(f"{path}: query 'q1': '{docid}' is none of the 4 passages")
    assert lines[3] == f"{path}: query 'q1': '2' is there under another name as well"
    assert len(lines) == 5


def test_an_id_that_two_different_examples_have_is_refused(tmp_path):
    path = tmp_path / "a.run"
    path.write_text("1 Q0 0 1 1 t\n")
    assert run_rankings(path, [make_example("1"), make_example("1")]) == [[(0, 1.0)]] * 2  # one file as both splits
    for other in (make_example("1", query="Who?"), make_example("1", doc_id="m2")):
        assert "two different examples have the id '1'" in error_of(run_rankings, path, [make_example("1"), other])[0]


# ---- stage 2


def stage_2(tmp_path, run):
    """Trains one step with `run`; the embedded examples, whose ids are made to differ between the splits, are files."""
    splits = {split: list(sample_records(split, 1)) for split in ("train", "validation")}
    for split, records in splits.items():
        write_jsonl(tmp_path / f"{split}.jsonl", ({**record, "id": f"{split} {record['id']}"} for record in records))
    train, validation = (load_examples(tmp_path / f"{split}.jsonl") for split in splits)
    run = run(train, validation)
    return validation, launch(
        "train_summarize.py", "--output_dir", tmp_path / "run", "--retriever", run, "--top_k", 2,
        "--train_file", tmp_path / "train.jsonl", "--validation_file", tmp_path / "validation.jsonl",
        "--max_train_steps", 1, "--max_new_tokens", 2, "--num_beams", 1,
    )  # fmt: skip


def test_stage_2_reads_the_passages_that_a_run_ranks_first(tmp_path):
    def last_first(train, validation):
        examples = [*train, *validation]
        passages = [range(len(example.document.passages))[::-1] for example in examples]
        write_run(tmp_path / "a.run", examples, [[(number, number) for number in order] for order in passages], "t")
        return tmp_path / "a.run"

    validation, result = stage_2(tmp_path, last_first)
    assert result.returncode == 0, result.stderr
    lines = read_jsonl(tmp_path / "run" / "predictions.validation.jsonl")
    assert len(lines) == len(validation) == 6
    for line, example in zip(lines, validation, strict=True):
        last = len(example.document.passages) - 1
        assert [entry["passage"] for entry in line["passages"]] == [last - 1, last]


def test_stage_2_refuses_a_run_of_one_split_in_words(tmp_path):
    def of_validation(train, validation):
        write_run(tmp_path / "a.run", validation, [[(0, 1.0)]] * len(validation), "t")
        return tmp_path / "a.run"

    _, result = stage_2(tmp_path, of_validation)
    assert result.returncode == 2
    assert result.stderr.count(f"{tmp_path / 'a.run'}: no line for example 'train ") == 6
    assert "a run must rank passages for every example of all splits" in result.stderr
    assert "Traceback" not in result.stderr


def test_stage_2_refuses_a_file_that_is_no_run_in_words(tmp_path):
    _, result = stage_2(tmp_path, lambda train, validation: tmp_path / "train.jsonl")
    assert result.returncode == 2
    assert f"{tmp_path / 'train.jsonl'}:1: " in result.stderr and "'qid Q0 docid rank score tag'" in result.stderr
    assert "Traceback" not in result.stderr
