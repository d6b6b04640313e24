"""What callbacks hear and when, the log history, and callbacks that keep a state across a resume."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState

from posttrain import SFTConfig
from posttrain.events import Events


class Counter(TrainerCallback, ExportableState):
    """Counts steps, from where it was."""

    def __init__(self, by: int = 1) -> None:
        self.by, self.count = by, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += self.by

    def state(self) -> dict[str, Any]:
        return {"args": {"by": self.by}, "attributes": {"count": self.count}}


def events(folder: Path, *callbacks: Any, **options: Any) -> Events:
    settings = {"report_to": "none", "bf16": False, **options}
    made = Events(SFTConfig(str(folder), **settings), list(callbacks), model="model", processing_class="tokenizer")
    made.reset_state()
    made.start(6, 2, "optimizer", "scheduler", "model")
    return made


def test_callbacks_restore_what_they_kept(tmp_path: Path) -> None:
    """Two of one class each get their own; arguments given anew are not overwritten."""
    one = events(tmp_path, Counter(1), Counter(10))
    for _ in range(3):
        one.step_end()
    one.save_state(str(tmp_path / "state.json"))
    fresh = (Counter(2), Counter(20))
    other = events(tmp_path, *fresh)
    other.load_state(str(tmp_path / "state.json"))
    assert [callback.count for callback in fresh] == [3, 30]
    assert [callback.by for callback in fresh] == [2, 20]
    other.save_state(str(tmp_path / "again.json"))
    saved = TrainerState.load_from_json(str(tmp_path / "again.json"))
    assert [entry["attributes"]["count"] for entry in saved.stateful_callbacks["Counter"]] == [3, 30]


def test_patience_is_restored(tmp_path: Path) -> None:
    options = {"metric_for_best_model": "loss", "eval_strategy": "steps", "greater_is_better": False}
    stopping = EarlyStoppingCallback(2)
    one = events(tmp_path, stopping, **options)
    one.state.best_metric = 1.0
    one.evaluated({"eval_loss": 2.0})
    assert stopping.early_stopping_patience_counter == 1
    one.save_state(str(tmp_path / "state.json"))
    fresh = EarlyStoppingCallback(2)
    other = events(tmp_path, fresh, **options)
    other.load_state(str(tmp_path / "state.json"))
    assert fresh.early_stopping_patience_counter == 1
    assert not other.control.should_training_stop
    other.evaluated({"eval_loss": 2.0})
    assert other.control.should_training_stop


def test_a_callback_the_checkpoint_does_not_know_starts_fresh(tmp_path: Path) -> None:
    one = events(tmp_path)
    one.save_state(str(tmp_path / "state.json"))
    counter = Counter()
    events(tmp_path, counter).load_state(str(tmp_path / "state.json"))
    assert counter.count == 0


def test_saving_leaves_the_state_in_use_alone(tmp_path: Path) -> None:
    one = events(tmp_path, Counter())
    before = one.state.stateful_callbacks
    for name in ("a", "b"):
        one.save_state(str(tmp_path / name))
    assert one.state.stateful_callbacks is before
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_log_is_transformers_log(tmp_path: Path) -> None:
    """`step` stands in the history alone, `epoch` in both; the history goes through the file exactly."""
    heard: list[dict[str, Any]] = []

    class Listener(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            heard.append(copy.deepcopy(logs))

    one = events(tmp_path, Listener())
    one.state.global_step, one.state.epoch = 3, 1 / 3
    one.log({"loss": 0.1 + 0.2})
    assert heard == [{"loss": 0.1 + 0.2, "epoch": 1 / 3}]
    assert one.state.log_history == [{"loss": 0.1 + 0.2, "epoch": 1 / 3, "step": 3}]
    one.save_state(str(tmp_path / "state.json"))
    other = events(tmp_path)
    other.load_state(str(tmp_path / "state.json"))
    assert other.state.log_history == one.state.log_history
    assert (other.state.global_step, other.state.epoch) == (3, 1 / 3)


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ({"logging_steps": 2, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 4},
         {2: "log", 3: "save", 4: "log evaluate", 6: "log save evaluate"}),
        ({"logging_steps": 5, "logging_first_step": True, "save_strategy": "no"}, {1: "log", 5: "log"}),
        ({"logging_steps": 0.5, "save_steps": 0.25}, {2: "save", 3: "log", 4: "save", 6: "log save"}),
    ],
)  # fmt: skip
def test_what_is_due_and_when(options: dict[str, Any], due: dict[int, str], tmp_path: Path) -> None:
    """transformers' own flow: at its intervals, and evaluated and saved at the end."""
    one = events(tmp_path, **options)
    seen = {}
    for step in range(1, 7):
        one.step_begin()
        one.state.global_step = step
        one.step_end()
        control = one.control
        names = [name for name in ("log", "save", "evaluate") if getattr(control, f"should_{name}")]
        if names:
            seen[step] = " ".join(names)
        assert control.should_training_stop == (step == 6)
    assert seen == due


def test_done_is_no_longer_due(tmp_path: Path) -> None:
    one = events(tmp_path)
    for name, tell in (("log", lambda: one.log({})), ("save", one.save), ("evaluate", lambda: one.evaluated({}))):
        setattr(one.control, f"should_{name}", True)
        tell()
        assert not getattr(one.control, f"should_{name}")
    one.control.should_epoch_stop = True
    one.epoch_begin()
    assert not one.control.should_epoch_stop


def test_a_callback_may_return_another_control(tmp_path: Path) -> None:
    replacement = TrainerControl(should_training_stop=True)

    class Stopper(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> TrainerControl:
            return replacement

    one = events(tmp_path, Stopper())
    one.step_end()
    assert one.control is replacement


def test_callbacks_receive_what_transformers_gives_them(tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    class Listener(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            given.update(kwargs, max_steps=state.max_steps, is_world_process_zero=state.is_world_process_zero)

    events(tmp_path, Listener)
    expected = {"model": "model", "processing_class": "tokenizer", "optimizer": "optimizer", "max_steps": 6,
                "lr_scheduler": "scheduler", "is_world_process_zero": True}  # fmt: skip
    assert {name: given[name] for name in expected} == expected
