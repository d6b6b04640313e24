"""It works: a reward model learns from pairs what is better, proves it on others, and PPO makes a model say that, no
further from where it started than is allowed. Sixteen words, seconds."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import posttrain
from tests.tiny_models import tiny_model

GOOD, BAD = ("one", "two", "three", "four"), ("no", "never", "maybe", "later")
WORDS = [*GOOD, *BAD, "count", "on", "from", "please", ":", "?", "<pad>", "</s>"]
QUIET: dict[str, Any] = {"bf16": False, "use_cpu": True, "save_strategy": "no", "report_to": "none",
                         "disable_tqdm": True, "logging_steps": 8}  # fmt: skip
PROMPTS = [{"prompt": f"count on from {word} :"} for word in GOOD * 8]


def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="?")


def pairs(count: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)

    def answer(usual: tuple[str, ...], other: tuple[str, ...]) -> str:
        said = (draw.choice(usual if draw.random() < 0.8 else other) for _ in range(draw.randint(3, 6)))
        return f" {' '.join(said)}"

    return [
        {"prompt": f"count on from {draw.choice(GOOD)} :", "chosen": answer(GOOD, BAD), "rejected": answer(BAD, GOOD)}
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reward")
    args = posttrain.RewardConfig(str(folder), learning_rate=1e-3, max_steps=40, per_device_train_batch_size=16,
                                  on_bad_row="skip", **QUIET)  # fmt: skip
    trainer = posttrain.RewardTrainer(
        tiny_model("llama", len(WORDS), seed=1),
        args,
        train_dataset=pairs(300, 0),
        eval_dataset=pairs(100, 1),
        processing_class=tokenizer(),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    assert trainer.validation is not None
    assert trainer.validation.accuracy > 0.85
    return str(folder)


def run(folder: Path, reward: str, **settings: Any) -> tuple[dict[str, float], dict[str, float], posttrain.PPOTrainer]:
    """Before, and after."""
    options = {"response_length": 6, "temperature": 1.0, "per_device_train_batch_size": 16, "num_mini_batches": 2,
               "total_episodes": 800, "learning_rate": 1e-3, "per_device_eval_batch_size": 32, **settings}  # fmt: skip
    args = posttrain.PPOConfig(str(folder), **options, **QUIET)
    trainer = posttrain.PPOTrainer(args, tokenizer(), tiny_model("llama", len(WORDS)), None, reward, PROMPTS,
                                   eval_dataset=PROMPTS)  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    return before, trainer.evaluate(), trainer


def test_a_validated_reward_rises_and_the_divergence_is_bounded(reward: str, tmp_path: Path) -> None:
    before, after, _ = run(tmp_path, reward)
    assert before["eval_objective/kl"] == 0.0
    assert after["eval_objective/scores"] > before["eval_objective/scores"] + 0.5
    assert after["eval_objective/rlhf_reward"] > before["eval_objective/rlhf_reward"] + 0.3
    assert 0.5 < after["eval_objective/kl"] < 8.0
    assert after["eval_loss/value_avg"] < before["eval_loss/value_avg"]


def test_adaptive_control_holds_the_divergence_near_its_target(reward: str, tmp_path: Path) -> None:
    control = {"kl_coef": 0.02, "adap_kl_ctrl": True, "target": 1.5, "horizon": 32.0}
    before, after, trainer = run(tmp_path, reward, total_episodes=1280, **control)
    assert trainer.kl is not None
    assert trainer.kl.coef > 0.02
    assert 0.5 < after["eval_objective/kl"] < 3.0
    assert after["eval_objective/scores"] > before["eval_objective/scores"]
