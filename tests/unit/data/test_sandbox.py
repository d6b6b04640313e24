"""Templates of models and files run within bounds: attacks end in a coded error, and soon."""

from __future__ import annotations

import os
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from posttrain.data.prepare import prepare
from posttrain.data.rendering import LimitError, RenderError, plain
from posttrain.data.sandbox import SANDBOX, Sandbox
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError, UserError
from tests.tiny_tokenizers import CHATML, plain_tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
VALUES = {"messages": MESSAGES, "tools": None, "add_generation_prompt": False}

ESCAPES = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "format trick": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "attr filter": "{{ messages | attr('__class__') | attr('__base__') }}",
    "map attribute": "{{ messages | map(attribute='__class__') | list | first | string | length / 0 }}",
    "macro globals": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "generator frame": "{{ (messages | map('upper')).gi_frame.f_back.f_globals }}",
    "namespace dunder": "{% set n = namespace(__class__=1) %}{{ n }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import '/etc/passwd' as x %}{{ x }}",
    "changing what is given": "{{ messages.append(1) }}",
}
BOMBS = {
    "text times a billion": "{{ 'A' * 10**9 }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "recursive macro": "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "doubling": "{% set n = namespace(x='A') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
    "endless output": "{% for a in range(99999) %}{{ 'A' * 1000 }}{% endfor %}",
    "center": "{{ 'a'.center(10**10) }}",
    "compile-time constant": "{% if 'A' * 10**10 == 'B' %}x{% endif %}",
}


def complaint(template: str) -> UserError:
    with pytest.raises(UserError) as caught:
        prepare([{"messages": MESSAGES}], plain_tokenizer(template=template), DataSettings())
    return caught.value


@pytest.mark.parametrize("attack", ESCAPES)
def test_escapes(attack: str) -> None:
    error = complaint(ESCAPES[attack])
    assert isinstance(error, DataError)
    assert error.code in ("E-DATA-0020", "E-DATA-0043")  # refused, or it found nothing and wrote nothing


@pytest.mark.parametrize("attack", BOMBS)
def test_bombs(attack: str) -> None:
    before = time.monotonic()
    error = complaint(BOMBS[attack])
    assert error.code == "E-DATA-0041"
    assert isinstance(error, ConfigError)  # of the template, not of one row: it is not to be skipped row by row
    assert "train[0]: the chat template is out of bounds" in error.message
    assert time.monotonic() - before < 30


def test_a_bomb_that_waits_for_its_row_is_stopped_too() -> None:
    template = CHATML + "{% if messages | length > 2 %}{{ 'A' * 10**9 }}{% endif %}"
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES * 2}]
    with pytest.raises(ConfigError, match=r"train\[1\]: the chat template is out of bounds"):
        prepare(rows, plain_tokenizer(template=template), DataSettings())


def test_the_next_template_is_rendered_as_if_nothing_had_been() -> None:
    sandbox = Sandbox()
    with pytest.raises(LimitError):
        sandbox.render(BOMBS["nested ranges"], VALUES)
    assert sandbox.render("{{ messages[0].content }}", VALUES) == "Hello"
    with pytest.raises(RenderError, match="division by zero"):
        sandbox.render("{{ 1 / 0 }}", VALUES)
    assert sandbox.render("{{ messages[1].content }}", VALUES) == "Hi"
    sandbox.close()
    assert sandbox.render("{{ messages[1].content }}", VALUES) == "Hi"
    sandbox.close()


def test_the_child_has_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "canary")
    sandbox = Sandbox()
    sandbox.render("x", VALUES)
    assert sandbox.child.process is not None
    with open(f"/proc/{sandbox.child.process.pid}/environ", "rb") as file:
        assert b"canary" not in file.read()
    sandbox.close()


def test_the_date_is_that_of_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    for zone, offset in {"Etc/GMT-14": "+1400", "Etc/GMT+12": "-1200"}.items():
        monkeypatch.setenv("TZ", zone)
        sandbox = Sandbox()
        expected = datetime.now(timezone(timedelta(hours=int(offset) // 100))).strftime("%d %H")
        assert sandbox.render("{{ strftime_now('%d %H') }}", VALUES) == expected
        sandbox.close()


def test_a_forked_process_has_a_child_of_its_own() -> None:
    SANDBOX.render("x", VALUES)
    theirs = SANDBOX.child.process
    pid = os.fork()
    if pid == 0:  # pragma: no cover (another process)
        code = 1
        try:
            code = 0 if SANDBOX.render("{{ 1 + 1 }}", VALUES) == "2" and SANDBOX.child.process is not theirs else 1
            SANDBOX.close()
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert SANDBOX.render("{{ 1 + 2 }}", VALUES) == "3"


def test_a_child_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox()
    for executable in ("/nowhere/python", "/bin/false"):
        monkeypatch.setattr("sys.executable", executable)
        with pytest.raises(ConfigError, match="the process that renders chat templates cannot be started") as caught:
            sandbox.render("x", VALUES)
        assert caught.value.code == "E-DATA-0045"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt"])
def test_template_arguments_cannot_replace_the_conversation(name: str) -> None:
    row = {"messages": MESSAGES, "chat_template_kwargs": {name: [{"role": "user", "content": "x"}]}}
    with pytest.raises(DataError, match=f"chat_template_kwargs cannot set {name}") as caught:
        prepare([row], plain_tokenizer(template=CHATML), DataSettings())
    assert caught.value.code == "E-DATA-0020"


def test_markers_in_macros_and_variables_are_found() -> None:
    """transformers counts characters from the start of the output, which is wrong inside a macro or a capture."""
    template = (
        "{% macro turn(m) %}{{ m.role + ':' }}{% generation %}{{ m.content }}{% endgeneration %}{{ ';' }}{% endmacro %}"
        "{% set all %}{% for m in messages %}{{ turn(m) }}{% endfor %}{% endset %}<{{ all }}>"
    )
    text, spans = SANDBOX.render(template, VALUES, marked=True)
    assert text == "<user:Hello;assistant:Hi;>"
    assert [text[start:end] for start, end in spans] == ["Hello", "Hi"]


def test_markers_that_the_template_looks_at_are_refused() -> None:
    template = "{% set x %}{% generation %}Hi{% endgeneration %}{% endset %}{{ x | length }}"
    with pytest.raises(RenderError, match="it changes what it has marked"):
        SANDBOX.render(template, VALUES, marked=True)


class Odd:
    shape = None


@pytest.mark.parametrize(
    ("value", "expected"),
    [({"a": (1, 2.5, None, True)}, {"a": [1, 2.5, None, True]}), ({1: Odd()}, {"1": "<Odd>"}), ([{2}], ["<set>"])],
)
def test_only_plain_values_reach_a_template(value: Any, expected: Any) -> None:
    assert plain(value) == expected
