"""The summarizer's input: sources of query and passages as token sequences, batches of them, and the texts it writes.

A source is one or more token sequences. With fusion "concat", all passages are in one sequence. With "fid"
(Fusion-in-Decoder), each passage has a sequence of its own. Every sequence starts with the query. The source of a
language model is a prompt.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import BatchEncoding

from utils.errors import UsageError, in_one_line
from utils.files import digest
from utils.models.tokenizer import describe_cut, pad, tokenize, tokenizer_key
from utils.progress import progress
from utils.tables import Texts, lengths, values

# ---- prompts of language models

# with the query before and after the passages, a language model reads them with it in mind (Liu et al., 2023,
# "Lost in the Middle", arXiv:2307.03172)
DEFAULT_PROMPT = """Question: {query}

{passages}

Write a summary of the text above in one paragraph.
The summary answers this question: {query}"""
# some chat templates tell today's date: a prompt would change from day to day
SAME_DAY = "{% macro strftime_now(format) %}1 January 2025{% endmacro %}"
MARKS = re.compile(r"(\{query\}|\{passages\})")


def render_prompt(tokenizer, template: str, has_query: bool) -> list[str]:
    """The prompt in parts: texts, and the marks "{query}" and "{passages}" in their places.

    Without a query, the lines that hold {query} are left out. It is the user's turn of the tokenizer's chat template,
    if it has one.
    """
    if not has_query:
        template = "\n".join(line for line in template.split("\n") if "{query}" not in line).strip("\n")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": template}]
        try:
            # models that can think before they answer are not asked to
            template = tokenizer.apply_chat_template(
                turn, chat_template=SAME_DAY + tokenizer.get_chat_template(), tokenize=False,
                add_generation_prompt=True, enable_thinking=False,
            )  # fmt: skip
        except Exception as error:  # templates may raise anything
            raise UsageError(
                f"{tokenizer.name_or_path}: its chat template cannot be used, remove it or choose another model: "
                f"{in_one_line(error)}"
            ) from error
    else:
        start = tokenizer.bos_token if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id else None
        template = f"{start or ''}{template}\n\n"
    parts = [part for part in MARKS.split(template) if part]
    if parts.count("{passages}") != 1:
        raise UsageError(
            f"{tokenizer.name_or_path}: its chat template drops the user's text; remove it or choose another model"
        )
    return parts


# ---- from passages to token sequences


@dataclass
class Sources:
    """Turns a query and ranked passages into a source: a list of token sequences.

    `fusion` is "concat" or "fid". A sequence has at most `max_source_length` tokens, special tokens included; the query
    takes at most half of them. With "concat", passages are added in rank order until the sequence is full, and the last
    one is cut. They then stand in the order of `passage_order`: "rank" or "document". Every sequence begins with
    `source_prefix`, which is part of its length. With `marks_query`, two separators follow the query, as in BART's
    format for two texts (see `EncoderDecoder._read`). With a `prompt_template`, a sequence is that prompt with the
    query and the passages, one a line, in it.
    """

    tokenizer: object
    fusion: str
    max_source_length: int
    passage_order: str
    source_prefix: str = ""
    marks_query: bool = False
    prompt_template: str | None = None

    def __post_init__(self):
        self.passage_tokens: dict = {}  # by document: the tokens of all documents of a call, and its first passage
        self.references, self.sources = [], []  # numbers of tokens before any cut
        self.query_space = ""  # before each query
        self.cut = Counter()  # passages asked for, left out and shortened; queries shortened
        if self.prompt_template is None:
            self._use_special_tokens()
        else:
            self._use_prompt()
        if self.room < self.max_source_length // 4:
            name, size = "source_prefix", self.max_source_length - self.room
            name = name if self.prompt is None else "prompt_template"
            limit = f"--max_source_length {self.max_source_length}"
            raise UsageError(f"--{name} takes {size} of {limit} tokens; make it shorter, or raise that limit")

    def _use_special_tokens(self) -> None:
        """The tokens between and around the texts of a sequence are those of the tokenizer."""
        tokenizer, self.prompt, self.targets_end = self.tokenizer, None, []
        self.separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        ends = {tokenizer.eos_token_id, tokenizer.sep_token_id} - {None}
        if ends.isdisjoint(tokenizer(text_target="a")["input_ids"]):  # Gemma's tokenizer adds no end
            self.targets_end = [self.separator if tokenizer.eos_token_id is None else tokenizer.eos_token_id]
        self.between = [self.separator]
        bare, whole = self.tokenize(["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.prefix, self.suffix = whole[:start], whole[start + len(bare) :]
        if self.source_prefix:
            self.prefix += self.tokenize([self.source_prefix.rstrip()])[0]
        self.queries, self.fixed = 1, dict.fromkeys((True, False), len(self.prefix) + len(self.suffix))
        self.room = self.max_source_length - self.fixed[True]

    def _use_prompt(self) -> None:
        """The tokens between and around the texts of a sequence are those of the prompt, with and without a query."""
        self.prompt, self.fixed = {}, {}
        for has_query in (True, False):
            parts = render_prompt(self.tokenizer, self.prompt_template, has_query)
            before = [part for part, after in itertools.pairwise(parts) if after == "{query}"]
            if before and all(
                part.endswith(" ") for part in before
            ):  # most tokenizers have tokens with a space in front
                self.query_space = self._space()
                parts = [part.removesuffix(" ") if part in before else part for part in parts]
            self.prompt[has_query] = [part if MARKS.fullmatch(part) else self.tokenize([part])[0] for part in parts]
            self.fixed[has_query] = sum(len(part) for part in self.prompt[has_query] if not isinstance(part, str))
        self.between = self.tokenize(["\n"])[0]
        self.targets_end = [self.tokenizer.eos_token_id]
        self.queries = max(1, self.prompt[True].count("{query}"))
        self.room = self.max_source_length - max(self.fixed.values())

    def _space(self) -> str:
        """What a word needs before it to have the tokens that it has within a text."""
        alone, following = self.tokenize(["word"])[0], self.tokenize(["a word"])[0]
        return "" if following[-len(alone) :] == alone else " "

    def tokenize_queries(self, queries: Iterable[str]) -> Sequence[list[int]]:
        """Tokens of each query."""
        space = self.query_space
        return self.tokenize(Texts(lambda: (space + query if query else "" for query in queries)))

    def tokenize(self, texts: Iterable[str]) -> Sequence[list[int]]:
        """Tokens of each text, without special ones."""
        return tokenize(self.tokenizer, texts, add_special_tokens=False, verbose=False)

    def tokenize_targets(self, texts: Iterable[str], max_length: int) -> Sequence[list[int]]:
        """Tokens of each reference, at most `max_length`, with the end token."""
        special = len(self.targets_end) or self.tokenizer.num_special_tokens_to_add()
        if max_length <= special:
            raise UsageError(f"--max_target_length {max_length}: {special} of them are special tokens; raise it")
        options = {"add_special_tokens": False} if self.targets_end else {}
        return tokenize(self.tokenizer, texts, as_target=True, whole=self.references, tail=self.targets_end,
                        truncation=True, max_length=max_length - len(self.targets_end), **options)  # fmt: skip

    def read(self, documents) -> None:
        """Tokenizes documents in one call, so that the cache on disk serves all of them."""
        documents = [document for document in dict.fromkeys(documents) if document not in self.passage_tokens]
        tokens = self.tokenize(Texts(lambda: (text for document in documents for text in document.passages)))
        first = 0
        sizes = lengths(tokens)
        for document in documents:
            self.passage_tokens[document] = (tokens, sizes, first)
            first += len(document.passages)

    def build(self, query: str, document, passage_numbers: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        """The token sequences, and the numbers of the passages in them, in the same order; counts what is cut."""
        excerpt, places = document.excerpt(passage_numbers)
        tokens = self.tokenize_queries([query])[0]
        sequences, kept = self.build_from_tokens(tokens, excerpt, places)
        self.length(len(tokens), excerpt, places)  # counts what is cut
        if excerpt is not document:
            del self.passage_tokens[excerpt]
            kept = [passage_numbers[place] for place in kept]
        return sequences, kept

    def build_from_tokens(self, query: list[int], document, passage_numbers: Sequence[int]):
        """As `build`, from the tokens of the query."""
        self.read([document])
        tokens, _, first = self.passage_tokens[document]
        query = query[: self.room // (2 * self.queries)]
        if self.marks_query and query:
            query = [*query, self.separator]
        kept = self._choose(self.queries * len(query), document, passage_numbers)
        passages = [tokens[first + number][:size] for number, size in kept]
        if self.fusion == "concat":
            sequences = [self._join(query, passages)]
        else:  # without a passage, the query alone
            sequences = [self._join(query, [passage]) for passage in passages] or [self._join(query, [])]
        return sequences, [number for number, _ in kept]

    def length(self, query_length: int, document, passage_numbers: Sequence[int]) -> int:
        """Tokens of the longest sequence of the source of a query of so many tokens; counts what is cut of it."""
        query = min(query_length, self.room // (2 * self.queries))
        query = self.queries * (query + (self.marks_query and query > 0))
        chosen = self._choose(query, document, passage_numbers)
        self._count_cut(query_length, document, passage_numbers, chosen)
        kept = [size for _, size in chosen]
        texts = [kept] if self.fusion == "concat" or not kept else [[size] for size in kept]
        if self.prompt is None:
            texts = [[query, *sizes] for sizes in texts]
            query = 0
        between = [len(self.between) * max(0, sum(map(bool, sizes)) - 1) for sizes in texts]
        return self.fixed[query_length > 0] + query + max(map(sum, zip(map(sum, texts), between, strict=True)))

    def _choose(self, query_length: int, document, passage_numbers: Sequence[int]) -> list[tuple[int, int]]:
        """The passages that fit after a query, in the order in which they are read, and how many tokens of each."""
        _, sizes, first = self.passage_tokens[document]
        kept, free = [], self.room - query_length
        for number in passage_numbers:
            room = free - len(self.between)
            if room <= 0 and kept:
                break
            kept.append((number, min(int(sizes[first + number]), max(room, 0))))
            if self.fusion == "concat":
                free = room - kept[-1][1]
        return sorted(kept) if self.passage_order == "document" and document.is_ordered else kept

    def rules(self) -> list:
        """What decides a source, beside the tokenizer; the tokens around the texts tell the languages."""
        around = [self.prefix, self.suffix] if self.prompt is None else list(self.prompt.values())
        return [self.fusion, self.max_source_length, self.passage_order, around]

    def cuts(self, max_target_length: int) -> str:
        """What of the references and sources made so far is cut, in one line; "" if nothing is."""
        parts = [
            describe_cut(
                "max_target_length", max_target_length, {"references": np.concatenate(self.references or [[]])}
            )
        ]
        parts += [describe_cut("max_source_length", self.max_source_length, {"sources": self.sources})]
        if self.cut["left out"] or self.cut["shortened"]:
            asked, left_out, shortened = (f"{self.cut[name]:,}" for name in ("passages", "left out", "shortened"))
            parts += [f"of their {asked} passages, {left_out} are left out and {shortened} shortened"]
        if self.cut["queries"]:
            parts += [f"{self.cut['queries']:,} queries shortened to half a source"]
        return "; ".join(part for part in parts if part)

    def _count_cut(self, query_length: int, document, passage_numbers: Sequence[int], kept: list) -> None:
        """Counts what a source lacks: `kept` are passages and how many tokens of each are read."""
        _, sizes, first = self.passage_tokens[document]
        whole = [int(sizes[first + number]) + len(self.between) for number in passage_numbers]
        longest = max(whole, default=0) if self.fusion == "fid" else sum(whole)
        self.sources.append(self.fixed[query_length > 0] + self.queries * query_length + longest)
        self.cut["passages"] += len(whole)
        self.cut["left out"] += len(whole) - len(kept)
        self.cut["shortened"] += sum(size < sizes[first + number] for number, size in kept)
        self.cut["queries"] += query_length > self.room // (2 * self.queries)

    def _join(self, query: list[int], passages: list[list[int]]) -> list[int]:
        """One sequence of query and passages; empty texts are left out."""
        texts = passages if self.prompt else [query, *passages]
        body = [token for text in texts if text for token in (*self.between, *text)][len(self.between) :]
        if self.prompt is None:
            return self.prefix + body + self.suffix
        marked = {"{query}": query, "{passages}": body}
        parts = (marked[part] if isinstance(part, str) else part for part in self.prompt[bool(query)])
        return [token for part in parts for token in part]


class Rows(Sequence):
    """What the summarizer reads of each example, and its targets, made at each access from what is kept on disk.

    `hops` has, for each example, the numbers of the passages to read at each hop: the last one is that of validation.
    A row has the `example`, its `source`, the `passages` in the source, and its `targets`. `number_of_target` has the
    number of the example of each target, `source_lengths` the tokens of the longest sequence of each example.
    """

    def __init__(self, examples: Sequence, hops: list[list[tuple[int, ...]]], sources: Sources, max_target_length: int):
        self.examples, self.hops, self.sources = examples, hops, sources
        self.documents, summaries = values(examples, "document"), values(examples, "summaries")
        sources.read(self.documents)
        self.queries = sources.tokenize_queries(values(examples, "query"))
        references = Texts(lambda: (text for of_example in summaries for text in of_example))
        self.target_tokens = sources.tokenize_targets(references, max_target_length)
        counts = lengths(summaries)
        self.first_target = np.cumsum([0, *counts])
        self.number_of_target = np.repeat(np.arange(len(counts)), counts)
        rows = zip(lengths(self.queries).tolist(), self.documents, hops, strict=True)
        self.source_lengths = np.array([
            max(sources.length(size, document, passages) for passages in of_hops)
            for size, document, of_hops in progress(rows, "measured the sources of", "examples", total=len(hops))
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict:
        source, passages = self._build(number, self.hops[number][-1])
        targets = self.target_tokens[self.first_target[number] : self.first_target[number + 1]]
        return {"example": self.examples[number], "source": source, "passages": passages, "targets": targets}

    def source_of_hop(self, number: int, hop: int) -> list[list[int]]:
        """The token sequences of an example at a hop."""
        return self._build(number, self.hops[number][hop])[0]

    def _build(self, number: int, passages: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        return self.sources.build_from_tokens(self.queries[number], self.documents[number], passages)

    def digest(self) -> str:
        """A checksum of what is read and written."""
        sources = self.sources
        rules = [tokenizer_key(sources.tokenizer), sources.rules()]
        return digest([self.examples.id, rules, int(lengths(self.target_tokens).sum()), self.hops])


# ---- batches


def collate(sources: list[list[list[int]]], targets: list[list[int]], pad_token_id: int) -> BatchEncoding:
    """Pads sources and targets into the keyword arguments of `EncoderDecoder.forward`.

    `input_ids` and `attention_mask` are (sequences, tokens), with the sequences of all examples one below the other.
    `sequences_per_example` is (examples,). `labels` is (examples, target tokens), padded with -100.
    """
    batch = pad([sequence for source in sources for sequence in source], pad_token_id)
    batch["sequences_per_example"] = torch.tensor([len(source) for source in sources])
    batch["labels"] = pad(targets, -100)["input_ids"]
    return BatchEncoding(batch)


def count_targets(batch: dict) -> int:
    """Number of target tokens of a micro-batch; 0 for a dummy."""
    return int((batch["labels"] != -100).sum())


def count_tokens(batch: dict, is_packed: bool) -> dict[str, int]:
    """`examples`, `tokens` without padding, and `slots`: the token positions that are computed."""
    real = [batch["attention_mask"] != 0, batch["labels"] != -100]
    examples = int(real[1].any(1).sum())  # 0 for a dummy, whose labels are all padding
    tokens = sum(int(mask.sum()) for mask in real) if examples else 0
    slots = tokens if is_packed and examples else sum(mask.numel() for mask in real)
    return {"examples": examples, "tokens": tokens, "slots": slots}


def count_generated(ids, eos_token_id) -> int:
    """Tokens that were generated, up to and with the first end token of each row; ids (examples, tokens)."""
    ends = torch.isin(ids, torch.as_tensor(eos_token_id, device=ids.device)).long()
    return int((ends.cumsum(1) - ends == 0).sum())


def decode(tokenizer, ids) -> list[str]:
    """The texts of generated tokens; Pegasus writes a line break as the word <n>."""
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    if "<n>" in tokenizer.get_vocab():
        texts = [re.sub(r"\s*<n>\s*", "\n", text).strip() for text in texts]
    return texts


def tokens_per_example(attention_mask, sequences_per_example) -> list[int]:
    """Number of source tokens of each example, without padding."""
    return [int(part.sum()) for part in attention_mask.sum(1).cpu().split(sequences_per_example.tolist())]


def halves(batches: list[dict]) -> list[dict]:
    """Splits each batch into two halves of its examples; [] if no batch has more than one. They have no layout."""
    parts = []
    for batch in batches:
        batch = {name: rows for name, rows in batch.items() if name != "layout"}
        middle = len(batch["labels"]) // 2
        sequences = int(batch["sequences_per_example"][:middle].sum())
        cut = {name: sequences if name in ("input_ids", "attention_mask") else middle for name in batch}
        if middle:
            parts.append(BatchEncoding({name: rows[: cut[name]] for name, rows in batch.items()}))
        parts.append(BatchEncoding({name: rows[cut[name] :] for name, rows in batch.items()}))
    return parts if len(parts) > len(batches) else []
