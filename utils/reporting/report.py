"""The report of a run, or of several: what stands in it, and the file."""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from utils.errors import UsageError, in_one_line
from utils.files import write_lines
from utils.progress import progress
from utils.reporting.comparison import compare
from utils.reporting.examples import MOST_PASSAGES, SUPPORT, View, cut, view, visible
from utils.reporting.folder import RunFolder, is_number, read_folder, read_records, shown
from utils.reporting.plots import Line, Plot, svg
from utils.reporting.rankings import MOST_SCORED, STEP, Ranked, beside, rank_records

MOST_EXAMPLES = 300
MOST_BYTES = 9_500_000  # of the examples of a page; the rest of it is small
MOST_CHANGED = 10  # questions that gained, and that lost
MOST_ROWS = 40  # validations in the table
UNITS = {"loss": " (bits)", "nll_loss": " (bits)", "ppl": ""}  # of other scores: percent
ROUGE = ("rouge1", "rouge2", "rougeL")


def write_report(accelerator, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
    """Writes `report.html` of a run into its folder, on the main process. A failure is said, and ends nothing."""
    if not accelerator.is_main_process:
        return
    try:
        write_page([read_folder(folder)], folder / "report.html")
        say(f"wrote {folder / 'report.html'}")
    except Exception as error:  # a report is no reason to lose a run
        why = f"{type(error).__name__}: {in_one_line(error)}"
        print(f"warning: no report.html ({why}); python -m utils.reporting {folder} tries again", file=sys.stderr)


def write_page(runs: Sequence[RunFolder], path: Path, max_examples: int = MOST_EXAMPLES) -> list[Plot]:
    """Writes the page of one run, or one that compares several; returns its plots."""
    content, plots = one_run(*runs, max_examples) if len(runs) == 1 else several_runs(runs, max_examples)
    template = _templates()
    sections, left = [], MOST_BYTES
    for section in content.pop("sections"):
        if "examples" in section:
            pages = []
            for number, example in enumerate(progress(section["examples"], "wrote", "examples of the report"), 1):
                html = template("example.html").render(
                    example=example, number=f"{section['key']}{number}", loop_number=number, **content
                )
                left -= len(html.encode("utf-8", errors="replace"))
                if left < 0:
                    break
                pages.append(html)
            section["examples"] = pages
        sections.append(section)
    write_lines(path, [template("report.html").render(sections=sections, **content)])
    return plots


def _templates():
    import jinja2
    from markupsafe import Markup

    def finalize(value):
        return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=finalize, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"cut": cut, "score": score, "points": points, "shown": shown,
                            "safe_plot": lambda plot: Markup(svg(plot)),
                            "already_escaped": Markup}  # fmt: skip
    environment.globals |= {"support_share": SUPPORT, "most_passages": MOST_PASSAGES,
                            "most_scored": MOST_SCORED}  # fmt: skip
    return environment.get_template


