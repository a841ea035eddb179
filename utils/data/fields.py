"""Reads and checks the fields of an example's record. Absent fields (null, NaN, an empty CSV cell) were removed."""

import sys
from collections import Counter
from typing import Any

from utils.data.documents import Source
from utils.data.examples import Hop, Ranking
from utils.data.rows import is_listed, is_whole_number, listed_fields, shown
from utils.errors import BadRecord


def number_evidence(record: dict, column: str, numbers: dict[str, int], qrels: dict[str, int]) -> dict:
    """Replaces the corpus ids of a record's evidence by passage numbers; without evidence, `qrels` gives the ids."""
    if "retrieved" in record:
        hint = "leave out --corpus_file, which a hand-over file does not need"
        raise BadRecord(f"'retrieved' and '{column}' number the passages that are in the record itself; {hint}")
    keys = record.get(column)
    if keys is None or keys == []:
        found = [numbers[key] for key, relevance in qrels.items() if relevance > 0]
        return record | {column: found}
    if not isinstance(keys, list):
        raise BadRecord(f'\'{column}\' must be a list of the corpus\'s ids such as ["d3", "d7"], not {shown(keys)}')
    for key in keys:
        if not isinstance(key, str) and not is_whole_number(key):
            raise BadRecord(f"'{column}' must hold the corpus's ids, strings or whole numbers, but holds {shown(key)}")
        if str(key) not in numbers:
            raise BadRecord(f"'{column}' holds {shown(key)}, but the corpus holds no such '_id'")
    return record | {column: [numbers[str(key)] for key in keys]}


def read_summaries(record: dict, column: str, required: bool) -> list[str]:
    if column not in record:
        if required:
            raise BadRecord(f"no '{column}'; {listed_fields(record)}")
        return []
    value = record[column]
    summaries = [value] if isinstance(value, str) else value
    if not isinstance(summaries, list) or not all(isinstance(summary, str) for summary in summaries):
        raise BadRecord(f"'{column}' must be a string or a list of strings, not {shown(value)}")
    if isinstance(value, str) and is_listed(value):
        raise BadRecord(f'\'{column}\' is a list as text, {shown(value)}; write it as a JSON list: ["...", "..."]')
    if required and not (summaries and all(summary.strip() for summary in summaries)):
        where = " or holds an empty string" if len(summaries) > 1 else ""
        raise BadRecord(f"'{column}' is empty{where}; an example needs a summary")
    return [summary for summary in summaries if summary.strip()]


def read_evidence(
    record: dict, column: str, passages_column: str, source: Source
) -> tuple[list[int] | None, list[int] | None]:
    """Gold passage numbers and the gold words in each; (None, None) without evidence or with an empty list."""
    numbers, given_words = record.get(column), record.get("evidence_words")
    if given_words is not None and not numbers:
        raise BadRecord(f"'evidence_words' needs '{column}', whose passages it counts the gold words of")
    if numbers is None or numbers == []:
        return None, None
    if not isinstance(numbers, list):
        raise BadRecord(f"'{column}' must be a list of passage numbers such as [3, 7], not {shown(numbers)}")
    if source.given is None:
        raise BadRecord(f"'{column}' needs '{passages_column}': it cannot number the passages of a text not yet split")
    for number in numbers:
        _check_passage_number(number, column, source.given)

    if source.placed is not None:
        if given_words is not None:
            raise BadRecord("'evidence_words' counts words of the passages before merging; leave out --merge_passages")
        words = Counter()  # by chunk
        for number in set(numbers):
            words.update(source.placed[number])
        return sorted(words), [words[chunk] for chunk in sorted(words)]

    evidence = sorted(set(numbers))
    sizes = [int(source.words[number]) for number in evidence]
    if given_words is None:
        return evidence, sizes
    if not isinstance(given_words, list) or len(given_words) != len(numbers) or len(evidence) != len(numbers):
        raise BadRecord(f"'evidence_words' must be a list with one word count for each of '{column}', without repeats")
    by_number = dict(zip(numbers, given_words, strict=True))
    for number, size in zip(evidence, sizes, strict=True):
        words = by_number[number]
        if not is_whole_number(words) or not 1 <= words <= size:
            raise BadRecord(f"'evidence_words' holds {shown(words)} for passage {number}, which has {size} words")
    return evidence, [by_number[number] for number in evidence]


