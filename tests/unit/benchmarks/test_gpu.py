"""The comparison for GPUs, all of it but the device: a tiny model on the CPU, in processes of their own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "benchmarks" / "gpu" / "sft.py"


def script() -> Any:
    spec = importlib.util.spec_from_file_location("gpu_sft", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_comparison_runs(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    tokenizer = chatml_tokenizer()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    with data.open("w") as file:
        for i in range(40):
            file.write(json.dumps({"question": f"what is {i} and {i}?", "answer": f"it is {2 * i}."}) + "\n")
    command = [sys.executable, SCRIPT, "--device", "cpu", "--one-environment", "--model", tmp_path / "model"]
    command += [
        "--data",
        data,
        "--repeats",
        "1",
        "--steps",
        "3",
        "--warmup",
        "1",
        "--only",
        kind,
        "--workload",
        "gsm8k",
    ]
    command += ["--json", tmp_path / "runs.json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "runs.json").read_text())
    assert record["device"] == "cpu"
    (runs,) = record["results"].values()
    assert runs.keys() == {"posttrain default", "trl tuned", "trl documented"}
    for (run,) in runs.values():
        assert run["tokens_per_second"] > 0
        assert run["peak_memory_gib"] > 0
        assert run["seconds_to_first_step"] > 0
        assert run["losses"] == pytest.approx(runs["posttrain default"][0]["losses"], rel=0.02)
    assert "posttrain default" in done.stdout


def test_a_peer_that_cannot_be_installed_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    def find(library: str) -> str:
        if library == "unsloth":
            raise subprocess.CalledProcessError(1, ["pip", "install", "unsloth"])
        return "python"

    module = script()
    entries, pythons = module.installable(module.ENTRIES["cuda"], find)
    assert [entry[:2] for entry in entries] == [("posttrain", "default"), ("trl", "tuned"), ("trl", "documented")]
    assert pythons == {"posttrain": "python", "trl": "python"}
    assert capsys.readouterr().err.startswith("unsloth is left out: it cannot be installed here")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script()
    monkeypatch.setattr(module, "_has_cuda", lambda: False)
    monkeypatch.setattr(sys, "argv", ["sft.py"])
    with pytest.raises(SystemExit, match="no CUDA device"):
        module.main()


def test_every_entry_has_its_variant() -> None:
    script()  # puts benchmarks/ on the path
    import worker

    for device, entries in script().ENTRIES.items():
        for library, variant, _ in entries:
            assert variant in worker.VARIANTS[device][library]
