"""Computing in one dtype and learning in fp32: masters, and a model that is given back as it was found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from posttrain.models.adapters import adapter_parameters
from posttrain.models.precision import MixedPrecision
from tests.tiny_models import tiny_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def frozen_but(model: nn.Module, *trained: str) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in trained))
    return model


def snapshot(model: nn.Module) -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
    return {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", DTYPES)
def test_opened_and_restored_nothing_has_changed(given: torch.dtype, compute: torch.dtype) -> None:
    """Bit for bit, the same `Parameter` objects, also where the compute dtype cannot hold the values."""
    model = frozen_but(tiny_model("llama").to(given), "layers.0")
    before = snapshot(model)
    precision = MixedPrecision(model, compute, set())
    assert {parameter.dtype for parameter in model.parameters()} == {compute}
    precision.restore()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert after[name] is parameter
        assert parameter.dtype == given
        assert torch.equal(parameter, value), name


def test_a_parameter_of_another_dtype_than_the_rest_comes_back_too() -> None:
    model = frozen_but(tiny_model("llama").bfloat16(), "nothing")
    model.lm_head.float()
    with torch.no_grad():
        model.lm_head.weight.add_(1e-5)
    before = snapshot(model)
    precision = MixedPrecision(model, torch.bfloat16, set())
    assert model.lm_head.weight.dtype == torch.bfloat16
    precision.restore()
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"][1])


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_masters_are_fp32_and_learn_what_bf16_would_lose(given: torch.dtype) -> None:
    model = tiny_model("llama").to(given)
    mine = dict(model.named_parameters())
    precision = MixedPrecision(model, torch.bfloat16, set())
    masters = dict(precision.masters())
    assert masters.keys() == mine.keys()
    name = "model.layers.0.mlp.up_proj.weight"
    master, start = masters[name], masters[name].detach().clone()
    assert master is mine[name]
    assert master.dtype == torch.float32
    computing = model.get_parameter(name)
    assert computing is not master
    assert computing.dtype == torch.bfloat16
    with torch.no_grad():
        for _ in range(100):
            master.add_(1e-5)  # each too small for bf16
    assert torch.equal(computing, start.bfloat16())
    precision.publish()
    assert torch.equal(computing, master.bfloat16())
    assert not torch.equal(computing, start.bfloat16())
    precision.restore()
    assert model.get_parameter(name) is master
    assert torch.equal(master, (start + 1e-3).to(given)) or torch.allclose(master.float(), start + 1e-3, atol=1e-4)
    assert master.dtype == given


def test_gradients_add_up_in_fp32() -> None:
    """A thousand gradients of 1e-3 beside one of 1: in bf16 all but the first would be lost."""
    layer = nn.Linear(1, 1, bias=False)
    precision = MixedPrecision(layer, torch.bfloat16, set())
    (name, master) = next(precision.masters())
    assert name == "weight"
    layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    for _ in range(1000):
        layer(torch.full((1, 1), 2**-10, dtype=torch.bfloat16)).sum().backward()
    precision.settle()
    assert master.grad is not None
    assert master.grad.dtype == torch.float32
    assert master.grad.item() == 1 + 1000 / 1024
    assert layer.weight.grad is None


def test_a_first_gradient_waits_in_the_compute_dtype() -> None:
    layer = nn.Linear(1, 1, bias=False)
    precision = MixedPrecision(layer, torch.bfloat16, set())
    ((_, master),) = precision.masters()
    layer(torch.full((1, 1), 0.1, dtype=torch.bfloat16)).sum().backward()
    assert master.grad is layer.weight.grad is None
    precision.settle()
    assert master.grad is not None
    assert master.grad.item() == torch.tensor(0.1).bfloat16().item()


def test_dropped_gradients_are_gone() -> None:
    layer = nn.Linear(1, 1, bias=False)
    precision = MixedPrecision(layer, torch.bfloat16, set())
    ((_, master),) = precision.masters()
    for count in (1, 2):
        for _ in range(count):
            layer(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
        precision.drop_gradients()
        precision.settle()
        assert master.grad is layer.weight.grad is None


def test_copies_that_were_let_go_come_back() -> None:
    model = tiny_model("llama")
    precision = MixedPrecision(model, torch.bfloat16, set())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    precision.sheds_copies = True
    precision.settle()
    assert all(parameter.numel() == 0 for parameter in model.parameters())
    precision.publish()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    precision.settle()
    precision.restore()
    assert torch.equal(model.lm_head.weight, tiny_model("llama").lm_head.weight)


def test_in_fp32_the_parameters_are_their_own_masters() -> None:
    model = tiny_model("llama")
    before = snapshot(model)
    precision = MixedPrecision(model, torch.float32, set())
    assert all(parameter is before[name][0] for name, parameter in precision.masters())
    assert all(parameter is before[name][0] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("family", ["gpt2", "gemma3"])
def test_tied_weights_stay_tied(family: str) -> None:
    model = tiny_model(family)
    embedding = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embedding
    precision = MixedPrecision(model, torch.bfloat16, set())
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight is not embedding
    assert sum(master is embedding for _, master in precision.masters()) == 1
    ids = torch.tensor([[5, 6, 7]])
    model(input_ids=ids, labels=ids).loss.backward()
    precision.settle()
    assert embedding.grad is not None
    reference = tiny_model(family)
    reference(input_ids=ids, labels=ids).loss.backward()
    expected = reference.get_input_embeddings().weight.grad  # of both its uses
    assert (embedding.grad - expected).norm() < 0.1 * expected.norm()
    precision.restore()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is embedding


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_exported_holds_masters_and_exact_frozen_weights(given: torch.dtype) -> None:
    model = frozen_but(tiny_model("llama").to(given), "layers.1")
    before = snapshot(model)
    precision = MixedPrecision(model, torch.bfloat16, set())
    inside = dict(model.named_parameters())
    with torch.no_grad():
        for _, master in precision.masters():
            master.add_(1e-5)
    with precision.exported():
        for name, parameter in model.named_parameters():
            if "layers.1" in name:
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, before[name][1].float() + 1e-5)
            else:
                assert torch.equal(parameter.to(given), before[name][1])
    for name, parameter in model.named_parameters():
        assert parameter is inside[name]
        assert parameter.dtype == torch.bfloat16


def test_exported_comes_back_after_an_error() -> None:
    model = frozen_but(tiny_model("llama"), "layers.1")
    precision = MixedPrecision(model, torch.bfloat16, set())
    with pytest.raises(RuntimeError, match="disk"), precision.exported():
        raise RuntimeError("disk")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_adapters_stay_fp32_in_place() -> None:
    model = get_peft_model(tiny_model("llama").bfloat16(), LoraConfig(r=2, target_modules="all-linear"))
    mine = adapter_parameters(model)
    before = snapshot(model)
    precision = MixedPrecision(model, torch.bfloat16, mine)
    assert list(precision.masters()) == []
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0]
        assert parameter.dtype == (torch.float32 if parameter in mine else torch.bfloat16)


def test_integers_and_buffers_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.arange(3), requires_grad=False)
            self.register_buffer("inv_freq", torch.tensor([1.0, 1e-4]))
            self.weight = nn.Parameter(torch.ones(2))

    odd = Odd()
    precision = MixedPrecision(odd, torch.bfloat16, set())
    assert odd.table.dtype == torch.int64
    assert odd.inv_freq.dtype == torch.float32
    assert [name for name, _ in precision.masters()] == ["weight"]
