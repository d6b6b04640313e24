"""A limit on how long a call may take: what waits, what computes, and what swallows the first exception are all ended.

Only the main thread can be interrupted. What a function has handed to threads of its own goes on there; the call that
waits for them ends.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

EVERY, LEAST = 0.5, 0.0005
"""Seconds between the first signal, once a call has had its time, and the second, and between the last; and, of
processor time, between two looks at the clock."""
NOT_IN = (__file__, contextlib.__file__)
"""Where an exception would keep `deadline` itself from ending."""
SHORTEST, RESERVED, MARGIN = 1.0, 3.0, 0.8
"""Seconds that a part is given at least; that are kept for each of those to come; and the share of the rest that they
get where that does not suffice."""
_present = threading.local()


class Overdue(BaseException):
    """Raised in the main thread where something takes too long; no `except Exception` in a reward swallows it."""


class Shares:
    """The time of the present call for `count` parts of it, `at_once` of them side by side. Made in the call's own
    thread; `next` may be asked in others."""

    def __init__(self, seconds: float, count: int, at_once: int = 1):
        self.seconds, self.left, self.at_once = seconds, count, at_once
        self.until: float | None = min(getattr(_present, "until", []), default=None)
        self._lock = threading.Lock()

    def next(self) -> float:
        """What the next part may take: all `seconds`, unless the others would then not have enough."""
        with self._lock:
            turns, self.left = max(1, -(-self.left // self.at_once)), self.left - 1
        if self.until is None:
            return self.seconds
        rest = self.until - time.monotonic()
        if rest - self.seconds >= (turns - 1) * RESERVED:
            return self.seconds
        return min(self.seconds, max(SHORTEST, MARGIN * rest / turns))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise Overdue in what runs inside after so many seconds, and again after half a second and ever sooner: a bare
    `except`, or a pool that waits for its threads as it ends, takes the first. In the main thread alone: others cannot
    be interrupted. Not SIGALRM, which math-verify and others use for limits of their own.

    Two kinds of signals: what waits is reached by a thread's, what computes without letting another thread run (a
    regular expression on hostile text) by the kernel's timer of processor time."""
    until = time.monotonic() + seconds
    mine = _present.until = getattr(_present, "until", [])
    mine.append(until)
    try:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill"):
            with _signals(seconds, until):
                yield
        else:
            yield
    finally:
        mine.remove(until)


@contextlib.contextmanager
def _signals(seconds: float, until: float) -> Iterator[None]:
    main, ended, is_over = threading.get_ident(), threading.Event(), False
    previous = signal.getsignal(signal.SIGUSR2)

    def stop(number: int, frame: FrameType | None) -> None:
        if time.monotonic() < until:  # someone else's
            if number == signal.SIGUSR2 and callable(previous):
                previous(number, frame)
            return
        leaving = frame is not None and frame.f_code.co_filename in NOT_IN  # another one will come
        if not is_over and not leaving:
            raise Overdue

    def remind() -> None:
        """Again and again, and ever faster: until one comes where nothing is there to swallow it."""
        rest, pause = max(0.0, until - time.monotonic()), EVERY
        while not (is_over or ended.wait(rest) or is_over):
            signal.pthread_kill(main, signal.SIGUSR2)
            rest, pause = pause, max(LEAST, pause / 2)

    profiler, timed = signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF)
    is_profiled = profiler not in (signal.SIG_DFL, signal.SIG_IGN, _too_late) or timed[0] > 0  # someone else's
    reminder = threading.Thread(target=remind, name="posttrain-deadline", daemon=True)
    try:
        try:
            if not is_profiled:
                signal.signal(signal.SIGPROF, stop)
                signal.siginterrupt(signal.SIGPROF, False)
                signal.setitimer(signal.ITIMER_PROF, seconds, EVERY)
            signal.signal(signal.SIGUSR2, stop)
            reminder.start()
            yield
        finally:
            is_over = True
    finally:  # in a second one, for a signal may come before the first has begun
        is_over = True
        ended.set()
        if not is_profiled:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, _too_late)
        if reminder.is_alive():
            reminder.join(EVERY)
        if previous not in (signal.SIG_DFL, None):  # else `stop` stays: a signal that comes too late must not end us
            signal.signal(signal.SIGUSR2, previous)


def _too_late(_number: int, _frame: FrameType | None) -> None:
    """A signal that comes after its time must not end us. Not SIG_IGN: programs that are started would inherit that,
    and a limit of their own with it (data/jinja.py has one)."""
