"""A child process that answers line by line, and can be ended when an answer takes too long.

It runs a script of ours with next to no environment and without site packages, given the parent's module path as its
argument. It says "ready" first; then a line in, a line out. One that is late or dies is ended; the next line starts
another. A fork of this process does not speak to its parent's child.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

START = 60.0
"""Seconds that the child may take to be ready, on a machine that is busy with other things."""
READY = (b"ready\n", b'"ready"\n')


class Late(Exception):
    """No answer in time, or none at all."""


class NotStarted(Exception):
    """The child cannot be had; its last words, if any."""


class Child:
    """`kept` are the names of the environment that it gets. Not for several threads at once."""

    def __init__(self, script: Path, kept: Sequence[str] = ()):
        self.script, self.kept = script, kept
        self.number = 0
        """How many have been started: another one knows nothing of what the last was told."""
        self.process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def start(self) -> None:
        """Unless it runs. Raises NotStarted."""
        if self._owner != os.getpid():  # forked: the child is our parent's
            self.process, self._owner = None, os.getpid()
        if self.process is not None and self.process.poll() is None:
            return
        self.close()
        try:
            self.process = self._started()
        except OSError as error:
            raise NotStarted(str(error)) from None
        self.number += 1
        try:
            is_ready = self._line(START) in READY
        except (Late, OSError):
            is_ready = False
        except BaseException:
            self.close()
            raise
        if not is_ready:
            raise NotStarted(self._last_words())
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _started(self) -> subprocess.Popen[bytes]:
        paths = json.dumps([path for path in sys.path if path])
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(self.script), paths], stdin=pipe, stdout=pipe, stderr=pipe,
            env={name: os.environ[name] for name in self.kept if name in os.environ},
        )  # fmt: skip

    def _last_words(self) -> str:
        assert self.process is not None
        self.process.kill()
        _, said = self.process.communicate()
        self.process = None
        return said.decode(errors="replace").strip().rpartition("\n")[2]

    def ask(self, line: bytes, seconds: float) -> bytes:
        """The answer to `line`; both end with a line feed. The child must run (`start`). Raises Late, and ends the
        child then."""
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
            return self._line(seconds)
        except BaseException as error:  # an interrupt, too, leaves an answer in the pipe that no one asked for
            self.close()
            if isinstance(error, OSError):
                raise Late from None
            raise

    def _line(self, seconds: float) -> bytes:
        assert self.process is not None
        assert self.process.stdout is not None
        until, said = time.monotonic() + seconds, b""
        while not said.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                raise Late
            said += piece
        return said

    def close(self) -> None:
        """End it; it is started again when it is asked again."""
        child, self.process = self.process, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout, child.stderr):
            if pipe is not None:
                with suppress(OSError):  # what was not yet sent
                    pipe.close()
