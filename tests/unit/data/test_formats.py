"""Each format: told by its shape, read into the same examples, and explicit about what is wrong where."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.formats import all_formats, choose, detect, formats
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Origin
from tests.doctor_files import write
from tests.tiny_tokenizers import chatml_tokenizer

ORIGIN = Origin("train.jsonl", 16, 17)
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def parse(row: dict[str, Any], text_field: str = "text") -> Example:
    return detect(row, ORIGIN, formats(text_field)).parse(row, ORIGIN)


def describe(row: dict[str, Any]) -> str:
    return detect(row, ORIGIN, formats()).describe(row)


def error(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(row)
    return caught.value


def test_alpaca() -> None:
    row = {"instruction": "Add.", "input": "1, 2", "output": "3", "id": 7}
    example = parse(row)
    assert example.prompt == [{"role": "user", "content": "Add.\n\n1, 2"}]
    assert example.completions == ([{"role": "assistant", "content": "3"}],)
    assert example.columns == {"id": 7}
    assert describe(row) == "read as Alpaca: columns `instruction`, `input`, `output`, as a conversation"
    assert parse({"instruction": "Add.", "input": None, "output": "3"}).prompt == [{"role": "user", "content": "Add."}]


def test_alpaca_with_system_and_history() -> None:
    row = {"instruction": "And 3?", "input": "", "output": "6", "system": "Add.", "history": [["1+2?", "3"]]}
    assert [(m["role"], m["content"]) for m in parse(row).prompt or []] == [
        ("system", "Add."),
        ("user", "1+2?"),
        ("assistant", "3"),
        ("user", "And 3?"),
    ]
    assert '"history[0]" is not a pair' in error({**row, "history": ["a"]}).message


def test_sharegpt_roles() -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}, {"from": "user", "value": "?"}]
    example = parse({"conversations": turns, "system": "Be kind."})
    assert example.prompt is None
    assert [m["role"] for m in example.completions[0]] == ["system", "user", "assistant", "user"]
    assert describe({"conversations": turns}) == "read as ShareGPT: column `conversations` with keys `from`, `value`"


def test_sharegpt_tool_calls_join_the_assistants_turn() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [
        {"from": "human", "value": "1+1?"},
        {"from": "gpt", "value": "Let me see."},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "function_call", "value": json.dumps({"name": "add", "arguments": '{"a": 2}'})},
        {"from": "observation", "value": "2"},
        {"from": "function_call", "value": json.dumps([call, call])},
    ]
    tools = [{"name": "add", "description": "adds", "parameters": {}}]
    example = parse({"conversations": turns, "tools": json.dumps(tools)})
    messages = example.completions[0]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "assistant"]
    first, last = messages[1], messages[3]
    assert first["content"] == "Let me see."
    assert [c["function"]["arguments"] for c in first["tool_calls"]] == [{"a": 1}, {"a": 2}]
    assert last["content"] == ""
    assert len(last["tool_calls"]) == 2
    assert example.tools == [{"type": "function", "function": tools[0]}]


def test_messages() -> None:
    row = {"messages": [USER, {**ASSISTANT, "name": None}], "label": "greeting"}
    example = parse(row)
    assert example.completions == ([USER, ASSISTANT],)
    assert example.columns == {"label": "greeting"}
    assert describe(row) == "read as messages: column `messages` with keys `role`, `content`"
    assert parse({"conversations": [USER, ASSISTANT]}).completions == ([USER, ASSISTANT],)
    assert parse({"messages": [{"role": "human", "content": "Hi"}, ASSISTANT]}).completions == ([USER, ASSISTANT],)


def test_template_arguments_and_tools() -> None:
    row = {"messages": [USER, ASSISTANT], "tools": "[]", "chat_template_kwargs": {"enable_thinking": False, "x": None}}
    example = parse(row)
    assert example.tools is None
    assert example.template_kwargs == {"enable_thinking": False}
    assert example.columns == {}
    assert error({**row, "tools": "{broken"}).code == "E-DATA-0015"
    assert '"chat_template_kwargs" is text' in error({**row, "chat_template_kwargs": "a"}).message


def weather(city: str) -> str:
    """The weather.

    Args:
        city: Where.
    """
    return city


def untyped(city):  # type: ignore[no-untyped-def]
    """The weather."""


def undescribed(city: str) -> None: ...


def elsewhere(city: Nowhere) -> str:  # type: ignore[name-defined]  # noqa: F821
    """The weather.

    Args:
        city: Where.
    """
    return ""


def test_tools_that_are_functions() -> None:
    row = {"messages": [USER, ASSISTANT]}
    assert parse({**row, "tools": [weather]}).tools == [weather]
    for tool, reason in ((untyped, "Argument city is missing a type hint"), (undescribed, "it has no docstring"),
                         (min, "no signature found"), (elsewhere, "name 'Nowhere' is not defined")):  # fmt: skip
        found = error({**row, "tools": [weather, tool]})
        assert found.code == "E-DATA-0011"
        assert '"tools[1]" is a function that cannot be described: ' in found.message
        assert reason in found.message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"city": "Par', "is not valid JSON: Unterminated string"),
        ("{'city': 'Paris'}", "is not valid JSON: Expecting property name"),
        ('{"x": NaN}', "is not valid JSON: NaN is no number of JSON's"),
        ('["Paris"]', "is a list, not an object"),
        ('"Paris"', "is text, not an object"),
        (["Paris"], "is a list, not an object"),
        (7, "is a number, not an object"),
    ],
)
def test_arguments_of_a_call_that_nobody_can_read(arguments: Any, says: str) -> None:
    function = {"name": "weather", "arguments": arguments}
    answer = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    found = error({"messages": [USER, answer]})
    assert found.code == "E-DATA-0015"
    assert f'"messages[1].tool_calls[0].function.arguments" {says}' in found.message
    assert (arguments if "is not valid" in says else json.dumps(arguments)) in found.message  # the value is shown
    bare = error({"prompt": [USER], "completion": [{**answer, "tool_calls": [function]}]})
    assert f'"completion[0].tool_calls[0].arguments" {says}' in bare.message
    pair = [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": json.dumps(function)}]
    turn = error({"conversations": pair})
    assert (turn.code, f'"conversations[1].value.arguments" {says}' in turn.message) == ("E-DATA-0015", True)


@pytest.mark.parametrize("arguments", [None, "", "{}", '{"city": "Paris"}', {"city": "Paris"}])
def test_arguments_as_they_are_written(arguments: Any) -> None:
    """Not changed: templates differ in whether they want an object or its text."""
    call = {"function": {"name": "weather", "arguments": arguments}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    assert parse({"messages": [USER, answer]}).completions == ([USER, answer],)


def test_prompt_completion() -> None:
    assert parse({"prompt": "2+2=", "completion": "4"}).completions == ("4",)
    example = parse({"prompt": [USER], "completion": [ASSISTANT]})
    assert (example.prompt, example.completions) == ([USER], ([ASSISTANT],))
    mixed = error({"prompt": "Hi", "completion": [ASSISTANT]})
    assert mixed.code == "E-DATA-0016"
    assert mixed.message.startswith('train.jsonl:17  "prompt" is text but `completion` is messages')


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "completion": " \n"},
        {"prompt": [USER], "completion": []},
        {"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]},
        {"instruction": "Add.", "output": ""},
    ],
)
def test_empty_completions_are_refused(row: dict[str, Any]) -> None:
    assert error(row).code == "E-DATA-0013"


def test_text() -> None:
    assert parse({"text": "abc", "n": 1}).completions == ("abc",)
    assert parse({"body": "abc"}, text_field="body").completions == ("abc",)
    assert error({"text": " "}).code == "E-DATA-0014"


def test_precedence_is_trls() -> None:
    assert "messages" in describe({"messages": [USER, ASSISTANT], "text": "a"})
    assert "prompt-completion" in describe({"messages": [USER], "prompt": "a", "completion": "b"})
    assert "messages" in describe({"messages": [USER, ASSISTANT], "prompt": "a"})
    assert "as text" in describe({"instruction": "a", "output": "b", "text": "c"})


def test_unknown_columns_are_named_with_a_way_out() -> None:
    found = error({"question": "1+1?", "answer": "2", "id": None})
    assert found.code == "E-DATA-0010"
    assert "columns `answer`, `question` are of no known format (null: `id`)" in found.message
    assert (found.hint or "").startswith(
        "rename question → prompt, answer → completion (--map question=prompt,answer=completion, or dataset.columns)"
    )
    assert "alpaca (`instruction`, `input`, `output`)" in (found.hint or "")
    with pytest.raises(DataError, match=r"text \(`body`\)"):
        parse({"text": "a"}, text_field="body")


TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
FILES: list[tuple[dict[str, Any], str, str]] = [
    ({"id": "1", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
     "question=instruction,response=output,system_prompt=system", "Alpaca"),
    ({"instruction": "Hi", "context": "", "response": "Hello", "category": "qa"},
     "context=input,response=output", "Alpaca"),
    ({"question": "Hi", "response_j": "Hello", "response_k": "Go", "qid": 1},
     "question=prompt,response_j=chosen,response_k=rejected", "preference pairs"),
    ({"question": "1+1?", "answer": "2"}, "question=prompt,answer=completion", "prompt-completion"),
    ({"prompt": "1+1?", "response": "2"}, "response=completion", "prompt-completion"),
    ({"instruction": "1+1?", "response": "2"}, "response=output", "Alpaca"),
    ({"input": "1+1?", "output": "2"}, "input=prompt,output=completion", "prompt-completion"),
    ({"conversation": TURNS}, "conversation=conversations", "ShareGPT"),
    ({"dialog": [USER, ASSISTANT]}, "dialog=messages", "messages"),
    ({"content": "abc"}, "content=text", "text"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "names", "read_as"), FILES)
def test_the_hint_works_as_it_stands(
    row: dict[str, Any], names: str, read_as: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path / "a.jsonl", [row]))
    assert main(["data", "check", path]) == 3
    (pasted,) = re.findall(r"\(--map (\S+), or", capsys.readouterr().out)
    assert pasted == names
    assert main(["data", "check", path, "--map", pasted, "--strict", "--near", "0"]) == 0
    assert f"read as {read_as}" in capsys.readouterr().out


@pytest.mark.parametrize("row", [{"question": 1, "answer": "2"}, {"question": "1+1?", "answer": "", "n": 1},
                                 {"context": "a", "answer": "b"}])  # fmt: skip
def test_no_hint_that_leads_nowhere(row: dict[str, Any]) -> None:
    assert "--map" not in (error(row).hint or "")


def test_pairs_that_supervised_training_would_not_read_under_their_names_either() -> None:
    found = error(FILES[2][0])
    assert "or dataset.columns); preference pairs: train them with DPO" in (found.hint or "")


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_an_empty_conversation_is_named(column: str) -> None:
    for named in ({}, {"format": "sharegpt"}):
        with pytest.raises(DataError, match=rf'"{column}" is an empty (conversation|list)') as caught:
            prepare([{column: [], "id": 3}], chatml_tokenizer(), DataSettings(**named))
        assert caught.value.code == "E-DATA-0011"


def test_images_are_not_supported() -> None:
    for named in ({}, {"format": "messages"}):
        row = {"messages": [USER, ASSISTANT], "image": "a.png"}
        with pytest.raises(DataError, match='"image" holds images, which are not supported') as caught:
            prepare([row], chatml_tokenizer(), DataSettings(**named))
        assert caught.value.code == "E-DATA-0018"
        assert "--map image=own_image" in (caught.value.hint or "")


def test_data_of_other_methods_is_refused() -> None:
    assert "DPO" in error({"conversations": [{"from": "human", "value": "a"}], "chosen": "b", "rejected": "c"}).message
    assert "GRPO" in (error({"prompt": "a"}).hint or "")
    assert "images" in error({"messages": [USER, ASSISTANT], "images": ["a.png"]}).message


@pytest.mark.parametrize(
    ("row", "field", "says"),
    [
        ({"messages": []}, "messages", "is an empty list"),
        ({"messages": [USER, "Hello"]}, "messages[1]", "is text, not a message"),
        ({"messages": [USER, {"content": "a"}]}, "messages[1]", "has no role"),
        ({"messages": [USER, {"role": "assistant"}]}, "messages[1].content", "is missing"),
        ({"messages": [USER, {"role": "assistant", "content": 4}]}, "messages[1].content", "is a number, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]},
            "messages[0].content[1]",
            "is of type image",
        ),
        ({"conversations": [{"from": "human"}]}, "conversations[0]", "lacks `from` or a text in `value`"),
        (
            {"conversations": [{"from": "function_call", "value": "add(1)"}]},
            "conversations[0].value",
            "is not valid JSON",
        ),
        ({"conversations": [{"from": "function_call", "value": "3"}]}, "conversations[0].value", "is no tool call"),
        ({"prompt": "a", "completion": 3}, "completion", "is a number, not text"),
    ],
)
def test_malformed_fields_are_named(row: dict[str, Any], field: str, says: str) -> None:
    assert error(row).message.startswith(f'train.jsonl:17  "{field}" {says}')


def test_a_mistyped_role_is_found_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    row = {"messages": [USER, {"role": "assitant", "content": "Hello" * 60}]}
    path.write_text('{"text": "a"}\n' + json.dumps(row) + "\n")
    (_, _), (origin, read) = read_rows(path)
    with pytest.raises(DataError) as caught:
        detect(read, origin, formats()).parse(read, origin)
    first, evidence, hint = str(caught.value).split("\n")
    column = json.dumps(row).index('"assitant"') + 1
    assert caught.value.code == "E-DATA-0012"
    assert first == f'{path}:2:{column}  "messages[1].role" is "assitant"'
    assert '"role": "assitant"' in evidence
    assert len(evidence) < 120
    fix = f"posttrain data fix {path} --rule rename-role:assitant=assistant"
    assert hint == f'  = did you mean "assistant"?  fix: {fix}'


def test_a_mistyped_role_in_an_array(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('[\n {"conversations": [\n   {"from": "humann", "value": "Hi"}\n ]}\n]')
    ((origin, read),) = read_rows(path)
    with pytest.raises(DataError, match=r'train.json:3:13  "conversations\[0\].from" is "humann"') as caught:
        detect(read, origin, formats()).parse(read, origin)
    assert caught.value.hint == f'did you mean "human"?  fix: posttrain data fix {path} --rule rename-role:humann=human'


def test_choosing_a_format_by_name() -> None:
    assert choose("auto", formats()) is None
    assert choose("alpaca", formats()) is formats()["alpaca"]
    with pytest.raises(ConfigError, match="did you mean 'sharegpt'"):
        choose("share-gpt", formats())


OASST = {"message_id": "b", "parent_id": "a", "user_id": "u", "text": "Hello", "role": "assistant", "lang": "en"}


@pytest.mark.parametrize(
    ("row", "says", "way_out"),
    [
        (OASST, '"role" is one message of a conversation (`role` and `text`)', "each path along `parent_id`"),
        ({**OASST, "parent_id": None, "role": "prompter"}, '"role" is one', "each path along `parent_id`"),
        (
            {"conversation_id": 7, "role": "user", "text": "Hi"},
            '"role" is one',
            "each conversation (`conversation_id`)",
        ),
        ({"role": "assistant", "content": "Hi"}, "(`role` and `content`)", "the rows of each conversation as one"),
        ({"from": "gpt", "value": "Hi"}, '"from" is one message', "the rows of each conversation as one"),
    ],
)
def test_a_message_in_a_row_is_no_text(row: dict[str, Any], says: str, way_out: str) -> None:
    for method in ("sft", "all"):
        known = formats() if method == "sft" else all_formats()
        with pytest.raises(DataError) as caught:
            detect(row, ORIGIN, known)
        assert caught.value.code == "E-DATA-0152"
        assert says in caught.value.message
        assert way_out in (caught.value.hint or "")
        assert ("--format text" in (caught.value.hint or "")) is ("text" in row)


def test_a_row_of_text_with_a_role_of_its_own() -> None:
    for row in ({"text": "Hi", "role": "editor"}, {"text": "Hi", "role": 3}, {"text": "Hi", "author": "Ann"}):
        assert detect(row, ORIGIN, formats()).parse(row, ORIGIN).completions == ("Hi",)
    for row in (
        {"prompt": "Hi", "completion": "Yes", "role": "user"},
        {"instruction": "a", "output": "b", "from": "gpt"},
    ):
        detect(row, ORIGIN, formats())
