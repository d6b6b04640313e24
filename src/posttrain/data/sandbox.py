"""Templates of models and files are other people's programs: a child process renders them, within bounds.

The child (jinja.py as a script, 40 ms to start, about 60 µs a rendering) has no environment, writes no files and starts
no processes; it has 512 MB of memory, two seconds of processor time a rendering and four megabytes of output. One that
goes beyond is ended and the template refused. There is one child a process, whatever the number of templates.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from posttrain.data.rendering import rendered
from posttrain.errors import ConfigError

SCRIPT = Path(__file__).with_name("jinja.py")
PATIENCE = 60.0
"""Seconds by the clock for an answer, on a machine that is busy with other things."""


KEPT = ("TZ",)
"""What the child gets of the environment: templates write the date."""


class Sandbox:
    """The child process, started when it is first asked."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()
        self._owner = os.getpid()

    def render(self, template: str, values: Mapping[str, Any], marked: bool = False) -> Any:
        """What `template` writes; with `marked`, that and the characters between its generation markers. `values` are
        plain JSON. Raises RenderError, LimitError."""
        key = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            child = self._running()
            request = {"key": key, "values": values, "marked": marked}
            if key not in self._known:
                request["template"] = template
            reply = self._exchange(child, (json.dumps(request) + "\n").encode())
            self._known.add(key)
            if "limit" in reply:  # it may hold on to what it took
                self.close()
        return rendered(reply)

    def _exchange(self, child: subprocess.Popen[bytes], line: bytes) -> dict[str, Any]:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(line)
            child.stdin.flush()
            ready, _, _ = select.select([child.stdout], [], [], PATIENCE)
            answer = child.stdout.readline() if ready else b""
        except BrokenPipeError:
            answer = b""
        if not answer.endswith(b"\n"):  # ended by its timer or for want of memory
            child.kill()
            return {"limit": "it takes more than two seconds, or too much memory"}
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._owner != os.getpid():  # forked: the child is our parent's
            self._forget()
        if self._child is None or self._child.poll() is not None:
            paths = json.dumps([path for path in sys.path if path])
            self._child, self._known = _started([sys.executable, "-I", "-S", str(SCRIPT), paths]), set()
        return self._child

    def close(self) -> None:
        """End the child; the next rendering starts another."""
        child, self._child = self._child, None
        if child is None or self._owner != os.getpid():
            return
        child.kill()
        child.wait()
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was not yet sent
                    pipe.close()


def _started(command: list[str]) -> subprocess.Popen[bytes]:
    """The child, ready. Raises ConfigError (E-DATA-0045) where it cannot be had."""
    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    try:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
        )
    except OSError as error:
        raise _not_started(str(error)) from None
    assert child.stdout is not None
    assert child.stderr is not None
    if child.stdout.readline() != b"ready\n":
        _, said = child.communicate()
        raise _not_started(said.decode(errors="replace").strip().rpartition("\n")[2])
    child.stderr.close()
    return child


def _not_started(why: str) -> ConfigError:
    message = f"the process that renders chat templates cannot be started: {why or 'it ended'}"
    hint = 'a named template (chat_template="chatml", ...) needs none'
    return ConfigError(message, hint=hint, code="E-DATA-0045")


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)
