"""Several data sets as one, in given proportions.

Each row is drawn from one of the sets, with probability proportional to its weight, under a seed: the same mixture
gives the same rows in the same order, so a run that is resumed sees what it would have seen. With `stop="all"` it
ends when every set has been gone through at least once, and those that are through begin again meanwhile; with
`stop="first"` it ends when one of them is through, and what is left of the others is not used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from posttrain.data.codes import REASONS, kind
from posttrain.errors import ConfigError, DataError

CUT_OFF = REASONS["E-DATA-0030"]
STOPS = ("all", "first")
LIST = 'posttrain.mix(["a.jsonl", "b.jsonl"], [3, 1])'
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


def mix(
    sources: Sequence[Any] | Mapping[Any, float],
    weights: Iterable[float] | None = None,
    *,
    seed: int = 0,
    stop: str = "all",
) -> Mixture:
    """`sources` mixed by `weights` (any positive numbers; equal if left out), to be given wherever a data set is. Paths
    and their weights may come as one dict.

    Raises: ConfigError for weights that are not positive or not as many as the sources, an unknown `stop`, what is no
        list of data sets, and iterators that can be gone through only once.
    """
    if isinstance(sources, Mapping):
        if weights is not None:
            raise ConfigError("a mixture's dict has the weights in it, and `weights` are given too", hint="give one")
        shares_of = dict(sources)
        sources, weights = [*shares_of], [*shares_of.values()]
    several = _several(sources)
    shares = _checked(weights) if weights is not None else [1.0] * len(several)
    if len(several) < 1 or len(shares) != len(several):
        raise ConfigError(f"a mixture of {len(several)} data sets has {len(shares)} weights")
    if stop not in STOPS:
        raise ConfigError(f"mixture stop is {stop!r}", hint=f"known: {', '.join(STOPS)}")
    for number, source in enumerate(several, start=1):
        if isinstance(source, Iterator):
            raise ConfigError("a mixture cannot begin an iterator again", hint="give a list, a data set or a path")
        if isinstance(source, Mapping) and not hasattr(source, "column_names"):  # a DatasetDict is told of its splits
            raise ConfigError(f"set {number} of a mixture is a dict: one row, not a data set", hint=LIST)
    named = [str(s) if isinstance(s, str | Path) else f"set {i + 1}" for i, s in enumerate(several)]
    return Mixture(tuple(map(Part, several, shares, named)), seed, stop)


def _several(sources: Any) -> list[Any]:
    if isinstance(sources, str | Path | bytes) or hasattr(sources, "column_names") or not isinstance(sources, Iterable):
        shown = repr(sources) if isinstance(sources, str | Path) else kind(sources)
        raise ConfigError(f"a mixture is made of a list of data sets, saw {shown}", hint=LIST)
    return list(sources)


def _checked(weights: Any) -> list[float]:
    if isinstance(weights, str | bytes) or not isinstance(weights, Iterable):
        raise ConfigError(f"mixture weights are {weights!r}", hint="give a list of numbers, one for each data set")
    return [_weight(weight) for weight in weights]


def _weight(given: Any) -> float:
    value = float(given) if not isinstance(given, bool) and isinstance(given, Real) else 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"mixture weight {given!r} is not a positive number", hint="leave a set out instead")
    return value


def mixed_rows(mixture: Mixture, read: Callable[[Part, bool], Rows]) -> Rows:
    """Rows of all parts; `read` opens one from its beginning, and is told whether it was gone through before.

    Raises: DataError (E-DATA-0006) for a part without a row that can be read.
    """
    import numpy as np

    generator = np.random.default_rng(mixture.seed)
    weights = np.array([part.weight for part in mixture.parts])
    bounds = np.cumsum(weights / weights.sum())
    streams = [read(part, False) for part in mixture.parts]
    unfinished, empty = set(range(len(streams))), set(range(len(streams)))
    while unfinished:
        chosen = min(int(np.searchsorted(bounds, generator.random(), side="right")), len(streams) - 1)
        row = next(streams[chosen], None)
        if row is None:
            if chosen in empty:
                raise _no_row(mixture.parts[chosen])
            unfinished.discard(chosen)
            if mixture.stop == "first" or not unfinished:
                return
            streams[chosen] = read(mixture.parts[chosen], True)
            row = next(streams[chosen], None)
            if row is None:
                raise _no_row(mixture.parts[chosen])
        empty.discard(chosen)
        yield row


def check_used(mixture: Mixture, used: Collection[str], lost: Mapping[str, Mapping[str, int]]) -> None:
    """Raises DataError (E-DATA-0006) for a part of which nothing was used. `used` are the sources of what was; `lost`
    says of each source how many rows were left out for which reason."""
    for part in mixture.parts:
        if not any(_is_of(part, source) for source in used):
            reasons = Counter[str]()
            for counts in (counts for source, counts in lost.items() if _is_of(part, source)):
                reasons.update(counts)
            raise _no_row(part, reasons)


def _is_of(part: Part, source: str) -> bool:
    """Whether rows with the origin `source` come from `part`: a file, or one of a folder or glob."""
    if isinstance(part.source, Mixture):
        return any(_is_of(inner, source) for inner in part.source.parts)
    name = str(Path(part.name)) if isinstance(part.source, str | Path) else part.name  # origins have no `./`
    return source in (name, part.name) or Path(name) in Path(source).parents or fnmatch(source, name)


def _no_row(part: Part, reasons: Mapping[str, int] = MappingProxyType({})) -> DataError:
    hint = "posttrain data check says why" if isinstance(part.source, str | Path) else "leave it out, or see its rows"
    if list(reasons) == [CUT_OFF]:  # which no check without the model and the limit can see
        hint = "raise max_length, shorten its prompts, or leave it out"
    why = f" ({', '.join(f'{count} {reason}' for reason, count in reasons.items())})" if reasons else ""
    return DataError(f"{part.name} has no usable row to mix in{why}", hint=hint, code="E-DATA-0006")
