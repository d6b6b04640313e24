"""Rendering conversations with a chat template.

A template of our own is rendered here, any other in a child process (sandbox.py), for it is a program out of a file.
Both write what transformers' `apply_chat_template` writes, which is what the model is given when it is used; but ours
are given the arguments of tool calls as objects, however the row holds them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from posttrain.data.codes import excerpt
from posttrain.data.flags import spoken
from posttrain.data.marks import Marks, marks_of
from posttrain.data.rendering import (
    BrokenTemplateError,
    LimitError,
    RenderError,
    Span,
    plain,
    rendered,
    with_objects,
    with_reasoning,
)
from posttrain.data.sandbox import SANDBOX
from posttrain.data.templates import is_ours
from posttrain.errors import ConfigError
from posttrain.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.layout import Fault

PROBE = "a text to look for"
TOOL = "tool0qz"
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, or in its place `template`, which was asked for as `name`. `end_tokens` are the
    tokenizer's added tokens, longest first."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    name: str | None = None
    end_tokens: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        tokens = sorted((token for token in self.tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
        object.__setattr__(self, "end_tokens", tuple(tokens))

    @cached_property
    def special(self) -> re.Pattern[str] | None:
        """Matches any of the tokenizer's added tokens, which are encoded as such wherever a text holds them."""
        return re.compile("|".join(map(re.escape, self.end_tokens))) if self.end_tokens else None

    @cached_property
    def marks(self) -> Marks:
        """What the template writes around turns."""
        return marks_of(self)

    @cached_property
    def _special_tokens(self) -> Mapping[str, Any]:
        return dict(self.tokenizer.special_tokens_map)

    def text(self, example: Example) -> str:
        """The template that `example` is rendered with: some models have another one for tools."""
        return str(self.tokenizer.get_chat_template(self.template, example.tools))

    def is_marked(self, example: Example) -> bool:
        return bool(MARKER.search(self.text(example)))

    @cached_property
    def _shapes(self) -> dict[str, str]:
        return {}

    @cached_property
    def layouts(self) -> dict[tuple[object, ...], Fault | None]:
        """What layout.py has found, by shape of conversation."""
        return {}

    @cached_property
    def _tools_shown(self) -> dict[tuple[object, ...], bool]:
        return {}

    def shows_tools(self, messages: list[Message], example: Example) -> bool:
        """Whether the template writes the tools of a conversation of these roles, found by giving one of them a name
        that stands nowhere else. True where that cannot be found out."""
        roles = tuple(message["role"] for message in messages)
        key = (self.text(example), repr(sorted(example.template_kwargs.items())), roles)
        if key not in self._tools_shown:
            tools = [_called(tool, TOOL) for tool in example.tools or [] if isinstance(tool, Mapping)]
            try:
                text = self.render(messages, replace(example, tools=tools)) if tools else TOOL
            except RenderError:
                text = TOOL
            self._tools_shown[key] = TOOL in text
        return self._tools_shown[key]

    def _shape(self, template: str) -> str:
        """How `template` takes content, found by showing it some: `any`, `text` alone, or `parts` alone (those of
        models that also see images, which leave a plain text out without a word)."""
        if is_ours(template):
            return "text"
        if template not in self._shapes:
            text, parts = (self._shows(template, content) for content in (PROBE, [{"type": "text", "text": PROBE}]))
            self._shapes[template] = "any" if text == parts else "parts" if parts else "text"
        return self._shapes[template]

    def _shows(self, template: str, content: Any) -> bool:
        values = {"messages": [{"role": "user", "content": content}], "tools": None, "documents": None}
        try:
            text = SANDBOX.render(template, {**values, "add_generation_prompt": False, **plain(self._special_tokens)})
        except (LimitError, BrokenTemplateError):
            raise
        except RenderError:
            return False
        return PROBE in text

    def check(self) -> None:
        """Raises ConfigError (E-DATA-0047) for a template that cannot be read at all, before any row is."""
        template = str(self.tokenizer.get_chat_template(self.template, None))
        try:
            self._shape(template)
        except BrokenTemplateError as error:
            raise self.broken(error, template) from None
        except LimitError:  # said of the first conversation
            pass

    def broken(self, error: BrokenTemplateError, template: str) -> ConfigError:
        """What is said of a template that cannot be read."""
        line = error.line or 0
        whose = "the tokenizer's chat template" if self.template is None else "chat_template"
        where = f"{whose}, line {line}" if line else whose
        if self.template is not None and self.name not in (None, self.template):  # a file
            where = f"{self.name}:{line}" if line else str(self.name)
        lines = template.split("\n")
        shown = f"\n  | {excerpt(lines[line - 1].strip())}" if 0 < line <= len(lines) else ""
        hint = 'mend it, or choose another, e.g. chat_template="chatml"'
        return ConfigError(f"{where}: no Jinja template: {error.what}{shown}", hint=hint, code="E-DATA-0047")

    def render(self, messages: list[Message], example: Example, generation_prompt: bool = False) -> str:
        """The text of `messages`; with `generation_prompt`, what the model is given to answer. Raises RenderError."""
        return str(self._rendered(self._values(messages, example, generation_prompt), example))

    def marked_spans(self, messages: list[Message], example: Example) -> list[Span]:
        """The characters that the template marks as the assistant's. Raises RenderError."""
        _, spans = self._rendered(self._values(messages, example, False), example, marked=True)
        return [(start, end) for start, end in spans]

    def _rendered(self, values: dict[str, Any], example: Example, marked: bool = False) -> Any:
        template = self.text(example)
        if not is_ours(template):
            return SANDBOX.render(template, values, marked)
        from posttrain.data.jinja import answer

        return rendered(answer(template, values, marked))

    def _values(self, messages: list[Message], example: Example, generation_prompt: bool) -> dict[str, Any]:
        taken = sorted({"messages", "tools", "add_generation_prompt"} & set(example.template_kwargs))
        if taken:
            raise RenderError(f"chat_template_kwargs cannot set {', '.join(taken)}")
        template = self.text(example)
        shape = self._shape(template)
        tools = [_schema(tool) for tool in example.tools] if example.tools is not None else None
        shown = [with_reasoning(plain(_shaped(spoken(message), shape))) for message in messages]
        return {
            "messages": [with_objects(message) for message in shown] if is_ours(template) else shown,
            "tools": plain(tools),
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **plain(self._special_tokens),
            **plain(example.template_kwargs),
        }

    def ends(self, text: str) -> bool:
        """Whether `text` ends with one of the tokenizer's own tokens, as a turn must for the model to learn to stop."""
        return text.rstrip().endswith(self.end_tokens)


def _shaped(message: Message, shape: str) -> Message:
    """`message` with its content in the form that the template takes."""
    content = message.get("content")
    if shape == "parts" and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if shape == "text" and isinstance(content, list):
        return {**message, "content": "".join(part.get("text", "") for part in content)}
    return message


def _called(tool: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`tool` under another name."""
    function = tool.get("function")
    return {**tool, "function": {**function, "name": name}} if isinstance(function, Mapping) else {**tool, "name": name}


def _schema(tool: Any) -> Any:
    if not inspect.isroutine(tool):
        return tool
    from transformers.utils import get_json_schema

    return get_json_schema(tool)
