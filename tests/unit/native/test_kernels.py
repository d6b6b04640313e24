"""Every kernel against its formula in float64, over the shapes where tails, blocks and pairs end; a segment's numbers
do not depend on its neighbours, on the number of threads or on the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional

from posttrain.native.kernels import Kernels
from posttrain.types import Layout
from tests.native_reference import (
    assert_near,
    attended,
    laid_end_to_end,
    native_dtype,
    random,
    rotated,
)

pytestmark = pytest.mark.usefixtures("each_native_dtype")
ROWS = (1, 2, 5, 300)
WIDTHS = (1, 7, 16, 31, 64, 97, 1000)
LAYOUTS = {
    "one token": laid_end_to_end((1,)),
    "the block's end": laid_end_to_end((47, 48, 49, 1, 97)),
    "a shared prompt": laid_end_to_end((33, 5, 50, 1), (-1, 0, 0, 0)),
    "shared and alone": laid_end_to_end((48, 16, 17, 30, 2, 3), (-1, 0, 0, -1, -1, 4)),
    "many answers": laid_end_to_end((135, *range(93, 104), 20, 9, 70), (-1, *(0,) * 11, -1, 12, 12)),
    "prompts that begin alike": laid_end_to_end(
        (35, 120, *range(93, 104), 1, 50, 9, 17, 5, 240), (-1, 0, *(1,) * 11, 0, 13, 13, 14, -1, 0)
    ),
    "long": laid_end_to_end((700, 20)),
    "long answers": laid_end_to_end((530, 97, 60), (-1, 0, 0)),
}
HEADS = ((4, 2, 16), (2, 2, 64), (6, 2, 80), (3, 1, 128), (1, 1, 256))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- element-wise ----------------------------------------------------------------------------------------------------


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(kernels: Kernels, rows: int, width: int) -> None:
    x, weight, grad = random(rows, width), random(width, seed=1), random(rows, width, seed=2)
    exact_x, exact_weight = (one.double().requires_grad_() for one in (x, weight))
    expected = normed(exact_x, exact_weight)
    expected.backward(grad.double())
    with threads(2):
        seen, scale_T = kernels.norm(x, weight, 1e-5)
        grad_x, grad_weight = kernels.norm_backward(grad, x, weight, scale_T, True)
        alone = kernels.norm_backward(grad, x, weight, scale_T, False)
    assert_near(seen, expected.detach())
    assert exact_x.grad is not None
    assert exact_weight.grad is not None
    assert grad_weight is not None
    if width > 1:  # of a single number the gradient is next to nothing
        assert_near(grad_x, exact_x.grad)
    assert grad_weight.dtype == torch.float32
    assert_near(grad_weight, exact_weight.grad)
    assert alone[1] is None
    assert torch.equal(alone[0], grad_x)


def test_the_default_dtype_does_not_matter_to_a_norms_gradient(kernels: Kernels) -> None:
    x, weight, grad = random(9, 500), random(500, seed=1), random(9, 500, seed=2)
    _, scale_T = kernels.norm(x, weight, 1e-5)
    expected = kernels.norm_backward(grad, x, weight, scale_T, True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        seen = kernels.norm_backward(grad, x, weight, scale_T, True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert seen[1] is not None
    assert expected[1] is not None
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[1], expected[1])


def test_the_default_device_does_not_matter(kernels: Kernels) -> None:
    x, weight, layout = random(9, 32), random(32, seed=1), laid_end_to_end((9,))
    heads = x.view(9, 2, 16)
    expected = kernels.norm(x, weight, 1e-5), kernels.attention(heads, heads, heads, layout, 0.25)
    with torch.device("meta"):
        seen = kernels.norm(x, weight, 1e-5), kernels.attention(heads, heads, heads, layout, 0.25)
    assert all(torch.equal(a, b) for one, other in zip(seen, expected, strict=True)
               for a, b in zip(one, other, strict=True))  # fmt: skip


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("width", WIDTHS)
def test_swiglu(kernels: Kernels, rows: int, width: int) -> None:
    both, grad = random(rows, 2 * width, spread=3.0), random(rows, width, seed=2)
    gate, up = both.chunk(2, -1)
    exact_gate, exact_up = (one.double().requires_grad_() for one in (gate, up))
    expected = functional.silu(exact_gate) * exact_up
    expected.backward(grad.double())
    with threads(2):
        assert_near(kernels.gated(gate, up), expected.detach())
        given = grad.clone()
        seen = kernels.gated_backward(gate.contiguous(), up.contiguous(), given, True)
        without = kernels.gated_backward(gate.contiguous(), up.contiguous(), grad.clone(), False)
    assert seen[1] is given
    assert without[2] is None
    for one, other in zip(seen, (exact_gate.grad, exact_up.grad, expected.detach()), strict=True):
        assert one is not None
        assert other is not None
        assert_near(one, other)
    assert torch.equal(seen[0], without[0])
    assert torch.equal(seen[1], without[1])


def test_every_gate_there_is(kernels: Kernels) -> None:
    """All numbers of bf16, infinities and NaN among them."""
    gates = torch.arange(-(2**15), 2**15).short().view(torch.bfloat16).to(native_dtype())[None]
    relative, absolute = (2**-8, 1e-4) if native_dtype() == torch.bfloat16 else (1e-6, 1e-7)
    ones, exact = torch.ones_like(gates), gates.double()
    opened = exact.sigmoid()
    slope, product, again = kernels.gated_backward(gates, ones, ones.clone(), True)
    assert again is not None
    for seen, expected in (
        (kernels.gated(gates, ones), exact * opened),
        (product, exact * opened),
        (again, exact * opened),
        (slope, opened * (1 + exact * (1 - opened))),
    ):
        torch.testing.assert_close(seen.double(), expected, rtol=relative, atol=absolute, equal_nan=True)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (3, 6), (2, 16), (5, 64), (1, 80), (2, 256)])
@pytest.mark.parametrize("tokens", ROWS)
def test_rotary_embeddings(kernels: Kernels, tokens: int, heads: int, size: int) -> None:
    x, grad, angle = random(tokens, heads, size), random(tokens, heads, size, seed=1), random(tokens, size, seed=2)
    cos, sin = angle.float().cos().to(x), angle.float().sin().to(x)  # its halves need not be alike
    exact = x.double().requires_grad_()
    expected = rotated(exact, cos.double(), sin.double())
    expected.backward(grad.double())
    assert exact.grad is not None
    with threads(2):
        assert_near(kernels.rotate(x, cos, sin), expected.detach())
        assert_near(kernels.rotate(grad, cos, sin, backwards=True), exact.grad)


def test_heads_that_lie_apart_are_turned_too(kernels: Kernels) -> None:
    x, angle = random(3, 40, 16).transpose(0, 1)[:, :, :], random(40, 16, seed=1)
    cos, sin = angle.float().cos().to(x), angle.float().sin().to(x)
    assert torch.equal(kernels.rotate(x, cos, sin), kernels.rotate(x.contiguous(), cos, sin))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_stays_in_its_row(kernels: Kernels, bad: float) -> None:
    x, weight, grad = random(4, 37), random(37, seed=1), random(4, 37, seed=2)
    clean, scale_T = kernels.norm(x, weight, 1e-5)
    clean_grad, _ = kernels.norm_backward(grad, x, weight, scale_T, False)
    x[2, 36] = bad
    seen, scale_T = kernels.norm(x, weight, 1e-5)
    assert torch.equal(seen[[0, 1, 3]], clean[[0, 1, 3]])
    assert seen[2, 36].isnan()
    assert torch.equal(seen.isnan(), normed(x.float(), weight.float()).isnan())
    seen_grad, grad_weight = kernels.norm_backward(grad, x, weight, scale_T, True)
    assert torch.equal(seen_grad[[0, 1, 3]], clean_grad[[0, 1, 3]])
    assert seen_grad[2].isnan().all()
    assert grad_weight is not None
    assert grad_weight[36].isnan()
    gate, up = random(4, 37), random(4, 37, seed=3)
    gate[2, 36] = bad
    product = kernels.gated(gate, up)
    assert not product[2, 36].isfinite()
    assert product.isfinite().sum() == product.numel() - 1


# --- attention -------------------------------------------------------------------------------------------------------


def heads_of(layout: Layout, heads: int, groups: int, size: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Queries, keys, values and the output's gradient."""
    tokens = layout.num_tokens
    return tuple(random(tokens, n, size, seed=seed + i) for i, n in enumerate((heads, groups, groups, heads)))


