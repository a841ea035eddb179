"""ROUGE against rouge-score, retrieval metrics against scikit-learn, trec_eval and plain re-computations, isolation."""

import inspect
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import ndcg_score

from utils.data.examples import Document, Example
from utils.data.trec import write_qrels, write_run
from utils.evaluation.retrieval import Retrieval, retrieval_scores, score_rankings
from utils.evaluation.rouge import ROUGE_TYPES, Rouge, rouge_scores

WORDS = "the committee committees agreed agrees to fund funding of two new remote controls . ! ? yellow".split()


def random_text(generator, words):
    return " ".join(generator.choices(WORDS, k=words))


# ---- ROUGE


def test_rouge_of_ascii_text_equals_rouge_score():
    generator = random.Random(1)
    scorer = RougeScorer(ROUGE_TYPES, use_stemmer=True)
    for _ in range(30):
        prediction, reference = (random_text(generator, generator.randint(0, 40)) for _ in range(2))
        # every sentence end of these texts is a mark followed by a space
        lines = [
            text.replace(". ", ".\n").replace("! ", "!\n").replace("? ", "?\n") for text in (reference, prediction)
        ]
        expected = {name: 100 * score.fmeasure for name, score in scorer.score(*lines).items()}
        assert rouge_scores(prediction, reference) == pytest.approx(expected, abs=1e-9)


def test_rouge_by_hand():
    # unigrams: 3 of 4 and of 6; bigrams: 2 of 3 and of 5; the longest common subsequence is the three words
    scores = rouge_scores("the cat sat down", "the cat sat on a mat")
    assert scores == pytest.approx({"rouge1": 60.0, "rouge2": 50.0, "rougeL": 60.0, "rougeLsum": 60.0})


def test_lsum_compares_sentence_by_sentence():
    prediction, reference = "Dogs bark. A cat sat.", "A cat sat. Dogs bark."
    assert rouge_scores(prediction, reference)["rougeLsum"] == pytest.approx(100)
    assert rouge_scores(prediction, reference)["rougeL"] == pytest.approx(60)
    # quotation marks, line breaks and full-width stops end sentences too; a decimal point does not
    assert rouge_scores('He said "dogs bark." A cat sat.', 'A cat sat.\nHe said "dogs bark."')["rougeLsum"] == 100
    assert rouge_scores("犬が吠えた。猫が座った。", "猫が座った。犬が吠えた。")["rougeLsum"] == 100
    assert rouge_scores("b 5.2", "5.2 b")["rougeLsum"] == rouge_scores("b 5.2", "5.2 b")["rougeL"] < 100


def test_several_references_give_the_maximum_of_each_metric():
    prediction = "a b c d"
    references = ["d c b a x", "a b y y y y"]  # the first is better in ROUGE-1, the second in ROUGE-2
    each = [rouge_scores(prediction, reference) for reference in references]
    assert each[0]["rouge1"] > each[1]["rouge1"] and each[0]["rouge2"] < each[1]["rouge2"]
    assert rouge_scores(prediction, references) == {name: max(each[0][name], each[1][name]) for name in ROUGE_TYPES}


@pytest.mark.parametrize("prediction, reference", [("", "a reference"), ("a draft", ""), ("", ""), ("...", "a")])
def test_rouge_without_words_is_zero(prediction, reference):
    assert rouge_scores(prediction, reference) == dict.fromkeys(ROUGE_TYPES, 0.0)


def test_rouge_of_hindi_sentences_without_a_common_word_is_zero():
    assert set(rouge_scores("समिति ने पुरानी चक्की की छत पर चर्चा", "उन्होंने मई में पुल").values()) == {0}


def test_rouge_counts_words_of_other_scripts():
    assert rouge_scores("Совет принял решение", "Совет принял закон")["rouge1"] == pytest.approx(200 / 3)
    assert rouge_scores("el niño", "el nino")["rouge1"] == pytest.approx(50)


