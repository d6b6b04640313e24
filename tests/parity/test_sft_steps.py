"""Step after step the same as TRL 1.16: optimisers, schedules, order of the samples, accumulation, logging, streams."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.trainer
from peft import LoraConfig
from transformers import TrainerCallback

import posttrain
from tests.parity.side_by_side import (
    AVERAGES,
    CHAT_PAIRS,
    CHATS,
    TOKENS,
    Rows,
    as_dataset,
    assert_same,
    check,
    datasets,
    near,
    numbers_of_theirs,
    train,
    train_both,
    trl,
)
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


# --- optimisers and schedules ---------------------------------------------------------------------------------------


def schedule(name: str, warmup_steps: float = 0, **kwargs: Any) -> dict[str, Any]:
    return {"lr_scheduler_type": name, "warmup_steps": warmup_steps, "lr_scheduler_kwargs": kwargs}


SGD = {"optim": "sgd", "learning_rate": 0.1}
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "weight decay": ({"weight_decay": 0.3}, {}),
    "weight decay, sgd": ({"weight_decay": 0.3}, SGD),
    "betas": ({"adam_beta1": 0.5, "adam_beta2": 0.6}, {}),
    "epsilon": ({"adam_epsilon": 1e-8}, {}),
    "sgd": ({"optim": "sgd"}, {"learning_rate": 0.1}),
    "sgd, momentum": ({"optim_args": "momentum=0.9"}, SGD),
    "adafactor": ({"optim": "adafactor"}, {}),
    "rmsprop": ({"optim": "rmsprop"}, {}),
    "adagrad": ({"optim": "adagrad"}, {}),
    "no clipping": ({"max_grad_norm": 0.0}, SGD),
    "clipping": ({"max_grad_norm": 0.05}, SGD),
    "linear": (schedule("linear", warmup_steps=1), {}),
    "linear, share of warm-up": (schedule("linear", warmup_steps=0.5), {}),
    "constant": (schedule("constant"), {}),
    "constant with warm-up": (schedule("constant_with_warmup", warmup_steps=2), {}),
    "cosine": (schedule("cosine"), {}),
    "cosine with restarts": (schedule("cosine_with_restarts", num_cycles=2), {}),
    "cosine with a floor": (schedule("cosine_with_min_lr", min_lr=1e-3), {}),
    "cosine, warm-up, floor": (schedule("cosine_warmup_with_min_lr", warmup_steps=2, min_lr=1e-3), {}),
    "polynomial": (schedule("polynomial", power=2, lr_end=1e-3), {}),
    "inverse square root": (schedule("inverse_sqrt", warmup_steps=1), {}),
    "warm-up, stable, decay": (schedule("warmup_stable_decay", warmup_steps=1, num_decay_steps=2), {}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name: str, tmp_path: Path) -> None:
    option, rest = OPTIONS[name]
    theirs = check(tmp_path, CHAT_PAIRS, max_steps=4, **rest, **option)
    assert theirs.numbers != near(numbers_of_theirs(tmp_path, CHAT_PAIRS, max_steps=4, **rest))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_adamw(optim: str, tmp_path: Path) -> None:
    check(tmp_path, CHAT_PAIRS, optim=optim, weight_decay=0.1)


def test_weight_decay_of_adapters(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        return {"peft_config": LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"])}

    check(tmp_path, CHAT_PAIRS, weight_decay=0.5, given=given)


@pytest.mark.parametrize(("name", "more"), [("reduce_lr_on_plateau", {"threshold": 0.5}), ("greedy", {})])
def test_a_schedule_that_follows_the_evaluation(name: str, more: dict[str, float], tmp_path: Path) -> None:
    theirs = check(
        tmp_path,
        CHAT_PAIRS,
        **schedule(name, patience=0, factor=0.5, **more),
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=1,
        max_steps=6,
        **SGD,
        given=lambda: {"eval_dataset": as_dataset(CHATS)},
    )
    assert len({entry["learning_rate"] for entry in theirs.history if "loss" in entry}) > 1


def test_an_optimiser_by_class(tmp_path: Path) -> None:
    check(tmp_path, CHAT_PAIRS, given=lambda: {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 0.02})})


def test_an_optimiser_and_a_schedule_of_ones_own(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        model = tiny_model("llama", len(chatml_tokenizer()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
        return {"model": model, "optimizers": (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))}

    check(tmp_path, CHAT_PAIRS, given=given)


# --- which samples, when --------------------------------------------------------------------------------------------

STEPS: dict[str, dict[str, Any]] = {
    "epochs": {"per_device_train_batch_size": 4, "num_train_epochs": 2},
    "part of an epoch": {"per_device_train_batch_size": 2, "num_train_epochs": 0.5},
    "an epoch and a part": {"per_device_train_batch_size": 2, "num_train_epochs": 1.3},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 3},
    "accumulated, short": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 2},
    "more than there is": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 9, "num_train_epochs": 2},
    "last dropped": {"per_device_train_batch_size": 4, "num_train_epochs": 2, "dataloader_drop_last": True},
    "last dropped, accumulated": {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "dataloader_drop_last": True,
    },
    "seed": {"per_device_train_batch_size": 2, "max_steps": 8, "seed": 7},
    "data_seed": {"per_device_train_batch_size": 2, "max_steps": 8, "data_seed": 7},
    "sequential": {"per_device_train_batch_size": 2, "max_steps": 8, "train_sampling_strategy": "sequential"},
    "logged now and then": {
        "per_device_train_batch_size": 2,
        "max_steps": 7,
        "logging_steps": 2,
        "logging_first_step": True,
    },
    "logged by share": {"per_device_train_batch_size": 2, "max_steps": 8, "logging_steps": 0.3},
    "logged every epoch": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 2,
        "logging_strategy": "epoch",
    },
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_rows_of_many_lengths(name: str, tmp_path: Path) -> None:
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, **STEPS[name])
    assert_same(ours, theirs, leaving_out=AVERAGES)


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_rows_of_one_length(name: str, tmp_path: Path) -> None:
    ours, theirs = train_both(tmp_path, TOKENS, **STEPS[name])
    assert_same(ours, theirs)


def test_averages_are_over_the_tokens_of_a_step(tmp_path: Path) -> None:
    """Whatever it was cut into: those that TRL gives for a step in one piece."""
    cut = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}
    assert_same(train(posttrain, tmp_path, CHAT_PAIRS, **cut), train(trl, tmp_path, CHAT_PAIRS))


def test_grouped_by_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers groups by whatever numbers its process draws next; given ours, the groups are the same."""
    generator = torch.Generator().manual_seed(42)
    sampler = partial(transformers.trainer.LengthGroupedSampler, generator=generator)
    monkeypatch.setattr(transformers.trainer, "LengthGroupedSampler", sampler)
    rows = [{"input_ids": row["input_ids"][: 3 + 7 * i % 9]} for i, row in enumerate(TOKENS * 3)]
    grouped = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 1, "per_device_train_batch_size": 2}
    check(tmp_path, rows, learning_rate=1e-3, **grouped)


