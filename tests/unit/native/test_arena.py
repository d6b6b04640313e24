"""Large tensors of a CPU in an arena of their own: nothing is lost, nothing overlaps, and what is resident follows what
is in use. In processes of their own, for an allocator is installed once and for all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from posttrain.models import memory
from posttrain.native import arena as arena_module
from posttrain.native import build
from posttrain.native.arena import arena
from posttrain.native.build import NotBuilt, load_arena

ROOT = Path(__file__).parents[3]
START = """
import gc, os, random, resource, sys, threading
import torch
from posttrain.models.memory import (
    give_back_freed_memory, keep_freed_pages, memory_in_use, most_resident, return_freed_pages)
from posttrain.native.arena import arena
assert keep_freed_pages() and most_resident(1600, 1600) == 3400
own = arena()
MIB = 2**20
def resident(): return memory_in_use(torch.device("cpu"))
def full(number, value): return torch.full((number,), value, dtype=torch.uint8)
"""


def run(code: str, **environment: str) -> str:
    if arena() is None:
        pytest.skip("no arena can be built here")
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", START + code],
        capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": paths, **environment},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


CHURN = """
def churn(seed, rounds, held):
    draw = random.Random(seed)
    for i in range(rounds):
        if held and draw.random() < 0.5:
            tensor, value = held.pop(draw.randrange(len(held)))
            assert bool((tensor == value).all()), "written over"
        else:
            size = int(2 ** draw.uniform(10, 23))
            tensor, value = full(size, i % 251), i % 251
            assert tensor.data_ptr() % 64 == 0
            held.append((tensor, value))
    assert all(bool((tensor == value).all()) for tensor, value in held)
"""


def test_tensors_come_and_go_and_keep_what_they_hold() -> None:
    run(f"""{CHURN}
held = []
for seed in range(5):
    churn(seed, 400, held)
    usage = own.usage()
    sizes = [tensor.nbytes for tensor, _ in held if tensor.nbytes >= 65536]
    assert sum(sizes) <= usage.in_use <= sum(sizes) + (4096 + 256) * len(sizes)
    assert usage.in_use <= usage.resident <= usage.mapped
    starts = sorted((t.data_ptr(), t.nbytes) for t, _ in held)
    assert all(a + size <= b for (a, size), (b, _) in zip(starts, starts[1:]))
held.clear()
assert own.usage().in_use == 0
""")


def test_threads() -> None:
    run(f"""{CHURN}
failed = []
threading.excepthook = lambda args: failed.append(args)
threads = [threading.Thread(target=churn, args=(seed, 300, [])) for seed in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
gc.collect()
assert not failed and own.usage().in_use == 0, failed
""")


def test_small_ones_that_stay_make_no_holes() -> None:
    """The same with glibc's heap needs a third more."""
    run("""
before, kept = resident(), []
for step in range(12):
    sizes = [(17 + (7 * i + 5 * step) % 23) * 100_000 for i in range(60)]
    large = []
    for i, size in enumerate(sizes):
        large.append(full(size, i))
        kept.append(full(300, i))
        kept.append([object() for _ in range(50)])
    del large
usage = own.usage()
assert usage.resident <= usage.peak * 17 / 16 + 2 * MIB
assert resident() - before <= usage.resident + 20 * MIB
""")


def test_free_pages_go_back_when_asked() -> None:
    run("""
first = full(40 * MIB, 1)
gone = full(200 * MIB, 2)
last = full(4 * MIB, 3)
with_all = resident()
del gone
assert resident() > with_all - 10 * MIB  # kept
give_back_freed_memory()
assert resident() < with_all - 190 * MIB and own.usage().mapped < 60 * MIB  # from the middle too
again = full(150 * MIB, 4)
assert bool((first == 1).all()) and bool((last == 3).all()) and bool((again == 4).all())
del again, last
give_back_freed_memory()
assert own.usage().mapped <= 46 * MIB
assert bool((first == 1).all()) and bool((full(300 * MIB, 5) == 5).all())
""")


def test_where_memory_is_short_large_tensors_are_glibcs() -> None:
    run("""
old = full(10 * MIB, 1)
spare = full(100 * MIB, 2)
del spare
before = resident()
return_freed_pages()
assert resident() < before - 90 * MIB
new = full(50 * MIB, 3)
assert own.usage().in_use < 11 * MIB and bool((old == 1).all())
with_new = resident()
del new
assert resident() < with_new - 45 * MIB
del old
assert own.usage().in_use == 0
keep_freed_pages()
assert full(10 * MIB, 1)[0] == 1 and 10 * MIB < own.usage().peak < 11 * MIB
""")


def test_too_much_is_an_error_and_no_more() -> None:
    run("""
keeps = full(30 * MIB, 7)
_, size = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("VmPeak", "VmSize"))]
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 64 * MIB,) * 2)
for _ in range(3):
    try:
        full(200 * MIB, 1)
    except RuntimeError as error:
        assert "DefaultCPUAllocator" in str(error) and "can't allocate memory" in str(error), error
    else:
        raise AssertionError("there was no memory for that")
    assert bool((full(20 * MIB, 2) == 2).all()) and bool((keeps == 7).all())
""")


def test_everything_torch_does_with_memory() -> None:
    run("""
import numpy, io
from torch.profiler import profile
x = torch.randn(512, 512)
x.resize_(1024, 1024).fill_(2.0)
assert float(x.sum()) == 2 * 1024 * 1024
assert float(torch.from_numpy(x.numpy()).sum()) == float(x.sum())
a = torch.randn(700, 576).bfloat16()
assert (a @ a.t()).shape == (700, 700)  # oneDNN's own buffers
assert torch.equal(torch.linalg.inv(torch.eye(400)), torch.eye(400))
file = io.BytesIO(); torch.save(x, file); file.seek(0)
assert torch.equal(torch.load(file), x)
assert torch.equal(x.share_memory_(), torch.full((1024, 1024), 2.0))
with profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
    y = torch.empty(3 * MIB, dtype=torch.uint8)
assert any(event.cpu_memory_usage >= 3 * MIB for event in seen.key_averages())
base = x.new_zeros(300_000)
view = base[1000:]
del base
view.fill_(1.0)
assert float(view.sum()) == 299_000
""")


def test_a_fork_has_it_too() -> None:
    run(f"""{CHURN}
stop = threading.Event()
def busy():
    while not stop.is_set():
        churn(0, 50, [])
other = threading.Thread(target=busy, daemon=True)
other.start()
mine = full(5 * MIB, 9)
for _ in range(20):
    child = os.fork()
    if not child:
        assert bool((mine == 9).all())
        churn(1, 50, [])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
other.join()
""")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="there is glibc on Linux only")
def test_left_out_where_kernels_are() -> None:
    code = (
        "from posttrain.models.memory import keep_freed_pages, most_resident as m; print(keep_freed_pages(), m(8, 8))"
    )
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "POSTTRAIN_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["True", "20"]  # glibc keeps them


