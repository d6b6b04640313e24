"""One run in a folder: the second is told who has it, and a dead owner leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.errors import ConfigError, LockedError
from posttrain.locks import LOCK, only_run_in

HOLD = """
import sys, time
from pathlib import Path
from posttrain.locks import only_run_in
with only_run_in(Path(sys.argv[1]), "first"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_the_second_run_is_told_who_has_the_folder(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    first = f"in use by run first .process {holder.pid} on"
    with pytest.raises(LockedError, match=first) as caught, only_run_in(tmp_path, "second"):
        pass
    assert caught.value.exit_code == 6


def test_a_killed_owner_gives_the_folder_back(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with only_run_in(tmp_path, "second"):
        pass


def test_one_after_the_other(tmp_path: Path) -> None:
    for run in ("first", "second"):
        with only_run_in(tmp_path / "new" / "folder", run):
            pass
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] in ([], [LOCK])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(ConfigError, match=r"output_dir .*file/out cannot be written")
    with refused, only_run_in(tmp_path / "file" / "out", "first"):
        pass
