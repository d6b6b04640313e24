"""A source of batches that are sampled as training goes: prompts → completions → rewards → advantages → batches.

To the loop it is a source like any other. When a step comes that begins a round, its prompts are sampled by the engine
(or by the user's `rollout_func`), the rewards are asked, and what the loss needs of older policies is computed; what
cannot move a weight is left out. A round that several steps learn from is kept, and saved with a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch

from posttrain.data.planning import OF_TOKENS, PLAIN, Packing, plan
from posttrain.data.prompts import Prompt
from posttrain.errors import Stopped
from posttrain.objectives.base import Metrics
from posttrain.rollout.advantages import Advantages, OfRound
from posttrain.rollout.entropy_control import EntropyControl
from posttrain.rollout.fitting import RowsAtOnce
from posttrain.rollout.generation import Generation, Rollout, grouped, together
from posttrain.rollout.kl_control import KLControl
from posttrain.rollout.order import Rounds
from posttrain.rollout.scoring import Judge, Verdict
from posttrain.types import Batch, Sample

Ask = Callable[[Batch], tuple[torch.Tensor, ...]]
"""A batch in; numbers of its supervised rows out, without gradient."""


class Sampler(Protocol):
    """The completions of these prompts (places in the data), `count` of each, with random numbers that follow from
    `key`. Raises Stopped."""

    def __call__(self, places: Sequence[int], count: int, key: int, stopped: Callable[[], bool]) -> list[Rollout]: ...


@dataclass(frozen=True)
class Learning:
    """What a step learns from. `whole_batches`: the batches that the user's batch size names are kept, for losses that
    are no sums. `skips_indifferent`: completions without an advantage, which add nothing to the gradient, are not
    computed; `skips_truncated`: nor are those that were cut off, which do not count among the tokens then either.
    `own_tokens`: the unit is the step's own tokens; otherwise, as in TRL's GRPO, those of a mean batch of its round."""

    whole_batches: bool = False
    skips_indifferent: bool = True
    skips_truncated: bool = False
    own_tokens: bool = False


@dataclass(frozen=True)
class Resampling:
    """DAPO's dynamic sampling (arXiv 2503.14476, section 3.2): with `leaves_out` groups without signal are no part of a
    step, nor of what its loss is divided by; other prompts are sampled in their place, up to `attempts` times."""

    leaves_out: bool = False
    attempts: int = 0
    seed: int = 0


NO_RESAMPLING = Resampling()
NO_ADVANTAGE = 1e-6
NOTHING = Advantages(np.zeros(0), np.zeros(0), 1.0)
KEYS_OF_A_ROUND = 2**24
"""Groups that a round may number."""


@dataclass
class RolloutSource:
    """`advantages` turns a round's rewards into advantages; with `logps_first` it is told what the policy and the
    reference said of every completion. `ask_policy` and `ask_reference` answer for the session that trains, with what
    `of_policy` names and with log-probabilities; `log` is told of every round: its rollouts with their verdict; `kl`
    adapts to every round, `entropy` to every step; `rows` are what sampling in this process has come down to."""

    prompts: Sequence[Prompt]
    rounds: Rounds
    count: int
    sample: Sampler
    judge: Judge
    advantages: Callable[[np.ndarray, Sequence[Rollout]], Advantages]
    learning: Learning
    token_budget: int
    packing: Packing = PLAIN
    needs_old: bool = False
    needs_reference: bool = False
    logps_first: bool = False
    resampling: Resampling = NO_RESAMPLING
    log: Callable[[Generation, Verdict, int], None] | None = None
    of_policy: tuple[str, ...] = ("old_logp_R",)
    kl: KLControl | None = None
    entropy: EntropyControl | None = None
    rows: RowsAtOnce | None = None
    ask_policy: Ask | None = None
    ask_reference: Ask | None = None
    report: Callable[[Metrics], None] = lambda metrics: None
    stopped: Callable[[], bool] = lambda: False
    _held: dict[int, Generation] = field(default_factory=dict)
    _kl_before: tuple[int, float] = (-1, 0.0)

    @property
    def steps_per_epoch(self) -> int:
        return self.rounds.steps_per_epoch

    def epoch_after(self, step: int) -> float:
        return self.rounds.epoch_after(step)

    def tokens(self, step: int, micro: list[Batch]) -> int:
        """Of the prompts and completions that were sampled for it, as TRL counts."""
        fresh = {number for number, _ in self.rounds.step(step) if self._begins(number, step)}
        return sum(self._held[number].tokens_sampled for number in fresh)

    # --- batches ------------------------------------------------------------------------------------------------------

    def micro_batches(self, step: int) -> list[Batch]:
        """Raises Stopped where a signal came while completions were sampled."""
        dealt = self.rounds.step(step)
        self._held = {number: one for number, one in self._held.items() if number in {round_ for round_, _ in dealt}}
        for number in dict.fromkeys(round_ for round_, _ in dealt):
            if number not in self._held:
                places = self.rounds.prompts(number)
                self._held[number] = self._generate(number, step, places, number * KEYS_OF_A_ROUND)
            if self._begins(number, step):
                self.report({name: (torch.tensor(s), n) for name, (s, n) in self._held[number].metrics.items()})
        slices = [(self._held[number], self._held[number].slice(batch, self.rounds.batches)) for number, batch in dealt]
        return self._whole(slices) if self.learning.whole_batches else self._joined(slices)

    def every_round(self) -> range:
        """Of one pass over the prompts, with a smaller last round for those that fill none."""
        return range(-(-self.rounds.num_prompts // self.rounds.prompts_per_round))

    def places_of(self, number: int) -> range:
        """Of the prompts of round `number` in the data's own order."""
        size = self.rounds.prompts_per_round
        return range(number * size, min((number + 1) * size, self.rounds.num_prompts))

    def batches_of(self, number: int) -> list[Batch]:
        """Those of round `number` in the data's own order. What is said once of a round counts for each prompt in
        it."""
        places = self.places_of(number)
        generation = self._generate(number, 0, places, places.start)
        for name, one in generation.metrics.items():
            weight = len(places) if isinstance(one, OfRound) else 1
            self.report({name: (torch.tensor(one[0] * weight), one[1] * weight)})
        slices = [(generation, generation.slice(0, 1))]
        return self._whole(slices) if self.learning.whole_batches else self._joined(slices)

    def _begins(self, number: int, step: int) -> bool:
        return step == 0 or number not in {round_ for round_, _ in self.rounds.step(step - 1)}

    def _joined(self, slices: list[tuple[Generation, list[Rollout]]]) -> list[Batch]:
        """One pool for the whole step, cut as memory wants it. Where several rounds come together in a step, each has
        the same weight in means over tokens, as in TRL."""
        counts = {"tokens": self._tokens(slices), **self._whole_counts(slices)}
        weights = self._weights(slices)
        made = []
        for one in {generation.index: generation for generation, _ in slices}.values():
            mine = [members for generation, members in slices if generation is one]
            batches = self._planned([rollout for members in mine for rollout in members if self._teaches(rollout)])
            made += [batch.with_columns(**weights.get(one.index, {})) for batch in batches]
        return _counted(made, counts)

    def _whole(self, slices: list[tuple[Generation, list[Rollout]]]) -> list[Batch]:
        """A batch for each that the user's batch size names, for losses that are no sums; `batch_tokens` are its own.
        Means over tokens are those of `_joined`."""
        weights = self._weights(slices)
        made = []
        for generation, members in slices:
            used = [one for one in members if self._teaches(one)]
            if not used:
                continue
            (batch,) = self._planned(used, whole=True)
            own = {"batch_tokens": sum(one.num_rows for one in members),
                   **dict.fromkeys(("tokens", "batches", "sequences", "all_tokens", "left_out"), 0)}  # fmt: skip
            batch = batch.with_columns(**weights.get(generation.index, {}))
            made.append(replace(batch, counts=own, can_be_cut=False))
        counted = [members for _, members in slices if members or not self.resampling.leaves_out]
        totals = {"tokens": self._tokens(slices), "batches": len(counted), **self._whole_counts(slices)}
        if made:
            made[0] = replace(made[0], counts={**made[0].counts, **totals})
        return made

    def _whole_counts(self, slices: list[tuple[Generation, list[Rollout]]]) -> dict[str, float]:
        """Of all completions of the step, those among them that teach nothing and are not computed."""
        members = [one for _, members in slices for one in members]
        left_out = sum(one.num_rows > 0 and not self._teaches(one) for one in members)
        tokens = sum(one.num_rows for one in members)
        return {"sequences": len(members), "all_tokens": tokens, "left_out": left_out}

    def _tokens(self, slices: list[tuple[Generation, list[Rollout]]]) -> float:
        """What means over tokens are divided by."""
        if self.learning.own_tokens:
            return sum(one.num_rows for _, members in slices for one in members)
        return sum(generation.num_tokens / self.rounds.batches for generation, _ in slices)

    def _weights(self, slices: list[tuple[Generation, list[Rollout]]]) -> dict[int, dict[str, torch.Tensor]]:
        """A column for each of several rounds that come together in a step: it weighs what their tokens say, so that
        each round counts alike."""
        generations = [generation for generation, _ in slices]
        if len({one.index for one in generations}) == 1 or self.resampling.leaves_out:
            return {}
        share = self._tokens(slices) * self.rounds.batches / len(slices)
        return {one.index: {"round_weight": torch.tensor(share / max(one.num_tokens, 1))} for one in generations}

    def _teaches(self, one: Rollout) -> bool:
        return one.num_rows > 0 and not (self.learning.skips_indifferent and one.advantage == 0)

    def _planned(self, used: list[Rollout], whole: bool = False) -> list[Batch]:
        if not used:
            return []
        budget = 2**62 if whole else self.token_budget
        parts = [together(members, self.prompts[members[0].prompt]) for members in grouped(used, budget)]
        known = (name for name in OF_TOKENS if all(name in part.columns for part in parts))
        packing = replace(self.packing, group_size=None, columns=("advantage", *known))
        return plan([(part,) for part in parts], budget, packing)

    # --- a round ------------------------------------------------------------------------------------------------------

    def _generate(self, number: int, step: int, places: Sequence[int], key: int) -> Generation:
        """Random numbers follow from `key`, counted up from group to group."""
        sampled, said, seconds = self._judged(places, key)
        kept = list(range(len(sampled)))
        replaced: dict[str, tuple[float, int]] = {}
        if self.resampling.leaves_out:
            sampled, said, kept, replaced = self._with_signal(sampled, said, places, number)
        rollouts, verdict = [sampled[i] for i in kept], said.part(kept)
        lengths, tokens = _lengths(sampled), sum(len(one.prompt_ids) + one.num_rows for one in sampled)
        for one in rollouts:
            if self.learning.skips_truncated and not one.is_ended:
                one.supervised = np.zeros_like(one.supervised)
                one.sampled_logp_R = None
        if self.logps_first:
            self._annotate([one for one in rollouts if one.num_rows])
        worth = self.advantages(verdict.rewards_NF, rollouts) if rollouts else NOTHING
        for one, advantage in zip(rollouts, worth.value_N.tolist(), strict=True):
            one.advantage = advantage
        for one, (advantage_R, return_R) in zip(rollouts, worth.tokens or (), strict=bool(worth.tokens)):
            one.advantage_R, one.return_R = advantage_R.astype(np.float32), return_R.astype(np.float32)
        if self.kl is not None:
            self._kl_before = number, self.kl.coef
            self.kl.follow(worth.divergence, len(rollouts))
        if not self.logps_first:
            self._annotate([one for one in rollouts if self._teaches(one)])
        generation = Generation(number, rollouts, self.rounds.deal(number, len(rollouts)), tokens)
        followed = worth if len(kept) == len(sampled) else self.advantages(said.rewards_NF, sampled)
        generation.metrics = {**said.metrics(followed), **lengths, **replaced, **seconds}
        if self.log is not None:
            self.log(Generation(number, sampled, []), said, step)
        return generation

    def _judged(self, places: Sequence[int], key: int) -> tuple[list[Rollout], Verdict, dict[str, tuple[float, int]]]:
        """Completions of these prompts, what the rewards say of them, and how long both took."""
        started = time.monotonic()
        rollouts = self.sample(places, self.count, key, self.stopped)
        sampled = time.monotonic()
        verdict = self.judge(rollouts)
        took = max(sampled - started, 1e-9)
        return rollouts, verdict, {
            "sampling/seconds": OfRound(took),
            "sampling/tokens_per_second": OfRound(sum(len(one.ids) for one in rollouts) / took),
            "rewards/seconds": OfRound(time.monotonic() - sampled),
        }  # fmt: skip

    def _with_signal(
        self, rollouts: list[Rollout], verdict: Verdict, places: Sequence[int], number: int
    ) -> tuple[list[Rollout], Verdict, list[int], dict[str, tuple[float, int]]]:
        """All that was sampled, of these prompts and of others in the place of those that teach nothing, and which of
        it is kept."""
        wanted, asked = len(places), len(places)
        kept = self._teaching(rollouts, verdict)
        for attempt in range(1, self.resampling.attempts + 1):
            missing = wanted - len(kept) // self.count
            if not missing:
                break
            others = self._others(places, missing, number, attempt)
            key = number * KEYS_OF_A_ROUND + asked
            more, said, _ = self._judged(others, key)
            for one in more:
                one.group += asked
            asked += len(others)
            kept += [len(rollouts) + i for i in self._teaching(more, said)]
            rollouts, verdict = rollouts + more, verdict.and_(said)
        left = len(kept) // self.count
        metrics: dict[str, tuple[float, int]] = {
            "dynamic_sampling/groups_sampled": OfRound(float(asked)),
            "dynamic_sampling/groups_kept": OfRound(float(left)),
        }
        return rollouts, verdict, kept, metrics

    def _others(self, places: Sequence[int], count: int, number: int, attempt: int) -> list[int]:
        """Other prompts of the data, at random."""
        generator = np.random.default_rng([self.resampling.seed, number, attempt])
        rest = np.setdiff1d(np.arange(len(self.prompts)), places)
        return generator.permutation(rest if len(rest) >= count else np.arange(len(self.prompts)))[:count].tolist()

    def _teaching(self, rollouts: list[Rollout], verdict: Verdict) -> list[int]:
        """Those of whole groups in which one completion is worth more than another: in sum, or by what is made of the
        rewards one by one."""
        worth = self.advantages(verdict.rewards_NF, rollouts)
        differs_N = np.abs(np.nan_to_num(worth.value_N)) > NO_ADVANTAGE
        trains_N = np.array([one.is_ended or not self.learning.skips_truncated for one in rollouts], dtype=bool)
        groups = [slice(first, first + self.count) for first in range(0, len(rollouts), self.count)]
        return [
            i
            for part in groups
            if (differs_N & trains_N)[part].any() or (trains_N[part].all() and _differ(worth.reward_N[part]))
            for i in range(part.start, part.stop)
        ]

    def _annotate(self, used: list[Rollout]) -> None:
        """What the policy and the reference say of every token that may be trained, as far as it is needed."""
        if self.needs_old:
            self._ask(used, self.of_policy, self.ask_policy)
        if self.needs_reference:
            self._ask(used, ("ref_logp_R",), self.ask_reference)

    def _ask(self, used: list[Rollout], names: tuple[str, ...], ask: Ask | None) -> None:
        assert ask is not None
        groups = grouped(used, self.token_budget)
        samples: list[Sample] = [(together(members, self.prompts[members[0].prompt]),) for members in groups]
        packing = replace(self.packing, group_size=None, columns=())
        for batch in plan(samples, self.token_budget, packing) if samples else ():
            if self.stopped():
                raise Stopped
            answers, sequence_R = [one_R.float().cpu().numpy() for one_R in ask(batch)], batch.sequence_R.cpu().numpy()
            members = (one for sample in dict.fromkeys(batch.sample_S) for one in groups[sample])
            for sequence, one in enumerate(members):
                for name, answer_R in zip(names, answers, strict=True):
                    setattr(one, name, answer_R[sequence_R == sequence])

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state(self, position: int) -> dict[str, Any]:
        """Rounds that step `position` goes on learning from. One that it begins is sampled again, with the random state
        from before it."""
        dealt = {round_ for round_, _ in self.rounds.step(position)} if self.rounds.rounds_per_epoch else set()
        wanted = {number for number in dealt if not self._begins(number, position)}
        state: dict[str, Any] = {"rounds": [one.state() for number, one in self._held.items() if number in wanted]}
        if self.rows is not None:
            state |= self.rows.state()
        if self.entropy is not None:
            state["entropy"] = self.entropy.state()
        if self.kl is None:
            return state
        begun, before = self._kl_before
        sampled_again = begun in dealt - wanted and begun in self._held
        return {**state, "kl_coef": before if sampled_again else self.kl.coef}

    def load_state(self, state: dict[str, Any]) -> None:
        generations = [Generation.from_state(one) for one in state.get("rounds", [])]
        self._held = {one.index: one for one in generations}
        if self.rows is not None:
            self.rows.load_state(state)
        if self.kl is not None and "kl_coef" in state:
            self.kl.coef = state["kl_coef"]
        if self.entropy is not None and "entropy" in state:
            self.entropy.load_state(state["entropy"])


