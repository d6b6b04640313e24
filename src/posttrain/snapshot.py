"""What a checkpoint holds, and how a run takes it up again: weights, optimiser, scheduler, random state, the state of
the log, and what the run was, so that resuming with other data or another batch size is refused and not averaged over.

Weights are written the way PEFT and transformers read them (`adapter_model.safetensors` with `adapter_config.json`, or
`model.safetensors` with `config.json`), with fp32 masters where training had them.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from posttrain.errors import CheckpointError
from posttrain.optimizer_state import (
    join_optimizer,
    put_together,
    split_optimizer,
    take_apart,
    take_up_training_weights,
    training_weights,
)

logger = logging.getLogger("posttrain")
OPTIMIZER, RNG, STATE = "optimizer.safetensors", "rng.safetensors", "state.json"
INFINITIES = (float("inf"), float("-inf"))  # a metric's best before the first evaluation; JSON has no word for them


# --- random state ---------------------------------------------------------------------------------------------------


def capture_rng() -> dict[str, Any]:
    """Python's, NumPy's and torch's generators, those of all CUDA devices included."""
    numpy_state = np.random.get_state(legacy=False)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    version, internal, gauss = random.getstate()
    plain = {
        "python": [version, list(internal), gauss],
        "numpy": {
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
    }
    return {"tensors": tensors, "plain": plain}


def restore_rng(captured: dict[str, Any]) -> None:
    tensors, plain = captured["tensors"], captured["plain"]
    torch.set_rng_state(tensors["torch"])
    for name, state in tensors.items():
        if name.startswith("cuda.") and int(name[5:]) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, int(name[5:]))
    version, internal, gauss = plain["python"]
    random.setstate((version, tuple(internal), gauss))
    extra = plain["numpy"]
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": tensors["numpy"].numpy().astype(np.uint32), "pos": extra["pos"]},
            "has_gauss": extra["has_gauss"],
            "gauss": extra["gauss"],
        }
    )


# --- the whole ------------------------------------------------------------------------------------------------------


def _must_be_json(value: Any, owner: str, hint: str) -> None:
    if error := _refusal(value):
        while refused := [name for name, one in value.items() if _refusal(one)] if isinstance(value, dict) else []:
            owner, value = f"{owner}, {refused[0]!r}", value[refused[0]]
        raise CheckpointError(f"the state of {owner} cannot be stored without pickle ({error})", hint=hint)


def _refusal(value: Any) -> Exception | None:
    """Why JSON has no words for `value`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        return error
    return None


def write_training_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    rng: dict[str, Any],
    state: dict[str, Any],
) -> None:
    """Everything beside the weights. `state` is the run's own plain values."""
    tensors, plain = split_optimizer(optimizer)
    save_file(rng["tensors"], folder / RNG)
    scheduler_state = {k: v for k, v in scheduler.state_dict().items() if k != "lr_lambdas"}
    scheduler_state |= {k: str(v) for k, v in scheduler_state.items() if v in INFINITIES}
    scheduler_state = take_apart(scheduler_state, "scheduler", tensors, type(scheduler).__name__)
    document = {**state, "optimizer": plain, "scheduler": scheduler_state, "rng": rng["plain"]}
    another = "choose an optimiser and scheduler of torch's or transformers', or save_only_model=True"
    _must_be_json(plain, type(optimizer).__name__, another)
    _must_be_json(scheduler_state, type(scheduler).__name__, another)
    _must_be_json(document, "the run", "save_only_model=True leaves it out; such a run cannot be gone on with")
    save_file(tensors | training_weights(optimizer), folder / OPTIMIZER)
    (folder / STATE).write_text(json.dumps(document, allow_nan=False), encoding="utf-8")


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's plain values. Raises CheckpointError where it holds weights only."""
    if not (folder / STATE).is_file():
        raise CheckpointError(f"{folder} holds weights only (save_only_model=True); it cannot be resumed from")
    state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return state


def restore_training_state(
    folder: Path, saved: dict[str, Any], optimizer: torch.optim.Optimizer, scheduler: Any
) -> dict[str, Any]:
    """Load optimiser (and through it weights that only it knows) and scheduler; return the captured random state."""
    tensors = load_file(folder / OPTIMIZER)
    join_optimizer(optimizer, tensors, saved["optimizer"])
    take_up_training_weights(optimizer, tensors)
    scheduler_state = put_together(saved["scheduler"], tensors)
    scheduler_state |= {k: float(v) for k, v in scheduler_state.items() if v in map(str, INFINITIES)}
    if "lr_lambdas" in scheduler.state_dict():
        scheduler_state["lr_lambdas"] = [None] * len(scheduler.state_dict()["lr_lambdas"])
    scheduler.load_state_dict(scheduler_state)
    return {"tensors": load_file(folder / RNG), "plain": saved["rng"]}


def warn_of_other_arithmetic(folder: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Say where a run goes on whose last bits will be others than they would have been."""
    before = saved.get("arithmetic", {})
    others = [name for name, value in present.items() if name in before and before[name] != value]
    if others:
        there, here = (", ".join(f"{name} {values[name]}" for name in others) for values in (before, present))
        logger.warning("resume   %s was written with %s; here: %s. The run goes on, but not bit for bit as it would "
                       "have there", folder.name, there, here)  # fmt: skip


def check_same_run(folder: Path, saved: dict[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to go on with something else than what the checkpoint was made with, before anything is loaded."""
    made_with = saved["identity"]
    for name, value in present.items():
        if name in made_with and _differ(made_with[name], value):
            raise CheckpointError(
                f"{folder} was written with {name} = {made_with[name]}, and this run has {value}",
                hint="restore the old setting to go on with that run, or start anew in another output_dir",
            )


def _differ(saved: Any, present: Any) -> bool:
    """In what both know: a checkpoint of an earlier version has not heard of later settings."""
    if isinstance(saved, dict) and isinstance(present, dict):
        return any(_differ(saved[name], present[name]) for name in saved.keys() & present.keys())
    if isinstance(saved, list) and isinstance(present, list):
        return len(saved) != len(present) or any(map(_differ, saved, present))
    return bool(saved != present)
