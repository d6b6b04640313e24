"""How a step is to be cut and what of it is made again, so that it fits into the memory there is.

Where memory is plentiful nothing is given up for it: freed pages are kept, everything that a gradient needs, and frozen
weights in a second layout (models/laid_out.py). Where it is not, freed pages go back at once, so that the formula
(models/footprint.py) holds to a few per cent, and the least recomputation that fits is taken, with micro-batches as
large as fit. Unless there is twice what is needed, a probe, one forward and backward over arbitrary tokens, says
whether this model is what the formula takes it for. None of it changes the result.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from posttrain import native
from posttrain.models.available import parse_size, total_memory
from posttrain.models.footprint import Footprint, footprint
from posttrain.models.forward import arbitrary_batch
from posttrain.models.memory import (
    PeakGrowth,
    give_back_freed_memory,
    keep_freed_pages,
    memory_in_use,
    most_resident,
    return_freed_pages,
)
from posttrain.models.recomputation import LEVELS
from posttrain.session import Session
from posttrain.shortage import size
from posttrain.snapshot import capture_rng, restore_rng
from posttrain.types import Needs

logger = logging.getLogger("posttrain")
DEFAULT_TOKEN_BUDGET = {"cpu": 4096, "cuda": 16384}
EFFICIENT_TOKENS = 1024
"""Smaller micro-batches cost more time than recomputation does."""
SHARE = 0.9
"""Of what is there, the rest being for what else may come."""
TOLERANCE = 1.15
PROBE_TOKENS = 512
DOUBT = 2
"""Where memory would not do if the formula were wrong by this factor, a probe is made although it does."""


@dataclass(frozen=True)
class Workload:
    """Tokens of an ordinary step, of the largest one, and of the longest sequence; and bytes that sampling takes."""

    usual: int
    largest: int
    longest: int
    beside: int = 0


@dataclass(frozen=True)
class Plan:
    """`fixed` are bytes that are there all the time, `needs` the least and the most in all, `total` what there is."""

    token_budget: int
    recomputation: str
    is_tight: bool
    fixed: int
    needs: tuple[int, int]
    total: int
    limit: int

    @property
    def fits(self) -> bool:
        return self.needs[1] <= self.limit

    def __str__(self) -> str:
        low, high = (f"{value / 2**30:.1f}" for value in self.needs)
        needs = low if low == high else f"{low}-{high}"
        how = "" if self.recomputation == "none" else f", recomputation: {self.recomputation}"
        cut = f"{size(self.fixed)} all the time, up to {self.token_budget} tokens at once{how}"
        return f"needs {needs} GiB of {self.total / 2**30:.1f} GiB ({cut})"


def default_token_budget(device: torch.device) -> int:
    return DEFAULT_TOKEN_BUDGET.get(device.type, 4096)


def make_plan(
    session: Session,
    work: Workload,
    *,
    optimizer: str,
    token_budget: int | None,
    recompute: str,
    max_memory: int | str | None,
) -> Plan:
    """The plan, put into effect for `session`. `token_budget` and `recompute` (unless "auto") are the user's."""
    device = session.policy.device
    own = footprint(session.policy.base, session.trained_of_policy, set(session.lean), optimizer)
    formula = footprint(session.policy.base, session.trained, set(session.lean), optimizer)
    for beside in session.policies()[1:]:
        formula = formula.and_activations_of(footprint(beside.base, {}, set(session.lean), optimizer))
    if device.type == "cpu":
        give_back_freed_memory()  # what lies free would count as in use
    total = total_memory(device)
    limit = int(SHARE * total) if max_memory is None else min(parse_size(max_memory), total)
    levels = _levels(session, recompute)
    budget, bounds = token_budget or default_token_budget(device), (total, limit)
    excess = 1.0
    plan = _roomy(formula, work, budget, levels[0], device, bounds)
    if plan.fits and DOUBT * plan.needs[1] > limit:
        session.recompute(levels[0])
        excess = _excess(session, own, work)
    needs = _scaled(formula, excess)
    plan = _roomy(needs, work, budget, levels[0], device, bounds, session.laid_out_bytes)
    if plan.fits:
        session.lay_out()
    else:
        plan = _roomy(needs, work, budget, levels[0], device, bounds)
    if not plan.fits:
        if device.type == "cpu":
            return_freed_pages()
        session.precision.sheds_copies = True
        plan = _tight(needs, work, token_budget, levels, device, bounds)
        session.recompute(plan.recomputation)
        if (found := _excess(session, own, work)) != excess:
            excess = found
            plan = _tight(_scaled(formula, excess), work, token_budget, levels, device, bounds)
    session.recompute(plan.recomputation)
    if excess > 1:
        logger.warning("memory   this model keeps %.1f times what was expected; planned with that", excess)
    log = logger.info if plan.fits else logger.warning
    log("memory   %s%s", plan, "" if plan.fits else ": it may not fit; lower max_length or train an adapter")
    return plan


