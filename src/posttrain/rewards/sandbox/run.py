"""One program against its tests: two processes shut in apart, a pipe each way between them, and a third for the verdict
that only the tests and we hold.

What the program prints goes nowhere. The clock is ours: when it has run out both are ended, with all that is in them.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.rewards.sandbox.walls import command, filter_file

HERE = Path(__file__).parent
PROGRAM, EXAMINER = HERE / "program.py", HERE / "examiner.py"
STARTING = 30.0
"""Seconds beside the program's own for two interpreters to start, on a machine that is busy."""
BEGUN = b'"began": true'
"""In the first line of the tests, before the program has run."""
VERDICT = 1_000_000
"""Bytes that a verdict may take."""


class NotStarted(Exception):
    """The sandbox ended, or was not ready in time, before the program began."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 10.0
    megabytes: int = 512


@dataclass(frozen=True)
class Verdict:
    """`passed` tests of `of`; `why` the first that did not pass failed."""

    passed: int
    of: int
    why: str | None = None


def examine(text: str, tests: Sequence[str], limits: Limits, is_shut_in: bool = True) -> Verdict:
    """Run `text` and hold it against `tests`. With `is_shut_in=False` there are no walls, only limits. Raises
    NotStarted where it does not come to that, for which no program can be blamed."""
    word = secrets.token_hex(16)
    until = time.monotonic() + limits.seconds + STARTING
    with ExitStack() as stack:
        folders = [stack.enter_context(_folder(is_shut_in)) for _ in range(2)]
        to_tests, to_program, verdict = (stack.enter_context(_pipe()) for _ in range(3))
        common = {"seconds": limits.seconds, "megabytes": limits.megabytes}
        stack.enter_context(_started(EXAMINER, is_shut_in, to_tests.reader, to_program.writer, verdict.writer))
        stack.enter_context(_started(PROGRAM, is_shut_in, to_program.reader, to_tests.writer, None))
        for pipe in (to_tests, to_program):
            pipe.close_reader()
        verdict.close_writer()
        asked = {**common, "tests": list(tests), "word": word, "folder": folders[1]}
        if not (_sent(to_tests.writer, asked, until) and
                _sent(to_program.writer, {**common, "text": text, "folder": folders[0]}, until)):  # fmt: skip
            raise NotStarted
        for pipe in (to_tests, to_program):
            pipe.close_writer()
        return _verdict(*_read(verdict.reader, until, limits.seconds), word, len(tests))


class _Pipe:
    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def close_reader(self) -> None:
        if self.reader >= 0:
            os.close(self.reader)
            self.reader = -1

    def close_writer(self) -> None:
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1


@contextmanager
def _pipe() -> Iterator[_Pipe]:
    pipe = _Pipe()
    try:
        yield pipe
    finally:
        pipe.close_reader()
        pipe.close_writer()


@contextmanager
def _folder(is_shut_in: bool) -> Iterator[str]:
    if is_shut_in:
        yield "/tmp"
    else:
        with tempfile.TemporaryDirectory(prefix="posttrain-program-") as folder:
            yield folder


@contextmanager
def _started(script: Path, is_shut_in: bool, stdin: int, stdout: int, stderr: int | None) -> Iterator[None]:
    with ExitStack() as stack:
        if is_shut_in:
            fd = stack.enter_context(filter_file())
            words = command(script, fd)
        else:
            fd, words = -1, [sys.executable, "-I", "-S", "-B", str(script)]
        said = subprocess.DEVNULL if stderr is None else stderr
        child = subprocess.Popen(words, stdin=stdin, stdout=stdout, stderr=said, env={}, start_new_session=True,
                                 pass_fds=(fd,) if is_shut_in else ())  # fmt: skip
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, 9)
        child.wait()


def _sent(writer: int, message: dict[str, Any], until: float) -> bool:
    """The first line through a pipe whose writing end another process goes on with. False where no one reads it."""
    line = memoryview(json.dumps(message).encode() + b"\n")
    os.set_blocking(writer, False)
    try:
        while line:
            _, ready, _ = select.select([], [writer], [], max(0.0, until - time.monotonic()))
            if not ready:
                return False
            with suppress(BlockingIOError):
                line = line[os.write(writer, line) :]
    except BrokenPipeError:
        return False
    finally:
        os.set_blocking(writer, True)
    return True


def _read(reader: int, until: float, seconds: float) -> tuple[bytes, bool]:
    """What is said until all who could are gone, and whether the time was over first. The first line tells that the
    program begins, and its seconds with it. Raises NotStarted."""
    said, has_begun, is_late = b"", False, False
    while len(said) < VERDICT and not is_late:
        ready, _, _ = select.select([reader], [], [], max(0.0, until - time.monotonic()))
        is_late = not ready
        piece = os.read(reader, 65536) if ready else b""
        if not piece:
            break
        said += piece
        if BEGUN in said and not has_begun:
            has_begun, until = True, time.monotonic() + seconds
    if not has_begun:
        raise NotStarted
    return said, is_late


def _verdict(said: bytes, is_late: bool, word: str, of: int) -> Verdict:
    """The line that has our word."""
    for line in said.splitlines():
        with suppress(ValueError, RecursionError):
            found = json.loads(line)
            if isinstance(found, dict) and "passed" in found and secrets.compare_digest(str(found.get("word")), word):
                return Verdict(int(found["passed"]), of, found.get("why"))
    return Verdict(0, of, "it took too long" if is_late else "it ended without a verdict")
