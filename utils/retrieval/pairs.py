"""The retriever's training data: pairs of a query and the passages that it is compared with.

Positives are gold evidence, passages chosen by a ROUGE oracle, or what a teacher prefers: passages that make the
reference likely to a summarizer, or that a reranker scores high. Hard negatives are other passages that rank high for
the pair's search text.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from utils.data.examples import Corpus, Document, Example, Ranking, blocks
from utils.data.hand_over import read_drafts
from utils.data.kept import content_key
from utils.errors import UsageError
from utils.files import digest, write_json
from utils.models import encoder
from utils.models.settings import check_made
from utils.models.tokenizer import describe_cut
from utils.progress import Phase, progress
from utils.retrieval.bm25 import say_unmatched, unmatched
from utils.retrieval.drafts import READ, imitate_draft, without_last_word
from utils.retrieval.guide import Guide
from utils.retrieval.oracle import greedy_rouge_oracle
from utils.retrieval.ranking import RANKED_AT_ONCE, hard_negatives, search_text
from utils.tables import Table, Texts, cached, lengths, values, write_table


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


def gold_passages(examples: Sequence[Example], args, required: bool = True) -> list[list[int] | None]:
    """The passages that rankings are scored against: gold evidence, or the ROUGE oracle's choice if no example has any.

    If there are none at all, or all passages are, raises UsageError where they are `required`.
    """
    gold = [example.evidence for example in examples]
    if not any(gold) and not args.corpus_file:
        gold = [e.summaries and positives(e, args.supervision, args.oracle_passages)[0]
                for e in progress(examples, "labelled", "examples")]  # fmt: skip
    if required and not any(gold):
        remedy = "its summaries share no word with their documents"
        remedy = "give --validation_qrels_file" if args.corpus_file else remedy
        raise UsageError(f"no validation example has evidence: nothing to score; {remedy}")
    if (
        required
        and any(gold)
        and all(len(of_one or ()) in (0, len(e.document.passages)) for of_one, e in zip(gold, examples, strict=True))
    ):
        remedy = "add passages that are not, such as negatives, or let the queries search a --corpus_file"
        raise UsageError(f"every passage of the validation examples is evidence, so any ranking is perfect; {remedy}")
    return gold


def first_hop(ranking: Ranking, evidence: Sequence[int]) -> list[int]:
    """The passages that an imitated first hop reads: the best of a BM25 `ranking`.

    A trained retriever finds more: if there are several passages of evidence, the best-ranked one is always read.
    """
    passages = [passage for passage, _ in ranking]
    found = [passage for passage in passages if passage in evidence]
    return list(dict.fromkeys(passages[:READ] + (found[:1] if len(evidence) > 1 else [])))


def passage_keys(documents: Sequence[Document]) -> np.ndarray:
    """(passages,) int64: a key for each passage of all documents, in their order; equal texts have the same key.

    A key is the place of the first passage with this text. Only a checksum of 64 bits is kept of each text, because a
    corpus may be large.
    """
    texts = (text for document in documents for block in blocks(document.passages) for text in block)
    checksums = np.fromiter(map(hash, texts), np.int64)
    _, first, inverse = np.unique(checksums, return_index=True, return_inverse=True)
    return first[inverse]


@dataclass
class Pair:
    """A training query and its passages, by the keys of `passage_keys`: a text is never its own negative."""

    number: int  # among all pairs
    example: Example
    document: int  # place of the document's first passage among all
    query: list[int]  # tokens
    drafts: list[tuple[str, list[int]]]  # from the drafts file, each with the keys of the passages that it used
    evidence: list[int]  # keys of the positives, each once
    weights: np.ndarray  # (evidence,) the probability that a positive is drawn, or the teacher's of each passage
    is_distribution: bool  # whether the weights are the teacher's; then all positives are used
    read: list[int]  # numbers of the passages that a first hop would read
    longest: int  # most tokens of a search text
    negatives: list[list[int]]  # keys of the hard negatives, best first; a list for each of `Pairs.searches`


_KEYS = pa.large_list(pa.int64())
PAIRS = pa.schema([
    ("example", pa.int64()), ("document", pa.int64()), ("evidence", _KEYS), ("weights", pa.large_list(pa.float64())),
    ("is_distribution", pa.bool_()), ("is_marked", pa.bool_()), ("read", _KEYS), ("longest", pa.int64()),
    ("negatives", pa.large_list(_KEYS)),
])  # fmt: skip


class Pairs(Sequence):
    """A pair for each example that has positives, and the tokens of their passages; both are kept on disk.

    Args:
        args: the flags of train_retrieve.py about positives, negatives, drafts and the teacher.
        documents: the documents of the examples, or the one corpus.
        model: the retriever or reranker that is trained.
        module: `encoder` or `cross_encoder`, which tokenizes for the model.
        search: `search(examples, top_k=None, queries=None)` ranks the passages among which hard negatives are found.
        search_key: what decides its result, beside examples and queries.
    """

    def __init__(
        self, args, examples: Sequence[Example], documents: list[Document], model, *, module=encoder, search,
        search_key: Sequence = (), accelerator,
    ):  # fmt: skip
        self.args, self.examples, self.documents, self.model = args, examples, documents, model
        self.tokenize, self.tokens_key = partial(module.tokenize, model), module.tokens_key(model)
        self.is_corpus, self.search = isinstance(documents[0], Corpus), search
        places = np.cumsum([0, *(len(document.passages) for document in documents)]).tolist()
        self.place = dict(zip(documents, places, strict=False))
        self.drafts = read_drafts(args.drafts_file, examples) if args.drafts_file else None
        self.whole = {kind: [] for kind in ("queries", "queries with a draft", "passages")}  # tokens before any cut
        self.query_tokens = self.tokenize(values(examples, "query"), "query", whole=self.whole["queries"])
        taught = self._ask_teacher(accelerator) if args.teacher else {}
        # whether queries search with drafts: only where there is something to make them of
        self.has_drafts = bool(args.draft_share and (self.drafts or any(values(examples, "summaries"))))

        names = ("negatives_pool", "supervision", "oracle_passages", "teacher")
        of_teacher = [[number, keys, weights.round(4).tolist()] for number, (keys, weights) in taught.items()]
        key = [
            {name: getattr(args, name) for name in names}, bool(args.draft_share), READ, content_key(examples),
            documents[0].id, self.tokens_key, list(search_key), digest([self.drafts]), digest(of_teacher),
            args.language,
        ]  # fmt: skip

        def write(folder: Path) -> None:
            without_words, with_draft = [], [np.empty(0, np.int64)]
            self.keys = passage_keys(documents)
            np.save(folder / "keys.npy", self.keys)
            with Phase("made pairs of", "examples", len(examples)) as phase:
                write_table(folder / "pairs.arrow", PAIRS, self._make(taught, without_words, with_draft, phase))
            np.save(folder / "with_draft.npy", np.concatenate(with_draft))
            write_json(folder / "unmatched.json", without_words)

        folder, self.warnings = cached("pairs", key, write), []
        self.keys = np.load(folder / "keys.npy")
        self.whole["queries with a draft"] = [np.load(folder / "with_draft.npy")]
        without_words = json.loads((folder / "unmatched.json").read_text(encoding="utf-8"))
        say_unmatched(without_words, len(examples), args.language, self.warnings.append)
        if args.draft_share and not self.has_drafts:
            self.warnings.append("no query searches with a draft: no training example has a summary to imitate")
        self.table = Table(folder / "pairs.arrow")
        if not len(self.table):
            remedy = "" if self.is_corpus else " or shares a word with its summary"
            raise UsageError(f"no training example has evidence{remedy}: nothing to train on")
        self.mined: list[list[list[int]]] | None = None  # hard negatives that replace those of the table
        self.passage_tokens: Sequence[list[int]] | dict[int, list[int]] = {}
        self.guide = None
        if args.guide:
            self.guide = Guide(args.guide, values(examples, "query"), accelerator=accelerator,
                               trust_remote_code=args.trust_remote_code)  # fmt: skip
            self.asking = self.table.array("example")
        self._tokenize_passages()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, number: int) -> Pair:
        row = self.table.row(range(len(self))[number])
        of_file = self.drafts[row["example"]] if self.drafts else []
        return Pair(
            number=number,
            example=self.examples[row["example"]],
            document=row["document"],
            query=self.query_tokens[row["example"]],
            drafts=[(text, self._keys(row["document"], read)) for text, read in of_file],
            evidence=row["evidence"],
            weights=np.array(row["weights"]),
            is_distribution=row["is_distribution"],
            read=row["read"],
            longest=row["longest"],
            negatives=self.mined[number] if self.mined else row["negatives"],
        )

    def searches(self, example: Example, drafts: Sequence[tuple[str, list[int]]]) -> list[str]:
        """The texts that hard negatives are searched with: the query, and the query with a draft if there are any."""
        if not self.has_drafts:
            return [example.query]
        draft = ["", *example.summaries[:1], *(text for text, _ in drafts)][-1]
        return [example.query, search_text(example.query, draft)]

    def _make(self, taught: dict[int, tuple], without_words: list, with_draft: list, phase: Phase) -> Iterator[dict]:
        """The rows of the table, block by block, so that few rankings are held in memory; `phase` counts examples.

        Adds to `without_words` the ids of examples whose question shares no word with any passage, and to `with_draft`
        the lengths of queries with a draft, before they are cut.
        """
        args, top_k = self.args, self.args.negatives_pool + 100 if self.is_corpus else None
        for start in range(0, len(self.examples), RANKED_AT_ONCE):
            examples = self.examples[start : start + RANKED_AT_ONCE]
            drafts = self.drafts[start : start + RANKED_AT_ONCE] if self.drafts else [[] for _ in examples]
            searches = list(map(self.searches, examples, drafts))
            hops = len(searches[0])
            # one call for all hops, so that each document is indexed once
            repeated, queries = [e for e in examples for _ in range(hops)], list(itertools.chain(*searches))
            ranked = self.search(repeated, top_k=top_k, queries=queries)
            ranked = [ranked[hop::hops] for hop in range(hops)]
            without_words += unmatched(examples, ranked[0])
            longest = self._longest_searches(examples, drafts, with_draft)
            for place, example in enumerate(examples):
                number, first = start + place, self.place[example.document]
                phase.advance()
                evidence, weights = taught.get(number) or positives(example, args.supervision, args.oracle_passages)
                if not sum(weights):
                    continue
                weight_of: dict[int, float] = {}  # passages with the same text share theirs
                for key, weight in zip(self._keys(first, evidence), weights, strict=True):
                    weight_of[key] = weight_of.get(key, 0) + weight
                weights = np.array(list(weight_of.values()))
                yield {
                    "example": number,
                    "document": first,
                    "evidence": list(weight_of),
                    "weights": weights / sum(weights),
                    "is_distribution": number in taught,
                    "is_marked": number not in taught and is_marked(example, args.supervision),
                    "read": first_hop(ranked[0][place], evidence),
                    "longest": longest[place],
                    "negatives": [self._negatives(of_hop[place], first, weight_of) for of_hop in ranked],
                }

    def _longest_searches(self, examples: Sequence[Example], drafts: Sequence[list], with_draft: list) -> list[int]:
        """The most tokens of a search text of each example: of its query alone, or with a reference or draft."""
        longest = list(map(len, self.tokenize([e.query for e in examples], "query", keep=False)))
        if self.args.draft_share:
            texts = [[*e.summaries, *(text for text, _ in own)] for e, own in zip(examples, drafts, strict=True)]
            of_texts = [(number, text) for number, of_example in enumerate(texts) for text in of_example]
            searches = [search_text(examples[number].query, text) for number, text in of_texts]
            tokens = self.tokenize(searches, "query", keep=False, whole=with_draft)
            for (number, _), search in zip(of_texts, tokens, strict=True):
                longest[number] = max(longest[number], len(search))
        return longest

    def _keys(self, first: int, passages: Sequence[int]) -> list[int]:
        """The keys of passages of the document whose first passage is at `first`."""
        return self.keys[first + np.array(passages, dtype=np.int64)].tolist()

    def _negatives(self, ranking: Ranking, first: int, evidence, margin: float | None = None) -> list[int]:
        """The keys of the hard negatives in a document's `ranking`; `evidence` holds keys."""
        keys = self._keys(first, [passage for passage, _ in ranking])
        by_key = list(zip(keys, (score for _, score in ranking), strict=True))
        return hard_negatives(by_key, evidence, self.args.negatives_pool, margin)

    def _ask_teacher(self, accelerator) -> dict[int, tuple]:
        """Returns passage numbers and the probability of each, by the number of the example.

        A summarizer is asked about examples without gold evidence. A reranker is asked about all of them, and their
        gold evidence is among the candidates.
        """
        from utils.models.cross_encoder import is_reranker  # slow to import, and only needed here
        from utils.retrieval.teacher import passage_likelihoods, passage_scores

        args, examples = self.args, self.examples
        check_made("--teacher", args.teacher, "train_summarize.py or train_rerank.py")
        reranks = is_reranker(args.teacher, args.trust_remote_code)
        if self.is_corpus and reranks is False:
            raise UsageError("--teacher cannot be a summarizer with --corpus_file; choose a reranker")
        if reranks and args.supervision != "evidence":
            raise UsageError(
                f"--supervision {args.supervision} has no effect with a reranker as --teacher; leave it out"
            )
        numbers = [n for n, example in enumerate(examples) if reranks or not is_marked(example, args.supervision)]
        if not numbers:
            raise UsageError(f"--teacher {args.teacher} has no effect: it is a summarizer, and all training examples "
                             "have evidence; add --supervision rouge, or leave it out")  # fmt: skip
        asking = [examples[number] for number in numbers]
        rankings = self.search(asking, top_k=args.teacher_candidates)
        candidates = [
            sorted({passage for passage, _ in ranking} | set(example.evidence or () if reranks else ()))
            for example, ranking in zip(asking, rankings, strict=True)
        ]
        ask = passage_scores if reranks else passage_likelihoods
        scores = ask(args.teacher, asking, candidates, accelerator, trust_remote_code=args.trust_remote_code)
        temperature = args.teacher_temperature or (1.0 if reranks else 0.1)
        return {  # the weights are divided by their sum
            number: (passages, np.exp((of_each - of_each.max()) / temperature))
            for number, passages, of_each in zip(numbers, candidates, scores, strict=True)
            if passages
        }

    def _tokenize_passages(self) -> None:
        """Tokenizes each passage once: all of the documents, or of a corpus only positives and hard negatives."""
        if self.is_corpus:
            wanted = {key for row in self._rows() for key in sum(row["negatives"], row["evidence"])}
            if keys := sorted(wanted - self.passage_tokens.keys()):
                texts = self.documents[0].passages[keys]
                tokens = self.tokenize(texts, "passage", whole=self.whole["passages"])
                self.passage_tokens.update(zip(keys, tokens, strict=True))
                if self.guide:
                    self.guide.read(keys, texts)
        elif not self.passage_tokens:
            texts = Texts(lambda: (text for document in self.documents for text in document.passages))
            self.passage_tokens = self.tokenize(texts, "passage", whole=self.whole["passages"])
            if self.guide:
                self.guide.read(self.keys.tolist(), texts)

    def excluded(self, batch: dict, passage_keys) -> torch.Tensor | None:
        """(pairs, passages) True where the guide takes a passage for as good as a pair's evidence; None without it.

        Batch and keys are in the host's memory.
        """
        if self.guide is None:
            return None
        examples = self.asking[batch["number"].numpy()]
        return self.guide.excluded(examples, batch["evidence_keys"], passage_keys)

    def _rows(self) -> Iterator[dict]:
        """The rows of the table, with the hard negatives that were mined, if any."""
        for number, row in enumerate(self.table.read()):
            yield row | {"negatives": self.mined[number]} if self.mined else row

    def describe(self) -> str:
        """How many pairs there are, and where their positives come from; in further lines, what is cut or amiss."""
        marked = int(self.table.array("is_marked").sum())
        others = "the teacher" if self.args.teacher else "the ROUGE oracle"
        sources = {"gold evidence": marked, others: len(self) - marked}
        positives_from = ", ".join(f"{name}: {count}" for name, count in sources.items() if count)
        limit = self.model.max_seq_length or self.model.tokenizer.model_max_length
        cut = describe_cut(
            "max_seq_length", limit, {kind: np.concatenate(of_kind) for kind, of_kind in self.whole.items()}
        )
        return "\n".join([f"positives from {positives_from}", *self.warnings, *([cut] if cut else [])])

    def digest(self) -> str:
        """A checksum of the training data."""
        return digest([
            content_key(self.examples), self.documents[0].id, self.tokens_key, digest([self.drafts]),
            *([self.guide.key] if self.guide else []),
            # rounded, because a teacher's likelihoods differ slightly between GPU models
            *(row | {"weights": [round(weight, 4) for weight in row["weights"]]}
              for row in progress(self.table.read(), "checked", "pairs", total=len(self))),
        ])  # fmt: skip

    def first_keys(self) -> np.ndarray:
        """(pairs,) The key of the first passage of each pair's document."""
        return self.table.array("document")

    def lengths(self) -> np.ndarray:
        """(pairs, 2) The most tokens that an epoch may draw: of the search text, and of positives and negatives.

        Negatives that are mined later may be longer. The lengths still stay, so that a run can resume from any step.
        """
        search, passage, count = self.sizes().T
        return np.stack([search, passage * count], axis=1)

    def sizes(self) -> np.ndarray:
        """(pairs, 3) Tokens of the longest search text and passage that an epoch may draw, and how many passages."""
        args, found = self.args, []
        sizes = (
            {key: len(tokens) for key, tokens in self.passage_tokens.items()}
            if self.is_corpus
            else lengths(self.passage_tokens)
        )
        for row in progress(self.table.read(), "measured", "pairs", total=len(self)):
            passage = max(int(sizes[key]) for key in sum(row["negatives"], row["evidence"]))
            positive = len(row["evidence"])
            if not row["is_distribution"]:
                positive = min(args.num_positives, positive)
            negative = min(args.num_hard_negatives, max(map(len, row["negatives"])))
            found.append([row["longest"], passage, positive + negative])
        return np.array(found)

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
                draft, read = self._imitate(pair, rng), self._keys(pair.document, pair.read)
            missing = ~np.isin(pair.evidence, read)
            if weights[missing].any():  # a later hop should find what the draft did not use
                weights = weights * np.where(missing, 1.0, 0.5 if args.found_weight is None else args.found_weight)
                weights = weights / weights.sum()
            search = self.tokenize([search_text(pair.example.query, draft)], "query", keep=False)[0]
            while len(search) > pair.longest:  # invented words may have more tokens than those of the reference
                draft = without_last_word(draft)
                search = self.tokenize([search_text(pair.example.query, draft)], "query", keep=False)[0]
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
        number = rng.integers(len(self))
        other = self.table.row(number if number != pair.number else (number + 1) % len(self))["example"]
        summaries = pair.example.summaries
        other = self.examples[other].summaries if len(self) > 1 else []
        texts = [pair.example.document.passages[passage] for passage in pair.read]
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
        # rankings are made and cut block by block, and those of a corpus are short, to save memory
        at_once, top_k = (2**13, 5 * args.negatives_pool + 100) if self.is_corpus else (RANKED_AT_ONCE, None)
        starts = range(0, len(self), at_once)
        for first in progress(starts, "mined negatives of", "pairs", total=len(self), size=lambda _: at_once):
            block = [self[number] for number in range(first, min(first + at_once, len(self)))]
            # first all searches of the first hop, then those of the second, in one call: each document is encoded once
            searches = [self.searches(pair.example, pair.drafts) for pair in block]
            queries = list(itertools.chain(*zip(*searches, strict=True)))
            examples = [pair.example for pair in block] * len(searches[0])
            for number, ranking in enumerate(ranked(examples, top_k=top_k, queries=queries)):
                hop, place = divmod(number, len(block))
                pair = block[place]
                if found := self._negatives(ranking, pair.document, pair.evidence, args.negatives_margin):
                    mined[pair.number][hop] = found
        self.set_negatives(mined)  # at the end, so that an interrupted search changes nothing

    def negatives(self) -> list[list[list[int]]]:
        """The hard negatives of each pair, for a checkpoint. `set_negatives` restores them."""
        return [list(row["negatives"]) for row in self._rows()]

    def set_negatives(self, negatives: list[list[list[int]]]) -> None:
        self.mined = negatives
        self._tokenize_passages()
