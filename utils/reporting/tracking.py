"""Examples of a validation as Markdown, for TensorBoard: the same ones each time, to see how they change."""

from collections.abc import Sequence

from utils.data.examples import Corpus, Example, Hop
from utils.reporting.markdown import as_text

SHOWN = 10  # examples
MOST_PASSAGES = 5  # of a ranking
MOST_CHARACTERS = 1000  # of a text


def summary_texts(examples: Sequence[Example], predictions: Sequence[str]) -> dict[str, str]:
    """By tag, the query, the summary and the references of the examples that are shown."""
    texts = {}
    for tag, number in _shown(len(examples)):
        example = examples[number]
        parts = [*_heading(example), ("summary", predictions[number])]
        parts += [("reference", reference) for reference in example.summaries]
        texts[tag] = _paragraphs(parts)
    return texts


def ranking_texts(examples: Sequence[Example], hops: Sequence[Sequence[Hop]], gold: Sequence) -> dict[str, str]:
    """By tag, the query of the examples that are shown, and the best passages of each hop, with evidence marked.

    `gold` holds the passages that rankings are scored against, or None, for each example.
    """
    texts = {}
    for tag, number in _shown(len(examples)):
        example, evidence = examples[number], set(gold[number] or ())
        paragraphs = [_paragraphs(_heading(example))]
        for hop in hops[number]:
            best = [passage for passage, _ in hop.retrieved[:MOST_PASSAGES]]
            paragraphs.append("\n".join(f"1. {_passage(example, passage, evidence)}" for passage in best))
            if missed := sorted(evidence - set(best)):
                names = ", ".join(_name(example, passage) for passage in missed[:SHOWN])
                paragraphs.append(_paragraphs([("evidence that is not among them", names)]))
            if hop.draft:
                paragraphs.append(_paragraphs([("hop 2, with the draft", hop.draft)]))
        texts[tag] = "\n\n".join(paragraphs)
    return texts


def _shown(count: int) -> list[tuple[str, int]]:
    """Tags and numbers of the examples that are shown, spread evenly over a split of `count` examples."""
    numbers = [place * count // SHOWN for place in range(SHOWN)] if count > SHOWN else range(count)
    return [(f"examples/{place:02}", number) for place, number in enumerate(numbers, 1)]


def _heading(example: Example) -> list[tuple[str, str]]:
    return [("example", example.id), *([("query", example.query)] if example.query else [])]


def _paragraphs(parts: Sequence[tuple[str, str]]) -> str:
    return "\n\n".join(f"**{name}:** {as_text(_cut(text))}" for name, text in parts)


def _passage(example: Example, passage: int, evidence: set[int]) -> str:
    mark = "evidence, " if passage in evidence else ""
    text = _cut(example.document.passages[passage])
    return f"**{mark}passage** {as_text(_name(example, passage))}: {as_text(text)}"


def _name(example: Example, passage: int) -> str:
    document = example.document
    return document.passage_id(passage) if isinstance(document, Corpus) else str(passage)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"
