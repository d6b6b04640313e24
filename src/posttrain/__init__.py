"""posttrain: post-training for language models, from a file of examples to a model that is proven better.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.data.mixing import mix
    from posttrain.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        Interrupted,
        LockedError,
        NonFiniteError,
        UserError,
    )
    from posttrain.trainers.config import SFTConfig
    from posttrain.trainers.dpo import DPOTrainer
    from posttrain.trainers.dpo_config import DPOConfig
    from posttrain.trainers.grpo import GRPOTrainer
    from posttrain.trainers.grpo_config import GRPOConfig
    from posttrain.trainers.kto import KTOConfig, KTOTrainer
    from posttrain.trainers.orpo import ORPOConfig, ORPOTrainer
    from posttrain.trainers.ppo import PPOTrainer
    from posttrain.trainers.ppo_config import PPOConfig
    from posttrain.trainers.reward import RewardConfig, RewardTrainer
    from posttrain.trainers.rloo import RLOOConfig, RLOOTrainer
    from posttrain.trainers.sft import SFTTrainer

__version__ = "0.1.0"

# On a CPU torch compiles matrix products anew for every number of tokens, and keeps up to 1,024 of them, of 0.6 MiB
# each. Steps that are not padded rarely have the same number twice.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "32")

_HOMES = {
    "SFTTrainer": "posttrain.trainers.sft",
    "DPOTrainer": "posttrain.trainers.dpo",
    "DPOConfig": "posttrain.trainers.dpo_config",
    "GRPOTrainer": "posttrain.trainers.grpo",
    "GRPOConfig": "posttrain.trainers.grpo_config",
    "KTOTrainer": "posttrain.trainers.kto",
    "KTOConfig": "posttrain.trainers.kto",
    "ORPOTrainer": "posttrain.trainers.orpo",
    "ORPOConfig": "posttrain.trainers.orpo",
    "PPOTrainer": "posttrain.trainers.ppo",
    "PPOConfig": "posttrain.trainers.ppo_config",
    "RLOOTrainer": "posttrain.trainers.rloo",
    "RLOOConfig": "posttrain.trainers.rloo",
    "RewardTrainer": "posttrain.trainers.reward",
    "RewardConfig": "posttrain.trainers.reward",
    "SFTConfig": "posttrain.trainers.config",
    "CheckpointError": "posttrain.errors",
    "ConfigError": "posttrain.errors",
    "DataError": "posttrain.errors",
    "Interrupted": "posttrain.errors",
    "LockedError": "posttrain.errors",
    "NonFiniteError": "posttrain.errors",
    "UserError": "posttrain.errors",
    "mix": "posttrain.data.mixing",
}
__all__ = [
    "CheckpointError",
    "ConfigError",
    "DPOConfig",
    "DPOTrainer",
    "DataError",
    "GRPOConfig",
    "GRPOTrainer",
    "Interrupted",
    "KTOConfig",
    "KTOTrainer",
    "LockedError",
    "NonFiniteError",
    "ORPOConfig",
    "ORPOTrainer",
    "PPOConfig",
    "PPOTrainer",
    "RLOOConfig",
    "RLOOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "SFTConfig",
    "SFTTrainer",
    "UserError",
    "mix",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
