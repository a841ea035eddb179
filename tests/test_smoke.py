"""The scripts as users run them, from start to end, with one process and with two."""

import json
import re
import shutil

import numpy as np
import pytest
import pytrec_eval
import torch
from conftest import ROOT, SCRIPTS, beir_flags, events, inject, launch, read_jsonl, run, write_beir

from utils.data.examples import Document
from utils.data.loading import load_examples
from utils.data.sample import sample_records
from utils.data.trec import read_qrels, read_run
from utils.evaluation.retrieval import retrieval_scores
from utils.evaluation.rouge import rouge_scores
from utils.files import write_jsonl
from utils.models.sources import Sources


def test_the_retriever_learns_and_beats_bm25(smoke):
    first, second = (line["loss"] for line in events(smoke["retrieve"], "epoch"))
    assert second < 0.8 * first
    last = events(smoke["retrieve"], "validation")[-1]
    assert last["recall@5"] > last["bm25"]["recall@5"]


def check_hop(hop_ranking, example) -> float:
    """Checks that a hop ranks every passage; returns its recall@5."""
    passages, scores = zip(*hop_ranking, strict=True)
    assert sorted(passages) == list(range(len(example.document.passages)))
    assert list(scores) == sorted(scores, reverse=True)
    words = [len(text.split()) for text in example.document.passages]
    return retrieval_scores(passages, example.evidence, words)["recall@5"]


def test_hand_over_files_hold_every_example_ranked_as_the_log_says(smoke):
    examples = load_examples(smoke["retrieve"] / "retrieved.validation.jsonl")
    assert len(examples) == 66 and not any(example.hops for example in examples)  # a second hop needs a summarizer
    recalls = [check_hop(example.retrieved, example) for example in examples]
    logged = events(smoke["retrieve"], "validation")[-1]
    assert np.mean(recalls) == pytest.approx(logged["recall@5"], rel=1e-5)
    assert logged["hop2"]["recall@5"] > 0


def test_training_examples_are_handed_over_with_a_second_hop_that_searched_with_an_imitated_draft(smoke):
    examples = load_examples(smoke["retrieve"] / "retrieved.train.jsonl")
    for example in examples:
        first, second = example.hops
        assert first.read == [passage for passage, _ in first.retrieved[:5]] and second.retrieved == example.retrieved
        check_hop(first.retrieved, example)
        check_hop(second.retrieved, example)
    kept = []  # share of the reference's words that the draft keeps, because they were read
    for example in examples:
        draft, reference = (text.split() for text in (example.hops[0].draft, example.summaries[0]))
        assert len(draft) == len(reference)
        kept.append(np.mean([ours == theirs for ours, theirs in zip(draft, reference, strict=True)]))
    assert 0.2 < np.mean(kept) < 0.8
    moved = [example.hops[0].retrieved[:5] != example.retrieved[:5] for example in examples]
    assert np.mean(moved) > 0.5


def test_the_retriever_loads_in_sentence_transformers_and_ranks_as_the_hand_over_file(smoke):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(smoke["retrieve"]), device="cpu")
    for example in load_examples(smoke["retrieve"] / "retrieved.validation.jsonl", max_examples=5):
        passages, scores = zip(*example.retrieved, strict=True)
        similarities = (
            model.similarity(
                model.encode_query([example.query]),
                model.encode_document([example.document.passages[passage] for passage in passages]),
            )[0]
        ).tolist()
        assert similarities == pytest.approx(scores, abs=1e-4)


def test_a_retriever_is_trained_with_prompts_and_saved_with_them(tmp_path):
    from sentence_transformers import SentenceTransformer

    prompts = ["--query_prompt", "ask for: ", "--passage_prompt", "a text: "]
    result = launch("train_retrieve.py", "--output_dir", tmp_path, "--sample_documents", 10, "--max_train_steps", 2,
                    "--dropout", 0.2, "--gradient_checkpointing", "--trust_remote_code", *prompts)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "--trust_remote_code: Python code" in result.stderr
    model = SentenceTransformer(str(tmp_path), device="cpu")
    assert model.prompts == {"query": "ask for: ", "document": "a text: "}
    assert model[0].auto_model.config.hidden_dropout_prob == 0.2
    for example in load_examples(tmp_path / "retrieved.validation.jsonl", max_examples=3):
        passages, scores = zip(*example.retrieved, strict=True)
        texts = [example.document.passages[passage] for passage in passages]
        ours = model.encode_query([example.query]) @ model.encode_document(texts).T
        assert ours[0].tolist() == pytest.approx(scores, abs=1e-4)


