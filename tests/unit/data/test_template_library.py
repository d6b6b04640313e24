"""The named templates: what each writes, which tokens of it are trained, and whether a model would learn to stop.

The masks are computed here once more, in another way: from what transformers' own `apply_chat_template` renders for
prefixes of the conversation, and from what each template is known to write after an answer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from posttrain.data.prepare import Prepared, prepare
from posttrain.data.settings import DataSettings
from posttrain.data.templates import (
    ALIASES,
    TEMPLATES,
    end_tokens,
    find_template,
    is_ours,
    resolve_template,
    template_text,
    without_markers,
)
from posttrain.data.templates.table import EOS
from posttrain.errors import ConfigError, DataError
from tests.tiny_tokenizers import SPECIAL, plain_tokenizer

NAMES = list(TEMPLATES)
SYSTEM = {"role": "system", "content": "You are a helpful assistant"}
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
    {"role": "assistant", "content": "I am an assistant"},
]
QUESTION = {"role": "user", "content": "Another question"}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds", "parameters": {"type": "object"}}}]
CALLING = [
    {"role": "user", "content": "Add one."},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "Two."},
]
# What follows an answer inside a conversation, what follows the last one, and what stands before an answer.
AROUND: dict[str, tuple[str, str, str]] = {
    "chatml": ("<|im_end|>\n", "<|im_end|>\n", ""),
    "alpaca": ("</s>\n\n", "</s>\n\n", ""),
    "llama-2": (" </s>", " </s>", " "),
    "llama-3": ("<|eot_id|>", "<|eot_id|>", ""),
    "llama-3.1": ("<|eot_id|>", "<|eot_id|>", ""),
    "gemma": ("<end_of_turn>\n", "<end_of_turn>\n", ""),
    "gemma-3": ("<end_of_turn>\n", "<end_of_turn>\n", ""),
    "qwen-2.5": ("<|im_end|>\n", "<|im_end|>\n", ""),
    "qwen-3": ("<|im_end|>\n", "<|im_end|>\n", ""),
    "mistral": ("</s>", "</s>", " "),
    "mistral-nemo": ("</s>", "</s>", ""),
    "mistral-small": ("</s>", "</s>", ""),
    "phi-3": ("<|end|>\n", "<|end|>\n</s>", ""),
    "phi-4": ("<|im_end|>", "<|im_end|>", ""),
    "phi-4-mini": ("<|end|>", "<|end|></s>", ""),
    "lfm2": ("<|im_end|>\n", "<|im_end|>\n", ""),
    "zephyr": ("</s>\n", "</s>\n", ""),
    "vicuna": ("</s>", "</s>", " "),
    "smollm2": ("<|im_end|>\n", "<|im_end|>\n", ""),
    "smollm3": ("<|im_end|>\n", "<|im_end|>\n", ""),
    "granite-3": ("<|end_of_text|>\n", "<|end_of_text|>\n", ""),
    "command-r": ("<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", ""),
    "deepseek-r1": ("<｜end▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ""),
    "tulu": ("</s>", "</s>", ""),
    "openchat": ("<|end_of_turn|>", "<|end_of_turn|>", " "),
    "nemotron-mini": ("</s>\n", "</s>\n", ""),
}
LAST_THOUGHT = {"qwen-3": "<think>\n\n</think>\n\n", "deepseek-r1": "\n</think>\n\n"}
TRIMS = ("llama-2", "llama-3", "llama-3.1", "gemma", "gemma-3", "mistral", "command-r", "nemotron-mini")
NO_SYSTEM = [name for name in NAMES if not TEMPLATES[name].system]
WITH_TOOLS = [name for name in NAMES if TEMPLATES[name].tools]


def tokenizer_of(name: str, bos: bool = False) -> PreTrainedTokenizerBase:
    """One that has the tokens of the template called `name`."""
    entry = TEMPLATES[name]
    tokens = dict.fromkeys(token for token in (*entry.ends, *entry.tokens) if token != EOS and token not in SPECIAL)
    return plain_tokenizer(bos=bos, extra=tuple(tokens))


def run(name: str, row: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None, **kwargs: Any) -> Prepared:
    options = {"assistant_only": True, "chat_template": name, **kwargs}
    return prepare([row], tokenizer or tokenizer_of(name), DataSettings(**options))


def trained(name: str, row: dict[str, Any], **kwargs: Any) -> list[str]:
    """The runs of supervised tokens, decoded."""
    tokenizer = tokenizer_of(name)
    branch = run(name, row, tokenizer, **kwargs).samples[0][0].branches[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], branch.supervised.astype(int), [0]])))
    return [tokenizer.decode(branch.ids[start:end]) for start, end in edges.reshape(-1, 2)]


def answers(name: str, *contents: str) -> list[str]:
    """What is trained of these answers."""
    inside, last, before = AROUND[name]
    texts = [before + content + inside for content in contents[:-1]]
    return [*texts, LAST_THOUGHT.get(name, "") + before + contents[-1] + last]


def test_there_are_twenty_and_each_has_a_file() -> None:
    assert len(NAMES) >= 20
    assert set(NAMES) == set(AROUND)
    assert all(template_text(name) for name in NAMES)
    assert set(ALIASES.values()) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_turns(name: str) -> None:
    assert trained(name, {"messages": TURNS}) == answers(name, "Hi there", "I am an assistant")


@pytest.mark.parametrize("name", NAMES)
def test_system(name: str) -> None:
    row = {"messages": [SYSTEM, *TURNS]}
    if name in NO_SYSTEM:
        with pytest.raises(DataError, match="no system role") as caught:
            run(name, row)
        assert caught.value.code == "E-DATA-0020"
        return
    assert trained(name, row) == answers(name, "Hi there", "I am an assistant")
    branch = run(name, row).samples[0][0].branches[0]
    assert "You are a helpful assistant" in tokenizer_of(name).decode(branch.ids[~branch.supervised])


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tools(name: str) -> None:
    call, answer = trained(name, {"messages": CALLING, "tools": TOOLS})
    assert "add" in call
    assert "1" in call
    expected = answers(name, "", "Two.")
    assert call.endswith(expected[0].strip(" "))
    if name == "deepseek-r1":  # it has thought before the call
        expected[1] = expected[1].removeprefix("\n</think>\n\n")
    assert answer == expected[1]
    prepared = run(name, {"messages": CALLING, "tools": TOOLS})
    branch = prepared.samples[0][0].branches[0]
    given = tokenizer_of(name).decode(branch.ids[~branch.supervised])
    assert ('"Adds"' in given) == (name != "deepseek-r1")  # the model was never shown what tools there are
    assert prepared.report.tools_left_out.count == (name == "deepseek-r1")
    assert "2" in given


ARGUMENTS = [
    {"a": 1},
    {},
    {"city": 'Zürich "Mitte"', "days": [1, 2.0], "deep": {"x": None, "y": True}, "path": "C:\\new\nline", "n": 1e30},
]


def calling(arguments: Any, is_bare: bool) -> dict[str, Any]:
    function = {"name": "add", "arguments": arguments}
    call = function if is_bare else {"type": "function", "id": "call12345", "function": function}
    return {"messages": [CALLING[0], {**CALLING[1], "tool_calls": [call]}, *CALLING[2:]], "tools": TOOLS}


@pytest.mark.parametrize("is_bare", [False, True])
@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("name", WITH_TOOLS)
def test_arguments_as_text_are_written_as_the_equal_object(name: str, arguments: dict[str, Any], is_bare: bool) -> None:
    tokenizer = tokenizer_of(name)
    expected = run(name, calling(arguments, is_bare), tokenizer).samples[0][0].branches[0]
    text = tokenizer.decode(expected.ids)
    assert (json.dumps(arguments, ensure_ascii=False) in text) == (name != "lfm2")  # which writes Python
    compact, indented = json.dumps(arguments, separators=(",", ":")), json.dumps(arguments, indent=2)
    for written in (
        compact,
        indented,
        json.dumps(arguments, ensure_ascii=False),
        *(("", " ") if not arguments else ()),
    ):
        prepared = run(name, calling(written, is_bare), tokenizer)
        found = prepared.samples[0][0].branches[0]
        assert tokenizer.decode(found.ids) == text
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.supervised, expected.supervised)
        assert prepared.report.arguments_quoted.count == 0


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_arguments_as_text_when_the_template_is_saved_with_the_model(name: str) -> None:
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = without_markers(resolve_template(tokenizer, name) or "")
    of_object, of_text = (
        prepare([calling(arguments, False)], tokenizer, DataSettings(assistant_only=True)).samples[0][0].branches[0]
        for arguments in ({"a": 1}, '{"a":1}')
    )
    np.testing.assert_array_equal(of_text.ids, of_object.ids)


OWN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ ARGUMENTS }}{% endfor %}<|im_end|>\n{% endfor %}"
)
AGAIN, AS_IT_IS = "call.function | tojson", "call.function.name + ' ' + call.function.arguments"


@pytest.mark.parametrize(
    ("template", "arguments", "count"),
    [
        (AGAIN, '{"city": "Paris"}', 1),
        (AGAIN, "{}", 1),
        (AGAIN, '{"city": "Zürich"}', 1),
        (AGAIN, {"city": "Paris"}, 0),
        (AGAIN, "", 0),
        (AGAIN.replace("tojson", "tojson(ensure_ascii=True)"), '{"city": "Zürich"}', 1),
        (AS_IT_IS, '{"city": "Paris"}', 0),  # an object would break it
        (AS_IT_IS.replace("arguments", "arguments | string"), '{"city": "Paris"}', 0),
    ],
)
def test_another_template_is_given_what_the_row_holds(template: str, arguments: Any, count: int) -> None:
    tokenizer = plain_tokenizer(template=OWN.replace("ARGUMENTS", template))
    row = {"messages": calling(arguments, False)["messages"]}
    prepared = prepare([row], tokenizer, DataSettings())
    ids = tokenizer.apply_chat_template(row["messages"], tokenize=True, return_dict=True)["input_ids"]
    assert prepared.samples[0][0].branches[0].ids.tolist() == ids
    assert prepared.report.arguments_quoted.count == count
    assert any("writes as JSON once more" in note for note in prepared.report.notes()) == bool(count)


def test_quotes_that_stand_in_the_text_anyway_are_no_second_time() -> None:
    either = "given if given is string else given | tojson"
    template = OWN.replace(
        "ARGUMENTS", "call.function.name + (" + either.replace("given", "call.function.arguments") + ")"
    )
    tokenizer = plain_tokenizer(template=template)
    messages = calling("{}", False)["messages"]
    said = [{"role": "user", "content": 'Is "{}" a text?'}, *messages[1:]]
    assert prepare([{"messages": said}], tokenizer, DataSettings()).report.arguments_quoted.count == 0


@pytest.mark.parametrize("name", [name for name in NAMES if not TEMPLATES[name].tools])
def test_without_tools(name: str) -> None:
    with pytest.raises(DataError) as caught:
        run(name, {"messages": CALLING, "tools": TOOLS})
    assert caught.value.code in ("E-DATA-0020", "E-DATA-0023")


@pytest.mark.parametrize(
    ("name", "runs"),
    [
        ("qwen-3", ["Hi there<|im_end|>\n", "<think>\nSecond.\n</think>\n\nI am an assistant<|im_end|>\n"]),
        (
            "smollm3",
            [
                "<think>\nFirst.\n</think>\nHi there<|im_end|>\n",
                "<think>\nSecond.\n</think>\nI am an assistant<|im_end|>\n",
            ],
        ),
        (
            "deepseek-r1",
            ["Hi there<｜end▁of▁sentence｜>", "Second.\n</think>\n\nI am an assistant<｜end▁of▁sentence｜>"],
        ),
    ],
)
def test_thoughts(name: str, runs: list[str]) -> None:
    first, second = {**TURNS[1], "reasoning_content": "First."}, {**TURNS[3], "reasoning_content": "Second."}
    turns = [TURNS[0], first, TURNS[2], second]
    assert trained(name, {"messages": turns}) == runs
    prepared = run(name, {"messages": turns})
    assert prepared.report.thought_lost.count == (name != "smollm3")
    written = [
        {**turn, "content": f"<think>\n{turn['reasoning_content']}\n</think>\n\n{turn['content']}"} if i % 2 else turn
        for i, turn in enumerate(turns)
    ]
    for turn in written:
        turn.pop("reasoning_content", None)
    assert trained(name, {"messages": written})[-1].replace("\n\n", "\n") == runs[-1].replace("\n\n", "\n")


def test_thoughts_that_a_template_leaves_out_are_counted() -> None:
    report = run("chatml", {"messages": [TURNS[0], {**TURNS[1], "reasoning_content": "Why?"}]}).report
    assert report.thought_lost.count == 1
    assert "hold thoughts that the chat template leaves out" in report.notes()[-1]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_learns_to_stop(name: str) -> None:
    for messages in (TURNS, TURNS[:2]):
        assert run(name, {"messages": messages}).report.endless.count == 0
    (end, *_) = end_tokens(tokenizer_of(name), name)
    branch = run(name, {"messages": TURNS}).samples[0][0].branches[0]
    assert tokenizer_of(name).convert_tokens_to_ids(end) in branch.ids[branch.supervised]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bos", [False, True])
def test_one_beginning_of_sequence_at_most(name: str, bos: bool) -> None:
    tokenizer = tokenizer_of(name, bos)
    prepared = run(name, {"messages": TURNS}, tokenizer)
    ids = prepared.samples[0][0].branches[0].ids.tolist()
    policy = TEMPLATES[name].bos
    wanted = policy == "template" or (policy == "wanted" and bos)
    assert (ids[0] == tokenizer.bos_token_id, ids[1] == tokenizer.bos_token_id) == (wanted, False)
    assert prepared.report.without_bos.count == (bos and policy == "none")


def test_two_are_refused() -> None:
    template = "<s>{{ bos_token }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    with pytest.raises(DataError, match="begins with <s> twice") as caught:
        prepare([{"messages": TURNS}], plain_tokenizer(template=template), DataSettings())
    assert caught.value.code == "E-DATA-0044"


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_SYSTEM])
def test_what_is_asked_is_the_beginning_of_what_is_trained(name: str) -> None:
    prompt, completion = [SYSTEM, *TURNS[:3]], TURNS[3:]
    prepared = run(name, {"prompt": prompt, "completion": completion}, assistant_only=False)
    assert (prepared.report.given_otherwise.count, prepared.report.boundary_moved.count) == (0, 0)
    runs = trained(name, {"prompt": prompt, "completion": completion}, assistant_only=False)
    assert runs == answers(name, "Hi there", "I am an assistant")[1:]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_without_markers(name: str) -> None:
    """As it is saved with a model, and found by rendering prefixes."""
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = without_markers(resolve_template(tokenizer, name) or "")
    assert "generation " not in tokenizer.chat_template
    assert is_ours(tokenizer.chat_template)
    for row in ({"messages": TURNS}, {"messages": CALLING, "tools": TOOLS}):
        if "tools" in row and name not in WITH_TOOLS:
            continue
        marked = run(name, row).samples[0][0].branches[0]
        found = prepare([row], tokenizer, DataSettings(assistant_only=True)).samples[0][0].branches[0]
        np.testing.assert_array_equal(found.ids, marked.ids)
        np.testing.assert_array_equal(found.supervised, marked.supervised)


EXPECTED = {  # of SYSTEM, TURNS and QUESTION, as the references write it (llama.cpp's tests, model cards)
    "llama-2": "<s>[INST] <<SYS>>\nYou are a helpful assistant\n<</SYS>>\n\nHello [/INST] Hi there </s>"
    "<s>[INST] Who are you [/INST] I am an assistant </s><s>[INST] Another question [/INST]",
    "mistral": "<s>[INST] You are a helpful assistant\n\nHello[/INST] Hi there</s>"
    "[INST] Who are you[/INST] I am an assistant</s>[INST] Another question[/INST]",
    "mistral-nemo": "<s>[INST]You are a helpful assistant\n\nHello[/INST]Hi there</s>"
    "[INST]Who are you[/INST]I am an assistant</s>[INST]Another question[/INST]",
    "mistral-small": "<s>[SYSTEM_PROMPT]You are a helpful assistant[/SYSTEM_PROMPT][INST]Hello[/INST]Hi there</s>"
    "[INST]Who are you[/INST]I am an assistant</s>[INST]Another question[/INST]",
    "phi-4": "<|im_start|>system<|im_sep|>You are a helpful assistant<|im_end|>"
    "<|im_start|>user<|im_sep|>Hello<|im_end|><|im_start|>assistant<|im_sep|>Hi there<|im_end|>"
    "<|im_start|>user<|im_sep|>Who are you<|im_end|><|im_start|>assistant<|im_sep|>I am an assistant<|im_end|>"
    "<|im_start|>user<|im_sep|>Another question<|im_end|><|im_start|>assistant<|im_sep|>",
    "phi-4-mini": "<|system|>You are a helpful assistant<|end|><|user|>Hello<|end|><|assistant|>Hi there<|end|>"
    "<|user|>Who are you<|end|><|assistant|>I am an assistant<|end|><|user|>Another question<|end|><|assistant|>",
    "zephyr": "<|system|>\nYou are a helpful assistant</s>\n<|user|>\nHello</s>\n<|assistant|>\nHi there</s>\n"
    "<|user|>\nWho are you</s>\n<|assistant|>\nI am an assistant</s>\n<|user|>\nAnother question</s>\n<|assistant|>\n",
    "vicuna": "You are a helpful assistant USER: Hello ASSISTANT: Hi there</s>"
    "USER: Who are you ASSISTANT: I am an assistant</s>USER: Another question ASSISTANT:",
    "granite-3": "<|start_of_role|>system<|end_of_role|>You are a helpful assistant<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Hello<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>Hi there<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Who are you<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>I am an assistant<|end_of_text|>\n"
    "<|start_of_role|>user<|end_of_role|>Another question<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
    "tulu": "<s><|system|>\nYou are a helpful assistant\n<|user|>\nHello\n<|assistant|>\nHi there</s>\n"
    "<|user|>\nWho are you\n<|assistant|>\nI am an assistant</s>\n<|user|>\nAnother question\n<|assistant|>\n",
    "openchat": "<s>GPT4 Correct System: You are a helpful assistant<|end_of_turn|>GPT4 Correct User: Hello"
    "<|end_of_turn|>GPT4 Correct Assistant: Hi there<|end_of_turn|>GPT4 Correct User: Who are you<|end_of_turn|>"
    "GPT4 Correct Assistant: I am an assistant<|end_of_turn|>GPT4 Correct User: Another question<|end_of_turn|>"
    "GPT4 Correct Assistant:",
    "smollm2": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n"
    "<|im_start|>assistant\nI am an assistant<|im_end|>\n<|im_start|>user\nAnother question<|im_end|>\n"
    "<|im_start|>assistant\n",
    "smollm3": "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\nToday Date: 1 May 2026\n"
    "Reasoning Mode: /think\n\n## Custom Instructions\n\nYou are a helpful assistant\n\n<|im_end|>\n"
    "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you"
    "<|im_end|>\n<|im_start|>assistant\nI am an assistant<|im_end|>\n<|im_start|>user\nAnother question<|im_end|>\n"
    "<|im_start|>assistant\n",
    "nemotron-mini": "<extra_id_0>System\nYou are a helpful assistant\n\n<extra_id_1>User\nHello\n"
    "<extra_id_1>Assistant\nHi there</s>\n<extra_id_1>User\nWho are you\n<extra_id_1>Assistant\nI am an assistant</s>\n"
    "<extra_id_1>User\nAnother question\n<extra_id_1>Assistant\n",
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    text = tokenizer.apply_chat_template(
        [SYSTEM, *TURNS, QUESTION],
        chat_template=resolve_template(tokenizer, name),
        tokenize=False,
        add_generation_prompt=True,
        date_string="1 May 2026",
    )
    assert text == EXPECTED[name]


def test_names_are_found_however_they_are_spelt() -> None:
    for spelt, name in {"Llama3": "llama-3", "llama_3.1": "llama-3.1", "QWEN3": "qwen-3", "OLMo 2": "tulu"}.items():
        assert find_template(spelt) is TEMPLATES[name]
    assert find_template("nothing") is None
    with pytest.raises(ConfigError) as caught:
        resolve_template(plain_tokenizer(), "lama-3")
    assert caught.value.hint == "did you mean 'llama-3'?"


def test_a_template_whose_end_of_turn_the_tokenizer_lacks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"ends turns with <\|eot_id\|>, no token of this") as caught:
        resolve_template(plain_tokenizer(), "llama-3")
    assert caught.value.code == "E-DATA-0040"
    tokenizer = plain_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="an end-of-sequence token, which the tokenizer lacks") as caught:
        resolve_template(tokenizer, "tulu")
    assert caught.value.code == "E-DATA-0040"


def test_markers_that_the_tokenizer_lacks_are_text_and_named() -> None:
    tokenizer = plain_tokenizer(extra=("<|eot_id|>",))
    report = run("llama-3", {"messages": TURNS}, tokenizer).report
    assert dict(report.written_as_text) == {"<|start_header_id|>": 1, "<|end_header_id|>": 1}
    assert "writes <|start_header_id|>, <|end_header_id|>, which the tokenizer has not" in report.notes()[-1]


def test_generation_stops_where_a_turn_ends() -> None:
    assert end_tokens(tokenizer_of("phi-3"), "phi-3") == ("<|end|>", "</s>")
    tokenizer = plain_tokenizer()
    tokenizer.get_vocab = lambda: {"</s>": 2}  # type: ignore[method-assign]
    assert end_tokens(tokenizer, "chatml") == ("</s>",)


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
SPECIALS = st.sampled_from(
    ["<|im_end|>", "<|im_start|>", "</s>", "{{ x }}", "{% if %}", "[/INST]", "<think>", "🙂", "é"]
)
CONTENT = st.lists(st.one_of(WORDS, SPECIALS), min_size=1, max_size=4).map(" ".join)


def expected_mask(name: str, tokenizer: PreTrainedTokenizerBase, messages: list[dict], ids: np.ndarray) -> list[bool]:
    """From renderings of prefixes by transformers: an answer begins where the prompt for it ends, and ends where the
    text that follows it in this template ends."""
    template = resolve_template(tokenizer, name)

    def text(upto: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
                date_string="1 May 2026",
            )
        )

    full = text(len(messages))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded["input_ids"] == ids.tolist()
    mask = [False] * len(full)
    inside, last, _ = AROUND[name]
    for i in range(1, len(messages), 2):
        given = text(i, prompt=True)
        start = len(given) if full.startswith(given) else len(given) - len("<think>\n")  # deepseek-r1's earlier turns
        ending = last if i + 1 == len(messages) else inside
        said = messages[i]["content"].strip() if name in TRIMS else messages[i]["content"]
        end = full.index(said + ending, start) + len(said + ending)  # an "h" alone is in "</think>", too
        mask[start:end] = [True] * (end - start)
    return [any(mask[a:b]) for a, b in encoded["offset_mapping"]]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_masks_of_generated_conversations(name: str, contents: list[str]) -> None:
    """Unicode, templates' own text and special tokens within what is said."""
    if any(not content.strip() or "think>" in content for content in contents):
        return
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    tokenizer = tokenizer_of(name)
    row = {"messages": messages, "chat_template_kwargs": {"date_string": "1 May 2026"}}
    branch = run(name, row, tokenizer).samples[0][0].branches[0]
    expected = expected_mask(name, tokenizer, messages, branch.ids)
    assert branch.supervised.tolist() == expected


