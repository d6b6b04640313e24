"""What makes two rows the same, for the doctor, for `dedup`, for `fix` and for a split: and conversations of which one
is the beginning of the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from posttrain.data.change import dedup, fix, split
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError
from tests.doctor_files import codes, examine, finding, pair, plain, rated, row, write

S = DataSettings()


def lines(path: Path) -> list[dict[str, Any]]:
    return [found for _, found in read_rows(path)]


def thinking(is_on: bool | None, **more: Any) -> dict[str, Any]:
    return {**row("Two plus two?", "Four."), "chat_template_kwargs": {"enable_thinking": is_on}, **more}


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CODE = "    return 4\nprint(4)"
# What is another row, and what is the same one.
OTHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "template arguments": (thinking(True), thinking(False)),
    "with and without": (thinking(True), row("Two plus two?", "Four.")),
    "tools": ({**row("Two plus two?", "Four."), "tools": [TOOL]}, row("Two plus two?", "Four.")),
    "indentation": (row("Write code.", CODE), row("Write code.", CODE.lstrip())),
    "a tab": (row("Write code.", "\treturn 4"), row("Write code.", "return 4")),
    "indentation behind empty lines": (row("Write code.", f"\n\n{CODE}"), row("Write code.", f"\n\n{CODE.lstrip()}")),
    "of a question": (row(CODE, "Code."), row(CODE.lstrip(), "Code.")),
    "of plain text": ({"text": CODE}, {"text": CODE.lstrip()}),
}
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "columns of the user's own": (thinking(True, id=1), thinking(True, id=2)),
    "arguments in another order": (
        {**row("Q?", "A."), "chat_template_kwargs": {"a": 1, "b": 2}},
        {**row("Q?", "A."), "chat_template_kwargs": {"b": 2, "a": 1}},
    ),
    "arguments that say nothing": (thinking(None), row("Two plus two?", "Four.")),
    "one space": ({"prompt": "Q?", "completion": " A."}, {"prompt": "Q?", "completion": "A."}),
    "empty lines before": (row("Write code.", f"\n \n{CODE}"), row("Write code.", CODE)),
    "white space behind": (row("Q? \n", "A.\n\n"), row("Q?", "A.")),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_row(what: str, tmp_path: Path) -> None:
    rows = [*OTHERS[what]]
    assert "W-DATA-0101" not in codes(rows)
    assert dedup(rows, tmp_path / "a.jsonl", S)["dropped"] == 0
    assert fix(write(tmp_path / "in.jsonl", rows), tmp_path / "b.jsonl", S, ["drop-duplicates"])["written"] == 2
    assert "E-DATA-0061" not in codes(rows[:1], rows[1:])


@pytest.mark.parametrize("what", SAME)
def test_the_same_row(what: str, tmp_path: Path) -> None:
    rows = [*SAME[what]]
    assert "W-DATA-0101" in codes(rows)
    assert dedup(rows, tmp_path / "a.jsonl", S)["dropped"] == 1
    assert lines(tmp_path / "a.jsonl") == rows[:1]
    assert fix(write(tmp_path / "in.jsonl", rows), tmp_path / "b.jsonl", S, ["drop-duplicates"])["written"] == 1
    assert "E-DATA-0061" in codes(rows[:1], rows[1:])


def test_questions_with_other_tools_ask_something_else(tmp_path: Path) -> None:
    rows = [{**row("Two plus two?", "4"), "tools": [TOOL]}, row("Two plus two?", "Four."), thinking(True)]
    assert dedup(rows, tmp_path / "a.jsonl", S, by_prompt=True)["dropped"] == 0


def turns(*texts: str, system: str | None = None) -> dict[str, Any]:
    said = [{"role": "system", "content": system}] if system else []
    said += [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": said}


def test_a_conversation_and_its_beginning_stay_together(tmp_path: Path) -> None:
    rows = []
    for n in range(30):
        said = [f"Question {n}?", f"Answer {n}.", f"And {n}?", f"So {n}.", f"Then {n}?", f"End {n}."]
        rows += [turns(*said[:2]), turns(*said), turns(*said[:4]), turns(said[0], "Something else.", "Oh?", "Yes.")]
    for seed in range(5):
        counts = split(rows, 0.2, seed, tmp_path, S)
        assert (counts["groups"], counts["train"] + counts["val"]) == (30, 120)
        train, val = (lines(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
        asked = [{one["messages"][0]["content"] for one in part} for part in (train, val)]
        assert not asked[0] & asked[1]
        assert not {"E-DATA-0061", "W-DATA-0106", "W-DATA-0135"} & set(codes(train, val))


def test_what_only_begins_alike_is_no_group(tmp_path: Path) -> None:
    """Half of all chats begin with the same greeting: that alone makes no row the beginning of another."""
    rows = [
        turns("Hello", "Hi, what can I do?", f"Question {n}?", f"Answer {n}.", system="Be kind.") for n in range(20)
    ]
    assert split(rows, 0.2, 0, tmp_path, S)["groups"] == 20
    beginning = turns("Hello", "Hi, what can I do?", system="Be kind.")
    with pytest.raises(DataError, match="cannot be split so"):
        split([*rows, beginning], 0.2, 0, tmp_path, S)


@pytest.mark.parametrize("long_ago", [False, True])
def test_validation_rows_that_stand_in_a_conversation(long_ago: bool) -> None:
    said = ["Name it.", "This is it.", "And that?", "That is that.", "Thanks.", "Welcome."]
    whole, beginning = turns(*said), turns(*said[:2] if long_ago else said[:4])
    found = finding(examine([*plain(5), whole], [*plain(2, start=20), beginning]), "E-DATA-0061")
    assert (found.count, found.first) == (1, ("data[2]",))
    found = finding(examine([*plain(5), beginning], [*plain(2, start=20), whole]), "W-DATA-0135")
    assert (found.count, found.first) == (1, ("data[2]",))
    assert found.sentence == "1 row of the validation data in continuation of a row that is trained on"


def test_validation_rows_whose_question_stands_in_a_conversation() -> None:
    whole = turns("Name it.", "This is it.", "And that?", "That is that.")
    found = examine([whole], [turns("Name it.", "No.")])
    assert [one.code for one in found.findings] == ["W-DATA-0106"]
    assert codes([whole], [turns("Name it.", "That is it.", "What else?", "Nothing.")]) == []


def test_validation_rows_that_begin_as_a_conversation() -> None:
    whole = turns("Name it.", "This is it.", "And that?", "That is that.")
    forked = turns("Name it.", "This is it.", "What else?", "Nothing.")
    found = finding(examine([*plain(5), whole], [*plain(2, start=20), forked]), "W-DATA-0145")
    assert (found.count, found.first) == (1, ("data[2]",))
    assert found.sentence == "1 row begins in the validation data as a conversation that is trained on"


def greeted(count: int) -> list[Any]:
    said = ("Hello", "Hi, what can I do?")
    return [turns(*said, f"{n}?", f"{n}.", f"And {way}?", f"So {way}.") for n in range(count) for way in "ab"]


def test_forks_stay_together(tmp_path: Path) -> None:
    """Each opening has three ways to go on, and none of them is the beginning of another."""
    rows = [turns(f"Question {n}?", f"Answer {n}.", f"And {way}?", f"So {way}.") for n in range(30) for way in "abc"]
    for part in (rows, greeted(40)):
        for seed in range(5):
            counts = split(part, 0.2, seed, tmp_path, S)
            assert counts["groups"] == (30 if part is rows else 40)
            train, val = (lines(tmp_path / f"{name}.jsonl") for name in ("train", "val"))
            assert not [code for code in codes(train, val, near_rows=0) if code != "W-DATA-0119"]


def test_a_greeting_is_what_many_rows_begin_with(tmp_path: Path) -> None:
    """Ten rows are tied by it, whatever their share, and eleven are not, but by what they say then."""
    assert "W-DATA-0145" in codes(greeted(1)[:1], greeted(1)[1:])
    assert split([*greeted(5), *plain(1)], 0.2, 0, tmp_path, S)["groups"] == 2
    assert split([*greeted(6), *plain(1)], 0.2, 0, tmp_path, S)["groups"] == 7
    assert "W-DATA-0145" not in codes(greeted(6)[:10], greeted(6)[10:])


def test_what_is_not_trained_gives_nothing_away() -> None:
    said = turns("Name it.", "This is it.", "And that?")["messages"]
    ahead = turns("Name it.", "This is it.")
    pairs = {"prompt": said, "chosen": [{"role": "assistant", "content": "A"}],
             "rejected": [{"role": "assistant", "content": "B"}]}  # fmt: skip
    assert "E-DATA-0061" not in codes([pairs], [ahead])
    other = {**pair("1?", "a", "b")}
    assert "W-DATA-0135" not in codes([other], [pairs])
    assert "E-DATA-0061" in codes([rated("1?", "a", True)], [rated("1?", "a", True)])


def test_tools_and_arguments_are_part_of_what_was_asked() -> None:
    whole = {**turns("Name it.", "This is it.", "And that?", "That is that."), "tools": [TOOL]}
    beginning = turns("Name it.", "This is it.")
    assert "E-DATA-0061" not in codes([whole], [beginning])
    assert "E-DATA-0061" in codes([whole], [{**beginning, "tools": [TOOL]}])


def test_a_conversation_of_many_turns(tmp_path: Path) -> None:
    """Were every beginning of it written out, this would never end."""
    rows = [turns(*[f"{n} {'x' * 50}" for n in range(20_000)]), *plain(3)]
    assert examine(rows, plain(3, start=9), near_rows=0).usable == 4
    split(rows, 0.4, 0, tmp_path, S)
