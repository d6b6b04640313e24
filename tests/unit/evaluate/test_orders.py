"""The demo's task: deterministic, honest about what is held out, and strict in scoring."""

from __future__ import annotations

import json

import pytest

from posttrain.evaluate.tasks import orders

ANSWER = {"item": "oak shelf", "quantity": 12, "city": "Porto", "day": "friday"}
ROW = {"answer": ANSWER}


def messages(rows: list[dict]) -> list[str]:
    return [row["prompt"][-1]["content"] for row in rows]


def test_the_same_seed_makes_the_same_rows() -> None:
    assert orders.generate(50, seed=3) == orders.generate(50, seed=3)
    assert orders.generate(50, seed=3) != orders.generate(50, seed=4)
    assert orders.split(20, 10, seed=1) == orders.split(20, 10, seed=1)


def test_messages_are_all_different() -> None:
    assert len(set(messages(orders.generate(2000, seed=0)))) == 2000


def test_held_out_rows_share_no_message_and_no_item_with_training() -> None:
    train, held_out = orders.split(2000, 500, seed=0)
    assert (len(train), len(held_out)) == (2000, 500)
    assert not set(messages(train)) & set(messages(held_out))
    assert not {row["answer"]["item"] for row in train} & {row["answer"]["item"] for row in held_out}


def test_held_out_rows_use_words_that_training_knows() -> None:
    train, held_out = orders.split(2000, 500, seed=0)

    def words(rows: list[dict]) -> set[str]:
        return {word for row in rows for word in row["answer"]["item"].split()}

    assert words(held_out) <= words(train)


def test_rows_are_conversational_prompt_completion() -> None:
    for row in orders.generate(100, seed=0):
        assert [message["role"] for message in row["prompt"]] == ["user"]
        assert [message["role"] for message in row["completion"]] == ["assistant"]
        assert json.loads(row["completion"][0]["content"]) == row["answer"]
        assert orders.score(row["completion"][0]["content"], row) == 1.0


def test_every_value_of_an_answer_is_normalised() -> None:
    singular = {f"{material} {product}" for material in orders.MATERIALS for product in orders.PRODUCTS}
    for answer in (row["answer"] for row in orders.generate(500, seed=0)):
        assert tuple(answer) == orders.FIELDS
        assert answer["item"] in singular
        assert type(answer["quantity"]) is int
        assert answer["city"] in orders.CITIES
        assert answer["day"] in orders.DAYS


def test_a_change_of_mind_is_what_counts() -> None:
    changed = [row for row in orders.generate(500, seed=0) if "Sorry, I meant" in messages([row])[0]]
    assert changed
    for row in changed:
        last_said = messages([row])[0].split("Sorry, I meant ")[1].split(".")[0]
        assert last_said in orders.DAYS[row["answer"]["day"]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (json.dumps(ANSWER), 1.0),
        (json.dumps(dict(reversed(ANSWER.items())), indent=2), 1.0),
        (f"\n{json.dumps(ANSWER)} ", 1.0),
        (json.dumps({**ANSWER, "day": "Friday"}), 0.0),
        (json.dumps({**ANSWER, "quantity": "12"}), 0.0),
        (json.dumps({**ANSWER, "quantity": 12.0}), 0.0),
        (json.dumps({**ANSWER, "note": ""}), 0.0),
        (json.dumps([ANSWER]), 0.0),
        (f"Here you are: {json.dumps(ANSWER)}", 0.0),
        (f"```json\n{json.dumps(ANSWER)}\n```", 0.0),
        (json.dumps(ANSWER)[:-1], 0.0),
        ("null", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_score_is_strict_about_values_and_lenient_about_layout(text: str, expected: float) -> None:
    assert orders.score(text, ROW) == expected


def test_true_is_not_one() -> None:
    assert orders.score('{"quantity": true}', {"answer": {"quantity": 1}}) == 0.0


def test_field_accuracy_counts_the_right_fields() -> None:
    assert orders.field_accuracy(json.dumps(ANSWER), ROW) == 1.0
    assert orders.field_accuracy(json.dumps({**ANSWER, "quantity": "12", "city": "Faro"}), ROW) == 0.5
    assert orders.field_accuracy("no", ROW) == orders.field_accuracy("[1]", ROW) == 0.0
