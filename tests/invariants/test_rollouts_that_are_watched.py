"""What a run that samples says of itself, and what its log of completions survives."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain
from posttrain import ConfigError
from posttrain.objectives.policy import PolicyLoss
from posttrain.rewards.functions import RewardError
from posttrain.rollout.generation import Rollout
from posttrain.rollout.scoring import Verdict
from tests.invariants.test_rollout_runs import ROWS, SETTINGS, make
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

LOGGED = ("loss", "grad_norm", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean",
          "clip_ratio/low_min", "clip_ratio/high_max")  # fmt: skip


def some_without_signal(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Every second prompt teaches nothing."""
    return [0.0 if int(a) % 2 else float(len(one[0]["content"])) for one, a in zip(completions, answer, strict=True)]


def run(folder: Path, reward: Any, rows: Any = None, method: str = "GRPO", **settings: Any) -> Any:
    words = chatml_tokenizer()
    return getattr(posttrain, f"{method}Trainer")(
        model=tiny_model("llama", len(words)), reward_funcs=reward, train_dataset=ROWS if rows is None else rows,
        args=getattr(posttrain, f"{method}Config")(str(folder), **{**SETTINGS, **settings}), processing_class=words,
    )  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"loss_type": "bnpo"}, {"importance_sampling_level": "sequence"},
                                     {"loss_type": "cispo", "epsilon_high": 0.01}], ids=str)  # fmt: skip
def test_shares_are_of_all_completions(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that teach nothing are not computed, and clipped shares are as if they were."""
    settings = {"num_iterations": 3, "epsilon": 0.01, "max_steps": 6, "save_strategy": "no", "reward_check": False,
                "per_device_train_batch_size": 16, "learning_rate": 1e-3, **options}  # fmt: skip
    lazy = run(tmp_path / "a", some_without_signal, **settings)
    lazy.train()
    monkeypatch.setattr(PolicyLoss, "skips_indifferent", property(lambda self: False))
    whole = run(tmp_path / "b", some_without_signal, **settings)
    whole.train()
    shares = [name for name in (*LOGGED, "cispo_clip_ratio") if name in whole.state.log_history[0]]
    assert len(shares) > 2
    seen = 0.0
    for mine, other in zip(lazy.state.log_history[:6], whole.state.log_history[:6], strict=True):
        for name in shares:
            assert mine[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name
        seen += other.get("clip_ratio/region_mean", other.get("cispo_clip_ratio", 0.0))
    assert seen > 0


def test_what_a_reward_logs_is_a_mean_by_any_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def noting(completions: list[Any], log_metric: Any, **_: Any) -> list[float]:
        for name in ("length", "length_max", "min_length"):
            log_metric(name, 10.0)
            log_metric(name, 20.0)
        log_metric("ratio", float("inf"))
        log_metric("ratio", float("nan"))
        return [float(len(one[0]["content"])) for one in completions]

    one = run(tmp_path, noting, max_steps=3, logging_steps=2, save_steps=1)
    one.train()
    logged = one.state.log_history[0]
    assert [logged[name] for name in ("length", "length_max", "min_length")] == [15.0] * 3
    assert caplog.text.count("log_metric('ratio', inf): an infinite value is not logged") == 1
    assert (tmp_path / "checkpoint-3").is_dir()


@pytest.mark.parametrize("function", ["log_metric", "log_extra"])
def test_what_a_reward_logs_has_a_name(function: str, tmp_path: Path) -> None:
    def noting(completions: list[Any], **own: Any) -> list[float]:
        own[function](3, 1.0)
        return [1.0] * len(completions)

    with pytest.raises(RewardError) as caught:
        run(tmp_path, noting, max_steps=1, save_strategy="no").train()
    said = f"reward function 'noting' failed: TypeError: {function}(3, ...): a name must be text"
    assert caught.value.message == said


def test_what_a_reward_logs_takes_no_name_of_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Only what the run has under that very name is called otherwise, in evaluation too."""
    taken, free = ("loss", "reward", "completions/mean_length", "cispo_clip_ratio"), ("val/acc", "completions/words")

    def noting(completions: list[Any], log_metric: Any, **_: Any) -> list[float]:
        for name in (*taken, *free):
            log_metric(name, -99.0)
        return [float(len(one[0]["content"])) for one in completions]

    one = run(tmp_path, noting, max_steps=2, logging_steps=1, save_strategy="no", loss_type="cispo", epsilon_high=5.0)
    one.train()
    for logged in one.state.log_history[:2]:
        assert [logged[f"logged/{name}"] for name in taken] == [-99.0] * 4
        assert [logged[name] for name in free] == [-99.0] * 2
        assert all(logged[name] > -50 for name in taken)
    assert caplog.text.count("log_metric('loss') is logged as 'logged/loss'") == 1
    found = one.evaluate(ROWS)
    assert (found["eval_val/acc"], found["eval_logged/reward"]) == (-99.0, -99.0)
    assert found["eval_reward"] > -50


def test_one_that_is_only_watched_rewards_nothing(tmp_path: Path) -> None:
    """What the function that counts does not judge is not worth 0 because another one was asked as well."""

    def watched(completions: list[Any], **_: Any) -> list[float]:
        return [5.0] * len(completions)

    def half(completions: list[Any], **_: Any) -> list[float | None]:
        return [None if i % 2 else -1.0 - i for i in range(len(completions))]

    settings = {"max_steps": 1, "save_strategy": "no", "reward_check": False}
    run(tmp_path, [watched, half], reward_weights=[0.0, 1.0], **settings).train()
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    unjudged = [row["advantage"] for row in rows if row["rewards"]["half"] is None]
    assert len(unjudged) == len(rows) // 2
    assert set(unjudged) == {0.0}
    assert any(row["advantage"] for row in rows)


def test_rewards_that_say_nothing_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def silent(completions: list[Any], **_: Any) -> list[None]:
        return [None] * len(completions)

    one = run(tmp_path, silent, max_steps=2, save_strategy="no", reward_check=False)
    one.train()
    assert caplog.text.count("no function says anything of any of") == 1
    one.evaluate(ROWS)  # of which nothing is learned
    assert caplog.text.count("no function says anything of any of") == 1
    with pytest.raises(ConfigError, match="leave nothing to learn from"):
        run(tmp_path, silent, reward_weights=[0.0])


def rollouts_that(ended: list[bool]) -> list[Rollout]:
    return [Rollout(0, 0, np.arange(2), np.arange(2), np.ones(2, bool), one) for one in ended]


@pytest.mark.parametrize(
    ("ended", "kept"),
    [([True] * 4, True), ([False] * 4, False), ([False, True, True, False], False), ([True, True, False, False], True)],
    ids=str,
)
def test_groups_of_which_nothing_is_left_to_train_have_no_signal(ended: list[bool], kept: bool, tmp_path: Path) -> None:
    """Masked completions count in a group's mean; the two in the middle have no advantage of their own."""
    one = run(tmp_path, some_without_signal, dynamic_sampling="replace", mask_truncated_completions=True)
    verdict = Verdict(("a",), [""] * 4, np.array([[0.0], [0.5], [0.5], [1.0]]), {}, {})
    assert one.rollouts.source._teaching(rollouts_that(ended), verdict) == (list(range(4)) if kept else [])


@pytest.mark.parametrize("torn", [b'{"step": 3, "completion": "\xc3', b'{"step": 3', b"\xff\xfe", b""])
def test_a_log_that_was_cut_off_is_taken_up(torn: bytes, tmp_path: Path) -> None:
    make(tmp_path, max_steps=3).train()
    path = tmp_path / "samples.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    make(tmp_path, max_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert path.read_bytes() == whole
    assert not list(tmp_path.glob(".samples*"))


def test_a_log_that_cannot_be_written_anew_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, max_steps=3).train()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("posttrain.rollout.log.os.replace", full)
    log = make(tmp_path, max_steps=3).rollouts.log
    with caplog.at_level(logging.WARNING, logger="posttrain"):
        log.forget_after(2)
    assert "keeps lines of steps after 2: No space left on device" in caplog.text


