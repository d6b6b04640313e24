"""What every trainer's facade shares: the methods and attributes that scripts use, over one `Run`.

A facade never computes. Hooks of transformers' `Trainer` that posttrain's loop would never call are refused when a
subclass overrides them, naming what to write instead.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging as transformers_logging

from posttrain.data.report import DataReport
from posttrain.errors import ConfigError, Interrupted
from posttrain.events import Events, default_callbacks
from posttrain.run import Run, TrainResult

logger = logging.getLogger("posttrain")

NEVER_CALLED = {
    "compute_loss": "write an objective (posttrain.objectives) instead",
    "training_step": "write an objective (posttrain.objectives) instead",
    "prediction_step": "pass compute_metrics instead",
    "get_train_dataloader": "give the data in the order you want, with train_sampling_strategy='sequential'",
    "get_eval_dataloader": "give the data as eval_dataset",
    "_get_train_sampler": "give the data in the order you want, with train_sampling_strategy='sequential'",
    "create_optimizer": "pass optimizers=(optimizer, scheduler) or optimizer_cls_and_kwargs",
    "create_scheduler": "pass optimizers=(optimizer, scheduler)",
    "create_optimizer_and_scheduler": "pass optimizers=(optimizer, scheduler)",
    "evaluation_loop": "pass compute_metrics instead",
    "log": "use a TrainerCallback with on_log",
    "_prepare_dataset": "give formatting_func, or rows that are prepared",
    "get_batch_samples": "give the data in the order you want, with train_sampling_strategy='sequential'",
    "_save_checkpoint": "use a TrainerCallback with on_save",
}
READ_ONCE = ("train_dataset", "eval_dataset", "data_collator", "compute_metrics")


class PackedTrainer:
    """Base of the public trainers. `self.run` does the work; `state`, `control` and `args` are transformers' own."""

    run: Run
    args: TrainingArguments
    data_reports: dict[str, DataReport]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__.startswith("posttrain."):
            return
        theirs = [one for one in cls.__mro__ if not one.__module__.startswith(("posttrain.", "builtins", "typing"))]
        for name, instead in NEVER_CALLED.items():
            if any(name in one.__dict__ for one in theirs):
                raise ConfigError(f"{cls.__name__}.{name} would never be called by posttrain's loop: {instead}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NEVER_CALLED or (name in READ_ONCE and "run" in self.__dict__):
            instead = NEVER_CALLED.get(name, "give it to the trainer when it is made")
            raise ConfigError(f"trainer.{name} = ... is not honoured: {instead}")
        super().__setattr__(name, value)

    def train(self, resume_from_checkpoint: str | bool | None = None, **refused: Any) -> TrainResult:
        """Train, from the beginning or from a checkpoint (True: the newest valid one in `output_dir`).

        Raises: Interrupted after a signal, everything saved; NonFiniteError before a bad gradient reaches the weights.
        """
        for name, value in refused.items():
            if value is not None:
                raise ConfigError(f"train({name}=...) is not honoured")
        self.before_training()
        try:
            return self.run.train(resume_from_checkpoint)
        except Interrupted as stopped:  # a SystemExit: Python ends with its status and prints nothing of its own
            print(stopped.message, file=sys.stderr)
            if stopped.checkpoint:
                print("Continue: trainer.train(resume_from_checkpoint=True)", file=sys.stderr)
            raise

    def before_training(self) -> None:
        """What a run leaves and finds out before it begins."""
        self.write_data_reports()

    def write_data_reports(self) -> None:
        """`data_report.json` in `output_dir`: what became of the rows, and of each that is not used why."""
        reports = {name: report.to_dict() for name, report in self.data_reports.items()}
        if not reports:
            return
        folder = Path(self.args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = folder / ".data_report.json.partial"
            made.write_text(json.dumps({"schema_version": 1, **reports}, indent=1), encoding="utf-8")
            made.rename(folder / "data_report.json")
        except OSError as error:  # the run will say so itself, if it has to write there
            logger.warning("data_report.json is not written: %s", error.strerror or error)

    @property
    def accelerator(self) -> Any:
        """What scripts ask of it: `print`, `is_main_process`, `process_index`, `num_processes`, `device`."""
        return self.args.distributed_state

    @property
    def state(self) -> TrainerState:
        return self.run.events.state

    @property
    def control(self) -> Any:
        return self.run.events.control

    @property
    def callback_handler(self) -> Any:
        return self.run.events.handler

    @property
    def model(self) -> Any:
        return self.run.model

    @property
    def processing_class(self) -> Any:
        return self.run.processing_class

    tokenizer = processing_class

    @property
    def optimizer(self) -> Any:
        return self.run.optimizer

    @property
    def lr_scheduler(self) -> Any:
        return self.run.scheduler

    def __getattr__(self, name: str) -> Any:
        known = " (transformers.Trainer has it, this loop has no use for it)" if hasattr(Trainer, name) else ""
        raise AttributeError(f"posttrain's {type(self).__name__} has no attribute {name!r}{known}")

    def add_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.run.events.handler.add_callback(callback)

    def pop_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> TrainerCallback | None:
        return self.run.events.handler.pop_callback(callback)

    def remove_callback(self, callback: type[TrainerCallback] | TrainerCallback) -> None:
        self.run.events.handler.remove_callback(callback)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Adapter or full model, tokenizer and settings, loadable by plain PEFT or transformers."""
        self.run.write_model(Path(output_dir or self.args.output_dir))

    def save_state(self) -> None:
        """`trainer_state.json` in `output_dir`."""
        Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
        self.run.events.save_state(str(Path(self.args.output_dir) / "trainer_state.json"))

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        print(f"***** {split} metrics *****")
        for name, value in sorted(metrics.items()):
            print(f"  {name} = {value:.4f}" if isinstance(value, float) else f"  {name} = {value}")

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """`{split}_results.json`, and joined into `all_results.json`, as transformers writes them."""
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}_results.json").write_text(json.dumps(metrics, indent=4, sort_keys=True))
        if combined:
            path = folder / "all_results.json"
            joined = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(joined | metrics, indent=4, sort_keys=True))

    def is_world_process_zero(self) -> bool:
        return True

    is_local_process_zero = is_world_process_zero

    def push_to_hub(self, *_args: Any, **_kwargs: Any) -> None:
        raise ConfigError("trainer.push_to_hub is not honoured: use trainer.model.push_to_hub(...)")


def make_events(args: TrainingArguments, callbacks: list[Any] | None, model: Any, processing_class: Any) -> Events:
    """Transformers' default callbacks for these settings, then the user's; its log level as `args.log_level` says."""
    if args.log_level != "passive":
        transformers_logging.set_verbosity(args.get_process_log_level())
    if not isinstance(callbacks, list | tuple | None):
        raise ConfigError(f"callbacks must be a list of callbacks, got {type(callbacks).__name__}")
    try:
        defaults = default_callbacks(args)
    except (RuntimeError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"report_to={args.report_to!r}: {error}") from error
    return Events(args, [*defaults, *(callbacks or [])], model, processing_class)
