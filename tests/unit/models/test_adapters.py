"""The lean LoRA layer against PEFT's own: same values, same gradients, same dropout; anything out of the ordinary is
left to PEFT.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from posttrain import ConfigError
from posttrain.models import adapters
from posttrain.models.adapters import LeanLora, adapter_parameters, add_adapter, specialise
from tests.tiny_models import tiny_model


class Two(nn.Module):
    """Two linear layers, with and without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


def pair(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, Any]:
    """PEFT's model, and an equal one with lean layers. B is not zero; adapters are fp32 on a base of `dtype`."""
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 7, "target_modules": ["up", "down"], **options}
    theirs = get_peft_model(Two(), LoraConfig(**config))
    for name, parameter in theirs.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(dtype)
        elif "lora_B" in name:
            nn.init.normal_(parameter)
    ours = copy.deepcopy(theirs)
    assert specialise(ours) == 2
    return theirs, ours


def count_lean(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = adapters._LoraProduct.apply
    monkeypatch.setattr(adapters._LoraProduct, "apply", lambda *given: calls.append(1) or original(*given))
    return calls


def through(model: Any, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    x = x.clone().requires_grad_()
    output = model(x)
    (output * torch.linspace(-1, 2, output.numel()).view(output.shape).to(output)).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return output.detach(), {**grads, "x": x.grad}


def assert_close(one: Any, other: Any, tolerance: float) -> None:
    assert (one[0] - other[0]).norm() <= tolerance * other[0].norm()
    assert one[1].keys() == other[1].keys()
    for name, value in other[1].items():
        assert one[1][name].dtype == value.dtype, name
        assert (one[1][name] - value).norm() <= tolerance * value.norm(), name


X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(2, 5, 12), (10, 12)])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_alpha": 0.5}], ids=str)
def test_fp32(options: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(**options)
    calls = count_lean(monkeypatch)
    expected = through(theirs, X.view(shape))
    assert not calls
    assert_close(through(ours, X.view(shape)), expected, 1e-6)
    assert len(calls) == 2
    assert {name.split(".")[-3] for name in expected[1] if name != "x"} == {"lora_A", "lora_B"}


def test_float64() -> None:
    theirs, ours = (model.double() for model in pair())
    output, grads = through(ours, X.double())
    expected, expected_grads = through(theirs, X.double())
    torch.testing.assert_close(output, expected, rtol=1e-13, atol=1e-13)
    for name, value in expected_grads.items():
        torch.testing.assert_close(grads[name].double(), value, rtol=1e-6, atol=1e-6)


def test_bf16_is_as_close_to_exact_as_peft() -> None:
    """Adapters are fp32 masters; both compute in bf16, in another order."""
    theirs, ours = pair(torch.bfloat16)
    exact = through(copy.deepcopy(theirs).float(), X.bfloat16().float())
    for model in (theirs, ours):
        output, grads = through(model, X.bfloat16())
        assert output.dtype == torch.bfloat16
        assert (output.float() - exact[0]).norm() < 0.01 * exact[0].norm()
        for name, value in exact[1].items():
            assert grads[name].dtype == (torch.bfloat16 if name == "x" else torch.float32)
            assert (grads[name].float() - value).norm() < 0.02 * value.norm(), name


def test_the_first_layer_makes_no_gradient_for_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    needed: list[bool] = []
    original = adapters._LoraProduct.backward

    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        result = original(ctx, grad)
        needed.append(result[0] is not None)
        return result

    monkeypatch.setattr(adapters._LoraProduct, "backward", staticmethod(backward))
    _, ours = pair()
    ours(X).sum().backward()
    assert needed == [True, False]  # `down` passes one on to `up`, which has nobody to pass it to


def test_dropout_is_peft_s_in_the_mean_and_in_its_rate() -> None:
    theirs, ours = pair(lora_dropout=0.3)
    ours.train()
    torch.manual_seed(0)
    layer, plain = ours.base_model.model.up, theirs.base_model.model.up
    with torch.no_grad():
        outputs = torch.stack([layer(X) for _ in range(4000)])
        plain.eval()
        torch.testing.assert_close(outputs.mean(0), plain(X), rtol=0.05, atol=0.12)
        plain.train()
        spread = torch.stack([plain(X) for _ in range(4000)]).std()
    assert outputs.std().item() == pytest.approx(spread.item(), rel=0.02)
    ours.eval()
    with torch.no_grad():
        assert torch.equal(layer(X), layer(X))


def test_dropout_s_gradient_uses_the_same_mask() -> None:
    """The layer is linear in its input, so the gradient is known from the very output it belongs to."""
    _, ours = pair(lora_dropout=0.5)
    layer = ours.base_model.model.up.train()
    x = torch.randn(1, 12, requires_grad=True)
    torch.manual_seed(4)
    layer(x).sum().backward()
    delta = torch.zeros_like(x)
    for column in range(12):
        for sign in (1, -1):
            moved = x.detach().clone()
            moved[0, column] += sign * 0.5
            torch.manual_seed(4)
            delta[0, column] += sign * layer(moved).sum().detach()
    torch.testing.assert_close(x.grad, delta, rtol=1e-4, atol=1e-4)


# --- what is left to PEFT -------------------------------------------------------------------------------------------


def _disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def _merged(model: Any) -> None:
    model.merge_adapter()


def _two_active(model: Any) -> None:
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up", "down"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])


def _another_active(model: Any) -> None:
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    model.set_adapter("second")


def _trained_base(model: Any) -> None:
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.base_layer.weight.requires_grad_()


@pytest.mark.parametrize("change", [_disabled, _merged, _two_active, _trained_base])
def test_out_of_the_ordinary(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        change(model)
    calls = count_lean(monkeypatch)
    assert_close(through(ours, X), through(theirs, X), 0)
    assert not calls


def test_another_adapter_on_one_of_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair()
    for model in (theirs, ours):
        _another_active(model)
    calls = count_lean(monkeypatch)
    assert_close(through(ours, X), through(theirs, X), 1e-6)
    assert len(calls) == 1  # `up` has the active adapter, `down` none


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = pair(**options)
    calls = count_lean(monkeypatch)
    assert_close(through(ours, X), through(theirs, X), 0)
    assert not calls


def test_back_to_the_ordinary() -> None:
    """Merging and unmerging, disabling for a while: the layer follows, and weights merge as PEFT merges them."""
    theirs, ours = pair()
    with torch.no_grad():
        expected = theirs(X)
        with ours.disable_adapter():
            plain = ours(X)
        assert (plain - expected).abs().max() > 0.1
        torch.testing.assert_close(ours(X), expected, rtol=1e-5, atol=1e-5)
        ours.merge_adapter()
        torch.testing.assert_close(ours(X), expected, rtol=1e-4, atol=1e-4)
        ours.unmerge_adapter()
        merged = ours.merge_and_unload()
        torch.testing.assert_close(merged(X), expected, rtol=1e-4, atol=1e-4)
    assert type(merged.up) is nn.Linear


# --- adding and finding adapters ------------------------------------------------------------------------------------


def test_gpt2_s_convolutions_are_left_to_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=True, init_lora_weights=False)
    model, ids = get_peft_model(tiny_model("gpt2"), config), torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    assert specialise(model) == 8
    calls = count_lean(monkeypatch)
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert not calls


def test_every_linear_layer_is_specialised_once() -> None:
    llama = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    assert specialise(llama) == 14
    assert specialise(llama) == 0
    assert all(type(m) is LeanLora for m in llama.modules() if isinstance(m, PeftLoraLinear))


def test_which_parameters_are_adapters() -> None:
    model = get_peft_model(
        tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    )
    found = adapter_parameters(model)
    names = {name for name, parameter in model.named_parameters() if parameter in found}
    kinds = {name.split(".")[-2] if "weight" in name else name.split(".")[-1] for name in names}
    assert len(names) == 2 * 3
    assert all("q_proj.lora_" in name for name in names), kinds
    assert not adapter_parameters(tiny_model("llama"))


def test_an_adapter_is_added_once() -> None:
    model = add_adapter(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert isinstance(model, PeftModel)
    with pytest.raises(ConfigError, match="the model has an adapter already and peft_config asks for another"):
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"peft_config must be a peft.PeftConfig such as LoraConfig, got dict"):
        add_adapter(tiny_model("llama"), {"r": 2})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="PROMPT_TUNING learns prompts, which is not supported; use LoRA"):
        add_adapter(tiny_model("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