def everything(
    kernels: Kernels, given: tuple[torch.Tensor, ...], layout: Layout, window: int | None = None
) -> tuple[torch.Tensor, ...]:
    """Output, log sums and the three gradients."""
    query, key, value, grad = given
    scale = query.shape[-1] ** -0.5
    out, log_sum = kernels.attention(query, key, value, layout, scale, window)
    return out, log_sum, *kernels.attention_backward(query, key, value, grad, log_sum, layout, scale, window)


def exactly(given: tuple[torch.Tensor, ...], layout: Layout, window: int | None = None) -> tuple[torch.Tensor, ...]:
    query, key, value, grad = (one.double().requires_grad_() for one in given)
    out, log_sum = attended(query, key, value, layout, query.shape[-1] ** -0.5, window)
    grads = torch.autograd.grad(out, (query, key, value), grad.detach())
    return out.detach(), log_sum.detach(), *grads


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_attention(kernels: Kernels, layout: Layout, shape: tuple[int, int, int]) -> None:
    given = heads_of(layout, *shape)
    with threads(2):
        seen = everything(kernels, given, layout)
    expected = exactly(given, layout)
    if layout.num_tokens == 1:  # one key: its weight is 1 whatever the query
        assert seen[2].abs().max() < 1e-4
        assert seen[3].abs().max() < 1e-4
        seen, expected = (one[:2] + one[4:] for one in (seen, expected))
    for one, other in zip(seen, expected, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40, 64, 1000])
