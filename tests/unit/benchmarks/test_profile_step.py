"""The breakdown of a step by kind of work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
def test_every_kind_of_work_is_found(tmp_path: Path) -> None:
    """Full fine-tuning in fp32 or bf16 has all of them."""
    tokenizer = chatml_tokenizer()
    tiny_model("llama", 270).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, ROOT / "benchmarks" / "profile_step.py", "--model", tmp_path, "--full", "--cpu"]
    command += ["--steps", "1", "--warmup", "1", "--threads", "1", "--json", tmp_path / "step.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    seconds = json.loads((tmp_path / "step.json").read_text())
    wall = seconds.pop("seconds_per_step")
    assert all(spent > 0 for spent in seconds.values()), seconds
    assert 0.5 * wall < sum(seconds.values()) < 1.5 * wall
    assert "| kind of work | ms a step | share |" in done.stdout
    assert "a step, by the clock" in done.stdout
