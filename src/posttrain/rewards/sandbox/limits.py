"""What a process inside the sandbox may take, set by itself before it runs anything; it cannot be raised again."""

from __future__ import annotations

import resource


def set_limits(seconds: float, megabytes: int) -> None:
    memory, files = megabytes * 1_000_000, 4_000_000
    for limit, most in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_DATA, memory),
        (resource.RLIMIT_FSIZE, files),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_NPROC, 64),
    ):
        _, hard = resource.getrlimit(limit)
        least = most if hard < 0 else min(most, hard)
        resource.setrlimit(limit, (least, least))
