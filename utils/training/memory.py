"""Memory on processors: what glibc keeps between steps, and recognizing that memory ran out."""

import contextlib
import ctypes
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size


def keep_memory() -> None:
    """Makes glibc keep what tensors of a step leave free for the next step's, instead of giving it back to the system.

    Getting it again, page by page, takes a quarter of the time of training on a processor.
    """
    with contextlib.suppress(AttributeError, OSError):  # other systems' libraries
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def give_back_memory() -> None:
    """Returns to the system what is free in the heap, if the process holds half as much again as a step needs.

    Called after each step: left alone, batches of many shapes break the heap into ever more pieces, and done each time,
    getting it again costs. What a step needs is the most that the process held after a step that began without any.
    """
    with contextlib.suppress(AttributeError, OSError):  # other systems
        held = int(Path("/proc/self/statm").read_text().split()[1])  # pages
        if _heap["is_fresh"]:
            _heap["needed"], _heap["is_fresh"] = max(_heap["needed"], held), False
        elif held > 1.5 * _heap["needed"]:
            ctypes.CDLL(None).malloc_trim(0)
            _heap["is_fresh"] = True


_heap = {"needed": 0, "is_fresh": True}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the exception says that the memory of the GPU or the machine ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
