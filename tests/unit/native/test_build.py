"""The kernels are compiled once, whole or not at all, and what keeps them from it is said and does no harm."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from posttrain import native
from posttrain.native import build
from posttrain.native.build import NotBuilt, load
from tests.native_reference import kernels_or_skip, random


@pytest.fixture
def anew() -> Iterator[None]:
    """Asked for the first time, and forgotten afterwards."""
    native._loaded.cache_clear()
    yield
    native._loaded.cache_clear()


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that would do."""
    monkeypatch.setattr(build, "_check_processor", lambda _: None)


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(script, "utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.usefixtures("processor")
def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NotBuilt, match=r"there is no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\)"):
        load(tmp_path / "cache", torch.bfloat16)
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(NotBuilt, match="there is no C\\+\\+ compiler \\(no-such-compiler -O2\\)"):
        load(tmp_path / "cache", torch.bfloat16)
    monkeypatch.setenv("CXX", "c++ 'unbalanced")
    with pytest.raises(NotBuilt, match=r"CXX=c\+\+ 'unbalanced: No closing quotation"):
        load(tmp_path / "cache", torch.bfloat16)


FAILS = """#!/bin/sh
test "$1" = --version && exit 0
echo 'In file included from attention.cpp:' >&2
printf 'error: \\377 it does not know -mavx512bf16\\n' >&2
exit 3
"""


@pytest.mark.usefixtures("processor")
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, FAILS))
    with pytest.raises(NotBuilt, match=r"compiler ended with 3: error: \S+ it does not know -mavx512bf16"):
        load(tmp_path / "cache", torch.bfloat16)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.usefixtures("processor")
def test_a_compiler_that_says_nothing_and_one_that_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "#!/bin/sh\nexit 1\n"))
    with pytest.raises(NotBuilt, match="ended with 1: nothing"):
        load(tmp_path, torch.bfloat16)
    monkeypatch.setenv("CXX", compiler(tmp_path, "#!/bin/sh\nexec sleep 60\n"))
    monkeypatch.setattr(build, "DEADLINE", 0.2)
    with pytest.raises(NotBuilt, match="timed out"):
        load(tmp_path, torch.bfloat16)


@pytest.mark.usefixtures("processor")
def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "#!/bin/sh\nexit 0\n"))
    (tmp_path / "file").touch()
    with pytest.raises(NotBuilt, match=r"file/kernels cannot be written: .*Not a directory"):
        load(tmp_path / "file" / "kernels", torch.bfloat16)


@pytest.mark.usefixtures("processor")
def test_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    writes = '#!/bin/sh\nwhile [ $# -gt 0 ]; do [ "$1" = -o ] && echo no library > "$2"; shift; done\n'
    monkeypatch.setenv("CXX", compiler(tmp_path, writes))
    with pytest.raises(NotBuilt, match=r"kernels-\w+\.so cannot be loaded, delete it to compile it anew: "):
        load(tmp_path / "cache", torch.bfloat16)


@pytest.mark.usefixtures("processor")
def test_a_package_without_its_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "SOURCE", tmp_path)
    monkeypatch.setenv("CXX", compiler(tmp_path, "#!/bin/sh\nexit 0\n"))
    with pytest.raises(NotBuilt, match="has no sources: the package is not whole"):
        load(tmp_path / "cache", torch.bfloat16)


def test_another_processor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    with pytest.raises(NotBuilt, match=r"they are for Linux on x86-64, this is .* on aarch64"):
        load(tmp_path, torch.bfloat16)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(build.platform, "system", lambda: "Linux")
    monkeypatch.setattr(build, "_system", lambda _: ["flags : fma bmi2 avx512f avx512bw avx512vl"])
    for dtype, missing in ((torch.bfloat16, "avx512_bf16, avx512dq"), (torch.float32, "avx512dq")):
        with pytest.raises(NotBuilt, match=f"the processor has no {missing}$"):
            load(tmp_path, dtype)


@pytest.mark.parametrize("dtype", build.FLAGS_OF, ids=str)
def test_the_sources_compile_for_each_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    """On a processor that could not run them too, so that an error in them is not taken for a reason to do without."""
    try:
        build._compiler()
    except NotBuilt as reason:
        pytest.skip(str(reason))
    assert build._built(tmp_path, "kernels", build.SOURCE, (*build.FLAGS, *build.FLAGS_OF[dtype])).is_file()


def test_a_system_that_tells_nothing() -> None:
    with pytest.raises(NotBuilt, match="/proc/no-such-file cannot be read"):
        build._system("/proc/no-such-file")


@pytest.mark.usefixtures("anew", "processor")
def test_without_them_everything_goes_on_and_the_reason_is_said_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", compiler(tmp_path, FAILS))
    monkeypatch.delenv("POSTTRAIN_NATIVE", raising=False)
    with caplog.at_level(logging.INFO, "posttrain"):
        assert native.kernels(torch.bfloat16) is None
        assert native.kernels(torch.bfloat16) is None
    assert len(caplog.messages) == 1
    assert "kernels  none for bf16, torch's own operations instead: " in caplog.text
    assert "it does not know -mavx512bf16" in caplog.text