def test_rouge_module_is_the_mean_over_examples():
    predictions, references = ["the cat", "", "a dog ran"], ["the cat sat", ["x", "y"], ["no", "a dog ran"]]
    result = Rouge().compute(predictions=predictions, references=references)
    each = [rouge_scores(*texts) for texts in zip(predictions, references, strict=True)]
    assert result == pytest.approx({name: sum(score[name] for score in each) / 3 for name in ROUGE_TYPES})
    lists = Rouge().compute(predictions=predictions, references=references, use_aggregator=False)
    assert lists == {name: [score[name] for score in each] for name in ROUGE_TYPES}


def test_rouge_module_forgets_what_it_has_computed():
    rouge = Rouge()
    assert rouge.compute(predictions=["a b"], references=["a b"])["rouge1"] == 100
    assert rouge.compute(predictions=["x"], references=["a b"])["rouge1"] == 0
    rouge.add(prediction="a b", reference="a b")
    rouge.add_batch(predictions=["x"], references=[["y"]])
    assert rouge.compute()["rouge1"] == 50


def test_rouge_module_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="2 predictions, 1 references"):
        Rouge().compute(predictions=["a", "b"], references=["a"])
    with pytest.raises(ValueError, match="no reference"):
        Rouge().compute(predictions=["a"], references=[[]])
    with pytest.raises(ValueError, match="no predictions"):
        Rouge().compute(predictions=[], references=[])


# ---- retrieval


def random_case(generator):
    passages = generator.randint(1, 30)
    ranking = generator.sample(range(passages), passages)
    evidence = sorted(generator.sample(range(passages), generator.randint(1, passages)))
    passage_words = [generator.randint(1, 300) for _ in range(passages)]
    evidence_words = [generator.randint(0, passage_words[passage]) for passage in evidence]
    return ranking, evidence, passage_words, evidence_words


def test_ndcg_equals_scikit_learn():
    generator = random.Random(2)
    for _ in range(200):
        ranking, evidence, passage_words, _ = random_case(generator)
        if len(ranking) == 1:
            continue  # scikit-learn refuses a single passage
        gains = np.isin(np.arange(len(ranking)), evidence).astype(float)
        ranks = np.empty(len(ranking))
        ranks[ranking] = np.arange(len(ranking))
        expected = 100 * ndcg_score([gains], [-ranks], k=10)
        assert retrieval_scores(ranking, evidence, passage_words)["ndcg@10"] == pytest.approx(expected)


def test_recall_and_mrr_equal_their_definitions():
    generator = random.Random(3)
    for _ in range(200):
        ranking, evidence, passage_words, evidence_words = random_case(generator)
        ranking = ranking[: generator.randint(0, len(ranking))]  # a search may return fewer than k passages
        scores = retrieval_scores(ranking, evidence, passage_words, evidence_words)
        for k in (1, 5, 10, 20):
            assert scores[f"recall@{k}"] == pytest.approx(100 * len(set(ranking[:k]) & set(evidence)) / len(evidence))
        ranks = [position for position, passage in enumerate(ranking, start=1) if passage in evidence]
        assert scores["mrr@10"] == pytest.approx(100 / ranks[0] if ranks and ranks[0] <= 10 else 0)


