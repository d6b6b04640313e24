"""The products of a LoRA update `s A B` (arXiv 2106.09685), in bf16 through the native kernels where they run, else
torch's; in fp32 those were quicker (docs/speed.md).

Shape suffixes: `T` tokens, `I` features in, `O` features out, `r` rank.
"""

from __future__ import annotations

import torch

from posttrain import native
from posttrain.native.kernels import LANES, Kernels


def low_factors(a_rI: torch.Tensor, b_Or: torch.Tensor, scale: float, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A and `s B` in the dtype of `x`; where kernels will read them, the rank filled up with zeros to whole vectors."""
    a, b = a_rI.to(x.dtype), (b_Or * scale).to(x.dtype)
    spare = -len(a) % LANES
    if spare and _kernels(a.shape[1], len(b), x) is not None:
        a, b = torch.nn.functional.pad(a, (0, 0, 0, spare)), torch.nn.functional.pad(b, (0, spare))
    return a, b


def add_update(out_TO: torch.Tensor, x_TI: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`out += (x A') B'`; returns `x A'`."""
    kernels = _kernels(a.shape[1], len(b), x_TI, a, b, out_TO)
    if kernels is not None and out_TO.is_contiguous():
        return kernels.low_rank(x_TI.contiguous(), a, b, out_TO)
    inner = x_TI @ a.t()
    out_TO.addmm_(inner, b.t())
    return inner


def add_gradient(grad_x_TI: torch.Tensor, grad_TO: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`grad_x += (grad B) A`; returns `grad B`."""
    kernels = _kernels(a.shape[1], len(b), grad_TO, a, b, grad_x_TI)
    if kernels is not None and grad_x_TI.is_contiguous():
        return kernels.low_rank_backward(grad_TO.contiguous(), a, b, grad_x_TI)
    inner = grad_TO @ b
    grad_x_TI.addmm_(inner, a)
    return inner


def factor_gradient(inner_Tr: torch.Tensor, x_TI: torch.Tensor, rank: int) -> torch.Tensor:
    """`inner' x`, its first `rank` rows: the gradient of A, or with the output's gradient as `x` that of B, turned."""
    kernels = _kernels(x_TI.shape[1], inner_Tr.shape[1], x_TI, inner_Tr)
    if kernels is not None and inner_Tr.is_contiguous():
        return kernels.low_rank_sums(inner_Tr, x_TI.contiguous())[:rank]
    return (inner_Tr.t() @ x_TI)[:rank]


def _kernels(width: int, out: int, *tensors: torch.Tensor) -> Kernels | None:
    are_known = tensors[0].dtype == torch.bfloat16 and width % LANES == 0 and out % LANES == 0
    return native.kernels_for(*tensors) if are_known else None
