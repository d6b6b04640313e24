"""Attention through the native kernels, as autograd and whole models see it: which modules get the fused forward, that
they give their own numbers, and what must be refused or left to the module itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
from posttrain.models.fused_attention import can_fuse, fused_attention, specialise_attention
from posttrain.models.lean_layers import give_back
from posttrain.native.kernels import Kernels
from posttrain.session import Session
from posttrain.types import Layout, Needs
from tests.native_reference import (
    assert_near,
    attended,
    kernels_or_skip,
    laid_end_to_end,
    native_dtype,
    random,
    rotated,
)
from tests.tiny_batches import random_batch
from tests.tiny_models import FAMILIES, SIZES, VOCABULARY

pytestmark = pytest.mark.usefixtures("each_native_dtype")
LAYOUT = laid_end_to_end((12, 5, 30, 1), (-1, 0, -1, -1))
WIDE = {"hidden_size": 64, "head_dim": 16}
"""Heads of 16, which the kernels know."""


@pytest.fixture
def kernels(each_native_dtype: None) -> Kernels:
    return kernels_or_skip()


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
    before = (0 if parent is None else parent.stop - parent.start for _, parent in layout.segments())
    places = [torch.arange(n) + shift for n, shift in zip(layout.lengths, before, strict=True)]
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


@pytest.mark.usefixtures("kernels")
def test_a_window_shorter_than_a_sequence_counts(fused_calls: list[bool]) -> None:
    one = packed("Mistral", sliding_window=10)
    assert len(specialise_attention(one)) == 2
    fused_calls.clear()
    seen = asked(one, LAYOUT)
    assert not fused_calls
    wide = packed("Mistral", sliding_window=100)
    wide.load_state_dict(one.state_dict())
    with native.without_kernels():
        alone = packed("Mistral", sliding_window=10)
        alone.load_state_dict(one.state_dict())
        assert torch.equal(seen, asked(alone, LAYOUT))
        assert not torch.allclose(seen, asked(wide, LAYOUT), atol=1e-2)
    short = laid_end_to_end((10, 3, 7), (-1, -1, 1))
    asked(one, short)
    assert fused_calls == [True, True]


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


# --- as autograd sees it ---------------------------------------------------------------------------------------------


def heads(layout: Layout = LAYOUT, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values that learn, heads first as transformers has them."""
    shapes = ((4, 0), (2, 1), (2, 2))
    query, key, value = (random(layout.num_tokens, n, size, seed=seed).transpose(0, 1)[None] for n, seed in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def by_token(x_1HTE: torch.Tensor) -> torch.Tensor:
    return x_1HTE[0].transpose(0, 1)


GRADS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "plain": lambda out: (out.float() * random(*out.shape, seed=9).float()).sum(),
    "one number for all": lambda out: out.sum(),
    "turned round": lambda out: (
        out.permute(0, 3, 2, 1).contiguous() * random(*out.shape[:1], *out.shape[:0:-1])
    ).sum(),
}


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("loss", GRADS.values(), ids=GRADS)
def test_gradients_of_any_strides(loss: Callable[[torch.Tensor], torch.Tensor]) -> None:
    given = heads()
    out = fused_attention(*given, LAYOUT, 0.25)
    seen = torch.autograd.grad(loss(out), given)
    exact = tuple(one.detach().double().requires_grad_() for one in given)
    expected = attended(*(by_token(one) for one in exact), LAYOUT, 0.25)[0][None]
    assert_near(out.detach(), expected.detach())
    grads = torch.autograd.grad(loss(expected), exact)
    for one, other in zip(seen, grads, strict=True):
        assert_near(one, other, 6e-3)


