"""An allocator of our own for a CPU's large tensors (source/host/arena.cpp), which torch uses for all of them from then
on. Where it cannot be had, glibc serves them as ever (models/memory.py).
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from dataclasses import dataclass
from functools import lru_cache

from posttrain.native.build import NotBuilt, load_arena

logger = logging.getLogger("posttrain")
_lock = threading.Lock()


@dataclass(frozen=True)
class Usage:
    """Bytes: of large tensors now, the most of them so far, of pages that are there, and of addresses."""

    in_use: int
    peak: int
    resident: int
    mapped: int


class Arena:
    def __init__(self, library: ctypes.CDLL):
        self._library = library
        library.posttrain_arena_statistics.argtypes = (ctypes.POINTER(ctypes.c_size_t),)

    def keep(self, keeps: bool) -> None:
        """Whether large tensors made from now on go into the arena. If not, what lies free in it is given back."""
        self._library.posttrain_arena_keep(int(keeps))

    def give_back(self) -> None:
        """Pages of all that lies free in it go back to the kernel."""
        self._library.posttrain_arena_give_back()

    def usage(self) -> Usage:
        numbers = (ctypes.c_size_t * 4)()
        self._library.posttrain_arena_statistics(numbers)
        return Usage(*numbers)


def arena() -> Arena | None:
    """The arena, compiled and installed on first use; None where there is none. Why not is said once."""
    with _lock:
        return _arena()


def installed() -> Arena | None:
    """The arena, if it is there already."""
    return arena() if _arena.cache_info().currsize else None


@lru_cache(maxsize=1)
def _arena() -> Arena | None:
    from posttrain.native import cache

    if os.environ.get("POSTTRAIN_NATIVE") == "0":
        return None
    try:
        library = load_arena(cache())
    except NotBuilt as reason:
        logger.info("memory   large tensors are glibc's: %s", reason)
        return None
    if library.posttrain_arena_install() != 0:
        logger.info("memory   large tensors are glibc's: torch has been given another allocator already")
        return None
    return Arena(library)