@pytest.mark.parametrize("name", NAMES)
def test_empty_turns(name: str) -> None:
    """An assistant that says nothing would be trained to stop at once: that is refused, unless it is not trained."""
    nothing = {"role": "assistant", "content": ""}
    rest = [{"role": "user", "content": ""}, TURNS[3]]
    with pytest.raises(DataError, match="says nothing"):
        trained(name, {"messages": [TURNS[0], nothing, *rest]})
    row = {"messages": [TURNS[0], {**nothing, "train": False}, *rest]}
    if name == "deepseek-r1":  # whose last turn begins with a thought, so that an empty one is nowhere to be found
        with pytest.raises(DataError, match="rendered otherwise at the end"):
            trained(name, row)
        return
    (only,) = trained(name, row)
    assert only == answers(name, "I am an assistant")[-1]


@pytest.mark.parametrize("name", ["chatml", "qwen-3", "gemma-3", "phi-3", "mistral", "deepseek-r1"])
@settings(max_examples=30, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_masks_of_a_models_own_template_without_markers(name: str, contents: list[str]) -> None:
    """Rendered in the sandbox (a comment makes the text another's), found by prefixes: the same as by markers."""
    if any(not content.strip() or "think>" in content for content in contents):
        return
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    tokenizer = tokenizer_of(name)
    marked = run(name, {"messages": messages}, tokenizer).samples[0][0].branches[0]
    tokenizer.chat_template = without_markers(resolve_template(tokenizer, name) or "") + "{#- mine -#}"
    assert not is_ours(tokenizer.chat_template)
    found = prepare([{"messages": messages}], tokenizer, DataSettings(assistant_only=True)).samples[0][0].branches[0]
    assert found.ids.tolist() == marked.ids.tolist()
    assert found.supervised.tolist() == marked.supervised.tolist()


def flagged_answer(parts: list[tuple[str, bool | None]], whole: bool | None) -> dict[str, Any]:
    content = [
        {"type": "text", "text": text, **({} if train is None else {"train": train})} for text, train in parts if text
    ]
    return {"role": "assistant", "content": content, **({} if whole is None else {"train": whole})}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("flags", "whole", "runs"),
    [
        ((False, None), None, [" it is{end}"]),
        ((None, False), None, ["{before}Four", "{end}"]),
        ((True, None), False, ["{before}Four"]),
        ((None, True), False, [" it is"]),
        ((False, True), None, [" it is{end}"]),
    ],
)
def test_parts_of_an_answer(name: str, flags: tuple[bool | None, ...], whole: bool | None, runs: list[str]) -> None:
    """A space that the template writes before the answer goes with its first word: most tokenizers make one token of
    both."""
    answer = flagged_answer([("Four", flags[0]), (" it is", flags[1])], whole)
    found = trained(name, {"messages": [TURNS[0], answer, *TURNS[2:]]})
    end, _, before = AROUND[name]
    assert found[:-1] == [run.format(before=before, end=end) for run in runs]
    assert found[-1] == answers(name, "I am an assistant")[-1]


