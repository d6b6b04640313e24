"""On the real model, GRPO teaches a task that a program can check: what `examples/grpo.py` shows, shortened."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from posttrain import GRPOConfig, GRPOTrainer
from posttrain.evaluate.tasks import sums

pytestmark = pytest.mark.slow


def test_sums_are_answered_in_tags(tmp_path: Path) -> None:
    train, held_out = sums.split()
    trainer = GRPOTrainer(
        model="smollm2-135m-instruct",
        reward_funcs=sums.correct,
        args=GRPOConfig(
            output_dir=str(tmp_path),
            learning_rate=2e-4,
            beta=0.01,
            num_generations=8,
            per_device_train_batch_size=48,
            max_completion_length=12,
            max_steps=16,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=3,
            save_strategy="no",
            num_generations_eval=4,
            per_device_eval_batch_size=84,
            disable_tqdm=True,
            report_to="none",
        ),
        train_dataset=train,
        eval_dataset=held_out[:42],
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    before = trainer.evaluate()["eval_rewards/correct/mean"]
    trainer.train()
    after = trainer.evaluate()["eval_rewards/correct/mean"]
    assert before < 0.35
    assert after > 0.5
    differences = [entry["sampling/logp_difference"] for entry in trainer.state.log_history if "reward" in entry]
    assert max(differences) < 0.1  # what the sampler says, and what training says of the same tokens in bf16
