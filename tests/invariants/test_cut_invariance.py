"""How a step is cut changes nothing: into micro-batches by the token budget, or by the user into batch size and
accumulation. Same losses, same gradients, same weights, for rows of very different lengths and numbers of labels.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from posttrain.data.planning import plan
from posttrain.loop import total_counts
from posttrain.models.forward import Policy, open_policy
from posttrain.objectives.sft import SupervisedLoss
from posttrain.types import Sample
from tests.invariants.short_runs import End, Spec, end_state, make_trainer
from tests.tiny_batches import random_samples
from tests.tiny_models import tiny_model

NO_DROPOUT = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SPLITS = [(4, 1), (2, 2), (1, 4)]
BUDGETS = [1, 17, 40, 10_000]


def trained(folder: Path, batch_size: int, accumulation: int, budget: int, lora: bool, **arguments: Any) -> End:
    """Five steps in two epochs of ten rows, four a step: the third and the last are incomplete."""
    arguments |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": accumulation,
                  "token_budget": budget, "logging_steps": 1, "save_strategy": "no", "max_steps": 5}  # fmt: skip
    trainer = make_trainer(Spec(str(folder), lora=lora, arguments=arguments), adapter=NO_DROPOUT)
    trainer.train()
    return end_state(trainer)


def assert_close(one: End, other: End, tolerance: float) -> None:
    for name, value in other[0].items():
        if name.startswith("weight/"):
            assert (one[0][name] - value).norm() <= tolerance * value.norm() + tolerance, name
    logs = [[entry for entry in end[1]["log_history"] if entry.keys() & {"loss", "eval_loss"}] for end in (one, other)]
    assert len(logs[0]) == len(logs[1]) == 8
    for mine, yours in zip(*logs, strict=True):
        assert mine.keys() == yours.keys()
        for name in mine.keys() - {"epoch"}:
            assert mine[name] == pytest.approx(yours[name], rel=tolerance, abs=1e-7), (name, mine["step"])


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "lfm2"])
def test_every_split_and_budget_gives_the_same_run(quick: None, tmp_path: Path, family: str, lora: bool) -> None:
    """With SGD, whose steps are as exact as the gradients; learning rate and clipping are large enough to matter."""
    sgd = {"optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 1.0}
    expected = trained(tmp_path, 4, 1, 10_000, lora, **sgd)
    losses = [entry["loss"] for entry in expected[1]["log_history"] if "loss" in entry]
    assert max(losses) - min(losses) > 0.1
    for batch_size, accumulation in SPLITS:
        for budget in BUDGETS:
            assert_close(trained(tmp_path, batch_size, accumulation, budget, lora, **sgd), expected, 2e-6)


@pytest.mark.parametrize("loss", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.2}], ids=str)
def test_every_loss_and_adam(quick: None, tmp_path: Path, loss: dict[str, Any]) -> None:
    """Adam divides by gradients that are nearly zero, so rounding shows more."""
    expected = trained(tmp_path, 4, 1, 10_000, False, **loss)
    for (batch_size, accumulation), budget in zip(SPLITS, (1, 17, 40), strict=True):
        assert_close(trained(tmp_path, batch_size, accumulation, budget, False, **loss), expected, 1e-4)


# --- the same for any rows ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy() -> Policy:
    return open_policy(tiny_model("qwen3"))


def step(policy: Policy, objective: SupervisedLoss, cut: list[list[Sample]], budget: int) -> tuple[float, torch.Tensor]:
    """The loop's arithmetic over the parts of a step: its loss and the gradient of everything."""
    micro = [batch for samples in cut for batch in plan(samples, budget)]
    counts = total_counts(micro)
    loss = torch.zeros(())
    for batch in micro:
        terms, _ = objective(policy(batch, objective.needs), batch)
        part = sum(term / max(1, counts[unit]) for unit, term in terms.items())
        assert isinstance(part, torch.Tensor)
        part.backward()
        loss += part.detach()
    gradient = torch.cat([p.grad.flatten() for p in policy.model.parameters()])
    policy.model.zero_grad()
    return loss.item(), gradient


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    budget=st.integers(1, 120),
    group=st.integers(1, 8),
    loss=st.sampled_from([SupervisedLoss(), SupervisedLoss("dft"), SupervisedLoss(label_smoothing=0.1)]),
)
def test_any_rows_any_cut(
    policy: Policy, lengths: list[int], seed: int, share: float, budget: int, group: int, loss: SupervisedLoss
) -> None:
    samples = random_samples(lengths, seed, share=share)
    samples += random_samples((3,), seed, share=1.0)  # so that at least one token is supervised
    whole = step(policy, loss, [samples], 10_000)
    cut = step(policy, loss, [samples[i : i + group] for i in range(0, len(samples), group)], budget)
    assert cut[0] == pytest.approx(whole[0], rel=2e-6)
    assert (cut[1] - whole[1]).norm() <= 5e-6 * whole[1].norm()
