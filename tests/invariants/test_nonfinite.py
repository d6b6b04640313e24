"""A loss or gradient that is not a number stops the run before it touches anything: weights, optimiser and checkpoints
are bit for bit what the last good step left, and the rows at fault are named.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from posttrain import NonFiniteError
from posttrain.checkpoint import Checkpoints
from posttrain.data.batches import Order
from posttrain.optimizer_state import split_optimizer
from tests.invariants.short_runs import Spec, assert_same_end, end_state, make_trainer, rows

POISON = 260  # a token that no other row has
ORDER = Order(num_samples=10, batch_size=2, accumulation=2, seed=42)
BAD_STEP = 1  # counted from 0: a good step comes before it
BAD_ROW = ORDER.step(BAD_STEP)[2]


def poisoned_rows(*bad: int) -> list[dict[str, list[int]]]:
    data = rows()
    for row in bad:
        data[row]["input_ids"][3] = data[row]["labels"][3] = POISON
    return data


class Remember(TrainerCallback):
    """Weights and optimiser state after the last step that ended."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **kwargs: Any) -> None:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.optimizer = {name: value.clone() for name, value in split_optimizer(optimizer)[0].items()}


def assert_untouched(trainer: Any, remembered: Remember) -> None:
    weights = dict(trainer.model.named_parameters())
    assert weights.keys() == remembered.weights.keys()
    for name, value in remembered.weights.items():
        now = weights[name].to(value.dtype)
        assert torch.equal(now.isnan(), value.isnan()), name
        assert torch.equal(now.nan_to_num(), value.nan_to_num()), name
    optimizer = split_optimizer(trainer.optimizer)[0]
    assert optimizer.keys() == remembered.optimizer.keys()
    assert all(torch.equal(value, optimizer[name]) for name, value in remembered.optimizer.items())


def poison(trainer: Any, value: float) -> None:
    """One row of the embedding."""
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[POISON] = value


def failed(spec: Spec, bad: tuple[int, ...] = (BAD_ROW,), value: float = float("nan")) -> tuple[Any, Any, str]:
    """A trainer whose run failed, what it remembers, and the message."""
    remembered = Remember()
    trainer = make_trainer(spec, callbacks=(remembered,), train=poisoned_rows(*bad))
    poison(trainer, value)
    with pytest.raises(NonFiniteError) as caught:
        trainer.train()
    assert caught.value.code == "E-TRAIN-0007"
    assert caught.value.hint == "lower the learning rate, check these rows, or train in fp32 (bf16=False)"
    assert trainer.state.global_step == BAD_STEP
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    return trainer, remembered, caught.value.message


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_is_named_and_nothing_touched(quick: None, tmp_path: Path, lora: bool, value: float) -> None:
    trainer, remembered, message = failed(Spec(str(tmp_path), lora=lora), value=value)
    checkpoint = tmp_path / f"checkpoint-{BAD_STEP}"
    assert message == (
        f"step {BAD_STEP + 1}: loss became nan (batch rows train[{BAD_ROW}]). Nothing was updated; "
        f"last good checkpoint: {checkpoint}."
    )
    assert Checkpoints(tmp_path, "any").latest() == checkpoint
    assert_untouched(trainer, remembered)


def test_in_bf16_too(quick: None, tmp_path: Path) -> None:
    """The fp32 masters are those of the last checkpoint."""
    trainer, remembered, message = failed(Spec(str(tmp_path), arguments={"bf16": True}))
    assert f"(batch rows train[{BAD_ROW}])" in message
    assert_untouched(trainer, remembered)
    saved = load_file(tmp_path / f"checkpoint-{BAD_STEP}" / "model.safetensors")
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.nan_to_num(), saved[name].nan_to_num()), name


def test_without_a_checkpoint_the_message_says_so(quick: None, tmp_path: Path) -> None:
    _, _, message = failed(Spec(str(tmp_path), arguments={"save_strategy": "no"}))
    assert message.endswith("last good checkpoint: none yet; the weights are as they were before this step.")
    assert list(tmp_path.glob("checkpoint-*")) == []


def test_several_rows_in_several_micro_batches(quick: None, tmp_path: Path) -> None:
    bad = tuple(ORDER.step(BAD_STEP)[:3])
    _, _, message = failed(Spec(str(tmp_path), arguments={"token_budget": 1}), bad=bad)
    assert named(message) == set(bad)


def named(message: str) -> set[int]:
    (listed,) = re.findall(r"\(batch rows ([^)]*)\)", message)
    return {int(row) for row in re.findall(r"train\[(\d+)\]", listed)}


def test_an_infinite_gradient_names_the_whole_batch(quick: None, tmp_path: Path) -> None:
    """The loss is finite, so any of the step's rows may be at fault."""
    remembered = Remember()
    trainer = make_trainer(Spec(str(tmp_path)), callbacks=(remembered,))
    norm = trainer.model.model.norm.weight
    norm.register_hook(lambda gradient: gradient + float("inf") if trainer.state.global_step == 1 else gradient)
    with pytest.raises(NonFiniteError, match=r"step 2: gradient norm became inf .*Nothing was updated;") as caught:
        trainer.train()
    assert named(caught.value.message) == set(ORDER.step(1))
    assert_untouched(trainer, remembered)
    assert trainer.state.global_step == 1


def test_the_run_goes_on_from_the_last_good_checkpoint_once_mended(quick: None, tmp_path: Path) -> None:
    """The gradient is infinite once; resuming gives what an undisturbed run gives."""
    spec = Spec(str(tmp_path / "run"), lora=True)
    undisturbed = make_trainer(dataclasses.replace(spec, folder=str(tmp_path / "undisturbed")))
    undisturbed.train()
    trainer = make_trainer(spec)
    first = next(parameter for parameter in trainer.model.parameters() if parameter.requires_grad)
    first.register_hook(lambda gradient: gradient + float("inf") if trainer.state.global_step == 3 else gradient)
    with pytest.raises(NonFiniteError, match=r"step 4: gradient norm became inf .*/checkpoint-3\."):
        trainer.train()
    resumed = make_trainer(spec)
    resumed.train(resume_from_checkpoint=True)
    assert_same_end(end_state(resumed), end_state(undisturbed))
