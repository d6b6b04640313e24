"""Messages, calls, tools and flags however people write them: read as what they mean, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.columns import read_columns
from posttrain.data.doctor.check import check
from posttrain.data.formats import all_formats, detect
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError
from posttrain.types import Example, Origin
from tests.doctor_files import codes
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

ORIGIN = Origin("train.jsonl", 16, 17)
USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"name": "look", "arguments": '{"where": "up"}'}
CALLED = {"type": "function", "function": {"name": "look", "arguments": {"where": "up"}}}


def parse(row: dict[str, Any]) -> Example:
    row = read_columns(row, {}, ORIGIN)
    return detect(row, ORIGIN, all_formats()).parse(row, ORIGIN)


def error(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row)
    return caught.value


def last(answer: dict[str, Any]) -> dict[str, Any]:
    (messages,) = parse({"messages": [USER, {"role": "assistant", **answer}]}).completions
    assert isinstance(messages, list)
    return messages[-1]


# --- OpenAI's old function_call -------------------------------------------------------------------------------------


def test_a_function_call_is_a_tool_call() -> None:
    assert last({"content": None, "function_call": CALL}) == {"role": "assistant", "tool_calls": [CALLED]}
    assert last({"content": "See:", "function_call": json.dumps(CALL)})["tool_calls"] == [CALLED]
    assert last({"content": "No.", "function_call": None}) == {"role": "assistant", "content": "No."}
    assert "tool_calls" not in last({"content": "No.", "function_call": ""})
    turn = {"from": "gpt", "value": "", "function_call": CALL}
    (messages,) = parse({"conversations": [{"from": "human", "value": "Look!"}, turn]}).completions
    assert messages[-1]["tool_calls"] == [CALLED]  # type: ignore[index]


def test_a_function_call_is_trained() -> None:
    row = {"messages": [USER, {"role": "assistant", "content": None, "function_call": CALL}]}
    settings = DataSettings(assistant_only=True, chat_template="chatml")
    branch = prepare([row], chatml_tokenizer(), settings).samples[0][0].branches[0]
    assert '"name": "look"' in chatml_tokenizer().decode(branch.ids[branch.supervised])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({"arguments": "{}"}, '"messages[1].function_call" is no tool call'),
        ({**CALL, "arguments": "{"}, '"messages[1].function_call.arguments" is not valid JSON'),
        ("auto", '"messages[1].function_call" is not valid JSON'),
        (["look"], '"messages[1].function_call" is no tool call'),
    ],
)
def test_a_function_call_that_is_none(call: Any, says: str) -> None:
    found = error({"messages": [USER, {"role": "assistant", "content": "", "function_call": call}]})
    assert (found.code, says in found.message) == ("E-DATA-0015", True)


@pytest.mark.parametrize("role", ["user", "system", "tool"])
def test_only_an_assistant_calls_tools(role: str) -> None:
    for key, value in {"tool_calls": [CALLED], "function_call": CALL}.items():
        message = {"role": role, "content": "Look!", key: value}
        for row in ({"messages": [message, ANSWER]}, {"prompt": [message], "completion": [ANSWER]}):
            found = error(row)
            assert found.code == "E-DATA-0150"
            assert f'[0].{key}" stands in a message of role {role}, but only an assistant calls tools' in found.message
            assert "give the call to the assistant's message" in (found.hint or "")
    turns = [{"from": {"user": "human"}.get(role, role), "value": "Look!", "tool_calls": json.dumps([CALLED])}]
    assert error({"conversations": [*turns, {"from": "gpt", "value": "Yes"}]}).code == "E-DATA-0150"
    for empty in (None, [], "", "[]"):
        given = {"role": role, "content": "Look!", "tool_calls": empty}
        assert len(parse({"messages": [given, ANSWER]}).completions[0]) == 2


def test_a_function_call_beside_tool_calls_is_refused() -> None:
    both = {"role": "assistant", "content": "", "function_call": CALL, "tool_calls": [CALLED]}
    assert '"messages[1].function_call" stands beside `tool_calls`' in error({"messages": [USER, both]}).message


# --- keys that look like flags --------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["trian", "Train", "trains", "trainig", "weights", "wieght", "train_details",
                                 "loss", "mask", "trainable", "loss_weight", "loss_mask", "supervise",
                                 "Loss-Weight", "is_train", "no_train", "do_train", "train_turn", "ignore",
                                 "isTrain", "compute_loss"])  # fmt: skip
@pytest.mark.parametrize("shape", ["messages", "completion", "sharegpt", "call", "part"])
def test_what_looks_like_a_flag_is_refused(key: str, shape: str) -> None:
    answer, turn = {**ANSWER, key: False}, {"from": "gpt", "value": "Hello", key: False}
    call = {"from": "function_call", "value": json.dumps(CALL), key: False}
    part = {"type": "text", "text": "Hello", key: False}
    human = {"from": "human", "value": "Hi"}
    rows: dict[str, tuple[dict[str, Any], str]] = {
        "messages": ({"messages": [USER, answer]}, "messages[1]"),
        "completion": ({"prompt": [USER], "completion": [answer]}, "completion[0]"),
        "sharegpt": ({"conversations": [human, turn]}, "conversations[1]"),
        "call": ({"conversations": [human, call]}, "conversations[1]"),
        "part": ({"messages": [USER, {**ANSWER, "content": [part]}]}, "messages[1].content[0]"),
    }
    row, field = rows[shape]
    found = error(row)
    assert found.code == "E-DATA-0042"
    assert f'"{field}.{key}" is no key that posttrain knows' in found.message
    assert 'did you mean "' in (found.hint or "")


def test_a_flag_of_another_name_says_yes_or_no() -> None:
    for value in (True, 0, "no", " True"):
        assert error({"messages": [USER, {**ANSWER, "skip_train": value}]}).code == "E-DATA-0042"
    for value in ("7b-train", 3, ["a"], {}, None, 0.5):
        parse({"messages": [USER, {**ANSWER, "train_set": value}]})


@pytest.mark.parametrize(("value", "shown"), [("eight", "text ('eight')"), ("1", "text ('1')"), ([], "a list")])
def test_a_weight_that_is_no_number(value: Any, shown: str) -> None:
    found = error({"messages": [USER, {**ANSWER, "weight": value}]})
    assert found.code == "E-DATA-0042"
    assert f'"messages[1].weight" is {shown} and says neither true nor false' in found.message
    assert found.hint == "write true or false (1 or 0); a token cannot be trained by half"


def test_a_range_with_a_flag_misspelt() -> None:
    detail = [{"begin_offset": 0, "end_offset": 1, "trian": False}]
    assert (
        '"messages[1].train_detail[0].trian" is no key'
        in error({"messages": [USER, {**ANSWER, "train_detail": detail}]}).message
    )


@pytest.mark.parametrize("key", ["height", "brain", "emotion", "date", "trait", "score", "id", "masked_by"])
def test_other_keys_go_to_the_template(key: str) -> None:
    assert last({"content": "Hello", key: 3})[key] == 3
    assert last({"content": "Hello", "loss": None}) == ANSWER
    tokenizer = plain_tokenizer(template="{% for m in messages %}{{ m.content }}{{ m." + key + " }}</s>{% endfor %}")
    branch = prepare([{"messages": [USER, {**ANSWER, key: 77}]}], tokenizer, DataSettings()).samples[0][0].branches[0]
    assert tokenizer.decode(branch.ids) == "Hi</s>Hello77</s>"


# --- thoughts, parts, tools, history --------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_alone_says_something(key: str) -> None:
    assert last({"content": "", key: "They greet me."})[key] == "They greet me."
    assert codes([{"messages": [USER, {"role": "assistant", "content": "", key: "They greet me."}]}]) == []


@pytest.mark.parametrize(
    ("part", "code", "says"),
    [
        ({"text": "Hi"}, "E-DATA-0011", '"messages[0].content[0]" has no `type`'),
        ("Hi", "E-DATA-0011", '"messages[0].content[0]" is text, not a part'),
        ({"type": "image_url"}, "E-DATA-0018", '"messages[0].content[0]" is of type image_url'),
        ({"type": "text", "text": 3}, "E-DATA-0011", '"messages[0].content[0].text" is a number'),
    ],
)
def test_parts_that_are_none(part: Any, code: str, says: str) -> None:
    found = error({"messages": [{"role": "user", "content": [part]}, ANSWER]})
    assert (found.code, says in found.message) == (code, True)


def test_no_images_are_none() -> None:
    assert parse({"messages": [USER, ANSWER], "images": []}).completions == ([USER, ANSWER],)
    found = error({"messages": [USER, ANSWER], "images": ["a.png"]})
    assert found.code == "E-DATA-0018"
    assert found.message.startswith('train.jsonl:17  "images" holds images, which are not supported')


@pytest.mark.parametrize(
    ("tools", "says"),
    [
        ([1, 2], '"tools[0]" is a number, not a tool'),
        (["look"], '"tools[0]" is text, not a tool'),
        ([{"name": "look"}, {"description": "Looks"}], '"tools[1]" has no `name`'),
        ([{"type": "function", "function": {"parameters": {}}}], '"tools[0]" has no `name`'),
        ([{"type": "function", "function": "look"}], '"tools[0]" is an object, not a tool'),
        ({"name": "look"}, '"tools" is an object, not a list'),
        ('{"name": "look"}', '"tools" is an object, not a list'),
        (7, '"tools" is a number, not a list'),
    ],
)
def test_tools_that_are_none(tools: Any, says: str) -> None:
    found = error({"messages": [USER, ANSWER], "tools": tools})
    assert (found.code, says in found.message) == ("E-DATA-0011", True)
    assert '"name": "look"' in (found.hint or "")


def test_tools_as_they_are_written() -> None:
    def look(where: str) -> str:
        """Looks.

        Args:
            where: the direction
        """
        return where

    for tools in ([{"name": "look"}], [CALLED], [look]):
        assert parse({"messages": [USER, ANSWER], "tools": tools}).tools == tools


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"history": "none"}, "history", "is text, not a list of pairs"),
        ({"history": [["a"]]}, "history[0]", "is not a pair of texts"),
        ({"history": [["a", "b"], ["c", 4]]}, "history[1]", "is not a pair of texts"),
        ({"history": [["a", None]]}, "history[0]", "is not a pair of texts"),
        ({"history": [{"user": "a"}]}, "history[0]", "is not a pair of texts"),
        ({"history": {"a": "b"}}, "history", "is an object, not a list of pairs"),
        ({"system": ["Be kind."]}, "system", "is a list, not text"),
        ({"system": 5}, "system", "is a number, not text"),
        ({"input": ["a"]}, "input", "is a list, not text"),
    ],
)
def test_columns_of_alpaca_that_are_none(row: dict[str, Any], field: str, says: str) -> None:
    found = error({"instruction": "Add.", "output": "3", **row})
    assert (found.code, found.message.startswith(f'train.jsonl:17  "{field}" {says}')) == ("E-DATA-0011", True)


# --- where it is ----------------------------------------------------------------------------------------------------

PLACES: list[tuple[str, str, str]] = [
    ('{"prompt": "NaN?", "score": NaN}', ":1:29", '"score": NaN is not JSON'),
    ('{"a": [1, {"b": 2}, -Infinity]}', ":1:21", '"a[2]": -Infinity is not JSON'),
    ('{"a": {"b": [1e999]}}', ":1:14", '"a.b[0]": 1e999 is read as infinity'),
    ('{"messages": [{"role": "user"}, {"role": "a", "x": "role", "role": "b"}]}', ":1:60",
     '"messages[1].role": the key "role" stands twice'),
    ('{"a": 1, "n": ' + "7" * 5000 + "}", ":1:15", '"n": a number has more digits than can be read'),
]  # fmt: skip


@pytest.mark.parametrize(("line", "where", "says"), PLACES)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_what_no_parser_reads_is_named_by_its_field(
    line: str, where: str, says: str, suffix: str, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_text(line if suffix == "jsonl" else f"[\n{line},\n" + '{"text": "a"}]')
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    place = where if suffix == "jsonl" else where.replace(":1:", ":2:")
    assert caught.value.message.startswith(f"{path}{place}  {says}")


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [USER, {**ANSWER, "content": "a\ud83d"}]}, "messages[1].content"),
        ({"instruction": "Hi", "output": "\ud83d"}, "output"),
        ({"prompt": "a", "completion": "b\udc00"}, "completion"),
    ],
)
def test_half_a_character_is_named_by_its_field(row: dict[str, Any], field: str) -> None:
    with pytest.raises(DataError, match="holds half a character") as caught:
        prepare([row], chatml_tokenizer(), DataSettings())
    assert caught.value.message.startswith(f'train[0]  "{field}" holds')
    (bad,) = check([row]).bad_rows
    assert str(bad["message"]).startswith(f'data[0]  "{field}" holds')


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": ""},
        {"text": " "},
        {"messages": [USER, {**ANSWER, "content": ""}]},
    ],
)
def test_the_way_on_is_named(row: dict[str, Any]) -> None:
    assert "on_bad_row=skip" in (error(row).hint or "")


@pytest.mark.parametrize("key", ["text", "contents", "value", "Content"])
@pytest.mark.parametrize("role", ["user", "assistant", "system", "tool"])
def test_words_under_another_key(role: str, key: str) -> None:
    """A question that no template would see."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    broken = {"role": role, key: "What is 2+2?"}
    found = error({"messages": [broken, *messages]})
    assert found.code == "E-DATA-0011"
    assert '"messages[0].content" is missing' in found.message
    assert f'call it "content" if `{key}` is what is said' in str(found.hint)


def test_calls_and_thoughts_need_no_words() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {}}}]}
    rest = [{"role": "tool", "content": "noon"}, {"role": "assistant", "reasoning_content": "It is noon."}]
    assert len(parse({"messages": [{"role": "user", "content": "Time?"}, call, *rest]}).completions[0]) == 4
    assert error({"messages": [{"role": "user", "name": "Ann"}, call]}).code == "E-DATA-0011"


def test_what_was_called_in_the_old_way_is_answered_in_the_new_one() -> None:
    turns = [
        {"role": "user", "content": "Time?"},
        {"role": "assistant", "content": None, "function_call": {"name": "now", "arguments": "{}"}},
        {"role": "function", "name": "now", "content": "noon"},
        {"role": "assistant", "content": "It is noon."},
    ]
    roles = [message["role"] for message in parse({"messages": turns}).completions[0] if isinstance(message, dict)]
    assert roles == ["user", "assistant", "tool", "assistant"]
