"""The retriever's training data: pairs of a query and the passages that it is compared with.

Positives are gold evidence, passages chosen by a ROUGE oracle, or passages that make the reference likely to a
summarizer (the teacher). Hard negatives are other passages that rank high for the pair's search text.
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
from utils.retrieval.bm25 import report_unmatched
from utils.retrieval.drafts import READ, imitate_draft, without_last_word
from utils.retrieval.oracle import greedy_rouge_oracle
from utils.retrieval.ranking import hard_negatives, search_text


def is_marked(example: Example, supervision: str) -> bool:
    """Whether its positives are gold evidence."""
    return example.evidence is not None and supervision == "evidence"


def positives(example: Example, supervision: str, oracle_passages: int) -> tuple[list[int], list[int]]:
    """Returns the passage numbers of the positives, and the weight with which each is drawn.

    Gold evidence is weighted by its gold words, because some chunks of turns hold few of them. Without evidence, or if
    `supervision` is "rouge", the greedy ROUGE oracle chooses up to `oracle_passages`. It does not choose from a corpus.
    """
    if is_marked(example, supervision) or isinstance(example.document, Corpus):
        return example.evidence or [], example.evidence_words or []
    chosen = greedy_rouge_oracle(example.document.passages, example.summaries, oracle_passages)
    return sorted(chosen), [1] * len(chosen)


def gold_passages(examples: Sequence[Example], args) -> list[list[int] | None]:
    """The passages that rankings are scored against: gold evidence, or the ROUGE oracle's choice if no example has any.

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


def first_hop(ranking: Ranking, evidence: Sequence[int]) -> list[int]:
    """The passages that an imitated first hop reads: the best of a BM25 `ranking`.

    A trained retriever finds more: if there are several passages of evidence, the best-ranked one is always read.
    """
    passages = [passage for passage, _ in ranking]
    found = [passage for passage in passages if passage in evidence]
    return list(dict.fromkeys(passages[:READ] + (found[:1] if len(evidence) > 1 else [])))


@dataclass
class Pair:
    """A training query and its passages. A passage's key is its number, counted through all documents."""

    number: int  # among all pairs
    example: Example
    document: int  # key of the document's first passage
    query: list[int]  # tokens
    searches: list[str]  # search texts: the query, and the query with a draft if drafts are trained on
    drafts: list[tuple[str, list[int]]]  # from the drafts file, each with the keys of the passages that it used
    evidence: list[int]  # keys of the positives
    weights: np.ndarray  # (evidence,) the probability that a positive is drawn, or the teacher's of each passage
    is_distribution: bool  # whether the weights are the teacher's; then all positives are used
    read: list[int]  # keys of the passages that a first hop would read
    longest: int  # most tokens of a search text
    negatives: list[list[int]]  # keys of the hard negatives, best first; a list for each of `searches`


