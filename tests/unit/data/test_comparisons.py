"""Length and contradictions in pairs and ratings."""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.data.comparisons import contradictions, length_bias
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.types import Branch, Origin, Sample, Tokenized
from tests.tiny_tokenizers import chatml_tokenizer


def answer(*ids: int) -> Branch:
    return Branch(np.array(ids), np.ones(len(ids), dtype=bool))


def sample(row: int, prompt: list[int], *answers: Branch, **columns: Any) -> Sample:
    return (Tokenized(np.array(prompt), answers, Origin("train.jsonl", row, row + 1), columns),)


def of_lengths(pairs: list[tuple[int, int]]) -> list[Sample]:
    return [sample(i, [1], *(answer(*range(n)) for n in pair)) for i, pair in enumerate(pairs)]


def test_chosen_answers_that_are_longer() -> None:
    said = length_bias(of_lengths([(10, 4)] * 40 + [(4, 10)] * 8 + [(5, 5)] * 9))
    assert said is not None
    assert said.startswith("the chosen answer is the longer one in 83 % of pairs (1.7 times the tokens, on average)")


def test_chance_is_no_bias() -> None:
    assert length_bias(of_lengths([(10, 4)] * 29)) is None  # too few
    assert length_bias(of_lengths([(10, 4)] * 55 + [(4, 10)] * 45)) is None
    assert length_bias(of_lengths([(4, 10)] * 60)) is None  # the other way round


def test_a_pair_and_its_reverse() -> None:
    one, other = answer(5, 6), answer(7)
    samples = [sample(0, [1], one, other), sample(1, [2], other, one), sample(2, [1], one, other)]
    assert contradictions(samples) is None
    said = contradictions([*samples, sample(3, [1], other, one)])
    assert said == "1 rows say the opposite of another (first: train.jsonl:4 of train.jsonl:1)"


def test_an_answer_rated_both_ways() -> None:
    samples = [sample(i, [1], answer(5), label=label) for i, label in enumerate((True, True, False))]
    assert contradictions(samples[:2]) is None
    assert contradictions(samples) == "1 rows say the opposite of another (first: train.jsonl:3 of train.jsonl:1)"
    assert contradictions([*samples[:2], sample(2, [2], answer(5), label=False)]) is None


def test_answers_that_are_the_same_once_they_are_cut_are_left_out() -> None:
    rows = [
        {"prompt": "Say it. ", "chosen": "one " * 40 + "yes", "rejected": "one " * 40 + "no"},
        {"prompt": "Say it. ", "chosen": "yes " + "one " * 40, "rejected": "no " + "one " * 40},
    ]
    for max_length, left in ((None, 2), (30, 1)):
        settings = DataSettings(method="preference", max_length=max_length, truncation_mode="keep_start")
        made = prepare(rows, chatml_tokenizer(), settings)
        assert len(made.samples) == left
        assert made.report.rows - len(made.samples) == 2 - left
