"""What torch takes a dozen passes over memory for on a CPU, in one: kernels in C++ for norms, SwiGLU, rotary
embeddings, attention and decoding, in bf16 and fp32; and an allocator that keeps a CPU's large tensors together
(arena.py).

They are a faster way to the same numbers and nothing needs them: without a compiler, on another processor, in another
dtype, torch's own operations do the same, and the twins are compared in tests. `POSTTRAIN_NATIVE=0` leaves them out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

from posttrain.folders import cache_root
from posttrain.native.build import NotBuilt, load
from posttrain.native.kernels import Kernels

logger = logging.getLogger("posttrain")
PLAIN = (torch.Tensor, torch.nn.Parameter)
DTYPES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
_is_off = False


def kernels(dtype: torch.dtype) -> Kernels | None:
    """The kernels for tensors of `dtype`, compiled on first use; None where there are none. Why not is said once."""
    return None if _is_off or dtype not in DTYPES else _loaded(dtype)


@contextmanager
def without_kernels() -> Iterator[None]:
    """Inside, torch's own operations."""
    global _is_off
    before, _is_off = _is_off, True
    try:
        yield
    finally:
        _is_off = before


@lru_cache(maxsize=len(DTYPES))
def _loaded(dtype: torch.dtype) -> Kernels | None:
    if os.environ.get("POSTTRAIN_NATIVE") == "0":
        return None
    try:
        return Kernels(load(cache(), dtype), dtype)
    except NotBuilt as reason:
        logger.info("kernels  none for %s, torch's own operations instead: %s", DTYPES[dtype], reason)
        return None


def cache() -> Path:
    """Where compiled libraries are kept. Raises NotBuilt."""
    try:
        return cache_root() / "kernels"
    except RuntimeError as error:  # a user without a home
        raise NotBuilt(f"{error}; name a folder for them in POSTTRAIN_CACHE") from None


def runs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are kernels for what is computed there."""
    return device.type == "cpu" and kernels(dtype) is not None


def kernels_for(*tensors: torch.Tensor) -> Kernels | None:
    """The kernels, if there are any that take all of these: of one dtype on a CPU, numbers that lie in memory (a
    quantised or traced tensor says that it is bf16 too)."""
    dtype = tensors[0].dtype
    fit = all(type(x) in PLAIN and x.device.type == "cpu" and x.dtype == dtype for x in tensors)
    return kernels(dtype) if fit else None