def _excess(session: Session, own: Footprint, work: Workload) -> float:
    """How many times as much the policy keeps as the formula says, by a probe; 1 where that is near enough."""
    longest = min(work.longest, PROBE_TOKENS)
    roomy = session.policy.device.type == "cpu" and not session.precision.sheds_copies
    if roomy:
        return_freed_pages()  # with freed pages kept, holes would count
    ratio = probe(session, own, [longest] * (PROBE_TOKENS // longest))
    if roomy:
        keep_freed_pages()
    return ratio if ratio > TOLERANCE else 1.0


def probe(session: Session, needs: Footprint, lengths: Sequence[int]) -> float:
    """Memory that a forward and backward over sequences of these lengths takes, over what the formula says. Nothing of
    it stays."""
    policy, rng = session.policy, capture_rng()
    with PeakGrowth(policy.device) as growth:
        outputs = policy(arbitrary_batch(policy, lengths), Needs(entropy=True))
        (outputs.logp_R if outputs.score_S is None else outputs.score_S).sum().backward()
        del outputs
        session.precision.settle()
    session.precision.drop_gradients()
    session.precision.publish()
    for parameter in session.trained.values():
        parameter.grad = None
    restore_rng(rng)
    expected = needs.step(
        session.recomputation, sum(lengths), max(lengths), 1, sheds_copies=session.precision.sheds_copies
    )
    return growth.num_bytes / max(1, expected)


def _levels(session: Session, recompute: str) -> tuple[str, ...]:
    """Those to choose from, the quickest first. Beside the gradients of all weights, and with kernels, what "selective"
    makes again takes no time that could be measured (docs/speed.md)."""
    if recompute != "auto" or session.recomputation == "full":
        return (session.recomputation,)
    levels = LEVELS if session.can_recompute_layers else LEVELS[:2]
    has_kernels = native.runs(session.policy.device, session.precision.compute_dtype)
    return levels[1:] if has_kernels and session.precision.has_copies else levels


def _roomy(
    needs: Footprint,
    work: Workload,
    budget: int,
    level: str,
    device: torch.device,
    bounds: tuple[int, int],
    more: int = 0,
) -> Plan:
    """`more` bytes are spent on speed."""
    fixed = memory_in_use(device) + needs.optimizer + work.beside + more
    low, high = (
        _step(needs, tokens, work.longest, level, budget, tight=False) for tokens in (work.usual, work.largest)
    )
    low, high = fixed + low, most_resident(fixed, high) if device.type == "cpu" else fixed + high
    return Plan(budget, level, False, fixed, (low, high), *bounds)


def _tight(
    needs: Footprint,
    work: Workload,
    asked: int | None,
    levels: tuple[str, ...],
    device: torch.device,
    bounds: tuple[int, int],
) -> Plan:
    """Levels with micro-batches of an efficient size first; then the highest with ever smaller ones."""
    fixed = memory_in_use(device) + needs.optimizer + work.beside
    most = min(asked or default_token_budget(device), max(work.largest, 1))
    least = min(most, max(work.longest, 1))
    wanted = [(level, budget) for level in levels for budget in _halves(most, min(most, max(least, EFFICIENT_TOKENS)))]
    wanted += [(levels[-1], budget) for budget in _halves(most, least)]
    for level, budget in wanted:
        both = (work.usual, work.largest)
        low, high = (fixed + _step(needs, tokens, work.longest, level, budget, tight=True) for tokens in both)
        plan = Plan(budget, level, True, fixed, (low, high), *bounds)
        if plan.fits:
            break
    return plan


def _halves(most: int, least: int) -> list[int]:
    steps = math.floor(math.log2(most / least)) if most > least else 0
    return [*(most >> i for i in range(steps + 1)), *([least] if most >> steps != least else [])]


def _step(needs: Footprint, tokens: int, longest: int, level: str, budget: int, *, tight: bool) -> int:
    """A micro-batch is never smaller than the longest sequence."""
    micro_batches = math.ceil(tokens / budget)
    return needs.step(level, min(tokens, max(budget, longest)), longest, micro_batches, sheds_copies=tight)


def _scaled(needs: Footprint, ratio: float) -> Footprint:
    if ratio == 1:
        return needs

    def times(values: Mapping[str, float]) -> dict[str, float]:
        return {name: value * ratio for name, value in values.items()}

    return dataclasses.replace(needs, kept=times(needs.kept), weights=times(needs.weights), layer=needs.layer * ratio)
