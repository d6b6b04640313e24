"""Templates are rendered as transformers renders them, and the named ones write what the models' own templates write.

The models' own are those that TRL carries.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from posttrain.data.chat import Chat
from posttrain.data.prepare import prepare
from posttrain.data.rendering import RenderError
from posttrain.data.settings import DataSettings
from posttrain.data.templates import resolve_template
from posttrain.errors import DataError
from posttrain.types import Example, Origin
from tests.tiny_tokenizers import SPECIAL, plain_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.parity

FOLDER = Path(trl.__file__).parent / "chat_templates"
FILES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "  Größe 🙂 <b>'quoted'</b>\n\nand more "},
    {"role": "assistant", "content": ' A \\ "long"\nanswer. '},
]
THOUGHT = [*TURNS[:3], {**TURNS[3], "reasoning_content": "Let me see."}]
ARGUMENTS = {"a": 1, "b": "it's\n2", "c": [1, {"d": None}], "e": True}
CALL = {"type": "function", "function": {"name": "add", "arguments": ARGUMENTS}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <x>", "parameters": {"type": "object"}}}]
CALLS = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "ü 2"},
    TURNS[3],
]
CASES: dict[str, tuple[list[dict[str, Any]], list[Any] | None, dict[str, Any]]] = {
    "turns": (TURNS, None, {}),
    "system": ([SYSTEM, *TURNS], None, {}),
    "thought": (THOUGHT, None, {}),
    "no thinking": (TURNS, None, {"enable_thinking": False}),
    "tools": ([SYSTEM, *CALLS], TOOLS, {}),
    "tools, none called": (TURNS, TOOLS, {}),
}


def tokenizer_for(text: str, template: str | None = None) -> PreTrainedTokenizerBase:
    """With the special tokens that occur in `text`."""
    found = re.findall(r"<\|[a-zA-Z_]+\|>|<[a-z_]+of_turn>|<｜[^｜]+｜>", text)
    tokens = tuple(dict.fromkeys(token for token in found if token not in SPECIAL))
    return plain_tokenizer(extra=tokens, template=template or text)


def theirs(tokenizer: PreTrainedTokenizerBase, template: str, case: str, prompt: bool) -> str | None:
    messages, tools, kwargs = copy.deepcopy(CASES[case])
    try:
        text = tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt, **kwargs
        )
    except Exception:  # a template may refuse tools or a system message in its own way
        return None
    return str(text)


def ours(chat: Chat, case: str, prompt: bool) -> str | None:
    messages, tools, kwargs = copy.deepcopy(CASES[case])
    example = Example(None, (messages,), Origin("test", 0), tools, kwargs)
    try:
        return chat.render(messages, example, prompt)
    except RenderError:
        return None


@pytest.mark.parametrize("name", FILES)
def test_rendered_as_transformers_does(name: str) -> None:
    template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    tokenizer = tokenizer_for(template)
    chat = Chat(tokenizer, None)
    rendered = 0
    for case in CASES:
        for prompt in (False, True):
            expected, found = theirs(tokenizer, template, case, prompt), ours(chat, case, prompt)
            if chat._shape(template) == "parts":  # they see text in a list, as it is given in use
                continue
            assert found == expected, case
            rendered += found is not None
    assert rendered or chat._shape(template) == "parts"


SAME = {  # ours: the model's own, and the cases in which ours says another thing on purpose
    "gemma": ("gemma", ()),
    "gemma-3": ("gemma3", ()),
    "phi-3": ("phi3", ("tools", "tools, none called")),  # has no tools: ours refuses their results
    "llama-3": ("llama3", ("tools", "tools, none called")),
    "llama-3.1": ("llama3_1", ()),
    "qwen-2.5": ("qwen2_5", ()),
    "qwen-3": ("qwen3", ()),
    "lfm2": ("lfm2_v2", ()),
    "command-r": ("cohere", ("tools", "tools, none called")),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_text_as_the_models_own_template(name: str) -> None:
    own, but = SAME[name]
    template = (FOLDER / f"{own}.jinja").read_text("utf-8")
    tokenizer = tokenizer_for(template)
    chat = Chat(tokenizer, resolve_template(tokenizer, name))
    rendered = 0
    for case in CASES:
        for prompt in (False, True):
            expected = theirs(tokenizer, template, case, prompt)
            if case not in but:
                assert ours(chat, case, prompt) == expected, case
                rendered += expected is not None
    assert rendered >= 4


def test_deepseek_r1_asks_as_the_models_own_does() -> None:
    template = (FOLDER / "deepseek_r1_distill.jinja").read_text("utf-8")
    tokenizer = tokenizer_for(template + "<｜end▁of▁sentence｜>", template)
    chat = Chat(tokenizer, resolve_template(tokenizer, "deepseek-r1"))
    for messages in (TURNS[:1], TURNS[:3], [SYSTEM, *TURNS[:3]]):
        example = Example(None, (messages,), Origin("test", 0))
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert chat.render(messages, example, True) == expected


@pytest.mark.parametrize("name", [name for name in FILES if not name.endswith("_training")])
def test_no_template_is_masked_in_silence(name: str) -> None:
    """Each answer is one run of trained tokens that holds it and ends with a token, or the row is an error."""
    template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    tokenizer = tokenizer_for(template)
    masked, refused = 0, set()
    for messages, tools, kwargs in copy.deepcopy(list(CASES.values())):
        row = {"messages": messages, "chat_template_kwargs": kwargs, **({"tools": tools} if tools else {})}
        try:
            prepared = prepare([row], tokenizer, DataSettings(assistant_only=True))
        except DataError as error:
            refused.add(error.code)
            continue
        branch = prepared.samples[0][0].branches[0]
        edges = np.flatnonzero(np.diff(np.concatenate([[0], branch.supervised.astype(int), [0]])))
        runs = [tokenizer.decode(branch.ids[start:end]) for start, end in edges.reshape(-1, 2)]
        turns = [message for message in messages if message["role"] == "assistant"]
        assert len(runs) == len(turns)
        for run, turn in zip(runs, turns, strict=True):
            assert turn["content"].strip() in run
            assert run.rstrip().endswith(">") or prepared.report.endless.count  # GLM stops where the user speaks
            assert "quoted" not in run
        masked += 1
    assert masked >= 3
    assert refused <= {"E-DATA-0020", "E-DATA-0023"}


PIECES = (
    "<|im_end|>", "</s>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<|im_start|>assistant\n", "{{ x }}", "<think>",
    "hello there", "🙂", "é\n", "  a ", "\n\n", "model\n",
)  # fmt: skip


@pytest.mark.parametrize("name", ["qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "lfm2_v2", "cohere"])
@settings(max_examples=25, deadline=None)
@given(
    contents=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map(" ".join), min_size=1, max_size=3)
)
def test_what_is_found_is_what_trl_marks_whatever_is_said(name: str, contents: list[str]) -> None:
    messages = [
        {"role": role, "content": content if role == "assistant" else content[::-1] + "?"}
        for content in contents
        for role in ("user", "assistant")
    ]
    if not all(message["content"].strip() for message in messages):
        return
    own = (FOLDER / f"{name}.jinja").read_text("utf-8")
    marked = (FOLDER / f"{name}_training.jinja").read_text("utf-8")
    found = []
    for template in (own, marked):
        tokenizer = tokenizer_for(own + "<|end|><|eot_id|><end_of_turn>", template)
        options = DataSettings(assistant_only=True)
        found.append(prepare([{"messages": messages}], tokenizer, options).samples[0][0].branches[0])
    assert found[0].ids.tolist() == found[1].ids.tolist()
    assert found[0].supervised.tolist() == found[1].supervised.tolist()
