"""Linear layers as the kernels of decoding read them (source/decoding.cpp): 16 outputs at a time, inputs in words (of
two in bf16, of one in fp32), one strip after the other, so that a step reads every weight once and in order. Adapters
are laid out alike and are part of the same product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from posttrain.native.kernels import LANES, per_word


class CProduct(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "a", "b")),
        *((name, ctypes.c_long) for name in ("width", "out", "rank")),
    )


class CLayer(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "query_norm", "key_norm", "second_norm")),
        *((name, CProduct) for name in ("qkv", "back", "gate_up", "down")),
        *((name, ctypes.c_float) for name in ("epsilon", "head_epsilon", "second_epsilon")),
    )


@dataclass
class Strips:
    """`x W' + bias`, with `+ (x A') B'` where there are adapters. `width`, `out` and `dtype` are those of W."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    width: int
    out: int
    dtype: torch.dtype
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None

    @classmethod
    def of(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Strips:
        """`weight` is `(out, width)`, the width made of whole words."""
        return cls(in_strips(weight), bias, weight.shape[1], weight.shape[0], weight.dtype)

    def adapt(self, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
        """`a` is `(rank, width)`, `b` `(out, rank)` with the scale in it; or neither. Ranks are filled with zeros."""
        if a is None or b is None:
            self.a = self.b = None
            return
        spare = -len(a) % LANES
        self.a, self.b = in_strips(pad(a, (0, 0, 0, spare))), in_strips(pad(b, (0, spare)))

    @property
    def rank(self) -> int:
        return 0 if self.a is None else len(self.a) * LANES

    def as_c(self, adapted: bool = True) -> CProduct:
        a, b, rank = (self.a, self.b, self.rank) if adapted else (None, None, 0)
        return CProduct(*(_address(one) for one in (self.weight, self.bias, a, b)), self.width, self.out, rank)


@dataclass(frozen=True)
class StripLayer:
    """A layer's weights. `norms` before attention and before the feed-forward part, `head_norms` of queries, keys."""

    norms: tuple[torch.Tensor, torch.Tensor]
    epsilons: tuple[float, float]
    head_norms: tuple[torch.Tensor, torch.Tensor] | None
    head_epsilon: float
    qkv: Strips
    back: Strips
    gate_up: Strips
    down: Strips

    def as_c(self) -> CLayer:
        query_norm, key_norm = self.head_norms or (None, None)
        norms = (self.norms[0], query_norm, key_norm, self.norms[1])
        products = (one.as_c() for one in (self.qkv, self.back, self.gate_up, self.down))
        return CLayer(*map(_address, norms), *products, self.epsilons[0], self.head_epsilon, self.epsilons[1])


def as_table(layers: Sequence[StripLayer]) -> ctypes.Array[CLayer]:
    """For `Kernels.decode`; good as long as the layers' tensors are."""
    return (CLayer * len(layers))(*(layer.as_c() for layer in layers))


def in_strips(weight: torch.Tensor) -> torch.Tensor:
    """`(out, in)` to `(out / 16, words of in, 16)`, the last strip filled up with zeros."""
    padded = pad(weight, (0, 0, 0, -len(weight) % LANES)).contiguous()
    words = weight.shape[1] // per_word(weight.dtype)
    return padded.view(torch.int32).view(-1, LANES, words).transpose(1, 2).contiguous()


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
