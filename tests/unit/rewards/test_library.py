"""What each reward of the library gives for completions that are right, wrong, odd and hostile, number by number."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from functools import partial
from typing import Any

import pytest

from posttrain import ConfigError
from posttrain.rewards import (
    LIBRARY,
    exact,
    exact_match,
    json_schema,
    json_valid,
    length_penalty,
    matches,
    numeric,
    numeric_answer,
    soft_overlong,
    tagged,
    think_answer,
)
from posttrain.rewards.functions import Completions, Rewards, name_of
from posttrain.rewards.hostile import hostile
from posttrain.rewards.numerals import find_number
from posttrain.rewards.structured import NOTHING, read_json


def of(reward: Any, *texts: str, **columns: Any) -> list[float | None]:
    return list(reward(completions=list(texts), **columns))


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBERS = {
    "#### 72": 72,
    "so it is 70 ... #### 72\nDone in 3 steps": 72,
    "\\boxed{1,234.50}": Fraction("1234.5"),
    "\\boxed{1\\,000}": 1000,
    "\\boxed{1{,}000}": 1000,
    "12'345": 12345,
    "1\u202f000": 1000,
    "\\boxed{\\frac{3}{4}}": Fraction(3, 4),
    "\\boxed{-\\dfrac{3}{4}}": Fraction(-3, 4),
    "\\boxed{\\frac12}": Fraction(1, 2),
    "\\boxed{-\\frac12}": Fraction(-1, 2),
    "\\boxed{\\dfrac{1}2}": Fraction(1, 2),
    "\\boxed{x = \\tfrac1{20}}": Fraction(1, 20),
    "so it is \\frac 3 4.": Fraction(3, 4),
    "\\boxed{\\frac{-1}2}": Fraction(-1, 2),
    "\\boxed{\\frac123}": None,  # 3 halves to LaTeX, 1/23 or 12/3 to who wrote it
    "\\boxed{\\frac10}": None,
    "3/4 cup": Fraction(3, 4),
    "1 1/2": Fraction(3, 2),
    "\\boxed{x = 5}": 5,
    "\\boxed{\\text{5 km}}": 5,
    "5 m^2": 5,
    "$1,234": 1234,
    "-$5": -5,
    "$-5": -5,
    "5 - 6": 6,
    "5-6": 6,
    "it is -6.": -6,
    "\u22127": -7,
    "#### - 6": -6,
    "1e3": 1000,
    "1.5E-3": Fraction("0.0015"),
    "1.5 \\times 10^{3}": 1500,
    "2 × 10^3": 2000,
    "\\boxed{10^{3}}": 1000,
    ".5": Fraction(1, 2),
    "<answer>12</answer> and not 13": 12,
    "\\boxed{2} or rather \\boxed{3}": 3,
    "about 3.14.": Fraction("3.14"),
    "no number": None,
    "GPT4 and x2": None,
    "\\boxed{}": None,
    "\\boxed{none} 5": None,
    "\\boxed{\\sqrt{2}}": None,
    "\\boxed{2\\pi}": None,
    "1/0": None,
    "1e999999999": None,
    "1" * 5000: None,
    "": None,
}


@pytest.mark.parametrize("text", NUMBERS, ids=lambda text: text[:24].encode("unicode_escape").decode() or "empty")
def test_numbers(text: str) -> None:
    found = find_number(text)
    assert (None if found is None else found.value) == NUMBERS[text]


@pytest.mark.parametrize(
    ("said", "gold", "worth"),
    [
        ("The answer is 18.", "She has 16 - 3 - 4 = 9 eggs, 9 * 2 = $18 a day.\n#### 18", 1.0),
        ("The answer is 19.", "#### 18", 0.0),
        ("18.00", 18, 1.0),
        ("18", 18.0, 1.0),
        ("0.1", 0.1, 1.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 1.0),
        ("0.5", "50%", 1.0),
        ("50%", "50%", 1.0),
        ("0.5%", "50%", 0.0),
        ("1/3", "0.3333", 0.0),
        ("no idea", "18", 0.0),
        ("15 16 17 18 19 20", "18", 0.0),
        ("18", "many", None),
        ("18", None, None),
        ("1", True, None),
        ("1", float("nan"), None),
    ],
)
def test_numeric_answer(said: str, gold: Any, worth: float | None) -> None:
    assert of(numeric_answer, said, answer=[gold]) == [worth]
    assert of(numeric_answer, ground_truth=[], answer=[]) == []


def test_a_tolerance_and_another_column() -> None:
    assert of(numeric("target", tolerance=1e-3), "1/3", "0.3", target=["0.3333", "0.3333"]) == [1.0, 0.0]
    with pytest.raises(ConfigError) as caught:
        of(numeric_answer, "1", target=["1"], id=[3])
    assert caught.value.message == (
        "reward function 'numeric_answer' finds no right answers: the data has no column ground_truth, answer or "
        "solution (it has id, target)"
    )
    with pytest.raises(ConfigError, match="the data has no column gold"):
        of(numeric("gold"), "1", answer=["1"])


@pytest.mark.parametrize("text", ["1" * 10**6, "1," * 10**6, "1,111" * 10**5, "-" * 10**6, "\\boxed{" * 10**5,
                                  "{" * 10**6, "10^" * 10**5, "1 1/" * 10**5, "\\frac{1}{" * 10**5,
                                  " " * 10**6 + "/"])  # fmt: skip
def test_hostile_numbers_take_no_time(text: str) -> None:
    started = time.process_time()
    find_number(text)
    assert time.process_time() - started < 1


# --- exact match ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "gold", "worth"),
    [
        ("  Paris \n", "Paris", 1.0),
        ("paris", "Paris", 0.0),
        ("New\n  York", "New York", 1.0),
        ("It is Paris", "Paris", 0.0),
        ('{"b": 1, "a": [2]}', {"a": [2], "b": 1}, 1.0),
        ('{"a": [2.0], "b": 1}', {"a": [2], "b": 1}, 0.0),
        ("12", 12, 1.0),
        ("12.0", 12, 0.0),
        ("not JSON", {"a": 1}, 0.0),
        ("[" * 100_000, [1], 0.0),
        ("hello", [{"role": "assistant", "content": "hello"}], 1.0),
        ("x", None, None),
        ("", "", 1.0),
    ],
)
def test_exact_match(said: str, gold: Any, worth: float | None) -> None:
    assert of(exact_match, said, solution=[gold]) == [worth]


def test_exact_match_within_tags_and_of_any_case() -> None:
    reward = exact(tag="answer", ignore_case=True)
    texts = ["<answer>no</answer> <answer> PARIS </answer>", "Paris", "<answer>Paris", "</answer>Paris<answer>"]
    assert of(reward, *texts, answer=["Paris"] * 4) == [1.0, 0.0, 0.0, 0.0]


# --- format -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("  <think>\na\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a</think><answer></answer>", 0.0),
        ("<think> </think><answer>b</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer> ok", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>" * 3 + "a</think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer(text: str, worth: float) -> None:
    assert of(think_answer, text) == [worth]


def test_patterns() -> None:
    assert of(matches(r"Answer: \d+"), "Answer: 12", "Answer: 12.", "\nAnswer: 1") == [1.0, 0.0, 0.0]
    assert of(matches(r"Answer: \d+", whole=False, name="says"), "so\nAnswer: 12.", "no") == [1.0, 0.0]
    assert name_of(matches("x", name="says")) == "says"
    with pytest.raises(ConfigError, match=r"matches\('\('\) is no regular expression"):
        matches("(")
    with pytest.raises(ConfigError, match="give the names of tags"):
        tagged("a b")


# --- length -----------------------------------------------------------------------------------------------------------


def test_daposs_soft_punishment() -> None:
    """Equation 13, with a length of 20 480 and a buffer of 4 096 as in the paper."""
    lengths = (0, 16_384, 16_385, 18_432, 20_480, 30_000)
    reward = soft_overlong(20_480, 4096)
    assert reward(completion_ids=[range(n) for n in lengths]) == [0, 0, -1 / 4096, -0.5, -1, -1]
    for wrong in ((10, 0), (10, 11)):
        with pytest.raises(ConfigError, match="the buffer must be above 0 and at most the length"):
            soft_overlong(*wrong)


def test_a_plain_penalty() -> None:
    reward = length_penalty(per_token=0.01, free=10, least=-0.5)
    made = reward(completion_ids=[range(n) for n in (0, 10, 11, 60, 1000)])
    assert made == pytest.approx([0, 0, -0.01, -0.5, -0.5])
    with pytest.raises(ConfigError, match="per_token above 0"):
        length_penalty(per_token=-1)


# --- JSON -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "worth"),
    [
        ('{"a": 1}', 1.0),
        (" [] ", 1.0),
        ('```json\n{"a": 1}\n```', 1.0),
        ("```\n[1]\n```\n", 1.0),
        ('Here it is: {"a": 1}', 0.0),
        ("5", 0.0),
        ('"text"', 0.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ("{'a': 1}", 0.0),
        ('{"a": ' + "9" * 100_000 + "}", 0.0),
        ("[" * 100_000 + "]" * 100_000, 0.0),
        ("", 0.0),
    ],
)
def test_json_valid(text: str, worth: float) -> None:
    assert of(json_valid, text) == [worth]
    assert (read_json(text) is not NOTHING) == bool(worth)


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 1}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_json_schema() -> None:
    pytest.importorskip("jsonschema")
    texts = ['{"n": 2}', '{"n": 0}', '{"n": "2"}', '{"n": 2, "m": 1}', "{}", "no"]
    assert of(json_schema(SCHEMA), *texts) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    of_rows = LIBRARY["json_schema"]
    assert of(of_rows, *texts[:3], schema=[SCHEMA, json.dumps({"type": "object"}), None]) == [1.0, 1.0, None]
    nested = {"$defs": {"l": {"type": "array", "items": {"$ref": "#/$defs/l"}}}, "$ref": "#/$defs/l"}
    assert of(json_schema(nested), "[[[]]]", "[[1]]", "[" * 900 + "]" * 900) == [1.0, 0.0, 0.0]
    with pytest.raises(ConfigError, match="this is no JSON schema: 'strange' is not valid"):
        json_schema({"type": "strange"})
    with pytest.raises(ConfigError, match="the data has no column schema"):
        of(of_rows, "{}")
    with pytest.raises(ConfigError, match="refers to what is not in it"):
        of(json_schema({"$ref": "http://localhost:9/schema.json"}), "{}")


# --- all of them ------------------------------------------------------------------------------------------------------

PLAIN = [name for name in LIBRARY if name not in ("math_answer", "code_tests")]


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(("kind", "text"), hostile())
def test_hostile_text_is_worth_nothing_and_takes_no_time(name: str, kind: str, text: str) -> None:
    started = time.process_time()
    for content in (text, [{"role": "assistant", "content": text}]):
        made = LIBRARY[name](completions=[content], answer=["12345"], schema=[SCHEMA], prompts=["?"])
        allowed = 1.0 if name == "json_valid" and kind == "deep nesting" and made == [1.0] else 0.0
        assert made == [allowed]
    assert time.process_time() - started < 1


def test_names_are_those_of_the_functions() -> None:
    assert {name: name_of(reward) for name, reward in LIBRARY.items()} == {name: name for name in LIBRARY}
    assert name_of(partial(json_valid)) == "json_valid"


def test_several_with_weights() -> None:
    rewards = Rewards({"numeric_answer": numeric_answer, "think_answer": think_answer}, [1.0, 0.2])
    texts = ["<think>6*7</think><answer>42</answer>", "42"]
    asked = Completions(["?", "?"], texts, [[1], [2]], {"answer": ["42", "42"]})
    assert rewards(asked).tolist() == [[1.0, 1.0], [1.0, 0.0]]
