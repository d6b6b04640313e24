"""What a command owes its terminal: output that outlives its reader, signals that end it politely at any moment, and
one line for every error, with the traceback in a file.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO


class _Lasting:
    """A stream that goes quiet when its reader has left, instead of ending the work that writes to it."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except (BrokenPipeError, ValueError):  # ValueError: closed
            self._silence()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (BrokenPipeError, ValueError):
            self._silence()

    def _silence(self) -> None:
        """Point the descriptor at nothing, so that the interpreter's last flush has somewhere to go as well."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, self._stream.fileno())
        except (OSError, ValueError):
            self._stream = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - as long as the process
        finally:
            os.close(nothing)


def make_streams_last() -> None:
    """Standard output and error survive readers that leave and encodings that lack a character."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, _Lasting):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
        setattr(sys, name, _Lasting(stream))


def wants_colour(choice: str, stream: Any) -> bool:
    """`choice` is auto, always or never; auto asks the terminal and NO_COLOR (no-color.org)."""
    if choice != "auto":
        return choice == "always"
    return bool(stream.isatty()) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


PATIENCE = 4.0
"""Seconds that a command has for putting things away before it is ended as it is."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, so that half-written files are put away. Training has its
    own, gentler way.

    Not all code lets an exception through: C++ that imports Python modules (torch does) aborts the process, and a broad
    `except` swallows it. So while a module is being imported, when nothing is half written, the process ends at once;
    and it ends after `PATIENCE` seconds whatever stands in the way."""
    last_resort: list[threading.Timer] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if last_resort or _is_importing(frame):
            _leave(name)
        last_resort.append(threading.Timer(PATIENCE, _leave, [name]))
        last_resort[0].daemon = True
        last_resort[0].start()
        raise KeyboardInterrupt(name)

    before = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            try:
                before[number] = signal.signal(number, interrupt)
            except ValueError:  # not in the main thread, where Python allows no handlers
                break
    try:
        yield
    finally:
        for timer in last_resort:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_at_once(name: str) -> str:
    return f"Stopped at once ({name}). What was saved before is as it was."


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave(name: str) -> None:
    print(stopped_at_once(name), file=sys.stderr, flush=True)
    os._exit(75)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that there is no space left. safetensors says it in words only."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if type(error).__name__ == "SafetensorError" and "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def keep_traceback(error: BaseException) -> str:
    """Write the traceback of `error` to a file of its own; where."""
    text = "".join(traceback.format_exception(error))
    try:
        handle, path = tempfile.mkstemp(prefix=f"posttrain-{time.strftime('%Y%m%d-%H%M%S')}-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
    except OSError:  # the disk is full, say
        return f"(no file could be written)\n{text}"
    return path
