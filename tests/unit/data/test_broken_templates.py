"""A template that is no program of Jinja's is one error about the template, before any row is read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.view import token_view
from posttrain.errors import ConfigError
from tests.tiny_tokenizers import CHATML, chatml_tokenizer, plain_tokenizer

ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
BROKEN = {
    "{% for m in messages %}\n{{ m.content }\n{% endfor %}": (2, "unexpected '}'", "{{ m.content }"),
    "{% for m in messages %}\n{{ m.content }}\n{% endfro %}": (3, "unknown tag 'endfro'", "{% endfro %}"),
    "{% for m in messages %}\n\n{{ m.content }}": (3, "Unexpected end of template", "{{ m.content }}"),
    "\n{{ messages | shout }}": (2, "No filter named 'shout'", "{{ messages | shout }}"),
    "{{ messages is shouted }}": (1, "No test named 'shouted'", "{{ messages is shouted }}"),
    "{% for m in messages %}{% generation %}{{ m }}{% endfor %}": (1, "unknown tag 'endfor'", "{% generation %}"),
}


class Rows:
    """Counts how many of it are read."""

    def __init__(self) -> None:
        self.read = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for _ in range(3):
            self.read += 1
            yield ROW


@pytest.mark.parametrize("template", BROKEN)
@pytest.mark.parametrize("policy", ["error", "skip"])
@pytest.mark.parametrize("kind", ["file", "text", "tokenizer"])
def test_it_is_named_with_its_line(template: str, policy: str, kind: str, tmp_path: Path) -> None:
    line, says, shown = BROKEN[template]
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    chosen = {"file": str(path), "text": template, "tokenizer": None}[kind]
    place = {"file": f"{path}:{line}: ", "text": f"chat_template, line {line}: ",
             "tokenizer": f"the tokenizer's chat template, line {line}: "}[kind]  # fmt: skip
    rows = Rows()
    tokenizer = plain_tokenizer(template=template if kind == "tokenizer" else None)
    with pytest.raises(ConfigError) as caught:
        prepare(rows, tokenizer, DataSettings(on_bad_row=policy, chat_template=chosen, assistant_only=None))
    assert caught.value.code == "E-DATA-0047"
    assert caught.value.message.startswith(f"{place}no Jinja template: ")
    assert says in caught.value.message
    assert shown in caught.value.message.splitlines()[-1]
    assert "data" not in caught.value.message.split("no Jinja")[1].split("\n")[0]  # no row is blamed
    if kind != "tokenizer":  # which is not needed where the data are text
        assert rows.read == 0


def test_what_only_python_finds() -> None:
    with pytest.raises(ConfigError, match=r"^chat_template: no Jinja template: 'break' outside loop") as caught:
        token_view(ROW, plain_tokenizer(), DataSettings(chat_template="{% break %}{{ 1 }}"))
    assert caught.value.code == "E-DATA-0047"


def test_text_needs_no_template() -> None:
    tokenizer = plain_tokenizer(template="{% broken")
    assert prepare([{"text": "Hello"}], tokenizer, DataSettings()).report.used == 1


def test_the_template_for_tools_is_another() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "\n{{ broken"}
    assert prepare([ROW], tokenizer, DataSettings()).report.used == 1
    with pytest.raises(ConfigError, match="the tokenizer's chat template, line 2") as caught:
        prepare([{**ROW, "tools": [{"name": "add"}]}], tokenizer, DataSettings(on_bad_row="skip"))
    assert caught.value.code == "E-DATA-0047"
