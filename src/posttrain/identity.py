"""What must be the same for a resumed run to be the same run, in words and plain values that a checkpoint can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from posttrain import native
from posttrain.reference import ReferenceModel
from posttrain.session import Session


def of_settings(args: TrainingArguments) -> dict[str, Any]:
    """What the steps are made of."""
    return {
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "data seed": args.seed if args.data_seed is None else args.data_seed,
        "compute dtype": "bfloat16" if args.bf16 else "float32",
        "loss_type": getattr(args, "loss_type", None),
        "label_smoothing_factor": args.label_smoothing_factor,
    }


def of_objective(objective: Any, args: TrainingArguments) -> dict[str, Any]:
    """Of an objective of the user's own nothing is known."""
    if not is_dataclass(objective):
        return {}
    return {"settings of the loss": comparable([objective, getattr(args, "beta", None)])}


def of_reference(reference: ReferenceModel | None, session: Session, args: TrainingArguments) -> dict[str, Any]:
    if reference is None:
        return {}
    names = ("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps")
    follows = [getattr(args, name) for name in names] if reference.moves else None
    known = {"reference": reference.identity(session), "what moves the reference": follows}
    return known | ({"the reference's weights": reference.glance} if reference.glance else {})


def of_arithmetic(session: Session) -> dict[str, Any]:
    """What the last bits of a step depend on."""
    device = session.policy.device.type
    has_kernels = native.runs(session.policy.device, session.precision.compute_dtype)
    where = {"processor": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
             "native kernels": has_kernels}  # fmt: skip
    if device == "cuda":
        where = {"processor": torch.cuda.get_device_name(session.policy.device)}
    return {"device": device, "torch": torch.__version__, **where}


def of_schedule(args: TrainingArguments) -> dict[str, Any]:
    """Settings that live on in the checkpoint's optimiser and schedule: others would be read and not heeded."""
    names = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
    kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    return {name: getattr(args, name) for name in names} | {"lr_scheduler_type": kind}


def of_adapter(model: Any) -> dict[str, Any] | None:
    """What makes the same adapter weights another model."""
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, dict):
        return None
    names = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora")
    return {key: {name: str(getattr(config, name, None)) for name in names} for key, config in configs.items()}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What JSON can hold; of anything else its text."""
    known = (str, int, float, bool, type(None))
    finite = {name: value for name, value in values.items() if not isinstance(value, float) or math.isfinite(value)}
    return {name: finite[name] if isinstance(finite.get(name), known) and name in finite else str(values[name])
            for name in values}  # fmt: skip


def comparable(value: Any) -> Any:
    """As JSON has it, so that it can be compared with what a checkpoint says; of other objects their class."""
    if is_dataclass(value) and not isinstance(value, type):
        return {"kind": type(value).__name__, **comparable(asdict(value))}
    if isinstance(value, Mapping):
        return {str(name): comparable(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [comparable(one) for one in value]
    return value if value is None or isinstance(value, str | int | float | bool) else type(value).__name__
