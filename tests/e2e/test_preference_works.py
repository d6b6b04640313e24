"""On the real model: DPO makes held-out chosen answers win, a reward model tells held-out pairs apart. The pairs are
generated and learnable: a good answer greets the customer who asked by name and says the order's own number; a bad one
gets one of the two wrong."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

from posttrain import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m-instruct"
NAMES = ("Anna", "Bashir", "Chen", "Dora", "Emeka", "Farah", "Goran", "Hana", "Iris", "Jonas", "Kofi", "Lena")
WISHES = ("where is my parcel", "can I send it back", "how long will it take", "may I change the address")
ANSWERS = ("we are looking into it and will write today", "it is on its way", "of course, the form is attached",
           "thank you for your patience")  # fmt: skip


def pairs(seed: int, number: int) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        name, other = draw.sample(NAMES, 2)
        order, wrong = (str(draw.randrange(1000, 9999)) for _ in range(2))
        answer = draw.choice(ANSWERS)
        good = f"Dear {name}, about order {order}: {answer}."
        bad = draw.choice((f"Dear {other}, about order {order}: {answer}.", f"Hey. Order {wrong}? {answer}."))
        wish = f"My name is {name}. {draw.choice(WISHES).capitalize()}? My order is {order}."
        rows.append({
            "prompt": [{"role": "user", "content": wish}],
            "chosen": [{"role": "assistant", "content": good}],
            "rejected": [{"role": "assistant", "content": bad}],
        })  # fmt: skip
    return rows


SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 16, "logging_steps": 5,
                            "save_strategy": "no", "report_to": "none", "disable_tqdm": True}  # fmt: skip


def lora() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def test_dpo_raises_accuracy_and_margin_on_held_out_pairs(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), max_steps=16, learning_rate=1e-4, **SETTINGS)
    trainer = DPOTrainer(MODEL, args=args, train_dataset=pairs(1, 128), eval_dataset=pairs(2, 48), peft_config=lora())
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
    trainer = RewardTrainer(MODEL, args=args, train_dataset=pairs(1, 256), eval_dataset=pairs(2, 96),
                            peft_config=lora())  # fmt: skip
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_accuracy"] > 0.65
    assert after["eval_calibration_error"] < 0.3
