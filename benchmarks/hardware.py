"""The machine that a benchmark runs on."""

import os
import platform
from datetime import date
from pathlib import Path

import torch


def hardware() -> str:
    """Date, processor or GPU, cores and torch's version in one line, for the head of a table of measurements."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    if not torch.cuda.is_available() and Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        device = names[0].partition(": ")[2] if names else device
    cores = len(os.sched_getaffinity(0))
    return f"{date.today()}, {device}, {cores} cores, torch {torch.__version__}"