class Pairs:
    """A pair for each example that has positives, and the tokens of their passages.

    Args:
        args: the flags of train_retrieve.py about positives, negatives, drafts and the teacher.
        documents: the documents of the examples, or the one corpus.
        lexical: `lexical(examples, top_k, queries)` ranks passages by BM25.
    """

    def __init__(
        self, args, examples: Sequence[Example], documents: list[Document], retriever, *, lexical, accelerator
    ):
        self.args, self.documents, self.retriever = args, documents, retriever
        self.is_corpus = isinstance(documents[0], Corpus)
        first_keys = np.cumsum([0, *(len(document.passages) for document in documents)]).tolist()
        first_key = dict(zip(documents, first_keys, strict=False))

        drafts = read_drafts(args.drafts_file, examples) if args.drafts_file else [[] for _ in examples]
        searches = [[example.query] for example in examples]
        if args.draft_share:
            for example, of_file, texts in zip(examples, drafts, searches, strict=True):
                draft = ["", *example.summaries[:1], *(text for text, _ in of_file)][-1]
                texts.append(search_text(example.query, draft))
        hops = 2 if args.draft_share else 1
        top_k = args.negatives_pool + 100 if self.is_corpus else None
        # one call for all hops, so that each document is indexed once
        ranked = lexical([e for e in examples for _ in range(hops)], top_k, list(itertools.chain(*searches)))
        ranked = [ranked[hop::hops] for hop in range(hops)]
        self.warnings: list[str] = []
        report_unmatched(examples, ranked[0], args.language, self.warnings.append)
        taught = self._ask_teacher(examples, ranked[0], accelerator) if args.teacher else {}

        query_tokens = tokenize(retriever, [example.query for example in examples], "query")
        longest = list(map(len, query_tokens))
        if args.draft_share:
            texts = [[*e.summaries, *(text for text, _ in own)] for e, own in zip(examples, drafts, strict=True)]
            of_texts = [(number, text) for number, of_example in enumerate(texts) for text in of_example]
            tokens = tokenize(
                retriever, [search_text(examples[number].query, text) for number, text in of_texts], "query"
            )
            for (number, _), search in zip(of_texts, tokens, strict=True):
                longest[number] = max(longest[number], len(search))
        self.rows: list[Pair] = []
        for number, example in enumerate(examples):
            evidence, weights = taught.get(number) or positives(example, args.supervision, args.oracle_passages)
            if not sum(weights):
                continue
            first = first_key[example.document]
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
                read=[first + passage for passage in first_hop(ranked[0][number], evidence)],
                longest=longest[number],
                negatives=[[first + passage for passage in of_hop] for of_hop in negatives],
            ))  # fmt: skip
        if not self.rows:
            remedy = "" if self.is_corpus else " or shares a word with its summary"
            raise UsageError(f"no training example has evidence{remedy}: nothing to train on")
        self.passage_tokens: dict[int, list[int]] = {}
        self._tokenize_passages()

    def _ask_teacher(self, examples: Sequence[Example], rankings: list[Ranking], accelerator) -> dict[int, tuple]:
        """Returns passage numbers and the probability of each, by the number of an example without gold evidence."""
        from utils.retrieval.teacher import passage_likelihoods  # slow to import, and only needed here

        args = self.args
        unmarked = [number for number, example in enumerate(examples) if not is_marked(example, args.supervision)]
        candidates = [
            sorted(passage for passage, _ in rankings[number][: args.teacher_candidates]) for number in unmarked
        ]
        likelihoods = passage_likelihoods(args.teacher, [examples[n] for n in unmarked], candidates, accelerator)
        return {  # `Pairs` divides the weights by their sum
            number: (passages, np.exp((of_each - of_each.max()) / args.teacher_temperature))
            for number, passages, of_each in zip(unmarked, candidates, likelihoods, strict=True)
        }

    def _tokenize_passages(self) -> None:
        """Tokenizes each passage once: all of the documents, or of a corpus only positives and hard negatives."""
        texts, keys = [], []
        if self.is_corpus:
            wanted = {key for pair in self.rows for key in sum(pair.negatives, pair.evidence)}
            if keys := sorted(wanted - self.passage_tokens.keys()):
                texts = self.documents[0].passages[keys]
        elif not self.passage_tokens:
            texts = [text for document in self.documents for text in document.passages]
            keys = range(len(texts))
        self.passage_tokens.update(zip(keys, tokenize(self.retriever, texts, "passage"), strict=True))

    def describe(self) -> str:
        """How many pairs there are, where their positives come from, and a warning if BM25 finds none for some."""
        marked = sum(is_marked(pair.example, self.args.supervision) for pair in self.rows)
        others = "the teacher" if self.args.teacher else "the ROUGE oracle"
        sources = {"gold evidence": marked, others: len(self.rows) - marked}
        positives_from = ", ".join(f"{name}: {count}" for name, count in sources.items() if count)
        return "\n".join([f"positives from {positives_from}", *self.warnings])

    def digest(self) -> str:
        """A checksum of the training data."""
        return digest([
            sorted(self.passage_tokens.items()),
            # rounded, because a teacher's likelihoods differ slightly between GPU models
            [[pair.query, pair.evidence, pair.weights.round(4).tolist(), pair.negatives, pair.drafts]
             for pair in self.rows],
        ])  # fmt: skip

    def lengths(self) -> list[list[int]]:
        """(pairs, 2) The most tokens that an epoch may draw: of the search text, and of positives and negatives.

        Negatives that are mined later may be longer. The lengths still stay, so that a run can resume from any step.
        """
        lengths = []
        for pair in self.rows:
            passage = max(len(self.passage_tokens[key]) for key in sum(pair.negatives, pair.evidence))
            positive = len(pair.evidence) if pair.is_distribution else min(self.args.num_positives, len(pair.evidence))
            negative = min(self.args.num_hard_negatives, max(map(len, pair.negatives)))
            lengths.append([pair.longest, passage * (positive + negative)])
        return lengths

    def draw(self, pair: Pair, epoch: int) -> tuple[list[int], np.ndarray, list[int]]:
        """Draws the hop, positives and hard negatives of a pair for one epoch.

        The random numbers depend on the seed, the epoch and the pair, and not on how a step is split into batches.

        Returns the tokens of the search text, the weights of the pair's evidence, and the keys of the passages drawn.
        """
        args, rng = self.args, np.random.default_rng([self.args.seed, epoch, pair.number])
        search, weights, hop = pair.query, pair.weights, 0
        if rng.random() < args.draft_share and (pair.drafts or pair.example.summaries):
            hop = -1
            if pair.drafts:
                draft, read = pair.drafts[rng.integers(len(pair.drafts))]
            else:
                draft, read = self._imitate(pair, rng), pair.read
            missing = ~np.isin(pair.evidence, read)
            if weights[missing].any():  # a later hop should find what the draft did not use
                weights = weights * np.where(missing, 1.0, args.found_weight)
                weights = weights / weights.sum()
            search = tokenize(self.retriever, [search_text(pair.example.query, draft)], "query")[0]
            while len(search) > pair.longest:  # invented words may have more tokens than those of the reference
                draft = without_last_word(draft)
                search = tokenize(self.retriever, [search_text(pair.example.query, draft)], "query")[0]
        if pair.is_distribution:
            drawn = list(pair.evidence)
        else:
            count = min(args.num_positives, np.count_nonzero(weights))
            drawn = rng.choice(pair.evidence, count, replace=False, p=weights).tolist()
        count = min(args.num_hard_negatives, len(pair.negatives[hop]))
        drawn += rng.choice(pair.negatives[hop], count, replace=False).tolist() if count else []
        return search, weights, drawn

    def _imitate(self, pair: Pair, rng: np.random.Generator) -> str:
        """A draft such as a summarizer would write that has read BM25's best passages for the query."""
        summaries, other = pair.example.summaries, self.rows[rng.integers(len(self.rows))].example.summaries
        texts = [pair.example.document.passages[key - pair.document] for key in pair.read]
        return imitate_draft(summaries[rng.integers(len(summaries))], texts, (other or [""])[0])

    # ---- mining of hard negatives

    def is_mining_due(self, epoch: int, mined_in: int) -> bool:
        """Whether to mine hard negatives before this epoch. `mined_in` is the epoch of the last mining."""
        every = self.args.mine_negatives_every
        return bool(every and epoch and epoch % every == 0 and mined_in != epoch)

    def mine(self, ranked: Callable) -> None:
        """Replaces the hard negatives of each pair with those that the current model ranks highest.

        Call it on all processes. `ranked(examples, top_k=..., queries=...)` ranks passages with the model.
        """
        args, mined = self.args, self.negatives()
        # rankings from a corpus are cut and made block by block, to save memory
        at_once, top_k = (2**13, 5 * args.negatives_pool + 100) if self.is_corpus else (len(self.rows), None)
        for first in range(0, len(self.rows), at_once):
            block = self.rows[first : first + at_once]
            # first all searches of the first hop, then those of the second, in one call: each document is encoded once
            queries = list(itertools.chain(*zip(*(pair.searches for pair in block), strict=True)))
            examples = [pair.example for pair in block] * (len(queries) // len(block))
            for number, ranking in enumerate(ranked(examples, top_k=top_k, queries=queries)):
                hop, place = divmod(number, len(block))
                pair = block[place]
                evidence = [key - pair.document for key in pair.evidence]
                found = hard_negatives(ranking, evidence, args.negatives_pool, args.negatives_margin)
                if found:
                    mined[pair.number][hop] = [pair.document + passage for passage in found]
        self.set_negatives(mined)  # at the end, so that an interrupted search changes nothing

    def negatives(self) -> list[list[list[int]]]:
        """The hard negatives of each pair, for a checkpoint. `set_negatives` restores them."""
        return [list(pair.negatives) for pair in self.rows]

    def set_negatives(self, negatives: list[list[list[int]]]) -> None:
        for pair, of_pair in zip(self.rows, negatives, strict=True):
            pair.negatives = of_pair
        self._tokenize_passages()
