"""Signals that ask a run to save and leave."""

import os
import signal

from utils.errors import Interrupted
from utils.processes import add_up
from utils.progress import close_bars


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
            close_bars()
            os._exit(130)
        self.was_interrupted |= number == signal.SIGINT
        self.received = self.received or number

    def agree(self, count=0) -> tuple[int, int | None]:
        """Sums `count` over the processes, and returns a signal that any of them received, in one exchange."""
        count, *noted = add_up([count, *(self.received == number for number in self.NUMBERS)])
        return int(count), next((n for n, times in zip(self.NUMBERS, noted, strict=True) if times), None)

    def poll(self) -> None:
        """Raises Interrupted on all processes if any of them received a signal."""
        if received := self.agree()[1]:
            raise Interrupted(received)
