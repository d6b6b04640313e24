"""The log-prob head against a naive log-softmax in float64: values, and gradients for a frozen and a trained head."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.models import head
from posttrain.models.head import HeadShape, rows_of, token_logps
from posttrain.types import Needs

ROWS, HIDDEN, VOCABULARY = 11, 6, 13
SHAPES = {
    "plain": HeadShape(),
    "scaled": HeadShape(scale=0.3),
    "capped": HeadShape(softcap=1.5),
    "scaled and capped": HeadShape(scale=1.7, softcap=2.0),
    "warm": HeadShape(temperature=0.7),
    "capped and warm": HeadShape(softcap=1.5, temperature=1.3),
}
CHUNKS = [3, 11, 256]


def inputs(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Any, Any, Any, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
    offset = torch.randn(VOCABULARY, generator=generator, dtype=torch.float64)
    target = torch.randint(VOCABULARY, (ROWS,), generator=generator)
    made = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight, offset)]
    return made[0], made[1], made[2] if bias else None, target


def naive(hidden: Any, weight: Any, bias: Any, shape: HeadShape) -> torch.Tensor:
    """log p over the vocabulary, as a model's own forward makes it."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    logits = logits * shape.scale
    if shape.softcap is not None:
        logits = shape.softcap * torch.tanh(logits / shape.softcap)
    return (logits / shape.temperature).log_softmax(-1)


EVERYTHING = Needs(entropy=True, uniform_logp=True, mean_logit=True, log_collision=True)


