"""Memory: keep what was freed, give it back when it is short, and say how much was used.

On Linux, glibc gives large blocks back to the kernel as soon as they are freed and asks for fresh, zeroed pages at the
next step; on a CPU that costs more than some of the arithmetic. `keep_freed_pages` has torch's large tensors made in an
arena of their own, which keeps pages and leaves next to no holes (native/arena.py). Where there is none it tells glibc
to keep them; the price is holes: a third to a half more is resident than is in use. Where memory is short,
`return_freed_pages` has it the other way round.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from posttrain.native.arena import arena, installed

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
LARGE = 2**19
"""Blocks that are given back one by one where memory is short."""
GLIBC_LARGE = 2**25
"""Those that glibc gives back one by one where it has been freeing large ones (DEFAULT_MMAP_THRESHOLD_MAX)."""


def keep_freed_pages() -> bool:
    """Have large tensors made in memory that is there already. True where that is so now."""
    libc = _glibc()
    if (own := arena()) is not None:
        own.keep(True)
        if libc is not None:  # for what is not torch's: as large as glibc's own limits grow
            libc.mallopt(_M_MMAP_THRESHOLD, GLIBC_LARGE)
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * GLIBC_LARGE)
        return True
    if libc is None:
        return False
    never_trim = libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))
    return bool(never_trim) and bool(libc.mallopt(_M_MMAP_MAX, 0))


@contextmanager
def keeping_freed_pages(device: torch.device) -> Iterator[None]:
    """Inside `keep_freed_pages`, for a run on a CPU; afterwards what is free goes back."""
    if device.type != "cpu":
        yield
        return
    keep_freed_pages()
    try:
        yield
    finally:
        return_freed_pages()


def most_resident(lasting: int, passing: int) -> int:
    """About what is resident at most, with freed pages kept, where so many bytes are in use for good and by turns."""
    return lasting + int(1.5 * passing) if arena() is None else int((lasting + passing) * 17 / 16)


def return_freed_pages() -> None:
    """Have every large block given back as soon as it is freed, so that no more is resident than is in use."""
    if (own := installed()) is not None:
        own.keep(False)
    libc = _glibc()
    if libc is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, LARGE)
        libc.mallopt(_M_MMAP_MAX, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, LARGE)
        libc.malloc_trim(0)


def give_back_freed_memory() -> None:
    """Everything that is free goes back, to the kernel or to the device, so that it can be had in other sizes."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if (own := installed()) is not None:
        own.give_back()
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def give_back_all() -> None:
    """After memory ran out: what is free goes back, and what will be freed does so at once."""
    return_freed_pages()
    give_back_freed_memory()


def _glibc() -> ctypes.CDLL | None:
    """None with musl and other systems, which run as they are."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
        _ = libc.mallopt, libc.malloc_trim
    except (OSError, AttributeError):
        return None
    return libc


def memory_in_use(device: torch.device) -> int:
    """Bytes now: device memory on CUDA, resident memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return int(psutil.Process().memory_info().rss)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: device memory on CUDA, resident memory of this process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class PeakGrowth:
    """Inside, the most memory in use is followed; after it `num_bytes` says by how much it grew. On a CPU that is
    resident memory, looked at every millisecond from a thread, for the kernel's own record only ever rises and may have
    been higher before."""

    def __init__(self, device: torch.device):
        self._device, self._stopped = device, threading.Event()
        self.num_bytes = 0

    def __enter__(self) -> PeakGrowth:
        give_back_freed_memory()  # what lies free in the process would hide growth
        self._before = memory_in_use(self._device)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self._watcher = threading.Thread(target=self._watch, daemon=True)
            self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._stopped.wait(0.001):
            self.num_bytes = max(self.num_bytes, memory_in_use(self._device) - self._before)

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.num_bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        else:
            self._stopped.set()
            self._watcher.join()
            self.num_bytes = max(self.num_bytes, memory_in_use(self._device) - self._before)
