"""How far a phase of work is that takes more than five seconds: a bar on a terminal, else a line now and then.

    with Phase("encoded", "passages", len(texts)) as phase:
        for batch in batches:
            ...
            phase.advance(len(batch))

    for batch in progress(batches, "generated", "summaries", total=len(examples), size=len):
        ...

Lines go to standard error, like bars. One says "encoded 4,096 of 12,276 passages, 299 passages/s, 27 s left", and the
last one "encoded 12,276 passages in 41 s, 299 passages/s". One process prints: the main one, or the one that works
while the others wait (`for_all`).
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

SHOWN_AFTER = 5  # seconds; shorter phases are not shown
LINES_EVERY = 30  # seconds
BARS_EVERY = 0.2  # seconds
UNSEEN = 64  # calls of `advance` at most between two looks at the clock

clock = time.monotonic
_phases: list["Phase"] = []  # that are going on, the outermost first
_bars: list = []  # on the terminal; only the last one is visible
_working_for_all = 0
_format: str | None = None
_last_shown = float("-inf")


class Phase:
    """A context in which `advance` counts what is done.

    Within another phase that counts the same thing, it adds to that one. Within a phase that already tells how long it
    takes, it is shown in brackets, and without a line at its end.

    Args:
        what, unit: such as "encoded" and "passages". The first word of `unit` stands in the rate.
        total: how many there are, of all processes; None if that is not known.
        is_own: the total is that of this process; then that is said, if there are others that do not wait for it.
    """

    def __init__(self, what: str, unit: str, total: int | None = None, *, is_own: bool = False):
        is_part = is_own and not _working_for_all and int(os.environ.get("WORLD_SIZE", 1)) > 1
        self.what, self.unit, self.total = what, f"{unit} of this process" if is_part else unit, total
        self.done, self.passed_on, self.share, self.was_shown = 0, 0, None, False
        self.unseen, self.stride = 0, 1  # calls of `advance` until the next look at the clock, and between two looks

    def begin(self) -> "Phase":
        """Starts the clock. Without the context, a line only comes after `LINES_EVERY` seconds without another."""
        self.began = self.counted = self.looked = clock()  # counted: when what is counted began
        self.outer = None
        return self

    def __enter__(self) -> "Phase":
        self.begin()
        if _phases and (_phases[-1].what, _phases[-1].unit) == (self.what, self.unit):
            self.outer = _phases[-1]
            self.outer.counted = self.outer.counted if self.outer.done else self.counted
        else:
            _phases.append(self)
        return self

    def advance(self, count: int = 1, share: float | None = None) -> None:
        """Counts what was done since the last call; `share`: of the whole work, if that is no matter of the count."""
        self.done += count
        self.share = share
        self.unseen -= 1
        if self.unseen <= 0:
            self._look()

    def _look(self) -> None:
        if self.outer:
            self.outer.advance(self.done - self.passed_on)
            self.passed_on = self.done
            return
        now = clock()
        self.stride = min(2 * self.stride, UNSEEN) if now - self.looked < 0.01 else 1
        self.looked, self.unseen = now, self.stride
        if now - self.began < SHOWN_AFTER or now - _last_shown < BARS_EVERY or not _is_printing():
            return
        is_new = bool(_phases) and not _phases[0].was_shown
        if is_new or has_bars() or now - _last_shown >= LINES_EVERY:
            self._show(now)

    def _show(self, now: float) -> None:
        global _last_shown
        first = next((phase for phase in _phases if phase._has_rate()), self)
        inner = "" if first is self else self._count()
        if has_bars():
            _last_shown = now
            first._draw(now, inner)
            return
        left = first._seconds_left(now)
        if left is None or left >= SHOWN_AFTER or first is not self:  # else it ends soon
            _last_shown = now
            for outermost in _phases[:1]:
                outermost.was_shown = True
            text = f"{first._count()}, {first._rate(first.looked - first.counted)}"
            text += f", {_duration(left)} left" if left else ""  # nothing if it takes longer than was expected
            print(text + (f" ({inner})" if inner else ""), file=sys.stderr, flush=True)

    def _has_rate(self) -> bool:
        return bool(self.done and self.total)

    def _about(self) -> int | None:
        """The total, also if it is only known from the share of the work."""
        return self.total or (round(self.done / self.share) if self.share else None)

    def _count(self) -> str:
        total = self._about()
        of = f" of {'' if self.total else 'about '}{total:,}" if total else ""
        return f"{self.what} {self._done():,}{of} {self.unit}"

    def _done(self) -> int:
        return min(self.done, self.total or self.done)  # the last item may count for more than there is

    def _rate(self, seconds: float) -> str:
        rate = self._done() / max(seconds, 1e-9)
        return f"{rate:,.0f} {self.unit.split()[0]}/s" if rate >= 10 else f"{rate:.2g} {self.unit.split()[0]}/s"

    def _seconds_left(self, now: float) -> float | None:
        share = max(self.share or 0, min(self.done / self.total, 1) if self.total else 0)
        return max(0.0, (self.looked - self.counted) * (1 - share) / share - (now - self.looked)) if share else None

    def _draw(self, now: float, inner: str) -> None:
        bar = _bars[-1] if _bars else None
        if getattr(bar, "phase", None) is not self:
            if hasattr(bar, "phase"):
                close_bar(bar)
            bar = open_bar(desc=f"{self.what} {self.unit}", unit=f" {self.unit.split()[0]}", total=self._about())
            bar.phase = self
        bar.start_t = bar._time() - (now - self.counted)
        bar.total = self._about()
        bar.n = self._done()
        bar.set_postfix_str(inner)

    def __exit__(self, kind, error, traceback) -> None:
        if self not in _phases:
            return
        number = _phases.index(self)
        del _phases[number]
        for bar in [bar for bar in _bars if getattr(bar, "phase", None) is self]:
            close_bar(bar)
        now = clock()
        is_part = any(phase._has_rate() for phase in _phases[:number])
        if kind is None and self.done and now - self.began >= SHOWN_AFTER and not is_part and _is_printing():
            rate = f", {self._rate(now - self.began)}" if self.done > 1 else ""
            write(f"{self.what} {self._done():,} {self.unit} in {_duration(now - self.began)}{rate}", sys.stderr)


def progress(
    items: Iterable, what: str, unit: str, *, total: int | None = None, size: Callable | None = None, **options
) -> Iterator:
    """The items, as a `Phase` that advances with each by 1 or by `size(item)` (default of `total`: `len(items)`)."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    with Phase(what, unit, total, **options) as phase:
        advance = phase.advance
        for item in items:
            yield item
            advance(size(item) if size else 1)


