"""ROUGE of extracts, with which a trained summarizer is compared."""

import itertools
from collections.abc import Sequence

from utils.data.examples import Example
from utils.retrieval.baselines import oracle_ranking


def score_extracts(train: Sequence[Example], validation: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Returns ROUGE of two extracts of each validation document: {"lead": scores, "oracle": scores}.

    "lead" is the beginning of the document, as long as the average training reference. "oracle" is the passages that
    `oracle_ranking` chooses; it sees the reference.
    """
    from utils.evaluation.rouge import Rouge  # imports `evaluate`, which takes seconds

    lengths = [len(text.split()) for example in train for text in example.summaries]
    words = sum(lengths) / len(lengths)
    extracts = {"lead": [], "oracle": []}
    for example in validation:
        passages = example.document.passages
        extracts["lead"].append(_lead_text(passages, words))
        extracts["oracle"].append(" ".join(passages[passage] for passage, _ in oracle_ranking(example)))
    references = [example.summaries for example in validation]
    return {name: Rouge().compute(predictions=texts, references=references) for name, texts in extracts.items()}


def _lead_text(passages: Sequence[str], words: float) -> str:
    """Whole passages from the beginning, until they have `words` words."""
    words_before = itertools.accumulate((len(passage.split()) for passage in passages), initial=0)
    return " ".join(passage for passage, before in zip(passages, words_before, strict=False) if before < words)
