"""The libraries of `source/`, compiled once on the machine that runs them and kept in posttrain's cache.

Any C++ compiler will do (`$CXX`, `c++`, `g++`, `clang++`); a compilation takes seconds. What was compiled is named by
its sources, flags and compiler, so that a new version of either is compiled anew, and it is put in place whole. The
kernels' OpenMP library is the one that torch has loaded already: a second one would fight the first for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).parent / "source"
FLAGS = (
    "-std=c++17", "-O3", "-fPIC", "-shared", "-fno-strict-aliasing", "-fno-math-errno",
    "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mbmi2",
)  # fmt: skip
FLAGS_OF = {torch.bfloat16: ("-mavx512bf16",), torch.float32: ("-DPOSTTRAIN_FP32",)}
"""What tensors hold; one library for each."""
ARENA_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-shared")  # torch's headers are C++20
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "fma", "bmi2"}
"""What the processor must be able to do, as Linux spells it; for bf16 `avx512_bf16` as well."""
DEADLINE = 300.0


class NotBuilt(Exception):
    """Why there is no such library here."""


def load(cache: Path, dtype: torch.dtype) -> ctypes.CDLL:
    """The kernels for tensors of `dtype`, compiled if they are not in `cache` yet. Raises NotBuilt."""
    if dtype not in FLAGS_OF:
        raise NotBuilt(f"they are for bf16 and fp32, not for {dtype}")
    _check_processor(dtype)
    openmp = _openmp()
    return _loaded(_built(cache, "kernels", SOURCE, (*FLAGS, *FLAGS_OF[dtype])), openmp)


def load_arena(cache: Path) -> ctypes.CDLL:
    """The allocator of source/host, likewise. It is made for one version of torch, whose headers it needs."""
    if platform.system() != "Linux":
        raise NotBuilt(f"it is for Linux, this is {platform.system()}")
    home = Path(torch.__file__).parent
    flags = (*ARENA_FLAGS, f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    included = f"-I{home / 'include'}"
    target = _built(cache, "arena", SOURCE / "host", (*flags, included), (*flags, torch.__version__))
    return _loaded(target, str(home / "lib" / "libc10.so"))


def _loaded(target: Path, needed: str) -> ctypes.CDLL:
    try:
        ctypes.CDLL(needed, ctypes.RTLD_GLOBAL)  # what it offers is found by the library that is loaded next
    except OSError as error:
        raise NotBuilt(f"{needed} cannot be loaded: {error}") from None
    try:
        return ctypes.CDLL(str(target))
    except OSError as error:
        raise NotBuilt(f"{target} cannot be loaded, delete it to compile it anew: {error}") from None


def _check_processor(dtype: torch.dtype) -> None:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise NotBuilt(f"they are for Linux on x86-64, this is {platform.system()} on {platform.machine()}")
    flags = next((set(line.split()) for line in _system("/proc/cpuinfo") if line.startswith("flags")), set[str]())
    needed = NEEDED | {"avx512_bf16"} if dtype == torch.bfloat16 else NEEDED
    if missing := sorted(needed - flags):
        raise NotBuilt(f"the processor has no {', '.join(missing)}")


def _openmp() -> str:
    """torch's OpenMP library, by its path: whichever holds the function that torch itself finds. Others may be loaded
    too (scikit-learn brings one), with threads and a number of threads of their own."""
    try:
        function = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (AttributeError, OSError) as error:
        raise NotBuilt(f"torch has loaded no OpenMP library: {error}") from None
    address = ctypes.cast(function, ctypes.c_void_p).value or 0
    for line in _system("/proc/self/maps"):
        begin, _, end = line.split()[0].partition("-")
        if int(begin, 16) <= address < int(end, 16):
            return line.split(maxsplit=5)[-1]
    raise NotBuilt("torch's OpenMP library is no file")


def _system(path: str) -> list[str]:
    try:
        return Path(path).read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise NotBuilt(f"{path} cannot be read: {error}") from None


def _compiler() -> list[str]:
    wanted = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in wanted:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise NotBuilt(f"CXX={command}: {error}") from None
        if words and shutil.which(words[0]):
            return words
    raise NotBuilt(f"there is no C++ compiler ({', '.join(wanted)})")


def _built(cache: Path, name: str, folder: Path, flags: tuple[str, ...], known_by: tuple[str, ...] = ()) -> Path:
    """`known_by` stands for the flags in the name, where they hold paths of this machine."""
    compiler = _compiler()
    sources = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    if not sources:
        raise NotBuilt(f"{folder} has no sources: the package is not whole")
    key = hashlib.sha256()
    texts = (path.read_text("utf-8") for path in sources)
    for part in (*(known_by or flags), _run([*compiler, "--version"]), *texts):
        key.update(part.encode() + b"\0")
    target = cache / f"{name}-{key.hexdigest()[:16]}.so"
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = Path(scratch) / target.name
            files = [str(path) for path in sources if path.suffix == ".cpp"]
            _run([*compiler, *flags, "-o", str(made), *files])
            made.replace(target)
    except OSError as error:
        raise NotBuilt(f"{cache} cannot be written: {error}") from None
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=DEADLINE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{shlex.join(command[:1])}: {error}") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["nothing"]
        said = next((line for line in lines if "error" in line.lower()), lines[0])  # notes may stand before it
        raise NotBuilt(f"{shlex.join(command[:1])} ended with {done.returncode}: {said}")
    return done.stdout
