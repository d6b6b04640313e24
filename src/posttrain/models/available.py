"""How much memory there really is: what the machine has free, less what a container, a job scheduler or a shell allows.

Limits are those of control groups (both versions, every level up to the root), RLIMIT_AS, and on CUDA what the driver
reports free. Pages of files that the kernel keeps for speed count as free, for it drops them when asked.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from posttrain.errors import ConfigError
from posttrain.models.memory import memory_in_use

CGROUPS = Path("/sys/fs/cgroup")
_SIZE = re.compile(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(0, min([int(psutil.virtual_memory().available), *_group_rooms(), *_address_room()]))


def total_memory(device: torch.device) -> int:
    """What this process has and what it can still get."""
    return memory_in_use(device) + free_memory(device)


def parse_size(given: int | str, name: str = "max_memory") -> int:
    """`12GiB`, `12GB`, `800 MB` or a number of bytes. Raises ConfigError for anything else."""
    if isinstance(given, int) and not isinstance(given, bool) and given > 0:
        return given
    found = _SIZE.fullmatch(given) if isinstance(given, str) else None
    try:
        base = 1024 if found and found[3] else 1000
        value = int(float(found[1]) * base ** _POWERS[found[2].upper()]) if found else 0
    except ValueError:
        value = 0
    if value <= 0:
        raise ConfigError(f"{name}={given!r} is no size", hint=f"write {name}='12GiB', or a number of bytes")
    return value


def _address_room() -> Iterator[int]:
    """What `ulimit -v` leaves."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(psutil.Process().memory_info().vms)


def _group_rooms() -> Iterator[int]:
    """What each control group that this process is in has left."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").split()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _rooms(CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _rooms(CGROUPS / "memory", path, *names)


def _rooms(root: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """From the group up. In a container its own group is the root that it sees, whatever its path outside is called."""
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            yield most - used + _statistic(group / "memory.stat", reclaimable)
        if group == root:
            return


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max": no limit
        return None


def _statistic(file: Path, name: str) -> int:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + " ")), 0)
