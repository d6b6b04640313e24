"""The compiled functions as functions of tensors. Everything is bf16 on a CPU but what a docstring calls fp32; callers
see to that.

Shape suffixes: `T` tokens, `D` hidden, `H` query heads, `K` key heads, `E` head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch

from posttrain.types import Layout

LANES = 16
"""Heads have a multiple of so many numbers."""

_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "norm": (_POINTER,) * 4 + (_LONG, _LONG, _FLOAT),
    "norm_backward": (_POINTER,) * 6 + (_LONG,) * 3,
    "gated": (_POINTER,) * 3 + (_LONG,) * 3,
    "gated_backward": (_POINTER,) * 5 + (_LONG,),
    "rotate": (_POINTER,) * 4 + (_LONG,) * 4 + (_FLOAT,),
    "attention": (_POINTER,) * 7 + (_LONG,) * 5 + (_FLOAT,),
    "attention_backward": (_POINTER,) * 10 + (_LONG,) * 5 + (_FLOAT,),
}


class Kernels:
    def __init__(self, library: ctypes.CDLL):
        self._call: dict[str, Callable[..., None]] = {}
        for name, types in _SIGNATURES.items():
            function = getattr(library, f"posttrain_{name}")
            function.argtypes, function.restype = types, None
            self._call[name] = function

    # --- element-wise -------------------------------------------------------------------------------------------------

    def norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Normed rows, and in fp32 one over each row's root mean square."""
        _check(weight_D.shape == x_TD.shape[1:], f"a weight of {tuple(weight_D.shape)} for rows of {x_TD.shape[1]}")
        normed_TD = torch.empty_like(x_TD)
        scale_T = x_TD.new_empty(len(x_TD), dtype=torch.float32)
        self._call["norm"](
            x_TD.data_ptr(), weight_D.data_ptr(), normed_TD.data_ptr(), scale_T.data_ptr(), *x_TD.shape, epsilon
        )
        return normed_TD, scale_T

    def norm_backward(
        self, grad_TD: torch.Tensor, x_TD: torch.Tensor, weight_D: torch.Tensor, scale_T: torch.Tensor, of_weight: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The gradient of the rows, and in fp32 that of the weight if it is wanted."""
        grad_x_TD = torch.empty_like(x_TD)
        threads = torch.get_num_threads()
        shares = x_TD.new_zeros(threads, x_TD.shape[1], dtype=torch.float32) if of_weight else None
        self._call["norm_backward"](
            grad_TD.data_ptr(), x_TD.data_ptr(), weight_D.data_ptr(), scale_T.data_ptr(), grad_x_TD.data_ptr(),
            None if shares is None else shares.data_ptr(), *x_TD.shape, threads,
        )  # fmt: skip
        return grad_x_TD, None if shares is None else shares.sum(0)

    def gated(self, gate_TD: torch.Tensor, up_TD: torch.Tensor) -> torch.Tensor:
        """`silu(gate) * up`. Both may be halves of one tensor: their rows lie equally far apart."""
        product_TD = gate_TD.new_empty(gate_TD.shape)
        self._call["gated"](
            gate_TD.data_ptr(), up_TD.data_ptr(), product_TD.data_ptr(), *gate_TD.shape, gate_TD.stride(0)
        )
        return product_TD

    def gated_backward(
        self, gate_TD: torch.Tensor, up_TD: torch.Tensor, grad_TD: torch.Tensor, again: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The gradients of gate and up, the latter in `grad_TD`'s place; and the product `again` if it is wanted."""
        grad_gate_TD = torch.empty_like(gate_TD)
        product_TD = torch.empty_like(gate_TD) if again else None
        self._call["gated_backward"](
            gate_TD.data_ptr(), up_TD.data_ptr(), grad_TD.data_ptr(), grad_gate_TD.data_ptr(),
            None if product_TD is None else product_TD.data_ptr(), gate_TD.numel(),
        )  # fmt: skip
        return grad_gate_TD, grad_TD, product_TD

    def rotate(
        self, x_THE: torch.Tensor, cos_TE: torch.Tensor, sin_TE: torch.Tensor, backwards: bool = False
    ) -> torch.Tensor:
        """Rotary embeddings of every head; `backwards` what their gradient is."""
        tokens, heads, size = x_THE.shape
        for turn_TE in (cos_TE, sin_TE):
            _check(turn_TE.shape == (tokens, size), f"turns of {tuple(turn_TE.shape)} for {tokens} x {size} numbers")
        if x_THE.stride()[1:] != (size, 1):
            x_THE = x_THE.contiguous()
        turned_THE = x_THE.new_empty(x_THE.shape)
        self._call["rotate"](
            x_THE.data_ptr(), cos_TE.data_ptr(), sin_TE.data_ptr(), turned_THE.data_ptr(), tokens, heads, size,
            x_THE.stride(0), -1.0 if backwards else 1.0,
        )  # fmt: skip
        return turned_THE

    # --- attention ----------------------------------------------------------------------------------------------------

    def attention(
        self, query_THE: torch.Tensor, key_TKE: torch.Tensor, value_TKE: torch.Tensor, layout: Layout, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, H, E)`, and in fp32 the log of the sum of each query's exponentials `(H, T)`."""
        tokens, heads, size = query_THE.shape
        out_THE = query_THE.new_empty(query_THE.shape)
        log_sum_HT = query_THE.new_empty(heads, tokens, dtype=torch.float32)
        segments = _segments(layout)
        _check(layout.num_tokens == tokens, f"a layout of {layout.num_tokens} tokens for {tokens}")
        _check(
            key_TKE.shape == value_TKE.shape == (tokens, key_TKE.shape[1], size) and heads % key_TKE.shape[1] == 0,
            f"queries {tuple(query_THE.shape)}, keys {tuple(key_TKE.shape)}, values {tuple(value_TKE.shape)}",
        )
        self._call["attention"](
            query_THE.data_ptr(), key_TKE.data_ptr(), value_TKE.data_ptr(), out_THE.data_ptr(), log_sum_HT.data_ptr(),
            _strides(query_THE, key_TKE, value_TKE, out_THE), segments, len(segments) // 4, tokens, heads,
            key_TKE.shape[1], size, scale,
        )  # fmt: skip
        return out_THE, log_sum_HT

    def attention_backward(
        self,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        grad_THE: torch.Tensor,
        log_sum_HT: torch.Tensor,
        layout: Layout,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of queries, keys and values."""
        tokens, heads, size = query_THE.shape
        given = (query_THE, key_TKE, value_TKE)
        grads = tuple(one.new_empty(one.shape) for one in given)
        segments = _segments(layout)
        self._call["attention_backward"](
            *(one.data_ptr() for one in (*given, grad_THE, log_sum_HT, *grads)), _strides(*given, grad_THE, *grads),
            segments, len(segments) // 4, tokens, heads, key_TKE.shape[1], size, scale,
        )  # fmt: skip
        return grads  # type: ignore[return-value]


def _check(is_right: bool, seen: str) -> None:
    """Before a kernel reads what is not there."""
    if not is_right:
        raise ValueError(f"a kernel was given {seen}")


def _strides(*tensors: torch.Tensor) -> ctypes.Array[ctypes.c_long]:
    """Those of token and head, in elements."""
    numbers = [stride for one in tensors for stride in one.stride()[:2]]
    return (ctypes.c_long * len(numbers))(*numbers)


def _segments(layout: Layout) -> ctypes.Array[ctypes.c_int32]:
    """Four numbers a segment: where it starts, its length, and the same of its parent."""
    numbers: list[int] = []
    parents: Sequence[int] = layout.parents or (-1,) * len(layout.starts)
    for start, length, parent in zip(layout.starts, layout.lengths, parents, strict=True):
        before = (layout.starts[parent], layout.lengths[parent]) if parent >= 0 else (0, 0)
        _check(parent < 0 or parents[parent] < 0, f"segment {parent} as a parent, which has one itself")
        numbers += (start, length, *before)
    return (ctypes.c_int32 * len(numbers))(*numbers)
