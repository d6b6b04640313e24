"""Masks of generated conversations of every kind, with every template of the library: system messages, calls and what
tools say, thoughts, empty turns, Unicode, and templates' own text within what is said.

What is expected is found in another way than the library does it: transformers renders the beginnings of the
conversation, and what a template writes after an answer is known (test_template_library.py).
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.templates import TEMPLATES, resolve_template, without_markers
from tests.unit.data.test_template_library import AROUND, NAMES, NO_SYSTEM, TOOLS, TRIMS, run, tokenizer_of

DATE = {"date_string": "1 May 2026"}
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
SPECIALS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "</s>", "{{ x }}", "{% generation %}", "[/INST] a", "<end_of_turn>\n",
     "### Response:\n", "ASSISTANT:", "<tool_call>", "🙂", "é", "\n\n", "日本語", "\u202e", "e\u0301"]
)  # fmt: skip
SAID = st.lists(st.one_of(WORDS, SPECIALS), min_size=1, max_size=4).map(" ".join).filter(str.strip)
ASKED = st.one_of(st.just(""), SAID)
THOUGHT = st.lists(st.sampled_from(["Why", "two", "é", "日本", "so."]), min_size=1, max_size=4).map(" ".join)


@st.composite
def conversations(draw: st.DrawFn, name: str) -> list[dict[str, Any]]:
    entry = TEMPLATES[name]
    messages: list[dict[str, Any]] = []
    if name not in NO_SYSTEM and draw(st.booleans()):
        messages.append({"role": "system", "content": draw(SAID)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(ASKED)})
        if entry.tools and draw(st.booleans()):
            arguments = {"a": draw(st.one_of(st.integers(), st.sampled_from(["é", "b c", "日本"])))}
            call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
            messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
            messages.append({"role": "tool", "content": draw(st.sampled_from(["2", '{"a": 1}', "[]"]))})
        answer: dict[str, Any] = {"role": "assistant", "content": draw(SAID)}
        if entry.thinks and draw(st.booleans()):
            answer["reasoning_content"] = draw(THOUGHT)
        messages.append(answer)
    return messages


def mask(name: str, tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], ids: list[int]) -> list[bool]:
    """Which tokens the assistant says."""
    template, tools = resolve_template(tokenizer, name), tools_of(messages)

    def text(upto: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto],
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                **DATE,
            )
        )

    full = text(len(messages))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == ids
    inside, last, _ = AROUND[name]
    said, end = [False] * len(full), 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        content = message["content"].strip() if name in TRIMS else message["content"]
        ending = last if i + 1 == len(messages) else inside
        given_text = text(i, prompt=True)
        if not full.startswith(given_text):  # an open thought, which turns but the last do not have
            given_text = given_text.removesuffix("<think>\n")
        if full.startswith(given_text):
            start = len(given_text)
        else:  # thoughts before a call, which go with the next question: what is left is the content
            assert name == "deepseek-r1"
            start = full.index("<｜tool▁outputs▁end｜>" + content + ending, end) + len("<｜tool▁outputs▁end｜>")
        if message.get("tool_calls"):
            end = full.index(ending.strip(" "), start) + len(ending.strip(" "))
        else:
            body = content.lstrip("\n") + ending  # which is what follows a thought
            end = full.index(body, start) + len(body)
        said[start:end] = [True] * (end - start)
    return [any(said[a:b]) for a, b in encoded["offset_mapping"]]


def tools_of(messages: list[dict[str, Any]]) -> list[Any] | None:
    return TOOLS if any("tool_calls" in message for message in messages) else None


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_masks(name: str, data: st.DataObject) -> None:
    messages = data.draw(conversations(name))
    tokenizer = tokenizer_of(name)
    row = {"messages": messages, "tools": tools_of(messages), "chat_template_kwargs": DATE}
    branch = run(name, row, tokenizer).samples[0][0].branches[0]
    assert branch.supervised.tolist() == mask(name, tokenizer, messages, branch.ids.tolist())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_masks_without_markers(name: str, data: st.DataObject) -> None:
    """A model's own template, in the sandbox, found by prefixes: the same."""
    messages = data.draw(conversations(name))
    tokenizer = tokenizer_of(name)
    row = {"messages": messages, "tools": tools_of(messages), "chat_template_kwargs": DATE}
    own = without_markers(resolve_template(tokenizer, name) or "") + "{#- mine -#}"
    chosen = DataSettings(assistant_only=True, chat_template=own)
    branch = prepare([row], tokenizer, chosen).samples[0][0].branches[0]
    assert branch.supervised.tolist() == mask(name, tokenizer, messages, branch.ids.tolist())
