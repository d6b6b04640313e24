"""What PPO asks before it starts: a reward model that held-out pairs speak for, a KL coefficient or a reason for none,
and settings that it honours."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel

import posttrain
from posttrain.cli import main
from posttrain.evaluate.learned import NAME as LEARNED
from posttrain.evaluate.learned import read_learned
from posttrain.evaluate.validation import NAME, Validation, hash_of_weights
from posttrain.models.scoring import as_classifier
from posttrain.rewards.functions import RewardError
from posttrain.trainers.ppo_config import PPOConfig
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

QUIET: dict[str, Any] = {
    "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
}  # fmt: skip
PROMPTS = [{"prompt": [{"role": "user", "content": f"What is {i}?"}]} for i in range(8)]


def pair(i: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"What is {i}?"}],
        "chosen": [{"role": "assistant", "content": f"{i} is a number."}],
        "rejected": [{"role": "assistant", "content": "Who knows."}],
    }


PAIRS = [pair(i) for i in range(16)]
HELD_OUT = [pair(i) for i in range(100, 160)]


def trained(folder: Path, adapter: bool = False, **settings: Any) -> posttrain.RewardTrainer:
    words = chatml_tokenizer()
    trainer = posttrain.RewardTrainer(
        tiny_model("llama", len(words)),
        posttrain.RewardConfig(str(folder), learning_rate=1e-3, max_steps=4, **{**QUIET, **settings}),
        train_dataset=PAIRS,
        eval_dataset=HELD_OUT,
        processing_class=words,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model without a record."""
    folder = tmp_path_factory.mktemp("reward")
    trained(folder).save_model()
    return folder


@pytest.fixture
def reward(saved: Path) -> Any:
    yield saved
    (saved / NAME).unlink(missing_ok=True)


def ppo(folder: Path, reward_model: Any, **settings: Any) -> posttrain.PPOTrainer:
    words = chatml_tokenizer()
    options = {"response_length": 4, "max_steps": 1, "learning_rate": 1e-3, **QUIET, **settings}
    return posttrain.PPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_model=reward_model,
        args=PPOConfig(str(folder), **options),
        train_dataset=PROMPTS,
        processing_class=words,
    )


