"""What says beside a policy how much reward is to be expected from a token on, and is trained with it: PPO's critic.

It is a linear layer on the policy's own last states (`ValueHead`), or a model of its own with one score (`ValueModel`).
The first has its own precision and goes wherever the policy is saved; the second is opened for packed computing as the
policy is (`posttrain.session`), and lies in checkpoints alone.

Shape suffixes: `R` supervised rows, `D` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from safetensors.torch import load_file, save_file

from posttrain.models.head import rows_of
from posttrain.models.weights import load_weights, save_weights
from posttrain.types import Batch

if TYPE_CHECKING:
    from posttrain.models.forward import Policy


class Critic:
    """`name` stands before the names of its parameters (`value_head.weight`) and is what it is saved as. `policies` are
    its models while a session has them open."""

    name: ClassVar[str]

    def __init__(self, module: Any):
        self.module = module
        self.policies: Sequence[Policy] = ()

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        """Language models that a session is to open beside the policy, by name."""
        return {}

    def own_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained of it outside `models`, by name."""
        return {}

    def open(self, policies: Sequence[Policy], device: torch.device) -> None:
        """`policies` are its `models`, opened."""
        self.policies = policies

    def values(self, hidden_RD: torch.Tensor, batch: Batch, is_training: bool) -> torch.Tensor:
        """`(R,)`. `hidden_RD` are the policy's last states at the supervised rows of `batch`."""
        raise NotImplementedError

    def save(self, folder: Path, is_checkpoint: bool) -> None:
        """Beside a policy's weights, which do not go into checkpoints only."""
        raise NotImplementedError

    def load(self, folder: Path) -> None:
        """From a checkpoint."""
        raise NotImplementedError


class ValueHead(Critic):
    """One fp32 linear layer on the policy's own last states; it is no part of the model."""

    name = "value_head"

    def own_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {f"{self.name}.{name}": parameter for name, parameter in self.module.named_parameters()}

    def open(self, policies: Sequence[Policy], device: torch.device) -> None:
        super().open(policies, device)
        self.module.to(device)

    def values(self, hidden_RD: torch.Tensor, batch: Batch, is_training: bool) -> torch.Tensor:
        value_R1: torch.Tensor = self.module(hidden_RD.to(self.module.weight.dtype))
        return value_R1[:, 0]

    def save(self, folder: Path, is_checkpoint: bool) -> None:
        save_file(self.module.state_dict(), folder / f"{self.name}.safetensors")

    def load(self, folder: Path) -> None:
        self.module.load_state_dict(load_file(folder / f"{self.name}.safetensors"))


class ValueModel(Critic):
    """A sequence-classification model with one score, which reads the same batches as the policy."""

    name = "value_model"

    @property
    def models(self) -> dict[str, torch.nn.Module]:
        return {self.name: self.module}

    def values(self, hidden_RD: torch.Tensor, batch: Batch, is_training: bool) -> torch.Tensor:
        (policy,) = self.policies
        policy.model.train(is_training)
        score_R1: torch.Tensor = policy.base.score(rows_of(policy.states(batch), batch.rows_R))
        return score_R1[:, 0].float()

    def save(self, folder: Path, is_checkpoint: bool) -> None:
        if is_checkpoint:
            save_weights(self.module, folder / self.name)

    def load(self, folder: Path) -> None:
        load_weights(self.module, folder / self.name)
