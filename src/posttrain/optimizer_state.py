"""An optimiser's state as named tensors and plain JSON, and back: no pickle, and no class of a stranger's choosing.

Most optimisers hold tensors and numbers. Some hold more: quantised moments that are tensor subclasses (torchao), nested
dictionaries (bitsandbytes), projectors that are objects (GaLore, APOLLO). Those are taken apart into their tensors and
plain fields, and only classes of the packages named here are ever put together again.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.errors import CheckpointError

TRUSTED = ("torchao", "galore_torch", "apollo_torch", "bitsandbytes")
MARK = "$"
Tensors = dict[str, torch.Tensor]


def split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """Its state as named tensors and plain JSON. Raises CheckpointError for state that is neither."""
    tensors: Tensors = {}
    return tensors, take_apart(optimizer.state_dict(), "", tensors, type(optimizer).__name__)


def join_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], plain: Any) -> None:
    """Give the optimiser back what `split_optimizer` took apart."""
    optimizer.load_state_dict(put_together(plain, tensors))


def take_apart(value: Any, path: str, tensors: Tensors, owner: str) -> Any:
    """`value` as JSON; what it holds of tensors goes into `tensors` under names that begin with `path`."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {MARK: "dtype", "is": str(value).removeprefix("torch.")}
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        tensors[path] = value.detach().cpu().contiguous().clone()
        return {MARK: "tensor", "is": path}
    if isinstance(value, (list, tuple)):
        items = [take_apart(item, f"{path}/{i}", tensors, owner) for i, item in enumerate(value)]
        return {MARK: "tuple", "is": items} if isinstance(value, tuple) else items
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        pairs = [[key, take_apart(item, f"{path}/{key}", tensors, owner)] for key, item in value.items()]
        return {MARK: "dict", "is": pairs}
    kind = type(value)
    if kind.__module__.split(".")[0] not in TRUSTED:
        raise CheckpointError(
            f"the state of {owner} cannot be stored without pickle (it holds a {kind.__module__}.{kind.__qualname__})",
            hint="choose an optimiser and scheduler of torch's or transformers', or save_only_model=True",
        )
    made = {"class": f"{kind.__module__}:{kind.__qualname__}"}
    if isinstance(value, torch.Tensor):
        names, context = value.__tensor_flatten__()  # type: ignore[attr-defined]
        parts = {name: getattr(value, name) for name in names}
        whole = {"parts": parts, "context": context, "size": tuple(value.size()), "stride": tuple(value.stride())}
        return {MARK: "subclass", **made, "is": take_apart(whole, path, tensors, owner)}
    return {MARK: "object", **made, "is": take_apart(vars(value), path, tensors, owner)}


def put_together(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [put_together(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind, inner = value[MARK], value["is"]
    if kind == "tensor":
        return tensors[inner]
    if kind == "dtype":
        return getattr(torch, inner)
    if kind == "tuple":
        return tuple(put_together(inner, tensors))
    if kind == "dict":
        return {key: put_together(item, tensors) for key, item in inner}
    made = _class(value["class"])
    fields = put_together(inner, tensors)
    if kind == "subclass":
        return made.__tensor_unflatten__(fields["parts"], fields["context"], fields["size"], fields["stride"])
    instance = made.__new__(made)
    vars(instance).update(fields)
    return instance


def _class(name: str) -> Any:
    module, _, qualified = name.partition(":")
    if module.split(".")[0] not in TRUSTED or "." in qualified:
        raise CheckpointError(f"a checkpoint asks for the class {name}, which no optimiser known here uses")
    return getattr(importlib.import_module(module), qualified)


# --- state before the first step ------------------------------------------------------------------------------------

EAGER = (torch.optim.Adam, torch.optim.AdamW)
"""Optimisers whose first state is zeros, whatever the gradients are."""


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Let the optimiser make its state now and not during its first step. What stays for the whole run then lies
    together instead of filling the holes that the first step's activations leave; and memory that does not suffice is
    missed before anything is updated. Other optimisers than Adam make theirs when they always do."""
    if type(optimizer) not in EAGER or optimizer.state:
        return
    for group in optimizer.param_groups:
        learning = [parameter for parameter in group["params"] if parameter.grad is None]
        for parameter in learning:
            parameter.grad = parameter.new_zeros(()).expand_as(parameter)  # takes no memory
        try:
            optimizer._init_group(group, [], [], [], [], [], [])  # type: ignore[attr-defined]
        finally:
            for parameter in learning:
                parameter.grad = None


Marks = list[tuple[torch.Tensor, int]]


def mark(optimizer: torch.optim.Optimizer) -> tuple[Marks, set[Any]]:
    """What `nothing_changed` compares with: torch's counts of changes to what the optimiser trains and keeps."""
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [value for state in optimizer.state.values() if isinstance(state, dict) for value in state.values()]
    return [(x, x._version) for x in (*held, *kept) if isinstance(x, torch.Tensor)], set(optimizer.state)


def nothing_changed(optimizer: torch.optim.Optimizer, marked: tuple[Marks, set[Any]]) -> bool:
    """Whether a step that failed has left everything as it was when `mark` was called. State that it began to make is
    dropped, for it may be incomplete."""
    marks, had_state = marked
    if any(tensor._version != version for tensor, version in marks):
        return False
    for parameter in [parameter for parameter in optimizer.state if parameter not in had_state]:
        del optimizer.state[parameter]
    return True


# --- optimisers with two sets of weights ----------------------------------------------------------------------------


def has_two_modes(optimizer: Any) -> bool:
    """Whether it trains one set of weights and evaluates another (schedule-free: Defazio et al. 2024)."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def training_weights(optimizer: torch.optim.Optimizer) -> Tensors:
    """Copies of the weights that are being trained, by position; empty where they are also those evaluated."""
    if not has_two_modes(optimizer):
        return {}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {f"training/{index}": parameter.detach().clone() for index, parameter in enumerate(held)}


@torch.no_grad()
def take_up_training_weights(optimizer: torch.optim.Optimizer, saved: Mapping[str, torch.Tensor]) -> None:
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(held):
        if f"training/{index}" in saved:
            parameter.copy_(saved[f"training/{index}"])


@contextmanager
def evaluation_weights(optimizer: Any) -> Iterator[None]:
    """Inside, the parameters are those to evaluate and to save; after it, bit for bit those being trained."""
    if not has_two_modes(optimizer):
        yield
        return
    kept = training_weights(optimizer)
    modes = [group.get("train_mode") for group in optimizer.param_groups]
    optimizer.eval()
    try:
        yield
    finally:
        take_up_training_weights(optimizer, kept)
        for group, mode in zip(optimizer.param_groups, modes, strict=True):
            group["train_mode"] = mode
