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

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput

import posttrain
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
datasets.disable_progress_bars()

NOT_COMPARED = re.compile(r"runtime|per_second|preparation_time|total_flos")  # times, and an estimate of FLOPs
AVERAGES = ("entropy", "mean_token_accuracy")
"""Where several micro-batches or steps share a log line, ours are over its tokens; TRL's are means of means."""

Rows = list[dict[str, Any]]

TEXTS: Rows = [{"text": f"The capital of France is {'Paris and ' * (i % 3)}number {i}."} for i in range(6)]
PAIRS: Rows = [
    {"prompt": f"What is {i} plus two? " * (1 + i % 2), "completion": f"It is {i + 2}." * (1 + i % 3)} for i in range(6)
]
CHAT_PAIRS: Rows = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }
    for row in PAIRS
]
CHATS: Rows = [
    {"messages": one["prompt"] + one["completion"] + other["prompt"] + other["completion"]}
    for one, other in zip(CHAT_PAIRS, CHAT_PAIRS[::-1], strict=True)
]
TOKENS: Rows = [{"input_ids": [5 + (37 * i + 11 * j * j) % 250 for j in range(12)]} for i in range(10)]
"""All of the same length, so that a mean of means is a mean."""


@dataclass(frozen=True)
class Trained:
    """A trainer after `train()`, and what that returned."""

    trainer: Any
    result: TrainOutput

    @property
    def history(self) -> list[dict[str, float]]:
        """The log, without times. The summary at its end says the mean loss; TRL adds what was not logged before."""
        entries = [compared(entry) for entry in self.trainer.state.log_history]
        summary = {name: value for name, value in entries[-1].items() if name in ("train_loss", "epoch", "step")}
        return [*entries[:-1], summary] if "train_loss" in entries[-1] else entries

    @property
    def numbers(self) -> list[float]:
        """Loss and gradient norm of every step."""
        return [entry[name] for entry in self.history if "loss" in entry for name in ("loss", "grad_norm")]


def compared(logs: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in logs.items() if not NOT_COMPARED.search(name)}


def as_dataset(rows: Any) -> Any:
    return datasets.Dataset.from_list(rows) if isinstance(rows, list) else rows


def make_trainer(
    library: ModuleType,
    folder: Path,
    rows: Any,
    model: str | Callable[[int], PreTrainedModel] = "llama",
    tokenizer: Callable[[], PreTrainedTokenizerBase] = chatml_tokenizer,
    given: Callable[[], dict[str, Any]] = dict,
    method: str = "SFT",
    **args: Any,
) -> Any:
    """The library's `SFTTrainer`, or that of another method. `model` names a family, or makes a model for so many
    tokens; `given` makes arguments of the trainer; `args` are fields of the config."""
    defaults = {
        "per_device_train_batch_size": len(rows) if isinstance(rows, list) else 2,
        "max_steps": -1 if "num_train_epochs" in args else 3,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-4,  # gradients that are nothing but rounding move nothing
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
    }
    config = getattr(library, f"{method}Config")(str(folder), **{**defaults, **args})
    words = tokenizer()
    made = tiny_model(model, len(words)) if isinstance(model, str) else model(len(words))
    options = {"model": made, "args": config, "processing_class": words, "train_dataset": as_dataset(rows)}
    return getattr(library, f"{method}Trainer")(**{**options, **given()})


def train(library: ModuleType, folder: Path, rows: Any, **settings: Any) -> Trained:
    trainer = make_trainer(library, folder / library.__name__, rows, **settings)
    return Trained(trainer, trainer.train())


def train_both(folder: Path, rows: Any, **settings: Any) -> tuple[Trained, Trained]:
    """With posttrain and with TRL."""
    return train(posttrain, folder, rows, **settings), train(trl, folder, rows, **settings)


_numbers: dict[str, list[float]] = {}


def numbers_of_theirs(folder: Path, rows: Rows, **settings: Any) -> list[float]:
    """TRL's numbers under these settings, trained once: what an option is to change, or to leave as it is."""
    key = repr((rows, settings))
    if key not in _numbers:
        _numbers[key] = train(trl, folder / "without", rows, **settings).numbers
    return _numbers[key]


def near(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-5, abs=1e-12)


def assert_same(ours: Trained, theirs: Trained, leaving_out: Sequence[str] = ()) -> None:
    """The two logs agree in everything that TRL logs, except the names `leaving_out`."""
    assert [entry["step"] for entry in ours.history] == [entry["step"] for entry in theirs.history]
    different = [
        f"step {expected['step']}: {name} is {entry.get(name)}, TRL's {value}"
        for entry, expected in zip(ours.history, theirs.history, strict=True)
        for name, value in expected.items()
        if name not in leaving_out and entry.get(name) != near(value)
    ]
    assert not different, "\n".join(different)
    assert ours.result.global_step == theirs.result.global_step
    assert ours.result.training_loss == near(theirs.result.training_loss)


def check(folder: Path, rows: Any, **settings: Any) -> Trained:
    """Train with both, assert that they agree in everything, and return TRL's."""
    ours, theirs = train_both(folder, rows, **settings)
    assert_same(ours, theirs)
    return theirs
