"""What the suite works on: documents, corpora, examples, hops and rankings.

A ranking is a list of `(passage number, score)`, best first, everywhere in the suite.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Ranking = list[tuple[int, float]]


@dataclass(eq=False, slots=True, weakref_slot=True)
class Document:
    """A document as its passages; compared by identity, because examples about the same document share one object."""

    id: str  # doc_id if given, else a hash of the passages
    passages: Sequence[str]  # in document order

    def passage_id(self, number: int) -> str:
        """The name of a passage outside this program, as in TREC files."""
        return f"{self.id}#{number}"


@dataclass(eq=False, slots=True)
class Corpus(Document):
    """The one document of examples that search a corpus; its text stays on the disk, in a file mapped into memory.

    `id` is a checksum of ids and passages. `passages` and `ids` are read where they are indexed: by a number, a slice
    or a list of numbers, of which a slice is much the fastest for many.
    """

    ids: Sequence[str]  # the corpus's own, one for each passage

    def passage_id(self, number: int) -> str:
        """The corpus's own id of a passage."""
        return self.ids[number]


@dataclass(slots=True)
class Hop:
    """One round of retrieving and summarizing."""

    draft: str  # the summary that it wrote
    read: list[int]  # passage numbers that it was written from
    retrieved: list[tuple[int, float]]  # the ranking that they are the best of


@dataclass(slots=True)
class Example:
    """One thing to summarize. Passage numbers are positions in `document.passages`, from 0."""

    id: str
    query: str  # "" if there is none
    document: Document
    summaries: list[str]  # references; empty only if summaries were not required
    evidence: list[int] | None  # gold passage numbers, sorted and unique; None if nobody marked any
    evidence_words: list[int] | None  # gold words in each of them: all its words, or those of the gold turns merged in
    retrieved: list[tuple[int, float]] | None  # (passage number, score), best first, from a hand-over file
    hops: list[Hop] = field(default_factory=list)  # in a file that retrieve_and_summarize.py wrote


BLOCK = 2**16  # passages or ids read at once


def blocks(texts: Sequence[str], size: int = BLOCK) -> Iterator[list[str]]:
    """Consecutive parts of a long sequence, such as a corpus's, each read at once."""
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])
