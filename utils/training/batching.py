"""Which examples each step, micro-batch and process reads: batches of similar length, a function of (seed, epoch).

Every process computes the plan of the whole epoch and takes its own part. So nothing is exchanged, every example counts
exactly once, and a run can resume at any step.
"""

from collections.abc import Iterator

import numpy as np
from accelerate.utils import recursively_apply, send_to_device
from torch.utils.data import Dataset

from utils.progress import Phase

WINDOW = 100  # examples are sorted by length within so many steps: longer windows pad less and shuffle less
RUN = 4  # within so many steps of similar length on one side, examples are sorted by the other sides


def plan_epoch(
    lengths,
    *,
    seed: int,
    epoch: int,
    num_processes: int = 1,
    gradient_accumulation_steps: int = 1,
    batch_size: int = 0,
    max_tokens: int = 0,
    groups=None,
    by_group: bool = False,
    by_length: bool = False,
    without=(),
) -> list[list[list[list[int]]]]:
    """Example numbers of one epoch as ``plan[step][micro_batch][process]``; an empty list is a dummy micro-batch.

    Args:
        lengths: (examples, sides) tokens of each example. A side is padded by itself (source, target).
        batch_size: examples in a micro-batch. The examples of a step depend only on the product of processes,
            accumulation and batch_size.
        max_tokens: replaces batch_size: at most so many tokens in a micro-batch, padding included (examples times the
            sum of the longest of each side). A longer example is a micro-batch of its own.
        groups: (examples,) a group number for each example. With `by_group`, examples of one group stay together;
            their lengths then do not matter.
        by_length: steps in order of length, not shuffled (a curriculum).
        without: numbers of examples to leave out.
    """
    lengths = np.asarray(lengths).reshape(len(lengths), -1)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    slots = num_processes * gradient_accumulation_steps
    order = order[~np.isin(order, list(without))]
    per_step = slots * batch_size
    if max_tokens:
        per_step = max(1, int(slots * max_tokens / lengths.sum(1).mean()))
    if by_length:
        parts = [order[np.argsort(lengths.sum(1)[order], kind="stable")]]
    elif by_group:
        groups = np.asarray(groups)
        order = order[np.argsort(rng.permutation(groups.max() + 1)[groups[order]], kind="stable")]
        parts = _parts(order, WINDOW * per_step)
    else:
        parts = [_similar(part, lengths, RUN * per_step) for part in _parts(order, WINDOW * per_step)]

    if max_tokens:
        batches = [batch for part in parts for batch in _cut_by_tokens(part.tolist(), lengths, max_tokens)]
        shuffled = range(len(batches)) if by_length else rng.permutation(len(batches))
        steps = [[batches[i] for i in group] for group in _groups(shuffled, slots)]
    else:
        steps = [step for part in parts for step in _groups(part.tolist(), per_step)]
        shuffled = range(len(steps)) if by_length else rng.permutation(len(steps))
        steps = [_groups(steps[i], batch_size) for i in shuffled]

    plan = []
    for batches in steps:
        batches = batches + [[]] * (-len(batches) % num_processes)
        plan.append([batches[i : i + num_processes] for i in range(0, len(batches), num_processes)])
    return plan


def _parts(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[start : start + size] for start in range(0, len(order), max(size, 1))]


def _similar(order: np.ndarray, lengths: np.ndarray, run: int) -> np.ndarray:
    """Sorted by the side whose lengths differ most and, within runs of it, by the other sides; ties stay shuffled."""
    side = lengths.std(0).argmax()
    order = order[np.argsort(lengths[order, side], kind="stable")]
    others = lengths.sum(1) - lengths[:, side]
    parts = _parts(order, run)
    # alternately up and down: a step that spans two runs then has similar lengths, too
    return np.concatenate([
        part[np.argsort((-1) ** number * others[part], kind="stable")] for number, part in enumerate(parts)
    ])  # fmt: skip


def _groups(items, size: int) -> list[list]:
    items = list(items)
    return [items[start : start + size] for start in range(0, len(items), size)]


def _cut_by_tokens(order: list[int], lengths: np.ndarray, max_tokens: int) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    longest = np.zeros(lengths.shape[1], dtype=int)
    for example in order:
        widened = np.maximum(longest, lengths[example])
        if batches[-1] and (len(batches[-1]) + 1) * widened.sum() > max_tokens:
            batches.append([])
            widened = lengths[example]
        batches[-1].append(example)
        longest = widened
    return batches


def batch_shape(args, num_processes: int, epoch: int, **more) -> dict:
    """Keywords of `plan_epoch`: all that decides the examples of each step, beside data and seed.

    A checkpoint holds them, so that a run with other keywords can resume with the examples that were not read yet.
    """
    return {
        "num_processes": num_processes,
        "gradient_accumulation_steps": args.accumulation(epoch),
        "batch_size": args.per_device_train_batch_size,
        "max_tokens": args.max_tokens,
        "by_length": epoch < args.curriculum_epochs,
        **more,
    }


def to_device(batch: dict, device) -> dict:
    """A copy of a batch on the device. A GPU copies it from pinned memory, while the host goes on."""
    if device.type == "cuda":
        batch = recursively_apply(lambda each: each.pin_memory(), batch, test_type=lambda x: hasattr(x, "pin_memory"))
    return send_to_device(batch, device, non_blocking=True)


class StepBatches(Dataset):
    """One process's part of an epoch's plan. Item k is the list of collated micro-batches of step k.

    `collate(examples, dummy=...)` makes tensors of a list of examples. A process without examples in a micro-batch gets
    a dummy, which must count for nothing.
    """

    def __init__(self, examples: list, plan: list, collate, process: int):
        self.examples, self.collate = examples, collate
        self.steps = [[micro_batch[process] for micro_batch in step] for step in plan]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, step: int) -> list:
        return [
            self.collate([self.examples[i] for i in indices or [0]], dummy=not indices) for indices in self.steps[step]
        ]


def eval_batches(lengths, *, batch_size: int) -> list[list[int]]:
    """Batches of a validation, as lists of example numbers, the longest examples first."""
    return _groups(np.argsort(-np.asarray(lengths), kind="stable").tolist(), batch_size)


def take_turns(batches: list, process: int, num_processes: int) -> Iterator[tuple[int, bool]]:
    """The numbers of this process's batches: every `num_processes`-th, and whether it is an extra one.

    All processes get equally many. Those that have fewer get the last batch again as an extra one, which a model that
    is sharded over the processes must compute and nothing may count.
    """
    with Phase("generated", "summaries", sum(map(len, batches))) as phase:
        for first in range(0, len(batches), num_processes):
            number = first + process
            yield min(number, len(batches) - 1), number >= len(batches)
            phase.advance(sum(map(len, batches[first : first + num_processes])))