@pytest.mark.usefixtures("anew", "processor")
def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def homeless(_: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("POSTTRAIN_CACHE", "XDG_CACHE_HOME", "POSTTRAIN_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", homeless)
    with caplog.at_level(logging.INFO, "posttrain"):
        assert native.kernels(torch.bfloat16) is None
    assert "name a folder for them in POSTTRAIN_CACHE" in caplog.text


@pytest.mark.usefixtures("anew")
def test_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("POSTTRAIN_NATIVE", "0")
    monkeypatch.setattr(native, "load", lambda *_: pytest.fail("compiled"))
    with caplog.at_level(logging.INFO, "posttrain"):
        assert native.kernels(torch.bfloat16) is None
    assert not caplog.messages


def test_switched_off_for_a_while() -> None:
    kernels = kernels_or_skip()
    with native.without_kernels():
        assert native.kernels(torch.bfloat16) is None
        with native.without_kernels():
            pass
        assert native.kernels(torch.bfloat16) is None
    assert native.kernels(torch.bfloat16) is kernels


class Quantised(torch.Tensor):
    """Says what it is not."""


def test_what_fits() -> None:
    one = random(2, 3)
    assert native.kernels_for(one, torch.nn.Parameter(one)) is kernels_or_skip()
    assert native.kernels_for(one, one.float()) is None
    assert native.kernels_for(one.double()) is None
    assert native.kernels_for(one, torch.empty(2, device="meta", dtype=torch.bfloat16)) is None
    assert native.kernels_for(one.as_subclass(Quantised)) is None
    with pytest.raises(NotBuilt, match=r"for bf16 and fp32, not for torch\.float64"):
        load(native.cache(), torch.float64)


LOADS = """
import sys, torch
from pathlib import Path
from posttrain.native.build import load
from posttrain.native.kernels import Kernels
x = torch.ones(3, 5)
print(float(Kernels(load(Path(sys.argv[1]), x.dtype), x.dtype).norm(x, x[0], 0.0)[0].sum()))
"""


@pytest.mark.slow
def test_processes_that_compile_at_once_see_no_half_written_file(tmp_path: Path) -> None:
    """One that finds the file while others still write theirs included."""
    kernels_or_skip()
    package, before = build.SOURCE.parent, set(build.SOURCE.parent.rglob("*.*")) - set(
        build.SOURCE.parent.rglob("*.pyc"))  # fmt: skip
    running = [start(tmp_path / "cache") for _ in range(2)]
    watched = list[int]()
    while any(process.poll() is None for process in running):
        watched += [path.stat().st_size for path in (tmp_path / "cache").glob("kernels-*.so")]
    for process in [*running, start(tmp_path / "cache")]:
        said, failed = process.communicate(timeout=300)
        assert (said.strip(), process.returncode) == ("15.0", 0), failed
    (made,) = (tmp_path / "cache").iterdir()  # and no folder is left behind
    assert set(watched) == {made.stat().st_size}
    assert set(package.rglob("*.*")) - set(package.rglob("*.pyc")) == before  # which may be read-only


def start(cache: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", LOADS, str(cache)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=environment)  # fmt: skip


SECOND_LIBRARY = """
import ctypes, sys
import torch
torch.set_num_threads(3)
ctypes.CDLL(sys.argv[1])
from posttrain.native.build import _openmp
print(ctypes.CDLL(_openmp()).omp_get_max_threads(), sys.argv[1] in open("/proc/self/maps").read())
"""


def test_of_two_openmp_libraries_torchs_is_taken(tmp_path: Path) -> None:
    """Whose number of threads is what buffers are made for. The other is a copy under another name."""
    copy = tmp_path / "libgomp.so.9"
    copy.write_bytes(Path(build._openmp()).read_bytes().replace(b"libgomp.so.1", b"libgomp.so.9"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SECOND_LIBRARY, str(copy)], capture_output=True, text=True, check=True,
                          env=environment)  # fmt: skip
    assert done.stdout.split() == ["3", "True"]


def test_a_loaders_worker_is_no_thread_short() -> None:
    """torch gives a loader's workers one thread, and so do we: others are not there after a fork."""
    kernels = kernels_or_skip()
    x, weight = random(300, 64), random(64, seed=1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = kernels.norm(x, weight, 1e-5)[0]
        loader = torch.utils.data.DataLoader(_Normed(x, weight), batch_size=None, num_workers=1, timeout=60)
        assert all(torch.equal(seen, expected) for seen in loader)
    finally:
        torch.set_num_threads(before)


class _Normed(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, x: torch.Tensor, weight: torch.Tensor):
        self._given = x, weight

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return kernels_or_skip().norm(*self._given, 1e-5)[0]