@pytest.fixture(params=CHUNKS, autouse=True)
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows in the larger chunks, so that neither divides the other."""
    monkeypatch.setattr(head, "CHUNK_ROWS", request.param)
    monkeypatch.setattr(head, "BLOCK_SIZE", {"cpu": 3 * VOCABULARY})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values(shape: HeadShape, bias: bool) -> None:
    hidden, weight, offset, target = inputs(bias=bias)
    logp_RV = naive(hidden, weight, offset, shape)
    out = token_logps(hidden, weight, offset, target, shape, EVERYTHING)
    logp, top1, entropy, uniform = out.logp_R, out.is_top1_R, out.entropy_R, out.uniform_logp_R
    torch.testing.assert_close(logp, logp_RV[range(ROWS), target], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, -(logp_RV.exp() * logp_RV).sum(-1), rtol=1e-12, atol=1e-12, check_dtype=True)
    torch.testing.assert_close(uniform, logp_RV.mean(-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(top1, logp_RV.argmax(-1) == target)
    logits = (hidden @ weight.t() if offset is None else hidden @ weight.t() + offset) * shape.scale
    logits = logits if shape.softcap is None else shape.softcap * torch.tanh(logits / shape.softcap)
    assert out.mean_logit_R is not None
    assert out.log_collision_R is not None
    torch.testing.assert_close(out.mean_logit_R, logits.mean(-1) / shape.temperature, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.log_collision_R, logp_RV.exp().square().sum(-1).log(), rtol=1e-12, atol=1e-12)
    assert entropy is not None
    assert not entropy.requires_grad
    assert not out.mean_logit_R.requires_grad
    assert not out.log_collision_R.requires_grad


def test_what_was_not_asked_for_is_none() -> None:
    hidden, weight, offset, target = inputs()
    out = token_logps(hidden, weight, offset, target, HeadShape())
    assert [out.entropy_R, out.uniform_logp_R, out.mean_logit_R, out.log_collision_R] == [None] * 4


@pytest.mark.parametrize("trained", ["hidden", "hidden weight", "hidden weight bias", "weight", "hidden bias"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("uniform", [False, True])
def test_gradients(shape: HeadShape, trained: str, uniform: bool) -> None:
    """Every row has another weight in the sum, and the likelihood weighs in as in DFT."""
    grads = []
    for ours in (True, False):
        hidden, weight, offset, target = inputs()
        named = {"hidden": hidden, "weight": weight, "bias": offset}
        for name, tensor in named.items():
            tensor.requires_grad_(name in trained.split())
        if ours:
            out = token_logps(hidden, weight, offset, target, shape, EVERYTHING if uniform else Needs(mean_logit=True))
            logp, mean = out.logp_R, out.uniform_logp_R
        else:
            logp_RV = naive(hidden, weight, offset, shape)
            logp, mean = logp_RV[range(ROWS), target], logp_RV.mean(-1)
        loss = (logp * torch.linspace(-1, 2, ROWS, dtype=torch.float64) * logp.detach().exp()).sum()
        if uniform:
            loss = loss + (mean * torch.linspace(1, -3, ROWS, dtype=torch.float64)).sum()
        loss.backward()
        grads.append([named[name].grad for name in trained.split()])
    for mine, expected in zip(*grads, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradcheck(shape: HeadShape, frozen: bool) -> None:
    hidden, weight, offset, target = inputs()
    weight.requires_grad_(not frozen)
    offset.requires_grad_(not frozen)

    def outputs(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        out = token_logps(*given, target, shape, Needs(uniform_logp=True))
        assert out.uniform_logp_R is not None
        return out.logp_R, out.uniform_logp_R

    assert torch.autograd.gradcheck(outputs, (hidden, weight, offset))


@pytest.mark.parametrize("trained", ["hidden", "all"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_entropy_has_a_gradient_where_it_is_asked_for(shape: HeadShape, trained: str) -> None:
    made = []
    for naively in (True, False):
        hidden, weight, offset, target = inputs()
        if trained == "hidden":
            weight.requires_grad_(False), offset.requires_grad_(False)
        if naively:
            logp_RV = naive(hidden, weight, offset, shape)
            logp, entropy = logp_RV[range(ROWS), target], -(logp_RV.exp() * logp_RV).sum(-1)
        else:
            out = token_logps(hidden, weight, offset, target, shape, Needs(entropy_gradient=True))
            assert out.entropy_R is not None
            logp, entropy = out.logp_R, out.entropy_R
        factors = torch.linspace(-1, 2, ROWS, dtype=torch.float64)
        (logp @ factors + entropy @ factors.flip(0)).backward()
        made.append((entropy.detach(), hidden.grad, weight.grad, offset.grad))
    for expected, seen in zip(*made, strict=True):
        if expected is not None:
            torch.testing.assert_close(seen, expected, rtol=1e-10, atol=1e-12)


def test_a_tied_head_adds_to_the_embedding_s_gradient() -> None:
    grads = []
    for ours in (True, False):
        _, weight, _, target = inputs()
        hidden = torch.tanh(weight[target.flip(0)])
        logp = (
            token_logps(hidden, weight, None, target, HeadShape()).logp_R
            if ours
            else naive(hidden, weight, None, HeadShape())[range(ROWS), target]
        )
        logp.sum().backward()
        grads.append(weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_bf16_as_close_as_a_plain_bf16_product(frozen: bool) -> None:
    """The logits are rounded where bf16 rounds them, everything after that is fp32."""
    hidden, weight, offset, target = inputs(torch.bfloat16)
    weight.requires_grad_(not frozen)
    offset.requires_grad_(not frozen)
    out = token_logps(hidden, weight, offset, target, HeadShape(), Needs(entropy=True))
    logp, entropy = out.logp_R, out.entropy_R
    assert logp.dtype == torch.float32
    assert entropy is not None
    assert entropy.dtype == torch.float32
    logits = (hidden.detach() @ weight.detach().t()).float() + offset.detach().float()
    torch.testing.assert_close(logp, logits.log_softmax(-1)[range(ROWS), target], rtol=1e-5, atol=1e-5)
    logp.sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight, offset)]
    naive(*exact, HeadShape())[range(ROWS), target].sum().backward()
    for mine, expected in zip((hidden, weight, offset), exact, strict=True):
        if mine.requires_grad:
            assert mine.grad.dtype == torch.bfloat16
            assert (mine.grad.double() - expected.grad).norm() < 0.02 * expected.grad.norm()


@pytest.mark.parametrize("frozen", [False, True])
def test_no_supervised_rows(frozen: bool) -> None:
    """A micro-batch may have nothing to predict; its gradient is zero."""
    hidden, weight, offset, target = inputs()
    weight.requires_grad_(not frozen)
    offset.requires_grad_(not frozen)
    out = token_logps(hidden[:0], weight, offset, target[:0], HeadShape(), EVERYTHING)
    logp, top1 = out.logp_R, out.is_top1_R
    assert logp.shape == top1.shape == (0,)
    logp.sum().backward()
    assert hidden.grad.abs().max() == 0
    assert frozen or weight.grad.abs().max() == 0


def test_logits_are_only_ever_made_a_chunk_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = head._Workspace.products

    def products(self: Any, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden))
        return original(self, hidden, weight)

    monkeypatch.setattr(head._Workspace, "products", products)
    for frozen, passes in ((True, 1), (False, 2)):  # a frozen head's gradient is made in the forward pass
        seen.clear()
        hidden, weight, offset, target = inputs()
        weight.requires_grad_(not frozen)
        offset.requires_grad_(not frozen)
        token_logps(hidden, weight, offset, target, HeadShape()).logp_R.sum().backward()
        assert max(seen) <= head.CHUNK_ROWS
        assert sum(seen) == passes * ROWS


def test_equally_likely_tokens_all_count_as_the_likeliest() -> None:
    hidden = torch.ones(2, 3)
    out = token_logps(hidden, torch.ones(5, 3), None, torch.tensor([0, 4]), HeadShape(), Needs(entropy=True))
    logp, top1, entropy = out.logp_R, out.is_top1_R, out.entropy_R
    assert top1.tolist() == [True, True]
    assert logp.tolist() == pytest.approx([-1.6094379] * 2)
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([1.6094379] * 2)


def test_gradients_of_a_row_that_is_there_many_times_have_the_same_bits_each_time() -> None:
    """A prompt's last token is a row of each of its answers. Indexing sums them in any order with several threads."""
    generator = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 128, generator=generator) for n in (100, 2000))
    rows = torch.randint(100, (2000,), generator=generator)
    rows[::2] = 3
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    grads = []
    try:
        for _ in range(12):
            given = states.clone().requires_grad_()
            (rows_of(given, rows) * weight).sum().backward()
            grads.append(given.grad)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(grads[0], one) for one in grads[1:])
    expected = torch.zeros(100, 128, dtype=torch.float64).index_add_(0, rows, weight.double())
    torch.testing.assert_close(grads[0].double(), expected, rtol=1e-5, atol=1e-4)
