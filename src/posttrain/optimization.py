"""Optimiser and schedule: transformers' names and choices, on the fp32 masters.

Weight decay leaves out biases and norms, by transformers' own rule.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from posttrain.errors import ConfigError

# transformers.Trainer.get_decay_parameter_names, as of 5.23
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


def make_optimizer(
    args: TrainingArguments,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    chosen: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser that `args.optim` names (or `chosen`) over `trained`, masters and adapters by parameter name.

    Raises: ConfigError where the optimiser's package is missing, or where it insists on reading the model's own
        parameters and those are bf16 copies.
    """
    try:
        kind, options = chosen or Trainer.get_optimizer_cls_and_kwargs(args, model)
    except ImportError as error:
        raise ConfigError(f"optim={args.optim!r}: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)) or {
        "params",
        "model",
        "optimizer_dict",
    } & set(options):
        raise ConfigError(f"optim={args.optim!r} takes the model apart by itself, which is not supported",
                          hint="choose an optimiser over parameters, such as adamw_torch")  # fmt: skip
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    groups = [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]
    return kind(groups, **options)


def make_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """The schedule that `args.lr_scheduler_type` names, over `max_steps` optimiser steps."""
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(max_steps),
        num_training_steps=max_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )


def follows_metrics(scheduler: Any) -> bool:
    """Whether it steps after evaluations, on a metric, and not after every optimiser step."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
