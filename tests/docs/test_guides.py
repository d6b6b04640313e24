"""Every guide runs: the ```python blocks of README.md and docs/*.md, in order, in one namespace and an empty folder.

A block under `<!-- no-run -->` is left out; a guide with `<!-- slow -->` over a block is a slow test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FENCE = re.compile(r"^```(\w*)")
COMMENT = re.compile(r"^<!--\s*(no-run|slow)\s*-->$")


def python_lines(text: str) -> tuple[list[str], bool]:
    """A guide with everything but its runnable Python blanked, so that line numbers in errors are the guide's own, and
    whether it is slow."""
    lines, mark, language, is_slow = [], "", None, False
    for line in text.splitlines():
        fence = FENCE.match(line)
        keeps = language == "python" and mark != "no-run" and not fence
        lines.append(line if keeps else "")
        if fence and language is None:
            language = fence.group(1)
            is_slow |= language == "python" and mark == "slow"
        elif fence:
            language, mark = None, ""
        elif language is None and line.strip():
            found = COMMENT.match(line.strip())
            mark = found.group(1) if found else ""
    return lines, is_slow


def _cases() -> list[object]:
    cases = []
    for guide in GUIDES:
        lines, is_slow = python_lines(guide.read_text("utf-8"))
        if any(lines):
            name = str(guide.relative_to(ROOT))
            cases.append(pytest.param(name, lines, id=name, marks=[pytest.mark.slow] if is_slow else []))
    return cases


@pytest.mark.parametrize(("name", "lines"), _cases())
def test_guide_runs(name: str, lines: list[str], tmp_path: Path) -> None:
    script = tmp_path / name.replace("/", "_")
    script.write_text("\n".join(lines) + "\n", "utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{name}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_only_runnable_python_is_kept() -> None:
    guide = (
        "# T\n```python\na = 1\n```\n```sh\nls\n```\n<!-- no-run -->\n```python\nb = 2\n```\n\n```python\nc = 3\n```\n"
    )
    assert python_lines(guide) == (["", "", "a = 1", *[""] * 10, "c = 3", ""], False)


def test_a_slow_guide_is_known() -> None:
    assert python_lines("<!-- slow -->\n\n```python\na = 1\n```\n") == (["", "", "", "a = 1", ""], True)
