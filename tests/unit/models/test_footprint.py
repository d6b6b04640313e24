"""What the formula says is kept for the backward pass is what autograd keeps, whether kernels take a model or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from posttrain import SFTConfig, native
from posttrain.models.footprint import footprint
from posttrain.session import Session
from posttrain.types import Needs
from tests.tiny_batches import random_batch
from tests.tiny_models import VOCABULARY

LENGTHS = [200, 200]


def sizes(head_dim: int) -> dict[str, Any]:
    return {"vocab_size": VOCABULARY, "hidden_size": 4 * head_dim, "intermediate_size": 12 * head_dim,
            "head_dim": head_dim, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2}  # fmt: skip


MODELS = {
    "heads that the kernels know": lambda: LlamaForCausalLM(LlamaConfig(**sizes(32))),
    "heads that they do not": lambda: LlamaForCausalLM(LlamaConfig(**sizes(24))),
    "a window": lambda: MistralForCausalLM(MistralConfig(sliding_window=100, **sizes(32))),
}


def kept(session: Session) -> int:
    """Bytes that the layers' forward saves, but what is there anyway."""
    there = {parameter.untyped_storage().data_ptr() for parameter in session.policy.base.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in there:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = session.policy(random_batch(LENGTHS), Needs())
    assert outputs.logp_R.requires_grad  # what was saved is alive until here
    return sum(saved.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("with_kernels", [True, False], ids=["kernels", "torch"])
def test_what_is_kept_in_fp32(name: str, with_kernels: bool, tmp_path: Path) -> None:
    def measured() -> tuple[float, float]:
        session = Session.open(MODELS[name](), SFTConfig(str(tmp_path), bf16=False))
        said = footprint(session.policy.base, session.trained, set(session.lean), "adamw").kept["none"]
        seen = kept(session)
        session.close()
        return seen, said * sum(LENGTHS)

    if with_kernels:
        seen, said = measured()
    else:
        with native.without_kernels():
            seen, said = measured()
    assert 0.9 * said <= seen <= 1.1 * said
