"""What extracting sentences achieves: the scores that a trained summarizer is compared with."""

from collections.abc import Sequence

from utils.data.examples import Example
from utils.retrieval.baselines import oracle_ranking


def score_extracts(train: Sequence[Example], validation: Sequence[Example]) -> dict[str, dict[str, float]]:
    """ROUGE of two extracts of each validation document: {"lead": scores, "oracle": scores}.

    "lead" is the beginning of the document, as long as the training references are on average; "oracle" the passages
    that `oracle_ranking` chooses with the reference in hand.
    """
    from utils.evaluation.rouge import Rouge  # imports `evaluate`, which takes seconds

    lengths = [len(text.split()) for example in train for text in example.summaries]
    extracts = {
        "lead": [lead_text(example.document.passages, sum(lengths) / len(lengths)) for example in validation],
        "oracle": [
            " ".join(example.document.passages[passage] for passage, _ in oracle_ranking(example))
            for example in validation
        ],
    }
    references = [example.summaries for example in validation]
    return {name: Rouge().compute(predictions=texts, references=references) for name, texts in extracts.items()}


def lead_text(passages: Sequence[str], words: float) -> str:
    """The beginning of a document: whole passages until `words` words are reached."""
    lead, count = [], 0
    for passage in passages:
        if count >= words:
            break
        lead.append(passage)
        count += len(passage.split())
    return " ".join(lead)
