"""Signals outside training: the process ends with status 75 even where no exception gets through."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

SIGNAL_ITSELF = "import os, signal, time; os.kill(os.getpid(), signal.{name}); time.sleep(30)"
IMPORTS = """
from posttrain.terminal import ended_by_signals
with ended_by_signals():
    try:
        import slow
    except BaseException:
        print("an exception was raised into an import")
"""
SWALLOWS = """
import os, signal, time
from posttrain import terminal
terminal.PATIENCE = 0.3
with terminal.ended_by_signals():
    try:
        os.kill(os.getpid(), signal.{name})
        time.sleep(1)
    except BaseException:
        print("swallowed", flush=True)
    time.sleep(30)
"""
RAISES = """
from posttrain.terminal import ended_by_signals
import os, signal, time
try:
    with ended_by_signals():
        os.kill(os.getpid(), signal.{name})
        time.sleep(30)
except KeyboardInterrupt as stopped:
    print(stopped)
assert signal.getsignal(signal.{name}) in (signal.SIG_DFL, signal.default_int_handler)
"""


def heed_signals() -> None:
    """In the child: whoever runs the tests may have them ignored (`nohup`, a job in the background of a script)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=25, check=False, preexec_fn=heed_signals
    )


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals(tmp_path: Path, name: str) -> None:
    assert hasattr(signal, name)
    (tmp_path / "slow.py").write_text(SIGNAL_ITSELF.format(name=name))
    importing = run(tmp_path, IMPORTS)
    assert (importing.returncode, importing.stdout) == (75, "")
    assert importing.stderr == f"Stopped at once ({name}). What was saved before is as it was.\n"
    swallowing = run(tmp_path, SWALLOWS.format(name=name))
    assert (swallowing.returncode, swallowing.stdout) == (75, "swallowed\n")
    assert f"Stopped at once ({name})" in swallowing.stderr
    raising = run(tmp_path, RAISES.format(name=name))
    assert (raising.returncode, raising.stdout, raising.stderr) == (0, f"{name}\n", "")
