"""The loop as callbacks see it: transformers' own order of events, log lines and flags, for the same settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorForSeq2Seq, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from posttrain import SFTConfig, SFTTrainer
from posttrain.loop import total_counts
from tests.tiny_batches import random_batch
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import plain_tokenizer

ROWS = [{"input_ids": [5 + i] * 6, "labels": [5 + i] * 6} for i in range(10)]
UNCOUNTED = {"on_init_end", "on_substep_end", "on_prediction_step"}  # by micro-batch, which we cut otherwise


class Recorder(TrainerCallback):
    """Every event with the step, the epoch, and what is due."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(_args: Any, state: Any, control: Any, logs: Any = None, metrics: Any = None, **_kwargs: Any) -> None:
            kinds = {"loss", "eval_loss", "train_loss"} & (logs or metrics or {}).keys()
            flags = [n for n in ("training_stop", "save", "evaluate", "log") if getattr(control, f"should_{n}")]
            if name not in UNCOUNTED:
                self.seen.append((name, state.global_step, round(state.epoch or 0, 6), *sorted(kinds), *flags))

        return note


def record(trainer_class: type, folder: Path, extra: tuple[Any, ...] = (), **settings: Any) -> Any:
    recorder = Recorder()
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 500,
        "bf16": False,
        "use_cpu": True,
        **settings,
    }
    tokenizer = plain_tokenizer()
    kind = SFTConfig if trainer_class is SFTTrainer else TrainingArguments
    more = {} if trainer_class is SFTTrainer else {"data_collator": DataCollatorForSeq2Seq(tokenizer)}
    trainer = trainer_class(
        model=tiny_model("llama", 270),
        args=kind(str(folder), **options),
        train_dataset=ROWS,
        eval_dataset=ROWS[:4],
        processing_class=tokenizer,
        callbacks=[recorder, *extra],
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return recorder.seen, trainer


SETTINGS: dict[str, dict[str, Any]] = {
    "by steps": {"logging_steps": 2, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3},
    "by epoch": {"logging_strategy": "epoch", "eval_strategy": "epoch", "save_strategy": "epoch"},
    "the best": {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "best",
                 "metric_for_best_model": "loss", "load_best_model_at_end": True, "learning_rate": 0.3},
    "first step": {"logging_first_step": True, "logging_steps": 4, "save_strategy": "no", "eval_on_start": True,
                   "eval_strategy": "steps", "eval_steps": 4},
    "max steps": {"max_steps": 4, "logging_steps": 3, "save_steps": 3, "eval_delay": 4, "eval_strategy": "steps",
                  "eval_steps": 1},
    "ends within an epoch": {"max_steps": 4, "logging_strategy": "epoch", "eval_strategy": "epoch",
                             "save_strategy": "epoch"},
    "drop last": {"dataloader_drop_last": True, "per_device_train_batch_size": 3, "logging_steps": 1, "save_steps": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_events_come_in_transformers_order(name: str, tmp_path: Path) -> None:
    theirs, reference = record(Trainer, tmp_path / "theirs", **SETTINGS[name])
    ours, trainer = record(SFTTrainer, tmp_path / "ours", **SETTINGS[name])
    assert ours == theirs
    mine, yours = trainer.state, reference.state
    for field in ("global_step", "epoch", "max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps",
                  "train_batch_size", "best_global_step"):  # fmt: skip
        assert getattr(mine, field) == getattr(yours, field), field
    best = [Path(state.best_model_checkpoint or "").name for state in (mine, yours)]
    assert best[0] == best[1]
    logs = [[(entry["step"], round(entry["epoch"], 6), *sorted({"loss", "eval_loss", "train_loss"} & entry.keys()))
             for entry in state.log_history] for state in (mine, yours)]  # fmt: skip
    assert logs[0] == logs[1]
    saved = [sorted(path.name for path in (tmp_path / who).glob("checkpoint-*")) for who in ("ours", "theirs")]
    assert saved[0] == saved[1]


def test_a_callback_that_stops_ends_the_run_as_transformers_does(tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step >= 2

    for strategy in ("steps", "epoch"):
        settings = {"logging_steps": 2, "save_steps": 2, "save_strategy": strategy, "eval_strategy": strategy}
        theirs, _ = record(Trainer, tmp_path / f"theirs-{strategy}", (Stop(),), **settings)
        ours, trainer = record(SFTTrainer, tmp_path / f"ours-{strategy}", (Stop(),), **settings)
        assert ours == theirs
        assert trainer.state.global_step == 2
        assert (tmp_path / f"ours-{strategy}" / "checkpoint-2" / "MANIFEST.json").is_file()


class NextEpoch(TrainerCallback):
    """Leaves every epoch after its first step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_epoch_stop = True


def test_a_callback_that_ends_an_epoch(tmp_path: Path) -> None:
    theirs, _ = record(Trainer, tmp_path / "theirs", (NextEpoch(),))
    ours, _ = record(SFTTrainer, tmp_path / "ours", (NextEpoch(),))
    assert ours == theirs


def test_counts_are_summed_over_the_step() -> None:
    batches = [random_batch((5, 3), seed=1), random_batch((9,), seed=2)]
    assert total_counts(batches) == {"tokens": sum(len(batch.rows_R) for batch in batches), "sequences": 3}


def test_a_step_asks_the_device_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient norm come together, however many micro-batches; metrics wait until they are logged."""
    asked: list[str] = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu"):
        original = getattr(torch.Tensor, name)

        def counted(tensor: torch.Tensor, *args: Any, _name: str = name, _original: Any = original) -> Any:
            if tensor.is_floating_point():
                asked.append(_name)
            return _original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    during: list[list[str]] = []

    class Look(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            asked.clear()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            during.append(list(asked))

    record(SFTTrainer, tmp_path, (Look(),), token_budget=6, save_strategy="no", logging_steps=100)
    assert during == [["tolist"]] * 6
