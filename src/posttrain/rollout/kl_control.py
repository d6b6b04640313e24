"""What it costs to leave the reference, adapted so that the policy stays about as far from it as is wanted.

After Ziegler et al. (arXiv 1909.08593, section 2.2): with `e = clip((KL - target) / target, -0.2, 0.2)` over the
completions of a round, the coefficient is multiplied by `1 + e x completions / horizon`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from posttrain.errors import ConfigError

MOST = 0.2
"""Of the relative error that is answered."""


@dataclass
class KLControl:
    """`target` is the KL divergence of a completion, in nats; `horizon` counts completions."""

    start: float
    target: float = 6.0
    horizon: float = 10_000.0
    coef: float = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("kl_coef", self.start), ("target", self.target), ("horizon", self.horizon)):
            if not value > 0:
                raise ConfigError(f"{name}={value} must be above 0 with adap_kl_ctrl=True")
        self.restart()

    def restart(self) -> None:
        self.coef = self.start

    def check_fits(self, completions: int) -> None:
        """Raises ConfigError where a round of so many would turn the coefficient negative, so that leaving the
        reference were paid for."""
        if self.horizon <= MOST * completions:
            raise ConfigError(f"horizon={self.horizon:g} is too short for rounds of {completions} completions: one "
                              "could take the whole coefficient away",
                              hint=f"10000 is usual; it must be above {MOST * completions:g}")  # fmt: skip

    def follow(self, divergence: float, completions: int) -> None:
        """`divergence` is the mean over so many completions."""
        error = min(max((divergence - self.target) / self.target, -MOST), MOST)
        self.coef *= 1 + error * completions / self.horizon
