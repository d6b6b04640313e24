"""One run in a folder at a time.

The lock is the kernel's (`flock`), so a process that dies gives it back, however it died. Beside it lies who holds it,
for the message that a second run gets.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import ConfigError, LockedError

LOCK, OWNER = ".lock", ".lock-owner.json"
logger = logging.getLogger("posttrain")


@contextmanager
def only_run_in(folder: Path, run_id: str) -> Iterator[None]:
    """Hold `folder` for this run; it is made if it is not there.

    Raises: LockedError where another run holds it, ConfigError where it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise LockedError(f"{folder} is in use by {_owner(folder)}",
                          hint="wait for that run, stop it, or give this one another output_dir") from None  # fmt: skip
    except NotImplementedError:
        logger.warning("%s lies on a file system without locks: nothing keeps a second run out of it", folder)
        yield
        return
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written: {error.strerror or error}",
                          hint="choose a folder of your own; checkpoints go there") from error  # fmt: skip
    try:
        owner = {"run_id": run_id, "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T %z")}
        (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")
        yield
    finally:
        (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"run {owner['run_id']} (process {owner['pid']} on {owner['host']}, since {owner['since']})"
    except (OSError, ValueError, KeyError):
        return "another run"
