"""What a report shows of an example: which passages support a summary, what was found and missed, what a hop did."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.data.passages import split_sentences
from utils.data.words import search_words, split_words
from utils.errors import DataError

SUPPORT = 0.5  # of a sentence's words must be in a passage that supports it
MOST_SUPPORTING = 3  # passages named beside a sentence
MOST_THROUGH = 4  # words named that led to a passage: those that the fewest passages shown have
MOST_PASSAGES = 50  # shown of an example
MOST_CHARACTERS = 8000  # shown of a text
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
CONTROL |= dict.fromkeys(range(128, 160), 0xFFFD)


def visible(text: str) -> str:
    """A text that no terminal and no browser takes for more: symbols stand for control characters."""
    text = text.replace("\r\n", "\n").translate(CONTROL)
    return text.encode("utf-8", errors="backslashreplace").decode()  # half of a surrogate pair


def cut(text: str) -> str:
    more = len(text) - MOST_CHARACTERS
    return text if more <= 0 else f"{text[:MOST_CHARACTERS]} … ({more:,} more characters)"


@dataclass
class Sentence:
    """A sentence of a summary. `best` is the largest share of its words in one passage read; None if it has no words.

    `support` names the passages that contain at least SUPPORT of its words, the best first, with that share.
    """

    text: str
    support: list[tuple[int, float]]
    best: float | None

    @property
    def is_unsupported(self) -> bool:
        return self.best is not None and not self.support


@dataclass
class Passage:
    """A passage; `hops` are those that read it, `rank` is that in the last ranking, from 1 (None: not ranked)."""

    number: int
    name: str
    text: str | None  # None: the file does not have it
    is_evidence: bool
    hops: list[int]
    rank: int | None
    supports: list[int] = field(default_factory=list)  # sentences of the summary, from 1


@dataclass
class HopView:
    """What one hop did: `new` are the passages that it reads and the hop before did not, with words that led there."""

    number: int
    draft: str
    read: int
    new: list[tuple[Passage, list[str]]]
    rouge: float | None  # ROUGE-L of the draft


@dataclass
class View:
    """An example as a report shows it.

    Attributes:
        scores: rouge1, rouge2, rougeL of the summary, in percent; {} without a reference.
        shown: all passages that are shown: those that the summary was written from, then those that only earlier hops
            read, then missed evidence.
        found, missed: evidence that the summary was written from, and the other evidence.
        change: what the later hops changed, in points: ROUGE-L from the first draft to the summary or, if drafts are
            no summaries or there is no reference, the share of evidence that is read. None if it is not known.
    """

    id: str
    query: str
    document: str
    references: list[str]
    prediction: str
    sentences: list[Sentence]
    shown: list[Passage]
    found: list[Passage]
    missed: list[Passage]
    hops: list[HopView]
    scores: dict[str, float]
    change: float | None
    change_of: str
    has_evidence: bool

    @property
    def unsupported(self) -> int:
        return sum(sentence.is_unsupported for sentence in self.sentences)

    @property
    def effect(self) -> str:
        """ "helped", "hurt" or "" for what the later hops did."""
        return "" if not self.change else "helped" if self.change > 0 else "hurt"


def view(record: dict, place: str, *, language: str | None = None, drafts_are_summaries: bool = True) -> View:
    """Reads a record of a file of predictions.

    `drafts_are_summaries` says that the drafts of a hop can be compared with the summary. Raises DataError, with
    `place`, for a record that these scripts did not write.
    """
    try:
        return _view(record, language, drafts_are_summaries)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{place}: not a record of these scripts ({problem}); write the file again") from error


def _view(record: dict, language: str | None, drafts_are_summaries: bool) -> View:
    texts, names = passages_of(record)
    given = record.get("hops") or [{"draft": "", "read": list(texts)}]  # of train_summarize.py
    drafts, read = [hop["draft"] for hop in given], [list(hop["read"]) for hop in given]
    ranks = {entry["passage"]: rank for rank, entry in enumerate(given[-1].get("retrieved", []), 1)}
    evidence = list(record.get("evidence") or [])
    references = record.get("summary") or []
    references = [references] if isinstance(references, str) else list(references)
    prediction = record["prediction"]

    order = list(dict.fromkeys(itertools.chain(*reversed(read), evidence)))
    passages = {
        number: Passage(number, names.get(number, str(number)), texts.get(number), number in evidence,
                        [hop for hop, of_hop in enumerate(read, 1) if number in of_hop], ranks.get(number))
        for number in order
    }  # fmt: skip
    sentences = [text for text in split_sentences(prediction) if text.strip()]
    known = [number for number in order if texts.get(number) is not None]
    query = record.get("query") or ""
    words = iter(search_words([query, *drafts, *sentences, *(texts[number] for number in known)], language))
    query_words, of_drafts = set(next(words)), list(itertools.islice(words, len(drafts)))
    of_sentences = list(itertools.islice(words, len(sentences)))
    of_passages = {number: Counter(of_one) for number, of_one in zip(known, words, strict=True)}

    last = [number for number in read[-1] if number in of_passages]
    supported = [
        support(text, of_one, {number: of_passages[number] for number in last})
        for text, of_one in zip(sentences, of_sentences, strict=True)
    ]
    for number, sentence in enumerate(supported, 1):
        for passage, _ in sentence.support:
            passages[passage].supports.append(number)

    rouge = _rouge_of(references)
    hops = []
    for hop, draft in enumerate(drafts):
        new = [number for number in read[hop] if hop == 0 or number not in read[hop - 1]]
        through = {}
        for number in new if hop else []:
            shared = set(of_drafts[hop - 1]) & of_passages.get(number, {}).keys() - query_words
            rarest = sorted(shared, key=lambda word: (sum(word in of_one for of_one in of_passages.values()), word))
            through[number] = surfaces(drafts[hop - 1], rarest[:MOST_THROUGH], language)
        scores = rouge(draft) if draft else {}
        found = [(passages[number], through.get(number, [])) for number in new]
        hops.append(HopView(hop + 1, draft, len(read[hop]), found, scores.get("rougeL")))
    scores, change, change_of = rouge(prediction), None, ""
    if len(hops) > 1:
        if drafts_are_summaries and scores and hops[0].rouge is not None:
            change, change_of = scores["rougeL"] - hops[0].rouge, "ROUGE-L"
        elif evidence:
            first, final = (len(set(evidence) & set(read[hop])) for hop in (0, -1))
            change, change_of = 100 * (final - first) / len(set(evidence)), "evidence read"
    return View(
        id=str(record["id"]), query=query, document=str(record.get("doc_id") or ""), references=references,
        prediction=prediction, sentences=supported, shown=list(passages.values()),
        found=[passages[number] for number in dict.fromkeys(evidence) if number in read[-1]],
        missed=[passages[number] for number in dict.fromkeys(evidence) if number not in read[-1]],
        hops=hops, scores=scores, change=None if change is None else round(change, 6), change_of=change_of,
        has_evidence=bool(evidence),
    )  # fmt: skip


def passages_of(record: dict) -> tuple[dict[int, str], dict[int, str]]:
    """The texts in a record by passage number, and the passages' names, if these are not their numbers."""
    passages = record["passages"]
    if passages and isinstance(passages[0], dict):  # train_summarize.py writes those that were read
        return {entry["passage"]: entry["text"] for entry in passages}, {}
    return dict(enumerate(passages)), dict(enumerate(map(str, record.get("passage_ids") or [])))


