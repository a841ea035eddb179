"""What the summarizer reads: the query and the passages as token sequences, and batches of them.

A source is one or more token sequences. Concatenated passages are one sequence (``concat``). In Fusion-in-Decoder every
passage is a sequence of its own, after the query (``fid``).
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import nn
from transformers import BatchEncoding

from utils.models.tokenizer import tokenize


@dataclass
class Sources:
    """Turns a query and ranked passages into a source: a list of token sequences.

    `fusion` is "concat" or "fid". Sequences hold at most `max_source_length` tokens, special tokens included; a query
    takes at most half of it. With concat, passages are taken in rank order until the sequence is full, the last one
    cut short, and then stand in rank or document order as `passage_order` says ("rank" or "document").
    """

    tokenizer: object
    fusion: str
    max_source_length: int
    passage_order: str

    def __post_init__(self):
        self.passage_tokens: dict = {}  # a document is tokenized once, however many its queries
        tokenizer = self.tokenizer
        separator = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        self.separator = [separator]
        bare, whole = tokenize_bare(tokenizer, ["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
        self.prefix, self.suffix = whole[:start], whole[start + len(bare) :]
        self.room = self.max_source_length - len(self.prefix) - len(self.suffix)

    def read(self, documents) -> None:
        """Tokenizes documents, each once, together: what is kept on disk is then read at once."""
        documents = [document for document in dict.fromkeys(documents) if document not in self.passage_tokens]
        tokens = iter(tokenize_bare(self.tokenizer, [text for document in documents for text in document.passages]))
        for document in documents:
            self.passage_tokens[document] = [next(tokens) for _ in document.passages]

    def build(self, query: str, document, passage_numbers: list[int]) -> tuple[list[list[int]], list[int]]:
        """The sequences, and the numbers of the passages that they hold, in their order."""
        if document not in self.passage_tokens:
            self.read([document])
        passages = self.passage_tokens[document]
        query_tokens = tokenize_bare(self.tokenizer, [query])[0][: self.room // 2] if query else []
        kept, free = [], self.room - len(query_tokens)
        for number in passage_numbers:
            room = free - len(self.separator)
            if room <= 0 and kept:
                break
            kept.append((number, passages[number][: max(room, 0)]))
            if self.fusion == "concat":
                free -= len(self.separator) + len(kept[-1][1])
        if self.passage_order == "document":
            kept.sort()
        if self.fusion == "concat":
            texts = [[query_tokens, *(passage for _, passage in kept)]]
        else:
            texts = [[query_tokens, passage] for _, passage in kept]
        bodies = [self.join(text) for text in texts]
        return [self.prefix + body + self.suffix for body in bodies], [number for number, _ in kept]

    def join(self, texts: list[list[int]]) -> list[int]:
        """Token sequences with a separator between them; empty ones are left out."""
        texts = [text for text in texts if text]
        return [token for text in texts for token in self.separator + text][len(self.separator) :]


def tokenize_bare(tokenizer, texts: list[str]) -> list[list[int]]:
    return tokenize(tokenizer, texts, add_special_tokens=False, verbose=False)


def collate(sources: list[list[list[int]]], targets: list[list[int]], pad_token_id: int) -> BatchEncoding:
    """Pads sources and targets into the keyword arguments of `Summarizer.forward`.

    `input_ids` and `attention_mask` are (sequences, tokens): all examples' sequences one below the other;
    `sequences_per_example` is (examples,), `labels` (examples, target tokens) with -100 as padding.
    """
    sequences = [torch.tensor(sequence) for source in sources for sequence in source]
    batch = {
        "input_ids": nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
        "sequences_per_example": torch.tensor([len(source) for source in sources]),
    }
    labels = [torch.tensor(target) for target in targets]
    batch["labels"] = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    return BatchEncoding(batch)


def count_targets(batch: dict) -> int:
    """Target tokens of a micro-batch; 0 of a dummy."""
    return int((batch["labels"] != -100).sum())


def count_tokens(batch: dict, is_packed: bool) -> dict[str, int]:
    """`examples` and `tokens` of a micro-batch without padding, and `slots`, the tokens that are computed."""
    real = [batch["attention_mask"] != 0, batch["labels"] != -100]
    examples = int(real[1].any(1).sum())  # 0 if it is a dummy, which is all padding
    tokens = sum(int(mask.sum()) for mask in real) if examples else 0
    return {
        "examples": examples,
        "tokens": tokens,
        "slots": tokens if is_packed and examples else sum(mask.numel() for mask in real),
    }


def halves(batches: list[dict]) -> list[dict]:
    """Each batch as two with half of its examples; [] if none has more than one example."""
    parts = []
    for batch in batches:
        middle = len(batch["labels"]) // 2
        sequences = int(batch["sequences_per_example"][:middle].sum())
        cut = {name: sequences if name in ("input_ids", "attention_mask") else middle for name in batch}
        parts += [BatchEncoding({name: rows[: cut[name]] for name, rows in batch.items()})] if middle else []
        parts += [BatchEncoding({name: rows[cut[name] :] for name, rows in batch.items()})]
    return parts if len(parts) > len(batches) else []


def tokens_per_example(attention_mask, sequences_per_example) -> list[int]:
    tokens = attention_mask.sum(1).tolist()
    starts = [0, *sequences_per_example.cumsum(0).tolist()]
    return [sum(tokens[start:end]) for start, end in pairwise(starts)]
