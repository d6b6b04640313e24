"""Every optimiser that transformers names and that runs on a CPU: TRL's numbers, and a run that goes on bit for bit.

Those that come in packages of their own are tested where that is installed (`pip install posttrain[optimizers]`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.training_args import OptimizerNames

import posttrain
from posttrain.errors import ConfigError
from tests.parity.side_by_side import CHAT_PAIRS, as_dataset, make_trainer, near, train_both

LOW_RANK = {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=2,scale=1"}
OWN = ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"]
BITSANDBYTES = [
    "adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "ademamix", "ademamix_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
]  # fmt: skip
PACKAGES = {
    "bitsandbytes": BITSANDBYTES,
    "galore_torch": ["galore_adamw", "galore_adafactor"],
    "apollo_torch": ["apollo_adamw"],
    "schedulefree": ["schedule_free_adamw", "schedule_free_radam", "schedule_free_sgd"],
    "optimi": ["stable_adamw"],
    "grokadamw": ["grokadamw"],
    "torchao": ["adamw_torch_8bit", "adamw_torch_4bit"],
}
BY_PACKAGE = [(name, package) for package, names in PACKAGES.items() for name in names]
CASES = [
    *OWN,
    *(
        pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"no {package}"))
        for name, package in BY_PACKAGE
    ),
]
IN_BACKWARD = [
    "lomo", "adalomo", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
]  # fmt: skip
OTHER_HARDWARE = ["adamw_torch_xla", "adamw_torch_npu_fused", "galore_adamw_8bit"]
NOT_ON_PYPI = ["adamw_anyprecision"]


def settings(name: str) -> dict[str, Any]:
    low_rank = LOW_RANK if name.startswith(("galore", "apollo")) else {}
    return {"optim": name, "weight_decay": 0.1, "lr_scheduler_type": "constant", **low_rank}


def test_every_name_is_accounted_for() -> None:
    known = {*OWN, *(name for name, _ in BY_PACKAGE), *IN_BACKWARD, *OTHER_HARDWARE, *NOT_ON_PYPI}
    assert known == {name.value for name in OptimizerNames}


def roughly(expected: Any) -> Any:
    """States of 8 bits: two gradients a rounding apart may fall on neighbouring codes, and on some machines they do."""
    return pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers(name: str, tmp_path: Path) -> None:
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, **settings(name))
    assert ours.numbers == (roughly if "8bit" in name else near)(theirs.numbers)


RESUMABLE = [case for case in CASES if "grokadamw" not in str(case)]


@pytest.mark.parametrize("name", RESUMABLE)
def test_a_resumed_run_is_the_undisturbed_run(name: str, tmp_path: Path) -> None:
    """In bf16 with fp32 masters, with an evaluation before and after the checkpoint."""

    def run(resume: str | None) -> Any:
        trainer = make_trainer(
            posttrain,
            tmp_path,
            CHAT_PAIRS,
            bf16=True,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=1,
            given=lambda: {"eval_dataset": as_dataset(CHAT_PAIRS)},
            **settings(name),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, resumed = run(None), run(str(tmp_path / "checkpoint-2"))
    losses = [[entry["eval_loss"] for entry in t.state.log_history if "eval_loss" in entry] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) > 1 or name == "schedule_free_radam"  # RAdam's first steps move nothing
    for (key, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), key


@pytest.mark.parametrize("name", ["schedule_free_adamw", "schedule_free_sgd"])
def test_saved_and_returned_weights_are_those_evaluated(name: str, tmp_path: Path) -> None:
    """Schedule-free optimisers train at one point and answer at another; what is kept is the answer."""
    pytest.importorskip("schedulefree")
    trainer = make_trainer(
        posttrain,
        tmp_path,
        CHAT_PAIRS,
        save_strategy="steps",
        save_steps=3,
        given=lambda: {"eval_dataset": as_dataset(CHAT_PAIRS)},
        **settings(name),
    )
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    kept = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3", dtype=torch.float32)
    for (key, a), b in zip(trainer.model.named_parameters(), kept.parameters(), strict=True):
        assert torch.equal(a, b), key
    trainer.optimizer.train()  # moves the weights to where the next gradient would be taken
    assert trainer.evaluate()["eval_loss"] == pytest.approx(after, rel=1e-6)


@pytest.mark.parametrize("name", [*IN_BACKWARD, *OTHER_HARDWARE, *NOT_ON_PYPI])
def test_refused_by_name(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(posttrain, tmp_path, CHAT_PAIRS, **settings(name))
    with pytest.raises(ConfigError, match=f"'{name}'"):
        trainer.train()


def test_an_optimiser_that_no_checkpoint_can_hold(tmp_path: Path) -> None:
    trainer = make_trainer(posttrain, tmp_path, CHAT_PAIRS, optim="grokadamw", save_strategy="steps")
    with pytest.raises(ConfigError, match="save_only_model=True"):
        trainer.train()


def test_arguments_that_do_not_suit(tmp_path: Path) -> None:
    trainer = make_trainer(posttrain, tmp_path, CHAT_PAIRS, optim="sgd", optim_args="momentum=much")
    with pytest.raises(ConfigError, match="momentum=much"):
        trainer.train()
