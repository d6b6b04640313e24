"""Reward functions that do what none should, in the middle of a run: each ends it by name and in time, and what was
trained until then is saved and can be gone on with. (What the sandboxed code reward is up against stands in
tests/unit/rewards/test_escapes.py, the bombs of mathematics in test_equivalence.py.)
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch

import posttrain
from posttrain.rewards.functions import Completions, RewardError, Rewards
from posttrain.rollout.samplers import FunctionSampler, RolloutError
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS = [{"prompt": [{"role": "user", "content": f"Say {i}"}], "answer": str(i)} for i in range(7)]
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "max_completion_length": 6,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "reward_timeout": 1.0,
}


def sleeps(count: int) -> Any:
    time.sleep(60)


def computes(count: int) -> Any:
    """A regular expression that lets no other thread come to its turn."""
    return [float(re.match(r"(a+)+$", "a" * 40 + "!") is not None)] * count


def swallows(count: int) -> Any:
    while True:
        with suppress(Exception):  # whatever it is
            time.sleep(60)


def tries_again(count: int) -> Any:
    while True:
        try:
            time.sleep(60)
        except:  # noqa: E722
            time.sleep(5)


def swallows_once(count: int) -> Any:
    """And then says what it should."""
    try:
        time.sleep(60)
    except:  # noqa: E722
        return [1.0] * count


def waits_for_threads(count: int) -> Any:
    """A pool waits for its threads as it ends, whatever ended it."""
    with ThreadPoolExecutor() as several:
        return list(several.map(lambda _: time.sleep(12), range(count)))


def a_number(count: int) -> Any:
    return torch.tensor(1.0)


def in_no_order(count: int) -> Any:
    return {float(i) for i in range(count)}


def raises(count: int) -> Any:
    raise KeyError("answer")


def exits(count: int) -> Any:
    sys.exit(0)


def gives_up(count: int) -> Any:
    raise asyncio.CancelledError("no time")


def leaves_without(count: int) -> Any:
    return [float("nan")] * count


def infinite(count: int) -> Any:
    return [1.0] * (count - 1) + [float("inf")]


def too_few(count: int) -> Any:
    return [1.0] * (count - 1)


def text(count: int) -> Any:
    return "1" * count


def texts(count: int) -> Any:
    return ["1.0"] * count


def nothing(count: int) -> Any:
    return None


def tensors_of_two(count: int) -> Any:
    return torch.ones(count, 2)


def a_table(count: int) -> Any:
    """As many rows as completions; going through it gives the names of its columns."""
    return pandas.DataFrame({"reward": [1.0] * count})


def a_table_as_wide_as_long(count: int) -> Any:
    return pandas.DataFrame([[1.0] * count] * count, columns=[f"c{i}" for i in range(count)])


class Odd:
    """Every way to look at it fails."""

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __repr__(self) -> str:
        raise RuntimeError("no name")

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        raise RuntimeError("no entries")


class Silent(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def odd(count: int) -> Any:
    return Odd()


def odd_ones(count: int) -> Any:
    return [Odd()] * count


def never_ends(count: int) -> Any:
    class Endless(list[float]):
        def __iter__(self) -> Any:
            return itertools.repeat(1.0)

    return Endless([1.0] * count)


def says_nothing_of_why(count: int) -> Any:
    raise Silent


def huge(count: int) -> Any:
    return [1.0] * (count - 1) + [1e200]


def huge_whole(count: int) -> Any:
    return [10**400] * count


def huge_beyond_writing(count: int) -> Any:
    return [10**5000] * count


class FewLooks(list[float]):
    """It can say how long it is but once."""

    looks = 0

    def __len__(self) -> int:
        self.looks += 1
        if self.looks > 1:
            raise RuntimeError("no more")
        return super().__len__()


def few_looks(count: int) -> Any:
    return FewLooks([1.0] * (count + 2))


SAYS = {
    huge_beyond_writing: "reward function 'bad' gave a number of type int for completion 0: ",
    few_looks: "reward function 'bad' gave 6 rewards for 4 completions",
    a_table: "reward function 'bad' gave 1 rewards for 4 completions",
    a_table_as_wide_as_long: "reward function 'bad' gave 'c0' for completion 0: ",
    odd: "reward function 'bad' gave Odd, not a list of numbers",
    odd_ones: "reward function 'bad' gave <Odd instance at 0x",
    never_ends: "reward function 'bad' gave 5 rewards for 4 completions",
    says_nothing_of_why: "reward function 'bad' failed: Silent: (and it cannot say why)",
    huge: "reward function 'bad' gave 1e+200 for completion 3: ",
    huge_whole: "reward function 'bad' gave 100000000000000000...0000000000000000000 for completion 0: ",
    sleeps: "reward function 'bad' has not answered within 1 s",
    computes: "reward function 'bad' has not answered within 1 s",
    swallows: "reward function 'bad' has not answered within 1 s",
    tries_again: "reward function 'bad' has not answered within 1 s",
    swallows_once: "reward function 'bad' has not answered within 1 s",
    waits_for_threads: "reward function 'bad' has not answered within 1 s",
    a_number: "reward function 'bad' gave Tensor, not a list of numbers",
    in_no_order: "reward function 'bad' gave set, not a list of numbers",
    raises: "reward function 'bad' failed: KeyError: 'answer'",
    exits: "reward function 'bad' failed: SystemExit: 0",
    gives_up: "reward function 'bad' failed: CancelledError: no time",
    leaves_without: "reward function 'bad' gave nan for completion 0: ",
    infinite: "reward function 'bad' gave inf for completion 3: ",
    too_few: "reward function 'bad' gave 3 rewards for 4 completions",
    text: "reward function 'bad' gave str, not a list of numbers",
    texts: "reward function 'bad' gave '1.0' for completion 0: ",
    nothing: "reward function 'bad' gave NoneType, not a list of numbers",
    tensors_of_two: "reward function 'bad' gave tensor([1., 1.]) for completion 0: ",
}


def make(folder: Path, does: Any, after: int, **settings: Any) -> tuple[posttrain.GRPOTrainer, list[int]]:
    """A run whose reward does what it should for so many rounds."""
    words, rounds = chatml_tokenizer(), [0]

    def bad(completions: list[Any], **_: Any) -> Any:
        rounds[0] += 1
        if rounds[0] > after:
            return does(len(completions))
        return [float(len(one[0]["content"])) for one in completions]

    trainer = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_funcs=bad,
        args=posttrain.GRPOConfig(str(folder), **{**SETTINGS, "reward_check": False, **settings}),
        train_dataset=ROWS,
        processing_class=words,
    )
    return trainer, rounds


@pytest.mark.parametrize("does", SAYS, ids=lambda does: does.__name__)
def test_named_bounded_and_nothing_lost(does: Any, tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, does, after=2)
    started = time.monotonic()
    with pytest.raises(RewardError) as caught:
        trainer.train()
    assert time.monotonic() - started < 30
    assert caught.value.message.startswith(SAYS[does])
    assert caught.value.__notes__ == [f"Everything up to step 2 is saved: {tmp_path / 'checkpoint-2'}"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]
    whole, _ = make(tmp_path / "whole", does, after=4)
    whole.train()
    resumed, rounds = make(tmp_path, does, after=2)
    resumed.train(resume_from_checkpoint=True)
    assert rounds == [2]
    for mine, other in zip(resumed.model.state_dict().values(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("does", SAYS, ids=lambda does: does.__name__)
def test_found_before_the_first_step(does: Any, tmp_path: Path) -> None:
    trainer, rounds = make(tmp_path, does, after=0, reward_check=True)
    with pytest.raises(RewardError) as caught:
        trainer.train()
    assert caught.value.code == "E-REWARD-0003"
    assert caught.value.message.startswith("tried before training, right answers as it is: reward function 'bad' ")
    assert rounds == [1]
    assert not list(tmp_path.glob("checkpoint-*"))


def test_one_that_forks_trains_once(tmp_path: Path) -> None:
    """The child that comes back from the function must not train, save and log a second time."""
    children: list[int] = []

    def forks(count: int) -> Any:
        if (pid := os.fork()) > 0:
            children.append(pid)
        return [1.0, 2.0] * (count // 2)

    trainer, _ = make(tmp_path, forks, after=0)
    trainer.train()
    assert len(children) == 4
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [1] * 4
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4 * 4


def test_one_that_prints_without_end_is_ended(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def prints(count: int) -> Any:
        while True:
            os.write(1, b"x" * 1000)
            time.sleep(0.001)

    trainer, _ = make(tmp_path, prints, after=1)
    with pytest.raises(RewardError, match="has not answered within 1 s"):
        trainer.train()
    assert len(capfd.readouterr().out) < 10_000_000


def test_a_coroutine_that_lets_no_other_run() -> None:
    async def stuck(completions: list[str], **_: Any) -> list[float]:
        time.sleep(60)
        return [1.0] * len(completions)

    async def fine(completions: list[str], **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(completions)

    started = time.monotonic()
    with pytest.raises(RewardError, match=r"reward function 'stuck' has not answered within 0\.5 s") as caught:
        Rewards({"fine": fine, "stuck": stuck}, [1.0, 1.0], deadline=0.5)(Completions(["p"], ["c"], [[1]], {}))
    assert caught.value.code == "E-REWARD-0002"
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("does", [raises, exits, gives_up])
def test_a_coroutine_that_ends_otherwise(does: Any) -> None:
    async def bad(completions: list[str], **_: Any) -> Any:
        await asyncio.sleep(0)
        return does(len(completions))

    async def patient(completions: list[str], **_: Any) -> Any:
        await asyncio.sleep(60)

    with pytest.raises(RewardError) as caught:
        Rewards({"patient": patient, "bad": bad}, [1.0, 1.0])(Completions(["p"], ["c"], [[1]], {}))
    assert caught.value.message == SAYS[does]


def test_a_rollout_func_that_ends_the_process(tmp_path: Path) -> None:
    trainer, _ = make(tmp_path, raises, after=9)
    sampler = FunctionSampler(lambda prompts, trainer: sys.exit(0), trainer, trainer.rollouts.prompts, frozenset(), 9)
    with pytest.raises(RolloutError, match="rollout_func failed: SystemExit: 0"):
        sampler([0], 2, 0, lambda: False)


def test_a_rollout_func_that_hangs(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    trainer = posttrain.GRPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_funcs="numeric_answer",
        args=posttrain.GRPOConfig(str(tmp_path), **SETTINGS, rollout_timeout=0.5),
        train_dataset=ROWS,
        processing_class=words,
        rollout_func=lambda prompts, trainer: time.sleep(60),  # type: ignore[arg-type]
    )
    started = time.monotonic()
    with pytest.raises(RolloutError, match=r"rollout_func has not answered within 0\.5 s"):
        trainer.train()
    assert time.monotonic() - started < 30


def test_the_trial_changes_no_random_state(tmp_path: Path) -> None:
    """Nor what is trained: with and without it the run is the same, though the function draws numbers."""
    import random

    import numpy as np

    made = []
    for check in (True, False):
        words = chatml_tokenizer()

        def draws(completions: list[Any], **_: Any) -> list[float]:
            random.random(), np.random.rand(), torch.rand(3)
            return [float(len(one[0]["content"])) for one in completions]

        trainer = posttrain.GRPOTrainer(
            model=tiny_model("llama", len(words)),
            reward_funcs=[draws, "numeric_answer"],
            args=posttrain.GRPOConfig(str(tmp_path / str(check)), **{**SETTINGS, "reward_check": check}),
            train_dataset=ROWS,
            processing_class=words,
        )
        trainer.train()
        drawn = (random.random(), float(np.random.rand()), float(torch.rand(1)))
        made.append((trainer.model.state_dict(), drawn, [entry.get("loss") for entry in trainer.state.log_history]))
    assert made[0][1:] == made[1][1:]
    assert all(torch.equal(one, made[1][0][name]) for name, one in made[0][0].items())


def test_a_blind_reward_is_said_and_a_name_is_known(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("posttrain"), "propagate", True)
    trainer, _ = make(tmp_path, lambda count: [0.5] * count, after=0, reward_check=True, max_steps=1)
    with caplog.at_level("WARNING", logger="posttrain"):
        trainer.train()
    assert (
        "reward   tried before training: it does not tell right from wrong: a row's own answer is worth 0.5"
        in caplog.text
    )
    with pytest.raises(posttrain.ConfigError) as caught:
        posttrain.GRPOTrainer(model=trainer.model, reward_funcs="numeric_answers", train_dataset=ROWS,
                              args=trainer.args, processing_class=trainer.tokenizer)  # fmt: skip
    assert "known by name: exact_match, numeric_answer, math_answer" in (caught.value.hint or "")
