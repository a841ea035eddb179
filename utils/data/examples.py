"""The data types of the suite: documents, corpora, examples, hops and rankings."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Ranking = list[tuple[int, float]]  # (passage number, score), best first, everywhere in the suite


@dataclass(eq=False, slots=True, weakref_slot=True)
class Document:
    """A document as its passages; compared by identity, because examples about the same document share one object."""

    id: str  # doc_id if given, else a hash of the passages
    passages: Sequence[str]  # in document order
    is_ordered: bool = field(default=True, kw_only=True)  # False: passages of a corpus, in no order but a ranking's

    def passage_id(self, number: int) -> str:
        """The name of a passage in files, such as those of TREC."""
        return f"{self.id}#{number}"

    def excerpt(self, numbers: Sequence[int]) -> tuple["Document", Sequence[int]]:
        """The document in which somebody reads these passages, and their numbers there."""
        return self, numbers


@dataclass(eq=False, slots=True)
class Corpus(Document):
    """The one document of examples that search a corpus; its text is a memory-mapped file.

    `id` is a checksum of ids and passages. Each index access to `passages` or `ids` (a number, a slice or a list of
    numbers) reads the file.
    """

    ids: Sequence[str]  # the corpus's own, one for each passage

    def passage_id(self, number: int) -> str:
        """The id of a passage in the corpus."""
        return self.ids[number]

    def excerpt(self, numbers: Sequence[int]) -> tuple[Document, Sequence[int]]:
        """A document of these passages only."""
        return Document(self.id, self.passages[list(numbers)], is_ordered=False), range(len(numbers))


def blocks(texts: Sequence[str], size: int = 2**16) -> Iterator[list[str]]:
    """Consecutive parts of a long sequence, such as the passages of a corpus; each part is read at once."""
    for start in range(0, len(texts), size):
        yield list(texts[start : start + size])


@dataclass(slots=True)
class Hop:
    """One round of retrieving and summarizing."""

    draft: str  # the summary written at this hop
    read: list[int]  # numbers of the passages that the draft was written from
    retrieved: Ranking  # `read` are its best passages


@dataclass(slots=True)
class Example:
    """One thing to summarize. Passage numbers are positions in `document.passages`, from 0."""

    id: str
    query: str  # "" if there is none
    document: Document
    summaries: list[str]  # references; empty only if summaries were not required
    evidence: list[int] | None  # gold passage numbers, sorted and unique; None if unknown
    evidence_words: list[int] | None  # gold words in each evidence passage: all words, or those of merged gold turns
    retrieved: Ranking | None  # from a hand-over file
    hops: list[Hop] = field(default_factory=list)  # from a file that retrieve_and_summarize.py wrote
