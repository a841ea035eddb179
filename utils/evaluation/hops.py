"""Scores of each hop: of its ranking, and of its draft."""

from collections.abc import Sequence

from utils.data.examples import Example, Hop, Ranking
from utils.retrieval.pairs import gold_passages
from utils.retrieval.ranking import KEPT


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
    bm25_rankings = index.bm25_rankings(examples, args.top_k if args.corpus_file else KEPT)
    return {**score_hops(examples, hops, gold), "bm25": score_one_hop(examples, bm25_rankings, gold)}


def score_hop(examples: Sequence[Example], records: Sequence[dict], number: int) -> dict[str, float]:
    """Mean scores after hop `number` (from 1): of the rankings if there is evidence, and ROUGE if there are references.

    `records` come from `hops_record`. An example whose search ended earlier counts with its last hop. ROUGE scores the
    drafts of the hop, or after the last hop the predictions. `new_evidence` is a later hop's: of the evidence that hop
    1 did not read, the share that this hop reads, in percent. `with_reference` counts the examples that ROUGE is of, if
    some have no reference.
    """
    from utils.evaluation.retrieval import score_rankings  # imports `evaluate`, which takes seconds
    from utils.evaluation.rouge import Rouge

    hops = [record["hops"][:number][-1] for record in records]
    found = [[(entry["passage"], entry["score"]) for entry in hop["retrieved"]] for hop in hops]
    evidence = [example.evidence for example in examples]
    scores = score_rankings(examples, found, evidence) if any(evidence) else {}
    scores.pop("examples", None)
    if number > 1:
        pairs = [(set(example.evidence or []) - set(record["hops"][0]["read"]), set(hop["read"]))
                 for example, record, hop in zip(examples, records, hops, strict=True)]  # fmt: skip
        if missed := sum(len(new) for new, _ in pairs):
            scores["new_evidence"] = 100 * sum(len(new & read) for new, read in pairs) / missed
    is_last = all(len(record["hops"]) <= number for record in records)
    texts = [record["prediction"] if is_last else hop["draft"] for record, hop in zip(records, hops, strict=True)]
    pairs = [(text, example.summaries) for text, example in zip(texts, examples, strict=True) if example.summaries]
    if pairs:
        predictions, references = zip(*pairs, strict=True)
        scores |= Rouge().compute(predictions=predictions, references=references)
        scores |= {"with_reference": len(pairs)} if len(pairs) < len(examples) else {}
    return scores
