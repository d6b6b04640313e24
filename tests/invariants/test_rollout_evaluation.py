"""Evaluating a policy by its own completions does not depend on how many prompts come together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import posttrain
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS = [{"prompt": [{"role": "user", "content": f"Say {i}"}]} for i in range(5)]
MEANS = (
    "reward",
    "rewards/vowels/mean",
    "rewards/now_and_then/mean",
    "completions/mean_length",
    "completions/clipped_ratio",
    "entropy",
    "loss",
)


def vowels(completions: list[Any], **_: Any) -> list[float]:
    """The same for all of some groups."""
    return [float(sum(c in "aeiou" for c in one[0]["content"]) > 0) for one in completions]


def now_and_then(completions: list[Any], prompts: list[Any], **_: Any) -> list[float | None]:
    """Of one completion of the first prompts, and of all of the others."""
    said: list[float | None] = []
    for i, prompt in enumerate(prompts):
        is_first = prompt[0]["content"] < "Say 3"
        said.append((1.0 if i % 4 == 0 else None) if is_first else 0.0)
    return said


def evaluated(folder: Path, batch_size: int, **settings: Any) -> dict[str, float]:
    words = chatml_tokenizer()
    trainer = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_funcs=[vowels, now_and_then],
        args=posttrain.GRPOConfig(
            str(folder), per_device_train_batch_size=4, num_generations=4, per_device_eval_batch_size=batch_size,
            max_completion_length=8, bf16=False, use_cpu=True, report_to="none", disable_tqdm=True,
            loss_type="grpo", reward_weights=[1.0, 0.0], reward_check=False, **settings,
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=words,
    )  # fmt: skip
    return {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}


@pytest.mark.parametrize("settings", [{}, {"beta": 0.1}, {"max_sampling_rows": 3}], ids=str)
def test_any_batch_size_evaluates_the_same_completions(settings: dict[str, Any], tmp_path: Path) -> None:
    one, two, all_at_once = (evaluated(tmp_path / str(size), size, **settings) for size in (4, 8, 20))
    for name in (*MEANS, "frac_reward_zero_std"):
        assert one[name] == pytest.approx(all_at_once[name], rel=1e-5, abs=1e-6), name
        assert two[name] == pytest.approx(all_at_once[name], rel=1e-5, abs=1e-6), name
    assert 0 < all_at_once["frac_reward_zero_std"] < 1
