"""The reference model's log-probabilities: where they come from, and keeping them.

Without a model of its own the reference is the starting model: the same model with a fresh adapter off, or with the
trained weights put back for the length of a forward pass (`Held`). It may be asked once, before the first step
(reference_ahead.py).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel
from safetensors import torch as tensor_files
from torch import nn

from posttrain import native
from posttrain.errors import CheckpointError, ConfigError
from posttrain.models.forward import Policy
from posttrain.reference_ahead import versions, weights_hash
from posttrain.session import Session
from posttrain.types import Batch, Needs

logger = logging.getLogger("posttrain")
MOVED = "reference.safetensors"
A_GLANCE = 256
"""Elements of each tensor that tell one reference from another where nobody reads them all."""


class Reference(Protocol):
    """A batch in, `logp_R` of its supervised rows out, without gradient."""

    def __call__(self, batch: Batch) -> torch.Tensor: ...


@dataclass
class OfPolicy:
    """The policy itself, inside `as_reference`. Raises ConfigError for a model of its own that does not honour batches
    as they are laid out for the policy."""

    policy: Policy
    as_reference: Callable[[], Any]

    @torch.no_grad()
    def __call__(self, batch: Batch) -> torch.Tensor:
        model = self.policy.model
        training = model.training
        if batch.layout.is_shared and not self.policy.shares_prompts:
            raise ConfigError(f"ref_model ({type(self.policy.base).__name__}) does not honour shared prompts, and the "
                              "policy does", hint="give a reference of the policy's own kind, or none")  # fmt: skip
        with self.as_reference():
            model.eval()
            try:
                return self.policy(batch, Needs()).logp_R
            finally:
                model.train(training)


@dataclass
class ReferenceModel:
    """Which model is the reference: `model`, or the adapter `adapter`, or without either the model that training starts
    from. `precompute` its answers, and keep them in `folder` (None: nowhere).

    `moves` says that `follow` will be called: its weights are then part of checkpoints. `open` is to be called before
    anything is learned; what it remembers serves every later session of the same model.
    """

    model: Any = None
    adapter: str | None = None
    precompute: bool = False
    folder: Path | None = None
    _is_open: bool = False
    _is_off: bool = False
    moves: bool = False
    _trained: dict[str, nn.Parameter] = field(default_factory=dict, repr=False)
    _held: Held | None = None
    _own: Session | None = None
    _about: dict[str, Any] | None = None
    glance: str = ""
    _masters: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def open(self, session: Session) -> None:
        if self._is_open:
            return
        self._is_open = True
        self._trained = session.trained_of_policy
        self._is_off = is_fresh_adapter(session.policy.model)
        if self.model is None and self.adapter is None and not self._is_off and not self.precompute:
            self._held = Held(self._trained)
        if self.moves and self.model is not None:  # in small steps, which bf16 would round away
            found = dict(self.model.named_parameters())
            self._masters = {name: found[name].detach().float().clone() for name in self._trained}
        if not self.precompute:
            self.glance = weights_hash(*self._weights(session), at_most=A_GLANCE)[:16]

    def ask(self, session: Session) -> Reference:
        """The reference, as a function of batches."""
        policy = session.policy
        if self.model is not None:
            if self._own is None:
                self.model.requires_grad_(False)
                self._own = Session.open(self.model, session.args)
                self._publish()
            return OfPolicy(self._own.policy, nullcontext)
        if self.adapter is not None:
            return OfPolicy(policy, lambda: _with_adapter(policy.model, str(self.adapter)))
        if self._held is not None:
            held = self._held
            return OfPolicy(policy, lambda: held.in_place(session.precision.publish))
        if self._is_off:
            return OfPolicy(policy, policy.model.disable_adapter)
        return OfPolicy(policy, nullcontext)  # asked ahead, while it is the starting model still

    @property
    def can_be_asked(self) -> bool:
        """Whether it is there still, and not only what it said before training began."""
        return self.model is not None or self.adapter is not None or self._is_off or self._held is not None

    def depends_on(self, session: Session) -> dict[str, Any]:
        """What its answers depend on beside the tokens; to be asked before anything is learned."""
        model = session.policy.model if self.model is None else self.model
        base, active = self._weights(session)
        configs = getattr(model, "peft_config", {})
        has_kernels = native.runs(session.policy.device, session.precision.compute_dtype)
        self._about = {
            "weights": weights_hash(base, active),
            "model": [type(base).__name__, _settings(base.config)],
            "adapters": {name: _settings(configs[name]) for name in active if name in configs},
            "dtype": str(session.precision.compute_dtype),
            "code": [*versions(), session.policy.device.type, has_kernels],
        }
        return self._about

    def _weights(self, session: Session) -> tuple[nn.Module, list[str]]:
        """The model that has them, without its adapters, and which of these belong to them."""
        model = session.policy.model if self.model is None else self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if not isinstance(model, PeftModel) or (self._is_off and self.model is None):
            return base, []
        return base, [self.adapter] if self.adapter else list(model.active_adapters)

    def identity(self, session: Session) -> str:
        """Of its weights: another reference makes another run of it. Where nothing was asked ahead they are not read
        for that, but looked at here and there (`glance`)."""
        kind = "another model" if self.model is not None else self.adapter or "the model that training starts from"
        if not self.precompute:
            return kind
        about = {name: value for name, value in (self._about or self.depends_on(session)).items() if name != "code"}
        return f"{kind}, {hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]}"

    def follow(self, share: float) -> None:
        """Move towards the policy: `share` of it and the rest of what it was (TR-DPO, arXiv 2404.09656, equation 7)."""
        with torch.no_grad():
            for name, tensor in self._own_weights().items():
                tensor.lerp_(self._trained[name].data.to(tensor), share)
            self._publish()

    def save(self, folder: Path) -> None:
        """What a reference that moves has become, beside a checkpoint's weights."""
        if self.moves:
            tensor_files.save_file(
                {name: tensor.contiguous() for name, tensor in self._own_weights().items()}, folder / MOVED
            )

    def load(self, folder: Path) -> None:
        """Raises CheckpointError where the checkpoint has none."""
        if not self.moves:
            return
        if not (folder / MOVED).is_file():
            raise CheckpointError(f"{folder} has no {MOVED}: it was made without sync_ref_model")
        stored = tensor_files.load_file(folder / MOVED)
        for name, tensor in self._own_weights().items():
            tensor.copy_(stored[name])
        self._publish()

    def _own_weights(self) -> dict[str, torch.Tensor]:
        """The reference's own copies of what is trained, by name, as precise as they move."""
        return self._masters if self._held is None else self._held.weights()

    def _publish(self) -> None:
        """Into a model of its own, in the dtype that it has."""
        found = dict(self.model.named_parameters()) if self._masters else {}
        for name, master in self._masters.items():
            found[name].data.copy_(master)

    def close(self) -> None:
        """Give a model of its own back in its own dtypes; one that moves as it has become."""
        if self._own is not None:
            self._own.close()
            self._own = None
            self._publish()


