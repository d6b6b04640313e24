"""Run inside the sandbox to learn whether there is one: the walls must hold, or nothing is run in it."""

from __future__ import annotations

import os
import socket
import sys


def main() -> int:
    if os.path.exists("/etc/passwd") or os.path.exists("/proc/1") or len(os.environ) > 3:
        return 1
    try:
        os.mkdir("/usr/written")
        return 2
    except OSError:
        pass
    try:
        socket.socket()
        return 3
    except OSError:
        pass
    try:
        if os.fork() == 0:
            os._exit(0)
        return 4
    except OSError:
        pass
    print("shut in")
    return 0


if __name__ == "__main__":
    sys.exit(main())
