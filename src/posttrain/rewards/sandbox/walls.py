"""The walls around a process that runs what a model wrote: bubblewrap's namespaces, and a filter of system calls.

Inside there is no network, no environment, no /proc, no home and no /etc; the Python that runs this and the system's
libraries can be read, and 16 MB of /tmp written, which are gone afterwards. There is one process, which cannot start
another: the filter refuses that, sockets, ptrace, new namespaces, io_uring and keyrings, and the x32 and 32-bit calls
that would go round it. Limits on memory, processor time, file size and open files are set by the script that runs
inside, before it runs anything (`limits.py`).

Left out: operating systems other than Linux, and GPUs.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from posttrain.errors import ConfigError

TMP_BYTES = 16_000_000
START = 30.0
"""Seconds for the trial that tells whether there is a sandbox."""

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
CLONE_THREAD = 0x00010000
X32 = 0x40000000
MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
CALLS = {
    "x86_64": {
        "clone": 56, "clone3": 435,
        "refused": (
            41, 42, 43, 49, 50, 53, 288,  # socket, connect, accept, bind, listen, socketpair, accept4
            57, 58,  # fork, vfork
            101, 310, 311, 434, 438,  # ptrace, process_vm_readv and _writev, pidfd_open, pidfd_getfd
            155, 161, 165, 166, 272, 308, 428, 429, 430, 431, 432, 433, 442,  # roots, mounts, namespaces
            248, 249, 250, 298, 321, 323, 425, 426, 427,  # keyrings, perf_event_open, bpf, userfaultfd, io_uring
            175, 176, 246, 313, 320,  # modules, kexec
            29, 30, 31, 64, 68, 240,  # System V memory, semaphores, queues; mq_open
        ),
    },
    "aarch64": {
        "clone": 220, "clone3": 435,
        "refused": (
            198, 199, 200, 201, 202, 203, 242,
            117, 270, 271, 434, 438,
            39, 40, 41, 51, 97, 268, 428, 429, 430, 431, 432, 433, 442,
            217, 218, 219, 241, 280, 282, 425, 426, 427,
            104, 105, 106, 273, 294,
            180, 186, 190, 194, 196,
        ),
    },
}  # fmt: skip


def command(script: Path, filter_fd: int | None) -> list[str]:
    """What starts `script` inside, its channel on standard input and output."""
    python = os.path.realpath(sys.executable)
    shut_in = [
        shutil.which("bwrap") or "bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv",
        "--cap-drop", "ALL", "--hostname", "sandbox",
        *_read_only(python), "--ro-bind", str(script.parent), "/sandbox",
        "--dev", "/dev", "--size", str(TMP_BYTES), "--tmpfs", "/dev/shm", "--remount-ro", "/dev",
        "--size", str(TMP_BYTES), "--tmpfs", "/tmp", "--chdir", "/tmp", "--remount-ro", "/",
    ]  # fmt: skip
    if filter_fd is not None:
        shut_in += ["--seccomp", str(filter_fd)]
    return [*shut_in, "--", python, "-I", "-S", "-B", f"/sandbox/{script.name}"]


def _read_only(python: str) -> list[str]:
    """The system's libraries, and this Python where it lies elsewhere."""
    bound = ["--ro-bind", "/usr", "/usr"]
    for name in ("/lib", "/lib64", "/lib32", "/bin"):
        if os.path.islink(name):
            bound += ["--symlink", os.readlink(name), name]
        elif os.path.isdir(name):
            bound += ["--ro-bind", name, name]
    prefixes = dict.fromkeys(os.path.realpath(path) for path in (sys.base_prefix, sys.base_exec_prefix))
    for prefix in prefixes:
        if not prefix.startswith("/usr/") and prefix != "/usr":
            bound += ["--ro-bind", prefix, prefix]
    if not any(python.startswith(f"{prefix}/") for prefix in (*prefixes, "/usr", "/bin")):
        bound += ["--ro-bind", python, python]
    return bound


def system_calls() -> bytes | None:
    """The filter as the kernel takes it; None on a machine whose calls are not known here."""
    machine = platform.machine()
    if machine not in MACHINES:
        return None
    calls = CALLS[machine]
    refused: list[int] = list(calls["refused"])  # type: ignore[call-overload]
    made = [_load(4), _jump(0x15, MACHINES[machine], 1, 0), _return(KILL), _load(0)]
    if machine == "x86_64":
        made += [_jump(0x35, X32, 0, 1), _return(KILL)]
    made += [_jump(0x15, calls["clone3"], 0, 1), _return(ENOSYS)]  # type: ignore[arg-type]
    # clone makes threads, no processes
    made += [_jump(0x15, calls["clone"], 0, 4), _load(16), _jump(0x45, CLONE_THREAD, 1, 0), _return(EPERM),  # type: ignore[arg-type]
             _return(ALLOW)]  # fmt: skip
    for number in refused:
        made += [_jump(0x15, number, 0, 1), _return(EPERM)]
    return b"".join([*made, _return(ALLOW)])


def _load(offset: int) -> bytes:
    return struct.pack("=HBBI", 0x20, 0, 0, offset)


def _jump(kind: int, value: int, if_true: int, if_false: int) -> bytes:
    return struct.pack("=HBBI", kind, if_true, if_false, value)


def _return(value: int) -> bytes:
    return struct.pack("=HBBI", 0x06, 0, 0, value)


@lru_cache(maxsize=1)
def why_none() -> str | None:
    """Why nothing can be shut in on this machine; None where it can."""
    if sys.platform != "linux":
        return "bubblewrap is a program for Linux"
    if shutil.which("bwrap") is None:
        return "bubblewrap (bwrap) is not installed"
    if system_calls() is None:
        return f"the system calls of {platform.machine()} are not known here"
    script = Path(__file__).with_name("trial.py")
    try:
        with filter_file() as fd:
            done = subprocess.run(command(script, fd), env={}, pass_fds=(fd,), stdin=subprocess.DEVNULL, text=True,
                                  capture_output=True, errors="replace", timeout=START, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"bubblewrap cannot be started: {error}"
    if done.stdout != "shut in\n":
        said = done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}"
        return f"bubblewrap cannot shut anything in here: {said}"
    return None


class filter_file:
    """The filter as an open file, which bubblewrap reads once."""

    def __enter__(self) -> int:
        program = system_calls()
        assert program is not None
        reader, writer = os.pipe()
        os.write(writer, program)  # a kilobyte: it fits into the pipe
        os.close(writer)
        self.reader = reader
        return reader

    def __exit__(self, *_: object) -> None:
        os.close(self.reader)


def require() -> None:
    """Raises ConfigError where there is no sandbox."""
    if (why := why_none()) is not None:
        raise ConfigError(
            f"code_tests runs what a model wrote, and there is no sandbox to run it in: {why}",
            hint="apt-get install bubblewrap; or, where nothing on this machine can be lost: "
                 "code(i_accept_unsandboxed_code=True)",
            code="E-REWARD-0004",
        )  # fmt: skip
