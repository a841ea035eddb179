"""Comparing two rankings: the bootstrap against plain re-computations and formulas, and the command as users run it."""

import dataclasses
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, one_hop

from utils.data.examples import Document, Example, Hop
from utils.data.hand_over import hops_record, write_retrieved
from utils.data.trec import write_qrels, write_run
from utils.errors import DataError, UsageError
from utils.evaluation.compare import main
from utils.evaluation.intervals import bootstrap_means
from utils.evaluation.retrieval import retrieval_scores
from utils.evaluation.rouge import rouge_scores
from utils.files import write_jsonl
from utils.retrieval.bm25 import bm25_rankings

# ---- the bootstrap


def test_the_bootstrap_equals_one_that_draws_lists_of_queries():
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(40, 3))
    groups = generator.choice(list("abcdefg"), size=40).tolist()
    members = [[query for query in range(40) if groups[query] == group] for group in dict.fromkeys(groups)]
    rng = np.random.default_rng(5)
    expected = []
    for _ in range(200):
        queries = [query for group in rng.integers(len(members), size=len(members)) for query in members[group]]
        expected.append(np.mean([scores[query] for query in queries], axis=0))
    assert bootstrap_means(scores, groups, draws=200, seed=5) == pytest.approx(np.array(expected), abs=1e-12)


def test_the_memory_at_once_makes_no_difference(monkeypatch):
    scores, groups = np.random.default_rng(2).normal(size=(30, 1)), list(range(30))
    at_once = bootstrap_means(scores, groups, draws=500)
    monkeypatch.setattr("utils.evaluation.intervals.DRAWN_AT_ONCE", 30 * 7)
    assert np.array_equal(bootstrap_means(scores, groups, draws=500), at_once)


def interval(scores, groups):
    return np.percentile(bootstrap_means(scores, groups), [2.5, 97.5], axis=0)


def test_an_interval_of_independent_queries_is_that_of_the_normal_approximation():
    scores = np.random.default_rng(3).normal(50, 20, size=(400, 1))
    low, high = interval(scores, range(400))[:, 0]
    half = 1.96 * scores.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((scores.mean() - half, scores.mean() + half), abs=0.1 * half)


def test_queries_about_one_document_are_drawn_together():
    of_documents = np.random.default_rng(4).normal(50, 20, size=50)
    scores = np.repeat(of_documents, 9)[:, None]  # nine times the queries, and not one bit of news
    low, high = interval(scores, np.repeat(np.arange(50), 9).tolist())[:, 0]
    half = 1.96 * of_documents.std() / np.sqrt(50)
    assert high - low == pytest.approx(2 * half, rel=0.1)
    low, high = interval(scores, range(450))[:, 0]
    assert high - low == pytest.approx(2 * half / 3, rel=0.1)


def test_documents_with_more_queries_weigh_more():
    scores = np.array([[0.0]] * 9 + [[100.0]])
    means = bootstrap_means(scores, ["a"] * 9 + ["b"], draws=1000)
    assert {round(mean) for mean in means[:, 0]} == {0, 10, 100}


def test_a_constant_difference_has_no_width_however_wide_both_sides_are():
    first = np.random.default_rng(6).normal(0, 30, size=100)
    (low, high) = interval(np.stack([first, first - 1, np.ones(100)], axis=1), range(100))
    assert (high - low)[0] > 5 and (high - low)[2] == pytest.approx(0, abs=1e-9)


# ---- the command

WORDS = [f"{a}{b}" for a in "bdfgkl" for b in ("an", "el", "it", "or", "um")]


