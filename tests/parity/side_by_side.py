"""Train the same rows, model and settings with posttrain and with TRL 1.16, and compare all that both report.

The whole data set is the batch and every step is logged, unless a test asks for something else. Numbers agree to 1e-5
relative in fp32: what is left is the order of additions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import pytest
import trl
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

import posttrain
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

datasets.disable_progress_bars()

RELATIVE = 1e-5
TIMES = re.compile(r"runtime|per_second|preparation_time|total_flos")  # transformers counts FLOPs more coarsely
AVERAGES = ("mean_token_accuracy", "entropy")

Rows = Sequence[Mapping[str, Any]]
TEXTS = [{"text": f"The capital of France is {'Paris and ' * (i % 3)}number {i}."} for i in range(6)]
PAIRS = [
    {"prompt": f"What is {i} plus two? " * (1 + i % 2), "completion": f"It is {i + 2}." * (1 + i % 3)} for i in range(6)
]
CHAT_PAIRS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in PAIRS
]
CHATS = [
    {"messages": [*one["prompt"], *one["completion"], *other["prompt"], *other["completion"]]}
    for one, other in zip(CHAT_PAIRS, CHAT_PAIRS[::-1], strict=True)
]
TOKENS = [{"input_ids": [5 + (37 * i + 11 * j * j) % 250 for j in range(12)]} for i in range(10)]
"""Rows of the same length, for where a mean of means is to be a mean."""


@dataclass(frozen=True)
class Trained:
    """A trainer after `train()`, and what that returned."""

    trainer: Any
    result: TrainOutput

    @property
    def history(self) -> list[dict[str, float]]:
        """The log, without times."""
        return [
            {name: value for name, value in entry.items() if not TIMES.search(name)}
            for entry in self.trainer.state.log_history
        ]


def trainer_of(
    library: ModuleType,
    folder: Path,
    rows: Any,
    model: str | Callable[[int], PreTrainedModel] = "llama",
    tokenizer: Callable[[], PreTrainedTokenizerBase] = chatml_tokenizer,
    given: Callable[[], dict[str, Any]] = dict,
    **args: Any,
) -> Any:
    """The library's `SFTTrainer`. `model` is a family or makes a model for so many tokens; `given` makes arguments of
    the trainer, which two trainers must not share."""
    defaults = {
        "per_device_train_batch_size": len(rows) if hasattr(rows, "__len__") else 2,
        "max_steps": -1 if "num_train_epochs" in args else 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    words = tokenizer()
    options = {"processing_class": words, "args": library.SFTConfig(str(folder), **{**defaults, **args}), **given()}
    made = tiny_model(model, len(words)) if isinstance(model, str) else model(len(words))
    return library.SFTTrainer(made, train_dataset=as_dataset(rows), **options)


def as_dataset(rows: Any) -> Any:
    return datasets.Dataset.from_list(list(rows)) if isinstance(rows, list) else rows


def train(library: ModuleType, folder: Path, rows: Any, **settings: Any) -> Trained:
    trainer = trainer_of(library, folder / library.__name__, rows, **settings)
    return Trained(trainer, trainer.train())


def train_both(
    folder: Path, rows: Any, ours_alone: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[Trained, Trained]:
    """Ours and theirs; `ours_alone` are settings that TRL does not have."""
    ours = train(posttrain, folder, rows, **settings, **(ours_alone or {}))
    return ours, train(trl, folder, rows, **settings)


def assert_same(ours: Trained, theirs: Trained, leaving_out: Sequence[str] = ()) -> None:
    """Every entry of the two logs agrees in everything that TRL logs, except the names `leaving_out`."""
    assert [entry["step"] for entry in ours.history] == [entry["step"] for entry in theirs.history]
    different = [
        f"step {other['step']}: {name} is {mine.get(name)}, TRL's {value}"
        for mine, other in zip(ours.history, theirs.history, strict=True)
        for name, value in other.items()
        if name not in leaving_out and mine.get(name) != near(value)
    ]
    assert not different, "\n".join(different)


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=RELATIVE, abs=1e-12)


def check(folder: Path, rows: Any, **settings: Any) -> Trained:
    """Train with both, assert that they agree, and return theirs."""
    ours, theirs = train_both(folder, rows, **settings)
    assert_same(ours, theirs)
    assert ours.result.global_step == theirs.result.global_step
    assert ours.result.training_loss == near(theirs.result.training_loss)
    return theirs
