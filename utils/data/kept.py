"""Examples and documents that are kept on disk: written while they are read, and mapped into memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa

from utils.data.examples import Corpus, Document, Example, Hop, Ranking
from utils.files import digest
from utils.tables import Column, Table, cached, table_writer

_NUMBERS = pa.large_list(pa.int64())
_RANKING = pa.large_list(pa.struct([("passage", pa.int64()), ("score", pa.float64())]))
PASSAGES = pa.schema([("passage", pa.large_string())])
DOCUMENTS = pa.schema([("id", pa.large_string()), ("passages", pa.int64()), ("is_ordered", pa.bool_())])  # how many
EXAMPLES = pa.schema([
    ("id", pa.large_string()), ("query", pa.large_string()), ("document", pa.int64()),
    ("summaries", pa.large_list(pa.large_string())), ("evidence", _NUMBERS), ("evidence_words", _NUMBERS),
    ("retrieved", _RANKING),
    ("hops", pa.large_list(pa.struct([("draft", pa.large_string()), ("read", _NUMBERS), ("retrieved", _RANKING)]))),
])  # fmt: skip


class Examples(Sequence):
    """Examples of a table on disk; each is made anew at each access. Their documents stay the same objects.

    `id` is a checksum of all that they hold.
    """

    def __init__(self, table: Table, documents: Sequence[Document], id: str):
        self.table, self.documents, self.id = table, documents, id

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, place):
        """An example; a list of them for a slice."""
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        return self._example(self.table.row(range(len(self))[place]))

    def __iter__(self) -> Iterator[Example]:
        return map(self._example, self.table.read())

    def _example(self, row: dict) -> Example:
        return Example(
            row["id"], row["query"], self.documents[row["document"]], row["summaries"], row["evidence"],
            row["evidence_words"], _ranking(row["retrieved"]),
            [Hop(hop["draft"], hop["read"], _ranking(hop["retrieved"])) for hop in row["hops"]],
        )  # fmt: skip

    def column(self, name: str) -> Sequence:
        """The attribute `name` of all examples, without reading the others."""
        if name == "document":
            return [self.documents[number] for number in self.table.array("document").tolist()]
        return self.table.column(name)


def content_key(examples: Sequence[Example]) -> str:
    """A checksum of all that examples hold."""
    if isinstance(examples, Examples):
        return examples.id
    return digest([
        [e.id, e.query, e.document.id, [] if isinstance(e.document, Corpus) else list(e.document.passages),
         e.summaries, e.evidence, e.evidence_words, e.retrieved,
         [[hop.draft, hop.read, hop.retrieved] for hop in e.hops]] for e in examples
    ])  # fmt: skip


def _ranking(entries: list[dict] | None) -> Ranking | None:
    return None if entries is None else [(entry["passage"], entry["score"]) for entry in entries]


def _entries(ranking: Ranking | None) -> list[dict] | None:
    return None if ranking is None else [{"passage": passage, "score": score} for passage, score in ranking]


class Keeper:
    """Writes documents and examples, one by one; documents are numbered from 0."""

    def __init__(self, add_passage: Callable, add_document: Callable, add_example: Callable):
        self.write_passage, self.write_document, self.write_example = add_passage, add_document, add_example
        self.documents, self.checksum = 0, hashlib.blake2b(digest_size=16)

    def add_document(self, id: str, passages: Sequence[str], is_ordered: bool = True) -> int:
        for passage in passages:
            self.write_passage({"passage": passage})
        self._add(self.write_document, {"id": id, "passages": len(passages), "is_ordered": is_ordered}, passages)
        self.documents += 1
        return self.documents - 1

    def add_example(self, example: Example, document: int) -> None:
        """`document` is the number of the example's document."""
        hops = [{"draft": hop.draft, "read": hop.read, "retrieved": _entries(hop.retrieved)} for hop in example.hops]
        self._add(self.write_example, {
            "id": example.id, "query": example.query, "document": document, "summaries": example.summaries,
            "evidence": example.evidence, "evidence_words": example.evidence_words,
            "retrieved": _entries(example.retrieved), "hops": hops,
        })  # fmt: skip

    def _add(self, add: Callable, row: dict, *more) -> None:
        self.checksum.update(json.dumps([row, *more]).encode())
        add(row)


@contextmanager
def keeper(folder: Path) -> Iterator[Keeper]:
    """Writes into the folder what `kept_examples` reads."""
    with (
        table_writer(folder / "passages.arrow", PASSAGES) as add_passage,
        table_writer(folder / "documents.arrow", DOCUMENTS) as add_document,
        table_writer(folder / "examples.arrow", EXAMPLES) as add_example,
    ):
        keep = Keeper(add_passage, add_document, add_example)
        yield keep
    (folder / "id").write_text(keep.checksum.hexdigest())


def kept_examples(folder: Path, corpus: Document | None = None) -> Examples:
    """The examples of a folder; all of them are about the `corpus`, if there is one."""
    documents, id = [corpus], (folder / "id").read_text()
    if corpus is None:
        documents, passages, first = [], Table(folder / "passages.arrow"), 0
        for row in Table(folder / "documents.arrow").read():
            stop = first + row["passages"]
            documents.append(Document(row["id"], Column(passages, 0, first, stop), is_ordered=row["is_ordered"]))
            first = stop
    return Examples(Table(folder / "examples.arrow"), documents, f"{id} {corpus.id}" if corpus else id)


def keep_examples(name: str, key: list, examples: Callable[[], Iterable[Example]]) -> Examples:
    """The examples that `examples()` makes, from the cache if they are there. `key` is as in `cached`."""

    def write(folder: Path) -> None:
        numbers: dict[Document, int] = {}
        with keeper(folder) as keep:
            for example in examples():
                if example.document not in numbers:
                    document = example.document
                    numbers[document] = keep.add_document(document.id, document.passages, document.is_ordered)
                keep.add_example(example, numbers[example.document])

    return kept_examples(cached(name, key, write))
