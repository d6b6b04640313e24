"""Sums gathered between two log lines. Tensors stay on their device until `drain` asks for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from posttrain.objectives.base import GIVEN, Metrics

PICKS: dict[str, Callable[[float, float], float]] = {"min": min, "max": max}


@dataclass
class Meter:
    """`loss_sum` is the sum of the steps' losses, `metrics` sums and counts by name; tokens and seconds cover training
    alone, not evaluation or saving."""

    steps: int = 0
    loss_sum: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    tokens: int = 0
    supervised: float = 0
    flops: float = 0.0
    seconds: float = 0.0
    _pending: list[tuple[int, Metrics]] = field(default_factory=list, repr=False)
    _step: int = field(default=0, repr=False)
    _started: float = field(default=0.0, repr=False)
    _pending_before: int = field(default=0, repr=False)

    def start_step(self) -> None:
        self._started = time.perf_counter()
        self._pending_before = len(self._pending)
        self._step += 1

    def add(self, metrics: Metrics) -> None:
        """One micro-batch's metrics."""
        self._pending.append((self._step, {name: (total.detach(), count) for name, (total, count) in metrics.items()}))

    def sums_of_step(self) -> dict[str, tuple[float, float]]:
        """Sums and counts of what the present step's micro-batches have added so far, on the host."""
        sums: dict[str, tuple[float, float]] = {}
        for _, metrics in self._pending[self._pending_before :]:
            for name, (total, count) in metrics.items():
                before, counted = sums.get(name, (0.0, 0.0))
                sums[name] = (before + float(total), counted + float(count))
        return sums

    def end_step(self, loss: float, tokens: int, supervised: float, flops: float) -> None:
        self.steps += 1
        self.loss_sum += loss
        self.tokens += tokens
        self.supervised += supervised
        self.flops += flops
        self.seconds += time.perf_counter() - self._started

    def settle(self) -> None:
        """Bring pending metrics to the host; sums are in fp64 so that their order hardly matters. What begins with
        `min_` or `max_`, or ends with one of the two words, is the least or greatest of a step, however it was cut, and
        then a mean over steps."""
        extremes: dict[tuple[int, str], float] = {}
        for step, metrics in self._pending:
            for name, (total, count) in metrics.items():
                pick = _pick(name) if step else None
                if pick is None:
                    self._count(name, float(total), float(count))
                elif count:
                    value = float(total) / float(count)
                    extremes[step, name] = pick(extremes.get((step, name), value), value)
        for (_, name), value in extremes.items():
            self._count(name, value, 1)
        self._pending.clear()

    def _count(self, name: str, total: float, count: float) -> None:
        before, counted = self.metrics.get(name, (0.0, 0))
        self.metrics[name] = (before + total, counted + count)

    def drain(self) -> dict[str, float]:
        """Means since the last drain, and start again."""
        self.settle()
        means = {name: total / count for name, (total, count) in self.metrics.items() if count}
        if self.seconds > 0:
            means["tokens_per_second"] = self.tokens / self.seconds
            means["supervised_tokens_per_second"] = self.supervised / self.seconds
        self.reset()
        return means

    def reset(self) -> None:
        self.steps, self.loss_sum, self.tokens, self.supervised, self.flops, self.seconds = 0, 0.0, 0, 0, 0.0, 0.0
        self.metrics, self._pending = {}, []

    def discard_step(self) -> None:
        """Forget what an abandoned step has added, and only that."""
        del self._pending[self._pending_before :]

    def state(self) -> dict[str, object]:
        """Plain values for a checkpoint taken between two log lines."""
        self.settle()
        return {
            "steps": self.steps,
            "loss_sum": self.loss_sum,
            "metrics": {name: list(pair) for name, pair in self.metrics.items()},
            "tokens": self.tokens,
            "supervised": self.supervised,
            "flops": self.flops,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, {k: tuple(v) for k, v in value.items()} if name == "metrics" else value)


def _pick(name: str) -> Callable[[float, float], float] | None:
    words = name.removeprefix(GIVEN).replace("/", "_").split("_")
    return PICKS.get(words[0]) or PICKS.get(words[-1])