@pytest.mark.parametrize("shape", [(4, 2, 16), (3, 1, 32)], ids=str)
def test_attention_inside_a_window(kernels: Kernels, window: int, shape: tuple[int, int, int]) -> None:
    """Also where a child of a shared prompt sees little of it, or nothing."""
    layout = laid_end_to_end((47, 130, 19, 33, 1, 97, 21, 5), (-1, -1, 1, 1, 1, -1, 3, 3))
    given = heads_of(layout, *shape)
    with threads(2):
        seen = everything(kernels, given, layout, window)
    expected = exactly(given, layout, window)
    if window == 1:  # one key: its weight is 1 whatever the query
        assert seen[2].abs().max() < 1e-4
        assert seen[3].abs().max() < 1e-4
        seen, expected = (one[:2] + one[4:] for one in (seen, expected))
    for one, other in zip(seen, expected, strict=True):
        assert_near(one, other)
    if window >= layout.max_length:
        for one, other in zip(seen, everything(kernels, given, layout), strict=True):
            assert torch.equal(one, other)


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "part of wider rows": lambda x: torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, : x.shape[1]],
    "part of wider heads": lambda x: torch.cat([torch.full_like(x, torch.nan), x], 2)[:, :, x.shape[2] :],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_strides_do_not_matter(kernels: Kernels, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
    layout = LAYOUTS["shared and alone"]
    given = heads_of(layout, 4, 2, 16)
    apart = tuple(view(one) for one in given)
    assert not apart[0].is_contiguous()
    for one, other in zip(everything(kernels, apart, layout), everything(kernels, given, layout), strict=True):
        assert torch.equal(one, other)


def test_a_segment_does_not_depend_on_its_neighbours(kernels: Kernels) -> None:
    layout = laid_end_to_end((47, 48, 19, 33, 97, 5, 1), (-1, -1, 1, 1, -1, -1, 5))
    given = heads_of(layout, 6, 2, 32)
    packed = everything(kernels, given, layout)
    families = {(0, 47): (47,), (47, 147): (48, 19, 33), (147, 244): (97,), (244, 250): (5, 1)}
    for (start, stop), lengths in families.items():
        alone = laid_end_to_end(lengths, (-1,) + (0,) * (len(lengths) - 1))
        out, log_sum, *grads = everything(kernels, tuple(one[start:stop] for one in given), alone)
        assert torch.equal(packed[0][start:stop], out)
        assert torch.equal(packed[1][:, start:stop], log_sum)
        for one, other in zip(packed[2:], grads, strict=True):
            assert torch.equal(one[start:stop], other)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_threads_and_runs_do_not_change_a_bit(kernels: Kernels, layout: Layout) -> None:
    given = heads_of(layout, 4, 4, 32)
    runs = []
    for number in (1, 2, 3, 2):  # scratch of another size is used again in between
        everything(kernels, heads_of(laid_end_to_end((90,)), 2, 2, 64), laid_end_to_end((90,)))
        with threads(number):
            runs.append(everything(kernels, given, layout))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run, runs[0], strict=True))


def test_threads_and_runs_do_not_change_a_bit_of_norms_and_swiglu(kernels: Kernels) -> None:
    x, weight, grad = random(301, 97), random(97, seed=1), random(301, 97, seed=2)
    runs = []
    for number in (1, 2, 3, 2):
        with threads(number):
            y, scale = kernels.norm(x, weight, 1e-5)
            grad_x, grad_weight = kernels.norm_backward(grad, x, weight, scale, True)
            gates = kernels.gated_backward(x, grad, grad.clone(), True)
            runs.append((y, scale, grad_x, kernels.gated(x, grad), *gates, grad_weight))
    for run in runs[1:]:
        assert all(torch.equal(one, other) for one, other in zip(run[:-1], runs[0][:-1], strict=True))
    assert torch.equal(runs[1][-1], runs[3][-1])  # the weight's gradient is a sum of the threads' shares
    torch.testing.assert_close(runs[0][-1], runs[1][-1])