def score(value) -> str:
    """A number as a table shows it."""
    if not is_number(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if abs(value) >= 10 else f"{value:.4g}"


def points(value: float) -> str:
    """A difference, with its sign."""
    return f"{value:+.1f}".replace("-", "−")


# ---- training


def training_plots(runs: Sequence[RunFolder]) -> list[Plot]:
    """Loss, scores by validation, learning rate, gradient norm and speed, with a curve for each run."""
    plots, is_one, runs = [], len(runs) == 1, [run for run in runs if run.events]
    if not runs:
        return plots
    losses = [Line("training" if is_one else run.name, *run.curve("train", "loss")) for run in runs]
    if is_one:
        losses.append(Line("validation", *runs[0].curve("validation", "loss"), "dots"))
    marks = _marks(runs[0]) if is_one else []
    plots.append(Plot("loss", "Loss", "optimizer step", "loss (bits)", losses, marks))
    for metric in dict.fromkeys(run.metric for run in runs if run.metric):
        own = [run for run in runs if run.metric == metric]
        lines = [Line("this run" if is_one else run.name, *run.curve("validation", metric), "dots") for run in own]
        if is_one:
            lines += [Line(label, *runs[0].curve("validation", key, metric), "dashed")
                      for key, label in runs[0].beside.items()]  # fmt: skip
        best = runs[0].best if is_one else None
        best = best and (*best, f"{score(best[1])} at step {best[0]:,}")
        name = "scores" if metric == runs[0].metric else f"scores_{metric.replace('@', '_at_')}"
        plots.append(Plot(name, f"{metric} by validation", "optimizer step", metric + UNITS.get(metric, " (%)"), lines,
                          best=best))  # fmt: skip
    for name, key, title, unit, from_zero in (
        ("learning_rate", "lr", "Learning rate", "learning rate", True),
        ("gradient_norm", "gnorm", "Gradient norm, before clipping", "norm, mean of the interval", True),
        ("speed", "tokens_per_second", "Speed", "tokens per second", True),
    ):
        lines = [Line("this run" if is_one else run.name, *run.curve("train", key)) for run in runs]
        limit = runs[0].arguments.get("max_grad_norm")
        if key == "gnorm" and is_one and limit and lines[0].x:
            lines.append(Line(f"clipped to {limit:g}", [lines[0].x[0], lines[0].x[-1]], [limit, limit], "dashed"))
        plots.append(Plot(name, title, "optimizer step", unit, lines, from_zero=from_zero,
                          marks=marks if key == "gnorm" else [], width=4.6))  # fmt: skip
    for plot in plots:
        plot.lines = [line for line in plot.lines if len(line.x)]
    return [plot for plot in plots if plot.lines]


def _marks(run: RunFolder) -> list[tuple[float, str]]:
    kinds = {"resume": "resumed", "skip": "step dropped", "stop": "stop"}
    return [(line["step"], kinds[line["event"]]) for line in run.events if line["event"] in kinds]


def happened(run: RunFolder) -> list[str]:
    """What interrupted or ended training, in words."""
    said = {
        "resume": lambda line: f"Step {line['step']:,}: resumed from {line.get('checkpoint')}",
        "skip": lambda line: f"Step {line['step']:,}: dropped, because {line.get('reason')}",
        "checkpoint_skipped": lambda line: f"Step {line['step']:,}: no checkpoint, {line.get('reason', '')}",
        "stop": lambda line: f"Step {line['step']:,}: ended, {line.get('reason')}",
    }
    return [said[line["event"]](line) for line in run.events if line["event"] in said]


def status(run: RunFolder) -> str:
    """Where a run stands, in a few words."""
    if not run.events:
        return ""
    step = run.events[-1]["step"]
    if run.is_over:
        return (
            f"finished at step {step:,}, after {_duration(run.of('done')[-1].get('seconds', 0))} since its last start"
        )
    stops, trained = run.of("stop"), run.of("train")
    if stops:
        return f"stopped at step {step:,}: {stops[-1].get('reason')}"
    left = trained[-1].get("seconds_left") if trained else None
    rest = f", about {_duration(left)} to go at the last log line" if is_number(left) and left else ""
    return f"not finished: step {step:,}{rest}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def validations(run: RunFolder) -> dict | None:
    """The table of validations: columns, and rows of step, epoch, scores, and whether it is the best."""
    lines = run.of("validation")
    if not lines:
        return None
    first = [run.metric] if run.metric else []
    names = [
        name for name, value in lines[-1].items() if is_number(value) and name not in ("step", "epoch", "examples")
    ]
    columns = list(dict.fromkeys(name for name in first + names))[:9]
    beside = [(key, label) for key, label in run.beside.items() if isinstance(lines[-1].get(key), dict) and run.metric]
    best = run.best[0] if run.best else None
    rows = [
        {"step": line["step"], "epoch": line.get("epoch"), "is_best": line["step"] == best,
         "cells": [line.get(name) for name in columns] + [line[key].get(run.metric) if isinstance(line.get(key), dict)
                                                          else None for key, _ in beside]}
        for line in lines
    ]  # fmt: skip
    if len(rows) > MOST_ROWS:
        rows = [row for row in rows[:-MOST_ROWS] if row["is_best"]] + rows[-MOST_ROWS:]
    columns += [f"{run.metric}, {label}" for _, label in beside]
    return {"columns": columns, "rows": rows, "left_out": len(lines) - len(rows)}


def test_scores(run: RunFolder) -> list[dict]:
    """Of each scoring of the test split: the step of the model, and (name, score) pairs."""
    return [
        {"step": line.get("model_step", line["step"]),
         "scores": [(name, value) for name, value in line.items() if is_number(value) and "step" not in name]
         + [(f"{run.metric}, {label}", line[key].get(run.metric)) for key, label in run.beside.items()
            if isinstance(line.get(key), dict)]}
        for line in run.of("test")
    ]  # fmt: skip


# ---- retrieval


def ranking_plots(by_name: dict[str, Ranked], split: str) -> list[Plot]:
    """Recall by number of passages, and gold words by budget: of BM25 and each hop, or of each of several runs."""
    rankings = []  # name, style, recall, gold words
    for run, ranked in by_name.items():
        names = [name for name in ranked.recall if name != "BM25"] if len(by_name) == 1 else [ranked.own]
        rankings += [(name if len(by_name) == 1 else run, "line", ranked.recall[name], ranked.gold_words[name])
                     for name in names]  # fmt: skip
    ranked = next(iter(by_name.values()))
    if "BM25" in ranked.recall:
        rankings.append(("BM25", "dashed", ranked.recall["BM25"], ranked.gold_words["BM25"]))
    recall = [
        Line(name, range(1, len(values) + 1), values, style) for name, style, values, _ in rankings if len(values)
    ]
    gold = [Line(name, [STEP * number for number in range(len(values) + 1)], [0, *values], style)
            for name, style, _, values in rankings]  # fmt: skip
    return [
        Plot(f"recall_{split}", f"Recall by passages, {split}", "passages read (log scale)", "recall (%)", recall,
             log_x=True, from_zero=True),
        Plot(f"gold_words_{split}", f"Gold words by budget, {split}", "words read", "gold words (%)", gold,
             from_zero=True),
    ]  # fmt: skip


def changed_questions(ranked: Ranked, metric: str, first: str, last: str) -> list[dict]:
    """The questions that gained and lost most, each with its evidence and where both rankings have it."""
    tables = []
    changes = ranked.changes(metric, first, last, MOST_CHANGED)
    for title, questions in zip(("Gained most", "Lost most"), changes, strict=True):
        rows = []
        for number, change in questions:
            example = ranked.examples[number]
            before, after = ranked.ranks[first][number], ranked.ranks[last][number]
            evidence = [{"number": i, "text": example.document.passages[i], "before": before.get(i),
                         "after": after.get(i)} for i in example.evidence]  # fmt: skip
            rows.append({"id": example.id, "query": example.query, "change": change, "evidence": evidence[:5],
                         "more": len(evidence) - 5, "scores": [ranked.scores[name][metric][number]
                                                               for name in (first, last)]})  # fmt: skip
        tables.append({"title": title, "rows": rows})
    return tables


def ranking_section(run: RunFolder, split: str) -> tuple[dict | None, list[Plot]]:
    ranked = rank_records(read_records(run.files[split]), run.language)
    if ranked is None:
        return None, []
    plots = ranking_plots({run.name: ranked}, split)
    metric = run.metric if run.metric in next(iter(ranked.scores.values())) else "ndcg@10"
    first, last = next(iter(ranked.scores)), ranked.own
    return {
        "kind": "retrieval", "title": f"Retrieval, {split}", "key": f"r-{split}", "plots": plots, "metric": metric,
        "questions": len(ranked.examples), "is_cut": ranked.is_cut, "means": ranked.means(),
        "first": first, "last": last, "whole_ranks": ranked.whole_ranks,
        "changed": [] if first == last else changed_questions(ranked, metric, first, last),
    }, plots  # fmt: skip


# ---- summaries


def views(run: RunFolder, split: str, count: int) -> Iterator[View]:
    """The first examples of a split that has predictions."""
    path = run.files[split]
    if not path.name.startswith("predictions."):
        return
    for place, record in itertools.islice(read_records(path), count):
        yield view(record, place, language=run.language, drafts_are_summaries=run.drafts_are_summaries)


def count_examples(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


# ---- pages


def one_run(run: RunFolder, max_examples: int) -> tuple[dict, list[Plot]]:
    """What the template shows of one run, and all plots."""
    sections, plots = [], []
    if run.events:
        plots = training_plots([run])
        sections.append({"kind": "training", "title": "Training", "key": "training", "plots": plots,
                         "happened": happened(run), "validations": validations(run),
                         "tests": test_scores(run)})  # fmt: skip
    for number, split in enumerate(run.files):
        section, of_rankings = ranking_section(run, split)
        if hops := run.hops.get(split):
            names = dict.fromkeys(name for row in hops for name, value in row.items() if is_number(value))
            sections.append({"kind": "hops", "title": f"Scores of each hop, {split}", "key": f"h-{split}",
                             "names": [name for name in names if name != "hop"], "hops": hops,
                             "drafts_are_summaries": run.drafts_are_summaries})  # fmt: skip
        if section:
            sections.append(section)
            plots = plots + of_rankings
        examples = list(views(run, split, max_examples))
        if examples:
            sections.append({"kind": "examples", "title": f"Summaries, {split}", "key": f"e{number}-",
                             "examples": examples, "total": count_examples(run.files[split]), "runs": [],
                             **_offers(examples)})  # fmt: skip
    content = {"title": run.name, "status": status(run), "runs": [run], "sections": sections, "note": run.note,
               "facts": _facts(run), "differing": [], "is_several": False}  # fmt: skip
    return content, plots


def _offers(examples: Sequence[View]) -> dict:
    """Which orders and filters make sense for these examples."""
    return {
        "has_scores": any(example.scores for example in examples),
        "has_hops": any(example.change is not None for example in examples),
        "has_evidence": any(example.has_evidence for example in examples),
    }


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """The few numbers at the top of a page."""
    facts = []
    if run.best:
        facts.append((f"best {run.metric}", f"{score(run.best[1])} at step {run.best[0]:,}"))
    steps, losses = run.curve("train", "loss")
    if steps:
        facts.append(("training loss", f"{score(losses[0])} → {score(losses[-1])}"))
    if tests := run.of("test"):
        facts.append((f"test {run.metric}", score(tests[-1].get(run.metric))))
    for split, hops in run.hops.items():
        if hops and is_number(hops[-1].get("rougeL")) and run.drafts_are_summaries:
            facts.append((f"ROUGE-L by hop, {split}", " → ".join(score(row.get("rougeL")) for row in hops)))
        if hops and is_number(hops[-1].get("recall@5")):
            facts.append((f"recall@5 by hop, {split}", " → ".join(score(row.get("recall@5")) for row in hops)))
    if skipped := len(run.of("skip")):
        facts.append(("dropped steps", f"{skipped:,}"))
    return facts


def several_runs(runs: Sequence[RunFolder], max_examples: int) -> tuple[dict, list[Plot]]:
    """What the template shows of several runs side by side, and all plots."""
    _name_apart(runs)
    names, sections = [run.name for run in runs], []
    plots = training_plots(runs)
    if plots:
        sections.append({"kind": "training", "title": "Training", "key": "training", "plots": plots, "happened": [],
                         "validations": None, "tests": []})  # fmt: skip
    for number, split in enumerate(split for split in runs[0].files if all(split in run.files for run in runs)):
        section, by_id = compared(runs, split)
        if section:
            plots = plots + section["plots"]
            sections.append(section)
        common = [key for key in by_id[0] if all(key in of_run for of_run in by_id)]
        if common:
            examples = [[of_run[key] for of_run in by_id] for key in common[:max_examples]]
            sections.append({"kind": "examples", "title": f"Summaries side by side, {split}", "key": f"e{number}-",
                             "examples": examples, "total": len(common), "runs": names,
                             **_offers(list(itertools.chain(*examples)))})  # fmt: skip
    if not sections:
        raise UsageError(f"{', '.join(str(run.path) for run in runs)}: nothing that could be compared")
    flags = dict.fromkeys(itertools.chain(*(run.arguments for run in runs)))
    differing = [
        (name, [shown(run.arguments[name]) if name in run.arguments else "–" for run in runs])
        for name in flags if len({str(run.arguments.get(name)) for run in runs}) > 1
    ]  # fmt: skip
    content = {"title": " and ".join(names) if len(runs) < 3 else f"{len(runs)} runs", "status": "", "runs": runs,
               "sections": sections, "note": " ".join(run.note for run in runs).strip(), "facts": [],
               "differing": differing, "is_several": True}  # fmt: skip
    return content, plots


def compared(runs: Sequence[RunFolder], split: str) -> tuple[dict | None, list[dict[str, View]]]:
    """The section with the scores of a split, None if there are none, and the examples of each run by id."""
    tables, plots, changed, metric, whole_ranks = {}, [], [], None, 0
    ranked = [rank_records(read_records(run.files[split]), run.language) for run in runs]
    if all(ranked):
        _check_same(runs, [{e.id: e.query for e in of_run.examples} for of_run in ranked])
        plots = ranking_plots({run.name: of_run for run, of_run in zip(runs, ranked, strict=True)}, split)
        document_of = {example.id: example.document.id for example in ranked[0].examples}
        whole_ranks = min((of_run.whole_ranks for of_run in ranked if of_run.whole_ranks), default=0)
        for name in ranked[0].scores[ranked[0].own]:
            tables[name] = compare([of_run.by_id(name) for of_run in ranked], document_of)
        metric = runs[0].metric if runs[0].metric in tables else "ndcg@10"
        both = beside(ranked[0], ranked[-1])
        changed = changed_questions(both, metric, *both.scores)
    by_id = [{one.id: one for one in views(run, split, MOST_SCORED)} for run in runs]
    _check_same(runs, [{one.id: (one.query, one.references) for one in of_run.values()} for of_run in by_id])
    document_of = {one.id: one.document for one in by_id[0].values()}
    for name in ROUGE:
        scores = [{key: one.scores[name] for key, one in of_run.items() if one.scores} for of_run in by_id]
        if all(scores):
            tables[name] = compare(scores, document_of)
    tables = {name: table for name, table in tables.items() if table[0]}
    if not tables and not plots:
        return None, by_id
    return {"kind": "comparison", "title": f"Scores, {split}", "key": f"c-{split}", "tables": tables, "plots": plots,
            "changed": changed, "metric": metric, "whole_ranks": whole_ranks,
            "is_cut": any(count_examples(run.files[split]) > MOST_SCORED for run in runs)}, by_id  # fmt: skip


def _check_same(runs: Sequence[RunFolder], by_id: Sequence[dict]) -> None:
    """Raises UsageError if an id stands for different examples, such as row numbers of different files."""
    for run, of_run in zip(runs[1:], by_id[1:], strict=True):
        for key, what in of_run.items():
            if by_id[0].get(key, what) != what:
                both = f"{runs[0].path} and {run.path}"
                raise UsageError(f"{both}: '{key}' is another example there; compare runs on the same data")


def _name_apart(runs: Sequence[RunFolder]) -> None:
    """Gives runs whose folders have the same name, such as A/hops and B/hops, names that differ."""
    if len({run.name for run in runs}) < len(runs):
        for run in runs:
            run.name = f"{run.path.resolve().parent.name}/{run.name}"
    if len({run.name for run in runs}) < len(runs):
        for number, run in enumerate(runs, 1):
            run.name = f"{number}: {run.name}"
