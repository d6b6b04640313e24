"""Corners of the preference trainers that users come upon: rows of which nothing is predicted, streams that end, ways
to spell an adapter with a score."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft import LoraConfig

import posttrain
from posttrain import ConfigError
from posttrain.errors import DataError
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i}? ", "chosen": f"It is {i}.", "rejected": "No idea."} for i in range(4)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def make(method: str, folder: Path, rows: Any = None, peft: Any = None, **settings: Any) -> Any:
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "no",
                "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-6, **settings}  # fmt: skip
    return getattr(posttrain, f"{method}Trainer")(
        model=tiny_model("llama", len(chatml_tokenizer())),
        args=getattr(posttrain, f"{method}Config")(str(folder), **settings),
        train_dataset=ROWS if rows is None else rows,
        processing_class=chatml_tokenizer(),
        peft_config=peft,
    )


@pytest.mark.parametrize("method", ["DPO", "ORPO", "KTO"])
def test_rows_of_which_no_token_is_predicted_are_no_rows(method: str, tmp_path: Path) -> None:
    """One token is left, and nothing stands before it."""
    rows = [{"prompt": "", "chosen": chosen, "rejected": rejected} for chosen, rejected in ("ab", "cd")]
    with pytest.raises(DataError, match="none of 2 rows is left") as caught:
        make(method, tmp_path, rows, max_length=1)
    assert caught.value.code == "E-DATA-0031"
    assert make(method, tmp_path, rows, max_length=2).train().training_loss > 0


def test_rows_that_are_given_once(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from ROWS

    done = make("DPO", tmp_path / "enough", rows()).train()
    assert done.global_step == 2
    trainer = make("DPO", tmp_path, rows(), max_steps=3)
    with pytest.raises(DataError, match="has given all its rows, and training wants more of them") as caught:
        trainer.train()
    assert trainer.state.global_step == 2
    assert "Everything up to step 2 is saved" in "".join(caught.value.__notes__)


@pytest.mark.parametrize("options", [{"modules_to_save": ["score"]}, {}], ids=["named", "not named"])
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS", None])
def test_a_score_beside_an_adapter_however_it_is_spelled(
    options: dict[str, Any], task_type: str | None, tmp_path: Path
) -> None:
    peft = LoraConfig(r=2, target_modules=["q_proj"], task_type=task_type, **options)
    make("Reward", tmp_path / "first", peft=peft)  # leaves it as it is
    trainer = make("Reward", tmp_path, peft=peft)
    before = trainer.model.get_base_model().score.weight.detach().clone()
    trainer.train()
    assert str(trainer.model.peft_config["default"].task_type).endswith("SEQ_CLS")
    assert not trainer.model.get_base_model().score.weight.equal(before)


def test_numbers_of_numpy(tmp_path: Path) -> None:
    make("DPO", tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[np.float64(1.0), np.int64(2)])
    with pytest.raises(ConfigError, match="are not all numbers"):
        make("DPO", tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, True])


def test_noise_of_its_own_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "posttrain"):
        make("DPO", tmp_path, neftune_noise_alpha=5.0)
    assert "none shares its prompt with another" in caplog.text