PARTS = st.lists(st.tuples(CONTENT, st.sampled_from([True, False, None])), min_size=1, max_size=4)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(parts=PARTS, whole=st.sampled_from([True, False, None]))
def test_flags_of_generated_parts(name: str, parts: list[tuple[str, bool | None]], whole: bool | None) -> None:
    """Token by token: those that a flag's edge cuts are trained only if all their characters are."""
    content = "".join(text for text, _ in parts)
    if not content.strip() or "think>" in content:
        return
    tokenizer = tokenizer_of(name)
    plain = {"role": "assistant", "content": content}
    kwargs = {"chat_template_kwargs": {"date_string": "1 May 2026"}}
    unflagged = run(name, {"messages": [*TURNS, QUESTION, plain], **kwargs}, tokenizer).samples[0][0].branches[0]
    flagged = {"messages": [*TURNS, QUESTION, flagged_answer(parts, whole)], **kwargs}
    branch = run(name, flagged, tokenizer).samples[0][0].branches[0]
    assert branch.ids.tolist() == unflagged.ids.tolist()
    full = tokenizer.decode(branch.ids)
    offsets = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    said = content.strip() if name in TRIMS else content
    at = full.rindex(said + AROUND[name][1])
    asked = full.rindex(QUESTION["content"]) + len(QUESTION["content"])
    first = next(a for (a, b), was in zip(offsets, unflagged.supervised, strict=True) if was and b > asked)
    is_trained = [True] * len(full)
    if whole is False:
        is_trained[first:] = [False] * (len(full) - first)
    place = at - (content.index(said) if name in TRIMS else 0)
    edges = {first} if whole is not None else set()
    for text, train in parts:
        start, end = max(place, at), min(place + len(text), at + len(said))
        start = first + len(full[first:at].rstrip()) if start == at else start
        if train is not None and start < end:
            is_trained[start:end] = [train] * (end - start)
            edges |= {start, end}
        place += len(text)
    expected = [
        bool(was) and (all if any(a < edge < b for edge in edges - {first}) else any)(is_trained[a:b])
        for was, (a, b) in zip(unflagged.supervised, offsets, strict=True)
    ]
    assert branch.supervised.tolist() == expected


def test_the_packaged_models_own_template() -> None:
    folder = Path.home() / ".cache" / "posttrain" / "models" / "smollm2-135m-instruct"
    if not (folder / "chat_template.jinja").is_file():
        pytest.skip("the packaged model is not in the cache")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for messages in (TURNS, [SYSTEM, *TURNS]):
        own = prepare([{"messages": messages}], tokenizer, DataSettings(assistant_only=True)).samples[0][0].branches[0]
        named = run("smollm2", {"messages": messages}, tokenizer).samples[0][0].branches[0]
        np.testing.assert_array_equal(own.ids, named.ids)
        np.testing.assert_array_equal(own.supervised, named.supervised)
        assert tokenizer.decode(own.ids[own.supervised]) == "Hi there<|im_end|>\nI am an assistant<|im_end|>\n"
