"""retrieve_and_summarize.py as users run it: files, one document, restarts, two processes, training on its output."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess

import numpy as np
import pytest
from conftest import OFFLINE, ROOT, command, events, kill_all, launch, read_jsonl, wait_until

from utils.data.examples import Document, Example, Hop
from utils.data.hand_over import hops_record
from utils.data.loading import load_examples
from utils.data.sample import sample_records
from utils.evaluation.hops import score_hop
from utils.evaluation.retrieval import retrieval_scores
from utils.evaluation.rouge import rouge_scores
from utils.files import write_jsonl
from utils.models.settings import saved_settings
from utils.retrieval.dense import retriever_rankings

SCRIPT = "retrieve_and_summarize.py"


@pytest.fixture(scope="module")
def hops(smoke, tmp_path_factory):
    """Three hops over 24 validation examples, and the flags."""
    folder = tmp_path_factory.mktemp("hops")
    flags = ["--retriever", smoke["retrieve"], "--summarizer", smoke["summarize"], "--num_hops", 3, "--num_beams", 2,
             "--max_new_tokens", 16, "--max_examples", 24, "--per_device_eval_batch_size", 6]  # fmt: skip
    result = launch(SCRIPT, "--output_dir", folder, *flags)
    assert result.returncode == 0, result.stderr
    return {"folder": folder, "flags": flags, "printed": result.stdout}


def test_every_hop_is_written_out_and_brings_something_new(hops):
    records = read_jsonl(hops["folder"] / "predictions.validation.jsonl")
    assert [record["id"] for record in records] == [record["id"] for record in sample_records("validation", 4)]
    assert any(len(record["hops"]) > 1 for record in records)
    for record in records:
        assert record["prediction"] == record["hops"][-1]["draft"]
        assert record["retrieved"] == record["hops"][-1]["retrieved"]
        read = [set(hop["read"]) for hop in record["hops"]]
        assert all(later != earlier for earlier, later in itertools.pairwise(read))
        for hop in record["hops"]:
            assert hop["read"] == [entry["passage"] for entry in hop["retrieved"][:5]]


def test_scores_by_hop_are_those_of_what_was_written(hops):
    examples = load_examples(hops["folder"] / "predictions.validation.jsonl")
    rows = json.loads((hops["folder"] / "hops.validation.json").read_text())
    for row in rows:
        last = [example.hops[: row["hop"]][-1] for example in examples]
        recalls, rouges = [], []
        for example, hop in zip(examples, last, strict=True):
            words = [len(text.split()) for text in example.document.passages]
            ranking = [passage for passage, _ in hop.retrieved]
            recalls.append(retrieval_scores(ranking, example.evidence, words)["recall@5"])
            rouges.append(rouge_scores(hop.draft, example.summaries)["rougeL"])
        assert row["recall@5"] == pytest.approx(np.mean(recalls))
        assert row["rougeL"] == pytest.approx(np.mean(rouges))
        assert f"hop {row['hop']}" in hops["printed"]
        missed = [set(example.evidence) - set(example.hops[0].read) for example in examples]
        found = sum(len(new & set(hop.read)) for new, hop in zip(missed, last, strict=True))
        expected = 100 * found / sum(map(len, missed)) if row["hop"] > 1 else None
        assert row.get("new_evidence") == pytest.approx(expected)
    # a document's passages are encoded at the first hop only, and those whose search is over are not read again
    assert rows[0]["examples"] == 24 >= rows[1]["examples"]
    assert rows[0]["encoder_tokens"] > 2 * rows[1]["encoder_tokens"] > 0
    assert rows[0]["source_tokens"] > 0 and rows[0]["generated_tokens"] > 0


def test_rouge_is_of_the_examples_that_have_a_reference():
    document = Document("d", ["They chose red.", "Nobody spoke."])
    examples = [Example(str(number), "q", document, summaries, None, None, None)
                for number, summaries in enumerate((["They chose red."], [], ["Blue."]))]  # fmt: skip
    hop = Hop("They chose red.", [0], [(0, 1.0)])
    records = [hops_record(example, [hop], hop.draft) for example in examples]
    scores = score_hop(records, 1)
    assert scores["with_reference"] == 2 and scores["rougeL"] == pytest.approx(50)
    assert "with_reference" not in score_hop([records[0]] * 3, 1)
    assert score_hop([records[1]] * 3, 1) == {}


def test_two_processes_write_the_same_file_as_one(hops, tmp_path):
    result = launch(SCRIPT, "--output_dir", tmp_path, *hops["flags"], processes=2)
    assert result.returncode == 0, result.stderr
    one, two = (read_jsonl(folder / "predictions.validation.jsonl") for folder in (hops["folder"], tmp_path))
    for a, b in zip(one, two, strict=True):
        assert [hop["draft"] for hop in a["hops"]] == [hop["draft"] for hop in b["hops"]]
        assert [hop["read"] for hop in a["hops"]] == [hop["read"] for hop in b["hops"]]


def test_what_was_done_before_an_interruption_is_not_done_again(hops, tmp_path):
    flags = ["--output_dir", tmp_path, *hops["flags"]]
    process = subprocess.Popen(command(SCRIPT, flags, 1), env={**os.environ, **OFFLINE}, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while process.poll() is None and not list(tmp_path.glob("parts.validation.*/0.jsonl")):
        pass
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "run the same command again to resume" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "predictions.validation.jsonl").exists()
    (first,) = tmp_path.glob("parts.validation.*/0.jsonl")
    made = first.stat().st_mtime_ns
    result = launch(SCRIPT, *flags)
    assert result.returncode == 0, result.stderr
    assert "of 4 parts were done before" in result.stdout
    assert first.stat().st_mtime_ns == made
    ours, theirs = ((folder / "predictions.validation.jsonl").read_text() for folder in (tmp_path, hops["folder"]))
    assert ours == theirs


def test_other_flags_start_anew(hops, tmp_path):
    flags = ["--retriever", "bm25", "--summarizer", hops["flags"][3], "--output_dir", tmp_path, "--max_examples", 6,
             "--num_hops", 1, "--max_new_tokens", 4, "--num_beams", 1]  # fmt: skip
    assert launch(SCRIPT, *flags).returncode == 0
    (before,) = tmp_path.glob("parts.*")
    result = launch(SCRIPT, *flags, "--top_k", 2)
    assert result.returncode == 0 and "done before" not in result.stdout
    (after,) = tmp_path.glob("parts.*")
    assert before != after
    records = read_jsonl(tmp_path / "predictions.validation.jsonl")
    assert [len(record["hops"][0]["read"]) for record in records] == [2] * 6

    # read is what fits into the source; a search goes on while other passages are offered, whether they fit or not
    result = launch(SCRIPT, *flags, "--num_hops", 2, "--max_source_length", 64)
    assert result.returncode == 0, result.stderr
    records = read_jsonl(tmp_path / "predictions.validation.jsonl")
    left_out = 0
    for record in records:
        for hop in record["hops"]:
            best = [entry["passage"] for entry in hop["retrieved"][:5]]
            assert hop["read"] == best[: len(hop["read"])] and len(hop["read"]) > 0
            left_out += 5 - len(hop["read"])
    passages = 5 * sum(len(record["hops"]) for record in records)
    assert left_out and f"of their {passages} passages, {left_out} are left out" in result.stdout


def test_edited_code_starts_anew(hops, tmp_path):
    shutil.copytree(ROOT / "utils", tmp_path / "code/utils")
    script = shutil.copy(ROOT / SCRIPT, tmp_path / "code")
    flags = ["--retriever", "bm25", "--summarizer", "extract", "--drafter", hops["flags"][1], "--max_examples", 6,
             "--output_dir", tmp_path / "run"]  # fmt: skip
    assert launch(script, *flags).returncode == 0
    assert "1 of 1 parts were done before" in launch(script, *flags).stdout
    before = read_jsonl(tmp_path / "run/predictions.validation.jsonl")
    file = tmp_path / "code/utils/retrieval/ranking.py"
    file.write_text(file.read_text() + "\n\ndef search_text(query, draft):\n    return draft or query\n")
    result = launch(script, *flags)
    assert result.returncode == 0 and "done before" not in result.stdout
    assert read_jsonl(tmp_path / "run/predictions.validation.jsonl") != before


def test_both_stages_read_what_the_hops_wrote(hops, tmp_path):
    written = hops["folder"] / "predictions.validation.jsonl"
    files = ["--train_file", written, "--validation_file", written]
    result = launch("train_retrieve.py", "--output_dir", tmp_path / "r", *files, "--drafts_file", written,
                    "--validation_drafts_file", written, "--num_train_epochs", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert events(tmp_path / "r", "validation")[-1]["hop2"]["recall@5"] > 0
    assert "hop 2, given drafts" in result.stdout
    result = launch("train_summarize.py", "--output_dir", tmp_path / "s", *files, "--num_train_epochs", 1,
                    "--max_new_tokens", 4, "--num_beams", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line, record in zip(read_jsonl(tmp_path / "s" / "predictions.validation.jsonl"), read_jsonl(written),
                            strict=True):  # fmt: skip
        assert sorted(record["hops"][-1]["read"]) == [entry["passage"] for entry in line["passages"]]


# ---- a corpus


@pytest.fixture(scope="module")
def corpus(smoke, tmp_path_factory):
    """The same passages as a corpus and as one document, 24 questions to each, and flags of hops over both."""
    folder = tmp_path_factory.mktemp("corpus")
    first, passages, queries, examples = {}, [], [], []  # numbers of the first passage of each transcript
    for record in sample_records("validation", 4):
        if record["doc_id"] not in first:
            first[record["doc_id"]] = len(passages)
            # a word that all have: BM25 leaves out passages of a corpus that share no word with the question
            passages += [f"{passage} (minutes)" for passage in record["passages"]]
        gold = [first[record["doc_id"]] + number for number in record["evidence"]]
        query = {"id": record["id"], "query": f"{record['query']} (minutes)", "summary": record["summary"]}
        queries.append(query | {"evidence": [f"p{number}" for number in gold]})
        examples.append(query | {"passages": passages, "evidence": gold})
    write_jsonl(folder / "corpus.jsonl", [{"_id": f"p{n}", "text": text} for n, text in enumerate(passages)])
    write_jsonl(folder / "queries.jsonl", queries)
    write_jsonl(folder / "examples.jsonl", examples)
    flags = ["--num_beams", 1, "--max_new_tokens", 12, "--per_device_eval_batch_size", 6, "--passage_order", "rank"]
    searched = ["--corpus_file", folder / "corpus.jsonl", "--input_file", folder / "queries.jsonl"]
    models = ["--retriever", smoke["retrieve"], "--ranking", "hybrid", "--summarizer", smoke["summarize"]]
    result = launch(SCRIPT, *flags, *searched, *models, "--output_dir", folder / "run")
    assert result.returncode == 0, result.stderr
    return {"folder": folder, "flags": flags, "searched": searched, "models": models}


@pytest.mark.parametrize("ranking", ["bm25", "dense", "hybrid"])
def test_hops_over_a_corpus_are_those_over_a_document_of_the_same_passages(ranking, corpus, smoke, tmp_path):
    models = corpus["models"]
    if ranking == "bm25":
        models = ["--retriever", "bm25", "--summarizer", smoke["summarize"]]
    elif ranking == "dense":
        models = ["--retriever", smoke["retrieve"], "--summarizer", "extract"]
    flags, folder = [*corpus["flags"], *models] if ranking != "dense" else models, corpus["folder"]
    result = launch(SCRIPT, *flags, "--input_file", folder / "examples.jsonl", "--output_dir", tmp_path / "document")
    assert result.returncode == 0, result.stderr
    ours = folder / "run"
    if ranking != "hybrid":
        result = launch(SCRIPT, *flags, *corpus["searched"], "--output_dir", tmp_path / "corpus")
        assert result.returncode == 0, result.stderr
        ours = tmp_path / "corpus"

    records, others = (read_jsonl(run / "predictions.validation.jsonl") for run in (ours, tmp_path / "document"))
    assert any(len(record["hops"]) == 2 for record in records) and len(records) == 24
    for record, other in zip(records, others, strict=True):
        number = [int(key[1:]) for key in record["passage_ids"]]  # in the corpus, and in the document
        assert [other["passages"][passage] for passage in number] == record["passages"]
        assert sorted(number[passage] for passage in record["evidence"]) == other["evidence"]
        assert record["prediction"] == other["prediction"] and record["retrieved"] == record["hops"][-1]["retrieved"]
        for hop, of_document in zip(record["hops"], other["hops"], strict=True):
            assert hop["draft"] == of_document["draft"]
            assert [number[passage] for passage in hop["read"]] == of_document["read"]
            (found, scores), (expected, of_expected) = (
                zip(*((entry["passage"], entry["score"]) for entry in each["retrieved"]), strict=True)
                for each in (hop, of_document)
            )
            assert scores == pytest.approx(of_expected, abs=1e-4)
            score_of = dict(zip(expected, of_expected, strict=True))  # passages with the same score may swap places
            assert [score_of[number[passage]] for passage in found[:20]] == pytest.approx(scores[:20], abs=1e-4)
        named = {entry["passage"] for hop in record["hops"] for entry in hop["retrieved"]}
        assert named | set(record["evidence"]) == set(range(len(record["passages"])))
    rows, expected = (json.loads((run / "hops.validation.json").read_text()) for run in (ours, tmp_path / "document"))
    assert len(rows) == 2
    for row, of_document in zip(rows, expected, strict=True):
        assert {"recall@5", "gold_words@1024", "rougeL"} < row.keys()
        for name in set(row) - {"seconds", "encoder_tokens"}:
            assert row[name] == pytest.approx(of_document[name]), name


def test_two_processes_search_a_corpus_as_one(corpus, tmp_path):
    result = launch(SCRIPT, *corpus["flags"], *corpus["searched"], *corpus["models"], "--output_dir", tmp_path,
                    processes=2)  # fmt: skip
    assert result.returncode == 0, result.stderr
    ours, theirs = (
        read_jsonl(folder / "predictions.validation.jsonl") for folder in (tmp_path, corpus["folder"] / "run")
    )
    for a, b in zip(ours, theirs, strict=True):
        assert [hop["draft"] for hop in a["hops"]] == [hop["draft"] for hop in b["hops"]]
        assert (a["prediction"], a["passage_ids"], a["retrieved"]) == (
            b["prediction"],
            b["passage_ids"],
            b["retrieved"],
        )


def test_a_killed_search_of_a_corpus_goes_on_with_its_vectors_and_its_finished_parts(corpus, tmp_path):
    flags = ["--output_dir", tmp_path, *corpus["flags"], *corpus["searched"], *corpus["models"]]
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(command(SCRIPT, flags, 1), env={**os.environ, **OFFLINE}, stdout=output,
                                   stderr=subprocess.STDOUT)  # fmt: skip
    wait_until(lambda: list(tmp_path.glob("parts.validation.*/0.jsonl")), process, tmp_path)
    kill_all(process)
    assert not (tmp_path / "predictions.validation.jsonl").exists()
    kept = [*tmp_path.glob("parts.validation.*/0.jsonl"), *tmp_path.glob("embeddings/*.npy")]
    made = [file.stat().st_mtime_ns for file in kept]
    result = launch(SCRIPT, *flags)
    assert result.returncode == 0, result.stderr
    assert "of 4 parts were done before" in result.stdout
    assert len(made) == 2 and [file.stat().st_mtime_ns for file in kept] == made
    ours, theirs = (folder / "predictions.validation.jsonl" for folder in (tmp_path, corpus["folder"] / "run"))
    assert ours.read_text() == theirs.read_text()

    # the same flags, but other passages under the same name
    other = shutil.copytree(corpus["folder"], tmp_path / "other")
    flags = [str(flag).replace(str(corpus["folder"]), str(other)) for flag in flags]
    before = launch(SCRIPT, *flags)
    texts = read_jsonl(other / "corpus.jsonl")
    write_jsonl(other / "corpus.jsonl", [*texts[:-1], texts[-1] | {"text": "Rewritten."}])
    after = launch(SCRIPT, *flags)
    assert before.returncode == after.returncode == 0, after.stderr
    assert "were done before" not in after.stdout


def test_both_stages_read_the_hops_over_a_corpus(corpus, tmp_path):
    written = corpus["folder"] / "run" / "predictions.validation.jsonl"
    result = launch("train_summarize.py", "--output_dir", tmp_path / "s", "--train_file", written, "--validation_file",
                    written, "--num_train_epochs", 1, "--max_new_tokens", 4, "--num_beams", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line, record in zip(read_jsonl(tmp_path / "s" / "predictions.validation.jsonl"), read_jsonl(written),
                            strict=True):  # fmt: skip
        assert sorted(record["hops"][-1]["read"]) == [entry["passage"] for entry in line["passages"]]
    queries = corpus["folder"] / "queries.jsonl"
    result = launch("train_retrieve.py", "--output_dir", tmp_path / "r", "--corpus_file",
                    corpus["folder"] / "corpus.jsonl", "--train_file", queries, "--validation_file", queries,
                    "--drafts_file", written, "--validation_drafts_file", written, "--found_weight", 0.1,
                    "--num_train_epochs", 2, "--ranking", "hybrid", "--mine_negatives_every", 1)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "hop 2, given drafts" in result.stdout
    scores = events(tmp_path / "r", "validation")[-1]
    assert scores["hop2"]["recall@5"] > 0 and scores["hop2"] != {name: scores[name] for name in scores["hop2"]}
    for handed, record in zip(read_jsonl(tmp_path / "r" / "retrieved.validation.jsonl"), read_jsonl(written),
                              strict=True):  # fmt: skip
        assert handed["hops"][0]["draft"] == record["hops"][0]["draft"]
    # the vectors of the trained retriever lie in its folder
    flags = ["--corpus_file", corpus["folder"] / "corpus.jsonl", "--input_file", queries, "--retriever", tmp_path / "r",
             "--summarizer", "extract", "--num_hops", 1]  # fmt: skip
    result = launch(SCRIPT, *flags, "--output_dir", tmp_path / "h")
    assert result.returncode == 0 and not (tmp_path / "h" / "embeddings").exists()
    other = read_jsonl(tmp_path / "h" / "predictions.validation.jsonl")
    shutil.rmtree(tmp_path / "r" / "embeddings")
    result = launch(SCRIPT, *flags, "--output_dir", tmp_path / "h2")
    assert result.returncode == 0 and (tmp_path / "h2" / "embeddings" / "manifest.json").exists()
    assert read_jsonl(tmp_path / "h2" / "predictions.validation.jsonl") == other


def test_one_question_is_put_to_a_corpus(corpus, tmp_path):
    query = read_jsonl(corpus["folder"] / "queries.jsonl")[0]["query"]
    result = launch(SCRIPT, *corpus["flags"], *corpus["searched"][:2], *corpus["models"], "--query", query,
                    "--index", "ivf", "--output_dir", tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (record,) = read_jsonl(tmp_path / "predictions.query.jsonl")
    expected = read_jsonl(corpus["folder"] / "run" / "predictions.validation.jsonl")[0]
    assert result.stdout == record["prediction"] + "\n" and (tmp_path / "embeddings" / "ivf.faiss").exists()
    assert record["prediction"] == expected["prediction"]
    before = None
    for hop in record["hops"]:
        for passage in hop["read"]:
            mark = "+" if before is not None and passage not in before else " "  # not read at the hop before
            assert f"{mark} {record['passage_ids'][passage]:>4}  " in result.stderr
        before = hop["read"]
    assert "--index ivf misses 0.0%" in result.stderr


# ---- one document


MEETING = "\n".join(sample_records("validation", 1)[0]["passages"])
QUESTION = sample_records("validation", 1)[0]["query"]


def test_a_retriever_from_elsewhere_ranks_as_the_flags_say(smoke, tmp_path):
    from sentence_transformers import SentenceTransformer

    elsewhere = tmp_path / "elsewhere"  # as on the Hub: with prompts, without settings of ours
    model = SentenceTransformer(str(smoke["retrieve"]), device="cpu", prompts={"query": "ask: ", "document": "text: "})
    model.save_pretrained(str(elsewhere), create_model_card=False)
    wanted = {"ranking": "hybrid", "bm25_weight": 0.9, "smooth_window": 2, "smooth_decay": 0.6, "truncate_dim": 16}
    flags = [word for name, value in wanted.items() for word in (f"--{name}", value)]
    rest = ["--retriever", elsewhere, "--summarizer", "extract", "--num_hops", 1, "--max_examples", 6]
    written = {}
    for name, extra in (("dense", []), ("flags", flags)):
        result = launch(SCRIPT, "--output_dir", tmp_path / name, *rest, *extra)
        assert result.returncode == 0, result.stderr
        written[name] = load_examples(tmp_path / name / "predictions.validation.jsonl")

    def encode(texts, kind):
        return (model.encode_query if kind == "query" else model.encode_document)(texts, normalize_embeddings=True)

    for name, settings in (("dense", {}), ("flags", wanted)):
        with model.truncate_embeddings(settings.get("truncate_dim")):
            expected = retriever_rankings(written[name], encode, settings)
        for example, ranking in zip(written[name], expected, strict=True):
            assert [score for _, score in example.retrieved] == pytest.approx([score for _, score in ranking], abs=1e-4)
            assert example.retrieved[0][0] == ranking[0][0]


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_one_document_is_summarized_on_standard_output_and_explained_on_standard_error(smoke, tmp_path, source):
    text = "\ufeff" + MEETING  # with a byte order mark
    (tmp_path / "meeting.txt").write_text(text)
    flags = ["--document", "-" if source == "standard input" else tmp_path / "meeting.txt", "--query", QUESTION,
             "--retriever", smoke["retrieve"], "--summarizer", smoke["summarize"], "--max_new_tokens", 12,
             "--passage_words", 20, "--output_dir", tmp_path / "run"]  # fmt: skip
    result = subprocess.run(command(SCRIPT, flags, 1), env={**os.environ, **OFFLINE}, capture_output=True, text=True,
                            input=text, cwd=ROOT)  # fmt: skip
    assert result.returncode == 0, result.stderr
    (record,) = read_jsonl(tmp_path / "run" / "predictions.document.jsonl")
    assert result.stdout == record["prediction"] + "\n"
    assert "hop 1 read" in result.stderr and record["hops"][0]["draft"] in result.stderr
    assert record["query"] == QUESTION and len(record["passages"]) > 5 and "\ufeff" not in record["passages"][0]
    report = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert QUESTION in report and "Hop by hop" in report
    result = launch(SCRIPT, *flags, "--json") if source == "file" else None
    assert result is None or json.loads(result.stdout) == record  # one object, and nothing else


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--document", "nowhere.txt"], "--document nowhere.txt: cannot be read"),
        (["--document", "empty.txt"], "--document empty.txt: is empty"),
        (["--input_file", "nowhere.jsonl"], "nowhere.jsonl: no such file or folder"),
        ([], "--retriever outputs/retrieve: no such folder; train_retrieve.py makes it, or name another"),
        (["--retriever", "bm25"], "--summarizer outputs/summarize: no such folder; train_summarize.py makes it"),
        (["--retriever", "nowhere", "--summarizer", "extract"], "nowhere: no retriever could be loaded"),
        (["--summarizer", "nowhere", "--retriever", "bm25"], "--summarizer nowhere: no summarizer"),
        (["--summarizer", "extract", "--retriever", "bm25"], "name a --drafter, or a --summarizer"),
        (["--ranking", "hybrid", "--retriever", "bm25", "--summarizer", "extract"], "--ranking needs a --retriever"),
        (["--query", "Why?"], "--query is only for --document or --corpus_file"),
        (["--query", "Why?", "--corpus_file", "c", "--input_file", "x"], "examples have their own queries"),
        (["--document", "x", "--corpus_file", "c"], "--document and --corpus_file: give only one of them"),
        (["--corpus_file", "c"], "--corpus_file needs --input_file, whose queries search it, or one --query"),
        (["--qrels_file", "x", "--corpus_file", "c", "--query", "Why?"], "--qrels_file needs --corpus_file, whose"),
        (["--index", "hnsw", "--input_file", "x"], "--index hnsw needs a --corpus_file"),
        (["--passage_order", "document", "--corpus_file", "c", "--query", "Why?"], "its passages have no order"),
        (["--corpus_file", "nowhere.jsonl", "--query", "Why?"], "nowhere.jsonl: no such file or folder"),
        (["--json", "--input_file", "x"], "--json prints one record: give --document, or one --query to --corpus_file"),
        (["--hop_weight", "1", "--num_hops", "1"], "--hop_weight has no effect with --num_hops 1"),
        (["--summarizer", "extract", "--num_beams", "2"], "--num_beams has no effect with --summarizer extract"),
        (["--summarizer", "extract", "--fusion", "fid"], "--fusion has no effect with --summarizer extract"),
        (["--draft_words", "9"], "--draft_words has no effect unless drafts are extracts (--drafter extract)"),
        (["--num_hop", "2"], "did you mean --num_hops?"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(tmp_path, flags, message):
    (tmp_path / "empty.txt").write_text(" \n")
    result = launch(ROOT / SCRIPT, *flags, cwd=tmp_path)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


# ---- the language of BM25's words

HOUSES = ["Der Ausschuss sprach über das Dach.", "Sie beschlossen, die Brücken im Mai zu reparieren.", "Das war alles."]


def test_a_retrievers_language_is_saved_and_questions_without_a_word_in_a_passage_are_counted(tmp_path):
    file, retriever = tmp_path / "de.jsonl", tmp_path / "retrieve"
    questions = ["Wann wird die Brücke repariert?", "Welche Dächer?", "Zebra?"]
    write_jsonl(file, [{"id": f"q{number}", "query": query, "passages": HOUSES, "summary": "Im Mai.", "evidence": [1]}
                       for number, query in enumerate(questions)])  # fmt: skip
    counted = "no passage for 1 of 3 questions, such as that of 'q2': they share no word with a passage"
    result = launch("train_retrieve.py", "--train_file", file, "--validation_file", file, "--language", "de",
                    "--max_train_steps", 1, "--output_dir", retriever)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(counted) == 2  # training and validation
    assert saved_settings(retriever)["language"] == "de"
    flags = ["--input_file", file, "--summarizer", "extract", "--drafter", retriever, "--output_dir", tmp_path / "hops"]
    result = launch(SCRIPT, *flags, "--retriever", "bm25", "--language", "german")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(counted) == 1 and "--language (now german)" in result.stdout
    first, second, _ = read_jsonl(tmp_path / "hops" / "predictions.validation.jsonl")
    assert first["hops"][0]["retrieved"][0]["passage"] == 1 and second["hops"][0]["retrieved"][0]["passage"] == 0
    result = launch(SCRIPT, *flags, "--retriever", retriever, "--language", "fr")
    assert result.returncode == 2 and "was trained with --language german" in result.stderr
    result = launch("train_summarize.py", "--train_file", file, "--validation_file", file, "--retriever", "lead",
                    "--language", "de", "--output_dir", tmp_path / "summarize")  # fmt: skip
    assert result.returncode == 2 and "--language de has no effect on passages from lead" in result.stderr


# ---- the draft finds what the question could not


def test_trained_on_drafts_the_second_hop_finds_what_only_a_name_in_a_draft_leads_to(tmp_path):
    """Drafts as a summarizer writes them at the first hop: the name is right, what the person reported is made up."""
    rng = random.Random(1)
    for split, documents in (("train", 200), ("validation", 15)):
        records = sample_records(split, documents)
        for record in records:
            record["draft"] = record["summary"]
            if len(record["evidence_hops"]) == 2:
                name = record["passages"][record["evidence_hops"][1][0]].partition(":")[0]
                record["draft"] = f"{name} said that {rng.choice(records)['passages'][rng.randrange(40)]}"
        write_jsonl(tmp_path / f"{split}.jsonl", records)
    files = [flag for split, name in (("train", ""), ("validation", "validation_"))
             for flag in (f"--{split}_file", tmp_path / f"{split}.jsonl",
                          f"--{name}drafts_file", tmp_path / f"{split}.jsonl")]  # fmt: skip
    result = launch("train_retrieve.py", "--output_dir", tmp_path / "run", *files, "--draft_share", 0.9,
                    "--group_by_document", "--num_hard_negatives", 20, "--negatives_pool", 50,
                    "--num_train_epochs", 6, "--eval_after_steps", 450, "--learning_rate", 2e-3)  # fmt: skip
    assert result.returncode == 0, result.stderr
    scores = events(tmp_path / "run", "validation")[-1]
    # all first-hop evidence is among the first five at either hop: what differs is that of the second hop
    assert scores["recall@5"] < 92
    assert scores["hop2"]["recall@5"] > scores["recall@5"] + 4
