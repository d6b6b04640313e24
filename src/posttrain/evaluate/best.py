"""The best evaluation so far, as transformers remembers it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path

from transformers.trainer_utils import SaveStrategy

from posttrain.errors import ConfigError
from posttrain.events import Events

logger = logging.getLogger("posttrain")


def note_best(events: Events, metrics: Mapping[str, float]) -> None:
    """Remember the best evaluation, as transformers does; `save_strategy="best"` saves when there is a new one.
    Raises ConfigError where `metrics` lacks what it is told by."""
    args, state = events.args, events.state
    if args.metric_for_best_model is None:
        return
    name = args.metric_for_best_model
    name = name if name.startswith("eval_") else f"eval_{name}"
    if name not in metrics:
        raise ConfigError(f"metric_for_best_model={name!r} is not among the metrics: {', '.join(sorted(metrics))}")
    value, best = metrics[name], state.best_metric
    if not math.isfinite(value):
        logger.warning("%s is %s at step %d: that is never the best", name, value, state.global_step)
        events.control.should_save &= args.save_strategy != SaveStrategy.BEST
        return
    better = best is None or (value > best if args.greater_is_better else value < best)
    if better:
        state.best_metric, state.best_global_step = value, state.global_step
    if args.save_strategy == SaveStrategy.BEST:
        events.control.should_save = better


def find_best_again(events: Events) -> None:
    """The best checkpoint lies in `output_dir`, wherever that has been moved to since."""
    state = events.state
    if state.best_model_checkpoint is None or Path(state.best_model_checkpoint).is_dir():
        return
    moved = Path(events.args.output_dir) / Path(state.best_model_checkpoint).name
    if not moved.is_dir():
        logger.warning("the best checkpoint so far, %s, is gone; the next best one counts from here",
                       state.best_model_checkpoint)  # fmt: skip
        state.best_metric = None
    state.best_model_checkpoint = str(moved) if moved.is_dir() else None
