"""Examples in TensorBoard: the same ones at each validation, as plain text, and no step twice after a resume."""

import re
from html.parser import HTMLParser

import pytest
from conftest import events, inject, run
from reporting_cases import HOSTILE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from utils.data.examples import Corpus, Document, Example, Hop
from utils.reporting.examples import visible
from utils.reporting.markdown import as_text
from utils.reporting.tracking import ranking_texts, summary_texts

MARKUP = ["# title", "1. one", "- dash", "* star", "    code", "```\nfence\n```", "~~~\nfence\n~~~", "> quote",
          "a\n===", "---", "| a | b |\n|---|---|\n| 1 | 2 |", "**bold** _it_ __b__ `c`", "[a](http://b) ![i](j) <http://c>",
          "&amp; &#42; &lt;b&gt;", "\\* \\\\", "[ref]: http://x", "<b>x</b> <script>1</script> <br>", "<!-- c -->",
          "a  \nb", "\x02klzzwxh:0000\x03", "<div markdown='1'>*x*</div>"]  # fmt: skip


class Words(HTMLParser):
    """What a reader of a page sees, and the tags in it."""

    def __init__(self, html: str):
        super().__init__()
        self.seen, self.tags = "", set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.seen += " " if tag == "br" else ""

    def handle_data(self, data):
        self.seen += data


@pytest.mark.parametrize("text", [*MARKUP, *HOSTILE.values()])
def test_tensorboard_shows_a_text_as_it_is(text):
    page = Words(markdown_to_safe_html(f"**query:** {as_text(text)}\n\n**summary:** next"))
    assert page.tags <= {"p", "strong", "br"}
    assert " ".join(page.seen.split()) == f"query: {' '.join(visible(text).split())} summary: next"


def examples(count: int, document=None) -> list[Example]:
    document = document or Document("d", [f"passage {number}" for number in range(8)])
    return [Example(f"q{number}", f"query {number}", document, ["one", "two"], [1, 7], None, None)
            for number in range(count)]  # fmt: skip


def test_ten_examples_spread_over_the_split_are_shown_and_always_the_same():
    texts = summary_texts(examples(25), [f"prediction {number}" for number in range(25)])
    assert list(texts) == [f"examples/{number:02}" for number in range(1, 11)]
    shown = [int(re.search(r"query (\d+)", text)[1]) for text in texts.values()]
    assert shown == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]
    assert texts["examples/02"] == (
        "**example:** q2\n\n**query:** query 2\n\n**summary:** prediction 2\n\n**reference:** one\n\n**reference:** two"
    )
    assert len(summary_texts(examples(3), ["a", "b", "c"])) == 3


def test_the_best_passages_of_each_hop_are_shown_with_evidence_marked():
    first, second = [(3, 0.9), (1, 0.8), (0, 0.1)], [(number, 1.0) for number in (7, 1, 2, 3, 4, 5)]
    hops = [[Hop("a *draft*", [3], first), Hop("", [], second)]]
    text = ranking_texts(examples(1), hops, [[1, 7]])["examples/01"]
    assert text.split("\n\n") == [
        "**example:** q0", "**query:** query 0",
        "1. **passage** 3: passage 3\n1. **evidence, passage** 1: passage 1\n1. **passage** 0: passage 0",
        "**evidence that is not among them:** 7", "**hop 2, with the draft:** a &#42;draft&#42;",
        "1. **evidence, passage** 7: passage 7\n1. **evidence, passage** 1: passage 1\n1. **passage** 2: passage 2\n"
        "1. **passage** 3: passage 3\n1. **passage** 4: passage 4",
    ]  # fmt: skip
    page = Words(markdown_to_safe_html(text))
    assert page.tags == {"p", "strong", "ol", "li"} and "3: passage 3" in page.seen
    corpus = Corpus("c", ["x" * 5000, "b"], ["id_0", "id_1"], is_ordered=False)
    text = ranking_texts(examples(1, corpus), [[Hop("", [], [(0, 1.0)])]], [None])["examples/01"]
    assert "**passage** id&#95;0: xxx" in text and len(text) < 1200 and "evidence" not in text


def read(folder) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder / folder.name), size_guidance={"scalars": 0, "tensors": 0})
    return accumulator.Reload()


@pytest.mark.parametrize(
    "script",
    ["train_summarize.py", "train_retrieve.py", pytest.param("train_rerank.py", marks=pytest.mark.slow)],
)
def test_a_resumed_run_continues_its_events_without_a_step_twice(script, tmp_path):
    folder, flags = tmp_path / "run", ["--report_to", "tensorboard"]
    wrapper = inject(tmp_path, script, "utils.training.run:Run.end_step", "calls == 9", "os._exit(1)")
    run(wrapper, folder, *flags, expect=1)
    before = read(folder)
    assert [event.step for event in before.Scalars("train/loss")] == list(range(1, 9))  # checkpoints end at step 6
    run(script, folder, *flags)
    after = read(folder)
    lines = events(folder, "train")
    assert [event.step for event in after.Scalars("train/loss")] == list(range(1, 13))
    logged = [event.value for event in after.Scalars("train/loss")]
    assert logged == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    metric, beside = ("rougeL", "oracle") if script == "train_summarize.py" else ("ndcg@10", "bm25")
    assert [event.step for event in after.Scalars(f"validation/{metric}")] == [6, 12]
    [first, _] = after.Scalars(f"validation/{beside}/{metric}")
    assert first.value == pytest.approx(events(folder, "validation")[0][beside][metric], rel=1e-4)
    tags = [tag for tag in after.Tags()["tensors"] if tag.startswith("examples/")]
    assert len(tags) == 6  # of as many examples
    for tag in tags:
        steps, texts = zip(*((event.step, event.tensor_proto.string_val[0].decode()) for event in after.Tensors(tag)),
                           strict=True)  # fmt: skip
        assert steps == (6, 12)
        assert len({text.split("\n\n")[1] for text in texts}) == 1 and texts[0].count("**query:**") == 1
        assert ("**reference:**" if script == "train_summarize.py" else "**evidence") in texts[1]
