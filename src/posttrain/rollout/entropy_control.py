"""How much a bonus for uncertainty weighs, adapted so that the policy does not settle too early.

After Skywork-OR1 (arXiv 2505.22312): the coefficient grows by a fixed amount after a step whose tokens had a mean
entropy of at most the target, shrinks by it after any other, and counts only while the last step was at or below it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from posttrain.errors import ConfigError
from posttrain.objectives.base import Metrics
from posttrain.objectives.policy import ACTING


@dataclass
class EntropyControl:
    """`target` is the mean entropy of a token, in nats; the coefficient begins with `start`, grows up to `high` and
    shrinks down to `low`. A step without a token to learn from leaves it as it is."""

    start: float
    low: float = 0.0
    high: float = 1.0
    delta: float = 0.005
    target: float = 0.2
    coef: float = field(init=False)
    last: float = field(init=False)

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ConfigError(f"entropy_coef_min={self.low} is above entropy_coef_max={self.high}")
        for name, value in (("entropy_coef_delta", self.delta), ("entropy_target", self.target)):
            if not value > 0:
                raise ConfigError(f"{name}={value} must be above 0 with use_adaptive_entropy=True")
        self.restart()

    def restart(self) -> None:
        """As before the first step, which has no bonus."""
        self.coef, self.last = self.start, math.inf

    @property
    def settings(self) -> list[float]:
        return [self.start, self.low, self.high, self.delta, self.target]

    @property
    def applied(self) -> float:
        """The coefficient of the step that comes next."""
        return self.coef if self.last <= self.target else 0.0

    def follow(self, sums: Mapping[str, tuple[float, float]]) -> Metrics:
        """What a step's metrics summed up to, and how often they were counted; returns what is to be logged."""
        total, count = sums.get(ACTING, (0.0, 0.0))
        if count:
            self.last = total / count
            if self.last <= self.target:
                self.coef = min(self.coef + self.delta, self.high)
            else:
                self.coef = max(self.coef - self.delta, self.low)
        return {"entropy_coef": (torch.tensor(self.coef), 1)}

    def state(self) -> dict[str, float | None]:
        return {"coef": self.coef, "last": self.last if math.isfinite(self.last) else None}

    def load_state(self, state: Mapping[str, float | None]) -> None:
        self.coef = state["coef"] or 0.0
        self.last = math.inf if state["last"] is None else state["last"]
