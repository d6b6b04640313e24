"""Templates of models and files are other people's programs: a child process renders them, within bounds.

The child (jinja.py as a script, 40 ms to start, about 60 µs a rendering) has no environment, writes no files and starts
no processes; it has 512 MB of memory, two seconds of processor time a rendering and four megabytes of output. One that
goes beyond is ended and the template refused. There is one child a process, whatever the number of templates.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.children import Child, Late, NotStarted
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
        self.child = Child(SCRIPT, KEPT)
        self._known: set[str] = set()
        self._number = 0

    def render(self, template: str, values: Mapping[str, Any], marked: bool = False) -> Any:
        """What `template` writes; with `marked`, that and the characters between its generation markers. `values` are
        plain JSON. Raises RenderError, LimitError."""
        key = hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest()
        with self._lock:
            self._start()
            request = {"key": key, "values": values, "marked": marked}
            if key not in self._known:
                request["template"] = template
            reply = self._asked(request)
            self._known.add(key)
            if "limit" in reply:  # it may hold on to what it took
                self.child.close()
        return rendered(reply)

    def _start(self) -> None:
        """Raises ConfigError (E-DATA-0045) where the child cannot be had."""
        try:
            self.child.start()
        except NotStarted as error:
            message = f"the process that renders chat templates cannot be started: {error or 'it ended'}"
            hint = 'a named template (chat_template="chatml", ...) needs none'
            raise ConfigError(message, hint=hint, code="E-DATA-0045") from None
        if self._number != self.child.number:
            self._number, self._known = self.child.number, set()

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            reply: dict[str, Any] = json.loads(self.child.ask((json.dumps(request) + "\n").encode(), PATIENCE))
        except Late:  # ended by its timer or for want of memory
            return {"limit": "it takes more than two seconds, or too much memory"}
        return reply

    def close(self) -> None:
        """End the child; the next rendering starts another."""
        self.child.close()


SANDBOX = Sandbox()
atexit.register(SANDBOX.close)
