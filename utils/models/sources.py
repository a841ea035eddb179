"""The summarizer's input: sources of query and passages as token sequences, batches of them, and the texts it writes.

A source is one or more token sequences. With fusion "concat", all passages are in one sequence. With "fid"
(Fusion-in-Decoder), each passage has a sequence of its own. Every sequence starts with the query.
"""

import re
from dataclasses import dataclass

import torch
from transformers import BatchEncoding

from utils.errors import UsageError
from utils.models.tokenizer import pad, tokenize

# ---- from passages to token sequences


@dataclass
class Sources:
    """Turns a query and ranked passages into a source: a list of token sequences.

    `fusion` is "concat" or "fid". A sequence has at most `max_source_length` tokens, special tokens included; the query
    takes at most half of them. With "concat", passages are added in rank order until the sequence is full, and the last
    one is cut. They then stand in the order of `passage_order`: "rank" or "document". Every sequence begins with
    `source_prefix`, which is part of its length. With `marks_query`, two separators follow the query, as in BART's
    format for two texts (see `Summarizer._read`).
    """

    tokenizer: object
    fusion: str
    max_source_length: int
    passage_order: str
    source_prefix: str = ""
    marks_query: bool = False

    def __post_init__(self):
        self.passage_tokens: dict = {}  # by document: each document is tokenized once
        tokenizer = self.tokenizer
        self.separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        # the special tokens that this tokenizer puts around a text
        bare, whole = _tokenize_bare(tokenizer, ["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.prefix, self.suffix = whole[:start], whole[start + len(bare) :]
        if self.source_prefix:
            self.prefix += _tokenize_bare(tokenizer, [self.source_prefix.rstrip()])[0]
        self.room = self.max_source_length - len(self.prefix) - len(self.suffix)
        if self.room < self.max_source_length // 4:
            raise UsageError(
                f"--source_prefix takes {len(self.prefix)} of --max_source_length {self.max_source_length} tokens; "
                "make it shorter"
            )

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
        query_tokens = _tokenize_bare(self.tokenizer, [query])[0][: self.room // 2] if query else []
        if self.marks_query and query_tokens:
            query_tokens.append(self.separator)
        kept, free = [], self.room - len(query_tokens)
        for number in passage_numbers:
            room = free - 1  # after the separator
            if room <= 0 and kept:
                break
            kept.append((number, passages[number][: max(room, 0)]))
            if self.fusion == "concat":
                free = room - len(kept[-1][1])
        if self.passage_order == "document":
            kept.sort()
        if self.fusion == "concat":
            sequences = [self._join([query_tokens, *(passage for _, passage in kept)])]
        else:  # without a passage, the query alone
            sequences = [self._join([query_tokens, passage]) for _, passage in kept] or [self._join([query_tokens])]
        return sequences, [number for number, _ in kept]

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


def count_generated(ids, eos_token_id) -> int:
    """Tokens that were generated, up to and with the first end token of each row; ids (examples, 1 + tokens)."""
    ends = torch.isin(ids[:, 1:], torch.as_tensor(eos_token_id, device=ids.device)).long()
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
