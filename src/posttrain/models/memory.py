"""Memory: keep what was freed, and say how much was used.

On Linux, glibc gives large blocks back to the kernel as soon as they are freed and asks for fresh, zeroed pages at the
next step; on a CPU that costs more than some of the arithmetic. `keep_freed_pages` tells it not to.
"""

from __future__ import annotations

import ctypes
import resource
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_pages() -> bool:
    """Ask glibc to serve large blocks from memory it already has. True where it agreed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        libc = ctypes.CDLL("libc.so.6")
        never_trim = libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
        return bool(never_trim) and bool(libc.mallopt(_M_MMAP_MAX, 0))
    except (OSError, AttributeError):  # musl and others have no mallopt; they run as they are
        return False


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: device memory on CUDA, resident memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
