"""Where a conversation's turns stand in its rendering, to the character.

Templates with `{% generation %}` markers say it themselves (but what their generation prompt writes, an empty thought
say, is given to the model and not said by it, wherever a marker stands). For the others it follows from rendering
prefixes: what the model is given is `render(messages[:i], add_generation_prompt=True)`, what it has said ends where
`render(messages[:i + 1])` ends (the line break after the end-of-turn token included, as TRL's training templates have
it). Where a template does not render prefixes alike (it counts messages, or moves the system message to the last turn),
a turn is found by rendering the conversation once more with a placeholder in its place. No marker strings to configure,
and where that fails too, an error instead of a guess.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.data.flags import DETAIL
from posttrain.data.rendering import LimitError, RenderError, Span
from posttrain.types import Example, Message

if TYPE_CHECKING:
    from posttrain.data.chat import Chat

PLACEHOLDER = "placeholder0placeholder"


class NoPrefixError(ValueError):
    """The template renders the beginning of a conversation unlike the whole, so turns cannot be told apart."""


@dataclass(frozen=True)
class Turns:
    """The turns of `messages`, whose rendering is `full`."""

    chat: Chat
    messages: list[Message]
    example: Example
    full: str
    _prompts: dict[int, str | None] = field(default_factory=dict)

    @property
    def of_assistant(self) -> list[int]:
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def spans(self) -> list[Span]:
        """The characters that the assistant says, in order. Raises NoPrefixError, RenderError."""
        if self.chat.is_marked(self.example):
            return self._behind_prompts(self.chat.marked_spans(self.messages, self.example))
        return [self.said(i) for i in self.of_assistant]

    def _behind_prompts(self, spans: list[Span]) -> list[Span]:
        """`spans` that a template marks, none of which begins before the end of what the model is given there. One that
        holds several turns is left as it is."""
        begins = [begin for i in self.of_assistant if (begin := self._begin(i)) is not None]
        return [(self._behind(span, begins), span[1]) for span in spans]

    def _behind(self, span: Span, begins: list[int]) -> int:
        """White space that a template marks before what is said stays marked: TRL's own templates do that."""
        found = [begin for begin in begins if span[0] <= begin < span[1]]
        return found[0] if len(found) == 1 and self.full[span[0] : found[0]].strip() else span[0]

    def _begin(self, i: int) -> int | None:
        """Where turn `i` begins by what the model is given; None where that cannot be told."""
        given = self._given(i) if i else None
        if given is not None and self.full.startswith(given):
            return len(given)
        try:
            return self.said(i)[0]
        except LimitError:
            raise
        except (NoPrefixError, RenderError):
            return None

    def given_otherwise(self) -> bool:
        """Whether the model is given anything else, when it is to take one of its turns, than what stands before that
        turn here: then it is trained on a context that it does not see when it is used."""
        return any(not self.full.startswith(self._given(i) or "") for i in self.of_assistant if i)

    def said(self, i: int) -> Span:
        """The characters of the assistant's message `i`, its end-of-turn token included."""
        try:
            return self._by_prefix(i)
        except (NoPrefixError, RenderError) as error:
            if isinstance(error, LimitError):
                raise
            return self._by_placeholder(i, error)

    def whole(self, i: int) -> Span:
        """The characters of message `i` with its header and its end."""
        try:
            before, upto = self._before(i), self._upto(i)
            if self.full.startswith(before) and self.full.startswith(upto):
                return len(before), len(upto)
            error: Exception = NoPrefixError(_unlike(i + 1))
        except RenderError as refused:
            error = refused
        return self._by_placeholder(i, error)

    def content(self, i: int, begin: int = 0, end: int | None = None) -> Span:
        """Where the characters `[begin, end)` of the content of message `i` stand. A space that the template writes
        before the content belongs to its first character, for most tokenizers make one token of a space and its word.
        Raises NoPrefixError where the template writes the content otherwise than it is, white space at its ends
        aside."""
        text = self.messages[i].get("content") or ""
        is_assistant = self.messages[i]["role"] == "assistant"
        first, last = self.said(i) if is_assistant else self.whole(i)
        at, left_out, length = self._written(i, text, first, last)
        start, stop = (
            at + min(max(offset - left_out, 0), length) for offset in (begin, len(text) if end is None else end)
        )
        if start == at:
            start = first + len(self.full[first:at].rstrip(None if is_assistant else " "))
        return start, stop

    def _written(self, i: int, text: str, first: int, last: int) -> tuple[int, int, int]:
        """Where `text`, the content of message `i`, begins in its turn `[first, last)`, how many of its first
        characters (white space) are left out, and how many are written. It is where another text in its place stands,
        or the one place where it is found."""
        said = text.strip()
        lead = len(text) - len(text.lstrip())
        if (placed := self._placed(i)) is not None and first <= len(placed[0]) <= last:
            at = len(placed[0])
            if self.full.startswith(text, at):
                return at, 0, len(text)
            if self.full.startswith(said, at):
                return at, lead, len(said)
        if not said or self.full.count(said, first, last) != 1:
            raise NoPrefixError(f"messages[{i}] is rendered otherwise than written, so its parts cannot be found")
        return self.full.find(said, first, last), lead, len(said)

    def flagged(self) -> list[tuple[Span, bool]]:
        """What the messages' own flags say, in the order in which it is to be applied: spans, and whether they are
        trained. Of a message of others that is to be trained, what it says and its end, not its header."""
        found: list[tuple[Span, bool]] = []
        for i, message in enumerate(self.messages):
            is_assistant = message["role"] == "assistant"
            if "train" in message:
                span = self.said(i) if is_assistant else self.whole(i)
                if message["train"] and not is_assistant:
                    span = self.content(i)[0], span[1]
                found.append((span, message["train"]))
            found += [(self.content(i, begin, end), train) for begin, end, train in message.get(DETAIL, ())]
        return found

    def _given(self, i: int) -> str | None:
        """What the model is given to take turn `i`; None where the template refuses to ask for it."""
        if i not in self._prompts:
            try:
                self._prompts[i] = self.chat.render(self.messages[:i], self.example, generation_prompt=True)
            except LimitError:
                raise
            except RenderError:
                self._prompts[i] = None
        return self._prompts[i]

    def _before(self, i: int) -> str:
        return self.chat.render(self.messages[:i], self.example) if i else ""

    def _upto(self, i: int) -> str:
        if i + 1 == len(self.messages):
            return self.full
        return self.chat.render(self.messages[: i + 1], self.example)

    def _by_prefix(self, i: int) -> Span:
        upto = self._upto(i)
        start = self._start(i) if i else self._first_start(upto)
        if self.full.startswith(upto):
            return start, len(upto)
        if upto[:start] != self.full[:start]:
            raise NoPrefixError(_unlike(i + 1))
        if (around := self._around_content(i)) is not None:
            return start, around[1]
        return start, start + self._length_inside(i, upto[start:], self.full[start:])

    def _start(self, i: int) -> int:
        """Where what the model is given ends. The generation prompt may say more than the whole conversation does
        there (an empty thought); then the turn begins where they part, as with a completion after its prompt, or with
        its content, if that happens to begin with the same characters. Where the turn before ends otherwise inside a
        conversation (with a line break more, in Tulu's), the same prompt stands behind that end."""
        given = self._given(i)
        if given is None:
            raise NoPrefixError(_unlike(i))
        if self.full.startswith(given):
            return len(given)
        common, before = common_length(given, self.full), self._before(i)
        if common < len(before):
            raise NoPrefixError(_unlike(i))
        placed = self._placed(i)
        prompt = given[len(before) :] if given.startswith(before) else ""
        at = self.full.find(prompt, len(before)) if prompt.strip() else -1
        if at >= 0 and (not self.full[len(before) : at].strip() if placed is None else at <= len(placed[0])):
            return at + len(prompt)
        return common if placed is None else min(common, len(placed[0]))

    def _first_start(self, upto: str) -> int:
        """A conversation that the assistant opens: the generation prompt is what asking for another turn adds."""
        prompt = self.chat.render(self.messages[:1], self.example, generation_prompt=True).removeprefix(upto)
        if not prompt or upto.count(prompt) != 1:
            raise NoPrefixError("the assistant speaks first, and the beginning of its turn cannot be told")
        return upto.index(prompt) + len(prompt)

    def _length_inside(self, i: int, alone: str, inside: str) -> int:
        """The length of a turn that is rendered otherwise when it comes last (`alone`) than when others follow.

        Either the last turn has more before it (Qwen3's thought): then `inside` begins with the end of what stands
        there alone, down to the end-of-turn token. Or it ends otherwise: with one token more (Phi-3's end of text),
        or with another token (gpt-oss). Of the content, this knows nothing: it may hold such tokens too, so that turns
        with content are cut after it before they come here."""
        if inside.startswith(alone):
            return len(alone)
        tokens = self.chat.end_tokens
        shortest = max((alone.rfind(token) for token in tokens), default=-1)
        for cut in range(shortest + 1):
            if inside.startswith(alone[cut:]):
                return len(alone) - cut
        last = next((token for token in tokens if alone.rstrip().endswith(token)), "")
        body = alone.rstrip().removesuffix(last)
        if last and inside.startswith(body):
            if self.chat.ends(body):
                return len(body)
            other = next((token for token in tokens if inside.startswith(token, len(body))), "")
            if other:
                return len(body) + len(other)
        raise NoPrefixError(f"messages[{i}] is rendered otherwise at the end of a conversation than inside it")

    def _by_placeholder(self, i: int, error: Exception) -> Span:
        """The turn where another text, put in place of its content, turns up. `error` is raised where it does not."""
        found = self._around_content(i)
        if found is None:
            raise error
        before, end = found
        return self._after_header(i, before), end

    def _around_content(self, i: int) -> tuple[str, int] | None:
        """What stands before the content of message `i`, and where its turn ends; None where the template shows
        something else in place of another content, or the message has none."""
        placed = self._placed(i)
        if placed is None:
            return None
        before, after = placed
        upto = [*self.messages[:i], {**self.messages[i], "content": PLACEHOLDER}]
        _, _, alone = self.chat.render(upto, self.example).partition(PLACEHOLDER)
        return before, len(self.full) - len(after) + self._length_inside(i, alone, after)

    def _placed(self, i: int) -> tuple[str, str] | None:
        """What stands before and after the content of message `i`, found by putting another text in its place."""
        content = self.messages[i].get("content")
        if not isinstance(content, str) or not content.strip() or PLACEHOLDER in self.full:
            return None
        others = [*self.messages[:i], {**self.messages[i], "content": PLACEHOLDER}, *self.messages[i + 1 :]]
        before, _, after = self.chat.render(others, self.example).partition(PLACEHOLDER)
        end = len(self.full) - len(after)
        fits = self.full.startswith(before) and self.full.endswith(after) and len(before) <= end
        return None if not fits or PLACEHOLDER in after else (before, after)

    def _after_header(self, i: int, before: str) -> int:
        """Where the turn begins, if its content begins after `before`: after the generation prompt, where that stands
        between the message before and the content (a thought may follow it)."""
        given, bare = self._given(i) if i else None, self._before(i)
        prompt = given[len(bare) :] if given is not None and given.startswith(bare) else ""
        at = before.rfind(prompt) if prompt else -1
        said = self.messages[i - 1].get("content") if i else None
        if at < 0 or (isinstance(said, str) and before.rfind(said.strip()) > at):
            return len(before)
        return at + len(prompt)


def _unlike(i: int) -> str:
    return f"messages[:{i}] alone are rendered unlike the beginning of the whole conversation"


def common_length(a: str, b: str) -> int:
    """How many leading characters two texts share."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
