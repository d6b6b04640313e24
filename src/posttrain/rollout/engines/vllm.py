"""Sampling by a vLLM server: the way past one machine. Adapters are handed over as files that both machines see.

    vllm serve MODEL --enable-lora --max-lora-rank 64 --logprobs-mode processed_logprobs
    (with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment)

Before each round the adapter is written to a folder and the server told to load it under a new name; the one before is
unloaded. Full fine-tuning has no adapter, and is refused: its weights would have to be sent whole. Every wait has a
deadline, and what is late or dead is named.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import Stopped, UserError
from posttrain.rollout.engines import Completion, Request
from posttrain.rollout.sampling import Sampling

AT_ONCE = 64
"""Requests that wait for an answer at the same time."""
POLL = 0.2


class EngineError(UserError):
    """An engine that is dead, late, or says what cannot be used."""

    code = "E-ENGINE-0001"


@dataclass
class VllmEngine:
    """`save_adapter` writes the adapter as it is now into a folder; the server reads it there. `timeout` is in seconds,
    for each answer."""

    base_url: str
    model: str
    timeout: float
    save_adapter: Callable[[Path], None]
    folder: Path
    _loaded: str | None = None
    _count: int = 0
    _is_seen: bool = field(default=False, repr=False)

    def health(self) -> str | None:
        try:
            self._ask("GET", "/health", None)
        except EngineError as error:
            return error.message
        return None

    def update_weights(self) -> None:
        """Raises EngineError."""
        if not self._is_seen and (problem := self.health()):
            raise EngineError(problem, hint="start it with `vllm serve MODEL --enable-lora`")
        self._is_seen = True
        self._count += 1
        name, folder = f"posttrain-{self._count}", self.folder / f"adapter-{self._count}"
        self.save_adapter(folder)
        self._ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})
        before, self._loaded = self._loaded, name
        if before is not None:
            self._ask("POST", "/v1/unload_lora_adapter", {"lora_name": before})

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, stopped: Callable[[], bool] = lambda: False
    ) -> list[list[Completion]]:
        """Raises EngineError, Stopped."""
        pool = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="vllm")
        try:
            asked = [pool.submit(self._complete, request, sampling) for request in requests]
            self._await(asked, stopped)
            return [one.result() for one in asked]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _await(self, asked: list[Future[list[Completion]]], stopped: Callable[[], bool]) -> None:
        rest = set(asked)
        while rest:
            done, rest = wait(rest, timeout=POLL, return_when=FIRST_COMPLETED)
            for one in done:
                one.result()  # an error ends it all
            if stopped():
                raise Stopped

    def _complete(self, request: Request, sampling: Sampling) -> list[Completion]:
        said = self._ask("POST", "/v1/completions", self._body(request, sampling))
        choices = said.get("choices") if isinstance(said, dict) else None
        if not isinstance(choices, list) or len(choices) != request.count:
            raise self._unusable(f"{len(choices or [])} completions where {request.count} were asked for")
        return [self._completion(choice, sampling) for choice in sorted(choices, key=lambda one: one.get("index", 0))]

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self._loaded or self.model,
            "prompt": list(request.prompt_ids),
            "n": request.count,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop) or None,
            "seed": (sampling.seed * 1_000_003 + request.key) % 2**31,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": True,
        }

    def _completion(self, choice: dict[str, Any], sampling: Sampling) -> Completion:
        ids, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or not isinstance(logps, list) or len(logps) != len(ids):
            raise self._unusable("no token ids with their log-probabilities",
                                 "a version that knows return_token_ids (0.10.2 or later)")  # fmt: skip
        array = np.array([np.nan if value is None else value for value in logps], dtype=np.float32)
        stopped_at = choice.get("stop_reason")
        text = str(choice.get("text", "")) if isinstance(stopped_at, str) and stopped_at in sampling.stop else None
        return Completion(np.array(ids, dtype=np.int64), array, choice.get("finish_reason") == "stop", text)

    def _unusable(self, what: str, wanted: str | None = None) -> EngineError:
        return EngineError(f"the vLLM server at {self.base_url} gave {what}",
                           hint=None if wanted is None else f"it must be {wanted}")  # fmt: skip

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url.rstrip("/") + path, data=data, method=method,
                                         headers={"Content-Type": "application/json"})  # fmt: skip
        started = time.monotonic()
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace").strip()
            raise EngineError(f"the vLLM server at {self.base_url} refused {path} ({error.code}): {said}") from None
        except (TimeoutError, urllib.error.URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError) or time.monotonic() - started >= self.timeout:
                raise EngineError(f"the vLLM server at {self.base_url} has not answered {path} within "
                                  f"{self.timeout:g} s", hint="look at its log, or raise vllm_server_timeout",
                                  code="E-ENGINE-0002") from None  # fmt: skip
            raise EngineError(f"the vLLM server at {self.base_url} cannot be reached ({reason})",
                              hint="start it, or set vllm_server_base_url") from None  # fmt: skip
        try:
            return json.loads(text) if text.lstrip().startswith("{") else text
        except ValueError:
            raise self._unusable(f"no JSON to {path}: {text[:80]!r}") from None
