"""Which tokens are trained, checked by reading them: every mask is decoded back into text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from posttrain.data.prepare import Prepared, prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from posttrain.types import Branch
from tests.tiny_tokenizers import CHATML, chatml_tokenizer, plain_tokenizer

QUESTION, ANSWER = {"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four."}
THANKS, WELCOME = {"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "You are welcome 🙂"}
CONVERSATION = [QUESTION, ANSWER, THANKS, WELCOME]

THINKING = (  # like Qwen3's: the last turn has a thought, earlier ones lose theirs
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CLOSED = (  # like Phi-3's: the end of text after the last turn, unless another is asked for
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% else %}{{ '</s>' }}{% endif %}"
)
RETURNED = (  # like gpt-oss: the last turn ends with another token
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NUMBERED = "{{ messages | length }}{% for m in messages %}{{ m.role + m.content + '</s>' }}{% endfor %}"

SHOUTED = "{{ messages | length }}{% for m in messages %}{{ m.role + (m.content | upper) + '</s>' }}{% endfor %}"


def run(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Prepared:
    return prepare([row], tokenizer, DataSettings(**settings))


def branch(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> Branch:
    ((tokenized,),) = run(row, tokenizer, **settings).samples
    return tokenized.branches[0]


def trained(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, **settings: Any) -> list[str]:
    """The runs of supervised tokens, decoded."""
    found = branch(row, tokenizer, **settings)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], found.supervised.astype(int), [0]])))
    return [tokenizer.decode(found.ids[start:end]) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("marked", [False, True])
def test_assistant_only(marked: bool) -> None:
    tokenizer = chatml_tokenizer(marked=marked)
    runs = trained({"messages": CONVERSATION}, tokenizer, assistant_only=True)
    assert runs == ["Four.<|im_end|>\n", "You are welcome 🙂<|im_end|>\n"]


def test_prefixes_and_markers_give_the_same_tokens_and_mask() -> None:
    marked = branch({"messages": CONVERSATION}, chatml_tokenizer(marked=True), assistant_only=True)
    found = branch({"messages": CONVERSATION}, chatml_tokenizer(), assistant_only=True)
    np.testing.assert_array_equal(found.ids, marked.ids)
    np.testing.assert_array_equal(found.supervised, marked.supervised)


def test_whole_conversation_by_default() -> None:
    tokenizer = chatml_tokenizer()
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert trained({"messages": CONVERSATION}, tokenizer) == [text]


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (THINKING, ["Four.<|im_end|>\n", "<think>\n\n</think>\n\nYou are welcome 🙂<|im_end|>\n"]),
        (CLOSED, ["Four.<|im_end|>\n", "You are welcome 🙂<|im_end|>\n</s>"]),
        (RETURNED, ["Four.<|im_end|>", "You are welcome 🙂</s>"]),
    ],
)
def test_turns_that_are_rendered_otherwise_when_last(template: str, runs: list[str]) -> None:
    tokenizer = plain_tokenizer(template=template)
    assert trained({"messages": CONVERSATION}, tokenizer, assistant_only=True) == runs


def test_the_assistant_may_speak_first() -> None:
    tokenizer = chatml_tokenizer()
    runs = trained({"messages": [ANSWER, THANKS, WELCOME]}, tokenizer, assistant_only=True)
    assert runs == ["Four.<|im_end|>\n", "You are welcome 🙂<|im_end|>\n"]


def test_a_template_that_renders_no_prefix_alike() -> None:
    tokenizer = plain_tokenizer(template=NUMBERED)
    assert trained({"messages": CONVERSATION}, tokenizer, assistant_only=True) == [
        "Four.</s>",
        "You are welcome 🙂</s>",
    ]
    report = run({"messages": CONVERSATION}, tokenizer, assistant_only=True).report
    assert report.given_otherwise.count == 1
    assert "the model, in use, is given another text than in training" in report.notes()[-1]


def test_templates_whose_turns_cannot_be_told_are_refused() -> None:
    with pytest.raises(DataError, match=r"messages\[:1\] alone are rendered unlike") as caught:
        run({"messages": CONVERSATION}, plain_tokenizer(template=SHOUTED), assistant_only=True)
    assert caught.value.code == "E-DATA-0021"
    assert "{% generation %}" in (caught.value.hint or "")


def test_text_ends_with_the_end_of_sequence_token_once() -> None:
    tokenizer = plain_tokenizer(bos=True)
    assert trained({"text": "Paris"}, tokenizer) == ["<s>Paris</s>"]
    assert trained({"text": "Paris</s>"}, tokenizer) == ["<s>Paris</s>"]


def test_special_tokens_in_the_text_are_not_doubled() -> None:
    tokenizer = plain_tokenizer(bos=True, eos=True)
    assert trained({"text": "<s>Paris"}, tokenizer) == ["<s>Paris</s>"]
    assert trained({"prompt": "<s>Paris is", "completion": " nice</s>"}, tokenizer) == [" nice</s>"]
    report = run({"prompt": "Paris is", "completion": " nice"}, tokenizer).report
    assert report.boundary_moved.count == 0


def test_completion_of_text() -> None:
    tokenizer = plain_tokenizer(bos=True)
    row = {"prompt": "The capital of France is", "completion": " Paris."}
    assert trained(row, tokenizer) == [" Paris.</s>"]
    assert trained(row, tokenizer, completion_only=False) == ["<s>The capital of France is Paris.</s>"]


def test_completion_of_a_conversation() -> None:
    tokenizer = chatml_tokenizer()
    row = {"prompt": [QUESTION], "completion": [ANSWER, THANKS, WELCOME]}
    assert trained(row, tokenizer) == trained(row, tokenizer, assistant_only=True)
    assert trained(row, tokenizer) == ["Four.<|im_end|>\n", "You are welcome 🙂<|im_end|>\n"]
    whole = {"prompt": [QUESTION, ANSWER, THANKS], "completion": [WELCOME]}
    assert trained(whole, tokenizer, assistant_only=True) == ["You are welcome 🙂<|im_end|>\n"]
    runs = trained(whole, tokenizer, assistant_only=True, completion_only=False)
    assert runs == ["Four.<|im_end|>\n", "You are welcome 🙂<|im_end|>\n"]


@pytest.mark.parametrize("assistant_only", [False, True])
def test_a_padding_token_that_ends_turns_is_trained(assistant_only: bool) -> None:
    """Nothing is masked by its id: a model that pads with its end-of-turn token still learns to stop."""
    tokenizer = chatml_tokenizer()
    tokenizer.pad_token = "<|im_end|>"
    row = {"messages": [QUESTION, ANSWER]} if assistant_only else {"prompt": [QUESTION], "completion": [ANSWER]}
    assert trained(row, tokenizer, assistant_only=assistant_only) == ["Four.<|im_end|>\n"]


def test_a_generation_prompt_that_training_does_not_have_is_counted() -> None:
    """The model is asked with an open thought, and trained without one."""
    tokenizer = plain_tokenizer(template=CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"))
    for row, options in (
        ({"prompt": [QUESTION], "completion": [ANSWER]}, {}),
        ({"messages": CONVERSATION}, {"assistant_only": True}),
    ):
        report = run(row, tokenizer, **options).report
        assert report.given_otherwise.count == 1
        assert trained(row, tokenizer, **options)[-1].endswith(".<|im_end|>\n" if not options else "🙂<|im_end|>\n")
        assert "is given another text than in training" in report.notes()[-1]


def test_an_answer_that_begins_like_the_generation_prompt_is_trained_whole() -> None:
    tokenizer = plain_tokenizer(template=CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"))
    row = {"messages": [QUESTION, {"role": "assistant", "content": "<th> is a tag"}, THANKS, WELCOME]}
    runs = trained(row, tokenizer, assistant_only=True)
    assert runs == ["<th> is a tag<|im_end|>\n", "You are welcome 🙂<|im_end|>\n"]


def test_a_merge_across_the_boundary_is_reported() -> None:
    tokenizer = plain_tokenizer()
    row = {"prompt": "What is two plu", "completion": "s two?"}
    report = run(row, tokenizer).report
    assert trained(row, tokenizer)[0].endswith("plus two?</s>")
    assert (report.boundary_moved.count, str(report.boundary_moved.first[0])) == (1, "train[0]")
    assert "1 rows (first: train[0]) have prompts whose tokens change" in report.notes()[1]


def test_tools_and_template_arguments_reach_the_template() -> None:
    template = (
        "{% for t in tools %}{{ t.name }}{% endfor %}{{ mood }}{% for m in messages %}{{ m.content }}{% endfor %}</s>"
    )
    tokenizer = plain_tokenizer(template=template)
    row = {"messages": [QUESTION], "tools": '[{"name": "add"}]', "chat_template_kwargs": {"mood": " gladly "}}
    assert trained(row, tokenizer) == ["add gladly What is two plus two?</s>"]


def test_templates_that_leave_tool_calls_out_are_refused() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    row = {"messages": [QUESTION, call]}
    with pytest.raises(DataError, match="calls add, but the chat template leaves tool calls out"):
        run(row, chatml_tokenizer())
    assert '"name": "add"' in trained(row, chatml_tokenizer(), chat_template="chatml", assistant_only=True)[0]


def test_template_errors_name_the_row() -> None:
    template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(DataError) as caught:
        run({"messages": CONVERSATION}, plain_tokenizer(template=template))
    assert caught.value.code == "E-DATA-0020"
    assert caught.value.message.startswith(
        "train[0]  the chat template refuses the conversation (user → assistant → user → assistant): System role"
    )


def test_half_a_character_is_refused() -> None:
    with pytest.raises(DataError, match=r'train\[0\]  "text" holds half a character') as caught:
        run({"text": "a \ud83d b"}, plain_tokenizer())
    assert caught.value.code == "E-DATA-0024"


def test_a_row_with_nothing_to_train_is_refused_and_shown() -> None:
    with pytest.raises(DataError, match="no token of the row would be trained") as caught:
        run({"messages": [QUESTION]}, chatml_tokenizer(), assistant_only=True)
    assert caught.value.code == "E-DATA-0022"
    assert "<|im_start|>user\\nWhat is two plus two?<|im_end|>" in caught.value.message


def test_a_template_without_an_end_of_turn_is_noted() -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    notes = run({"messages": CONVERSATION}, plain_tokenizer(template=template)).report.notes()
    assert "the model will not learn to stop" in notes[1]


@pytest.mark.parametrize(
    ("row", "settings", "says"),
    [
        ({"text": "a"}, {"assistant_only": True}, "assistant_only_loss needs conversations"),
        ({"text": "a"}, {"completion_only": True}, "completion_only_loss needs a prompt and a completion"),
        ({"messages": CONVERSATION}, {"completion_only": True, "chat_template": "chatml"}, "needs a prompt and a comp"),
        ({"messages": CONVERSATION}, {}, "the tokenizer has no chat template"),
        ({"messages": CONVERSATION}, {"chat_template": "chatlm"}, "no chat template is called 'chatlm'"),
    ],
)
def test_settings_that_do_not_fit_the_data(row: dict[str, Any], settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(row, plain_tokenizer(), **settings)


@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
def test_white_space_behind_the_end_token_brings_no_second_one(behind: str) -> None:
    tokenizer = plain_tokenizer()
    for row in ({"text": f"Two plus two.</s>{behind}"}, {"prompt": "Two", "completion": f" plus two.</s>{behind}"}):
        ids = branch(row, tokenizer).ids.tolist()
        assert ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids) == f"Two plus two.</s>{behind}"
