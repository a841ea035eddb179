"""The summarizer's input: sources of query and passages as token sequences, and batches of them.

A source is one or more token sequences. With fusion "concat", all passages are in one sequence. With "fid"
(Fusion-in-Decoder), each passage has a sequence of its own. Every sequence starts with the query.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from transformers import BatchEncoding

from utils.models.tokenizer import describe_cut, pad, tokenize, whole_lengths

# ---- from passages to token sequences


@dataclass
class Sources:
    """Turns a query and ranked passages into a source: a list of token sequences.

    `fusion` is "concat" or "fid". A sequence has at most `max_source_length` tokens, special tokens included; the query
    takes at most half of them. With "concat", passages are added in rank order until the sequence is full, and the last
    one is cut. They then stand in the order of `passage_order`: "rank" or "document".
    """

    tokenizer: object
    fusion: str
    max_source_length: int
    passage_order: str

    def __post_init__(self):
        self.passage_tokens: dict = {}  # by document: each document is tokenized once
        self.references, self.sources = [], []  # numbers of tokens before any cut
        self.cut = Counter()  # passages asked for, left out and shortened; queries shortened
        tokenizer = self.tokenizer
        self.separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        # the special tokens that this tokenizer puts around a text
        bare, whole = _tokenize_bare(tokenizer, ["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.prefix, self.suffix = whole[:start], whole[start + len(bare) :]
        self.room = self.max_source_length - len(self.prefix) - len(self.suffix)

    def read(self, documents) -> None:
        """Tokenizes documents in one call, so that the cache on disk serves all of them."""
        documents = [document for document in dict.fromkeys(documents) if document not in self.passage_tokens]
        tokens = iter(_tokenize_bare(self.tokenizer, [text for document in documents for text in document.passages]))
        for document in documents:
            self.passage_tokens[document] = [next(tokens) for _ in document.passages]

    def build(self, query: str, document, passage_numbers: list[int]) -> tuple[list[list[int]], list[int]]:
        """The token sequences, and the numbers of the passages in them, in the same order."""
        self.read([document])
        passages = self.passage_tokens[document]
        whole_query = _tokenize_bare(self.tokenizer, [query])[0] if query else []
        query_tokens = whole_query[: self.room // 2]
        kept, free = [], self.room - len(query_tokens)
        for number in passage_numbers:
            room = free - 1  # after the separator
            if room <= 0 and kept:
                break
            kept.append((number, passages[number][: max(room, 0)]))
            if self.fusion == "concat":
                free = room - len(kept[-1][1])
        self._count_cut(whole_query, [passages[number] for number in passage_numbers], kept)
        if self.passage_order == "document":
            kept.sort()
        if self.fusion == "concat":
            sequences = [self._join([query_tokens, *(passage for _, passage in kept)])]
        else:
            sequences = [self._join([query_tokens, passage]) for _, passage in kept]
        return sequences, [number for number, _ in kept]

    def tokenize_targets(self, summaries: list[str], max_target_length: int) -> list[list[int]]:
        """Token ids of references, cut at `max_target_length`."""
        options = {"truncation": True, "max_length": max_target_length}
        encoded = self.tokenizer(text_target=summaries, **options) if summaries else {"input_ids": []}
        if summaries:
            self.references += whole_lengths(self.tokenizer, summaries, encoded, options)
        return encoded["input_ids"]

    def cuts(self, max_target_length: int) -> str:
        """What of the references and sources made so far is cut, in one line; "" if nothing is."""
        parts = [describe_cut("max_target_length", max_target_length, {"references": self.references})]
        parts += [describe_cut("max_source_length", self.max_source_length, {"sources": self.sources})]
        if self.cut["left out"] or self.cut["shortened"]:
            asked, left_out, shortened = (f"{self.cut[name]:,}" for name in ("passages", "left out", "shortened"))
            parts += [f"of their {asked} passages, {left_out} are left out and {shortened} shortened"]
        if self.cut["queries"]:
            parts += [f"{self.cut['queries']:,} queries shortened to half a source"]
        return "; ".join(part for part in parts if part)

    def _count_cut(self, query: list[int], passages: list[list[int]], kept: list) -> None:
        """Counts what a source lacks: `kept` are the first of the `passages`, maybe shortened."""
        lengths = [len(passage) + 1 for passage in passages]  # with the separator
        longest = max(lengths, default=0) if self.fusion == "fid" else sum(lengths)
        self.sources.append(len(self.prefix) + len(query) + longest + len(self.suffix))
        self.cut["passages"] += len(passages)
        self.cut["left out"] += len(passages) - len(kept)
        pairs = zip(kept, passages, strict=False)
        self.cut["shortened"] += sum(len(tokens) < len(passage) for (_, tokens), passage in pairs)
        self.cut["queries"] += len(query) > self.room // 2

    def _join(self, texts: list[list[int]]) -> list[int]:
        """One sequence of several texts, with separators and special tokens; empty texts are left out."""
        body = [token for text in texts if text for token in (self.separator, *text)][1:]
        return self.prefix + body + self.suffix


def _tokenize_bare(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenize(tokenizer, texts, add_special_tokens=False, verbose=False)


# ---- batches


def collate(sources: list[list[list[int]]], targets: list[list[int]], pad_token_id: int) -> BatchEncoding:
    """Pads sources and targets into the keyword arguments of `Summarizer.forward`.

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


def tokens_per_example(attention_mask, sequences_per_example) -> list[int]:
    """Number of source tokens of each example, without padding."""
    return [int(part.sum()) for part in attention_mask.sum(1).cpu().split(sequences_per_example.tolist())]


def halves(batches: list[dict]) -> list[dict]:
    """Splits each batch into two halves of its examples; [] if no batch has more than one example."""
    parts = []
    for batch in batches:
        middle = len(batch["labels"]) // 2
        sequences = int(batch["sequences_per_example"][:middle].sum())
        cut = {name: sequences if name in ("input_ids", "attention_mask") else middle for name in batch}
        if middle:
            parts.append(BatchEncoding({name: rows[: cut[name]] for name, rows in batch.items()}))
        parts.append(BatchEncoding({name: rows[cut[name] :] for name, rows in batch.items()}))
    return parts if len(parts) > len(batches) else []
