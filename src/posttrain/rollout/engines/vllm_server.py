"""The HTTP of a vLLM server: one request, one answer, one deadline for the whole of it. What is late, dead or refused
is named."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

from posttrain.errors import UserError

CHUNK = 1 << 16
SAID = 500
"""Bytes of what a server says of a refusal."""


class EngineError(UserError):
    """An engine that is dead, late, or says what cannot be used."""

    code = "E-ENGINE-0001"


class VllmServer:
    """`timeout` is in seconds, for each answer as a whole. `loaded` is the adapter that was loaded last."""

    def __init__(self, base_url: str, timeout: float):
        self.base_url, self.timeout = base_url, timeout
        self.loaded: str | None = None

    def load(self, name: str, folder: str) -> None:
        """The adapter in `folder`, and lets go of the one before."""
        self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        before, self.loaded = self.loaded, name
        if before is not None:
            self._unload(before, self.timeout)

    def let_go(self, timeout: float) -> None:
        """Of the adapter that was loaded last, where the server still answers within `timeout`."""
        last, self.loaded = self.loaded, None
        if last is not None:
            with suppress(EngineError):  # a server that is gone has no adapter either
                self._unload(last, timeout)

    def _unload(self, name: str, timeout: float) -> None:
        self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout)

    def ask(self, method: str, path: str, body: dict[str, Any] | None, timeout: float | None = None) -> Any:
        """What is said, read as JSON where it is an object. Raises EngineError."""
        timeout = self.timeout if timeout is None else timeout
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url.rstrip("/") + path, data=data, method=method,
                                         headers={"Content-Type": "application/json"})  # fmt: skip
        deadline = time.monotonic() + timeout
        try:
            try:
                with urllib.request.urlopen(request, timeout=timeout) as answer:
                    text = _read(answer, deadline).decode(errors="replace")
            except urllib.error.HTTPError as error:
                with error:
                    said = _read(error, deadline, SAID).decode(errors="replace").strip()
                raise EngineError(f"the vLLM server at {self.base_url} refused {path} ({error.code}): {said}") from None
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError) or time.monotonic() >= deadline:
                raise EngineError(f"the vLLM server at {self.base_url} has not answered {path} within {timeout:g} s",
                                  hint="look at its log, or raise vllm_server_timeout",
                                  code="E-ENGINE-0002") from None  # fmt: skip
            raise EngineError(f"the vLLM server at {self.base_url} cannot be reached ({reason})",
                              hint="start it, or set vllm_server_base_url") from None  # fmt: skip
        try:
            return json.loads(text) if text.lstrip().startswith("{") else text
        except ValueError:
            raise self.unusable(f"no JSON to {path}: {text[:80]!r}") from None

    def unusable(self, what: str, wanted: str | None = None) -> EngineError:
        return EngineError(f"the vLLM server at {self.base_url} gave {what}",
                           hint=None if wanted is None else f"it must be {wanted}")  # fmt: skip


def _read(answer: Any, deadline: float, most: int | None = None) -> bytes:
    """All of `answer`, or its first `most` bytes. The socket's own timeout is for each piece of it: a server that says
    a little now and then would never be late. One that falls silent in the middle is late after another `timeout` at
    most. Raises TimeoutError."""
    pieces: list[bytes] = []
    while piece := answer.read1(CHUNK):
        pieces.append(piece)
        if most is not None and sum(map(len, pieces)) >= most:
            break
        if time.monotonic() >= deadline:
            raise TimeoutError
    return b"".join(pieces)[:most]