def test_what_json_has_no_word_for_is_written_as_text(tmp_path: Path) -> None:
    def noting(completions: list[Any], log_extra: Any, **_: Any) -> list[float]:
        log_extra("where", [{(1, 2): "a"} for _ in completions])
        return [float(len(one[0]["content"])) for one in completions]

    run(tmp_path, noting, max_steps=1).train()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert {line["extra"]["where"] for line in lines} == {"{(1, 2): 'a'}"}


def test_groups_whose_rewards_differ_one_by_one_are_kept(tmp_path: Path) -> None:
    """Two rewards that cancel out in their weighted sum teach where each is normalised by itself."""
    rewards = np.array([[0.0, 1.0], [0.0, 1.0], [3.0, 0.0], [3.0, 0.0]] + [[1.0, 1.0]] * 4)
    verdict = Verdict(("a", "b"), [""] * 8, rewards, {}, {})
    for how, expected in (("normalize_then_sum", [0, 1, 2, 3]), ("sum_then_normalize", [])):
        one = run(tmp_path, [some_without_signal, lambda completions, **_: [0.0] * len(completions)],
                  dynamic_sampling="skip", multi_objective_aggregation=how, reward_weights=[1.0, 3.0])  # fmt: skip
        ended = [Rollout(0, 0, np.arange(2), np.arange(2), np.ones(2, bool), True)] * 8
        assert one.rollouts.source._teaching(ended, verdict) == expected


def masked(**changed: Any) -> Any:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        count = len(prompts)
        said = {"prompt_ids": [[5, 6]] * count, "completion_ids": [[7, 8, 9]] * count, "logprobs": [[-1.0] * 3] * count}
        return {**said, **{name: make(count) for name, make in changed.items()}}

    return rollout


def test_what_the_mask_does_not_say_is_not_trained(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    one = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)), reward_funcs=some_without_signal, train_dataset=ROWS,
        args=posttrain.GRPOConfig(str(tmp_path), **SETTINGS), processing_class=words,
        rollout_func=masked(env_mask=lambda n: [[1, None, 0]] * n),
    )  # fmt: skip
    sampler = one.rollouts._sampler(one.rollouts.prompts, [])
    assert sampler([0], 2, 0, lambda: False)[0].supervised.tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"env_mask": lambda n: np.ones(1)}, "gave env_mask that are no list|without a row"),
        ({"env_mask": lambda n: [[1, 1, 1]] * (n - 1) + [None]}, "gave env_mask that are no list of numbers"),
        ({"env_mask": lambda n: [[[1]], *[[1, 1, 1]] * (n - 1)]}, "gave env_mask that are no list of numbers"),
        ({"completion_ids": lambda n: [None] * n}, "gave completion_ids that are no list of numbers"),
        ({"completion_ids": lambda n: [[7, 8.5, 9]] * n}, "gave completion_ids that are no whole numbers: 8.5"),
        ({"logprobs": lambda n: iter([[-1.0] * 3] * n)}, "gave logprobs as list_iterator without a row 0"),
    ],
)
def test_what_a_rollout_function_may_not_give(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    words = chatml_tokenizer()
    one = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)), reward_funcs=some_without_signal, train_dataset=ROWS,
        args=posttrain.GRPOConfig(str(tmp_path), **SETTINGS), processing_class=words, rollout_func=masked(**changed),
    )  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        one.train()
