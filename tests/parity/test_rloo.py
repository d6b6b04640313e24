"""RLOO beside TRL 1.16 on the same completions: TRL has no `rollout_func` here, so its sampling is put in our place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig

import posttrain
from posttrain.rollout.order import Rounds
from tests.parity.side_by_side import Rows, Trained, train, trl
from tests.parity.test_grpo import CHATS, GROUP, PROMPTS, _saved, answer_reward, check, length_reward, rollout

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

SETTINGS: dict[str, Any] = {
    "method": "RLOO",
    "learning_rate": 1e-2,
    "num_generations": GROUP,
    "per_device_train_batch_size": 2 * GROUP,
    "max_completion_length": 24,
    "max_steps": 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without KL": {"beta": 0.0},
    "more KL": {"beta": 0.5},
    "normalised": {"normalize_advantages": True},
    "clipped rewards": {"reward_clip_range": (-0.2, 0.5)},
    "upper clip": {"epsilon": 0.01, "epsilon_high": 0.02, "num_iterations": 2},
    "iterated": {"num_iterations": 3},
    "several steps a round": {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": GROUP},
    "weights": {"reward_weights": [0.3, 2.0]},
    "temperature": {"temperature": 0.7},
}


@pytest.fixture(autouse=True)
def _sampled_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from trl.trainer import rloo_trainer

    rounds_done = iter(range(1000))

    def in_our_order(batch: dict[str, Any]) -> dict[str, Any]:
        order = Rounds(6, 1, both.batches, 1, 1, 42).deal(next(rounds_done), len(batch["advantages"]))  # type: ignore
        return {
            name: value[order] if torch.is_tensor(value) and value.dim() else value for name, value in batch.items()
        }

    def sampled(self: Any, prompt_ids: Any, *_: Any, **__: Any) -> Any:
        return rollout(self._prompts_given, self)["completion_ids"]

    generate = rloo_trainer.RLOOTrainer._generate

    def remembering(self: Any, prompts: list[Any], *rest: Any) -> Any:
        self._prompts_given = prompts
        return generate(self, prompts, *rest)

    monkeypatch.setattr(rloo_trainer.RLOOTrainer, "_generate", remembering)
    monkeypatch.setattr(rloo_trainer.RLOOTrainer, "_generate_single_turn", sampled)
    monkeypatch.setattr(rloo_trainer, "shuffle_sequence_dict", in_our_order)


def both(folder: Path, rows: Rows = PROMPTS, adapter: bool = False, **settings: Any) -> tuple[Trained, Trained]:
    settings = {**SETTINGS, **settings}
    both.batches = settings.get("steps_per_generation", settings.get("gradient_accumulation_steps", 1))  # type: ignore
    rewards = {"reward_funcs": [length_reward, answer_reward]}
    if adapter:
        rewards["peft_config"] = LoraConfig(r=4, target_modules="all-linear")  # type: ignore[assignment]
    theirs = dict(settings)
    if not adapter:
        theirs["model"] = _saved(folder, "llama")  # TRL loads the reference by the model's path
    ours = train(posttrain, folder, rows, **settings, given=lambda: {**rewards, "rollout_func": rollout})
    return ours, train(trl, folder, rows, **theirs, given=lambda: rewards)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, tmp_path: Path) -> None:
    several = "accumulation" in str(OPTIONS[option])
    check(*both(tmp_path, **OPTIONS[option]), ("entropy", "clip_ratio/") if several else ("clip_ratio/",))


def test_messages(tmp_path: Path) -> None:
    check(*both(tmp_path, CHATS), ("entropy", "clip_ratio/"))


def test_an_adapter_and_the_model_without_it(tmp_path: Path) -> None:
    check(*both(tmp_path, adapter=True, num_iterations=2))