def test_threads_of_python_do_not_disturb_each_other(kernels: Kernels) -> None:
    from concurrent.futures import ThreadPoolExecutor

    layouts = [laid_end_to_end((n, 3 * n, 50), (-1, 0, -1)) for n in range(1, 33)]
    given = [heads_of(layout, 4, 2, 32, seed=i) for i, layout in enumerate(layouts)]
    expected = [everything(kernels, one, layout) for one, layout in zip(given, layouts, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(lambda pair: everything(kernels, *pair), zip(given, layouts, strict=True)))
    for one, other in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", range(4), ids=("query", "key", "value", "gradient"))
def test_what_is_no_number_reaches_all_that_depends_on_it(kernels: Kernels, which: int, bad: float) -> None:
    """And no other family of segments: within one it may reach more, as nothing times NaN is NaN."""
    layout = laid_end_to_end((50, 20, 9, 60), (-1, 0, -1, -1))
    given = heads_of(layout, 2, 1, 16)
    clean = everything(kernels, given, layout)
    given[which][40, 0, 3] = bad
    seen = everything(kernels, given, layout)
    for index, (one, before) in enumerate(zip(seen, clean, strict=True)):
        rows = slice(70, None)
        assert torch.equal(one[:, rows] if index == 1 else one[rows], before[:, rows] if index == 1 else before[rows])
    out, log_sum = seen[:2]
    if which == 0:
        assert not out[40, 0].isfinite().any()
        assert log_sum[0, 40].isnan()
        assert torch.equal(out[:40], clean[0][:40])
        assert torch.equal(out[41:], clean[0][41:])
    if which == 1:
        without_sum = ~exactly(given, layout)[1].isfinite().T
        assert without_sum[40:70].any()
        assert not without_sum[:40].any()
        assert not out[without_sum].isfinite().any()
        assert torch.equal(out[:40], clean[0][:40])
    if which == 2:
        assert not out[40:70, :, 3].isfinite().any()
        assert torch.equal(out[:, :, :3], clean[0][:, :, :3])
    if which == 3:
        assert torch.equal(out, clean[0])
        assert seen[2][40, 0].isnan().all()
        assert not seen[4][:41, 0, 3].isfinite().any()


def test_scores_far_apart_give_a_weight_of_one(kernels: Kernels) -> None:
    layout = laid_end_to_end((60,))
    query, key, value = (random(60, 1, 16, seed=i, spread=spread) for i, spread in enumerate((1e4, 1e4, 1.0)))
    out, log_sum = kernels.attention(query, key, value, layout, 1.0)
    expected, sums = attended(query.double(), key.double(), value.double(), layout, 1.0)
    assert_near(out, expected)
    assert_near(log_sum, sums)


# --- what a kernel would read past the end ---------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused(kernels: Kernels) -> None:
    x = random(8, 2, 16)
    with pytest.raises(ValueError, match=r"a weight of \(8,\) for rows of 16"):
        kernels.norm(x[:, 0].contiguous(), random(8), 1e-5)
    with pytest.raises(ValueError, match=r"turns of \(8, 8\) for 8 x 16 numbers"):
        kernels.rotate(x, random(8, 8), random(8, 16))
    with pytest.raises(ValueError, match="a layout of 9 tokens for 8"):
        kernels.attention(x, x, x, laid_end_to_end((4, 5)), 1.0)
    with pytest.raises(ValueError, match="a window of 0"):
        kernels.attention(x, x, x, laid_end_to_end((4, 4)), 1.0, window=0)
    with pytest.raises(ValueError, match=r"queries \(8, 2, 16\), keys \(7, 2, 16\)"):
        kernels.attention(x, x[:7], x[:7], laid_end_to_end((8,)), 1.0)
    with pytest.raises(ValueError, match=r"queries \(8, 2, 16\), keys \(8, 3, 16\)"):
        kernels.attention(x, random(8, 3, 16), random(8, 3, 16), laid_end_to_end((8,)), 1.0)
    with pytest.raises(ValueError, match="segment 1 before its parent, 2"):
        kernels.attention(x, x, x, laid_end_to_end((2, 3, 3), (-1, 2, -1)), 1.0)
