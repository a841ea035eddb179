"""ROUGE of extracts, with which a trained summarizer is compared."""

import itertools
from collections.abc import Sequence

from accelerate.utils import gather_object

from utils.data.examples import Example
from utils.data.words import count_words
from utils.processes import wait_for_all
from utils.progress import progress
from utils.retrieval.baselines import oracle_ranking


def score_extracts(train: Sequence[Example], scored: Sequence[Example], accelerator) -> dict[str, dict[str, float]]:
    """Returns ROUGE of two extracts of the document of each example in `scored`: {"lead": scores, "oracle": scores}.

    "lead" is the beginning of the document, as long as the average training reference. "oracle" is the passages that
    `oracle_ranking` chooses; it sees the reference. Examples without a reference are left out. Called on all processes:
    each scores a part.
    """
    from utils.evaluation.rouge import mean_of_each, rouge_of_each  # imports `evaluate`, which takes seconds

    lengths = [count_words(text) for example in train for text in example.summaries]
    words = sum(lengths) / len(lengths)
    mine = [example for example in scored if example.summaries][accelerator.process_index :: accelerator.num_processes]
    scores = {"lead": [], "oracle": []}
    for example in progress(mine, "scored extracts of", "examples", is_own=True):
        passages = example.document.passages
        oracle = " ".join(passages[passage] for passage, _ in oracle_ranking(example))
        scores["lead"] += rouge_of_each([_lead_text(passages, words)], [example.summaries])
        scores["oracle"] += rouge_of_each([oracle], [example.summaries])
    if accelerator.num_processes > 1:
        wait_for_all()
        scores = {name: gather_object(of_each) for name, of_each in scores.items()}
    return {name: mean_of_each(of_each) for name, of_each in scores.items()}


def _lead_text(passages: Sequence[str], words: float) -> str:
    """Whole passages from the beginning, until they have `words` words."""
    words_before = itertools.accumulate(map(count_words, passages), initial=0)
    return " ".join(passage for passage, before in zip(passages, words_before, strict=False) if before < words)
