"""`posttrain train` with GRPO, RLOO and PPO: rewards from a file, and what a configuration may say of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.runner.config import load_config
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

CONFIG = """
method: METHOD
model: {name: model, max_seq_length: 64}
dataset: {path: prompts.jsonl, columns: {question: prompt}}
rewards: REWARDS
lora: {r: 4, target_modules: all-linear}
training: {max_steps: 2, num_generations: 4, per_device_train_batch_size: 8, max_completion_length: 8, bf16: false,
           use_cpu: true, logging_steps: 1, report_to: none, output_dir: out, beta: 0.1}
save: {lora_path: adapter}
"""
REWARDS = """
def short(completions, **_):
    return [-len(one) / 10 for one in completions]


def broken(completions, **_):
    return [1 / len(one) for one in completions]


def vowels(completions, answer, **_):
    return [sum(c in "aeiou" for c in one) / 10 for one in completions]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    words = chatml_tokenizer()
    tiny_model("llama", len(words)).save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    rows = [{"question": f"Say {i}", "answer": str(i)} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def write(folder: Path, method: str, rewards: str, **changes: str) -> Path:
    text = CONFIG.replace("METHOD", method).replace("REWARDS", rewards)
    for old, new in changes.items():
        text = text.replace(old, new)
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_it_trains(method: str, folder: Path) -> None:
    rewards = "[{function: 'rewards.py:vowels', weight: 2.0}, {function: 'rewards.py:short'}]"
    assert main(["train", str(write(folder, method, rewards)), "--quiet"]) == 0
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    lines = [json.loads(line) for line in (folder / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    assert set(lines[0]["rewards"]) == {"vowels", "short"}
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    first = state["log_history"][0]
    expected = 2 * first["rewards/vowels/mean"] + first["rewards/short/mean"]
    assert first["reward"] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ("null", "rewards is missing"),
        ("[{function: rewards.py}]", "has 3 functions: short, broken, vowels\n  = rewards.py:NAME says which\n"),
        ("[{function: 'rewards.py:nope'}]", "has no function 'nope'"),
        ("[{function: 'nowhere.py:short'}]", "there is no file"),
        ("[{function: 'rewards.py:short', wieght: 2}]", "rewards.0.wieght is not a known key"),
    ],
)
def test_rewards_that_are_not_there(
    rewards: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(write(folder, "grpo", rewards)), "--quiet"]) == 2
    assert message in capsys.readouterr().err


def test_a_reward_is_tried_before_anything_is_sampled(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(write(folder, "grpo", "[{function: 'rewards.py:broken'}]")), "--quiet"]) == 1
    assert "tried before training, empty: reward function 'broken' failed: ZeroDivision" in capsys.readouterr().err
    assert not (folder / "out" / "samples.jsonl").exists()


def test_settings_that_say_too_much(folder: Path) -> None:
    with pytest.raises(ConfigError, match="rewards is not honoured with method sft"):
        load_config(write(folder, "sft", "[{function: 'rewards.py:short'}]"))


def test_the_longest_sequence_is_a_prompt_and_a_completion(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewards = "[{function: 'rewards.py:short'}]"
    assert main(["train", str(write(folder, "grpo", rewards)), "--set", "model.max_seq_length=8", "--quiet"]) == 2
    assert "leaves no room for a prompt" in capsys.readouterr().err


def test_from_pairs_to_a_reward_model_to_ppo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What recipes/ppo.yaml does: refused without the record, and started with it."""
    pairs = [{"prompt": f"Say {i}", "chosen": f"It is {i}.", "rejected": "Who knows?"} for i in range(70)]
    for name, rows in (("pairs", pairs[:10]), ("held_out", pairs[10:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.yaml").write_text(
        "method: reward\nmodel: {name: model}\ndataset: {path: pairs.jsonl}\nlora: {r: 4, target_modules: all-linear}\n"
        "training: {max_steps: 8, bf16: false, use_cpu: true, output_dir: reward_out, save_strategy: 'no', "
        "learning_rate: 3e-3}\nsave: {lora_path: reward}\n"
    )
    assert main(["train", str(folder / "reward.yaml"), "--quiet"]) == 0
    config = write(folder, "ppo", "[{function: reward}]", **{
        "max_completion_length: 8": "response_length: 8", "beta: 0.1": "kl_coef: 0.1", "num_generations: 4, ": "",
        "per_device_train_batch_size: 8": "per_device_train_batch_size: 3, num_mini_batches: 2, num_ppo_epochs: 1",
    })  # fmt: skip
    assert main(["train", str(config), "--quiet"]) == 2
    refusal = capsys.readouterr().err
    command = f"posttrain eval --reward-model {folder / 'reward'} --data"
    assert command in refusal
    assert main([*command.split()[1:], str(folder / "held_out.jsonl"), "--quiet"]) == 0
    assert main(["train", str(config), "--quiet"]) == 0
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (folder / "adapter" / "value_head.safetensors").is_file()
    lines = (folder / "out" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 6
    capsys.readouterr()
    assert main(["train", str(config), "--set", "model.max_seq_length=8", "--set", "training.output_dir=o", "-q"]) == 2
    assert "training.response_length=8 leaves no room for a prompt" in capsys.readouterr().err
