"""The supervised losses beside their formulas, in float64, from log-probabilities to the gradient of the logits."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from posttrain.models.head import HeadShape, token_logps
from posttrain.objectives.sft import LOSSES, SupervisedLoss
from posttrain.types import Outputs
from tests.tiny_batches import random_batch

BATCH = random_batch((9, 4, 14))
ROWS, VOCABULARY = len(BATCH.rows_R), 97


def logits() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (2 * torch.randn(ROWS, VOCABULARY, generator=generator, dtype=torch.float64)).requires_grad_()


def summed(loss: SupervisedLoss, z_RV: torch.Tensor) -> torch.Tensor:
    """Our loss over logits: an identity matrix is the head's weight."""
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    terms, _ = loss(token_logps(z_RV, identity, None, BATCH.target_R, HeadShape(), loss.needs), BATCH)
    assert terms.keys() == {"tokens"}
    return terms["tokens"]


def test_nll_is_cross_entropy() -> None:
    ours, theirs = logits(), logits()
    summed(SupervisedLoss("nll"), ours).backward()
    expected = cross_entropy(theirs, BATCH.target_R, reduction="sum")
    expected.backward()
    assert summed(SupervisedLoss("nll"), ours).item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


def test_dft_weighs_by_a_probability_held_constant() -> None:
    """Equation 9 of arXiv 2508.05629: the stop-gradient is what makes it differ from -p log p."""
    ours, theirs, unstopped = logits(), logits(), logits()
    summed(SupervisedLoss("dft"), ours).backward()
    p_R = theirs.softmax(-1)[range(ROWS), BATCH.target_R]
    expected = -(p_R.detach() * p_R.log()).sum()
    expected.backward()
    assert summed(SupervisedLoss("dft"), ours).item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)
    q_R = unstopped.softmax(-1)[range(ROWS), BATCH.target_R]
    (-(q_R * q_R.log()).sum()).backward()
    assert (ours.grad - unstopped.grad).norm() > 0.1 * ours.grad.norm()


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_torch_s(smoothing: float) -> None:
    ours, theirs = logits(), logits()
    loss = SupervisedLoss("nll", smoothing)
    assert loss.needs.uniform_logp
    summed(loss, ours).backward()
    expected = cross_entropy(theirs, BATCH.target_R, reduction="sum", label_smoothing=smoothing)
    expected.backward()
    assert summed(loss, ours).item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", LOSSES)
def test_a_likelier_token_never_costs_more_where_it_is_likely(name: str) -> None:
    """Certainty costs nothing; a token without any chance costs nothing under `dft` alone."""
    values = LOSSES[name](torch.tensor([0.0, -1.0, -40.0]))
    assert values[0] == 0
    assert values[1].item() == pytest.approx({"nll": 1.0, "dft": 0.36787944}[name])
    assert values[2].item() == pytest.approx({"nll": 40.0, "dft": 0.0}[name], abs=1e-6)


def test_metrics_are_sums_with_their_counts() -> None:
    right = torch.arange(ROWS) % 3 == 0
    outputs = Outputs(torch.full((ROWS,), -1.0), right, entropy_R=torch.full((ROWS,), 0.5))
    terms, metrics = SupervisedLoss()(outputs, BATCH)
    assert terms["tokens"].item() == ROWS
    assert BATCH.counts["tokens"] == ROWS
    assert (int(metrics["mean_token_accuracy"][0]), metrics["mean_token_accuracy"][1]) == (int(right.sum()), ROWS)
    assert (float(metrics["entropy"][0]), metrics["entropy"][1]) == (0.5 * ROWS, ROWS)


def test_without_smoothing_nothing_is_asked_of_the_vocabulary() -> None:
    assert SupervisedLoss().needs.uniform_logp is False
    assert SupervisedLoss().needs.entropy is True
