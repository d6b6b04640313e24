"""Adaptive weight of a bonus for uncertainty, beside the rule of its paper."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.objectives.policy import ACTING
from posttrain.rollout.entropy_control import EntropyControl


def follow(control: EntropyControl, entropy: float, tokens: int = 8) -> float:
    logged = control.follow({ACTING: (entropy * tokens, tokens), "entropy": (99.0, 1)})
    return float(logged["entropy_coef"][0])


def test_control_follows_skywork() -> None:
    """arXiv 2505.22312: a step of `delta` after each step; no bonus while the last entropy is above the target."""
    control = EntropyControl(0.01, low=0.0, high=0.03, delta=0.01, target=0.5)
    assert control.applied == 0.0  # nothing is known yet
    steps = [(0.5, 0.02), (0.4, 0.03), (0.1, 0.03), (0.6, 0.02), (0.7, 0.01), (0.7, 0.0), (0.7, 0.0), (0.2, 0.01)]
    for entropy, coef in steps:
        assert follow(control, entropy) == pytest.approx(coef)
        assert control.applied == (pytest.approx(coef) if entropy <= 0.5 else 0.0)
    control.restart()
    assert (control.coef, control.applied) == (0.01, 0.0)


def test_a_step_without_tokens_moves_nothing() -> None:
    control = EntropyControl(0.01, target=0.5)
    follow(control, 0.3)
    before = control.state()
    control.follow({})
    control.follow({ACTING: (0.0, 0.0)})
    assert control.state() == before


@pytest.mark.parametrize("entropy", [None, 0.25])
def test_its_state_is_plain_and_comes_back(entropy: float | None) -> None:
    control, other = EntropyControl(0.01, target=0.5), EntropyControl(0.7, target=0.5)
    if entropy is not None:
        follow(control, entropy)
    state = control.state()
    assert all(value is None or (isinstance(value, float) and math.isfinite(value)) for value in state.values())
    other.load_state(state)
    assert (other.coef, other.last, other.applied) == (control.coef, control.last, control.applied)
    assert isinstance(follow(other, 0.1), float)
    assert torch.is_tensor(other.follow({})["entropy_coef"][0])
