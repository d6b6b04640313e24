"""Are the values of a config of the kinds and sizes that its fields are declared to have?

transformers looks at few of them, and finds out about the others in the middle of things. Words that mean true or false
("yes", "off") become that; everything else that does not fit is refused, with the field's name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
import typing
from typing import Any

from posttrain.errors import ConfigError

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
AT_LEAST: dict[str, float] = {
    "learning_rate": 0, "weight_decay": 0, "adam_beta1": 0, "adam_beta2": 0, "adam_epsilon": 0, "max_grad_norm": 0,
    "label_smoothing_factor": 0, "warmup_steps": 0, "neftune_noise_alpha": 0, "eval_delay": 0, "seed": 0,
    "data_seed": 0, "save_total_limit": 0, "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1, "token_budget": 1, "max_length": 1, "dataset_num_proc": 1,
    "eval_accumulation_steps": 1, "max_prompt_length": 1, "precompute_ref_batch_size": 1,
}  # fmt: skip
ABOVE_ZERO = ("logging_steps", "save_steps", "eval_steps")
BELOW_ONE = ("adam_beta1", "adam_beta2", "label_smoothing_factor")


def check_values(config: Any) -> None:
    """Raises ConfigError naming the field, the value seen and what is wanted."""
    kinds = _kinds(type(config))  # type: ignore[arg-type]
    for field in dataclasses.fields(config):
        if not field.init:
            continue
        value = getattr(config, field.name)
        fitted = _fitted(field.name, value, kinds[field.name])
        if fitted is not value:
            setattr(config, field.name, fitted)
    for name, least in AT_LEAST.items():
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value < least:
            raise ConfigError(f"{name}={value!r} must be at least {least}")
    for name in ABOVE_ZERO:
        value = getattr(config, name, None)
        if isinstance(value, int | float) and value <= 0:
            raise ConfigError(f"{name}={value!r} must be above 0", hint="a share of all steps may be below 1")
    for name in BELOW_ONE:
        if getattr(config, name, 0) >= 1:
            raise ConfigError(f"{name}={getattr(config, name)!r} must be below 1")
    if config.max_steps <= 0 and config.num_train_epochs <= 0:
        raise ConfigError(f"num_train_epochs={config.num_train_epochs!r} trains nothing", hint="or set max_steps")


@functools.lru_cache
def _kinds(config_class: Any) -> dict[str, frozenset[Any]]:
    """The types that each field may have, unions taken apart."""
    hints = typing.get_type_hints(config_class)
    return {name: frozenset(_members(hint)) for name, hint in hints.items()}


def _members(hint: Any) -> list[Any]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [member for part in typing.get_args(hint) for member in _members(part)]
    return [typing.get_origin(hint) or hint]


def _fitted(name: str, value: Any, kinds: frozenset[Any]) -> Any:
    """`value`, made to fit where it plainly means the right thing."""
    if value is None and type(None) in kinds:
        return value
    if bool in kinds:
        return _boolean(name, value, kinds)
    if float in kinds or kinds - {type(None)} == {int}:
        return _number(name, value, whole=float not in kinds)
    if dict in kinds and isinstance(value, int | float | list | tuple):
        raise ConfigError(f"{name}={value!r} must be a mapping")
    if kinds - {type(None)} == {str} and not isinstance(value, str):
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        raise ConfigError(f"{name}={value!r} must be text")
    return value


def _boolean(name: str, value: Any, kinds: frozenset[Any]) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    if isinstance(value, str):
        if value.lower() in WORDS and not (str in kinds and value == "no"):
            return WORDS[value.lower()]
        if str in kinds:
            return value
    raise ConfigError(f"{name}={value!r} must be true or false")


def _number(name: str, value: Any, whole: bool) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{name}={value!r} must be a number")
    if math.isinf(value) and name != "max_grad_norm":
        raise ConfigError(f"{name}={value!r} must be a finite number")
    if whole and value != int(value):
        raise ConfigError(f"{name}={value!r} must be a whole number")
    return int(value) if whole else value
