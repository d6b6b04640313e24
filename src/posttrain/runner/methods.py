"""The methods that a configuration can name, and the trainer and settings of each."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import Any

from posttrain.errors import ConfigError

METHODS = {
    "sft": ("posttrain.trainers.sft:SFTTrainer", "posttrain.trainers.config:SFTConfig"),
    "dpo": ("posttrain.trainers.dpo:DPOTrainer", "posttrain.trainers.dpo_config:DPOConfig"),
    "orpo": ("posttrain.trainers.orpo:ORPOTrainer", "posttrain.trainers.orpo:ORPOConfig"),
    "kto": ("posttrain.trainers.kto:KTOTrainer", "posttrain.trainers.kto:KTOConfig"),
    "grpo": ("posttrain.trainers.grpo:GRPOTrainer", "posttrain.trainers.grpo_config:GRPOConfig"),
    "rloo": ("posttrain.trainers.rloo:RLOOTrainer", "posttrain.trainers.rloo:RLOOConfig"),
    "ppo": ("posttrain.trainers.ppo:PPOTrainer", "posttrain.trainers.ppo_config:PPOConfig"),
    "reward": ("posttrain.trainers.reward:RewardTrainer", "posttrain.trainers.reward:RewardConfig"),
}
ONLINE = ("grpo", "rloo", "ppo")
"""Methods that sample their own completions and learn from rewards."""
NOT_FOR = {
    "text_field": ("dataset_text_field", "text"),
    "train_on": ("assistant_only_loss", "assistant"),
}
"""Keys of `dataset` that some methods have no use for: the field they become, and their default."""


def trainer_of(method: str) -> Any:
    return _named(METHODS[method][0])


def config_of(method: str) -> Any:
    return _named(METHODS[method][1])


def fields_of(method: str) -> set[str]:
    """The names of the method's settings."""
    return {field.name for field in dataclasses.fields(config_of(method)) if field.init}


def check_keys(method: str, dataset: Any, source: str) -> None:
    """Raises ConfigError for a key of `dataset` that is set and that the method would not heed."""
    known = fields_of(method)
    for key, (field, default) in NOT_FOR.items():
        if field not in known and getattr(dataset, key) != default:
            raise ConfigError(f"{source}: dataset.{key}={getattr(dataset, key)!r} is not honoured with method {method}",
                              hint=f"leave it at {default!r}")  # fmt: skip


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)
