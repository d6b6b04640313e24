"""Where completions come from: the protocol that every engine keeps, and what passes through it.

`LocalEngine` samples in the training process, on the very weights that are trained. A server, or workers on other
machines, stand behind the same three calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from posttrain.rollout.sampling import Sampling


@dataclass(frozen=True)
class Request:
    """`count` completions of one prompt. `key` numbers the prompt: the random numbers of its completions follow from
    the seed, the key and the completion's place, and from nothing else."""

    prompt_ids: Sequence[int]
    key: int
    count: int = 1


@dataclass(frozen=True)
class Completion:
    """Token ids and the log-probability of each as it was sampled, `(L,)`; an end token is one of them. `is_ended`: by
    an end token or a stop string, not for want of room. `text` where a stop string ended it: what stands before it."""

    ids: np.ndarray
    logps: np.ndarray
    is_ended: bool
    text: str | None = None


class Engine(Protocol):
    """Raises EngineError for an engine that is dead or late, by name."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, stopped: Callable[[], bool] = ...
    ) -> list[list[Completion]]:
        """The completions of each request, in order. Raises Stopped once `stopped` says so."""
        ...

    def update_weights(self) -> None:
        """The policy has moved: what is sampled from now on is sampled from it as it is."""
        ...

    def health(self) -> str | None:
        """What is wrong with it, or None."""
        ...
