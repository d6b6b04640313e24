"""Read and write a policy's weights in the formats PEFT and transformers use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from posttrain.errors import CheckpointError

ADAPTER, FULL = "adapter_model.safetensors", "model.safetensors"


def save_weights(model: Any, folder: Path) -> None:
    """The adapter alone for a PEFT model, the whole model otherwise; safetensors in both cases."""
    model.save_pretrained(folder)


@torch.no_grad()
def load_weights(model: Any, folder: Path) -> None:
    """Put a checkpoint's weights into the parameters of `model`, in place. Every trained parameter must be there."""
    if isinstance(model, PeftModel):
        name = model.active_adapter
        path = _existing(folder if name == "default" else folder / name, ADAPTER)  # as PEFT lays them
        result = set_peft_model_state_dict(model, load_file(path), adapter_name=name)
        missing = [name for name, p in model.named_parameters() if p.requires_grad and name in result.missing_keys]
        if missing:
            raise CheckpointError(f"{path} has no value for {missing[0]}")
        return
    stored = _read_shards(folder)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in stored:
            raise CheckpointError(f"{folder} has no value for {name}")
        parameter.copy_(stored[name])


def _read_shards(folder: Path) -> dict[str, torch.Tensor]:
    index = folder / f"{FULL}.index.json"
    if not index.is_file():
        return load_file(_existing(folder, FULL))
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return {name: tensor for shard in sorted(shards) for name, tensor in load_file(folder / shard).items()}


def _existing(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder} has no {name}: it was made by another kind of run (full or adapter)")
    return folder / name
