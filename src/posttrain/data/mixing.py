"""Several data sets as one, in given proportions.

Each row is drawn from one of the sets, with probability proportional to its weight, under a seed: the same mixture
gives the same rows in the same order, so a run that is resumed sees what it would have seen. With `stop="all"` it
ends when every set has been gone through at least once, and those that are through begin again meanwhile; with
`stop="first"` it ends when one of them is through, and what is left of the others is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError

STOPS = ("all", "first")
Rows = Iterator[tuple[Any, Any]]


@dataclass(frozen=True)
class Part:
    """One of the sets: `source` as anywhere else (a path, a data set, a list), and what it is called in messages."""

    source: Any
    weight: float
    name: str


@dataclass(frozen=True)
class Mixture:
    parts: tuple[Part, ...]
    seed: int = 0
    stop: str = "all"

    @property
    def name(self) -> str:
        return " + ".join(part.name for part in self.parts)

    @property
    def is_stream(self) -> bool:
        """Whether any of it has no length."""
        return any(not isinstance(p.source, str | Path) and not hasattr(p.source, "__len__") for p in self.parts)


def mix(sources: Sequence[Any], weights: Sequence[float] | None = None, *, seed: int = 0, stop: str = "all") -> Mixture:
    """`sources` mixed by `weights` (any positive numbers; equal if left out), to be given wherever a data set is.

    Raises: ConfigError for weights that are not positive or not as many as the sources, an unknown `stop`, and
        iterators that can be gone through only once.
    """
    weights = list(weights) if weights is not None else [1.0] * len(sources)
    if len(sources) < 1 or len(weights) != len(sources):
        raise ConfigError(f"a mixture of {len(sources)} data sets has {len(weights)} weights")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
            raise ConfigError(f"mixture weight {weight!r} is not a positive number", hint="leave a set out instead")
    if stop not in STOPS:
        raise ConfigError(f"mixture stop is {stop!r}", hint=f"known: {', '.join(STOPS)}")
    for source in sources:
        if isinstance(source, Iterator):
            raise ConfigError("a mixture cannot begin an iterator again", hint="give a list, a data set or a path")
    named = [str(s) if isinstance(s, str | Path) else f"set {i + 1}" for i, s in enumerate(sources)]
    return Mixture(tuple(map(Part, sources, map(float, weights), named)), seed, stop)


def mixed_rows(mixture: Mixture, read: Callable[[Part], Rows]) -> Rows:
    """Rows of all parts; `read` opens one from its beginning."""
    import numpy as np

    generator = np.random.default_rng(mixture.seed)
    weights = np.array([part.weight for part in mixture.parts])
    bounds = np.cumsum(weights / weights.sum())
    streams = [read(part) for part in mixture.parts]
    unfinished = set(range(len(streams)))
    while unfinished:
        chosen = min(int(np.searchsorted(bounds, generator.random(), side="right")), len(streams) - 1)
        row = next(streams[chosen], None)
        if row is None:
            unfinished.discard(chosen)
            if mixture.stop == "first" or not unfinished:
                return
            streams[chosen] = read(mixture.parts[chosen])
            row = next(streams[chosen], None)
            if row is None:
                raise ConfigError(f"{mixture.parts[chosen].name} has no usable row to mix in")
        yield row
