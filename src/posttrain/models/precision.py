"""Compute in one dtype, learn in fp32.

Every floating parameter computes in the dtype asked for. What is trained has an fp32 master: the user's own `Parameter`
object, which the optimiser holds, while a copy in the compute dtype takes its place in the module. A copy's gradient
waits in its own dtype until there is something to add to it, or until `settle` is called before the optimiser's turn;
sums are fp32. So accumulation over micro-batches loses nothing, and while activations still fill the memory a step of
one micro-batch holds half as much in gradients. Adapter parameters stay fp32 in place: they are small and their layers
cast.

`restore` puts everything back as it was given, trained values included: frozen weights come back bit for bit (a copy is
kept only of those the compute dtype cannot hold exactly), trained ones in their original dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class _Master:
    """`parameter` is the user's object, `compute` stands in for it while training."""

    name: str
    parameter: nn.Parameter
    compute: nn.Parameter
    original_dtype: torch.dtype


class MixedPrecision:
    """Casts `model` to `compute_dtype` with fp32 masters; `adapter_parameters` (by identity) are kept fp32 as they are.

    Call `settle` before each optimiser step, `publish` after it, and `restore` once at the end. Where memory is short,
    `sheds_copies` lets the computing copies go between the two, when nothing computes with them.
    """

    def __init__(self, model: nn.Module, compute_dtype: torch.dtype, adapter_parameters: set[nn.Parameter]):
        self.compute_dtype = compute_dtype
        self._masters: list[_Master] = []
        self._frozen: list[tuple[nn.Parameter, torch.dtype, torch.Tensor | None]] = []
        self._waiting: dict[nn.Parameter, torch.Tensor] = {}
        self.sheds_copies = False
        holders: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_floating_point():
                    holders.setdefault(parameter, []).append((module, name))
        self._holders = holders
        for name, parameter in list(model.named_parameters()):
            if parameter in adapter_parameters:
                self._to_dtype(parameter, torch.float32)
            elif parameter.requires_grad:
                self._give_master(name, parameter)
            elif parameter in holders:
                self._to_dtype(parameter, compute_dtype)

    def _to_dtype(self, parameter: nn.Parameter, dtype: torch.dtype) -> None:
        if parameter.dtype == dtype:
            return
        low = parameter.data.to(dtype)
        exact = torch.equal(low.to(parameter.dtype), parameter.data)
        if not parameter.requires_grad:
            self._frozen.append((parameter, parameter.dtype, None if exact else parameter.data))
        parameter.data = low

    def _give_master(self, name: str, parameter: nn.Parameter) -> None:
        original = parameter.dtype
        parameter.data = parameter.data.float()
        if self.compute_dtype == torch.float32:
            compute = parameter
        else:
            compute = nn.Parameter(parameter.data.to(self.compute_dtype))
            compute.register_post_accumulate_grad_hook(lambda copy: self._take_gradient(copy, parameter))
            self._install(parameter, compute)
        self._masters.append(_Master(name, parameter, compute, original))

    def _install(self, held: nn.Parameter, replacement: nn.Parameter) -> None:
        for module, name in self._holders[held]:
            module._parameters[name] = replacement

    def _take_gradient(self, copy: nn.Parameter, master: nn.Parameter) -> None:
        """A copy's gradient is complete for this micro-batch."""
        gradient, copy.grad = copy.grad, None
        if gradient is None:
            return
        if master in self._waiting:
            master.grad = self._waiting.pop(master).to(master.dtype)
        if master.grad is None:
            self._waiting[master] = gradient
        else:
            master.grad.add_(gradient)

    def settle(self) -> None:
        """Give every master its gradient in fp32."""
        if self.sheds_copies:
            for held in self._masters:
                if held.compute is not held.parameter:
                    held.compute.data = held.compute.data.new_empty(0)
        while self._waiting:
            master, gradient = self._waiting.popitem()
            master.grad = gradient.to(master.dtype)

    def drop_gradients(self) -> None:
        """Forget the gradients of an unfinished step."""
        self._waiting.clear()
        for master in self._masters:
            master.compute.grad = master.parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters' new values into the computing copies."""
        for master in self._masters:
            if master.compute is master.parameter:
                continue
            if master.compute.shape == master.parameter.shape:
                master.compute.copy_(master.parameter)
            else:  # it was let go
                master.compute.data = master.parameter.data.to(self.compute_dtype)

    @property
    def has_copies(self) -> bool:
        """Whether something is trained that does not compute in fp32."""
        return any(held.compute is not held.parameter for held in self._masters)

    def masters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and fp32 masters of the trained parameters that are not adapters."""
        return ((master.name, master.parameter) for master in self._masters)

    @contextmanager
    def exported(self) -> Iterator[None]:
        """The model with its masters (and the frozen weights that the compute dtype cannot hold) in place, to be
        written to disk."""
        for master in self._masters:
            if master.compute is not master.parameter:
                self._install(master.parameter, master.parameter)
        swapped = [(parameter, parameter.data) for parameter, _, kept in self._frozen if kept is not None]
        for parameter, _, kept in self._frozen:
            if kept is not None:
                parameter.data = kept
        try:
            yield
        finally:
            for parameter, low in swapped:
                parameter.data = low
            for master in self._masters:
                if master.compute is not master.parameter:
                    self._install(master.parameter, master.compute)

    def restore(self) -> None:
        """Give the model back its own parameters in their own dtypes, with what they have learned."""
        for master in self._masters:
            if master.compute is not master.parameter:
                self._install(master.parameter, master.parameter)
            master.parameter.data = master.parameter.data.to(master.original_dtype)
        for parameter, dtype, kept in self._frozen:
            parameter.data = parameter.data.to(dtype) if kept is None else kept
        self._masters, self._frozen = [], []


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products run in hardware here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
