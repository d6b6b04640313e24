"""Accuracy, its interval, and the table that shows two models beside each other."""

from __future__ import annotations

import math

import pytest

from posttrain.evaluate import accuracy
from posttrain.evaluate.accuracy import TaskResult, evaluate_task, side_by_side, wilson


def test_wilson_equals_published_values() -> None:
    """Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, n), interval in published.items():
        assert wilson(right / n, n) == pytest.approx(interval, abs=5e-5)


def test_wilson_stays_inside_and_survives_nothing() -> None:
    assert wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert max(wilson(n / 10, 10)[1] for n in range(11)) <= 1.0
    assert wilson(0.0, 0) == (0.0, 1.0)


def test_a_result_counts_and_says_so() -> None:
    result = TaskResult(("a", "b", "c", "d"), (1.0, 0.0, 0.0, 0.0))
    assert (result.n, result.accuracy) == (4, 0.25)
    assert str(result) == "25.0% (95 % interval 4.6% to 69.9%, n=4)"
    assert math.isnan(TaskResult((), ()).accuracy)


def test_each_answer_is_scored_against_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        accuracy, "generate_answers", lambda model, tokenizer, prompts, *rest: [p.upper() for p in prompts]
    )
    rows = [{"prompt": "a", "right": "A"}, {"prompt": "b", "right": "b"}]
    result = evaluate_task(None, None, rows, lambda text, row: float(text == row["right"]))
    assert result == TaskResult(("A", "B"), (1.0, 0.0))


ROWS = [
    {
        "prompt": [{"role": "user", "content": "Answer in capitals.\n\nsay yes"}],
        "completion": [{"role": "assistant", "content": "YES"}],
    }
]


@pytest.mark.parametrize("width", [40, 80, 140])
def test_the_table_fits_the_terminal(width: int) -> None:
    wordy = TaskResult(("so many words " * 20 + "\n\nand " + "x" * 200,), (0.0,))
    table = side_by_side(ROWS, wordy, TaskResult(("YES",), (1.0,)), width=width)
    assert max(map(len, table.splitlines())) <= width


def test_the_table_shows_question_expectation_and_both_answers() -> None:
    table = side_by_side(ROWS, TaskResult(("yes",), (0.0,)), TaskResult(("YES",), (1.0,)), width=40)
    assert table.splitlines() == [
        "asked     say yes",
        "expected  YES",
        "before ✘ wrong     │ after ✔ right",
        "yes                │ YES",
    ]


def test_an_empty_answer_is_shown_as_such() -> None:
    assert "(nothing)" in side_by_side(ROWS, TaskResult(("",), (0.0,)), TaskResult(("YES",), (1.0,)), width=40)


def test_an_answer_cannot_steer_the_terminal() -> None:
    table = side_by_side(ROWS, TaskResult(("a\x1b[2Jb\rc",), (0.0,)), TaskResult(("YES",), (1.0,)), width=40)
    assert all(line.isprintable() for line in table.splitlines())


def test_only_k_rows_are_shown() -> None:
    result = TaskResult(("a",) * 9, (0.0,) * 9)
    assert side_by_side(ROWS * 9, result, result, k=3, width=40).count("expected") == 3