def test_a_stream(tmp_path: Path) -> None:
    stream = as_dataset(CHAT_PAIRS).to_iterable_dataset()
    assert isinstance(stream, datasets.IterableDataset)
    check(tmp_path, stream, per_device_train_batch_size=2, max_steps=3)


def test_a_stream_that_begins_again(tmp_path: Path) -> None:
    """transformers counts every pass over a stream as an epoch of `max_steps` batches (3 steps of 8: epoch 0.375, the
    4th: 1.125); here the whole run is one."""
    stream = as_dataset(CHAT_PAIRS).to_iterable_dataset()
    ours, theirs = train_both(tmp_path, stream, per_device_train_batch_size=2, max_steps=8)
    assert_same(ours, theirs, leaving_out=["epoch"])
    assert ours.history[3]["epoch"] == 0.5
    assert theirs.history[3]["epoch"] == 1.125


# --- noise ----------------------------------------------------------------------------------------------------------


class Reseed(TrainerCallback):
    """The same random numbers for both from the same step on: what they drew before differs."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        torch.manual_seed(state.global_step)


@pytest.mark.parametrize("rows", [TOKENS, [{"input_ids": row["input_ids"] * 3} for row in TOKENS]], ids=["12", "36"])
@pytest.mark.parametrize("is_adapter", [False, True])
def test_neftune(is_adapter: bool, rows: Rows, tmp_path: Path) -> None:
    """Rows of one length: padding would shift TRL's noise, and enter its size."""

    def given() -> dict[str, Any]:
        adapter = {"peft_config": LoraConfig(r=4, target_modules="all-linear")} if is_adapter else {}
        return {"callbacks": [Reseed()], **adapter}

    theirs = check(tmp_path, rows, given=given, neftune_noise_alpha=5.0)
    assert theirs.numbers != near(numbers_of_theirs(tmp_path, rows))