def read_ranking(record: dict, passages_column: str, source: Source) -> Ranking | None:
    """The ranking of the passages in a record of a hand-over file."""
    entries = record.get("retrieved")
    if entries is None:
        return None
    if source.given is None:
        raise BadRecord(f"'retrieved' needs '{passages_column}': it cannot number the passages of a text not yet split")
    if source.placed is not None:
        raise BadRecord("'retrieved' numbers the passages before merging; leave out --merge_passages")
    wanted = '\'retrieved\' must be a list of {"passage": 12, "score": 0.91}'
    if not isinstance(entries, list):
        raise BadRecord(f"{wanted}, not {shown(entries)}")
    ranking: dict[int, float] = {}
    for entry in entries:
        if not isinstance(entry, dict) or "passage" not in entry or "score" not in entry:
            raise BadRecord(f"{wanted}, but holds {shown(entry)}")
        number, score = entry["passage"], entry["score"]
        _check_passage_number(number, "retrieved", source.given)
        if number in ranking:
            raise BadRecord(f"'retrieved' holds passage {number} twice")
        if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) <= sys.float_info.max:
            raise BadRecord(f"'retrieved' must score passage {number} with a finite number, not {shown(score)}")
        ranking[number] = float(score)
    return list(ranking.items())


def read_hops(record: dict, passages_column: str, source: Source) -> list[Hop]:
    """The hops in a record that retrieve_and_summarize.py wrote."""
    entries = record.get("hops")
    if entries is None:
        return []
    wanted = '\'hops\' must be a list of {"draft": "...", "read": [3, 7], "retrieved": [...]}'
    if not isinstance(entries, list):
        raise BadRecord(f"{wanted}, not {shown(entries)}")
    hops = []
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("draft"), str) or entry.get("retrieved") is None:
            raise BadRecord(f"{wanted}, but number {number} is {shown(entry)}")
        try:
            retrieved = read_ranking(entry, passages_column, source)
            hops.append(Hop(entry["draft"], read_passage_numbers(entry, source.given), retrieved))
        except BadRecord as error:
            raise BadRecord(f"hop {number}: {error}") from None
    return hops


def read_passage_numbers(hop: dict, passages: int) -> list[int]:
    """Numbers of the passages that the draft of a hop was written from."""
    numbers = hop.get("read", [])
    if not isinstance(numbers, list):
        raise BadRecord(f"'read' must be a list of passage numbers such as [3, 7], not {shown(numbers)}")
    for number in numbers:
        _check_passage_number(number, "read", passages)
    return numbers


def read_passage_ids(hop: dict, record: dict) -> list[str]:
    """The corpus ids of the passages that the draft of a hop was written from."""
    read, ids = hop.get("read", []), record.get("passage_ids")
    if isinstance(read, list) and all(isinstance(key, str) for key in read):
        return read
    if not isinstance(ids, list):
        raise BadRecord("'read' holds numbers, but no 'passage_ids' names the passages; write their ids to 'read'")
    return [str(ids[number]) for number in read_passage_numbers(hop, len(ids))]


def _check_passage_number(number: Any, column: str, passages: int) -> None:
    if not is_whole_number(number):
        raise BadRecord(f"'{column}' must hold passage numbers (whole numbers from 0), but holds {shown(number)}")
    if not 0 <= number < passages:
        count = f"there are {passages} passages (numbers 0 to {passages - 1})"
        raise BadRecord(f"'{column}' holds {number}, but {count if passages > 1 else 'there is 1 passage (number 0)'}")