def support(text: str, words: Sequence[str], passages: dict[int, Counter]) -> Sentence:
    """How far passages support a sentence: by ROUGE-1 recall, the share of the sentence's words that a passage has.

    Words are those of BM25, so stop words and endings do not count. A word that the sentence repeats must be repeated
    in the passage, too.
    """
    counts = Counter(words)
    if not counts:
        return Sentence(text, [], None)
    shares = {number: sum((counts & of_passage).values()) / len(words) for number, of_passage in passages.items()}
    best_first = sorted(shares.items(), key=lambda entry: -entry[1])
    supporting = [(number, share) for number, share in best_first if share >= SUPPORT][:MOST_SUPPORTING]
    return Sentence(text, supporting, max(shares.values(), default=0.0))


def surfaces(draft: str, stems: Sequence[str], language: str | None) -> list[str]:
    """These words of a search as they stand in the draft, in its order."""
    words = list(dict.fromkeys(word.strip("\"'“”‘’«».,;:!?()[]") for word in split_words(draft)))
    found, left = [], set(stems)
    for word, of_one in zip(words, search_words(words, language), strict=True):
        if left & set(of_one):
            found.append(word)
            left -= set(of_one)
    return found + sorted(left)  # in scripts without spaces the words of a search are pairs of letters


def _rouge_of(references: list[str]):
    """A function that scores a text against these references, and gives {} if there are none."""
    if not references:
        return lambda text: {}
    from utils.evaluation.rouge import rouge_scores  # imports `evaluate`, which takes seconds

    return lambda text: rouge_scores(text, references)
