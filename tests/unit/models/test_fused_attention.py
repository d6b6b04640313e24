"""Attention through the native kernels, as whole models see it: which modules get the fused forward, that they give
their own numbers, and what must be left to the module itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from posttrain import SFTConfig, native
from posttrain.models import fused_attention as fused
from posttrain.models.attention import PACKED_ATTENTION, register
from posttrain.models.forward import open_policy
from posttrain.models.fused_attention import can_fuse, specialise_attention
from posttrain.models.lean_layers import give_back
from posttrain.session import Session
from posttrain.types import Layout, Needs
from tests.native_reference import (
    assert_near,
    kernels_or_skip,
    laid_end_to_end,
    native_dtype,
)
from tests.tiny_batches import random_batch
from tests.tiny_models import FAMILIES, SIZES, VOCABULARY

pytestmark = pytest.mark.usefixtures("each_native_dtype")
LAYOUT = laid_end_to_end((12, 5, 30, 1), (-1, 0, -1, -1))
WIDE = {"hidden_size": 64, "head_dim": 16}
"""Heads of 16, which the kernels know."""


def model(name: str, **options: Any) -> Any:
    """A random model of transformers' family `name`."""
    torch.manual_seed(0)
    config_class = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, config_class)(vocab_size=VOCABULARY, **{**SIZES, **WIDE, **options})
    return getattr(transformers, f"{name}ForCausalLM")(config).to(native_dtype())


def packed(name: str, **options: Any) -> Any:
    register()
    one = model(name, **options)
    one.set_attn_implementation(PACKED_ATTENTION)
    return one.eval()


def asked(one: Any, layout: Layout) -> torch.Tensor:
    """Logits of some packed tokens."""
    ids = torch.arange(layout.num_tokens)[None] % VOCABULARY
    places = [torch.arange(seen - n, seen) for n, seen in zip(layout.lengths, layout.context_lengths, strict=True)]
    return one(input_ids=ids, position_ids=torch.cat(places)[None], layout=layout, use_cache=False).logits


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each call of the fused function whether it turned queries and keys too."""
    apply, calls = fused._FusedAttention.apply, list[bool]()

    def counted(*given: Any) -> Any:
        calls.append(given[3] is not None)
        return apply(*given)

    monkeypatch.setattr(fused._FusedAttention, "apply", counted)
    return calls


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Mixtral", "Granite", "SmolLM3"])
def test_the_usual_families_get_the_fused_forward(name: str, fused_calls: list[bool]) -> None:
    options = {"num_local_experts": 2, "num_experts_per_tok": 2} if name == "Mixtral" else {}
    one = packed(name, **options)
    changed = specialise_attention(one)
    assert [type(module).__name__ for module in changed] == [f"{name}Attention"] * 2
    fused_calls.clear()
    seen = asked(one, LAYOUT)
    assert fused_calls == [True, True]
    give_back(changed)
    with native.without_kernels():
        expected = asked(one, LAYOUT)
    assert_near(seen, expected.double(), 2e-2)


OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "heads turned in part": ("Glm4Moe", {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}),
    "turned in fp32": ("Olmo", {}),
    "projections that are capped": ("Olmo", {"clip_qkv": 0.01}),
    "scores that are capped": ("Gemma2", {"attn_logit_softcapping": 0.01}),
    "norms over all heads": ("Olmo2", {}),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(("name", "options"), OWN.values(), ids=OWN)
def test_what_a_family_does_otherwise_it_goes_on_doing(
    name: str, options: dict[str, Any], fused_calls: list[bool]
) -> None:
    if name == "Olmo" and not options and native_dtype() == torch.float32:
        pytest.skip("turning in fp32 is nothing special in fp32")
    one = packed(name, **options)
    changed = specialise_attention(one)
    fused_calls.clear()
    seen = asked(one, LAYOUT)
    assert True not in fused_calls
    give_back(changed)
    assert torch.equal(seen, asked(one, LAYOUT))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "clip_qkv"])
def test_a_cap_that_only_large_numbers_show(cap: str) -> None:
    one = packed("Llama", **{cap: 50.0})
    assert not specialise_attention(one)


@pytest.mark.usefixtures("kernels")
def test_dropout_of_whatever_name_is_the_modules_own(fused_calls: list[bool]) -> None:
    one = packed("Starcoder2", residual_dropout=0.5)
    changed = specialise_attention(one)
    assert changed
    one.train()
    torch.manual_seed(1)
    fused_calls.clear()
    seen = asked(one, LAYOUT)
    assert True not in fused_calls
    give_back(changed)
    torch.manual_seed(1)
    assert torch.equal(seen, asked(one, LAYOUT))


WINDOWED: dict[str, dict[str, Any]] = {
    "Mistral": {},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "Gemma3": {"layer_types": ["sliding_attention", "full_attention"]},
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_shorter_than_a_sequence_counts(name: str, fused_calls: list[bool]) -> None:
    """As long as a family has it, in the layers that have it."""
    one = packed(name, sliding_window=10, **WINDOWED[name])
    assert len(specialise_attention(one)) == 2
    fused_calls.clear()
    seen = asked(one, LAYOUT)
    assert fused_calls == [True, True]
    wide = packed(name, sliding_window=100, **WINDOWED[name])
    wide.load_state_dict(one.state_dict())
    with native.without_kernels():
        alone = packed(name, sliding_window=10, **WINDOWED[name])
        alone.load_state_dict(one.state_dict())
        assert_near(seen, asked(alone, LAYOUT).double(), 4e-2)
        assert not torch.allclose(seen, asked(wide, LAYOUT), atol=1e-2)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma3"])
@pytest.mark.parametrize("level", ["none", "selective", "full"])
def test_training_gives_the_same_numbers_without_kernels(
    name: str, level: str, tmp_path: Path, fused_calls: list[bool]
) -> None:
    batch = random_batch([30, 4, 70, 11])
    seen, again = (loss_and_gradients(model(name), batch, level, tmp_path) for _ in range(2))
    assert True in fused_calls
    with native.without_kernels():
        fused_calls.clear()
        expected = loss_and_gradients(model(name), batch, level, tmp_path)
        assert not fused_calls
    assert seen.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(seen[key], again[key]), key  # with one number of threads
        assert_near(seen[key], value.double(), 1e-4 if key == "loss" else 4e-2)


def loss_and_gradients(one: Any, batch: Any, level: str, folder: Path) -> dict[str, torch.Tensor]:
    session = Session.open(one, SFTConfig(str(folder), bf16=native_dtype() == torch.bfloat16))
    session.recompute(level)
    loss = -session.policy(batch, Needs()).logp_R.mean()
    loss.backward()
    session.precision.settle()
    grads = {name: p.grad.clone() for name, p in session.trained.items() if p.grad is not None}
    session.close()
    assert len(grads) > 10
    return {"loss": loss.detach(), **grads}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_float64_never_touches_them(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor would CUDA: both are asked in one place."""
    monkeypatch.setattr(native, "_loaded", lambda dtype: pytest.fail(f"asked for {dtype}"))
    policy = open_policy(FAMILIES[family](VOCABULARY).double())
    (-policy(random_batch([9, 4]), Needs()).logp_R.mean()).backward()
    if torch.cuda.is_available():
        assert native.kernels_for(torch.empty(1, device="cuda")) is None


