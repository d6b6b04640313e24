"""Coroutines of rewards, in one event loop for the whole process: a client that a reward keeps between calls belongs to
the loop that it was first used in.

The loop runs in a thread of its own, so that a reward may be asked where a loop runs already (a notebook), and that one
which blocks it, or swallows its cancellation, is left behind there; the next call gets a new loop. Such threads do not
keep the process alive.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any


class StuckError(TimeoutError):
    """`task` is the name of what lets no other run, if one does."""

    def __init__(self, task: str | None):
        super().__init__(task)
        self.task = task


class EndedError(Exception):
    """The loop was ended, by a SystemExit in a task that a reward has started, say: `cause`."""

    def __init__(self, cause: BaseException | None):
        super().__init__(repr(cause))
        self.cause = cause


class Loop:
    """Started when it is first needed, and anew in the child of a fork, which has no thread."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def run(self, work: Callable[[], Coroutine[Any, Any, Any]], seconds: float) -> Any:
        """What `work()` gives. Raises StuckError where it, or what else runs in the loop, is not done in time, and
        EndedError where the loop itself has ended."""
        if threading.current_thread() is self._thread:  # a reward that asks others
            return Loop().run(work, seconds)
        with self._lock:
            loop, waiting = self._alive(), self._waiting
            future: Future[Any] = asyncio.run_coroutine_threadsafe(work(), loop)
            waiting.append(future)
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():
                raise
            raise self._left(future, loop) from None
        except BaseException:
            if not future.done():  # a signal, in the thread that waits
                future.cancel()
            raise
        finally:
            with self._lock:
                waiting.remove(future)

    def _alive(self) -> asyncio.AbstractEventLoop:
        usable = self._thread is not None and self._thread.is_alive() and self._owner == os.getpid()
        if self._loop is None or not usable:
            self._loop, self._owner = asyncio.new_event_loop(), os.getpid()
            self._waiting: list[Future[Any]] = []
            self._thread = threading.Thread(target=self._forever, args=(self._loop, self._waiting), daemon=True,
                                            name="posttrain-rewards")  # fmt: skip
            self._thread.start()
        return self._loop

    def _forever(self, loop: asyncio.AbstractEventLoop, waiting: list[Future[Any]]) -> None:
        """Until something ends the loop, which those who wait for it are told. They hold the lock until they are
        known."""
        cause: BaseException | None = None
        try:
            loop.run_forever()
        except BaseException as error:  # SystemExit and KeyboardInterrupt come through asyncio as they are
            cause = error
        with self._lock:
            if self._loop is loop:
                self._loop = None
            for future in waiting:
                if not future.done():
                    future.set_exception(EndedError(cause))

    def _left(self, future: Future[Any], loop: asyncio.AbstractEventLoop) -> StuckError:
        """What does not end when it is cancelled keeps its loop, and the thread of that, to itself."""
        present = asyncio.current_task(loop)
        future.cancel()
        with self._lock:
            if self._loop is loop:
                self._loop = None
        return StuckError(None if present is None else present.get_name())


LOOP = Loop()