def make_examples(documents=6, questions=4, passages=12) -> tuple[list[Example], list]:
    """Questions of words from their evidence and elsewhere, and rankings that find it better than chance."""
    generator = random.Random(7)
    examples, rankings = [], []
    for number in range(documents):
        texts = [" ".join(generator.choices(WORDS, k=generator.randint(20, 200))) for _ in range(passages)]
        document = Document(f"m{number}", texts)
        for question in range(questions):
            evidence = sorted(generator.sample(range(passages), generator.randint(1, 3)))
            query = " ".join(generator.choices(texts[evidence[0]].split(), k=3) + generator.choices(WORDS, k=2))
            words = [generator.randint(1, len(texts[passage].split())) for passage in evidence]
            examples.append(Example(f"m{number}.q{question}", query, document, ["s"], evidence, words, None))
            scores = {p: round(generator.random() + 0.3 * (p in evidence), 6) for p in range(passages)}
            rankings.append(sorted(scores.items(), key=lambda pair: -pair[1])[:10])
    return examples, rankings


@pytest.fixture
def files(tmp_path):
    """The same ranking as a hand-over file and as a run, BM25's as a run, and the evidence."""
    examples, rankings = make_examples()
    unmarked = dataclasses.replace(examples[0], id="unmarked", evidence=None, evidence_words=None)
    write_retrieved(tmp_path / "ours.jsonl", [unmarked, *examples], one_hop([rankings[0], *rankings]))
    write_run(tmp_path / "ours.run", examples, rankings, tag="ours")
    write_run(tmp_path / "bm25.run", examples, bm25_rankings(examples), tag="bm25")
    write_qrels(tmp_path / "qrels", examples)
    return tmp_path


def printed(capsys, *arguments) -> list[str]:
    main([*map(str, arguments)])
    return capsys.readouterr().out.splitlines()


def numbers(line) -> list[float]:
    """Mean, low and high end of a row."""
    return [float(number) for number in re.search(r"(-?[\d.]+)  \[(-?[\d.]+), (-?[\d.]+)\]", line).groups()]


def scores_of(examples, rankings, metric, **options):
    return np.array([
        retrieval_scores([passage for passage, _ in ranking], example.evidence,
                         [len(text.split()) for text in example.document.passages], example.evidence_words,
                         **options)[metric]
        for example, ranking in zip(examples, rankings, strict=True)
    ])  # fmt: skip


