"""Whatever a row holds, it is trained on or there is a complaint about it that says where; never anything else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prepare import DataSettings, prepare
from posttrain.errors import DataError, UserError
from tests.tiny_tokenizers import chatml_tokenizer

TOKENIZER = chatml_tokenizer()
COLUMNS = (
    "messages", "conversations", "prompt", "completion", "text", "instruction", "input", "output", "system", "history",
    "tools", "chat_template_kwargs", "input_ids", "labels", "completion_mask", "assistant_masks", "chosen", "label",
)  # fmt: skip
KEYS = ("role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text", "train",
        "weight", "train_detail", "reasoning_content")  # fmt: skip
WORDS = ("user", "assistant", "system", "human", "gpt", "function_call", "observation", "text", "", " ", "\ud800", "{}",
         '{"name": "f"}', "<|im_end|>", "x")  # fmt: skip
plain = st.one_of(st.none(), st.booleans(), st.integers(-3, 9), st.floats(), st.sampled_from(WORDS))
values = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
)
rows = st.dictionaries(st.sampled_from(COLUMNS), values, min_size=1, max_size=4)


@settings(max_examples=1500, deadline=None)
@given(rows)
def test_any_row(row: dict[str, Any]) -> None:
    for more in ({}, {"assistant_only": None, "chat_template": "chatml"}, {"format": "sharegpt"}):
        error = complaint(row, DataSettings(**more))
        if error is not None:
            assert "train[0]" in str(error) or error.code in ("E-DATA-0001", "E-DATA-0031"), error
            assert error.code != "E-DATA-0026", error  # the net is there for what nobody foresaw


def complaint(row: dict[str, Any], settings: DataSettings) -> UserError | None:
    try:
        prepare([row], TOKENIZER, settings)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize(
    ("row", "code", "field"),
    [
        ({"messages": [{"role": ["user"], "content": "x"}]}, "E-DATA-0012", "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": ""}]}, "E-DATA-0013", "messages[0]"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " \n"}]}, "E-DATA-0013",
         "messages[1]"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": ""}]}, "E-DATA-0013",
         "conversations[1]"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "",
          "name": "x"}]}, "E-DATA-0013", "completion"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": "abc"}]}, "E-DATA-0015",
         "messages[0].tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": "abc"}]}]}, "E-DATA-0015",
         "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "E-DATA-0011",
         "messages[0].content[0].text"),
        ({"instruction": "Double it", "input": 21, "output": "42"}, "E-DATA-0011", "input"),
        ({"instruction": "a", "output": "b", "history": 5}, "E-DATA-0011", "history"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "system": 5}, "E-DATA-0011", "system"),
        ({"input_ids": 5}, "E-DATA-0025", "input_ids"),
        ({"input_ids": [1, 2], "labels": 5}, "E-DATA-0025", "labels"),
    ],
)  # fmt: skip
def test_mistakes_are_named(row: dict[str, Any], code: str, field: str) -> None:
    with pytest.raises(DataError) as caught:
        prepare([row], TOKENIZER, DataSettings())
    assert caught.value.code == code, caught.value
    assert f'"{field}"' in str(caught.value)


def test_what_an_assistant_leaves_out_may_stay_untrained() -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "train": False},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "d"}]},
    ]
    sample = prepare([{"messages": messages}], TOKENIZER, DataSettings(assistant_only=None)).samples[0][0]
    branch = sample.branches[0]
    assert TOKENIZER.decode(branch.ids[branch.supervised]).startswith("cd")
    assert json.dumps(messages)  # and the row is as it was
