"""Rendering conversations with a chat template, and finding what the assistant says in them, to the character.

Templates with `{% generation %}` markers say it themselves. For the others it follows from rendering prefixes: what the
model is given is `render(messages[:i], add_generation_prompt=True)`, what it has said ends where
`render(messages[:i + 1])` ends (the line break after the end-of-turn token included, as TRL's training templates have
it). No marker strings to configure, and where a template does not render prefixes alike, an error instead of a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class NoPrefixError(ValueError):
    """The template renders the beginning of a conversation unlike the whole, so turns cannot be told apart."""


@dataclass(frozen=True)
class Chat:
    """A tokenizer's chat template, or `template` in its place. `end_tokens` are its added tokens, longest first."""

    tokenizer: PreTrainedTokenizerBase
    template: str | None
    end_tokens: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        tokens = sorted((token for token in self.tokenizer.get_added_vocab() if token.strip()), key=len, reverse=True)
        object.__setattr__(self, "end_tokens", tuple(tokens))

    def render(self, messages: list[Message], example: Example, generation_prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=example.tools,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            **example.template_kwargs,
        )
        return str(text)

    def spans(self, messages: list[Message], example: Example, full: str) -> list[Span]:
        """The characters of `full`, which is `messages` rendered, that the assistant says."""
        template = str(self.tokenizer.get_chat_template(self.template, example.tools))
        if MARKER.search(template):
            return self._marked_spans(messages, example, template)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return [self._turn(i, messages, example, full) for i in turns]

    def _marked_spans(self, messages: list[Message], example: Example, template: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        kwargs: dict[str, Any] = {**self.tokenizer.special_tokens_map, **example.template_kwargs}
        _, spans = render_jinja_template(
            conversations=[messages],
            tools=example.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **kwargs,
        )
        return [(start, end) for start, end in spans[0]]

    def _turn(self, i: int, messages: list[Message], example: Example, full: str) -> Span:
        upto = full if i + 1 == len(messages) else self.render(messages[: i + 1], example)
        if i == 0:
            start = self._first_start(messages, example, upto)
        else:
            given = self.render(messages[:i], example, generation_prompt=True)
            start = self._start(i, messages, example, given, full)
        if full.startswith(upto):
            return start, len(upto)
        if upto[:start] != full[:start]:
            raise NoPrefixError(f"messages[:{i + 1}] alone are rendered unlike the beginning of the whole conversation")
        return start, start + self._length_inside(i, upto[start:], full[start:])

    def _start(self, i: int, messages: list[Message], example: Example, given: str, full: str) -> int:
        """Where what the model is given ends. The generation prompt may say more than the whole conversation does
        there (an empty thought); then the turn begins where they part, as with a completion after its prompt."""
        if full.startswith(given):
            return len(given)
        common = next((at for at, (a, b) in enumerate(zip(given, full, strict=False)) if a != b), len(full))
        if common < len(self.render(messages[:i], example)):
            raise NoPrefixError(f"messages[:{i}] alone are rendered unlike the beginning of the whole conversation")
        return common

    def _first_start(self, messages: list[Message], example: Example, upto: str) -> int:
        """A conversation that the assistant opens: the generation prompt is what asking for another turn adds."""
        prompt = self.render(messages[:1], example, generation_prompt=True).removeprefix(upto)
        if not prompt or upto.count(prompt) != 1:
            raise NoPrefixError("the assistant speaks first, and the beginning of its turn cannot be told")
        return upto.index(prompt) + len(prompt)

    def _length_inside(self, i: int, alone: str, inside: str) -> int:
        """The length of a turn that is rendered otherwise when it comes last (`alone`) than when others follow.

        Either the last turn has more before it (Qwen3's thought): then `inside` begins with the end of what stands
        there alone, down to the end-of-turn token. Or it ends otherwise: with one token more (Phi-3's end of text),
        or with another token (gpt-oss)."""
        shortest = max((alone.rfind(token) for token in self.end_tokens), default=-1)
        for cut in range(shortest + 1):
            if inside.startswith(alone[cut:]):
                return len(alone) - cut
        last = next((token for token in self.end_tokens if alone.rstrip().endswith(token)), "")
        body = alone.rstrip().removesuffix(last)
        if last and inside.startswith(body):
            if self.ends(body):
                return len(body)
            other = next((token for token in self.end_tokens if inside.startswith(token, len(body))), "")
            if other:
                return len(body) + len(other)
        raise NoPrefixError(f"messages[{i}] is rendered otherwise at the end of a conversation than inside it")

    def ends(self, text: str) -> bool:
        """Whether `text` ends with one of the tokenizer's own tokens, as a turn must for the model to learn to stop."""
        return text.rstrip().endswith(self.end_tokens)