def test_recall_mrr_and_ndcg_equal_trec_eval_on_the_files_written(tmp_path):
    generator = random.Random(6)
    examples, rankings, scores = [], [], {}
    for number in range(200):
        ranking, evidence, passage_words, _ = random_case(generator)
        ranking = ranking[: generator.randint(1, len(ranking))]
        document = Document(f"d {generator.randint(0, 99)}%", ["a"] * len(passage_words))
        examples.append(Example(f"q {number}", "", document, [], evidence, None, None))
        # ties, differences that float32 does not hold, and plain scores
        values = [generator.choice([0, 1, 1 + 1e-9, generator.gauss(0, 9)]) for _ in ranking]
        rankings.append(list(zip(ranking, sorted(values, reverse=True), strict=True)))
        scores[f"q%20{number}"] = retrieval_scores(ranking, evidence, passage_words)
    write_qrels(tmp_path / "qrels", examples)
    with open(tmp_path / "qrels") as file:
        qrels = pytrec_eval.parse_qrel(file)

    def scores_of_trec_eval(depth, measures):
        write_run(tmp_path / "run", examples, [ranking[:depth] for ranking in rankings], tag="test")
        with open(tmp_path / "run") as file:
            return pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(pytrec_eval.parse_run(file))

    whole = scores_of_trec_eval(None, {"recall.1,5,10,20", "ndcg_cut.10"})
    ten = scores_of_trec_eval(10, {"recip_rank"})  # which knows no cut-off
    assert len(whole) == len(ten) == 200
    for query, ours in scores.items():
        theirs = {f"recall@{k}": whole[query][f"recall_{k}"] for k in (1, 5, 10, 20)}
        theirs |= {"ndcg@10": whole[query]["ndcg_cut_10"], "mrr@10": ten[query]["recip_rank"]}
        assert {name: ours[name] / 100 for name in theirs} == pytest.approx(theirs, abs=1e-6)


def test_gold_words_equal_a_count_word_by_word():
    generator = random.Random(4)
    for _ in range(100):
        ranking, evidence, passage_words, evidence_words = random_case(generator)
        gold = dict(zip(evidence, evidence_words, strict=True))
        # every word of a passage carries the same part of its gold words
        text = [
            gold.get(passage, 0) / passage_words[passage] for passage in ranking for _ in range(passage_words[passage])
        ]
        for budget in (1, 100, 1024):
            scores = retrieval_scores(ranking, evidence, passage_words, evidence_words, word_budget=budget)
            expected = 100 * sum(text[:budget]) / max(sum(evidence_words), 1)
            assert scores[f"gold_words@{budget}"] == pytest.approx(expected)


def test_retrieval_by_hand():
    scores = retrieval_scores([4, 0, 2, 1, 3], [0, 3], [200, 200, 100, 50, 300], [80, 50], word_budget=400)
    assert scores["recall@1"] == 0 and scores["recall@5"] == 100 and scores["mrr@10"] == 50
    # gains at ranks 2 and 5, at best 1 and 2
    assert scores["ndcg@10"] == pytest.approx(100 * (1 / np.log2(3) + 1 / np.log2(6)) / (1 + 1 / np.log2(3)))
    # 300 words of passage 4, then the first 100 of the 200 of passage 0, with half of its 80 gold words
    assert scores["gold_words@400"] == pytest.approx(100 * 40 / 130)


def test_letters_of_a_script_without_spaces_are_gold_words():
    document = Document("d", ["修" * 1000, "好" * 100])
    example = Example("e", "", document, ["s"], [1], [100], None)
    assert score_rankings([example], [[(0, 1.0), (1, 0.5)]], [[1]])["gold_words@1024"] == pytest.approx(24)


def test_evidence_counts_whole_without_gold_words():
    assert retrieval_scores([1, 0], [0, 1], [30, 10], word_budget=20)["gold_words@20"] == pytest.approx(50)


def test_retrieval_module_is_the_mean_over_examples_with_evidence():
    generator = random.Random(5)
    cases = [random_case(generator) for _ in range(6)]
    each = [retrieval_scores(*case) for case in cases]
    columns = [list(column) for column in zip(*cases, strict=True)]
    for column, missing in zip(columns, ([0, 1], None, [5, 5], None), strict=True):
        column.insert(3, missing)
    columns[1].append([])
    for column in (columns[0], columns[2], columns[3]):
        column.append([0])
    names = ("predictions", "references", "passage_words", "evidence_words")
    result = Retrieval().compute(**dict(zip(names, columns, strict=True)))
    assert result.pop("examples") == 6
    assert result == pytest.approx({name: sum(score[name] for score in each) / 6 for name in each[0]})
    assert list(result) == [
        "recall@1", "recall@5", "recall@10", "recall@20", "recall@100", "mrr@10", "ndcg@10", "gold_words@1024",
    ]  # fmt: skip