# --- which shapes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_loaded", lambda _: object())
    return


@pytest.mark.usefixtures("there_are_kernels")
@pytest.mark.parametrize(
    ("size", "dtype", "lengths", "fuses"),
    [
        (16, torch.bfloat16, (3, 4), True),
        (24, torch.bfloat16, (3, 4), False),
        (16, torch.float32, (3, 4), True),
        (16, torch.float64, (3, 4), False),
        (16, torch.float16, (3, 4), False),
        (16, torch.bfloat16, (3, 0, 4), False),
        (16, torch.bfloat16, (), False),
    ],
)
def test_what_can_be_fused(size: int, dtype: torch.dtype, lengths: tuple[int, ...], fuses: bool) -> None:
    one = torch.empty(2, 0, size, dtype=dtype)
    assert can_fuse(one, one, laid_end_to_end(lengths)) is fuses
    assert not can_fuse(one, torch.empty(2, 0, size + 16, dtype=dtype), laid_end_to_end(lengths))


@pytest.mark.usefixtures("there_are_kernels")
@pytest.mark.parametrize(
    ("dtype", "window", "layout", "threads", "fuses"),
    [
        (torch.float32, None, laid_end_to_end((3, 4)), 4, True),
        (torch.float32, None, laid_end_to_end((3, 4)), 5, False),
        (torch.float32, 4, laid_end_to_end((3, 4)), 5, False),
        (torch.float32, 3, laid_end_to_end((3, 4)), 8, True),
        (torch.float32, 3, laid_end_to_end((3, 4)), 9, False),
        (torch.float32, None, laid_end_to_end((3, 4, 5), (-1, 0, 0)), 2, True),
        (torch.float32, None, laid_end_to_end((3, 4, 5), (-1, 0, 0)), 3, False),
        (torch.float32, None, laid_end_to_end((200, 200, 200), (-1, 0, 0)), 6, True),
        (torch.float32, None, laid_end_to_end((200, 200, 200), (-1, 0, 0)), 7, False),
        (torch.bfloat16, None, laid_end_to_end((3, 4)), 12, True),
        (torch.bfloat16, None, laid_end_to_end((3, 4)), 13, False),
    ],
)
def test_threads_that_would_be_idle_count(
    dtype: torch.dtype, window: int | None, layout: Layout, threads: int, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answers to a shared prompt are dealt out if there is much to do, for each of two key heads. A window that is
    shorter than a segment spares the kernel half of the work and more."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    one = torch.empty(2, 0, 16, dtype=dtype)
    assert can_fuse(one, one, layout, window) is fuses


@pytest.mark.usefixtures("kernels")
def test_many_threads_do_not_keep_a_module_from_being_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they would be idle is asked of each batch."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert len(specialise_attention(packed("Llama"))) == 2


def test_projections_that_are_no_parameters_are_left_alone() -> None:
    """GPTQ's, say, are buffers."""
    one = packed("Llama", num_hidden_layers=1)
    projection = one.model.layers[0].self_attn.q_proj
    del projection.weight
    assert not specialise_attention(one)


def test_a_module_that_cannot_be_tried_keeps_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast what would be compared is the module with itself."""
    kernels_or_skip()
    one = packed("Mistral")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: device == "cpu")
    before = [module for module in one.modules() if isinstance(module, nn.Module) and "forward" in vars(module)]
    assert not specialise_attention(one)
    assert before == [module for module in one.modules() if "forward" in vars(module)]