def write_pairs(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- the record -------------------------------------------------------------------------------------------------------


def test_no_record(reward: Path, tmp_path: Path) -> None:
    with pytest.raises(posttrain.ConfigError) as caught:
        ppo(tmp_path, str(reward))
    assert caught.value.message == (
        f"{reward} has no validation record (there is no {reward / NAME}): PPO finds whatever is wrong with a reward"
    )
    assert caught.value.hint == (
        f"posttrain eval --reward-model {reward} --data PAIRS.jsonl writes one, of held-out pairs"
    )


def test_the_command_writes_one(reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path / "held_out.jsonl", HELD_OUT)
    assert main(["eval", "--reward-model", str(reward), "--data", data, "-q"]) == 0
    said = capsys.readouterr().out
    assert f"{reward}: the better answer scores higher in 100.0% of 60 pairs (95 % interval 94.0% to 100.0%)" in said
    record = json.loads((reward / NAME).read_text())
    assert record.keys() == {"schema_version", "accuracy", "n", "data", "weights", "date"}
    assert (record["schema_version"], record["accuracy"], record["n"]) == (1, 1.0, 60)
    trainer = ppo(tmp_path / "ppo", str(reward))
    trainer.train()
    assert trainer.state.global_step == 1
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    assert ppo(tmp_path / "given", model).reward_funcs[0].tokenizer.chat_template is not None
    assert ppo(tmp_path / "path", None, reward_model_path=str(reward)).reward_funcs

    elsewhere = tmp_path / "record.json"
    capsys.readouterr()
    assert main(["eval", "--reward-model", str(reward), "--data", data, "--out", str(elsewhere), "--json", "-q"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 1.0
    (reward / NAME).unlink()
    ppo(tmp_path / "elsewhere", str(reward), reward_validation=str(elsewhere))


def test_a_command_without_a_place_or_a_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_pairs(tmp_path / "held_out.jsonl", HELD_OUT)
    assert main(["eval", "--reward-model", "someone/reward", "--data", data]) == 2
    assert "is no folder: the record has no place beside its weights" in capsys.readouterr().err
    tiny_model("llama").save_pretrained(tmp_path / "causal")
    assert main(["eval", "--reward-model", str(tmp_path / "causal"), "--data", data]) == 2
    assert "is no reward model: it has no score" in capsys.readouterr().err


def test_an_adapter_with_its_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = chatml_tokenizer()
    tiny_model("llama", len(words)).save_pretrained(tmp_path / "base")
    args = posttrain.RewardConfig(str(tmp_path / "out"), learning_rate=1e-3, max_steps=4, **QUIET)
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = posttrain.RewardTrainer(str(tmp_path / "base"), args, train_dataset=PAIRS, eval_dataset=HELD_OUT,
                                      processing_class=words, peft_config=lora)  # fmt: skip
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    ppo(tmp_path / "ppo", str(tmp_path / "out"))
    written = (tmp_path / "out" / NAME).read_text()
    data = write_pairs(tmp_path / "held_out.jsonl", HELD_OUT)
    assert main(["eval", "--reward-model", str(tmp_path / "out"), "--data", data, "-q"]) == 0
    again = json.loads((tmp_path / "out" / NAME).read_text())
    assert {**json.loads(written), "date": again["date"]} == again
    ppo(tmp_path / "ppo", str(tmp_path / "out"))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
def test_evaluating_writes_one(adapter: bool, tmp_path: Path) -> None:
    """Beside what was saved before or is saved after; of weights that moved on there is none."""
    trainer = trained(tmp_path / "out", adapter)
    trainer.save_model(str(tmp_path / "before"))
    assert not (tmp_path / "before" / NAME).exists()
    trainer.evaluate()
    trainer.save_model(str(tmp_path / "after"))
    for name in ("before", "after"):
        found = Validation.read(tmp_path / name / NAME)
        assert (found.accuracy, found.n) == (1.0, 60)
        assert found.weights == hash_of_weights(trainer.model)
    trainer.train()
    trainer.save_model(str(tmp_path / "moved"))
    assert not (tmp_path / "moved" / NAME).exists()


def test_checkpoints_have_theirs(tmp_path: Path) -> None:
    trained(tmp_path, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2)
    found = [Validation.read(tmp_path / f"checkpoint-{step}" / NAME) for step in (2, 4)]
    assert found[0].weights != found[1].weights
    assert found[0].data == found[1].data


def test_pairs_that_were_trained_on_say_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = trained(tmp_path)
    trainer.evaluate(PAIRS)
    assert trainer.validation is None
    assert "all of these pairs were trained on" in caplog.text
    trainer.evaluate([*PAIRS, *HELD_OUT[:7]])
    assert trainer.validation is not None
    assert trainer.validation.n == 7


def test_a_saved_model_says_what_it_was_trained_on(
    reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_pairs(tmp_path / "trained.jsonl", [{**one, "margin": 1.0} for one in PAIRS])
    assert main(["eval", "--reward-model", str(reward), "--data", data, "-q"]) == 3
    assert f"{reward} was trained on all 16 pairs of {data}" in capsys.readouterr().err
    assert not (reward / NAME).exists()
    data = write_pairs(tmp_path / "some.jsonl", [*PAIRS, *HELD_OUT[:5], *[HELD_OUT[5]] * 40])
    assert main(["eval", "--reward-model", str(reward), "--data", data, "-q"]) == 0
    assert "55 of 61 pairs are left out: the model was trained on them, or they are repeated" in capsys.readouterr().err
    assert Validation.read(reward / NAME).n == 6
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / LEARNED).write_text('{"schema_version": 1')
    with pytest.raises(posttrain.ConfigError, match="cannot be read"):
        read_learned(tmp_path / "torn")


def test_a_model_that_does_not_say_is_warned_of(
    reward: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(reward, tmp_path / "copy", ignore=shutil.ignore_patterns(LEARNED))
    data = write_pairs(tmp_path / "held_out.jsonl", HELD_OUT)
    assert main(["eval", "--reward-model", str(tmp_path / "copy"), "--data", data, "-q"]) == 0
    assert "does not say which pairs it was trained on" in capsys.readouterr().err


def test_what_was_learned_before_stays_learned(reward: Path, tmp_path: Path) -> None:
    """Trained on from a folder, and in checkpoints."""
    args = posttrain.RewardConfig(str(tmp_path), max_steps=1, **{**QUIET, "save_strategy": "steps", "save_steps": 1})
    trainer = posttrain.RewardTrainer(str(reward), args, train_dataset=HELD_OUT[:4], eval_dataset=[*PAIRS, *HELD_OUT])
    trainer.train()
    trainer.evaluate()
    assert trainer.validation is not None
    assert trainer.validation.n == 56
    assert len(read_learned(tmp_path / "checkpoint-1") or ()) == 20


def test_a_record_that_does_not_hold(reward: Path, tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(reward)
    weights = hash_of_weights(model)
    assert hash_of_weights(model.to(torch.bfloat16)) == weights
    cases: list[tuple[Validation, str]] = [
        (Validation(0.9, 200, "d", "another", "2026-01-01"), "is of other weights than"),
        (Validation(0.9, 20, "d", weights, "2026-01-01"), "rests on 20 held-out pairs, fewer than "
         "reward_validation_pairs=50"),
        (Validation(0.55, 200, "d", weights, "2026-01-01"), "prefers the better of two held-out answers in 55.0% of "
         "200 pairs, less than reward_validation_accuracy=0.6"),
        (Validation(0.9, 200, "d", weights, "2026-01-01", schema_version=9), "is no validation record of schema 1"),
    ]  # fmt: skip
    for record, message in cases:
        record.write(reward / NAME)
        with pytest.raises(posttrain.ConfigError, match=re.escape(message)):
            ppo(tmp_path, str(reward))
    (reward / NAME).write_text("{")
    with pytest.raises(posttrain.ConfigError, match="cannot be read"):
        ppo(tmp_path, str(reward))
    cases[1][0].write(reward / NAME)
    ppo(tmp_path, str(reward), reward_validation_pairs=20)


def test_a_function_needs_none(tmp_path: Path) -> None:
    ppo(tmp_path, lambda completions, **_: [0.0] * len(completions))


# --- the KL coefficient, and what is refused --------------------------------------------------------------------------


def test_no_kl_without_a_reason(tmp_path: Path) -> None:
    with pytest.raises(posttrain.ConfigError) as caught:
        PPOConfig(str(tmp_path), kl_coef=0.0)
    assert caught.value.message.startswith("kl_coef=0: nothing holds the policy to where it started")
    assert caught.value.hint == "set kl_coef (0.05 is usual), or say why not: no_kl_reason='...'"
    PPOConfig(str(tmp_path), kl_coef=0.0, no_kl_reason="the reward is a proof checker")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 64}, "batch_size=64 is not honoured: set per_device_train_batch_size"),
        ({"target_kl": 0.1}, "target_kl=0.1 is not honoured"),
        ({"stop_token_id": 5}, "stop_token_id=5 is not honoured"),
        ({"stop_token": "period"}, "stop_token='period' is not honoured"),
        ({"kl_estimator": "k2"}, "kl_estimator='k2' is not known"),
        ({"num_ppo_epochs": 0}, "num_ppo_epochs=0 must be at least 1"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be at least 0"),
        ({"total_episodes": 16, "max_steps": 3}, "total_episodes=16 makes 8 steps, and max_steps=3 contradicts it"),
        ({"missing_eos_penalty": 1.0, "mask_truncated_completions": True}, "missing_eos_penalty teaches from"),
        ({"adap_kl_ctrl": True, "kl_coef": 0.0, "no_kl_reason": "none"}, "kl_coef=0.0 must be above 0"),
        ({"max_length": 512}, "max_length=512 is not honoured"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(posttrain.ConfigError, match=re.escape(message)):
        PPOConfig(str(tmp_path), **settings)


def test_older_spellings(tmp_path: Path) -> None:
    args = PPOConfig(
        str(tmp_path), init_kl_coef=0.2, ppo_epochs=3, max_completion_length=9, epsilon=0.1, batch_size=None
    )
    assert (args.kl_coef, args.num_ppo_epochs, args.response_length, args.cliprange) == (0.2, 3, 9, 0.1)
    assert (args.beta, args.num_iterations, args.max_completion_length, args.epsilon_high) == (0.2, 3, 9, 0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"data_collator": len}, "data_collator is not honoured"),
        ({"reward_model": None}, "reward_model is needed"),
        ({"ref_model": "other"}, "ref_model must be a model, got str"),
        ({"ref_model": "model"}, "ref_model has layers of the model that is trained"),
        ({"ref_model": lambda: tiny_model("llama", 50)}, "ref_model knows 50 tokens, the policy says"),
        ({"ref_model": lambda: as_classifier(tiny_model("llama"))}, "which gives tokens no probabilities"),
        ({"ref_model": lambda: few_places()}, "that is more than the model's 9 places"),
        ({"ref_model": lambda: tiny_model("qwen2", len(chatml_tokenizer())), "sync_ref_model": True}, "sync_ref_model"),
    ],
)
def test_arguments_that_are_refused(given: dict[str, Any], message: str, tmp_path: Path) -> None:
    words = chatml_tokenizer()
    model = tiny_model("llama", len(words))
    given = {name: model if value == "model" else value() if callable(value) and value is not len else value
             for name, value in given.items()}  # fmt: skip
    args = PPOConfig(str(tmp_path), sync_ref_model=given.pop("sync_ref_model", False), **QUIET)
    options = {"reward_model": lambda completions, **_: [0.0] * len(completions), **given}
    with pytest.raises(posttrain.ConfigError, match=message):
        posttrain.PPOTrainer(args, words, model, train_dataset=PROMPTS, **options)


def few_places() -> GPT2LMHeadModel:
    config = GPT2Config(vocab_size=len(chatml_tokenizer()), n_embd=32, n_layer=1, n_head=4, n_positions=9)
    return GPT2LMHeadModel(config)


def test_a_completion_without_a_score(tmp_path: Path) -> None:
    trainer = ppo(tmp_path, lambda completions, **_: [None] * len(completions))
    with pytest.raises(RewardError, match="no reward says anything of 8 of 8 completions"):
        trainer.train()
