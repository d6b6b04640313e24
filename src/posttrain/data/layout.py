"""Whether a template keeps a conversation as it is: every turn, in order, and each where it is looked for.

A template is a program. One that turns the order round, repeats the question after the answer or moves a system message
would have others' words trained as the assistant's. So each shape of conversation (roles, what each message has, tools)
is shown to the template once, with a word of its own in place of every text; where the words turn up says where the
texts do. A template that treats texts differently by what they say is not seen through.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from posttrain.data.chat import Chat
from posttrain.data.conversation import SYSTEM
from posttrain.data.rendering import LimitError, RenderError, Span
from posttrain.data.turns import NoPrefixError, Turns, common_length
from posttrain.types import Example, Message


@dataclass(frozen=True)
class Fault:
    """What the template does to message `index`."""

    code: str
    index: int
    what: str


def find_fault(
    chat: Chat, messages: list[Message], example: Example, num_given: int | None, of_assistant: bool
) -> Fault | None:
    """What is wrong with how the template lays out a conversation like this one; None if nothing is, or if it cannot be
    told. The first `num_given` messages are a prompt of which only the completion is trained; of a conversation
    `of_assistant`, only the assistant's turns are. Raises LimitError."""
    parts = (tuple(sorted(key for key, value in message.items() if value)) for message in messages)
    roles = (message["role"] for message in messages)
    asked = repr(sorted(example.template_kwargs.items()))
    key = (chat.text(example), bool(example.tools), asked, num_given, of_assistant, *zip(roles, parts, strict=True))
    if key not in chat.layouts:
        words = [_worded(message, i) for i, message in enumerate(messages)]
        try:
            layout = Layout(chat, words, example, chat.render(words, example))
            chat.layouts[key] = layout.fault(num_given, of_assistant)
        except LimitError:
            raise
        except (RenderError, NoPrefixError):  # said, where the conversation itself has it, when it is rendered
            chat.layouts[key] = None
    return chat.layouts[key]


def has_odd_systems(messages: list[Message]) -> bool:
    """Whether there are several system messages, or one that does not open the conversation."""
    return any(message["role"] in SYSTEM for message in messages[1:])


@dataclass(frozen=True)
class Layout:
    """The conversation of words, whose rendering is `full`."""

    chat: Chat
    messages: list[Message]
    example: Example
    full: str

    @cached_property
    def places(self) -> dict[int, list[Span]]:
        """Where each message's word stands."""
        return {
            i: [found.span() for found in re.finditer(_word(i), self.full, re.IGNORECASE)]
            for i, message in enumerate(self.messages)
            if message.get("content") == _word(i)
        }

    def fault(self, num_given: int | None, of_assistant: bool) -> Fault | None:
        if not any(self.places.values()):  # it writes all texts otherwise than they are
            return None
        found = self._left_out() or self._moved()
        if found is None and of_assistant:
            found = self._in_answers()
        if found is None and num_given is not None:
            found = self._after_prompt(num_given, of_assistant)
        return found

    def _left_out(self) -> Fault | None:
        """Templates may leave out what is said beside a call, and write what tools say in their own way."""
        for i, found in self.places.items():
            role = self.messages[i]["role"]
            if not found and not self.messages[i].get("tool_calls") and role in (*SYSTEM, "user", "assistant"):
                return Fault("E-DATA-0043", i, f"is of role {role}, which the chat template leaves out")
        return None

    def _moved(self) -> Fault | None:
        """A lone system message that opens the conversation may stand elsewhere: some have it in a user's turn."""
        is_free = self.messages[0]["role"] in SYSTEM and not has_odd_systems(self.messages)
        order = [i for i, found in self.places.items() if found and not (i == 0 and is_free)]
        for earlier, later in pairwise(order):
            if self.places[later][0] < self.places[earlier][0]:
                role = self.messages[later]["role"]
                return Fault("E-DATA-0046", later, f"(role {role}) is written before the message that it follows")
        return None

    def _in_answers(self) -> Fault | None:
        """Others' words in what is taken for the assistant's. Where the template marks that itself, it is so."""
        if self.chat.is_marked(self.example):
            return None
        spans = Turns(self.chat, self.messages, self.example, self.full).spans()
        others = [i for i, message in enumerate(self.messages) if message["role"] != "assistant"]
        return self._within(spans, others, "is written within the assistant's turn")

    def _after_prompt(self, num_given: int, of_assistant: bool) -> Fault | None:
        """Words of the prompt in what is taken for the completion; of others' turns only if all of it is trained."""
        given = self.chat.render(self.messages[:num_given], self.example, generation_prompt=True)
        trained = (common_length(given, self.full), len(self.full))
        what = "is written otherwise when the completion follows, so that where the completion begins cannot be told"
        which = [i for i in range(num_given) if not of_assistant or self.messages[i]["role"] == "assistant"]
        return self._within([trained], which, what)

    def _within(self, spans: list[Span], which: list[int], what: str) -> Fault | None:
        for i in which:
            for start, end in self.places.get(i, ()):
                if any(start < b and a < end for a, b in spans):
                    return Fault("E-DATA-0046", i, f"(role {self.messages[i]['role']}) {what}")
        return None


def _worded(message: Message, i: int) -> Message:
    content = message.get("content")
    return {**message, "content": _word(i)} if isinstance(content, str) and content.strip() else message


def _word(i: int) -> str:
    """No text has it, and none is part of another."""
    return f"qzword{i}qz"
