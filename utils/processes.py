"""What the processes of a run tell each other from host to host, past their GPUs.

Such an exchange waits for no GPU, and no GPU waits for it: a step that was launched goes on meanwhile. It also waits
for a process that works alone, such as reading or writing files, which may take hours. Exchanges between GPUs give up
after some minutes. So one of these here comes before them, wherever a process may have worked alone.
"""

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate.utils import broadcast_object_list

PATIENCE = timedelta(days=7)  # of processes that wait for another; if that one ends, its launcher ends them at once


def connect() -> None:
    """Call it on all processes at the start, before any of them works alone."""
    if not is_alone():
        _group(dist.group.WORLD)


def is_alone() -> bool:
    """Whether this is the only process."""
    return not dist.is_initialized() or dist.get_world_size() == 1


@functools.cache
def _group(world):
    return dist.new_group(backend="gloo", timeout=PATIENCE)  # gloo's processes talk on the host


def add_up(values: Sequence[float]) -> list[float]:
    """Sums of the numbers of all processes, in float64. All of them call it, with equally many."""
    if is_alone():
        return list(map(float, values))
    sums = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(sums, group=_group(dist.group.WORLD))
    return sums.tolist()


def gather_padded(values: torch.Tensor, padding: int) -> torch.Tensor:
    """(processes, most values) The values (values,) of each process, in the host's memory, padded on the right."""
    if is_alone():
        return values[None]
    group = _group(dist.group.WORLD)
    longest = torch.tensor(len(values))
    dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=group)
    padded = torch.nn.functional.pad(values, (0, int(longest) - len(values)), value=padding)
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded, group=group)
    return torch.stack(parts)


def wait_for_all() -> None:
    """Returns when all processes have called it, however long that takes.

    Call it before an exchange, if one of the processes may have worked alone for long.
    """
    if not is_alone():
        dist.all_reduce(torch.zeros(1), group=_group(dist.group.WORLD))


def from_main(accelerator, make: Callable):
    """What `make()` gives on the main process, on all processes; the others wait for it, however long that takes."""
    made = [make() if accelerator.is_main_process else None]
    wait_for_all()
    return broadcast_object_list(made)[0]
