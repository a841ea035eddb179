"""Signals that ask a run to save and leave."""

import os
import signal

import torch

from utils.errors import Interrupted


class Signals:
    """Notes SIGTERM, SIGINT (Ctrl-C) and SIGUSR1; a second SIGINT ends the process at once with exit code 130."""

    NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def __init__(self):
        self.received: int | None = None
        self.was_interrupted = False
        for number in self.NUMBERS:
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if number == signal.SIGINT and self.was_interrupted:
            os._exit(130)
        self.was_interrupted |= number == signal.SIGINT
        self.received = self.received or number

    def agree(self, accelerator, count=0) -> tuple[int, int | None]:
        """Sums `count` over the processes, and returns a signal that any of them received, in one exchange."""
        noted = [float(self.received == number) for number in self.NUMBERS]
        sums = torch.tensor([float(count), *noted], dtype=torch.float64 if accelerator.device.type == "cpu" else None)
        count, *noted = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        return int(count), next((n for n, times in zip(self.NUMBERS, noted, strict=True) if times), None)

    def poll(self, accelerator) -> None:
        """Raises Interrupted on all processes if any of them received a signal."""
        if received := self.agree(accelerator)[1]:
            raise Interrupted(received)
