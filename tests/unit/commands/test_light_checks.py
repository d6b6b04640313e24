"""Checking data without a model loads no model library: that is a third of a gigabyte, and seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.mark.parametrize("verb", ["check", "stats"])
def test_without_a_model_nothing_heavy_is_imported(verb: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW) + "\n")
    script = (
        "import sys; from posttrain.cli import main; code = main(['data', sys.argv[1], sys.argv[2]]); "
        "print('heavy:', [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules], code)"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, verb, str(tmp_path / "a.jsonl")], capture_output=True, text=True, check=True
    )
    assert said.stdout.splitlines()[-1] == "heavy: [] 0"
