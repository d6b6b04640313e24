"""Run as a script: Math-Verify behind a pipe. A line of JSON in, a line out, until the pipe is closed.

It imports nothing of posttrain. Its parent ends it when it takes too long; its own limits are on memory and files.
"""

from __future__ import annotations

import json
import logging
import sys
from functools import lru_cache
from typing import Any

if __name__ == "__main__":  # without site packages: they are where the parent has them
    sys.path[:] = json.loads(sys.argv[1])

MEGABYTES = 2048
MARKS = ("$", "\\boxed", "\\(", "\\[")


@lru_cache(maxsize=4096)
def _gold(gold: str) -> Any:
    """What it says, read as LaTeX where it has no marks of its own."""
    from math_verify import parse

    after = gold.rpartition("####")[2].strip() if "####" in gold else gold
    if not any(mark in after for mark in MARKS):
        after = f"\\boxed{{{after}}}"
    return parse(after, parsing_timeout=None)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`{"same": true | false}`, or null where the right answer cannot be read."""
    from math_verify import parse, verify

    gold = _gold(request["gold"])
    if not gold:
        return {"same": None}
    said = parse(request["text"], parsing_timeout=None)
    return {"same": bool(said) and bool(verify(gold, said, timeout_seconds=None))}


def _serve() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MEGABYTES * 1_000_000
    resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))
    logging.disable(logging.CRITICAL)
    try:
        import math_verify  # noqa: F401

        missing = None
    except ImportError as error:
        missing = str(error)
    out, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps("ready"), file=out, flush=True)
    for line in sys.stdin:
        try:
            reply = {"missing": missing} if missing else answer(json.loads(line))
        except MemoryError:
            raise
        except Exception as error:  # what no one can read is not the same
            reply = {"same": False, "error": type(error).__name__}
        print(json.dumps(reply), file=out, flush=True)


if __name__ == "__main__":
    _serve()
