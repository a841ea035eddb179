"""Layouts of other data sets: passages as turns, messages or titled texts, and queries with positives and negatives."""

import hashlib
import re
from typing import Any

from utils.data.rows import POSITIVES, is_whole_number, shown
from utils.errors import BadRecord

TEXTS = ("text", "content", "utterance", "value", "passage_text")
SPEAKERS = ("speaker", "name", "role", "from")
NEGATIVES = {"positive_passages": "negative_passages", "positive": r"negative(_\d+)?", "pos": "neg"}


def own_layout(record: dict, columns: dict[str, str]) -> tuple[dict, bool]:
    """A record with `passages` and `evidence` in place of other marks of the positives; and whether it had such marks.

    Positives and negatives are lists as in Tevatron (`positive_passages`) and FlagEmbedding (`pos`), or columns as in
    sentence-transformers (`anchor`, `positive`, `negative` or `negative_1`, `negative_2`, ...). They become passages in
    an order that depends only on their text, because the order decides between equal scores. The passages of MS MARCO
    (Nguyen et al., 2016, arXiv:1611.09268) keep their order, and `is_selected` marks the evidence.

    Raises BadRecord for marks that are unusable or contradict other fields.
    """
    passages = struct_list(record.get(columns["passages"]))
    own_text = [columns[field] for field in ("passages", "document") if columns[field] in record]
    marks = [name for name in POSITIVES if name in record and (name == "positive_passages" or not own_text)]
    if marks:
        positives = _texts(record[marks[0]], marks[0])
        names = [name for name in record if re.fullmatch(NEGATIVES[marks[0]], name)]
        negatives = [text for name in names for text in _texts(record[name], name)]
        if not positives:
            raise BadRecord(f"'{marks[0]}' is empty; there must be at least one positive")
        passages = sorted({*positives, *negatives}, key=lambda text: hashlib.blake2b(text.encode()).digest())
        evidence = [number for number, text in enumerate(passages) if text in positives]
    elif isinstance(passages, list) and any(isinstance(each, dict) and "is_selected" in each for each in passages):
        marks, own_text, evidence = ["is_selected"], [], []
        for number, passage in enumerate(passages):
            is_selected = passage.get("is_selected") if isinstance(passage, dict) else None
            if is_selected not in (0, 1):
                place = f"'{columns['passages']}' number {number}"
                raise BadRecord(f"{place}: 'is_selected' must be 0 or 1 in all passages, not {shown(is_selected)}")
            evidence += [number] if is_selected else []
    else:
        return record, False
    if clash := [*own_text, *(name for name in (columns["evidence"], "retrieved", "hops") if record.get(name))]:
        raise BadRecord(f"holds both '{marks[0]}' and '{clash[0]}'; leave one of them out")
    record = record | {columns["passages"]: passages, columns["evidence"]: evidence}
    for column, name in ((columns["id"], "query_id"), (columns["query"], "anchor")):
        if name in record:
            record.setdefault(column, record[name])
    if not str(record.get(columns["query"], "")).strip():
        raise BadRecord(f"no '{columns['query']}' or an empty one; '{marks[0]}' answers a query")
    return record, True


def struct_list(value: Any) -> Any:
    """A list of records that some versions of `datasets` and some files give as a dict of lists; else the value."""
    if not isinstance(value, dict):
        return value
    lists = {name: values for name, values in value.items() if values is not None}
    if not lists or not all(isinstance(values, list) for values in lists.values()):
        return value
    if len(set(map(len, lists.values()))) > 1:
        return value
    return [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]


def passage_text(passage: Any, place: str) -> str:
    """The text of a passage, which is a string or a dict, such as a turn, a message or a passage of a corpus.

    A turn is written "Anna: Yes." and a passage with a title as in a corpus (see `load_corpus`). The content of a
    message may be a list of parts. A passage without text is "". Raises BadRecord, which begins with `place`.
    """
    if isinstance(passage, str):
        return passage
    fields = {name: value for name, value in passage.items() if value is not None} if isinstance(passage, dict) else {}
    names = [name for name in TEXTS if name in fields]
    if len(names) != 1:
        raise BadRecord(
            f"{place} is {shown(passage)}; a passage is a string, or a dict with one of {', '.join(TEXTS)}, and with a "
            f"speaker ({', '.join(SPEAKERS)}), a title or neither"
        )
    if is_whole_number(fields.get("passage")):
        remedy = "give the examples that they were made from"
        raise BadRecord(f"{place} is {shown(passage)}; predictions hold only passages that were read: {remedy}")
    parts = fields[names[0]] if isinstance(fields[names[0]], list) else [fields[names[0]]]
    texts = [_part_text(part) for part in parts]
    title = fields.get("title", "")
    speaker = next((fields[name] for name in SPEAKERS if fields.get(name, "") != ""), "")
    if None in texts or not isinstance(title, str) or not (isinstance(speaker, str) or is_whole_number(speaker)):
        raise BadRecord(f"{place} is {shown(passage)}; its text, title and speaker must be strings, without images")
    text = "\n".join(texts).strip()
    if speaker != "":
        return f"{speaker}: {text}" if text else ""
    return f"{title} {text}".strip()


def _part_text(part: Any) -> str | None:
    """The text of a part of a message's content; None if it is something else, such as an image."""
    if isinstance(part, dict) and str(part.get("type", "text")).endswith("text"):
        part = part.get("text")
    return part if isinstance(part, str) else None


def _texts(value: Any, column: str) -> list[str]:
    """The texts in a column of positives or negatives: of a list, or of one passage."""
    passages = struct_list(value)
    passages = passages if isinstance(passages, list) else [passages]
    texts = [passage_text(passage, f"'{column}' number {number}") for number, passage in enumerate(passages)]
    for number, text in enumerate(texts):
        if not text.strip():
            raise BadRecord(f"'{column}' number {number} is empty; leave it out")
    return texts
