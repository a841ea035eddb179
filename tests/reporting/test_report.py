"""The report of a run and of several: what stands in it, that it shows any text, and what happens if it fails."""

import json
import os
import re
import runpy
import shutil
import sys
from html.parser import HTMLParser
from unittest.mock import Mock

import pytest
from conftest import alone
from reporting_cases import HOSTILE, example, hop, hops_records, retrieved_records, write_hops, write_training

from utils.errors import UsageError
from utils.files import write_json, write_jsonl
from utils.models.settings import FILE as SETTINGS
from utils.reporting import report
from utils.reporting.folder import read_folder
from utils.reporting.plots import MOST_POINTS, Line, Plot, svg, thinned, write_png
from utils.reporting.report import one_run, status, training_plots, write_page, write_report


class Page(HTMLParser):
    """The texts of a page, its tags with attributes, and what its scripts say."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.texts, self.within = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.within.append(tag)

    def handle_endtag(self, tag):
        if tag in self.within:
            while self.within.pop() != tag:
                pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.within):
            self.texts.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(*folders, output=None, **options) -> Page:
    output = output or folders[0] / "report.html"
    write_page([read_folder(folder) for folder in folders], output, **options)
    return Page(output)


# ---- training


def test_curves_the_best_validation_and_what_happened(tmp_path):
    run = read_folder(write_training(tmp_path / "run"))
    assert run.best == (20, 60.0)
    plots = {plot.name: plot for plot in training_plots([run])}
    assert list(plots) == ["loss", "scores", "learning_rate", "gradient_norm", "speed"]
    assert plots["loss"].lines[0].x == [10, 20, 30] and plots["loss"].lines[0].y[0] == 5
    assert plots["loss"].marks == [(12, "step dropped"), (15, "resumed"), (30, "stop")]
    assert plots["scores"].best[:2] == (20, 60.0)
    assert [line.label for line in plots["scores"].lines] == ["this run", "BM25"]
    assert "Best: 60.0 at step 20" in plots["scores"].description
    assert "this run: from 40 at 10 to 50 at 30, between 40 and 60." in plots["scores"].description
    page = page_of(tmp_path / "run")
    assert "Step 12: dropped, because the gradient norm is not finite" in page.text
    assert "resumed from checkpoints/step_00000015" in page.text and "finished at step 30" in page.text
    assert re.search(r'class="best"><th scope="row">20 ', page.source)
    assert "--learning_rate 0.001" in page.text and "python train_retrieve.py --learning_rate 1e-3" in page.text
    labels = [tag["aria-label"] for tag in page.all("div") if tag.get("role") == "img"]
    assert len(labels) == 5 and all(": from " in label for label in labels)


def test_of_losses_the_smallest_is_best_and_of_equal_scores_the_first(tmp_path):
    folder = write_training(tmp_path / "run", scores=(2.0, 1.0, 1.0), greater_is_better=False)
    assert read_folder(folder).best == (20, 1.0)


def test_flags_of_the_command_are_those_that_were_set(tmp_path):
    run = read_folder(write_training(tmp_path / "run", nan_detector=False))
    assert run.flags == [("learning_rate", "0.001"), ("nan_detector", "false")]
    run = read_folder(write_hops(tmp_path / "hops", no_repeat_ngram_size=6))
    run.command += " --no_repeat_ngram_size 6"
    assert run.flags == [("num_hops", "2"), ("no_repeat_ngram_size", "6")]


def test_results_of_an_earlier_command_are_said_to_be(tmp_path):
    folder = write_hops(tmp_path / "run")
    assert read_folder(folder).note == ""
    write_jsonl(folder / "predictions.document.jsonl", hops_records())
    os.utime(folder / "predictions.validation.jsonl", (0, 0))
    page = page_of(folder)
    assert "Of an earlier command than the one below, with other flags: predictions.validation.jsonl" in page.text
    assert "Summaries, validation" in page.text and "Summaries, document" in page.text


def test_drafts_of_a_second_hop_are_called_imitated_unless_they_were_given(tmp_path):
    for given, name in ((None, "hop 2, imitated drafts"), ("drafts.jsonl", "hop 2, given drafts")):
        folder = write_training(tmp_path / name, validation_drafts_file=given)
        events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for event in events:
            event |= {"hop2": {"ndcg@10": 70.0}} if event["event"] == "validation" else {}
        write_jsonl(folder / "metrics.jsonl", events)
        page = page_of(folder)
        assert f"ndcg@10, {name}" in page.text and page.text.count("hop 2") == page.text.count(name)


def test_the_words_of_a_report_are_of_the_language_of_the_retriever(tmp_path):
    retriever = tmp_path / "retriever"
    retriever.mkdir()
    write_json(retriever / SETTINGS, {"model_name_or_path": None, "language": "german"})
    assert read_folder(write_hops(tmp_path / "a", retriever=str(retriever))).language == "german"
    assert read_folder(write_hops(tmp_path / "b", retriever="bm25", language="de")).language == "de"
    assert read_folder(write_hops(tmp_path / "c", retriever=str(tmp_path / "gone"))).language is None


def test_a_run_that_goes_on_shows_its_curves_and_no_examples_of_an_earlier_end(tmp_path):
    folder = write_training(tmp_path / "run", ends=False)
    write_jsonl(folder / "retrieved.validation.jsonl", retrieved_records())
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 4')  # as it is being written
    page = page_of(folder)
    assert "not finished: step 30, about 2 min to go" in page.text
    assert "retrieved.validation.jsonl is of an earlier end of this run" in page.text and "BM25 ranks" not in page.text
    page = page_of(write_training(folder))
    assert "BM25 ranks the same passages" in page.text and "earlier end" not in page.text


def test_a_run_without_any_event_yet(tmp_path):
    folder = write_training(tmp_path / "run")
    (folder / "metrics.jsonl").write_text("")
    assert status(read_folder(folder)) == "" and "This run" in page_of(folder).text


def test_rankings_beside_bm25_and_the_questions_that_changed(tmp_path):
    folder = write_training(tmp_path / "run")
    write_jsonl(folder / "retrieved.validation.jsonl", retrieved_records())
    write_jsonl(folder / "retrieved.train.jsonl", [{"not": "read"}])
    content, plots = one_run(read_folder(folder), 300)
    section = content["sections"][1]
    assert section["title"] == "Retrieval, validation" and section["means"]["this run"]["recall@1"] == 50
    assert [[row["id"] for row in table["rows"]] for table in section["changed"]] == [["q0"], ["q1"]]
    assert section["changed"][1]["rows"][0]["evidence"][0]["after"] == 4
    assert [plot.name for plot in plots][-2:] == ["recall_validation", "gold_words_validation"]
    assert "Gained most" in page_of(folder).text and "holds only" not in page_of(folder).text


def test_rankings_that_the_file_cuts_too_early_for_the_scores_are_said_to_be(tmp_path):
    records = retrieved_records()
    for record in records:
        record["retrieved"] = record["retrieved"][:2]
    for folder in (tmp_path / "a", tmp_path / "b"):
        write_jsonl(write_training(folder) / "retrieved.validation.jsonl", records)
    said = "holds only the 2 best passages of a question ( --top_k )"
    _, plots = one_run(read_folder(tmp_path / "a"), 300)
    assert [len(line.y) for plot in plots if plot.name == "recall_validation" for line in plot.lines] == [2, 2]
    assert said in page_of(tmp_path / "a").text
    assert said in page_of(tmp_path / "a", tmp_path / "b", output=tmp_path / "both.html").text


def test_extracts_as_drafts_are_not_shown_as_a_gain_of_the_last_hop(tmp_path):
    for drafter, shown in ((None, True), ("extract", False)):
        folder = write_hops(tmp_path / f"{drafter}", drafter=drafter)
        write_json(folder / "hops.validation.json", [{"hop": 1, "rougeL": 20.0}, {"hop": 2, "rougeL": 30.5}])
        text = page_of(folder).text
        assert ("ROUGE-L by hop, validation" in text) == shown
        assert ("which are not written like the summaries" in text) == (not shown)


# ---- summaries


def test_examples_with_their_support_evidence_and_hops(tmp_path):
    page = page_of(write_hops(tmp_path / "run"))
    items = [tag for tag in page.all("li") if tag.get("class") == "example"]
    assert float(items[0]["data-change"]) > 0 > float(items[1]["data-change"]) and items[2]["data-change"] == ""
    assert [tag["data-unsupported"] for tag in items] == ["0", "0", "1"]
    assert [tag["data-missed"] for tag in items] == ["0", "1", "0"]
    assert "hops helped" in page.text and "hops hurt" in page.text and "missed evidence" in page.text
    assert "through the draft's Norwood" in page.text and "ROUGE-1 recall" in page.text
    targets = {tag["id"] for _, tag in page.tags if "id" in tag}
    links = [tag["href"] for tag in page.all("a")]
    assert links and all(link[1:] in targets for link in links)
    ids = [tag["id"] for _, tag in page.tags if "id" in tag]
    assert len(ids) == len(set(ids))


def test_scores_of_each_hop_and_what_is_not_of_each(tmp_path):
    folder = write_hops(tmp_path / "run")
    hops = [{"hop": 1, "recall@5": 50.0, "rougeL": 20.0, "examples": 3},
            {"hop": 2, "recall@5": 75.0, "new_evidence": 40.0, "rougeL": 30.5}]  # fmt: skip
    write_json(folder / "hops.validation.json", hops)
    page = page_of(folder)
    assert "Score hop 1 hop 2 recall@5 50.0 75.0 rougeL 20.0 30.5 examples 3 – new_evidence – 40.0" in page.text
    assert "ROUGE-L by hop, validation 20.0 → 30.5" in page.text


def test_any_text_is_shown_as_text(tmp_path):
    records = [
        example(number, passages=[text, "plain words"], prediction=f"{text} words.", query=text, summary=text,
                evidence=[1], hops=[hop(text, [0]), hop(text, [0, 1])], doc_id=text, passage_ids=[text, "x"])
        for number, text in enumerate(HOSTILE.values())
    ]  # fmt: skip
    folder = write_hops(tmp_path / "<b>&\"'run", records, prompt_template="</script><script>alert(1)</script>")
    (folder / "command.txt").write_text("python x.py --prompt_template '</pre><script>alert(2)</script>'\n")
    page = page_of(folder)
    assert len(page.all("script")) == 1 and not page.all("img") and page.source.count("<!--") == 0
    assert not {name for _, tag in page.tags for name in tag if name.startswith("on")}
    assert "<script>window.broken = true; throw new Error('run')</script>" in page.text and "alert(2)" in page.text
    assert "{{ 7 * 7 }}{% raw %}" in page.text
    assert "before␀after ␛[31mred␇" in page.text and "half \\ud83d of a pair" in page.text
    assert HOSTILE["emoji"] in page.text and HOSTILE["rtl"] in page.text
    assert "\x00" not in page.source and "\x1b" not in page.source
    assert "w" * 8000 + " … (2,000 more characters)" in page.text  # a question


def test_the_page_is_one_file_that_fetches_nothing(tmp_path):
    folder = write_training(tmp_path / "run")
    write_jsonl(folder / "predictions.validation.jsonl", hops_records())
    page = page_of(folder)
    assert not [tag for name, tag in page.tags if name in ("link", "iframe", "img", "source", "base", "object")]
    assert not [tag for _, tag in page.tags if "src" in tag]
    outward = [tag.get("href", tag.get("xlink:href", "#")) for _, tag in page.tags]
    assert all(link.startswith("#") for link in outward)
    assert "url(http" not in page.source and "@import" not in page.source
    assert page.all("meta")[3]["content"].startswith("default-src 'none'")


def test_a_page_is_limited_in_examples_and_bytes_and_says_so(tmp_path, monkeypatch):
    records = [{**hops_records()[0], "id": f"q{number}"} for number in range(20)]
    folder = write_hops(tmp_path / "run", records)
    page = page_of(folder, max_examples=5)
    assert sum(tag.get("class") == "example" for tag in page.all("li")) == 5
    assert "The first 5 of 20 examples" in page.text
    monkeypatch.setattr(report, "MOST_BYTES", 30_000)
    page = page_of(folder)
    shown = sum(tag.get("class") == "example" for tag in page.all("li"))
    assert 2 < shown < 20 and f"The first {shown} of 20 examples" in page.text


def test_without_references_evidence_and_rankings(tmp_path):
    record = {"id": "document", "query": "", "passages": ["Ann spoke."], "prediction": "",
              "hops": [{"draft": "", "read": [], "retrieved": []}]}  # fmt: skip
    page = page_of(write_hops(tmp_path / "run", [record]))
    assert "The summary is empty" in page.text and "worst ROUGE-L" not in page.text and "Retrieval" not in page.text


# ---- several runs


def test_runs_are_compared_on_the_questions_that_both_have(tmp_path):
    ours, theirs = write_hops(tmp_path / "a/hops"), tmp_path / "b/hops"
    records = hops_records()[:2]
    records[1] = {**records[1], "prediction": "Wooden fences cracked in the cellar."}
    write_hops(theirs, records, num_hops=3)
    page = page_of(ours, theirs, output=tmp_path / "both.html")
    assert "a/hops and b/hops" in page.text and "2 questions" in page.text
    assert "--num_hops 2 3" in page.text and "--output_dir" in page.text
    row = re.search(r'<th scope="row">rougeL</th>(.*?)</tr>', page.source, re.DOTALL)[1]
    means = re.findall(r"<td>([0-9.]+) ", row)
    assert float(means[0]) < float(means[1]) == 100
    assert sum(tag.get("class") == "example" for tag in page.all("li")) == 2
    assert [tag["value"] for tag in page.all("input") if tag.get("type") == "radio"] == ["", "1", "2"]


def test_ids_that_stand_for_different_examples_are_refused(tmp_path):
    ours, theirs, ranked = (write_hops(tmp_path / name) for name in ("ours", "theirs", "ranked"))
    records = hops_records()
    records[2]["summary"] = "Another reference."
    write_hops(theirs, records)
    with pytest.raises(UsageError, match="'q2' is another example there; compare runs on the same data"):
        page_of(ours, theirs, output=tmp_path / "both.html")
    records = [{**record, "query": f"{record['query']} Really?"} for record in hops_records()]
    write_hops(ranked, records)
    with pytest.raises(UsageError, match="'q0' is another example there"):
        page_of(ours, ranked, output=tmp_path / "both.html")


def test_scores_of_other_questions_say_so(tmp_path):
    records = hops_records()
    del records[0]["summary"]
    page = page_of(write_hops(tmp_path / "a", records), write_hops(tmp_path / "b", records), output=tmp_path / "x.html")
    assert "3 questions about 2 documents" in page.text and "rouge1 2 questions about 2 documents" in page.text


def test_the_test_split_with_the_step_of_its_model(tmp_path):
    folder = write_training(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"event": "test", "step": 30, "model_step": 20, "ndcg@10": 55.5, "bm25": {"ndcg@10": 31.0}})
        )
    page = page_of(folder)
    assert "scored with the model of step 20 ndcg@10 55.5 ndcg@10, BM25 31.0" in page.text
    assert "test ndcg@10 55.5" in page.text


def test_rankings_of_two_runs_are_compared(tmp_path):
    first, second = (write_training(tmp_path / name) for name in ("first", "second"))
    write_jsonl(first / "retrieved.validation.jsonl", retrieved_records())
    records = retrieved_records()
    records[1]["retrieved"] = records[1]["retrieved"][::-1]
    write_jsonl(second / "retrieved.validation.jsonl", records)
    page = page_of(first, second, output=tmp_path / "both.html")
    row = re.search(r'<th scope="row">mrr@10</th>(.*?)</tr>', page.source, re.DOTALL)[1]
    assert re.findall(r"<td>([0-9.]+) ", row) == ["62.5", "100.0"] and "+37.5" in row
    assert "mrr@10" in page.text and "Gained most" in page.text and "second less first" in page.text
    labels = [tag["aria-label"] for tag in page.all("div") if tag.get("role") == "img"]
    assert "first: from 5 at 10" in labels[0] and "second: from 5 at 10" in labels[0]


# ---- the command


def run_command(capsys, monkeypatch, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["reporting", *map(str, arguments)])
    try:
        runpy.run_module("utils.reporting", run_name="__main__")
        code = 0
    except SystemExit as leaving:
        code = leaving.code
    return code, *capsys.readouterr()


def test_command_writes_the_page_and_plots(tmp_path, capsys, monkeypatch):
    folder = write_training(tmp_path / "run")
    code, said, _ = run_command(capsys, monkeypatch, folder, "--plots")
    assert code == 0 and said.splitlines()[0] == f"wrote {folder / 'report.html'}"
    pngs = sorted(path.name for path in (folder / "plots").iterdir())
    assert pngs == ["gradient_norm.png", "learning_rate.png", "loss.png", "scores.png", "speed.png"]
    assert all((folder / "plots" / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for name in pngs)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder; name the --output_dir of a run"),
        (["empty"], "empty: holds no run; name a folder with metrics.jsonl"),
        (["run", "run/"], "a folder is named twice"),
        (["run", "--max_examples", "0"], "--max_examples 0: must be at least 1"),
        (["run", "--output", "nowhere/x.html"], "--output nowhere/x.html: must be a file in a folder that exists"),
        (["run", "--outptu", "x"], "did you mean --output?"),
        (["damaged"], "predictions.validation.jsonl:2: "),
        (["run", "idle"], "nothing that could be compared"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    write_hops(tmp_path / "run")
    damaged = write_hops(tmp_path / "damaged") / "predictions.validation.jsonl"
    lines = damaged.read_text().splitlines()
    damaged.write_text(f"{lines[0]}\n{lines[1][:50]}\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "idle").mkdir()
    write_json(tmp_path / "idle/arguments.json", {"seed": 1})
    code, output, error = run_command(capsys, monkeypatch, *arguments)
    assert code == 2 and said in error and len(error.splitlines()) == 1 and not output


# ---- at the end of a script


def test_only_the_main_process_writes(tmp_path):
    folder = write_training(tmp_path / "run")
    write_report(alone(is_main_process=False), folder)
    assert not (folder / "report.html").exists()
    said = []
    write_report(alone(), folder, said.append)
    assert said == [f"wrote {folder / 'report.html'}"] and (folder / "report.html").exists()


def test_a_report_that_fails_is_said_keeps_the_last_one_and_ends_nothing(tmp_path, capsys, monkeypatch):
    folder = write_training(tmp_path / "run")
    write_report(alone(), folder)
    before = (folder / "report.html").read_bytes()
    write_jsonl(folder / "predictions.validation.jsonl", [{"id": "q"}])
    write_report(alone(), folder)
    said = capsys.readouterr().err
    assert said.startswith("warning: no report.html (DataError: ") and len(said.splitlines()) == 1
    assert "predictions.validation.jsonl:1: no 'id' and 'passages'" in said and "python -m utils.reporting" in said
    assert (folder / "report.html").read_bytes() == before
    for error in (MemoryError(), OSError(28, "No space left on device"), RuntimeError("of\na library")):
        monkeypatch.setattr(report, "write_page", Mock(side_effect=error))
        write_report(alone(), folder)
        said = capsys.readouterr().err
        assert type(error).__name__ in said and len(said.splitlines()) == 1
    shutil.rmtree(folder)
    write_report(alone(), folder)
    assert "no such folder" in capsys.readouterr().err


# ---- plots


def test_a_long_curve_is_thinned_to_means_and_gaps_are_left_out():
    x, y = thinned(range(10 * MOST_POINTS), [float(i) for i in range(10 * MOST_POINTS)])
    assert len(x) == MOST_POINTS and x[0] == y[0] == 4.5
    x, y = thinned([1, 2, 3], [1.0, float("nan"), 3.0])
    assert x.tolist() == [1, 3] and y.tolist() == [1, 3]


def test_svg_and_png_show_any_label(tmp_path):
    line = Line("<b>$x$ & 会议 \u202e</b>", [1, 2], [1.0, 2.0])
    plot = Plot("any", "Title", "step", "loss (bits)", [line, Line("one", [1], [3.0])], marks=[(1.5, "stop")])
    code = svg(plot)
    assert code.startswith("<svg") and "&lt;b&gt;$x$ &amp; 会议" in code and "<b>" not in code
    assert "var(--plot1)" in code and "#0072b2" not in code.lower() and "var(--ink)" in code
    assert json.dumps(code) and 'id="' not in re.sub(r'<(clipPath|path|use|marker)[^>]*id="', "", code)
    assert write_png(plot, tmp_path / "plots").stat().st_size > 10_000
