"""Memory that runs out: how to recognise it, and what to say about it.

PyTorch has an exception of its own for devices only; a CPU's allocator raises a plain RuntimeError, Python a
MemoryError. An error keeps the frames it came through alive, and with them the very tensors that have to go, so what is
worth knowing is read off it at once and the error is dropped.
"""

from __future__ import annotations

import logging
import re
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.errors import OutOfMemoryError
from posttrain.types import Batch

logger = logging.getLogger("posttrain")

GIB = 2**30
RETRY_CODE = "E-OOM-0003"
_WORDS = (
    "DefaultCPUAllocator: not enough memory",
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "std::bad_alloc",
)
_WANTED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)?")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


@dataclass(frozen=True)
class Shortage:
    """`phase` is what was being done; `wanted` the bytes of the one allocation that failed, None where nobody says."""

    phase: str
    wanted: int | None
    free: int | None

    def __str__(self) -> str:
        wanted = "more memory than there is" if self.wanted is None else size(self.wanted)
        free = "" if self.free is None else f", {size(self.free)} free"
        return f"{self.phase}: wanted {wanted}{free}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error`, or what it came from, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's has no common base
            return True
        if isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def shortage_of(error: BaseException, phase: str, free: int | None) -> Shortage:
    """What `error` says. A failure in a forward is the head's where the error came through `models/head.py`."""
    through_head = any(
        frame.f_code.co_filename.endswith("head.py") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return Shortage("head" if phase == "forward" and through_head else phase, _wanted(str(error)), free)


def _wanted(message: str) -> int | None:
    found = _WANTED.search(message)
    return None if found is None else int(float(found[1]) * _UNITS.get(found[2] or "", 1))


def size(num_bytes: float) -> str:
    """`2.1 GiB`, or `310 MiB` where a tenth of a GiB would say little."""
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.0f} MiB"


def smaller_budget(budget: int, micro: Sequence[Batch], shortage: Shortage) -> int:
    """Half the token budget. Raises OutOfMemoryError where sequences are alone already."""
    largest = max(micro, key=lambda batch: batch.num_tokens)
    if not any(batch.can_be_cut for batch in micro):
        raise OutOfMemoryError(
            f"{shortage}: a single sequence of {largest.num_tokens} tokens ({largest.origins_S[0]}) does not fit",
            hint="lower max_length, or leave such rows out",
        )
    smaller = max(1, min(budget, largest.num_tokens) // 2)
    logger.warning("%s %s. Retried with micro-batches of %d tokens (same numbers).", RETRY_CODE, shortage, smaller)
    return smaller
