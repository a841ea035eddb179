"""Signals that a run notes."""

import signal

import pytest

from utils.training.signals import Signals

TERM, INT, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1


@pytest.mark.parametrize(
    ("sent", "received", "left"),
    [((), None, []), ((TERM,), TERM, []), ((USR1, TERM), USR1, []), ((TERM, TERM), TERM, []), ((INT,), INT, []),
     ((INT, INT), INT, [130]), ((TERM, INT), TERM, []), ((TERM, INT, INT), TERM, [130])],
)  # fmt: skip
def test_the_first_signal_is_noted_and_a_second_interrupt_leaves_at_once(sent, received, left, monkeypatch):
    codes = []
    monkeypatch.setattr("os._exit", codes.append)
    handlers = {number: signal.getsignal(number) for number in Signals.NUMBERS}
    try:
        signals = Signals()
        for number in sent:
            signal.raise_signal(number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert signals.agree(7) == (7, received)
    assert codes == left
