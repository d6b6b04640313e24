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
MARGIN = 0.8
"""Share of a call's time that limits of its parts are made from."""
_until: list[float] = []


class Overdue(BaseException):
    """Raised in the main thread where something takes too long; no `except Exception` in a reward swallows it."""


def fair_limit(seconds: float, count: int, at_once: int = 1) -> float:
    """What each of `count` parts may take, `at_once` of them at a time, so that all end within the present call's
    deadline: at most `seconds`."""
    if not _until or count < 1:
        return seconds
    left = max(0.0, min(_until) - time.monotonic())
    return min(seconds, max(EVERY / 10, MARGIN * left * at_once / count))


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise Overdue in what runs inside after so many seconds, and again after half a second and ever sooner: a bare
    `except`, or a pool that waits for its threads as it ends, takes the first. In the main thread alone: others cannot
    be interrupted. Not SIGALRM, which math-verify and others use for limits of their own.

    Two kinds of signals: what waits is reached by a thread's, what computes without letting another thread run (a
    regular expression on hostile text) by the kernel's timer of processor time."""
    until = time.monotonic() + seconds
    _until.append(until)
    try:
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "pthread_kill"):
            with _signals(seconds, until):
                yield
        else:
            yield
    finally:
        _until.pop()


@contextlib.contextmanager
def _signals(seconds: float, until: float) -> Iterator[None]:
    main, ended, is_over = threading.get_ident(), threading.Event(), False

    def stop(number: int, frame: FrameType | None) -> None:
        leaving = frame is not None and frame.f_code.co_filename in NOT_IN  # another one will come
        if not is_over and not leaving and (number == signal.SIGUSR2 or time.monotonic() >= until):
            raise Overdue

    def remind() -> None:
        """Again and again, and ever faster: until one comes where nothing is there to swallow it."""
        rest, pause = seconds, EVERY
        while not ended.wait(rest):
            if not is_over:
                signal.pthread_kill(main, signal.SIGUSR2)
            rest, pause = pause, max(LEAST, pause / 2)

    profiler, timed = signal.getsignal(signal.SIGPROF), signal.getitimer(signal.ITIMER_PROF)
    is_profiled = profiler not in (signal.SIG_DFL, signal.SIG_IGN, _too_late) or timed[0] > 0  # someone else's
    if not is_profiled:
        signal.signal(signal.SIGPROF, stop)
        signal.siginterrupt(signal.SIGPROF, False)
        signal.setitimer(signal.ITIMER_PROF, seconds, EVERY)
    previous = signal.signal(signal.SIGUSR2, stop)
    is_free = previous in (signal.SIG_DFL, None)  # then `stop` stays: a signal that comes too late must not end us
    threading.Thread(target=remind, name="posttrain-deadline", daemon=True).start()
    try:
        try:
            yield
        finally:
            is_over = True
    finally:  # in a second one, for a signal may come before the first has begun
        is_over = True
        ended.set()
        if not is_profiled:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.signal(signal.SIGPROF, _too_late)
        if not is_free:
            signal.signal(signal.SIGUSR2, previous)


def _too_late(_number: int, _frame: FrameType | None) -> None:
    """A signal that comes after its time must not end us. Not SIG_IGN: programs that are started would inherit that,
    and a limit of their own with it (data/jinja.py has one)."""
