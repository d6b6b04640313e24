"""GRPO beside TRL 1.16 on the same completions, given by `rollout_func`: every loss type and option, several steps of
each.

The completions depend on the prompt alone, so both libraries learn from the same ones; TRL's dealing of completions to
batches is put into our order.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

import posttrain
from posttrain.rollout.order import Rounds
from tests.parity.side_by_side import Rows, Trained, train, trl

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

PROMPTS: Rows = [{"prompt": f"Count from {i} " * (1 + i % 2), "start": i, "ground_truth": str(i + 2)} for i in range(6)]
CHATS: Rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in PROMPTS]
GROUP = 4
SETTINGS: dict[str, Any] = {
    "method": "GRPO",
    "learning_rate": 1e-2,
    "num_generations": GROUP,
    "per_device_train_batch_size": 2 * GROUP,
    "max_completion_length": 24,
    "max_steps": 4,
}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
OPTIONS: dict[str, dict[str, Any]] = {
    "with KL": {"beta": 0.1},
    "KL as it was": {"beta": 0.1, "use_bias_correction_kl": False},
    "sequence level": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "sequence level, off policy": {
        "importance_sampling_level": "sequence",
        "loss_type": "luspo",
        "num_iterations": 3,
        "epsilon": 0.002,
        "epsilon_high": 0.002,
    },
    "upper clip": {"epsilon": 0.05, "epsilon_high": 0.28},
    "two-sided": {"delta": 1.3, "epsilon": 0.1},
    "batch scale": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": False},
    "GDPO": {"multi_objective_aggregation": "normalize_then_sum"},
    "weights": {"reward_weights": [0.3, 2.0]},
    "uncertain tokens": {"top_entropy_quantile": 0.4},
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy bonus of uncertain tokens": {"entropy_coef": 0.05, "top_entropy_quantile": 0.4},
    "adaptive entropy": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.04,
        "entropy_coef_delta": 0.03,
        "entropy_coef_max": 0.09,
        "entropy_target": 100.0,
    },
    "adaptive entropy above its target": {
        "use_adaptive_entropy": True,
        "entropy_coef": 0.04,
        "entropy_coef_delta": 0.03,
        "entropy_target": 0.01,
    },
    "adaptive entropy of uncertain tokens, accumulated": {
        "use_adaptive_entropy": True,
        "entropy_coef_delta": 0.05,
        "entropy_target": 100.0,
        "top_entropy_quantile": 0.4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": GROUP,
    },
    "without the cut ones": {"mask_truncated_completions": True},
    "temperature": {"temperature": 0.7, "beta": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 1e-4},
    "several steps a round": {"steps_per_generation": 2, "gradient_accumulation_steps": 1},
    "accumulated": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": GROUP},
    "several rounds a step": {"gradient_accumulation_steps": 2, "steps_per_generation": 1},
    "iterated": {"num_iterations": 2},
    "iterated with KL": {"num_iterations": 3, "beta": 0.05},
    "without dropout": {"disable_dropout": True},
}
OFF_POLICY = {"num_iterations": 2, "max_steps": 6, "epsilon": 0.02}
"""So that the ratio is not 1."""


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """Completions that follow from the prompt and the completion's place in its group."""
    words = trainer.processing_class
    prompt_ids, completion_ids, seen = [], [], {}
    for prompt in prompts:
        place = seen[repr(prompt)] = seen.get(repr(prompt), -1) + 1
        if isinstance(prompt, str):
            ids = words(prompt)["input_ids"]
        else:
            ids = words.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=True)[
                "input_ids"
            ]
        length = 3 + (sum(ids) + 5 * place) % 9
        said = [5 + (sum(ids) + 31 * place + 17 * j * j) % 200 for j in range(length)]
        prompt_ids.append(list(ids))
        completion_ids.append(said + ([words.eos_token_id] if (sum(ids) + place) % 3 else []))
    logps = [[-1.0] * len(ids) for ids in completion_ids]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": logps, "seen": [1] * len(prompts)}


def length_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [(sum(ids) % 7) / 7 for ids in completion_ids]


def answer_reward(completions: list[Any], ground_truth: list[str], start: list[int], **_: Any) -> list[float | None]:
    return [None if one == 3 else (len(truth) + one + i) % 3 - 1.0 for i, (one, truth) in
            enumerate(zip(start, ground_truth, strict=True))]  # fmt: skip


def given(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"reward_funcs": [length_reward, answer_reward], "rollout_func": rollout, **more}


