"""A child process that answers requests, and can be ended when one of them takes too long.

It runs a script of ours with no environment and without site packages, given the parent's module path as its argument.
It says "ready" first; then a line of JSON in, a line out. One that is late, dies, or says something else is ended; the
next request starts another.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError

START = 60.0
"""Seconds that the child may take to be ready, on a machine that is busy with other things."""


class Late(Exception):
    """No answer in time, or none at all."""


class Worker:
    def __init__(self, script: Path):
        self.script = script
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises Late, ConfigError where the child cannot be started."""
        with self._lock:
            child = self._running()
            try:
                reply: dict[str, Any] = json.loads(_exchanged(child, json.dumps(request).encode() + b"\n", seconds))
            except BaseException as error:  # an interrupt, too, leaves an answer in the pipe that no one asked for
                self.close()
                if isinstance(error, OSError | ValueError):
                    raise Late from None
                raise
            return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # forked: the child is our parent's
            self._child, self._owner = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            self.close()
            paths = json.dumps([path for path in sys.path if path])
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", str(self.script), paths],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={},
            )  # fmt: skip
            self._child = child
            try:
                is_ready = json.loads(_line(child, START)) == "ready"
            except (Late, OSError, ValueError):
                is_ready = False
            except BaseException:
                self.close()
                raise
            if not is_ready:
                self.close()
                raise ConfigError(f"the process of {self.script.stem} does not start")
        return self._child

    def close(self) -> None:
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not yet sent
                    pipe.close()


def _exchanged(child: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    assert child.stdin is not None
    child.stdin.write(line)
    child.stdin.flush()
    return _line(child, seconds)


def _line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    assert child.stdout is not None
    until, said = time.monotonic() + seconds, b""
    while not said.endswith(b"\n"):
        ready, _, _ = select.select([child.stdout], [], [], max(0.0, until - time.monotonic()))
        piece = os.read(child.stdout.fileno(), 65536) if ready else b""
        if not piece:
            raise Late
        said += piece
    return said
