"""Example → text: what will be tokenised, where the completion begins, and which characters are the assistant's.

Plain text ends with the end-of-sequence token, conversations end as their template ends them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.data.chat import Chat
from posttrain.data.codes import SKIP, bad_row, excerpt
from posttrain.data.flags import has_flags
from posttrain.data.layout import find_fault
from posttrain.data.rendering import REASONING, BrokenTemplateError, LimitError, RenderError, Span
from posttrain.data.turns import NoPrefixError, Turns
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS = re.compile(r"[\W_]+")
"""What is neither letter nor digit."""
HINTS = {
    "E-DATA-0043": "give it another role, drop it, or choose a template that knows the role",
    "E-DATA-0046": "the chat template does not keep to the order of the messages: mend it, or choose another",
}
WITH_TOOLS = 'choose a template with tools, e.g. chat_template="chatml"'
WAY_OUT = "mark the assistant's part in the template with {% generation %}, or use prompt-completion data"


@dataclass(frozen=True)
class Supervision:
    """Which tokens are trained. `completion_only=None`: the completion where a row has one, else the whole sequence.
    `assistant_only=None`: the assistant's turns of rows that are whole conversations. Of a completion in which
    others speak too, what the assistant says; all of it with `whole_answers`, for pairs and ratings are of what follows
    the prompt, as in TRL."""

    completion_only: bool | None = None
    assistant_only: bool | None = False
    whole_answers: bool = False

    def of_completion(self, example: Example) -> bool:
        if self.completion_only and example.prompt is None:
            hint = "for conversations that is assistant_only_loss; or give columns `prompt` and `completion`"
            raise ConfigError(f"{example.origin}: completion_only_loss needs a prompt and a completion", hint=hint)
        return example.prompt is not None and self.completion_only is not False

    def of_assistant(self, example: Example) -> bool:
        if self.assistant_only and not example.is_conversational:
            hint = "give messages, or leave assistant_only_loss off"
            raise ConfigError(f"{example.origin}: assistant_only_loss needs conversations, this is text", hint=hint)
        if self.assistant_only is None and example.prompt is None:
            return example.is_conversational
        return bool(self.assistant_only) or (self.of_completion(example) and self._is_mixed(example))

    def _is_mixed(self, example: Example) -> bool:
        """Whether others than the assistant speak in the completion: what they say is given to the model in use."""
        turns = example.completions[0]
        return isinstance(turns, list) and not self.whole_answers and any(m["role"] != "assistant" for m in turns)


@dataclass(frozen=True)
class Rendered:
    """`full` is the text of the whole sequence. `prompt` is what the model is given, where only what follows it is to
    be trained; `spans` are the characters that the assistant says, where only those are, and `cuts` are where flags of
    the data part what is trained from what is not within a turn. `given_otherwise`: in use, the
    model is given another text than what stands before a turn of its own here. `thought_lost`: the template leaves a
    thought out."""

    example: Example
    full: str
    prompt: str | None = None
    spans: list[Span] | None = None
    cuts: tuple[int, ...] = ()
    given_otherwise: bool = False
    thought_lost: bool = False

    @property
    def trained_text(self) -> str:
        """The text up to the last character that is trained."""
        return self.full if not self.spans else self.full[: self.spans[-1][1]]

    @property
    def is_chat(self) -> bool:
        """Whether a template wrote it: then it holds its special tokens already, and gets no others."""
        return self.example.is_conversational


def render(
    example: Example, tokenizer: PreTrainedTokenizerBase, chat: Chat | None, supervision: Supervision
) -> Rendered:
    """The text of a supervised example. `chat` may be None where it is no conversation. Raises DataError, and
    UnicodeEncodeError for half a surrogate pair, which no tokenizer takes."""
    if example.is_conversational:
        assert chat is not None
        rendered = _render_chat(example, chat, supervision)
    else:
        rendered = _render_text(example, tokenizer, supervision)
    rendered.full.encode()
    return rendered


def _render_text(example: Example, tokenizer: PreTrainedTokenizerBase, supervision: Supervision) -> Rendered:
    eos = tokenizer.eos_token
    if not isinstance(eos, str):
        raise ConfigError("the tokenizer has no end-of-sequence token", hint='name one: eos_token="..."')
    supervision.of_assistant(example)
    prompt, completion = str(example.prompt or ""), str(example.completions[0])
    is_ended = example.is_ended or completion.rstrip().endswith(eos)  # templates write a line break behind it
    full = prompt + (completion if is_ended else completion + eos)
    return Rendered(example, full, prompt if supervision.of_completion(example) else None)


def _render_chat(example: Example, chat: Chat, supervision: Supervision) -> Rendered:
    before = example.prompt if isinstance(example.prompt, list) else []
    messages = [*before, *(message for message in example.completions[0] if isinstance(message, dict))]
    of_completion, of_assistant = supervision.of_completion(example), supervision.of_assistant(example)
    if of_completion:
        _check_prompt_flags(before, example)
    full, spans, prompt, otherwise = "", None, None, False
    cuts: tuple[int, ...] = ()
    try:
        full = chat.render(messages, example)
        turns = Turns(chat, messages, example, full)
        _check_layout(chat, messages, example, len(before) if of_completion else None, of_assistant, full)
        if of_completion:
            prompt = chat.render(before, example, generation_prompt=True)
            otherwise = not full.startswith(prompt)
        if of_assistant:
            spans = turns.spans()
            otherwise = otherwise or turns.given_otherwise()
        if has_flags(messages):
            turns_only, flagged = spans if spans is not None else [(0, len(full))], turns.flagged()
            spans, cuts = _with_flags(turns_only, flagged), _cuts(turns_only, flagged)
    except LimitError as error:
        hint = "a template that takes this much is broken or hostile: look at it, or choose another"
        message = f"{example.origin}: the chat template is out of bounds: {error}"
        raise ConfigError(message, hint=hint, code="E-DATA-0041") from None
    except BrokenTemplateError as error:
        raise chat.broken(error, chat.text(example)) from None
    except NoPrefixError as error:
        raise bad_row("E-DATA-0021", example.origin, str(error), row=full, hint=WAY_OUT) from None
    except DataError:
        raise
    except (RenderError, TypeError, ValueError, KeyError, IndexError) as error:
        raise _template_error(example, messages, error, chat.text(example)) from error
    _check_calls(messages, example, full)
    _check_left_out(messages, example, full)
    thought_lost = any(_thought_lost(message, full) for message in messages)
    return Rendered(example, full, prompt, spans, cuts, otherwise, thought_lost)


def _with_flags(spans: list[Span], flagged: list[tuple[Span, bool]]) -> list[Span]:
    """`spans` with those flagged true added and those flagged false taken out, a later flag before an earlier one."""
    for (start, end), train in flagged:
        kept = [part for a, b in spans for part in ((a, min(b, start)), (max(a, end), b)) if part[0] < part[1]]
        spans = sorted([*kept, (start, end)] if train and start < end else kept)
    return spans


def _cuts(spans: list[Span], flagged: list[tuple[Span, bool]]) -> tuple[int, ...]:
    """Where `flagged` begin or end, other than where `spans` do."""
    edges = {edge for span, _ in flagged for edge in span}
    return tuple(sorted(edges - {edge for span in spans for edge in span}))


def _check_prompt_flags(prompt: list[Message], example: Example) -> None:
    for i, message in enumerate(prompt):
        if message.get("train") or any(train for *_, train in message.get("train_detail", ())):
            what = "asks to be trained, but of a prompt with a completion only the completion is"
            hint = "give all of it as `messages`, or set completion_only_loss=False"
            raise bad_row("E-DATA-0042", example.origin, what, field=f"prompt[{i}]", row=message, hint=hint)


def _template_error(example: Example, messages: list[Message], error: Exception, template: str) -> DataError:
    calls = next((i for i, message in enumerate(messages) if message.get("tool_calls")), None)
    if calls is not None and "tool_calls" not in template:
        what = f"calls tools, which the chat template does not know (it fails: {error})"
        return bad_row("E-DATA-0023", example.origin, what, field=f"messages[{calls}]", row=messages, hint=WITH_TOOLS)
    roles = " → ".join(message["role"] for message in messages)
    what = f"the chat template refuses the conversation ({excerpt(roles, width=60)}): {error}"
    hint = f'change the row, skip such rows ({SKIP}), or choose another template, e.g. chat_template="chatml"'
    return bad_row("E-DATA-0020", example.origin, what, row=messages, hint=hint)


def _check_calls(messages: list[Message], example: Example, full: str) -> None:
    """A template that knows no tools leaves a call out without a word, and an empty answer would be trained."""
    for i, message in enumerate(messages):
        for call in message.get("tool_calls") or []:
            name = call.get("function", call).get("name")
            if isinstance(name, str) and name not in full:
                what = f"calls {name}, but the chat template leaves tool calls out"
                where = f"messages[{i}]"
                raise bad_row("E-DATA-0023", example.origin, what, field=where, row=full, hint=WITH_TOOLS)


def _check_layout(
    chat: Chat, messages: list[Message], example: Example, num_given: int | None, of_assistant: bool, full: str
) -> None:
    """A template that turns the order round would have others' words trained as the assistant's."""
    fault = find_fault(chat, messages, example, num_given, of_assistant)
    if fault is not None:
        content = messages[fault.index].get("content")
        hint = HINTS[fault.code]
        where = f"messages[{fault.index}]"
        raise bad_row(fault.code, example.origin, fault.what, field=where, seen=content, row=full, hint=hint)


def _check_left_out(messages: list[Message], example: Example, full: str) -> None:
    """A template that does not know a role leaves the message out without a word."""
    for i, message in enumerate(messages):
        content = message.get("content")
        if message["role"] in ("assistant", "tool") or not isinstance(content, str):
            continue
        lines = [line.strip() for line in content.splitlines() if line.strip()]
        if lines and not any(line in full for line in lines) and not _is_in(content, full):
            what = f"is of role {message['role']}, which the chat template leaves out"
            where, hint = f"messages[{i}]", HINTS["E-DATA-0043"]
            raise bad_row("E-DATA-0043", example.origin, what, field=where, seen=content, row=full, hint=hint)


def _is_in(content: str, full: str) -> bool:
    """Whether `full` has the letters and digits of `content`, in whatever case or escapes the template writes them."""
    forms = (content, json.dumps(content), json.dumps(content, ensure_ascii=False))
    text = LETTERS.sub("", full).casefold()
    return any(LETTERS.sub("", form).casefold() in text for form in forms)


def _thought_lost(message: Message, full: str) -> bool:
    """Whether the template leaves out what the assistant thinks, as several do for all turns but the last."""
    thought = next((message[key] for key in REASONING if isinstance(message.get(key), str)), "")
    content = message.get("content")
    if not thought and isinstance(content, str) and "</think>" in content:
        thought = content.split("</think>")[0].split("<think>")[-1]
    return bool(thought.strip()) and thought.strip() not in full
