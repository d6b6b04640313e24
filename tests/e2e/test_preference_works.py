"""On the real model: DPO makes held-out chosen answers win, a reward model tells held-out pairs apart. The pairs are
generated and learnable (`posttrain.evaluate.tasks.replies`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from posttrain import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from posttrain.evaluate.tasks.replies import pairs

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m-instruct"
SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "logging_steps": 5,
                            "save_strategy": "no", "report_to": "none", "disable_tqdm": True}  # fmt: skip


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def test_dpo_raises_accuracy_and_margin_on_held_out_pairs(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), max_steps=12, learning_rate=1.5e-4, **SETTINGS)
    trainer = DPOTrainer(MODEL, args=args, train_dataset=pairs(96, 1), eval_dataset=pairs(32, 2), peft_config=lora())
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)
    assert after["eval_rewards/accuracies"] > 0.8
    assert after["eval_rewards/margins"] > 0.3
    assert after["eval_loss"] < 0.6 < before["eval_loss"]


@pytest.mark.thorough
def test_a_reward_model_tells_held_out_pairs_apart(tmp_path: Path) -> None:
    args = RewardConfig(str(tmp_path), max_steps=32, learning_rate=3e-4, **SETTINGS)
    trainer = RewardTrainer(MODEL, args=args, train_dataset=pairs(256, 1), eval_dataset=pairs(96, 2),
                            peft_config=lora())  # fmt: skip
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > 0.65
    assert after["eval_calibration_error"] < 0.3
