"""Optimiser and schedule: transformers' names and choices, on the fp32 masters.

Weight decay leaves out biases and norms, by transformers' own rule.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from posttrain.errors import ConfigError

logger = logging.getLogger("posttrain")
# transformers.Trainer.get_decay_parameter_names, as of 5.23
NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


IN_BACKWARD = ("lomo", "layerwise")
"""Optimisers that update during the backward pass of each micro-batch, when no gradient is complete yet."""


def make_optimizer(
    args: TrainingArguments,
    model: nn.Module,
    trained: Mapping[str, nn.Parameter],
    chosen: tuple[Any, dict[str, Any]] | None = None,
    beside: Mapping[str, nn.Module] | None = None,
) -> torch.optim.Optimizer:
    """The optimiser that `args.optim` names (or `chosen`: a class or a factory of one, with its arguments) over
    `trained`, which maps names to the very parameters that are to learn: those of `model`, and of the models `beside`
    it, whose names stand before theirs.

    Raises: ConfigError where the optimiser's package is missing, its arguments do not suit it, or it would update
        before the step's gradient is whole.
    """
    models = {"": model} | {f"{name}.": one for name, one in (beside or {}).items()}
    if chosen is None:
        _check_name(OptimizerNames(args.optim).value, args)
    try:
        kind, options = chosen or Trainer.get_optimizer_cls_and_kwargs(args, model)
        if is_optimizer_factory(kind):
            return kind()(model, **options)
        options = dict(options)
        groups = options.pop("params", None) or _decay_groups(args, models, trained)
        optimizer = kind(groups, **options)
    except (ImportError, ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        named = chosen[0] if chosen else OptimizerNames(args.optim).value
        raise ConfigError(f"optim={named!r} with optim_args={args.optim_args!r}: {error}") from error
    if options.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(optimizer, models.values(), trained)
    return optimizer


def _check_name(name: str, args: TrainingArguments) -> None:
    if any(word in name for word in IN_BACKWARD):
        raise ConfigError(
            f"optim={name!r} updates the weights while gradients are still being added up, so neither clipping, "
            "accumulation nor the check for non-finite gradients could be exact",
            hint=f"use {name.removesuffix('_layerwise')!r}" if "layerwise" in name else "use 'adafactor'",
        )
    if name == "galore_adamw_8bit" and args.device.type == "cpu":
        raise ConfigError("optim='galore_adamw_8bit' runs on CUDA only", hint="use 'galore_adamw'")
    if name == "grokadamw" and args.save_strategy != SaveStrategy.NO and not args.save_only_model:
        raise ConfigError("optim='grokadamw' keeps its state where no checkpoint can hold it (keyed by the parameters)",
                          hint="save_only_model=True, or another optimiser")  # fmt: skip


def _decay_groups(
    args: TrainingArguments, models: Mapping[str, nn.Module], trained: Mapping[str, nn.Parameter]
) -> list[dict[str, Any]]:
    decayed = {
        prefix + name
        for prefix, model in models.items()
        for name in get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED)
    }
    return [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": args.weight_decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]


def _keep_embeddings_in_32_bits(
    optimizer: Any, models: Iterable[nn.Module], trained: Mapping[str, nn.Parameter]
) -> None:
    """As transformers does for bitsandbytes: 8 bits are too few for the rarely updated rows of an embedding."""
    from bitsandbytes.optim import GlobalOptimManager

    manager = GlobalOptimManager.get_instance()
    learning = set(trained.values())
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, nn.Embedding) and module.weight in learning:
            manager.override_config(module.weight, "optim_bits", 32)
    manager.index2config.clear()  # positions of an earlier optimiser
    manager.register_parameters(optimizer.param_groups)


def check_holds(optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError for an optimiser that holds nothing of what is trained: made before the adapter, say."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, parameter in trained.items() if id(parameter) not in held]
    if len(missing) == len(trained):
        raise ConfigError("optimizers: the optimiser holds none of the parameters that are trained",
                          hint="make it from trainer.model, or give optimizer_cls_and_kwargs")  # fmt: skip
    if missing:
        logger.warning("optimizers: %d trained parameters are not in the optimiser, %s first", len(missing), missing[0])


def check_holds_all_of(part: str, optimizer: torch.optim.Optimizer, trained: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError where `part` of what is trained (`value_head`: its names begin with that) would not learn."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not all(id(parameter) in held for name, parameter in trained.items() if name.startswith(f"{part}.")):
        raise ConfigError(f"{type(optimizer).__name__} does not hold the {part.replace('_', ' ')}, which would "
                          "learn nothing", hint=f"make the optimiser of trainer.model's parameters and "
                          f"trainer.{part}'s; of those with a name, optim='adamw_torch' does it")  # fmt: skip


def make_scheduler(args: TrainingArguments, optimizer: torch.optim.Optimizer, max_steps: int) -> Any:
    """The schedule that `args.lr_scheduler_type` names, over `max_steps` optimiser steps."""
    try:
        return get_scheduler(
            args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=args.get_warmup_steps(max_steps),
            num_training_steps=max_steps,
            scheduler_specific_kwargs=args.lr_scheduler_kwargs,
        )
    except (TypeError, ValueError) as error:
        name = SchedulerType(args.lr_scheduler_type).value
        raise ConfigError(
            f"lr_scheduler_type={name!r} with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}: {error}"
        ) from error


def follows_metrics(scheduler: Any) -> bool:
    """Whether it steps after evaluations, on a metric, and not after every optimiser step."""
    return isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or type(scheduler).__name__ == "GreedyLR"
