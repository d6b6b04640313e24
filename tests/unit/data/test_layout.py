"""Templates that leave the order of a conversation: nobody's words but the assistant's are ever trained as its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prepare import Prepared, prepare
from posttrain.data.settings import DataSettings
from posttrain.data.templates import TEMPLATES
from posttrain.errors import DataError
from tests.tiny_tokenizers import CHATML, CHATML_MARKED, chatml_tokenizer, plain_tokenizer
from tests.unit.data.test_template_library import tokenizer_of

SYSTEM, OTHER = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "Be kind."}
QUESTION, ANSWER = {"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four."}
THANKS, WELCOME = {"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "You are welcome"}
TALK = [QUESTION, ANSWER, THANKS, WELCOME]

TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
ASK = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
REVERSED = f"{{% for m in messages | reverse %}}{TURN}{{% endfor %}}{ASK}"
ANSWER_FIRST = (  # a question is kept until its answer is there
    "{% set ns = namespace(asked=none) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = m %}"
    f"{{% else %}}{TURN}{{% if ns.asked %}}{{% set m = ns.asked %}}{TURN}{{% endif %}}{{% endif %}}{{% endfor %}}{ASK}"
)
ECHO = (
    "{% set ns = namespace(asked='') %}{% for m in messages %}"
    f"{TURN}{{% if m.role == 'user' %}}{{% set ns.asked = m.content %}}{{% else %}}{{{{ ns.asked + '\n' }}}}"
    f"{{% endif %}}{{% endfor %}}{ASK}"
)
ANSWERS_LAST = (
    f"{{% for m in messages if m.role != 'assistant' %}}{TURN}{{% endfor %}}"
    f"{{% for m in messages if m.role == 'assistant' %}}{TURN}{{% endfor %}}{ASK}"
)
SYSTEM_LAST = (
    f"{{% for m in messages if m.role != 'system' %}}{TURN}{{% endfor %}}"
    f"{{% for m in messages if m.role == 'system' %}}{TURN}{{% endfor %}}{ASK}"
)
SYSTEMS_FIRST = (
    f"{{% for m in messages if m.role == 'system' %}}{TURN}{{% endfor %}}"
    f"{{% for m in messages if m.role != 'system' %}}{TURN}{{% endfor %}}{ASK}"
)
ONE_SYSTEM = (
    f"{{% for m in messages %}}{{% if loop.first or m.role != 'system' %}}{TURN}{{% endif %}}{{% endfor %}}{ASK}"
)
LAST_TWO = f"{{% for m in messages[-2:] %}}{TURN}{{% endfor %}}{ASK}"
SYSTEM_IN_LAST_QUESTION = (  # like Mistral's own
    "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% set rest = messages[1:] if s else messages %}{% for m in rest %}"
    "{% if m.role == 'user' %}{{ '[INST]' + (s if loop.last or loop.index0 == rest | length - 2 else '') + m.content + "
    "'[/INST]' }}{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
)


def run(messages: list[dict[str, Any]], template: str, **settings: Any) -> Prepared:
    return prepare([{"messages": messages}], plain_tokenizer(template=template), DataSettings(**settings))


def prepared_or_code(row: dict[str, Any], tokenizer: Any, settings: DataSettings) -> Prepared | str:
    try:
        return prepare([row], tokenizer, settings)
    except DataError as error:
        return error.code


def trained(prepared: Prepared) -> list[str]:
    branch = prepared.samples[0][0].branches[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], branch.supervised.astype(int), [0]])))
    return [plain_tokenizer().decode(branch.ids[start:end]) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (REVERSED, r'"messages\[1\]" \(role assistant\) is written before the message that it follows'),
        (ANSWER_FIRST, r'"messages\[1\]" \(role assistant\) is written before the message that it follows'),
        (ANSWERS_LAST, r'"messages\[2\]" \(role user\) is written before the message that it follows'),
    ],
)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_turns_in_another_order_are_refused(template: str, says: str, assistant_only: bool) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run(TALK, template, assistant_only=assistant_only)
    assert caught.value.code == "E-DATA-0046"
    assert caught.value.message.startswith("train[0]")
    assert "does not keep to the order" in (caught.value.hint or "")


@pytest.mark.parametrize("template", [REVERSED, ANSWER_FIRST, ANSWERS_LAST])
def test_so_they_are_in_prompts_and_completions(template: str) -> None:
    tokenizer = plain_tokenizer(template=template)
    for prompt, completion in ((TALK[:1], TALK[1:]), (TALK[:3], TALK[3:])):
        row = {"prompt": prompt, "completion": completion}
        with pytest.raises(DataError) as caught:
            prepare([row], tokenizer, DataSettings())
        assert caught.value.code == "E-DATA-0046"


def test_a_question_that_is_repeated_after_the_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r'"messages\[0\]" \(role user\) is written within the assistant') as caught:
        run(TALK, ECHO, assistant_only=True)
    assert caught.value.code == "E-DATA-0046"
    assert run(TALK, ECHO).report.used == 1  # where all of it is trained, all of it is


def test_a_system_message_behind_the_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r'"messages\[0\]" \(role system\) is written within the assistant') as caught:
        run([SYSTEM, *TALK], SYSTEM_LAST, assistant_only=True)
    assert caught.value.code == "E-DATA-0046"


def test_turns_that_are_left_out_are_refused() -> None:
    with pytest.raises(DataError, match=r'"messages\[0\]" is of role user, which the chat template leaves') as caught:
        run(TALK, LAST_TWO, assistant_only=True)
    assert caught.value.code == "E-DATA-0043"


def test_a_system_message_in_the_last_question_is_fine_where_the_mask_is_exact() -> None:
    messages = [SYSTEM, *TALK]
    assert trained(run(messages, SYSTEM_IN_LAST_QUESTION, assistant_only=True)) == ["Four.</s>", "You are welcome</s>"]
    tokenizer = plain_tokenizer(template=SYSTEM_IN_LAST_QUESTION)
    prompt, last = {"prompt": messages[:4], "completion": messages[4:]}, {"assistant_only": False}
    assert trained(prepare([prompt], tokenizer, DataSettings(**last))) == ["You are welcome</s>"]
    earlier = {"prompt": messages[:2], "completion": messages[2:]}
    assert trained(prepare([earlier], tokenizer, DataSettings(**last))) == ["Four.</s>", "You are welcome</s>"]


def test_a_system_message_that_moves_behind_the_prompt_is_refused_where_all_behind_it_is_trained() -> None:
    messages, tokenizer = [SYSTEM, *TALK], plain_tokenizer(template=SYSTEM_IN_LAST_QUESTION)
    pair = {"prompt": messages[:2], "chosen": messages[2:], "rejected": messages[2:3]}
    answered = {"prompt": messages[:3], "completion": messages[3:]}
    for row, method, role in ((pair, "preference", "system"), (answered, "sft", "assistant")):
        words = rf"\(role {role}\) is written otherwise when the completion follows"
        with pytest.raises(DataError, match=words) as caught:
            prepare([row], tokenizer, DataSettings(method=method))
        assert caught.value.code == "E-DATA-0046"


def test_each_shape_is_looked_at_for_itself() -> None:
    """A template that is in order for one conversation need not be for another; rows are skipped one by one."""
    rows = [{"messages": messages} for messages in (TALK, [SYSTEM, *TALK], TALK[:2], [SYSTEM, *TALK[:2]])]
    settings = DataSettings(assistant_only=True, on_bad_row="skip")
    report = prepare(rows, plain_tokenizer(template=SYSTEM_LAST), settings).report
    assert (report.used, report.num_skipped) == (2, 2)
    assert report.skipped["turns out of order"].first[0].row == 1


@settings(max_examples=60, deadline=None)
@given(order=st.permutations(range(6)), marked=st.booleans())
def test_no_order_trains_the_users_words(order: list[int], marked: bool) -> None:
    """Any order of turns is refused, or the mask is exact."""
    template = (CHATML_MARKED if marked else CHATML).replace(
        "{% for message in messages %}", "{% for i in order if i < messages | length %}{% set message = messages[i] %}"
    )
    messages = [*TALK, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Goodbye."}]
    row = {"messages": messages, "chat_template_kwargs": {"order": order}}
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template
    prepared = prepared_or_code(row, tokenizer, DataSettings(assistant_only=True))
    if order != sorted(order):
        assert prepared == "E-DATA-0046"
        return
    assert isinstance(prepared, Prepared)
    assert trained(prepared) == [f"{text}<|im_end|>\n" for text in ("Four.", "You are welcome", "Goodbye.")]


ODD = (
    [SYSTEM, OTHER, *TALK],
    [SYSTEM, SYSTEM, *TALK],
    [*TALK[:2], SYSTEM, *TALK[2:]],
    [SYSTEM, *TALK[:2], OTHER, *TALK[2:]],
)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("messages", ODD)
@pytest.mark.parametrize("assistant_only", [False, True])
def test_odd_system_turns_in_the_library(name: str, messages: list[dict[str, Any]], assistant_only: bool) -> None:
    """Refused, or written where they are and said."""
    chosen = DataSettings(assistant_only=assistant_only, chat_template=name)
    prepared = prepared_or_code({"messages": messages}, tokenizer_of(name), chosen)
    if isinstance(prepared, str):
        assert prepared in ("E-DATA-0020", "E-DATA-0043", "E-DATA-0046")
        return
    text, at = tokenizer_of(name).decode(prepared.samples[0][0].branches[0].ids), 0
    for message in messages:
        at = text.index(message["content"], at) + len(message["content"])
    assert prepared.report.odd_systems.count == 1


@pytest.mark.parametrize(
    ("template", "messages", "code", "says"),
    [
        (SYSTEMS_FIRST, ODD[2], "E-DATA-0046", r'"messages\[2\]" \(role system\) is written before'),
        (SYSTEMS_FIRST, ODD[3], "E-DATA-0046", r'"messages\[3\]" \(role system\) is written before'),
        (ONE_SYSTEM, ODD[0], "E-DATA-0043", r'"messages\[1\]" is of role system, which the chat template leaves out'),
        (ONE_SYSTEM, ODD[1], "E-DATA-0043", r'"messages\[1\]" is of role system, which the chat template leaves out'),
        (ONE_SYSTEM, ODD[2], "E-DATA-0043", r'"messages\[2\]" is of role system, which the chat template leaves out'),
    ],
)
def test_system_turns_that_are_moved_or_left_out(
    template: str, messages: list[dict[str, Any]], code: str, says: str
) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run(messages, template)
    assert caught.value.code == code


@pytest.mark.parametrize("messages", ODD)
def test_system_turns_that_stay_are_said(messages: list[dict[str, Any]]) -> None:
    report = prepare([{"messages": messages}], chatml_tokenizer(), DataSettings(assistant_only=True)).report
    assert report.odd_systems.count == 1
    assert "1 rows (first: train[0]) hold several system turns, or one that does not come first" in report.notes()[-1]
    plain = prepare([{"messages": [SYSTEM, *TALK]}], chatml_tokenizer(), DataSettings(assistant_only=True)).report
    assert plain.odd_systems.count == 0