def test_why_there_is_none_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotBuilt, match=r"there is no C\+\+ compiler"):
        load_arena(tmp_path)
    monkeypatch.setattr(build.platform, "system", lambda: "Darwin")
    with pytest.raises(NotBuilt, match="it is for Linux, this is Darwin"):
        load_arena(tmp_path)
    arena_module._arena.cache_clear()
    try:
        with caplog.at_level("INFO", logger="posttrain"):
            assert arena_module.installed() is None
            assert arena() is None
            assert memory.most_resident(100, 100) == 250
        assert [record.getMessage() for record in caplog.records] == [
            "memory   large tensors are glibc's: it is for Linux, this is Darwin"
        ]
    finally:
        arena_module._arena.cache_clear()


def test_addresses_can_be_had_elsewhere_under_a_limit() -> None:
    """As after a shortage: what lies free between others is glibc's to serve again."""
    run("""
first, middle, last = full(8 * MIB, 1), full(300 * MIB, 2), full(8 * MIB, 3)
del middle
_, size = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(("VmPeak", "VmSize"))]
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + 16 * MIB,) * 2)
return_freed_pages()
again = full(280 * MIB, 4)
assert int(again.min()) == int(again.max()) == 4 and bool((first == 1).all()) and bool((last == 3).all())
""")


def test_giving_back_builds_nothing() -> None:
    code = (
        "import posttrain.native.arena as a; from posttrain.models.memory import give_back_all; give_back_all(); "
        "print(a._arena.cache_info().currsize)"
    )
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["0"]


PRODUCTS = """
import os, resource, sys
import posttrain, torch
rows = torch.randn(2300, 576).bfloat16()
weights = [torch.randn(number, 576).bfloat16() for number in (1536, 576, 192)]
def several(first, last):
    for count in range(first, last):
        for weight in weights:
            rows[:count] @ weight.t()
def resident(): return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
several(1000, 1060)
before = resident()
several(1060, 1200)
print((resident() - before) // 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read as Linux says it")
def test_products_of_many_shapes_are_not_all_kept() -> None:
    """420 more shapes: 480 MiB with torch's own limits, where oneDNN compiles bf16 products."""
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("bf16 products are not oneDNN's here")
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if "CACHE_CAPACITY" not in name}
    command = [sys.executable, "-c", PRODUCTS]
    done = subprocess.run(command, capture_output=True, text=True, env={**environment, "PYTHONPATH": paths}, check=True)
    assert int(done.stdout) < 150
