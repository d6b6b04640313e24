"""Mathematics: what is the same and what is not, and that what never ends is ended (Math-Verify issue 65)."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import pytest

from posttrain import ConfigError
from posttrain.rewards import equivalence, math_answer, maths
from posttrain.rewards.deadline import Overdue, deadline
from posttrain.rewards.functions import Completions, Rewards

pytest.importorskip("math_verify")

TOWER = "\\boxed{\\dfrac{5^{\\left(5^{\\left(5^{\\left(5^5\\right)}\\right)} - 4\\right)} - 5}{16}}"
"""Of issue 65: Math-Verify's own limit of time does not end it."""
BOMBS = [
    TOWER,
    "\\boxed{9^{9^{9^{9}}}}",
    "\\boxed{10^{10^{10}}}",
    "\\boxed{\\sum_{n=1}^{10^{12}} n^n}",
    "\\boxed{(10^8)!}",
]


@pytest.mark.parametrize(
    ("said", "gold", "worth"),
    [
        ("\\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("It is $x^2+2x+1$.", "(x+1)^2", 1.0),
        ("The answer is 18", "9 * 2 = 18\n#### 18", 1.0),
        ("\\boxed{\\sqrt{8}}", "2\\sqrt{2}", 1.0),
        ("\\boxed{(1, 2)}", "$(1,2)$", 1.0),
        ("\\boxed{2}", "3", 0.0),
        ("\\boxed{1} \\boxed{2} \\boxed{3}", "3", 0.0),
        ("", "3", 0.0),
        ("no idea", "3", 0.0),
        ("3", None, None),
    ],
)
def test_the_same_or_not(said: str, gold: Any, worth: float | None) -> None:
    assert math_answer(completions=[said], answer=[gold]) == [worth]
    assert math_answer(completions=[[{"role": "assistant", "content": said}]], answer=[gold]) == [worth]


def test_bombs_are_bounded_by_the_deadline_and_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[str, float]] = []
    reward = maths(seconds=1.0, overdue=-0.25)
    reward(completions=["1"], answer=["1"])  # the worker is there
    monkeypatch.setattr(logging.getLogger("posttrain"), "propagate", True)
    started = time.monotonic()
    with caplog.at_level("WARNING", logger="posttrain"):
        texts = [TOWER, "\\boxed{5}"]
        made = reward(completions=texts, answer=["5", "5"], log_metric=lambda *pair: noted.append(pair))
    assert made == [-0.25, 1.0]
    assert time.monotonic() - started < 30
    assert noted == [("rewards/math_answer/overdue", 0.5)]
    assert (
        "math_answer: 1 of 2 took more than 1 s and are worth -0.25, the first '\\\\boxed{\\\\dfrac{5^" in caplog.text
    )


@pytest.mark.slow
@pytest.mark.parametrize("bomb", BOMBS)
def test_no_bomb_goes_off(bomb: str) -> None:
    started = time.monotonic()
    assert maths(seconds=1.0)(completions=[bomb, "\\boxed{7}"], answer=["7", "7"]) == [0.0, 1.0]
    assert time.monotonic() - started < 60


def test_a_round_of_bombs_ends_within_the_rounds_deadline() -> None:
    """What models write must not end a run: each gets its share of the time, and what got less is not judged."""
    reward = Rewards({"math_answer": maths(seconds=5.0)}, [1.0], deadline=24.0)
    asked = Completions(["?"] * 6, [TOWER] * 5 + ["\\boxed{5}"], [[1]] * 6, {"answer": ["5"] * 6})
    *bombs, last = reward(asked)[:, 0].tolist()
    assert bombs[0] == 0.0
    assert np.isnan(bombs[-1])
    assert last == 1.0


def test_many_easy_answers_are_all_judged() -> None:
    """A worker that has just been started needs longer than an even share."""
    equivalence.WORKER.close()
    reward = Rewards({"math_answer": maths()}, [1.0], deadline=30.0)
    texts = [f"\\boxed{{({2 * i + 1})/2}}" for i in range(200)]
    asked = Completions(["?"] * 200, texts, [[1]] * 200, {"answer": [str(i + 0.5) for i in range(200)]})
    assert reward(asked)[:, 0].tolist() == [1.0] * 200


def test_an_interrupted_question_leaves_no_answer_behind() -> None:
    """The pipe would give it to the next one."""
    math_answer(completions=["1"], answer=["1"])
    with pytest.raises(Overdue), deadline(0.5):
        equivalence._judged(TOWER, "5", 60)
    assert math_answer(completions=["1", "2"], answer=["1", "1"]) == [1.0, 0.0]


def test_a_dead_worker_is_followed_by_another() -> None:
    math_answer(completions=["1"], answer=["1"])
    child = equivalence.WORKER.child.process
    assert child is not None
    child.kill()
    child.wait()
    assert math_answer(completions=["1"], answer=["1"]) == [1.0]


def test_the_worker_has_no_environment() -> None:
    math_answer(completions=["1"], answer=["1"])
    child = equivalence.WORKER.child.process
    assert child is not None
    environment = f"/proc/{child.pid}/environ"
    if os.path.exists(environment):
        with open(environment, "rb") as file:
            assert file.read() == b""


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(equivalence.WORKER, "ask", lambda *_: {"missing": "No module named 'math_verify'"})
    with pytest.raises(ConfigError) as caught:
        math_answer(completions=["1"], answer=["1"])
    assert caught.value.hint == 'pip install "posttrain[rewards]"'


def test_its_seconds_must_be_some() -> None:
    with pytest.raises(ConfigError, match=r"maths\(seconds=0\) must be above 0"):
        maths(seconds=0)
