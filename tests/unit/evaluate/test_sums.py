from __future__ import annotations

from posttrain.evaluate.tasks import sums


def test_held_out_sums_are_in_no_training_prompt() -> None:
    train, held_out = sums.split()
    assert (len(train), len(held_out)) == (60, 21)
    asked = [row["prompt"][-1]["content"] for row in train]
    assert not {row["prompt"][-1]["content"] for row in held_out} & set(asked)
    assert len(set(asked)) == 60


def test_only_exactly_the_answer_is_right() -> None:
    row = sums.row(4, 9)
    assert row["answer"] == "<answer>13</answer>"
    assert [message["role"] for message in row["prompt"]] == ["user", "assistant"] * 2 + ["user"]
    said = ["<answer>13</answer>", " <answer>13</answer>\n", "13", "<answer>13</answer>.", "<answer>31</answer>"]
    chats = [[{"role": "assistant", "content": text}] for text in said]
    assert sums.correct(chats, [row["answer"]] * 5) == [1, 1, 0, 0, 0]
    assert sums.correct(said, [row["answer"]] * 5, trainer_state=None) == [1, 1, 0, 0, 0]
