"""Lean norms and feed-forward layers: the same numbers and gradients as transformers' own, and put back at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from posttrain.models import adapters
from posttrain.models.lean_layers import _Gated, give_back, specialise_layers
from tests.tiny_models import tiny_model

PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)]
LEAN = {"llama": 7, "qwen2": 7, "mistral": 7, "qwen3": 11, "gemma3": 0, "gpt2": 0}


def mlp(dtype: torch.dtype = torch.float64, lora: bool = False, bias: bool = False) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
                         num_attention_heads=2, mlp_bias=bias)  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    if lora:
        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        adapters.specialise(model)
        model = model.get_base_model()
    return model.model.layers[0].mlp.to(dtype)


def numbers(module: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output and all gradients under some loss."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    output = module(x)
    (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)).sum().backward()
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {"output": output.detach(), "x": x.grad, **{k: v.clone() for k, v in grads.items()}}  # type: ignore[dict-item]


def assert_same(module: nn.Module, width: int, dtype: torch.dtype, tolerance: float) -> None:
    x = torch.randn(2, 7, width, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = numbers(module, x)
    assert specialise_layers(module)
    seen = numbers(module, x)
    assert expected.keys() == seen.keys()
    assert len(expected) > 2
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_norm_is_the_same(dtype: torch.dtype, tolerance: float) -> None:
    norm = LlamaRMSNorm(32, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.normal_()
    holder = nn.Sequential(norm)
    if dtype == torch.float64:  # transformers' own computes in fp32
        tolerance = 1e-5
    assert_same(holder, 32, dtype, tolerance)


def test_gradients_of_a_norm() -> None:
    norm = LlamaRMSNorm(6, 1e-3).double()
    specialise_layers(nn.Sequential(norm))

    def run(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        norm._parameters["weight"] = weight  # type: ignore[assignment]
        return norm(x)

    inputs = (torch.randn(3, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64))
    assert torch.autograd.gradcheck(run, tuple(t.requires_grad_() for t in inputs))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), PRECISIONS)
def test_a_feed_forward_layer_is_the_same(lora: bool, bias: bool, dtype: torch.dtype, tolerance: float) -> None:
    layer = mlp(dtype, lora, bias)
    width = layer.gate_proj.in_features  # type: ignore[union-attr]
    assert_same(nn.Sequential(layer), width, dtype, tolerance)


def test_dropout_draws_and_is_kept_for_the_backward_pass() -> None:
    layer = mlp(torch.float64, lora=True)
    for module in layer.modules():
        if isinstance(module, adapters.LeanLora):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    specialise_layers(nn.Sequential(layer))

    def run(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(3)
        return layer(x)

    x = torch.randn(4, layer.gate_proj.in_features, dtype=torch.float64, requires_grad=True)  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(run, (x,))
    layer.eval()
    still = layer(x)
    layer.train()
    assert not torch.equal(still, run(x))


@pytest.mark.parametrize(("family", "count"), LEAN.items())
def test_which_layers_qualify_and_that_they_are_put_back(family: str, count: int) -> None:
    model = tiny_model(family)
    changed = specialise_layers(model)
    assert len(changed) == count
    assert specialise_layers(model) == []
    give_back(changed)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_layer_that_somebody_listens_to_is_called() -> None:
    layer = mlp(torch.float32)
    seen: list[Any] = []
    layer.down_proj.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[union-attr]
    specialise_layers(nn.Sequential(layer))
    seen.clear()
    layer(torch.randn(2, layer.gate_proj.in_features))  # type: ignore[union-attr]
    assert seen == [1]


def test_another_norm_under_the_name_keeps_its_own() -> None:
    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 1

    assert specialise_layers(nn.Sequential(OddRMSNorm(8))) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_its_adapter_a_layer_says_what_it_says_before_the_adapter_has_learned(dtype: torch.dtype) -> None:
    """Bit for bit: the margin between a policy and its reference begins at zero."""
    model: Any = get_peft_model(tiny_model().to(dtype), LoraConfig(r=4, target_modules="all-linear"))
    adapters.specialise(model)
    assert specialise_layers(model)
    layer, x = model.base_model.model.model.layers[0].mlp, torch.randn(1, 7, 32).to(dtype)
    with torch.no_grad():
        with model.disable_adapter():
            alone = layer(x)
        assert torch.equal(layer(x), alone)


def test_gradients_without_the_adapter() -> None:
    gate, up = (torch.randn(5, 48, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(_Gated.apply, (gate, up))