def test_the_summarizer_reads_what_stage_1_wrote_and_learns(smoke):
    losses = [line["loss"] for line in events(smoke["summarize"], "train")]
    assert losses[-1] < 0.8 * losses[0]
    ranked = {example.id: example for example in load_examples(smoke["retrieve"] / "retrieved.validation.jsonl")}
    predictions = read_jsonl(smoke["summarize"] / "predictions.validation.jsonl")
    assert [line["id"] for line in predictions] == list(ranked)
    for line in predictions:
        best = [passage for passage, _ in ranked[line["id"]].retrieved[:5]]
        assert [entry["passage"] for entry in line["passages"]] == sorted(best)


def test_logged_rouge_is_that_of_the_written_predictions(smoke):
    predictions = read_jsonl(smoke["summarize"] / "predictions.validation.jsonl")
    scores = [rouge_scores(line["prediction"], line["summary"]) for line in predictions]
    logged = events(smoke["summarize"], "validation")[-1]
    for name in ("rouge1", "rouge2", "rougeL", "rougeLsum"):
        assert logged[name] == pytest.approx(np.mean([score[name] for score in scores]), rel=1e-5)
    assert logged["lead"]["rougeL"] < logged["oracle"]["rougeL"]


def test_the_summarizer_loads_in_plain_transformers_and_writes_the_same_predictions(smoke):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(smoke["summarize"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(smoke["summarize"])
    for line in read_jsonl(smoke["summarize"] / "predictions.validation.jsonl")[:4]:
        source = tokenizer.sep_token.join([line["query"], *(entry["text"] for entry in line["passages"])])
        with torch.no_grad():
            ids = model.generate(**tokenizer(source, return_tensors="pt", return_token_type_ids=False))
        assert tokenizer.decode(ids[0], skip_special_tokens=True).strip() == line["prediction"]


def test_a_language_model_is_trained_and_writes_the_same_everywhere(smoke, language_model, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (tmp_path / "prompt.txt").write_text("{passages}\nQuestion: {query}\n")
    flags = ["--train_file", smoke["retrieve"] / "retrieved.train.jsonl", "--max_train_examples", 96,
             "--validation_file", smoke["retrieve"] / "retrieved.validation.jsonl", "--max_eval_examples", 8,
             "--model_name_or_path", language_model, "--learning_rate", 3e-3, "--num_train_epochs", 2,
             "--per_device_train_batch_size", 4, "--log_steps", 12, "--max_new_tokens", 16, "--max_source_length", 400,
             "--output_dir", tmp_path / "run"]  # fmt: skip
    result = launch("train_summarize.py", *flags, "--prompt_template", tmp_path / "prompt.txt")
    assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in events(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 1
    saved = json.loads((tmp_path / "run/settings.json").read_text())
    assert saved["prompt_template"] == "{passages}\nQuestion: {query}"

    # plain Transformers, with the chat template around the prompt
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    predictions = read_jsonl(tmp_path / "run/predictions.validation.jsonl")
    sources = Sources(tokenizer, "concat", 400, "document", prompt_template=saved["prompt_template"])
    for line in predictions:
        texts = [entry["text"] for entry in line["passages"]]
        (prompt,), _ = sources.build(line["query"], Document("d", texts), range(len(texts)))
        text = "\n".join([*texts, f"Question: {line['query']}"])
        written = f"<s>user\n{text}</s><s>assistant\n"
        assert tokenizer.decode(prompt).replace(" ", "") == written.replace(" ", "")
        ids = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
        assert tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip() == line["prediction"]

    # the other script reads with the same prompt, and its second hop searches with the draft
    hops = ["--retriever", smoke["retrieve"], "--input_file", smoke["retrieve"] / "retrieved.validation.jsonl",
            "--max_examples", 8, "--summarizer", tmp_path / "run", "--output_dir", tmp_path / "hops"]  # fmt: skip
    result = launch("retrieve_and_summarize.py", *hops, "--num_hops", 2)
    assert result.returncode == 0, result.stderr
    records = read_jsonl(tmp_path / "hops/predictions.validation.jsonl")
    assert [record["hops"][0]["draft"] for record in records] == [line["prediction"] for line in predictions]
    assert any(len(record["hops"]) == 2 for record in records)
    result = launch("train_summarize.py", *flags, "--fusion", "fid", "--output_dir", tmp_path / "fid")
    assert result.returncode == 2 and "--fusion fid needs an encoder-decoder" in result.stderr
    assert not (tmp_path / "fid/arguments.json").exists()


def test_adapters_are_trained_used_and_merged(smoke, tmp_path):
    base = shutil.copytree(smoke["summarize"], tmp_path / "base")
    flags = ["--train_file", smoke["retrieve"] / "retrieved.train.jsonl", "--max_train_examples", 96,
             "--validation_file", smoke["retrieve"] / "retrieved.validation.jsonl", "--max_eval_examples", 12,
             "--model_name_or_path", base, "--lora_rank", 8, "--learning_rate", 1e-2, "--num_train_epochs", 2,
             "--per_device_train_batch_size", 4, "--log_steps", 12, "--max_new_tokens", 16,
             "--output_dir", tmp_path / "run"]  # fmt: skip
    result = launch("train_summarize.py", *flags)
    assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in events(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.02
    checkpoint = tmp_path / "run/checkpoints/last"
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 2 * (base / "model.safetensors").stat().st_size

    # both scripts that read the folder write what the run wrote
    written = [line["prediction"] for line in read_jsonl(tmp_path / "run/predictions.validation.jsonl")]
    hops = ["--retriever", smoke["retrieve"], "--input_file", smoke["retrieve"] / "retrieved.validation.jsonl",
            "--max_examples", 12, "--num_hops", 1, "--output_dir", tmp_path / "hops",
            "--summarizer", tmp_path / "run"]  # fmt: skip
    result = launch("retrieve_and_summarize.py", *hops)
    assert result.returncode == 0, result.stderr
    assert [line["prediction"] for line in read_jsonl(tmp_path / "hops/predictions.validation.jsonl")] == written
    onward = ["--model_name_or_path", tmp_path / "run", "--learning_rate", 0, "--max_train_steps", 1]
    result = launch("train_summarize.py", *flags, *onward, "--lora_rank", 0, "--output_dir", tmp_path / "onward")
    assert result.returncode == 0, result.stderr
    assert [line["prediction"] for line in read_jsonl(tmp_path / "onward/predictions.validation.jsonl")] == written

    # the finished run, started again, writes a whole model, which does not need the base model
    result = launch("train_summarize.py", *flags, "--merge_lora")
    assert result.returncode == 0, result.stderr
    assert "nothing to train" in result.stdout and "--merge_lora False -> True" in result.stdout
    assert not list((tmp_path / "run").glob("adapter*"))
    shutil.rmtree(base)
    result = launch("retrieve_and_summarize.py", *hops)
    assert result.returncode == 0, result.stderr
    assert [line["prediction"] for line in read_jsonl(tmp_path / "hops/predictions.validation.jsonl")] == written


def test_adapters_of_a_retriever_are_trained_and_rank_as_the_hand_over_file(smoke, tmp_path):
    from sentence_transformers import SentenceTransformer

    base = shutil.copytree(smoke["retrieve"], tmp_path / "base")
    result = launch("train_retrieve.py", "--output_dir", tmp_path / "run", "--sample_documents", 20, "--lora_rank", 8,
                    "--model_name_or_path", base, "--num_train_epochs", 1, "--learning_rate", 5e-3,
                    "--gradient_cache_tokens", 512, "--query_prompt", "ask: ", "--gradient_checkpointing")  # fmt: skip
    assert result.returncode == 0, result.stderr
    model = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    whole = SentenceTransformer(str(base), device="cpu")
    for example in load_examples(tmp_path / "run/retrieved.validation.jsonl", max_examples=3):
        passages, scores = zip(*example.retrieved, strict=True)
        texts = [example.document.passages[passage] for passage in passages]
        similarities = model.encode_query([example.query]) @ model.encode_document(texts).T
        assert similarities[0].tolist() == pytest.approx(scores, abs=1e-4)
        before = whole.encode_query(["ask: " + example.query]) @ whole.encode_document(texts).T
        assert abs(before - similarities).max() > 1e-3
    hops = ["--retriever", tmp_path / "run", "--summarizer", "extract", "--max_examples", 6, "--num_hops", 1]
    result = launch("retrieve_and_summarize.py", *hops, "--output_dir", tmp_path / "hops")
    assert result.returncode == 0, result.stderr
    handed = load_examples(tmp_path / "run/retrieved.validation.jsonl", max_examples=6)
    for line, example in zip(read_jsonl(tmp_path / "hops/predictions.validation.jsonl"), handed, strict=True):
        assert [entry["passage"] for entry in line["retrieved"]][:5] == [passage for passage, _ in example.retrieved][
            :5
        ]
    shutil.rmtree(base)
    result = launch("retrieve_and_summarize.py", *hops, "--output_dir", tmp_path / "other")
    assert result.returncode == 2 and f"need their base model in {base}" in result.stderr


def test_a_run_folder_tells_what_was_run(smoke):
    folder = smoke["summarize"]
    assert json.loads((folder / "arguments.json").read_text())["max_new_tokens"] == 24
    assert "train_summarize.py" in (folder / "command.txt").read_text()
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["processes"] == 1
    assert environment["torch"] == torch.__version__
    assert [line["event"] for line in read_jsonl(folder / "metrics.jsonl")][-1] == "done"


def test_a_run_folder_has_a_report_of_training_and_of_its_examples(smoke):
    for stage, titles in (("retrieve", ["Training", "Retrieval, validation"]),
                          ("summarize", ["Training", "Summaries, validation"])):  # fmt: skip
        page = (smoke[stage] / "report.html").read_text(encoding="utf-8")
        assert re.findall(r'<h2 id="[^"]*-title">([^<]*)</h2>', page) == [*titles, "This run"]
        best = (smoke[stage] / "checkpoints/best").resolve().name.removeprefix("step_")
        marked = re.search(r'class="best"><th scope="row">([0-9,]+) ', page)[1]
        assert int(marked.replace(",", "")) == int(best)
        assert "finished at step" in page and f"--output_dir {smoke[stage]}" in page
    assert page.count('class="example"') == len(read_jsonl(smoke["summarize"] / "predictions.validation.jsonl"))


def test_a_report_that_fails_loses_no_run_and_is_said(tmp_path):
    wrapper = inject(tmp_path, "train_summarize.py", "utils.reporting.report:write_page", "calls == 2",
                     "raise RuntimeError('no page')")  # fmt: skip
    result = run(wrapper, tmp_path / "run")
    assert result.stderr.count("warning: no report.html (RuntimeError: no page)") == 1
    assert result.stdout.endswith(f"wrote {tmp_path / 'run/report.html'}\n")  # at the end, after two validations
    assert (tmp_path / "run/model.safetensors").exists() and "Summaries" in (tmp_path / "run/report.html").read_text()


def test_61_validation_examples_score_the_same_on_two_processes_as_on_one(smoke, tmp_path):
    flags = ["--train_file", smoke["retrieve"] / "retrieved.train.jsonl", "--max_train_examples", 16,
             "--validation_file", smoke["retrieve"] / "retrieved.validation.jsonl", "--max_eval_examples", 61,
             "--model_name_or_path", smoke["summarize"], "--learning_rate", 0, "--max_train_steps", 1,
             "--per_device_eval_batch_size", 8, "--max_new_tokens", 16]  # fmt: skip
    for processes in (1, 2):
        result = launch("train_summarize.py", *flags, "--output_dir", tmp_path / str(processes), processes=processes)
        assert result.returncode == 0, result.stderr
    one, two = (events(tmp_path / str(processes), "validation")[-1] for processes in (1, 2))
    assert one == two
    predictions = [read_jsonl(tmp_path / str(processes) / "predictions.validation.jsonl") for processes in (1, 2)]
    assert len(predictions[0]) == 61
    assert predictions[0] == predictions[1]


def test_two_processes_train_the_retriever_like_one_with_twice_the_batch(tmp_path):
    flags = ["--sample_documents", 20, "--num_train_epochs", 1, "--log_steps", 1, "--max_eval_examples", 61]
    for processes, batch in ((1, 16), (2, 8)):
        result = launch("train_retrieve.py", *flags, "--per_device_train_batch_size", batch,
                        "--output_dir", tmp_path / str(processes), processes=processes)  # fmt: skip
        assert result.returncode == 0, result.stderr
    one, two = (events(tmp_path / str(processes), "train") for processes in (1, 2))
    assert [line["examples"] for line in one] == [line["examples"] for line in two]
    assert sum(line["examples"] for line in one) == 120
    # a passage that both hold is encoded by both
    assert all(a["tokens"] <= b["tokens"] for a, b in zip(one, two, strict=True))
    assert "2 processes on cpu" in result.stdout
    assert json.loads((tmp_path / "2" / "environment.json").read_text())["processes"] == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_fusion_in_decoder_learns_with_one_and_two_processes(tmp_path, processes):
    result = launch("train_summarize.py", "--output_dir", tmp_path, "--sample_documents", 50, "--fusion", "fid",
                    "--num_train_epochs", 2, "--log_steps", 5, "--max_new_tokens", 16, "--num_beams", 2,
                    "--gradient_accumulation_steps", 2, "--per_device_train_batch_size", 8 // processes,
                    processes=processes)  # fmt: skip
    assert result.returncode == 0, result.stderr
    losses = [line["loss"] for line in events(tmp_path, "train")]
    assert losses[-1] < losses[0] - 0.5
    assert sum(line["examples"] for line in events(tmp_path, "train")) == 2 * 300
    assert read_jsonl(tmp_path / "predictions.validation.jsonl")[0]["passages"]


@pytest.mark.parametrize("retriever", ["bm25", "lead", "oracle", "random", "folder"])
def test_stage_2_takes_its_passages_from_any_retriever(smoke, tmp_path, retriever):
    name = smoke["retrieve"] if retriever == "folder" else retriever
    result = launch("train_summarize.py", "--output_dir", tmp_path, "--sample_documents", 10, "--max_train_steps", 1,
                    "--retriever", name, "--max_new_tokens", 4, "--num_beams", 1, "--max_eval_examples", 6)  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line in read_jsonl(tmp_path / "predictions.validation.jsonl"):
        read = [entry["passage"] for entry in line["passages"]]
        if retriever == "lead":
            assert read == [0, 1, 2, 3, 4]
        elif retriever == "oracle":
            assert read == line["evidence"]
        else:
            assert len(read) == 5


def test_examples_without_evidence_are_supervised_by_the_rouge_oracle(tmp_path):
    sentences = ["The barn burned down.", "Nobody bought the red house.", "Ships came late.", "Cats slept all day."]
    record = {"query": "What happened?", "passages": sentences * 3, "summary": ["Nobody bought the house."]}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**record, "id": number}) + "\n" for number in range(8)))
    result = launch("train_retrieve.py", "--train_file", data, "--validation_file", data, "--num_train_epochs", 1,
                    "--output_dir", tmp_path / "run")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "positives from the ROUGE oracle: 8" in result.stdout


def test_a_teacher_supervises_examples_without_evidence(smoke, tmp_path):
    records = [{name: record[name] for name in ("id", "query", "passages", "summary")}
               for record in sample_records("train", 6)]  # fmt: skip
    write_jsonl(tmp_path / "data.jsonl", records)
    flags = ["--train_file", tmp_path / "data.jsonl", "--validation_file", tmp_path / "data.jsonl",
             "--output_dir", tmp_path / "run", "--teacher", smoke["summarize"], "--teacher_candidates", 6,
             "--teacher_temperature", 0.01, "--num_hard_negatives", 0, "--per_device_train_batch_size", 1,
             "--draft_share", 0, "--num_train_epochs", 8, "--log_steps", 36]  # fmt: skip
    result = launch("train_retrieve.py", *flags)
    assert result.returncode == 0, result.stderr
    assert "positives from the teacher: 36" in result.stdout
    # one question in a batch with its six candidates: the divergence from the teacher's distribution falls
    losses = [line["loss"] for line in events(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.05


def test_a_reranker_is_trained_and_ranks_alike_in_all_scripts(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # nothing is kept from elsewhere
    rerank, retriever = tmp_path / "rerank", smoke["retrieve"]
    data = ["--sample_documents", 8, "--log_steps", 2]  # six validation examples
    result = launch("train_rerank.py", "--output_dir", rerank, "--retriever", retriever, *data, "--num_train_epochs", 1,
                    "--num_hard_negatives", 3, "--rerank_top_k", 6, "--rerank_weight", 2.5)  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the reranker scored 6.0 passages a query in" in result.stdout
    validation = events(rerank, "validation")[-1]
    assert {"hop2", "retriever"} <= validation.keys() and "hop2" in validation["retriever"]
    ranked = [line["retrieved"] for line in read_jsonl(rerank / "retrieved.validation.jsonl")]
    without = [line["retrieved"] for line in read_jsonl(retriever / "retrieved.validation.jsonl")][:6]

    def order(rankings, top=None):
        return [[entry["passage"] for entry in ranking[:top]] for ranking in rankings]

    assert order(ranked) != order(without)
    assert [sorted(of_one) for of_one in order(ranked, 6)] == [sorted(of_one) for of_one in order(without, 6)]

    use = ["--retriever", retriever, "--reranker", rerank]
    hops = launch("retrieve_and_summarize.py", *use, "--summarizer", "extract", "--num_hops", 1, "--max_examples", 6,
                  "--output_dir", tmp_path / "hops")  # fmt: skip
    assert hops.returncode == 0, hops.stderr
    found = [line["retrieved"] for line in read_jsonl(tmp_path / "hops/predictions.validation.jsonl")]
    assert order(found) == order(ranked)
    assert json.loads((tmp_path / "hops/hops.validation.json").read_text())[0]["pairs"] == 6 * 6

    stage_2 = [*use, *data, "--max_train_steps", 1, "--num_beams", 1, "--max_new_tokens", 2, "--passage_order", "rank"]
    for number in range(2):  # the second time, the rankings are found where they were kept
        result = launch("train_summarize.py", *stage_2, "--output_dir", tmp_path / f"summarize_{number}")
        assert result.returncode == 0, result.stderr
        assert ("the reranker scored" in result.stdout) == (number == 0)
        read = [line["passages"] for line in read_jsonl(tmp_path / f"summarize_{number}/predictions.validation.jsonl")]
        assert order(read) == order(ranked, 5)

    # the same retriever, trained for nothing
    result = launch("train_retrieve.py", *data, "--model_name_or_path", retriever, "--reranker", rerank,
                    "--max_train_steps", 1, "--learning_rate", 0, "--output_dir", tmp_path / "retrieve")  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "the reranker scored" in result.stdout
    found = [line["retrieved"] for line in read_jsonl(tmp_path / "retrieve/retrieved.validation.jsonl")]
    assert order(found, 6) == order(ranked, 6)
    assert events(tmp_path / "retrieve", "validation")[-1]["ndcg@10"] == pytest.approx(validation["ndcg@10"], abs=0.01)


def test_two_processes_rerank_what_a_trained_retriever_finds_as_one_does(smoke, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # the pairs are made anew, by one process for both
    flags = ["--retriever", smoke["retrieve"], "--sample_documents", 8, "--num_hard_negatives", 2, "--rerank_top_k", 4,
             "--max_train_steps", 1, "--learning_rate", 0]  # fmt: skip
    found = []
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        result = launch("train_rerank.py", "--output_dir", folder, *flags, processes=processes, timeout=200)
        assert result.returncode == 0, result.stderr
        scores = events(folder, "validation")[-1]
        found.append({name: scores[name] for name in ("ndcg@10", "recall@5", "hop2", "retriever")})
    assert found[0] == found[1]


def test_adapters_of_a_reranker_need_a_head_that_was_trained(smoke, tmp_path):
    flags = ["--retriever", "bm25", "--sample_documents", 8, "--max_train_steps", 1, "--lora_rank", 2]
    result = launch(
        "train_rerank.py", "--output_dir", tmp_path / "a", "--model_name_or_path", smoke["retrieve"], *flags
    )
    assert result.returncode == 2 and "scores no pairs yet; train it without adapters" in result.stderr


WITHOUT_INTERNALS = """
import runpy, sys
import torch, transformers.modeling_utils
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import sdpa_attention
sys.path.insert(0, {root!r})
sys.modules["torch.nn.attention.varlen"] = None
del sdpa_attention.sdpa_attention_forward, masking_utils.sdpa_mask
del PreTrainedModel.is_backend_compatible, PreTrainedModel._can_set_attn_implementation
torch.ops.mkldnn._linear_pointwise = torch.ops.aten._softmax_backward_data = None
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_whose_libraries_lack_what_makes_it_fast_has_the_same_losses_and_warns(script, tmp_path):
    wrapper = tmp_path / script
    wrapper.write_text(WITHOUT_INTERNALS.format(root=str(ROOT), script=str(ROOT / script)))
    few = ["--max_train_steps", 2, "--dropout", 0]
    warned = run(wrapper, tmp_path / "slower", *few).stderr
    assert "slower" not in run(script, tmp_path / "usual", *few).stderr.replace(str(tmp_path), "")
    ours, usual = (events(tmp_path / name, "train") for name in ("slower", "usual"))
    for name in ("loss", "gnorm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in usual], rel=1e-3), name
    lacks = ["sdpa_attention_forward", "_linear_pointwise", "_softmax_backward_data"]
    lacks += ["_can_set_attn_implementation"] * (script == "train_summarize.py")  # of the search
    assert [warned.count(name) for name in lacks] == [1] * len(lacks)
    assert warned.count("which is slower") == len(lacks)


@pytest.mark.parametrize("script", ["train_retrieve.py", "train_summarize.py"])
def test_a_broken_data_file_gives_one_readable_error_and_exit_code_2(tmp_path, script):
    data = tmp_path / "train.jsonl"
    data.write_text('{"passages": ["a b"], "summary": "a"}\n{"passages": ["a b"]}\n')
    result = launch(script, "--train_file", data, "--validation_file", data, "--output_dir", tmp_path / "run")
    assert result.returncode == 2
    assert f"{data}:2: no 'summary'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_finished_run_started_again_trains_nothing_and_says_so(smoke):
    weights = (smoke["retrieve"] / "model.safetensors").read_bytes()
    trained = events(smoke["retrieve"], "train")
    result = launch("train_retrieve.py", *smoke["flags"]["retrieve"])
    assert result.returncode == 0, result.stderr
    assert "nothing to train: num_train_epochs 2 reached" in result.stdout
    assert (smoke["retrieve"] / "model.safetensors").read_bytes() == weights
    assert events(smoke["retrieve"], "train") == trained


def test_a_run_folder_of_other_data_is_refused_with_what_differs(smoke):
    before = (smoke["retrieve"] / "metrics.jsonl").read_bytes()
    result = launch("train_retrieve.py", "--output_dir", smoke["retrieve"], "--sample_documents", 10)
    assert result.returncode == 2
    assert "belongs to another run: data " in result.stderr
    assert "Traceback" not in result.stderr
    assert (smoke["retrieve"] / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("script", ["train_retrieve.py", "train_summarize.py"])
def test_a_model_that_cannot_be_loaded_is_named(script, tmp_path):
    result = launch(script, "--model_name_or_path", tmp_path / "nowhere", "--sample_documents", 10,
                    "--output_dir", tmp_path / "run")  # fmt: skip
    assert result.returncode == 2
    assert str(tmp_path / "nowhere") in result.stderr
    assert "Traceback" not in result.stderr


def test_processes_that_do_not_know_of_each_other_are_refused(tmp_path):
    result = launch("train_summarize.py", "--output_dir", tmp_path / "run", processes=2, ACCELERATE_USE_CPU="0")
    assert result.returncode != 0
    assert "set ACCELERATE_USE_CPU=1" in result.stderr
    assert not (tmp_path / "run").exists()


def test_the_embedded_data_set_prints_as_files_that_load(tmp_path):
    import subprocess
    import sys

    lines = subprocess.run([sys.executable, "-m", "utils.data.sample", "--documents", "2"], cwd=ROOT, text=True,
                           capture_output=True, check=True).stdout  # fmt: skip
    (tmp_path / "sample.jsonl").write_text(lines)
    assert len(load_examples(tmp_path / "sample.jsonl")) == 12


# ---- an open corpus


def check_with_trec_eval(folder, split):
    """trec_eval finds in the TREC files of a split what the log says."""
    run, qrels = (read(folder / f"{name}.{split}.trec") for name, read in (("run", read_run), ("qrels", read_qrels)))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"recall.5,20", "ndcg_cut.10"})
    found = list(evaluator.evaluate({query: dict(ranking) for query, ranking in run.items()}).values())
    logged = events(folder, split)[-1]
    assert logged["examples"] == len(found)
    for ours, theirs in (("recall@5", "recall_5"), ("recall@20", "recall_20"), ("ndcg@10", "ndcg_cut_10")):
        assert 100 * np.mean([score[theirs] for score in found]) == pytest.approx(logged[ours], rel=1e-5)


def test_a_corpus_is_searched_with_its_own_ids_and_handed_over_to_stage_2(tmp_path, monkeypatch):
    corpus = write_beir(tmp_path, train=12, validation=4, test=2)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    flags = ["--output_dir", tmp_path / "run", "--num_train_epochs", 2, "--mine_negatives_every", 1,
             "--ranking", "hybrid", "--top_k", 20, "--trec_run", "--per_device_train_batch_size", 8,
             *beir_flags(tmp_path)]  # fmt: skip
    result = launch("train_retrieve.py", *flags)
    assert result.returncode == 0, result.stderr
    handed = read_jsonl(tmp_path / "run" / "retrieved.validation.jsonl")
    assert len(handed) == 24
    for line in handed:
        assert [corpus[key] for key in line["passage_ids"]] == line["passages"]
        assert [entry["passage"] for entry in line["retrieved"]] == list(range(20))

    # the second hop, with imitated drafts: its scores, and the training examples with what both hops found
    assert all(line["hop2"]["recall@20"] > 0 for line in events(tmp_path / "run", "validation"))
    for line in read_jsonl(tmp_path / "run" / "retrieved.train.jsonl"):
        first, second = line["hops"]
        assert first["draft"] and first["read"] == [entry["passage"] for entry in first["retrieved"][:5]]
        assert line["retrieved"] == second["retrieved"] and len(line["passages"]) == len(line["passage_ids"]) < 50
        assert [corpus[key] for key in line["passage_ids"]] == line["passages"]

    check_with_trec_eval(tmp_path / "run", "validation")

    # without judgements nothing could be scored, as is said before anything is trained
    result = launch("train_retrieve.py", *flags[:-2], "--output_dir", tmp_path / "unjudged")
    assert result.returncode == 2
    assert "no validation example has evidence" in result.stderr and "--validation_qrels_file" in result.stderr

    # a second start trains nothing and encodes nothing again, also with a test split
    shard = tmp_path / "run" / "embeddings" / "00000000.npy"
    made, before = shard.stat().st_mtime_ns, (tmp_path / "run" / "run.validation.trec").read_text()
    flags += ["--test_file", tmp_path / "queries.test.jsonl", "--test_qrels_file", tmp_path / "qrels.test.tsv"]
    assert launch("train_retrieve.py", *flags).returncode == 0
    check_with_trec_eval(tmp_path / "run", "test")
    assert shard.stat().st_mtime_ns == made
    assert (tmp_path / "run" / "run.validation.trec").read_text() == before

    files = [flag for split in ("train", "validation")
             for flag in (f"--{split}_file", tmp_path / "run" / f"retrieved.{split}.jsonl")]  # fmt: skip
    result = launch("train_summarize.py", "--output_dir", tmp_path / "summarize", *files, "--max_train_steps", 1,
                    "--max_eval_examples", 4, "--max_new_tokens", 4)  # fmt: skip
    assert result.returncode == 0, result.stderr
    predictions = read_jsonl(tmp_path / "summarize" / "predictions.validation.jsonl")
    assert [entry["passage"] for entry in predictions[0]["passages"]] == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_a_multilingual_run_is_used_with_its_own_languages_prefix_and_generation_settings(tmp_path):
    from transformers import MBart50Tokenizer, MBartConfig, MBartForConditionalGeneration
    from transformers.models.mbart50.tokenization_mbart50 import FAIRSEQ_LANGUAGE_CODES

    records = sample_records("train", 3)
    for number, record in enumerate(records):
        record["retrieved"] = [{"passage": 0, "score": 1.0}] if number % 3 else []  # read as the query alone
    write_jsonl(tmp_path / "data.jsonl", records)
    words = sorted({word for record in records for text in record["passages"] for word in text.split()})
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    languages = [(token, 0.0) for token in (*FAIRSEQ_LANGUAGE_CODES, "<mask>")]
    tokenizer = MBart50Tokenizer(vocab=[*special, *((f"\u2581{word}", -5.0) for word in words), *languages])
    model = MBartForConditionalGeneration(MBartConfig(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=128,
        decoder_start_token_id=2))  # fmt: skip
    model.generation_config.update(num_beams=3, max_length=6, no_repeat_ngram_size=2)  # five new tokens
    model.save_pretrained(tmp_path / "mbart")
    tokenizer.save_pretrained(tmp_path / "mbart")

    flags = ["--train_file", tmp_path / "data.jsonl", "--validation_file", tmp_path / "data.jsonl", "--fusion", "fid",
             "--model_name_or_path", tmp_path / "mbart", "--max_source_length", 64, "--max_train_steps", 2,
             "--source_prefix", "summarize: ", "--output_dir", tmp_path / "run"]  # fmt: skip
    result = launch("train_summarize.py", *flags)
    assert result.returncode == 2 and "set --source_lang and --target_lang (ar_AR" in result.stderr
    result = launch("train_summarize.py", *flags, "--source_lang", "de_DE", "--target_lang", "fr_XX")
    assert result.returncode == 0, result.stderr
    target = tokenizer.convert_tokens_to_ids("fr_XX")
    said = "generation: max_length 6, num_beams 3, length_penalty 1.0, no_repeat_ngram_size 2, "
    said += f"forced_bos_token_id {target}"
    assert said in result.stdout
    assert json.loads((tmp_path / "run/generation_config.json").read_text())["forced_bos_token_id"] == target
    settings = json.loads((tmp_path / "run/settings.json").read_text())
    assert (settings["source_lang"], settings["target_lang"]) == ("de_DE", "fr_XX")

    flags = ["--retriever", "bm25", "--summarizer", tmp_path / "run", "--input_file", tmp_path / "data.jsonl",
             "--num_hops", 1, "--output_dir", tmp_path / "hops"]  # fmt: skip
    for more, expected in (([], said), (["--max_new_tokens", 3], said.replace("max_length 6", "max_new_tokens 3"))):
        result = launch("retrieve_and_summarize.py", *flags, *more)
        assert result.returncode == 0, result.stderr
        assert expected in result.stdout
        (hop,) = json.loads((tmp_path / "hops/hops.validation.json").read_text())
        assert hop["generated_tokens"] <= (3 if more else 5) * len(records)
