"""One clear complaint where a row is broken, and none that misleads: labels, roles, calls."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from tests.doctor_files import codes, examine, finding, pair, rated, row
from tests.tiny_tokenizers import CHATML, chatml_tokenizer, plain_tokenizer

RATED = [rated(f"Q{i}?", f"A{i}.", i % 2 == 0) for i in range(6)]
UNRATED = {"prompt": "Q9?", "completion": "A9."}


@pytest.mark.parametrize("label", [None, "maybe", "sports"])
def test_a_label_that_is_none_among_ratings(label: str | None) -> None:
    report = examine([*RATED, {**UNRATED, "label": label}])
    assert [one.code for one in report.findings if one.severity == "error"] == ["E-DATA-0065"]
    found = finding(report, "E-DATA-0065")
    assert (found.count, found.first) == (1, ("data[6]",))
    assert "true, false" in found.fix


def test_rows_of_other_methods_are_still_told() -> None:
    unrated = {**UNRATED, "label": None}
    assert codes([*RATED, UNRATED])[:1] == ["E-DATA-0064"]
    both = examine([*RATED, unrated, row("Hi", "Hello"), row("Hi there", "Hello you")])
    errors = [one.code for one in both.findings if one.severity == "error"]
    assert errors == ["E-DATA-0064", "E-DATA-0065"]
    assert finding(both, "E-DATA-0064").count == 2
    assert "2 for supervised training" in finding(both, "E-DATA-0064").sentence
    assert "E-DATA-0064" in codes([*RATED, unrated, pair("Q?", "a", "b")])
    assert [code for code in codes([{**UNRATED, "label": "sports"}, row("Hi", "Hello")]) if code[0] == "E"] == []


def hint(role: str) -> str:
    with pytest.raises(DataError) as caught:
        prepare([{"messages": [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}]}],
                chatml_tokenizer(), DataSettings())  # fmt: skip
    assert caught.value.code == "E-DATA-0012"
    return caught.value.hint or ""


@pytest.mark.parametrize(
    "role", ["moderator", "instruction", "response", "narrator", "customer", "functions", "student"]
)
def test_no_role_is_suggested_that_is_not_meant(role: str) -> None:
    assert hint(role).startswith("roles: system")


@pytest.mark.parametrize(
    ("role", "meant"), [("assitant", "assistant"), ("usr", "user"), ("sytem", "system"), ("humman", "human")]
)
def test_a_slip_of_the_pen_is_told(role: str, meant: str) -> None:
    assert hint(role).startswith(f'did you mean "{meant}"?')


CALL = {"type": "function", "function": {"name": "look", "arguments": {}}}


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
def test_a_template_that_knows_no_calls_is_named(content: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [CALL], **content}]
    with pytest.raises(DataError, match=r'"messages\[1\]" calls') as caught:
        prepare([{"messages": turns}], plain_tokenizer(template=CHATML), DataSettings())
    assert caught.value.code == "E-DATA-0023"
    assert 'chat_template="chatml"' in (caught.value.hint or "")


def test_a_template_that_fails_for_another_reason() -> None:
    template = "{{ raise_exception('no') if messages[0].tool_calls is undefined }}"
    with pytest.raises(DataError, match="the chat template refuses") as caught:
        prepare([row("Hi", "Hello")], plain_tokenizer(template=template), DataSettings())
    assert caught.value.code == "E-DATA-0020"
