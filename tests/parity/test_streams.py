"""Training from files that are read as training goes: the same numbers as from memory, and resumed bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.errors import DataError
from tests.parity.side_by_side import CHAT_PAIRS, TEXTS, make_trainer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAT_PAIRS))
    return path


def run(folder: Path, source: Any, resume: str | None = None, **settings: Any) -> Any:
    options = {
        "per_device_train_batch_size": 2,
        "max_steps": 5,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": True,
    }
    given = {"given": lambda: {"train_dataset": source}}
    trainer = make_trainer(posttrain, folder, CHAT_PAIRS, **{**options, **settings}, **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_the_same_numbers_as_from_memory(path: Path, tmp_path: Path) -> None:
    in_order = {"train_sampling_strategy": "sequential"}
    streamed = run(tmp_path / "s", str(path), dataset_streaming=True)
    assert losses(streamed) == losses(run(tmp_path / "m", str(path), **in_order))
    assert streamed.data_reports["train"].used == 4  # of the second pass
    assert len(losses(streamed)) == 5


@pytest.mark.parametrize("settings", [{}, {"shuffle_dataset": True}, {"packing": True, "max_length": 60}])
@pytest.mark.parametrize("mixed", [False, True])
def test_resumed_bit_for_bit(path: Path, tmp_path: Path, settings: dict[str, Any], mixed: bool) -> None:
    source = posttrain.mix([str(path), TEXTS], [1, 2], seed=5) if mixed else str(path)
    whole = run(tmp_path / "out", source, dataset_streaming=True, **settings)
    resumed = run(tmp_path / "out", source, str(tmp_path / "out" / "checkpoint-4"), dataset_streaming=True, **settings)
    assert losses(whole) == losses(resumed)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_wrong_format_is_found_before_training(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "?", "reply": "!"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        run(tmp_path, str(path), dataset_streaming=True)
