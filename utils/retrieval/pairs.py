"""What the retriever is trained on: pairs of a query and the passages that it is compared with.

A pair's positives are the evidence that somebody marked, the passages that a ROUGE oracle chooses, or those that make
the reference likely to a summarizer. Its hard negatives rank high for what the pair searches with and are none of them.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.examples import Corpus, Document, Example, Ranking
from utils.data.hand_over import read_drafts
from utils.errors import UsageError
from utils.files import digest
from utils.models.encoder import tokenize
from utils.retrieval.drafts import reference_draft
from utils.retrieval.oracle import greedy_rouge_oracle
from utils.retrieval.ranking import hard_negatives, search_text


@dataclass
class Pair:
    """A training query and its passages, whose keys number the passages of all documents."""

    number: int  # its own, among all pairs
    example: Example
    document: int  # the key of its document's first passage
    query: list[int]  # tokens
    searches: list[str]  # what the first hop searches with and, where drafts are trained on, a later one
    drafts: list[tuple[str, list[int]]]  # real ones, each with the keys of the passages that it was written from
    evidence: list[int]  # keys
    weights: np.ndarray  # (evidence,) how often each is drawn as a positive, or the teacher's probability of each
    is_distribution: bool  # whether it is the latter
    negatives: list[list[int]]  # keys for each of `searches`, best first


def is_marked(example: Example, supervision: str) -> bool:
    """Whether its positives are evidence that somebody marked."""
    return example.evidence is not None and supervision == "evidence"


def positives(example: Example, supervision: str, oracle_passages: int) -> tuple[list[int], list[int]]:
    """Passage numbers, and how often each is drawn: as its gold words, which are few in some chunks of turns.

    Without marked evidence, or with `supervision` "rouge", they are what the greedy ROUGE oracle chooses, at most
    `oracle_passages`; from a corpus it chooses none.
    """
    if is_marked(example, supervision) or isinstance(example.document, Corpus):
        return example.evidence or [], example.evidence_words or []
    chosen = greedy_rouge_oracle(example.document.passages, example.summaries, oracle_passages)
    return sorted(chosen), [1] * len(chosen)


def gold_passages(examples: Sequence[Example], args) -> list[list[int] | None]:
    """What rankings are scored against: marked evidence, or the ROUGE oracle's choice if nothing is marked.

    Raises UsageError if there are none.
    """
    gold = [example.evidence for example in examples]
    if not any(gold) and not args.corpus_file:
        gold = [positives(example, args.supervision, args.oracle_passages)[0] for example in examples]
    if not any(gold):
        remedy = "its summaries share no word with their documents"
        remedy = "give --validation_qrels_file" if args.corpus_file else remedy
        raise UsageError(f"no validation example has evidence: nothing to score; {remedy}")
    return gold


class Pairs:
    """The pairs of the examples that have positives, and the tokens of their passages.

    Args:
        args: those of train_retrieve.py, of which the flags about positives, negatives, drafts and the teacher count.
        documents: those of the examples, or the one corpus.
        lexical: `lexical(examples, top_k, queries)` ranks passages by BM25.
    """

    def __init__(
        self, args, examples: Sequence[Example], documents: list[Document], retriever, *, lexical, accelerator
    ):
        self.args, self.documents, self.retriever = args, documents, retriever
        self.is_corpus = isinstance(documents[0], Corpus)
        first_keys = np.cumsum([0, *(len(document.passages) for document in documents)]).tolist()
        first_key = dict(zip(map(id, documents), first_keys, strict=False))

        drafts = read_drafts(args.drafts_file, examples) if args.drafts_file else [[] for _ in examples]
        searches = [[example.query] for example in examples]
        for example, those, of_hops in zip(examples, drafts, searches, strict=True):
            if args.draft_share:
                texts = [*example.summaries[:1], *(text for text, _ in those)]
                of_hops.append(search_text(example.query, texts[-1] if texts else ""))
        top_k = args.negatives_pool + 100 if self.is_corpus else None  # of a document all
        hops = 2 if args.draft_share else 1  # in one call, so that each document is indexed once
        asking = [example for example in examples for _ in range(hops)]
        ranked = lexical(asking, top_k, list(itertools.chain(*searches)))
        ranked = [ranked[hop::hops] for hop in range(hops)]
        taught = self._ask_teacher(examples, ranked[0], accelerator) if args.teacher else {}

        query_tokens = tokenize(retriever, [example.query for example in examples], "query")
        self.rows: list[Pair] = []
        for number, example in enumerate(examples):
            evidence, weights = taught.get(number) or positives(example, args.supervision, args.oracle_passages)
            if not sum(weights):
                continue
            first = first_key[id(example.document)]
            negatives = [hard_negatives(of_hop[number], evidence, args.negatives_pool) for of_hop in ranked]
            self.rows.append(Pair(
                number=len(self.rows),
                example=example,
                document=first,
                query=query_tokens[number],
                searches=searches[number],
                drafts=[(text, [first + passage for passage in read]) for text, read in drafts[number]],
                evidence=[first + passage for passage in evidence],
                weights=np.array(weights) / sum(weights),
                is_distribution=number in taught,
                negatives=[[first + passage for passage in of_hop] for of_hop in negatives],
            ))  # fmt: skip
        if not self.rows:
            remedy = "" if self.is_corpus else " or shares a word with its summary"
            raise UsageError(f"no training example has evidence{remedy}: nothing to train on")
        self.passage_tokens: dict[int, list[int]] = {}
        self._read_passages()

    def describe(self) -> str:
        """How many pairs there are, and where their positives come from."""
        marked = sum(is_marked(pair.example, self.args.supervision) for pair in self.rows)
        others = "the teacher" if self.args.teacher else "the ROUGE oracle"
        return f"{len(self.rows)} with positives ({marked} from evidence, the others from {others})"

    def is_mining_due(self, epoch: int, mined_in: int) -> bool:
        """Whether hard negatives are to be mined before this epoch, and were not: `mined_in` is the epoch they were."""
        every = self.args.mine_negatives_every
        return bool(every and epoch and epoch % every == 0 and mined_in != epoch)

    def _ask_teacher(self, examples: Sequence[Example], rankings: list[Ranking], accelerator) -> dict[int, tuple]:
        """By the number of an example without marked evidence: passage numbers and the probability of each."""
        from utils.retrieval.teacher import passage_likelihoods  # which only those pay for who ask

        args = self.args
        unmarked = [number for number, example in enumerate(examples) if not is_marked(example, args.supervision)]
        best = [rankings[number][: args.teacher_candidates] for number in unmarked]
        candidates = [sorted(passage for passage, _ in ranking) for ranking in best]
        likelihoods = passage_likelihoods(args.teacher, [examples[n] for n in unmarked], candidates, accelerator)
        return {
            number: (passages, np.exp((of_each - of_each.max()) / args.teacher_temperature))
            for number, passages, of_each in zip(unmarked, candidates, likelihoods, strict=True)
        }

    def _read_passages(self) -> None:
        """Tokenizes documents whole, and of a corpus the positives and hard negatives; each passage once."""
        texts, keys = [], []
        if self.is_corpus:
            wanted = {key for pair in self.rows for key in sum(pair.negatives, pair.evidence)}
            if keys := sorted(wanted - self.passage_tokens.keys()):
                texts = self.documents[0].passages[keys]
        elif not self.passage_tokens:
            texts = [text for document in self.documents for text in document.passages]
            keys = range(len(texts))
        self.passage_tokens.update(zip(keys, tokenize(self.retriever, texts, "passage"), strict=True))

    def digest(self) -> str:
        """A checksum of what is trained on."""
        return digest([
            sorted(self.passage_tokens.items()),
            # a teacher's likelihoods are rounded otherwise on another card
            [[pair.query, pair.evidence, pair.weights.round(4).tolist(), pair.negatives, pair.drafts]
             for pair in self.rows],
        ])  # fmt: skip

    def lengths(self) -> list[list[int]]:
        """(pairs, 2): tokens of the search text, and of positives and negatives, at most; each epoch draws others.

        Mined negatives may be longer: plans are made once, so that a run can go on from any step.
        """
        drafts = [
            max((*pair.example.summaries, *(text for text, _ in pair.drafts)), key=len, default="")
            if self.args.draft_share else "" for pair in self.rows
        ]  # fmt: skip
        longest = [search_text(pair.example.query, draft) for pair, draft in zip(self.rows, drafts, strict=True)]
        lengths = []
        for pair, search in zip(self.rows, tokenize(self.retriever, longest, "query"), strict=True):
            passage = max(len(self.passage_tokens[key]) for key in sum(pair.negatives, pair.evidence))
            positive = len(pair.evidence) if pair.is_distribution else min(self.args.num_positives, len(pair.evidence))
            negative = min(self.args.num_hard_negatives, max(map(len, pair.negatives)))
            lengths.append([len(search), passage * (positive + negative)])
        return lengths

    def draw(self, pair: Pair, epoch: int) -> tuple[list[int], np.ndarray, list[int]]:
        """Draws hop, positives and hard negatives, in each epoch anew.

        The draw is by the pair's own number: it does not depend on how a step is split into batches.

        Returns the tokens to search with, the weights of the pair's evidence, and the keys drawn.
        """
        args, rng = self.args, np.random.default_rng([self.args.seed, epoch, pair.number])
        search, weights, hop = pair.query, pair.weights, 0
        if rng.random() < args.draft_share and (pair.drafts or pair.example.summaries):
            hop = -1
            if pair.drafts:
                draft, read = pair.drafts[rng.integers(len(pair.drafts))]
                missing = ~np.isin(pair.evidence, read)
                if missing.any():  # what the draft was written from is found: a later hop is there for the rest
                    weights = weights * np.where(missing, 1.0, args.found_weight)
                    weights = weights / weights.sum()
            else:
                draft = reference_draft(pair.example.summaries, rng)
            search = tokenize(self.retriever, [search_text(pair.example.query, draft)], "query")[0]
        if pair.is_distribution:  # over all of them
            drawn = list(pair.evidence)
        else:
            count = min(args.num_positives, np.count_nonzero(weights))
            drawn = rng.choice(pair.evidence, count, replace=False, p=weights).tolist()
        count = min(args.num_hard_negatives, len(pair.negatives[hop]))
        drawn += rng.choice(pair.negatives[hop], count, replace=False).tolist() if count else []
        return search, weights, drawn

    def mine(self, ranked: Callable) -> None:
        """Gives each pair the hard negatives that the model as it is ranks highest; called on all processes.

        `ranked(examples, top_k=..., queries=...)` ranks passages by the model.
        """
        args, mined = self.args, self.negatives()
        # of how many pairs the rankings are in memory, and how many passages of each
        at_once, top_k = (2**13, 5 * args.negatives_pool + 100) if self.is_corpus else (len(self.rows), None)
        for first in range(0, len(self.rows), at_once):
            block = self.rows[first : first + at_once]
            queries = list(itertools.chain(*zip(*(pair.searches for pair in block), strict=True)))
            # all hops' together, so that each document is encoded once
            asking = [pair.example for pair in block] * (len(queries) // len(block))
            for number, ranking in enumerate(ranked(asking, top_k=top_k, queries=queries)):
                hop, place = divmod(number, len(block))
                pair = block[place]
                evidence = [key - pair.document for key in pair.evidence]
                found = hard_negatives(ranking, evidence, args.negatives_pool, args.negatives_margin)
                if found:
                    mined[pair.number][hop] = [pair.document + passage for passage in found]
        self.set_negatives(mined)  # only now: an interrupted search leaves those that there were

    def negatives(self) -> list[list[list[int]]]:
        """Those of each pair, for a checkpoint; `set_negatives` takes them back."""
        return [list(pair.negatives) for pair in self.rows]

    def set_negatives(self, negatives: list[list[list[int]]]) -> None:
        for pair, those in zip(self.rows, negatives, strict=True):
            pair.negatives = those
        self._read_passages()
