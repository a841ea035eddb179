"""Reads the documents of records; each different document is split or merged into passages once."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from utils.data.layouts import passage_text, struct_list
from utils.data.passages import merge_passages, split_document
from utils.data.rows import Row, is_listed, listed_fields, read_identifier, shown
from utils.data.words import count_words
from utils.errors import BadRecord


@dataclass(slots=True)
class Source:
    """What is remembered of a document, and how its passages were made from those of its record."""

    number: int  # among all documents that are kept
    words: Sequence[int]  # words of each passage
    given: int | None  # number of passages in the record; None if the record has one text, which nothing can number
    placed: list[dict[int, int]] | None  # with merging: for each given passage, {chunk number: words in this chunk}


class Documents:
    """Gives each different document to `keep` once, and remembers documents by content and by doc_id, not their text.

    `keep(id, passages, is_ordered)` returns the document's number.
    """

    def __init__(self, columns: dict[str, str], passage_words: int, merge: bool, keep: Callable):
        self.columns, self.passage_words, self.merge, self.keep = columns, passage_words, merge, keep
        self.by_content: dict[bytes, Source] = {}  # by a checksum, with the doc_id if there is one
        self.by_id: dict[str, tuple[Source, str, bytes]] = {}  # with the place and a checksum of the first record's

    def add(self, row: Row) -> Source:
        """Reads a record of the documents file, where each doc_id may occur once."""
        doc_id = read_identifier(row.record, self.columns["doc_id"])
        if doc_id in self.by_id:
            column, place = self.columns["doc_id"], self.by_id[doc_id][1]
            raise BadRecord(f"'{column}' is '{doc_id}', like {place}; it must be unique")
        return self.read(row)

    def find(self, record: dict, documents_file: str) -> Source:
        """The document whose doc_id an example names."""
        doc_id = read_identifier(record, self.columns["doc_id"])
        if doc_id not in self.by_id:
            raise BadRecord(f"'{self.columns['doc_id']}' is '{doc_id}', but {documents_file} holds no such document")
        return self.by_id[doc_id][0]

    def read(self, row: Row, is_ordered: bool = True) -> Source:
        """The document that a record holds; equal documents share one object."""
        content = self._content(row.record)
        column = self.columns["doc_id"]
        doc_id = read_identifier(row.record, column) if column in row.record else None
        content_key = _checksum([doc_id, content])
        if content_key in self.by_content:
            return self.by_content[content_key]
        given, placed = None, None
        if isinstance(content, str):
            passages = split_document(content, self.passage_words)
        else:
            given, passages = len(content), list(content)
            if self.merge:
                passages, placed = merge_passages(passages, self.passage_words)
        text_key = _checksum(passages)
        key = doc_id or hashlib.blake2b(json.dumps(passages).encode(), digest_size=8).hexdigest()
        if key not in self.by_id:
            words = np.fromiter((count_words(passage) for passage in passages), np.int32, count=len(passages))
            number = self.keep(key, passages, is_ordered and not is_unordered(row.record))
            self.by_id[key] = (Source(number, words, given, placed), row.place, text_key)
        first, place, first_key = self.by_id[key]
        if first_key != text_key:
            raise BadRecord(f"'{column}' is '{key}', like {place}, but the text differs")
        source = self.by_content[content_key] = Source(first.number, first.words, given, placed)
        return source

    def _content(self, record: dict) -> str | tuple[str, ...]:
        """The checked passages of a record or, if it has none, its text."""
        passages_column, document_column = self.columns["passages"], self.columns["document"]
        if passages_column in record:
            passages = struct_list(record[passages_column])
            if not isinstance(passages, list):
                raise BadRecord(f"'{passages_column}' must be a list of strings or dicts, not {shown(passages)}")
            if not passages:
                raise BadRecord(f"'{passages_column}' is an empty list; there must be at least one passage")
            passages = [passage_text(each, f"'{passages_column}' number {n}") for n, each in enumerate(passages)]
            for number, passage in enumerate(passages):
                if not passage.strip():
                    remedy = f"leave it out and renumber '{self.columns['evidence']}'"
                    raise BadRecord(f"'{passages_column}' number {number} is empty; {remedy}")
            return tuple(passages)
        if document_column not in record:
            raise BadRecord(f"no '{passages_column}' and no '{document_column}'; {listed_fields(record)}")
        text = record[document_column]
        if not isinstance(text, str):
            hint = f" (a list of passages goes under '{passages_column}')" if isinstance(text, list) else ""
            raise BadRecord(f"'{document_column}' must be a string, not {shown(text)}{hint}")
        if is_listed(text):
            raise BadRecord(f"'{document_column}' is a list, {shown(text)}; write it to '{passages_column}', as JSON")
        if not text.strip():
            raise BadRecord(f"'{document_column}' is empty; it must hold the text to summarize")
        return text


def is_unordered(record: dict) -> bool:
    """Whether a record of these scripts says that its passages are in no order of a text (see `hops_record`)."""
    return "passage_ids" in record or record.get("is_ordered") is False


def _checksum(content) -> bytes:
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=16).digest()