def _settings(config: Any) -> dict[str, Any]:
    """Of a model or an adapter, the same in every process: sets have no order, and text shows them in any."""
    return {
        name: sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
        for name, value in sorted(config.to_dict().items())
        if name != "transformers_version"
    }


def is_fresh_adapter(model: Any) -> bool:
    """Whether a LoRA adapter is all that is trained and changes nothing yet: what begins with zeros is zero."""
    if not hasattr(model, "peft_config") or not hasattr(model, "disable_adapter"):
        return False
    second = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    others = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    return bool(second) and not others and not any(bool(p.any()) for p in second)


@contextmanager
def _with_adapter(model: Any, name: str) -> Iterator[None]:
    active = model.active_adapter
    trained = [p for p in model.parameters() if p.requires_grad]
    model.set_adapter(name)
    try:
        yield
    finally:
        model.set_adapter(active)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


class Held:
    """A copy of what is trained, which can take its place for a while."""

    def __init__(self, trained: dict[str, nn.Parameter]):
        self._names = list(trained)
        self._pairs = [(parameter, parameter.detach().clone()) for parameter in trained.values()]

    def weights(self) -> dict[str, torch.Tensor]:
        """What is held while it is not in place, by name."""
        return {name: held for name, (_, held) in zip(self._names, self._pairs, strict=True)}

    @contextmanager
    def in_place(self, publish: Callable[[], None]) -> Iterator[None]:
        self._swap(publish)
        try:
            yield
        finally:
            self._swap(publish)

    def _swap(self, publish: Callable[[], None]) -> None:
        for index, (parameter, held) in enumerate(self._pairs):
            present = parameter.data
            parameter.data = held.to(present.dtype)
            self._pairs[index] = (parameter, present)
        publish()
