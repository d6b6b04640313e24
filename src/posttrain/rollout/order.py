"""Which prompts are sampled for which round, and which of its completions a step learns from: pure functions of the
seed, so that resuming needs no replay.

As in TRL, `per_device_train_batch_size` counts completions. A round (`steps_per_generation` batches) holds
`generation_batch_size / num_generations` prompts, each with `num_generations` completions, and serves `num_iterations`
times; prompts that do not fill a round at the end of an epoch wait for another epoch's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Rounds:
    """`seed=None` keeps the data's own order. `prompts_per_round` distinct prompts, cut into `batches` that are passed
    over `iterations` times, of which a step takes `accumulation`."""

    num_prompts: int
    prompts_per_round: int
    batches: int
    iterations: int
    accumulation: int
    seed: int | None

    @property
    def rounds_per_epoch(self) -> int:
        return self.num_prompts // self.prompts_per_round

    @property
    def batches_per_epoch(self) -> int:
        return self.rounds_per_epoch * self.batches * self.iterations

    @property
    def steps_per_epoch(self) -> int:
        return max(1, -(-self.batches_per_epoch // self.accumulation))

    @property
    def is_on_policy(self) -> bool:
        """Whether a round is used up within the step that begins it, so that the policy has not moved since."""
        return self.accumulation % (self.batches * self.iterations) == 0

    def prompts(self, round_: int) -> list[int]:
        """Of round `round_`, counted over all epochs."""
        epoch, within = divmod(round_, self.rounds_per_epoch)
        order = range(self.num_prompts) if self.seed is None else _shuffled(self.num_prompts, self.seed, epoch)
        return list(order[within * self.prompts_per_round : (within + 1) * self.prompts_per_round])

    def step(self, step: int) -> list[tuple[int, int]]:
        """The `(round, batch)` pairs that step `step` learns from."""
        epoch, within = divmod(step, self.steps_per_epoch)
        first = within * self.accumulation
        each = self.batches * self.iterations
        return [
            (epoch * self.rounds_per_epoch + number // each, number % self.batches)
            for number in range(first, min(first + self.accumulation, self.batches_per_epoch))
        ]

    def epoch_after(self, step: int) -> float:
        done, within = divmod(step, self.steps_per_epoch)
        if within == 0:
            return float(done)
        return done + within * self.accumulation / self.batches_per_epoch

    def deal(self, round_: int, completions: int) -> list[int]:
        """How a round's completions are dealt out to its batches: at random, where there are several."""
        if self.batches == 1:
            return list(range(completions))
        generator = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + round_)
        return torch.randperm(completions, generator=generator).tolist()


@lru_cache(maxsize=2)
def _shuffled(num_prompts: int, seed: int, epoch: int) -> list[int]:
    """The `epoch`-th permutation of one generator, as TRL draws them."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epoch):
        torch.randperm(num_prompts, generator=generator)
    return torch.randperm(num_prompts, generator=generator).tolist()
