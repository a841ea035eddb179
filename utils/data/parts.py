"""Writes a long output in parts; a stopped run keeps its finished parts and continues after them.

A part is a JSON Lines file: the costs, then one record for each example of its block.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.data.examples import Example
from utils.files import write_jsonl
from utils.processes import wait_for_all
from utils.progress import progress


def write_parts(
    parts: Path,
    examples: Sequence[Example],
    blocks: Sequence[list[int]],
    work: Callable,
    *,
    say: Callable,
    accelerator,
    poll: Callable,
) -> None:
    """Writes the missing parts, one for each block of example numbers; called on all processes.

    Args:
        parts: the folder. Its name ends with a dot and a key of everything that decides the output; folders with the
            same name and another key are removed.
        work: `work(examples)` returns their costs, by hop, and their records; each process calls it for its own blocks.
        say: shows a line to the user.
        poll: called on all processes between two blocks; may raise.
    """
    if accelerator.is_main_process:
        for other in parts.parent.iterdir():
            if other.stem == parts.stem and other != parts and other.is_dir():
                shutil.rmtree(other)
        parts.mkdir(exist_ok=True)
    wait_for_all()
    remaining = [number for number in range(len(blocks)) if not (parts / f"{number}.jsonl").exists()]
    if len(remaining) < len(blocks):
        say(f"{len(blocks) - len(remaining)} of {len(blocks)} parts were done before")
    wait_for_all()  # all processes must have listed the parts before one of them writes
    processes = accelerator.num_processes
    rounds = [remaining[first : first + processes] for first in range(0, len(remaining), processes)]

    def count(numbers: Sequence[int]) -> int:
        return sum(len(blocks[number]) for number in numbers)

    for numbers in progress(rounds, "summarized", "examples", total=count(remaining), size=count):
        poll()
        if accelerator.process_index < len(numbers):
            number = numbers[accelerator.process_index]
            costs, records = work([examples[i] for i in blocks[number]])
            write_jsonl(parts / f"{number}.jsonl", itertools.chain([{"costs": costs}], records))
    wait_for_all()


class Records(Sequence):
    """The records of all examples, in order. Each access reads a file, so that memory does not grow with them."""

    def __init__(self, places: Sequence[tuple[Path, int]]):
        self.places = places  # of each record: its file, and the byte at which it begins

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> dict:
        path, start = self.places[number]
        with path.open("rb") as file:
            file.seek(start)
            return json.loads(file.readline())


def read_parts(parts: Path, blocks: Sequence[list[int]], num_hops: int) -> tuple[Records, list[Counter]]:
    """The records of all examples, in order, and the total costs of each hop."""
    places, costs = [None] * sum(map(len, blocks)), [Counter() for _ in range(num_hops)]
    for number, numbers in enumerate(blocks):
        path = parts / f"{number}.jsonl"
        with path.open("rb") as lines:
            first = next(lines)
            for total, cost in zip(costs, json.loads(first)["costs"], strict=False):
                total.update(cost)
            start = len(first)
            for i, line in zip(numbers, lines, strict=True):
                places[i] = (path, start)
                start += len(line)
    return Records(places), costs
