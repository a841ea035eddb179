"""Scores of each hop: of its ranking, and of its draft."""

from collections.abc import Sequence

from utils.data.examples import Example


def score_hop(examples: Sequence[Example], records: Sequence[dict], number: int) -> dict[str, float]:
    """Mean scores after hop `number` (from 1): of the rankings if there is evidence, and ROUGE if there are references.

    `records` come from `hops_record`. An example whose search ended earlier counts with its last hop. ROUGE scores the
    drafts of the hop, or after the last hop the predictions.
    """
    from utils.evaluation.retrieval import score_rankings  # imports `evaluate`, which takes seconds
    from utils.evaluation.rouge import Rouge

    hops = [record["hops"][:number][-1] for record in records]
    found = [[(entry["passage"], entry["score"]) for entry in hop["retrieved"]] for hop in hops]
    evidence = [example.evidence for example in examples]
    scores = score_rankings(examples, found, evidence) if any(evidence) else {}
    scores.pop("examples", None)
    if all(example.summaries for example in examples):
        is_last = all(len(record["hops"]) <= number for record in records)
        texts = [record["prediction"] if is_last else hop["draft"] for record, hop in zip(records, hops, strict=True)]
        scores |= Rouge().compute(predictions=texts, references=[example.summaries for example in examples])
    return scores
