"""Scores of each hop: of its ranking, and of its draft."""

from collections.abc import Iterable, Sequence

from utils.data.examples import Example, Hop, Ranking
from utils.data.words import count_words
from utils.progress import progress
from utils.retrieval.pairs import gold_passages


def score_one_hop(examples: Sequence[Example], rankings: Sequence[Ranking], gold: Sequence) -> dict:
    """Scores of one ranking for each example against `gold`, a list of passages or None for each."""
    from utils.evaluation.retrieval import score_rankings  # imports `evaluate`, which takes seconds

    return score_rankings(examples, rankings, gold)


def score_hops(examples: Sequence[Example], hops: Sequence[Sequence[Hop]], gold: Sequence) -> dict:
    """Scores of the first hop of each example and, as `hop2`, of the second if there is one (see `score_one_hop`)."""
    of_hops = [[hop.retrieved for hop in of_hop] for of_hop in zip(*hops, strict=True)]
    first, *second = [score_one_hop(examples, rankings, gold) for rankings in of_hops]
    return {**first, "hop2": second[0]} if second else first


def score_beside_bm25(examples: Sequence[Example], hops: Sequence[Sequence[Hop]], index, args) -> dict:
    """`score_hops` against the gold passages of the examples, and the scores of BM25's rankings as `bm25`.

    `index` searches the documents (see `make_search`), `args` are the flags of train_retrieve.py. Without any gold
    passages there is nothing but the number 0 of `examples`.
    """
    gold = gold_passages(examples, args, required=False)
    bm25_rankings = index.bm25_rankings(examples, index.depth)
    return {**score_hops(examples, hops, gold), "bm25": score_one_hop(examples, bm25_rankings, gold)}


def score_hop(records: Iterable[dict], number: int) -> dict[str, float]:
    """Mean scores after hop `number` (from 1): of the rankings if there is evidence, and ROUGE if there are references.

    `records` come from `hops_record`, and their own numbers of passages are compared. An example whose search ended
    earlier counts with its last hop. ROUGE scores the drafts of the hop, or after the last hop the predictions.
    `new_evidence` is a later hop's: of the evidence that hop 1 did not read, the share that this hop reads, in percent.
    `with_reference` counts the examples that ROUGE is of, if some have no reference.
    """
    from utils.evaluation.retrieval import Retrieval  # imports `evaluate`, which takes seconds
    from utils.evaluation.rouge import Rouge

    columns = {name: [] for name in ("predictions", "references", "passage_words", "evidence_words")}
    is_last, texts, missed, found = True, [], 0, 0
    for record in progress(records, "read", f"records of hop {number}"):
        hop, evidence = record["hops"][:number][-1], record.get("evidence", [])
        columns["predictions"].append([entry["passage"] for entry in hop["retrieved"]])
        columns["references"].append(evidence)
        columns["passage_words"].append(list(map(count_words, record["passages"])))
        columns["evidence_words"].append(record.get("evidence_words"))
        new = set(evidence) - set(record["hops"][0]["read"])
        missed, found = missed + len(new), found + len(new & set(hop["read"]))
        is_last &= len(record["hops"]) <= number
        texts.append((record["prediction"], hop["draft"], record.get("summary", [])))
    scores = Retrieval().compute(**columns) if any(columns["references"]) else {}
    scores.pop("examples", None)
    if number > 1 and missed:
        scores["new_evidence"] = 100 * found / missed
    pairs = [(prediction if is_last else draft, [summary] if isinstance(summary, str) else summary)
             for prediction, draft, summary in texts if summary]  # fmt: skip
    if pairs:
        predictions, references = zip(*pairs, strict=True)
        scores |= Rouge().compute(predictions=predictions, references=references)
        scores |= {"with_reference": len(pairs)} if len(pairs) < len(texts) else {}
    return scores
