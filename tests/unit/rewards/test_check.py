"""Trying rewards: what is found of good, blind, perverse, gullible, slow and broken ones."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from posttrain.rewards import LIBRARY, numeric_answer, think_answer
from posttrain.rewards.check import Material, TryOut, before_training, try_reward
from posttrain.rewards.functions import RewardError, Rewards, text_of

GOLD = [f"It is {n} and one more.\n#### {n + 1}" for n in range(10)]
PROMPTS = [f"What is {n} + 1?" for n in range(10)]
BEFORE = "tried before training, "


def material(gold: Any = GOLD, chat: bool = False, **more: Any) -> Material:
    prompts: Any = [[{"role": "user", "content": one}] for one in PROMPTS] if chat else PROMPTS
    return Material.of(prompts, {"answer": gold}, **more)


def tried(function: Any, given: Material | None = None, **options: Any) -> TryOut:
    return try_reward(Rewards({function.__name__: function}, [1.0], deadline=5), given or material(), **options)


def short(*functions: Any, given: Material | None = None) -> list[str]:
    rewards = Rewards({one.__name__: one for one in functions}, [1.0] * len(functions), deadline=2)
    return before_training(rewards, given or material(), longest=16)


def test_a_good_one() -> None:
    for chat in (False, True):
        report = tried(numeric_answer, material(chat=chat)).report
        assert report.passed
        assert (report.errors, report.warnings) == ([], [])
        assert report.separation is not None
        assert (report.separation.share, report.separation.right, report.separation.wrong) == (1.0, 1.0, 0.0)
        assert report.separation.form == "as it is"
        assert len(report.trials) == 19
    assert short(numeric_answer) == []


def test_the_form_that_it_likes_is_found() -> None:
    def tags(completions: Any, answer: Any, **_: Any) -> list[float]:
        right = (f"<answer>{one.rpartition('#### ')[2]}</answer>" for one in answer)
        return [float(one in text_of(said)) for said, one in zip(completions, right, strict=True)]

    report = tried(tags).report
    assert report.separation is not None
    assert (report.separation.form, report.separation.share) == ("in <answer>", 1.0)
    assert short(tags) == []

    def own(completions: Any, answer: Any, **_: Any) -> list[float]:
        right = (f"Answer: {{{one.rpartition('#### ')[2]}}}!" for one in answer)
        return [float(one == said) for said, one in zip(completions, right, strict=True)]

    assert not tried(own).report.passed
    assert tried(own, material(form="Answer: {{gold}}!")).report.passed


def test_one_that_is_blind() -> None:
    def same(completions: Any, **_: Any) -> list[float]:
        return [0.5] * len(completions)

    report = tried(same).report
    blind = (
        "it does not tell right from wrong: a row's own answer is worth 0.5, another row's 0.5 (on average over 10 "
        "rows, however they are written)"
    )
    assert report.errors == [blind]
    assert not report.passed
    assert short(same) == [blind.replace("10 rows", "8 rows")]
    assert short(same, numeric_answer) == []  # beside one that sees
    assert tried(think_answer, material().without_gold(), wants_gold=False).report.passed


def test_one_that_likes_what_is_wrong() -> None:
    def upside_down(completions: Any, answer: Any, **_: Any) -> list[float]:
        return [1.0 - value for value in numeric_answer(completions=completions, answer=answer)]

    first = tried(upside_down).report.errors[0]
    assert first.startswith("it prefers wrong answers to right ones: a row's own answer is worth 0, another row's 1")


def test_one_that_pays_for_nothing_and_for_everything() -> None:
    def gullible(completions: Any, answer: Any, **_: Any) -> list[float]:
        right = (one.rpartition("#### ")[2] for one in answer)
        return [float(not said or one in said.split()) for said, one in zip(completions, right, strict=True)]

    report = tried(gullible).report
    assert report.errors == ["empty: worth 1, as much as right answers (1)"]
    assert report.warnings == ["every answer at once: worth 1, as much as right answers (1)"]
    assert short(gullible) == report.errors


def test_one_that_sees_half() -> None:
    def half(completions: Any, answer: Any, **_: Any) -> list[float]:
        return [float(said == one and int(one[-2:]) % 3 > 0) for said, one in zip(completions, answer, strict=True)]

    report = tried(half).report
    assert report.separation is not None
    assert report.separation.share == pytest.approx(0.85)  # 7 of 10 rows, and 3 ties
    assert report.warnings[0] == "in 15% of 10 rows another row's answer is worth as much as its own"


def test_what_breaks_is_named_with_what_broke_it() -> None:
    def first(completions: Any, **_: Any) -> list[float]:
        return [float(said[0] == "I") for said in completions]

    report = tried(first).report
    assert "empty: reward function 'first' failed: IndexError: string index out of range" in report.errors
    with pytest.raises(RewardError) as caught:
        short(first)
    assert caught.value.code == "E-REWARD-0003"
    assert caught.value.message == (
        BEFORE + "empty: reward function 'first' failed: IndexError: string index out of range"
    )
    assert "posttrain reward test FILE.py" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda n: [float("nan")] * n, "gave nan for completion 0"),
        (lambda n: ["1"] * n, "gave '1' for completion 0"),
        (lambda n: [1.0] * (n + 1), "gave 9 rewards for 8 completions"),
        (lambda n: 1.0, "gave float, not a list of numbers"),
    ],
)
def test_what_is_no_reward(given: Any, said: str) -> None:
    def odd(completions: Any, **_: Any) -> Any:
        return given(len(completions))

    with pytest.raises(RewardError) as caught:
        short(odd)
    assert caught.value.message.startswith(BEFORE + "right answers as it is: reward function 'odd' " + said)


def test_one_that_is_slow() -> None:
    def slow(completions: Any, answer: Any, **_: Any) -> Any:
        if "let me think" in completions[0]:
            time.sleep(3.3)
        return numeric_answer(completions=completions, answer=answer)

    assert tried(slow).report.warnings == ["huge: it takes 1.1 s for a completion"]


def test_one_that_hangs_is_not_asked_for_ever() -> None:
    def hangs(completions: Any, **_: Any) -> Any:
        time.sleep(60)

    rewards = Rewards({"hangs": hangs}, [1.0], deadline=0.2)
    report = try_reward(rewards, material()).report
    late = "reward function 'hangs' has not answered within 0.2 s"
    assert report.errors == [
        f"right answers as it is: {late}", f"empty: {late}", "it was late 2 times; the rest was not tried"
    ]  # fmt: skip


UNTRIED = ": whether it tells right from wrong was not tried"
SAME = "everything that was tried is worth the same ({}): it was not seen to tell anything apart"


def silent(completions: Any, **_: Any) -> Any:
    return [None] * len(completions)


def test_one_that_says_nothing() -> None:
    assert tried(silent).report.errors == ["it says nothing of right answers, nor of wrong ones"]
    report = tried(silent, material().without_gold(), wants_gold=False).report
    assert report.errors == ["it says nothing of anything: None for each of 48 completions"]
    assert not report.passed
    assert short(silent, given=material().without_gold()) == [
        "it says nothing of anything: None for each of 6 completions"
    ]


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_a_column_without_right_answers(nothing: Any) -> None:
    report = tried(numeric_answer, material([nothing] * 10)).report
    assert report.warnings == ["no right answers in column answer" + UNTRIED]
    assert report.errors == ["it says nothing of anything: None for each of 48 completions"]
    mostly = material([nothing] * 8 + GOLD[8:])
    assert short(numeric_answer, given=mostly) == [
        "it says nothing of anything: None for each of 6 completions",
        "no right answers in column answer of the 8 rows that were tried",
    ]
    assert tried(numeric_answer, mostly).report.warnings == []
    assert short(numeric_answer, given=material([nothing] * 6 + GOLD[6:])) == []


def test_one_that_is_always_worth_the_same() -> None:
    def same(completions: Any, **_: Any) -> list[float]:
        return [1.0] * len(completions)

    report = tried(same, material().without_gold(), wants_gold=False).report
    assert (report.errors, report.warnings) == ([], [SAME.format(1)])


def test_samples_are_something_that_was_said() -> None:
    def of_samples(completions: Any, **_: Any) -> Any:
        return [float(len(one)) if one.startswith("sample") else None for one in completions]

    def sample(tryout: TryOut) -> None:
        tryout.groups(["sample", "sampled"], [[1], [2]], [0, 0], 2)

    report = tried(of_samples, material().without_gold(), wants_gold=False, sample=sample).report
    assert (report.errors, report.warnings) == ([], [])


def test_without_right_answers() -> None:
    given = Material.of(PROMPTS, {"id": list(range(10))})
    report = tried(LIBRARY["json_valid"], given).report
    assert report.warnings == [
        "no column of right answers (ground_truth, answer, solution, completion)" + UNTRIED,
        SAME.format(0),
    ]
    assert short(LIBRARY["json_valid"], given=given) == []


def test_answers_that_are_all_the_same_cannot_be_wrong() -> None:
    report = tried(numeric_answer, material(["#### 3"] * 10)).report
    assert report.separation is None
    assert report.passed
    assert report.warnings == ["no two right answers that differ in column answer" + UNTRIED, SAME.format(0)]
    assert short(numeric_answer, given=material(["#### 3"] * 10)) == []


def test_completions_are_no_column_of_the_rewards() -> None:
    seen: list[set[str]] = []

    def exact(completions: Any, **columns: Any) -> list[float]:
        seen.append(set(columns))
        return [1.0] * len(completions)

    tried(exact, Material.of(PROMPTS, {"completion": GOLD, "tests": GOLD}))
    assert seen[0] == {"prompts", "completion_ids", "tests"}


def test_groups() -> None:
    def length(completions: Any, **_: Any) -> list[float]:
        return [float(len(one)) for one in completions]

    def tryout() -> TryOut:
        return TryOut(Rewards({"length": length}, [1.0]), material())

    good = tryout()
    good.groups(["a", "bb", "c", "d"], [[1], [2], [3], [4]], [0, 0, 1, 1], 2)
    signal = good.report.signal
    assert signal is not None
    assert (signal.groups, signal.with_signal, signal.lowest, signal.highest, signal.mean) == (2, 1, 1, 2, 1.25)
    assert good.report.passed
    dead = tryout()
    dead.groups(["a", "b", "cc", "dd"], [[1]] * 4, [0, 0, 1, 1], 2)
    assert dead.report.errors == [
        "no group would have a signal: in each of 2 groups of 2 samples all rewards are the same (mean 1.5)"
    ]
    poor = tryout()
    poor.groups(["a"] * 19 + ["bb"], [[1]] * 20, [n // 2 for n in range(20)], 2)
    assert poor.report.warnings[0].startswith("1 of 10 groups of 2 samples would have a signal; easier prompts")


def test_the_short_trial_is_cheap() -> None:
    short(numeric_answer)
    started = time.process_time()
    short(numeric_answer)
    assert time.process_time() - started < 0.5


def test_columns_of_numpy() -> None:
    given = Material.of(["a", "b"], {"answer": np.array(["1", "2"])})
    assert tried(numeric_answer, given).report.separation is not None
