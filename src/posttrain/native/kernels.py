"""The compiled functions as functions of tensors. Everything is on a CPU and has the library's dtype, bf16 or fp32, but
what a docstring calls fp32; callers see to that.

Shape suffixes: `T` tokens, `D` hidden, `H` query heads, `K` key heads, `E` head size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from posttrain.native.dealing import deal
from posttrain.types import Layout

LANES = 16
"""Heads have a multiple of so many numbers."""


def per_word(dtype: torch.dtype) -> int:
    """Numbers in the 32-bit words that products are made of (source/products.h)."""
    return 4 // dtype.itemsize


_POINTER, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "norm": (_POINTER,) * 4 + (_LONG, _LONG, _FLOAT),
    "norm_backward": (_POINTER,) * 6 + (_LONG,) * 3,
    "gated": (_POINTER,) * 3 + (_LONG,) * 3,
    "gated_backward": (_POINTER,) * 5 + (_LONG,),
    "rotate": (_POINTER,) * 4 + (_LONG,) * 4 + (_FLOAT,),
    "head": (_POINTER,) * 8 + (_LONG, _LONG, _FLOAT),
    "linear": (_POINTER,) * 7 + (_LONG,) * 4,
    "decode": (_POINTER, _POINTER, _LONG) + (_POINTER,) * 4 + (_LONG,) * 6 + (_FLOAT,),
    "draw": (_POINTER,) * 4 + (_LONG, _LONG, _FLOAT),
    "attention": (_POINTER,) * 7 + (_LONG,) * 6 + (_FLOAT,),
    "attention_backward": (_POINTER,) * 11 + (_LONG,) * 6 + (_FLOAT,),
}
_IN_BF16_ONLY = {
    "low_rank": (_POINTER,) * 5 + (_LONG,) * 4,
    "low_rank_backward": (_POINTER,) * 5 + (_LONG,) * 4,
    "low_rank_sums": (_POINTER,) * 3 + (_LONG,) * 3,
}


class Kernels:
    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype):
        self.dtype = dtype
        self._call: dict[str, Callable[..., None]] = {}
        for name, types in (_SIGNATURES | (_IN_BF16_ONLY if dtype == torch.bfloat16 else {})).items():
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
        self,
        query_THE: torch.Tensor,
        key_TKE: torch.Tensor,
        value_TKE: torch.Tensor,
        layout: Layout,
        scale: float,
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T, H, E)`, and in fp32 the log of the sum of each query's exponentials `(H, T)`. With a `window` a query
        sees so many places, its own included."""
        tokens, heads, size = query_THE.shape
        out_THE = query_THE.new_empty(query_THE.shape)
        log_sum_HT = query_THE.new_empty(heads, tokens, dtype=torch.float32)
        segments = deal(layout).segments_S5
        _check(layout.num_tokens == tokens, f"a layout of {layout.num_tokens} tokens for {tokens}")
        _check(
            key_TKE.shape == value_TKE.shape == (tokens, key_TKE.shape[1], size) and heads % key_TKE.shape[1] == 0,
            f"queries {tuple(query_THE.shape)}, keys {tuple(key_TKE.shape)}, values {tuple(value_TKE.shape)}",
        )
        self._call["attention"](
            query_THE.data_ptr(), key_TKE.data_ptr(), value_TKE.data_ptr(), out_THE.data_ptr(), log_sum_HT.data_ptr(),
            _strides(query_THE, key_TKE, value_TKE, out_THE), segments.data_ptr(), len(segments), tokens, heads,
            key_TKE.shape[1], size, _window(window), scale,
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
        window: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The gradients of queries, keys and values."""
        tokens, heads, size = query_THE.shape
        given = (query_THE, key_TKE, value_TKE)
        grads = tuple(one.new_empty(one.shape) for one in given)
        segments, _, shares = deal(layout)
        room = query_THE.new_empty(2 * key_TKE.shape[1] * shares * size, dtype=torch.float32)
        self._call["attention_backward"](
            *(one.data_ptr() for one in (*given, grad_THE, log_sum_HT, *grads)), _strides(*given, grad_THE, *grads),
            room.data_ptr(), segments.data_ptr(), len(segments), tokens, heads, key_TKE.shape[1], size,
            _window(window), scale,
        )  # fmt: skip
        return grads  # type: ignore[return-value]

    # --- LoRA, in bf16 ------------------------------------------------------------------------------------------------

    def low_rank(self, x_TI: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out_TO: torch.Tensor) -> torch.Tensor:
        """`out += (x A') B'`, for A `(r, I)` and B `(O, r)`, all three multiples of 16; returns `x A'`."""
        _check(out_TO.shape == (len(x_TI), len(b)) and a.shape[1] == x_TI.shape[1], f"a sum {tuple(out_TO.shape)}")
        inner_Tr = x_TI.new_empty(len(x_TI), len(a))
        addresses = (one.data_ptr() for one in (x_TI, a, b, inner_Tr, out_TO))
        self._call["low_rank"](*addresses, *x_TI.shape, len(a), len(b))
        return inner_Tr

    def low_rank_backward(
        self, grad_TO: torch.Tensor, a: torch.Tensor, b: torch.Tensor, grad_x_TI: torch.Tensor
    ) -> torch.Tensor:
        """`grad_x += (grad B) A`; returns `grad B`."""
        _check(grad_TO.shape == (len(grad_x_TI), len(b)), f"a gradient {tuple(grad_TO.shape)}")
        inner_Tr = grad_TO.new_empty(len(grad_TO), len(a))
        addresses = (one.data_ptr() for one in (grad_TO, a, b, inner_Tr, grad_x_TI))
        self._call["low_rank_backward"](*addresses, *grad_x_TI.shape, len(a), len(b))
        return inner_Tr

    def low_rank_sums(self, inner_Tr: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """`inner' x` in fp32, `(r, I)`."""
        _check(len(inner_Tr) == len(x_TI), f"{len(inner_Tr)} inner products of {len(x_TI)} rows")
        sums_rI = x_TI.new_empty(inner_Tr.shape[1], x_TI.shape[1], dtype=torch.float32)
        addresses = (one.data_ptr() for one in (inner_Tr, x_TI, sums_rI))
        self._call["low_rank_sums"](*addresses, *inner_Tr.shape, x_TI.shape[1])
        return sums_rI

    # --- the head -----------------------------------------------------------------------------------------------------

    def head(
        self, logits_CV: torch.Tensor, target_C: torch.Tensor, times: float, factor_C: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Of each row of logits, taken `times`, in fp32: log p of the target, whether that is the likeliest, the
        entropy, the mean logit, and the log of the sum of squared probabilities. With `factor_C` (fp32),
        `factor (p - onehot of the target)` is written over the logits."""
        rows = len(logits_CV)
        _check(target_C.shape == (rows,) and target_C.dtype == torch.int64, f"targets of {tuple(target_C.shape)}")
        _check(factor_C is None or factor_C.shape == (rows,), f"other factors than {rows}")
        said = tuple(logits_CV.new_empty(rows, dtype=torch.float32) for _ in range(4))
        is_top_C = logits_CV.new_empty(rows, dtype=torch.bool)
        self._call["head"](
            logits_CV.data_ptr(), target_C.data_ptr(), None if factor_C is None else factor_C.data_ptr(),
            said[0].data_ptr(), is_top_C.data_ptr(), *(one.data_ptr() for one in said[1:]), *logits_CV.shape, times,
        )  # fmt: skip
        return said[0], is_top_C, *said[1:]

    # --- decoding -----------------------------------------------------------------------------------------------------

    def normed(self, x_BD: torch.Tensor, weight_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        """`norm` for those who need no gradient."""
        normed_BD = torch.empty_like(x_BD)
        self._call["norm"](x_BD.data_ptr(), weight_D.data_ptr(), normed_BD.data_ptr(), None, *x_BD.shape, epsilon)
        return normed_BD

    def linear(
        self,
        x_BD: torch.Tensor,
        product: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
        sizes: tuple[int, int],
        plus: torch.Tensor | None,
    ) -> torch.Tensor:
        """`x W' + bias + (x A') B' + plus`, for few rows. `product` is weight, bias, A and B in strips
        (native/strips.py), all but the first perhaps None; `sizes` are numbers of outputs and rank."""
        out, rank = sizes
        _check(plus is None or plus.shape == (len(x_BD), out), "a sum of another shape")
        y_BO = x_BD.new_empty(len(x_BD), out)
        weight, bias, a, b = (None if one is None else one.data_ptr() for one in product)
        self._call["linear"](
            x_BD.data_ptr(), weight, bias, a, b, None if plus is None else plus.data_ptr(), y_BO.data_ptr(),
            *x_BD.shape, out, rank,
        )  # fmt: skip
        return y_BO

    def decode(
        self,
        x_BD: torch.Tensor,
        layers: ctypes.Array[Any],
        turns: tuple[torch.Tensor, torch.Tensor],
        pages_BN: torch.Tensor,
        counts_BN: torch.Tensor,
        sizes: tuple[int, int, int],
        scale: float,
    ) -> None:
        """One new token of each row through all layers, in place. Its keys and values are put where `pages_BN`
        (addresses, int64) and `counts_BN` (tokens in them, int32, the new one included) say. `layers` are
        native/strips.py's, `sizes` H, K and E."""
        for turn_BE in turns:
            _check(turn_BE.shape == (len(x_BD), sizes[2]), f"turns of {tuple(turn_BE.shape)} for {len(x_BD)} rows")
        self._call["decode"](
            x_BD.data_ptr(), ctypes.byref(layers), len(layers), turns[0].data_ptr(), turns[1].data_ptr(),
            pages_BN.data_ptr(), counts_BN.data_ptr(), *x_BD.shape, pages_BN.shape[1], *sizes, scale,
        )  # fmt: skip

    def draw(
        self, logits_BV: torch.Tensor, number_B: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The token that each number in [0, 1) falls on, and its log-probability in fp32."""
        _check(number_B.shape == logits_BV.shape[:1], f"{len(number_B)} numbers for {len(logits_BV)} rows")
        logits_BV, number_B = logits_BV.contiguous(), number_B.double().contiguous()
        token_B = torch.empty(len(logits_BV), dtype=torch.int64)
        logp_B = torch.empty(len(logits_BV), dtype=torch.float32)
        self._call["draw"](
            logits_BV.data_ptr(), number_B.data_ptr(), token_B.data_ptr(), logp_B.data_ptr(), *logits_BV.shape,
            temperature,
        )  # fmt: skip
        return token_B, logp_B


def _check(is_right: bool, seen: str) -> None:
    """Before a kernel reads what is not there."""
    if not is_right:
        raise ValueError(f"a kernel was given {seen}")


def _window(window: int | None) -> int:
    _check(window is None or window > 0, f"a window of {window}")
    return window or 0


def _strides(*tensors: torch.Tensor) -> ctypes.Array[ctypes.c_long]:
    """Those of token and head, in elements."""
    numbers = [stride for one in tensors for stride in one.stride()[:2]]
    return (ctypes.c_long * len(numbers))(*numbers)
