"""A reward model's validation record: how often it prefers the better of two held-out answers, of which data, and of
which weights. `reward_validation.json` lies beside the weights; PPO does not start without one that holds.

Weights are hashed as bf16, so that it does not matter in which dtype they are loaded.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from posttrain.data.fingerprint import fingerprint
from posttrain.errors import ConfigError
from posttrain.types import Sample

NAME = "reward_validation.json"
SCHEMA = 1
NOT_SAVED = (".original_module.",)
"""What PEFT keeps of a layer that it has put another in the place of."""
WRAPPERS = ("base_model.model.", ".base_layer", ".modules_to_save.default", ".default")


@dataclass(frozen=True)
class Validation:
    """`accuracy` over `n` held-out pairs; `data` and `weights` are SHA-256 hashes."""

    accuracy: float
    n: int
    data: str
    weights: str
    date: str
    schema_version: int = SCHEMA

    def write(self, path: Path) -> None:
        """Whole or not at all."""
        write_whole(path, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Validation:
        """Raises ConfigError for what is no record."""
        try:
            made = cls(**json.loads(path.read_text(encoding="utf-8")))
            valid = (
                made.schema_version == SCHEMA
                and isinstance(made.n, int)
                and isinstance(made.accuracy, int | float)
                and math.isfinite(made.accuracy)
            )
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}", hint=_way_out(str(path.parent))) from None
        if not valid:
            raise ConfigError(f"{path} is no validation record of schema {SCHEMA}", hint=_way_out(str(path.parent)))
        return made


def write_whole(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def validation_of(model: nn.Module, samples: Sequence[Sample], right_P: np.ndarray) -> Validation:
    """`right_P` says of each pair of `samples` whether the model prefers the better answer."""
    date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return Validation(float(right_P.mean()), len(right_P), fingerprint(samples), hash_of_weights(model), date)


def hash_of_weights(model: nn.Module) -> str:
    """Of all that is saved, by name: the same for a model and what is loaded of it, also of an adapter and its base."""
    digest = hashlib.sha256()
    tensors = {_plain(name): tensor for name, tensor in model.state_dict().items() if not _is_left(name)}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.bfloat16).contiguous().flatten().view(torch.int16).numpy().data)
    return digest.hexdigest()


def _is_left(name: str) -> bool:
    return any(part in name for part in NOT_SAVED)


def _plain(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def check_validated(
    model: nn.Module, name: str, given: str | None, least_accuracy: float, least_pairs: int
) -> Validation:
    """The record of reward model `model`, from `given` (a file, or a folder with one) or from `name`, its own folder.
    Raises ConfigError where there is none, or it is another model's, or it does not hold."""
    folder = Path(given or name or ".")
    path = folder if folder.suffix == ".json" else folder / NAME
    named, way_out = name or "the reward model", _way_out(name)
    if not path.is_file():
        missing = f"there is no {path}" if given or Path(name).is_dir() else "reward_validation names none"
        raise ConfigError(f"{named} has no validation record ({missing}): PPO finds whatever is wrong with a reward",
                          hint=way_out)  # fmt: skip
    found = Validation.read(path)
    if found.weights != hash_of_weights(model):
        raise ConfigError(f"{path} of {found.date} is of other weights than {named} has now", hint=way_out)
    if found.n < least_pairs:
        raise ConfigError(f"{path} rests on {found.n} held-out pairs, fewer than reward_validation_pairs={least_pairs}",
                          hint=way_out)  # fmt: skip
    if found.accuracy < least_accuracy:
        raise ConfigError(f"{named} prefers the better of two held-out answers in {found.accuracy:.1%} of {found.n} "
                          f"pairs, less than reward_validation_accuracy={least_accuracy}",
                          hint="train it better first; what it rewards is no better answer")  # fmt: skip
    return found


def _way_out(name: str) -> str:
    return f"posttrain eval --reward-model {name or 'FOLDER'} --data PAIRS.jsonl writes one, of held-out pairs"
