"""Sampling by a vLLM server: the way past one machine. Adapters are handed over as files that both machines see.

    vllm serve MODEL --enable-lora --max-lora-rank 64 --logprobs-mode processed_logprobs
    (with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment)

Before each round the adapter is written to a folder and the server told to load it under a new name, which no other run
has; the one before is unloaded, the last one when the run ends. Full fine-tuning has no adapter, and is refused: its
weights would have to be sent whole. Every wait has a deadline, and what is late or dead is named.
"""

from __future__ import annotations

import os
import secrets
import shutil
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import Stopped
from posttrain.rollout.engines import Completion, Request
from posttrain.rollout.engines.vllm_server import EngineError, VllmServer
from posttrain.rollout.sampling import Sampling

AT_ONCE = 64
"""Requests that wait for an answer at the same time."""
POLL = 0.2
LAST_WAIT = 5.0
"""Seconds that the end of a run waits for the server to let go of its adapter."""


@dataclass
class VllmEngine:
    """`save_adapter` writes the adapter as it is now into a folder; the server reads it there. `timeout` is in seconds,
    for each answer. `end_ids` are the tokens that end a completion here: the server knows its own only, and looks for
    stop strings in text without special tokens."""

    base_url: str
    model: str
    timeout: float
    save_adapter: Callable[[Path], None]
    folder: Path
    end_ids: Sequence[int] = ()
    _count: int = 0
    _is_seen: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        self._server = VllmServer(self.base_url, self.timeout)
        self._run = secrets.token_hex(4)
        weakref.finalize(self, _let_go, self._server, os.getpid())  # when it is forgotten, or the process ends

    def health(self) -> str | None:
        try:
            self._server.ask("GET", "/health", None)
        except EngineError as error:
            return error.message
        return None

    def update_weights(self) -> None:
        """Raises EngineError."""
        if not self._is_seen and (problem := self.health()):
            raise EngineError(problem, hint="start it with `vllm serve MODEL --enable-lora`")
        self._is_seen = True
        self._count += 1
        folder = self._adapter(self._count)
        self.save_adapter(folder)
        self._server.load(f"posttrain-{self._run}-{self._count}", str(folder.resolve()))
        shutil.rmtree(self._adapter(self._count - 2), ignore_errors=True)

    def _adapter(self, number: int) -> Path:
        return self.folder / f"adapter-{number}"

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
        said = self._server.ask("POST", "/v1/completions", self._body(request, sampling))
        choices = said.get("choices") if isinstance(said, dict) else None
        if not isinstance(choices, list) or len(choices) != request.count:
            raise self._server.unusable(f"{len(choices or [])} completions where {request.count} were asked for")
        return [self._completion(choice, sampling) for choice in sorted(choices, key=lambda one: one.get("index", 0))]

    def _body(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self._server.loaded or self.model,
            "prompt": list(request.prompt_ids),
            "n": request.count,
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(self.end_ids) or None,
            "seed": (sampling.seed * 1_000_003 + request.key) % 2**31,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": True,
        }

    def _completion(self, choice: dict[str, Any], sampling: Sampling) -> Completion:
        ids, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
        if not ids or not isinstance(logps, list) or len(logps) != len(ids):
            raise self._server.unusable("no token ids with their log-probabilities",
                                 "a version that knows return_token_ids (0.10.2 or later)")  # fmt: skip
        array = np.array([np.nan if value is None else value for value in logps], dtype=np.float32)
        stopped_at = choice.get("stop_reason")
        text = str(choice.get("text", "")) if isinstance(stopped_at, str) and stopped_at in sampling.stop else None
        return Completion(np.array(ids, dtype=np.int64), array, choice.get("finish_reason") == "stop", text)


def _let_go(server: VllmServer, process: int) -> None:
    if os.getpid() == process:  # a fork's copy is not the run
        server.let_go(min(server.timeout, LAST_WAIT))