def test_a_hand_over_file_beside_bm25_as_users_run_it(files):
    result = subprocess.run(
        [sys.executable, "-m", "utils.evaluation.compare", files / "ours.jsonl", "bm25", "--draws", "2000"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    head, first, second, difference, counts = result.stdout.splitlines()
    assert head == "gold_words@1024, 24 queries about 6 documents, drawn by document, 2,000 draws"
    examples, rankings = make_examples()
    cut = [ranking[:10] for ranking in bm25_rankings(examples)]  # as the file's are
    ours, bm25 = (scores_of(examples, ranked, "gold_words@1024") for ranked in (rankings, cut))
    # lists of queries, as many documents as there are
    rng = np.random.default_rng(42)
    draws = [np.concatenate([np.arange(4 * d, 4 * d + 4) for d in rng.integers(6, size=6)]) for _ in range(2000)]
    for line, scores in ((first, ours), (second, bm25), (difference, ours - bm25)):
        ends = np.percentile([scores[draw].mean() for draw in draws], [2.5, 97.5])
        assert numbers(line) == pytest.approx([scores.mean(), *ends], abs=0.00501)
    assert first.startswith("A ") and first.endswith("ours.jsonl") and second.endswith("bm25")
    better, worse = (ours > bm25).sum(), (ours < bm25).sum()
    assert better and worse
    assert counts == f"A is better on {better} queries, equal on {24 - better - worse}, worse on {worse}"


def test_misuse_as_users_meet_it_is_one_line_and_exit_code_2(files):
    for arguments, message in (
        ([files / "ours.jsonl", "--metrics", "x"], "unrecognized arguments: --metrics"),
        ([files / "none.jsonl", "bm25"], "none.jsonl: no such file or folder"),
    ):
        command = [sys.executable, "-m", "utils.evaluation.compare", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2
        assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.jsonl", "--metric", "recall"], "recall@5"),
        (["a.jsonl", "--metric", "recall@0"], "recall@5"),
        (["a.jsonl", "--metric", "map"], "recall@5"),
        (["a.jsonl", "--draws", "0"], "--draws of 1 or more"),
        (["a.jsonl", "--draws", "many"], "invalid int value: 'many'"),
        (["bm25"], "bm25 ranks the passages of a hand-over file"),
        (["bm25", "a.run", "--metric", "mrr@10", "--qrels", "q"], "bm25 ranks the passages of a hand-over file"),
        (["a.run", "b.run", "--qrels", "q"], "gold_words@1024 counts words of passages"),
        (["a.run", "b.run", "--metric", "mrr@10"], "give --qrels"),
        (["a.jsonl", "--language", "de"], "--language de has no effect without bm25"),
        ([], "required: A"),
    ],
)
def test_misuse_is_refused_with_the_remedy(capsys, arguments, message):
    with pytest.raises(SystemExit) as raised:
        main(arguments)
    assert raised.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("metric", ["recall@3", "mrr@7", "ndcg@20", "gold_words@300"])
def test_a_run_scores_as_the_hand_over_file_that_it_was_made_from(files, capsys, metric):
    option = {"recall@3": {"recall_cutoffs": [3]}, "gold_words@300": {"word_budget": 300}}
    expected = scores_of(*make_examples(), metric, **option.get(metric, {"rank_cutoff": int(metric.split("@")[1])}))
    lines = printed(capsys, files / "ours.jsonl", files / "ours.run", "--metric", metric, "--draws", 10)
    assert [numbers(line)[0] for line in lines[1:4]] == pytest.approx([expected.mean()] * 2 + [0], abs=0.00501)
    assert lines[4] == "A is better on 0 queries, equal on 24, worse on 0"
    swapped = printed(capsys, files / "ours.run", files / "ours.jsonl", "--metric", metric, "--draws", 10)
    assert [numbers(line) for line in swapped[1:4]] == [numbers(line) for line in lines[1:4]]


def test_one_side_alone_has_its_mean_and_interval(files, capsys):
    both = printed(capsys, files / "ours.jsonl", "bm25")
    assert printed(capsys, files / "ours.jsonl") == both[:2]


def test_two_runs_with_qrels_draw_queries_and_grades_above_0_are_evidence(files, capsys):
    arguments = (files / "ours.run", files / "bm25.run", "--metric", "ndcg@10", "--qrels", files / "qrels")
    lines = printed(capsys, *arguments)
    assert lines[0] == "ndcg@10, 24 queries drawn one by one, 10,000 draws"
    by_document = printed(capsys, files / "ours.jsonl", "bm25", "--metric", "ndcg@10")
    assert [numbers(line)[0] for line in lines[1:4]] == [numbers(line)[0] for line in by_document[1:4]]
    assert lines[4] == by_document[4]
    with open(files / "qrels", "a") as file:
        file.write("m0.q0 0 m5#0 0\nnobody 0 m0#1 0\n")  # judged, and no evidence
    assert printed(capsys, *arguments) == lines


def test_qrels_replace_the_evidence_of_a_hand_over_file(files, capsys):
    examples, rankings = make_examples()
    others = [dataclasses.replace(example, evidence=[0], evidence_words=None) for example in examples[:20]]
    write_qrels(files / "others", others)
    lines = printed(capsys, files / "ours.jsonl", files / "ours.run", "--qrels", files / "others")
    assert lines[0].startswith("gold_words@1024, 20 queries about 5 documents")
    expected = scores_of(others, rankings[:20], "gold_words@1024").mean()
    assert [numbers(line)[0] for line in lines[1:3]] == pytest.approx([expected] * 2, abs=0.00501)


def test_queries_that_a_run_lacks_score_0_and_are_counted(files, capsys):
    lines = (files / "ours.run").read_text().splitlines(keepends=True)
    (files / "half.run").write_text("".join(line for line in lines if not line.startswith(("m0.q0 ", "m3.q1 "))))
    for evidence in ([], ["--qrels", files / "qrels"]):
        other = files / ("ours.run" if evidence else "ours.jsonl")
        found = printed(capsys, other, files / "half.run", "--metric", "recall@10", *evidence)
        assert found[0] == f"2 of 24 queries have no line in {files / 'half.run'} and score 0 there"
        scores = scores_of(*make_examples(), "recall@10")
        scores[[0, 13]] = 0
        assert numbers(found[3])[0] == pytest.approx(scores.mean(), abs=0.00501)


def test_hand_over_files_of_other_passages_keep_their_own_evidence(files, capsys):
    examples, _ = make_examples()
    halves = []
    for example in examples[2:]:  # each passage cut in two
        texts = [text.split() for text in example.document.passages]
        cut = [" ".join(part) for words in texts for part in (words[:10], words[10:])]
        evidence = [2 * passage + part for passage in example.evidence for part in (0, 1)]
        document = Document(f"{example.document.id} cut", cut)
        halves.append(
            dataclasses.replace(example, document=document, evidence=evidence, evidence_words=[1] * len(evidence))
        )
    perfect = [[(passage, -passage) for passage in example.evidence] for example in halves]
    write_retrieved(files / "halves.jsonl", halves, one_hop(perfect))
    lines = printed(capsys, files / "ours.jsonl", files / "halves.jsonl", "--metric", "recall@10")
    assert lines[0] == "2 queries are on one side only and left out"
    assert lines[1].startswith("recall@10, 22 queries about 6 documents")
    assert numbers(lines[3]) == [100, 100, 100]


def test_queries_of_one_collection_are_drawn_one_by_one(tmp_path, capsys):
    examples, rankings = make_examples(documents=1)
    write_retrieved(tmp_path / "one.jsonl", examples, one_hop(rankings))
    lines = printed(capsys, tmp_path / "one.jsonl", "--metric", "recall@2")
    assert "4 queries drawn one by one" in lines[0]
    mean, low, high = numbers(lines[1])
    assert low < mean < high


def test_sides_that_do_not_belong_together_are_refused_in_words(files):
    examples, rankings = make_examples()
    renamed = [dataclasses.replace(example, id=f"x{number}") for number, example in enumerate(examples)]
    write_run(files / "other.run", renamed, rankings, tag="t")
    write_retrieved(files / "other.jsonl", renamed, one_hop(rankings))
    unmarked = [dataclasses.replace(example, evidence=None, evidence_words=None) for example in examples]
    write_retrieved(files / "unmarked.jsonl", unmarked, one_hop(rankings))
    asked = [dataclasses.replace(example, query="Other?") for example in examples]
    write_retrieved(files / "asked.jsonl", asked, one_hop(rankings))
    (files / "plain.jsonl").write_text('{"id": "p", "passages": ["a"], "evidence": [0]}\n')
    for sides, message in (
        (["ours.jsonl", "other.run"], "other.run: no line for any query with evidence"),
        (["ours.jsonl", "other.jsonl"], "have no query with evidence in common"),
        (["ours.jsonl", "asked.jsonl"], f"'{examples[0].id}' is another example there; compare files of the same data"),
        (["unmarked.jsonl"], "no evidence for an example of .*; give evidence with --qrels"),
        (["plain.jsonl"], "example 'p' has no 'retrieved'"),
        (["ours.jsonl", "none.run"], "none.run: cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            main([str(files / side) for side in sides])


def test_bm25_is_not_scored_on_what_was_found_in_a_corpus(files):
    path = files / "corpus.jsonl"
    write_jsonl(path, [{"id": "q", "query": "who?", "passages": ["a"], "passage_ids": ["d7"], "evidence": [0],
                        "retrieved": [{"passage": 0, "score": 1.0}]}])  # fmt: skip
    with pytest.raises(UsageError, match="holds only what was found in a corpus, which bm25 cannot rank fairly"):
        main([str(path), "bm25"])
    main([str(path)])


def test_a_hop_of_a_file_is_compared_by_its_ranking_and_by_its_draft(tmp_path, capsys):
    examples, rankings = make_examples()
    hops, records = [], []
    for number, (example, ranking) in enumerate(zip(examples, rankings, strict=True)):
        first, second = Hop("one word", [0], ranking[::-1]), Hop("two", [1], ranking)
        hops.append([first, second] if number else [second])  # the search for the first ended after one hop
        records.append(hops_record(example, hops[-1], "the end"))
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, records)
    of_first = [of_example[0].retrieved for of_example in hops]
    for metric, option in (("recall@3", {"recall_cutoffs": (3,)}), ("map@8", {"map_cutoff": 8})):
        one, two = (scores_of(examples, each, metric, **option).mean() for each in (of_first, rankings))
        lines = printed(capsys, f"{path}#1", f"{path}#2", "--metric", metric, "--draws", 20)
        assert [numbers(line)[0] for line in lines[1:4]] == pytest.approx([one, two, one - two], abs=0.006)
        assert lines[1].endswith("predictions.jsonl#1")
        assert numbers(printed(capsys, path, "--metric", metric, "--draws", 20)[1])[0] == pytest.approx(two, abs=0.006)
    lines = printed(capsys, f"{path}#1", f"{path}#2", "--metric", "rouge1", "--draws", 20)
    of_texts = [rouge_scores(text, ["s"])["rouge1"] for text in ("one word", "the end")]
    assert [numbers(line)[0] for line in lines[1:3]] == pytest.approx(of_texts, abs=0.006)


def test_map_is_the_mean_precision_at_the_ranks_of_the_evidence():
    case = ([4, 1, 3, 0, 2], [1, 0, 9], [1] * 10)  # found at ranks 2 and 4, and one not at all
    assert retrieval_scores(*case, map_cutoff=5)["map@5"] == pytest.approx(100 * (1 / 2 + 2 / 4) / 3)
    assert retrieval_scores(*case, map_cutoff=3)["map@3"] == pytest.approx(100 * (1 / 2) / 3)
    assert "map" not in " ".join(retrieval_scores(*case))


# ---- summaries


def test_summaries_are_compared_by_rouge_with_documents_drawn_whole(tmp_path, capsys):
    texts = {"a": ["the mill was sold", "a bridge in town", "no"], "b": ["the mill", "a bridge in town", "in town"]}
    references = [["the mill was sold in May", "sold"], ["a bridge"], []]
    for side, predictions in texts.items():
        write_jsonl(tmp_path / f"{side}.jsonl", (
            {"id": str(number), "prediction": text, "summary": summaries}
            | ({"doc_id": f"d{number}"} if side == "b" else {})  # older files are without
            for number, (text, summaries) in enumerate(zip(predictions, references, strict=True))))  # fmt: skip
    main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--metric", "rouge1", "--draws", "50"])
    printed = capsys.readouterr().out
    of_each = {side: [rouge_scores(*case)["rouge1"] for case in zip(texts[side][:2], references[:2], strict=True)]
               for side in texts}  # fmt: skip
    assert "rouge1, 2 queries about 2 documents, drawn by document" in printed  # the third has no reference
    for name, column in (("A ", of_each["a"]), ("B ", of_each["b"]), ("A - B", np.subtract(*of_each.values()))):
        assert re.search(rf"^{name} *{np.mean(column):.2f} ", printed, re.M)

    write_jsonl(tmp_path / "b.jsonl", [{"id": "0", "prediction": "x", "summary": "another reference"}])
    with pytest.raises(DataError, match="'0' is another example there"):
        main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--metric", "rouge1"])
    write_jsonl(tmp_path / "b.jsonl", [{"id": "0", "query": "who?", "prediction": "x", "summary": references[0]}])
    main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--metric", "rouge1"])  # the other has no question
    (tmp_path / "b.jsonl").write_text('{"id": "0", "summary": "x"}\n')
    with pytest.raises(DataError, match=r"b\.jsonl:1: .*'prediction'"):
        main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl"), "--metric", "rouge1"])
    with pytest.raises(SystemExit):
        main([str(tmp_path / "a.jsonl"), "bm25", "--metric", "rouge1"])
    assert "--metric rouge1 compares predictions" in capsys.readouterr().err