@pytest.mark.usefixtures("kernels")
def test_turned_first() -> None:
    query, key, value = (by_token(one.detach()).contiguous().requires_grad_() for one in heads())
    angle = random(LAYOUT.num_tokens, 16, seed=5).float()
    turns = angle.cos().to(query), angle.sin().to(query)
    grad = random(*query.shape, seed=6)
    out = fused._FusedAttention.apply(query, key, value, turns, LAYOUT, 0.25)
    seen = torch.autograd.grad(out, (query, key, value), grad)
    exact = tuple(one.detach().double().requires_grad_() for one in (query, key, value))
    exact_turns = tuple(one.double() for one in turns)
    expected, _ = attended(rotated(exact[0], *exact_turns), rotated(exact[1], *exact_turns), exact[2], LAYOUT, 0.25)
    assert_near(out.detach(), expected.detach(), 6e-3)
    for one, other in zip(seen, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert_near(one, other, 8e-3)


@pytest.mark.usefixtures("kernels")
def test_numbers_at_odd_places_are_copied() -> None:
    given = heads()
    expected = fused_attention(*given, LAYOUT, 0.25)
    odd = []
    for one in given:
        room = torch.empty(one.numel() + 1, dtype=native_dtype())[1:]
        odd.append(room.view(by_token(one).shape).copy_(by_token(one.detach())).transpose(0, 1)[None])
    assert odd[0].data_ptr() % 4 == native_dtype().itemsize % 4
    assert torch.equal(fused_attention(*odd, LAYOUT, 0.25), expected)
    assert fused._readable(by_token(odd[0])).data_ptr() % 4 == 0


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("which", ["attention", "turned", "norm", "gated"])
def test_a_second_derivative_is_refused(which: str) -> None:
    x = random(LAYOUT.num_tokens, 64).requires_grad_()
    if which in ("attention", "turned"):
        q = (x * 1).view(-1, 4, 16)
        turns = (torch.ones(len(x), 16).to(x),) * 2 if which == "turned" else None
        out = fused._FusedAttention.apply(q, q, q, turns, LAYOUT, 0.25)
    else:
        from posttrain.models.lean_layers import specialise_layers

        layer = model("Llama", num_hidden_layers=1).model.layers[0]
        assert specialise_layers(layer)
        out = layer.input_layernorm(x) if which == "norm" else layer.mlp(x)
    (grad,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.float().square().sum().backward()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("which", range(5), ids=("query", "key", "value", "cosines", "sines"))
def test_inputs_changed_before_the_backward_pass_are_noticed(which: int) -> None:
    query, key, value = (by_token(one.detach()).contiguous() for one in heads())
    turns = (torch.ones(LAYOUT.num_tokens, 16).to(query), torch.zeros(LAYOUT.num_tokens, 16).to(query))
    used = query.clone().requires_grad_()
    given = [query, key, value, *turns]
    plain = None if which < 3 else turns
    out = fused._FusedAttention.apply(used * 1 if which else query.requires_grad_(), key, value, plain, LAYOUT, 0.25)
    with torch.no_grad():
        given[which].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.usefixtures("kernels")
def test_switching_off_between_the_passes_changes_nothing() -> None:
    given = heads()
    expected = torch.autograd.grad(fused_attention(*given, LAYOUT, 0.25).sum(), given)
    out = fused_attention(*given, LAYOUT, 0.25)
    with native.without_kernels():
        seen = torch.autograd.grad(out.sum(), given)
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.usefixtures("kernels")
def test_inference_and_no_gradients() -> None:
    given = heads()
    expected = fused_attention(*given, LAYOUT, 0.25)
    with torch.no_grad():
        assert torch.equal(fused_attention(*given, LAYOUT, 0.25), expected)
    with torch.inference_mode():
        assert torch.equal(fused_attention(*given, LAYOUT, 0.25), expected)


@pytest.mark.usefixtures("kernels")
def test_backward_passes_of_other_threads() -> None:
    def gradients(seed: int) -> list[torch.Tensor]:
        query, key, value = (random(48, 2, 32, seed=seed + i).requires_grad_() for i in range(3))
        out = fused._FusedAttention.apply(query, key, value, None, LAYOUT, 0.25)
        return list(torch.autograd.grad(out.float().square().sum(), (query, key, value)))

    expected = [gradients(seed) for seed in range(8)]
    with ThreadPoolExecutor(3) as pool:
        seen = list(pool.map(gradients, range(8)))
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- which shapes ----------------------------------------------------------------------------------------------------


@pytest.fixture
def there_are_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "_loaded", lambda _: object())
    return


@pytest.mark.usefixtures("there_are_kernels")
@pytest.mark.parametrize(
    ("size", "dtype", "window", "lengths", "fuses"),
    [
        (16, torch.bfloat16, None, (3, 4), True),
        (16, torch.bfloat16, 4, (3, 4), True),
        (16, torch.bfloat16, 3, (3, 4), False),
        (24, torch.bfloat16, None, (3, 4), False),
        (16, torch.float32, None, (3, 4), True),
        (16, torch.float64, None, (3, 4), False),
        (16, torch.float16, None, (3, 4), False),
        (16, torch.bfloat16, None, (3, 0, 4), False),
        (16, torch.bfloat16, None, (), False),
    ],
)
def test_what_can_be_fused(
    size: int, dtype: torch.dtype, window: int | None, lengths: tuple[int, ...], fuses: bool
) -> None:
    one = torch.empty(2, 0, size, dtype=dtype)
    assert can_fuse(one, one, laid_end_to_end(lengths), window) is fuses
    assert not can_fuse(one, torch.empty(2, 0, size + 16, dtype=dtype), laid_end_to_end(lengths), window)


@pytest.mark.usefixtures("there_are_kernels")
@pytest.mark.parametrize(
    ("dtype", "groups", "layout", "threads", "fuses"),
    [
        (torch.float32, 2, laid_end_to_end((3, 4)), 4, True),
        (torch.float32, 2, laid_end_to_end((3, 4)), 5, False),
        (torch.float32, 2, laid_end_to_end((3, 4, 5), (-1, 0, 0)), 2, True),
        (torch.float32, 2, laid_end_to_end((3, 4, 5), (-1, 0, 0)), 3, False),
        (torch.bfloat16, 2, laid_end_to_end((3, 4)), 12, True),
        (torch.bfloat16, 2, laid_end_to_end((3, 4)), 13, False),
    ],
)
def test_threads_that_would_be_idle_count(
    dtype: torch.dtype, groups: int, layout: Layout, threads: int, fuses: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shared prompt and its answers are one thread's, for each key head."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    one = torch.empty(groups, 0, 16, dtype=dtype)
    assert can_fuse(one, one, layout, None) is fuses


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
    """A window shorter than the trial would compare the module with itself."""
    kernels_or_skip()
    one = packed("Mistral", sliding_window=4)
    before = [module for module in one.modules() if isinstance(module, nn.Module) and "forward" in vars(module)]
    assert not specialise_attention(one)
    assert before == [module for module in one.modules() if "forward" in vars(module)]