def _counted(batches: list[Batch], counts: dict[str, float]) -> list[Batch]:
    """The step's counts, which include what was left out, on the first batch."""
    nothing = dict.fromkeys(counts, 0)
    return [replace(batch, counts=counts if batch is batches[0] else nothing) for batch in batches]


def _differ(reward_K: np.ndarray) -> bool:
    said = reward_K[~np.isnan(reward_K)]
    return len(said) > 1 and not np.isclose(said.std(), 0)


def _lengths(rollouts: Sequence[Rollout]) -> dict[str, tuple[float, int]]:
    """TRL's metrics of how long completions are, and how many were cut off."""
    if not rollouts:
        return {}
    length_N = np.array([one.num_rows for one in rollouts], dtype=np.float64)
    ended_N = length_N[[one.is_ended for one in rollouts]]
    whole_N = ended_N if len(ended_N) else np.zeros(1)
    return {
        "completions/mean_length": (float(length_N.sum()), len(length_N)),
        "completions/min_length": OfRound(float(length_N.min())),
        "completions/max_length": OfRound(float(length_N.max())),
        "completions/clipped_ratio": (float(len(length_N) - len(ended_N)), len(length_N)),
        "completions/mean_terminated_length": OfRound(float(whole_N.mean())),
        "completions/min_terminated_length": OfRound(float(whole_N.min())),
        "completions/max_terminated_length": OfRound(float(whole_N.max())),
    }
