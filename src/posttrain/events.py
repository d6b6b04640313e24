"""What the rest of the world hears from the loop: transformers' callbacks, state and control, and the log history.

`Events` owns a `TrainerState`, a `TrainerControl` and a `CallbackHandler`, all transformers' own, so that every
callback and reporting integration written for them works unchanged. The loop tells it what happened and asks what is
due.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback, ExportableState, ProgressCallback


class Events:
    """`trainer` is handed to callbacks that ask for nothing more than a name; `callbacks` may be classes or instances,
    as transformers takes them."""

    def __init__(self, args: TrainingArguments, callbacks: list[Any], model: Any, processing_class: Any):
        self.args = args
        self.state = TrainerState()
        self.control = TrainerControl()
        self.handler = CallbackHandler([DefaultFlowCallback, *callbacks], model, processing_class, None, None)
        self._fire("on_init_end")

    def start(self, max_steps: int, num_train_epochs: int, optimizer: Any, scheduler: Any, model: Any) -> None:
        """A new run: fresh state (kept where a checkpoint was loaded before) and the objects callbacks receive."""
        state, args = self.state, self.args
        state.compute_steps(args, max_steps)
        state.max_steps, state.num_train_epochs = max_steps, num_train_epochs
        state.train_batch_size = args.per_device_train_batch_size
        state.is_local_process_zero = state.is_world_process_zero = True
        self.handler.optimizer, self.handler.lr_scheduler, self.handler.model = optimizer, scheduler, model
        self.control._new_training()
        self._fire("on_train_begin")

    def reset_state(self) -> None:
        self.state = TrainerState(stateful_callbacks=self.stateful())

    def load_state(self, path: str) -> None:
        """Take over a checkpoint's `trainer_state.json`, and what its callbacks had stored in it."""
        self.state = TrainerState.load_from_json(path)
        for callback in self.handler.callbacks:
            stored = self.state.stateful_callbacks.get(type(callback).__name__)
            if not stored:
                continue
            entry = stored.pop(0) if isinstance(stored, list) else stored
            for name, value in entry.get("attributes", {}).items():
                setattr(callback, name, value)

    def save_state(self, path: str) -> None:
        kept = self.state.stateful_callbacks
        self.state.stateful_callbacks = _exported(self.stateful())
        self.state.save_to_json(path)
        self.state.stateful_callbacks = kept

    def stateful(self) -> list[ExportableState]:
        return [item for item in [*self.handler.callbacks, self.control] if isinstance(item, ExportableState)]

    def epoch_begin(self) -> None:
        self._fire("on_epoch_begin")

    def epoch_end(self) -> None:
        self._fire("on_epoch_end")

    def step_begin(self) -> None:
        self._fire("on_step_begin")

    def substep_end(self) -> None:
        self._fire("on_substep_end")

    def pre_optimizer_step(self) -> None:
        self._fire("on_pre_optimizer_step")

    def optimizer_step(self) -> None:
        self._fire("on_optimizer_step")

    def step_end(self) -> None:
        self._fire("on_step_end")

    def prediction_step(self) -> None:
        self._fire("on_prediction_step")

    def save(self) -> None:
        self._fire("on_save")

    def train_end(self) -> None:
        self._fire("on_train_end")

    def evaluated(self, metrics: Mapping[str, float]) -> None:
        self._fire("on_evaluate", metrics=dict(metrics))

    def log(self, logs: Mapping[str, float]) -> dict[str, float]:
        """Append to the history and tell the callbacks; `epoch` and `step` are added as transformers adds them.
        Returns what was logged."""
        entry = dict(logs)
        if self.state.epoch is not None:
            entry["epoch"] = self.state.epoch
        self.state.log_history.append({**entry, "step": self.state.global_step})
        self._fire("on_log", logs=dict(entry))
        return entry

    def _fire(self, event: str, **kwargs: Any) -> None:
        begin = {"on_epoch_begin": "_new_epoch", "on_step_begin": "_new_step"}.get(event)
        if begin:
            getattr(self.control, begin)()
        for done in {"on_log": ["should_log"], "on_save": ["should_save"], "on_evaluate": ["should_evaluate"]}.get(
            event, []
        ):
            setattr(self.control, done, False)
        self.control = self.handler.call_event(event, self.args, self.state, self.control, **kwargs)


def _exported(callbacks: list[ExportableState]) -> dict[str, Any]:
    exported: dict[str, Any] = {}
    for callback in callbacks:
        name = type(callback).__name__
        if name in exported:
            exported[name] = [
                *(exported[name] if isinstance(exported[name], list) else [exported[name]]),
                callback.state(),
            ]
        else:
            exported[name] = callback.state()
    return exported


class Progress(ProgressCallback):
    """transformers' progress bar with what one wants to know beside it: loss, rate, time left. Log lines that are not
    evaluations stay in the bar, so that a long run does not fill the screen."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluation is quicker than a bar is worth; nothing to draw."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        if "loss" in logs:
            shown = {"loss": f"{logs['loss']:.4f}", "lr": f"{logs.get('learning_rate', 0):.1e}"}
            if "tokens_per_second" in logs:
                shown["tok/s"] = f"{logs['tokens_per_second']:.0f}"
            self.training_bar.set_postfix(shown)
        elif any(name.startswith("eval") for name in logs):
            text = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float))
            self.training_bar.write(f"step {state.global_step}: {text}", file=sys.stderr)


def default_callbacks(args: TrainingArguments) -> list[TrainerCallback | type[TrainerCallback]]:
    """Reporting integrations named in `report_to`, and the progress bar."""
    from transformers.integrations import get_reporting_integration_callbacks
    from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
    from transformers.trainer_callback import PrinterCallback

    progress = Progress if DEFAULT_PROGRESS_CALLBACK is ProgressCallback else DEFAULT_PROGRESS_CALLBACK
    return [*get_reporting_integration_callbacks(args.report_to), PrinterCallback if args.disable_tqdm else progress]
