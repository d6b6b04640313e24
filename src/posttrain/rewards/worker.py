"""A child process that answers requests in JSON, each within its own time (children.py)."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from posttrain.children import Child, Late, NotStarted
from posttrain.errors import ConfigError

__all__ = ["Late", "Worker"]


class Worker:
    def __init__(self, script: Path):
        self.child = Child(script)
        self._lock = threading.Lock()

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Raises Late, ConfigError where the child cannot be started."""
        with self._lock:
            try:
                self.child.start()
            except NotStarted as error:
                raise ConfigError(f"the process of {self.child.script.stem} does not start: {error or 'it ended'}"
                                  ) from None  # fmt: skip
            answer = self.child.ask(json.dumps(request).encode() + b"\n", seconds)
            try:
                reply: dict[str, Any] = json.loads(answer)
            except ValueError:
                self.child.close()
                raise Late from None
            return reply

    def close(self) -> None:
        self.child.close()
