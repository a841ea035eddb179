"""Memory that is kept between steps and given back."""

import ctypes
import multiprocessing
import sys
from pathlib import Path

import pytest
import torch

from utils.training.memory import give_back_memory, keep_memory


@pytest.mark.skipif(sys.platform != "linux", reason="the memory of a process is kept and given back with glibc only")
def test_memory_that_a_step_left_free_is_given_back_once_it_is_more_than_steps_need():
    def held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    context = multiprocessing.get_context("fork")  # what is set for a process stays set

    def steps(found):
        ctypes.CDLL(None).malloc_trim(0)  # what other tests left free in the process that this one was forked from
        keep_memory()
        give_back_memory()  # after the first step
        needed = held()
        sizes = []
        for share in (0.2, 2.0):
            tensors = [torch.ones(2**16) for _ in range(int(share * needed) // 2**18)]
            del tensors
            sizes.append(held())
            give_back_memory()
            sizes.append(held())
        found.put([size / needed for size in sizes])

    found = context.Queue()
    process = context.Process(target=steps, args=(found,))
    process.start()
    little, little_after, much, much_after = found.get(timeout=60)
    process.join(60)
    assert little == pytest.approx(1.2, abs=0.1) and little_after == little
    assert much > 2.5 and much_after < 1.3