def test_rankings_of_examples_are_scored_by_their_documents_words():
    generator = random.Random(6)
    examples, rankings, expected = [], [], []
    for number in range(5):
        ranking, evidence, passage_words, evidence_words = random_case(generator)
        document = Document(f"d{number}", [" ".join(["word"] * count) for count in passage_words])
        examples.append(Example(f"e{number}", "", document, ["s"], list(evidence), list(evidence_words), None))
        rankings.append([(passage, -float(place)) for place, passage in enumerate(ranking)])
        expected.append(retrieval_scores(ranking, evidence, passage_words, evidence_words))
    gold = [example.evidence for example in examples]
    result = score_rankings(examples, rankings, gold)
    assert result.pop("examples") == 5
    assert result == pytest.approx({name: sum(score[name] for score in expected) / 5 for name in expected[0]})
    assert score_rankings(examples, rankings, [gold[0], None, None, None, None])["examples"] == 1
    twice = [rankings[0] + rankings[0][:1], *rankings[1:]]
    with pytest.raises(ValueError, match="a ranking names a passage twice"):
        score_rankings(examples, twice, gold)


def test_retrieval_module_takes_other_cutoffs():
    one = {"predictions": [[1, 0]], "references": [[0]], "passage_words": [[9, 9]], "evidence_words": [None]}
    result = Retrieval().compute(**one, recall_cutoffs=(2,), rank_cutoff=1, word_budget=12)
    assert result == pytest.approx({"recall@2": 100, "mrr@1": 0, "ndcg@1": 0, "gold_words@12": 100 / 3, "examples": 1})


def test_retrieval_module_without_any_evidence_counts_zero_examples():
    assert Retrieval().compute(predictions=[[0]], references=[None], passage_words=[[5]], evidence_words=[None]) == {
        "examples": 0
    }


def test_retrieval_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="twice"):
        retrieval_scores([0, 0], [0], [5, 5])
    with pytest.raises(ValueError, match="without evidence"):
        retrieval_scores([0], [], [5])
    with pytest.raises(ValueError, match="1 evidence_words for 2"):
        retrieval_scores([0], [0, 1], [5, 5], [5])
    with pytest.raises(ValueError, match="1 predictions, 2 references"):
        Retrieval().compute(predictions=[[0]], references=[[0], [0]], passage_words=[[5]], evidence_words=[None])


# ---- isolation


def compute_repeatedly(share):
    for _ in range(20):
        first, second = Rouge(), Rouge()
        first.add_batch(predictions=["a b"] * share, references=["a b"] * share)
        second.add_batch(predictions=["x"], references=["y"])
        first.add_batch(predictions=["x"] * (10 - share), references=["y"] * (10 - share))
        assert first.compute()["rouge1"] == 10 * share
        assert second.compute()["rouge1"] == 0
        zeros, fives = [[0]] * share, [[5]] * share
        found = Retrieval().compute(predictions=zeros, references=zeros, passage_words=fives, evidence_words=fives)
        assert found["examples"] == share and found["recall@1"] == 100


OTHER_PROCESS = f"""
import socket, sys

def refuse(*args, **kwargs):
    raise OSError("no network in this test")

socket.socket.connect = socket.getaddrinfo = refuse
from utils.evaluation.retrieval import Retrieval
from utils.evaluation.rouge import Rouge

{inspect.getsource(compute_repeatedly)}
print("ready", flush=True)
sys.stdin.readline()
compute_repeatedly(3)
print("right")
"""


def test_two_processes_at_once_do_not_meet_nor_need_home_or_network(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    nowhere = str(tmp_path / "file" / "home")  # cannot be created, not even by root
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HOME": nowhere, "HF_HOME": nowhere, "XDG_CACHE_HOME": nowhere, "TMPDIR": str(folder)}
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_PROCESS],
        cwd=Path(__file__).parents[2],
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    other.stdout.readline()  # it has imported: now both start together
    other.stdin.write("\n")
    other.stdin.flush()
    compute_repeatedly(8)
    output, errors = other.communicate(timeout=60)
    assert output == "right\n", errors
    assert list(folder.iterdir()) == []
