"""Memory on processors: reusing a step's memory in the next one, and recognizing that memory ran out."""

import contextlib
import ctypes
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

_heap = {"needed": 0, "is_fresh": True}  # pages


def keep_memory() -> None:
    """Makes glibc keep freed memory for the next step instead of returning it to the system.

    Getting it back page by page takes a quarter of the training time on a processor.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def give_back_memory() -> None:
    """Returns free memory to the system if the process holds 1.5 times as much as a step needs.

    Call it after each step. Batches of many shapes fragment the heap, which then grows without bound. Returning memory
    after every step would be slow. What a step needs is measured on the first step after memory was returned.
    """
    with contextlib.suppress(AttributeError, OSError):  # another system
        held = int(Path("/proc/self/statm").read_text().split()[1])
        if _heap["is_fresh"]:
            _heap["needed"], _heap["is_fresh"] = max(_heap["needed"], held), False
        elif held > 1.5 * _heap["needed"]:
            ctypes.CDLL(None).malloc_trim(0)
            _heap["is_fresh"] = True


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the exception says that the memory of the GPU or the machine ran out."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
