"""Memory that runs out ends a command with exit code 8 and one line, wherever it happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.shortage import Shortage, is_out_of_memory, shortage_of

CPU = (
    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 2254857830 bytes."
)
WINDOWS = "DefaultCPUAllocator: not enough memory: you tried to allocate 1048576 bytes."
CUDA = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. "
    "GPU 0 has a total capacity of 139.80 GiB of which 1.40 GiB is free."
)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError(CPU), RuntimeError(WINDOWS), RuntimeError(CUDA)], ids=str
)
def test_exit_code_8(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    config = tmp_path / "run.yaml"
    config.write_text("model: {name: here}\ndataset: {path: rows.jsonl}\n")
    monkeypatch.setattr("posttrain.runner.train.train", fail)
    assert main(["train", str(config)]) == 8
    said = capsys.readouterr().err
    assert "E-OOM-0001 memory ran out (" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("message", "wanted"), [(CPU, 2254857830), (WINDOWS, 2**20), (CUDA, int(2.5 * 2**30)), ("std::bad_alloc", None)]
)
def test_what_was_wanted_is_read_off_the_error(message: str, wanted: int | None) -> None:
    error = RuntimeError(message)
    assert is_out_of_memory(error)
    assert shortage_of(error, "backward", 5) == Shortage("backward", wanted, 5)


def test_other_errors_are_none() -> None:
    assert not is_out_of_memory(RuntimeError("expected scalar type Float but found BFloat16"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))
    assert not is_out_of_memory(None)


def test_the_cause_counts() -> None:
    error = OSError("cannot read")
    error.__cause__ = MemoryError()
    assert is_out_of_memory(error)


def test_what_is_said() -> None:
    assert str(Shortage("head", 2254857830, 1503238554)) == "head: wanted 2.1 GiB, 1.4 GiB free"
    assert str(Shortage("head", None, 2**20)) == "head: wanted more memory than there is, 1 MiB free"
    assert str(Shortage("evaluation", 2**20, None)) == "evaluation: wanted 1 MiB"