@pytest.fixture(autouse=True)
def _dealt_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL shuffles a round's completions by the global generator; here it takes our order."""
    from trl.trainer import grpo_trainer

    rounds_done = iter(range(1000))

    def in_our_order(batch: dict[str, Any]) -> dict[str, Any]:
        size = len(batch["advantages"])
        number = next(rounds_done)
        order = Rounds(6, 1, _dealt_alike.batches, 1, 1, 42).deal(number, size)  # type: ignore[attr-defined]
        return {
            name: value[order] if torch.is_tensor(value) and value.dim() else value for name, value in batch.items()
        }

    _dealt_alike.batches = 1  # type: ignore[attr-defined]
    monkeypatch.setattr(grpo_trainer, "shuffle_sequence_dict", in_our_order)


def both(folder: Path, rows: Rows = PROMPTS, **settings: Any) -> tuple[Trained, Trained]:
    settings = {"given": given(), **SETTINGS, **settings}
    _dealt_alike.batches = settings.get(  # type: ignore[attr-defined]
        "steps_per_generation", settings.get("gradient_accumulation_steps", 1)
    )
    family = settings.get("model", "llama")
    theirs = dict(settings)
    if settings.get("beta") and "peft_config" not in settings["given"]():
        theirs["model"] = _saved(folder, family)  # TRL loads the reference by the model's path
    return train(posttrain, folder, rows, **settings), train(trl, folder, rows, **theirs)


def _saved(folder: Path, family: str) -> Callable[[int], Any]:
    from transformers import AutoModelForCausalLM

    from tests.tiny_models import tiny_model

    def make(vocabulary: int) -> Any:
        tiny_model(family, vocabulary).save_pretrained(folder / "start")
        return AutoModelForCausalLM.from_pretrained(folder / "start", dtype=torch.float32)

    return make


NOT_OURS = ("step_time",)
MEANS_OF_MEANS = ("entropy", "kl", "rewards/answer_reward/mean", "clip_ratio/", "cispo_clip_ratio", "policy_loss")
"""Over several batches TRL averages what each says, we what all their tokens say."""


TIMES = {"luspo": 12}
"""What a loss multiplies advantages with: lengths."""


def check(ours: Trained, theirs: Trained, leaving_out: tuple[str, ...] = (), times: float = 1) -> None:
    """Loss and gradient norm of every step, and what is said of rewards and lengths. A loss may be next to nothing: the
    advantages of a group, each `times` its ratio, cancel out."""
    assert len(ours.numbers) == len(theirs.numbers) > 0
    for mine, other in zip(ours.numbers, theirs.numbers, strict=True):
        assert mine == pytest.approx(other, rel=2e-5, abs=times * 3e-7)
    for mine, other in zip(ours.history, theirs.history, strict=True):
        for name, value in other.items():
            if not name.startswith((*NOT_OURS, *leaving_out, "loss", "grad_norm", "train_loss")):
                assert mine.get(name) == pytest.approx(value, rel=1e-5, abs=3e-7), name
    assert any(value > 1e-4 for value in ours.numbers[1::2]), "nothing was learned"


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str, tmp_path: Path) -> None:
    check(*both(tmp_path, loss_type=loss), times=TIMES.get(loss, 1))


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_off_policy(loss: str, tmp_path: Path) -> None:
    check(*both(tmp_path, loss_type=loss, **OFF_POLICY), times=TIMES.get(loss, 1))


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, tmp_path: Path) -> None:
    several = "accumulation" in str(OPTIONS[option])
    check(*both(tmp_path, **OPTIONS[option]), MEANS_OF_MEANS if several else ())


@pytest.mark.parametrize("deal", ["several steps a round", "several rounds a step"])
@pytest.mark.parametrize("loss", ["dapo", "cispo", "vespo"])
@pytest.mark.parametrize("option", ["uncertain tokens", "entropy bonus"])
def test_means_over_tokens_in_whole_batches(option: str, loss: str, deal: str, tmp_path: Path) -> None:
    """Divided by the tokens of a mean batch of the round; the bonus is a mean of each batch."""
    check(*both(tmp_path, loss_type=loss, **OPTIONS[option], **OPTIONS[deal]), MEANS_OF_MEANS)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "lfm2"])
def test_other_families(family: str, tmp_path: Path) -> None:
    check(*both(tmp_path, model=family, beta=0.1, num_iterations=2))


def test_messages(tmp_path: Path) -> None:
    check(*both(tmp_path, CHATS), ("entropy",))  # a group without signal is not computed here


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}], ids=["once", "twice"])
def test_an_adapter_and_the_model_without_it(settings: dict[str, Any], tmp_path: Path) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=True)
    check(*both(tmp_path, given=given(peft_config=adapter), beta=0.2, **settings))


def test_masks_of_what_others_wrote(tmp_path: Path) -> None:
    def with_mask(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        made = rollout(prompts, trainer)
        made["env_mask"] = [[int(i % 3 != 1) for i in range(len(ids))] for ids in made["completion_ids"]]
        return made

    check(*both(tmp_path, given=given(rollout_func=with_mask), beta=0.1))