def choose(log_format: str | None) -> None:
    """Follows `--log_format`: bars only for "tqdm" or None, nothing for "none"."""
    global _format
    _format = log_format


@contextmanager
def for_all() -> Iterator[None]:
    """Work of one process while the others of its machine wait: it shows how far it is, whichever it is."""
    global _working_for_all
    _working_for_all += 1
    try:
        yield
    finally:
        _working_for_all -= 1


def _is_printing() -> bool:
    is_first_machine = os.environ.get("GROUP_RANK", "0") == "0"
    is_main = os.environ.get("RANK", "0") == "0" or (_working_for_all and is_first_machine)
    return bool(is_main and _format != "none")


def has_bars() -> bool:
    """Whether this process shows bars: on a terminal, unless `--log_format` asks for lines."""
    return _format in (None, "tqdm") and sys.stderr.isatty() and _is_printing()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else str(timedelta(seconds=round(seconds)))


# ---- bars, of which one is visible at a time, and text above them


def open_bar(**options):
    """A bar of tqdm, in place of the one that was there, until `close_bar`."""
    from tqdm import tqdm  # not at the top: --help answers at once

    for bar in _bars[-1:]:
        bar.clear()
        bar.disable = True
    _bars.append(tqdm(position=0, leave=False, **options))
    return _bars[-1]


def close_bar(bar) -> None:
    """Removes a bar; the one before it is back."""
    bar.close()
    _bars[:] = [other for other in _bars if other is not bar]  # tqdm's bars are equal if they are at the same place
    for other in _bars[-1:]:
        other.disable = False
        other.refresh()


def close_bars() -> None:
    """Removes all bars, and forgets the phases that an error has ended."""
    _phases.clear()
    while _bars:
        bar = _bars.pop()
        bar.disable = False
        bar.close()
    if has_bars():  # Ctrl-C may have come while tqdm was drawing one, before it knew what it had to remove
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def write(text: str, file=None) -> None:
    """Prints a line, above the bar if there is one; `file` is as in `print`."""
    global _last_shown
    _last_shown = clock()
    if _bars:
        from tqdm import tqdm

        tqdm.write(text, file=file)
        (file or sys.stdout).flush()
    else:
        print(text, file=file, flush=True)
