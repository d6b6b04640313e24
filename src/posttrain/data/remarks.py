"""What a conversation's rendering and tokens give reason to say: counted in the report, or refused.

Nothing here changes a token. Special tokens in a user's text are encoded as such, as TRL and generation do; a template
without a beginning-of-sequence token gets none. Both are worth knowing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from posttrain.data.chat import Chat
from posttrain.data.codes import bad_row
from posttrain.data.flags import has_flags
from posttrain.data.layout import has_odd_systems
from posttrain.data.marks import holds_mark, stops_within, tokens_in_answers
from posttrain.data.passed_over import PassedOver
from posttrain.data.render import Rendered
from posttrain.data.rendering import RenderError, with_objects
from posttrain.data.report import Cases, DataReport
from posttrain.types import Example, Message, Origin, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = re.compile(r"[\w ]*")
"""What looks the same in a text and as JSON."""


TWO_THOUGHTS = re.compile(r"<think>\s*</think>\s*<think>")


def remark_on_text(rendered: Rendered, chat: Chat, missing: tuple[str, ...], report: DataReport) -> None:
    """Count what the rendering shows. `missing` are markers of the template that are no tokens of the tokenizer."""
    origin, talk = rendered.example.origin, [message for part in _talks(rendered.example) for message in part]
    cases = {
        "endless": not chat.ends(rendered.trained_text) and not has_flags(talk),
        "given_otherwise": rendered.given_otherwise,
        "thought_lost": rendered.thought_lost,
        "thought_after_none": _thinks_after_none(rendered.full, talk),
        "tools_left_out": _leaves_tools_out(rendered, chat),
        "arguments_quoted": _quotes_arguments(rendered, chat),
        "odd_systems": has_odd_systems(talk),
        "special_in_text": _holds_special(rendered.example, chat),
        "stops_in_answers": bool(stops := tokens_in_answers(_trained(rendered, talk), chat.marks)),
        "unknown_arguments": bool(unknown := _unknown_arguments(rendered.example, chat)),
        "marks_in_text": holds_mark(talk, chat.marks),
    }
    report.stops.update(stops)
    report.unknown.update(unknown)
    for name, is_one in cases.items():
        if is_one:
            getattr(report, name).add(origin)
    report.written_as_text.update(token for token in missing if token in rendered.full)


def remark_on_plain(rendered: Rendered, tokenizer: PreTrainedTokenizerBase, report: DataReport) -> None:
    """Count a completion in which the end-of-sequence token stands before its end. A text without a prompt may be
    several documents."""
    eos = tokenizer.eos_token
    if rendered.example.prompt is not None and stops_within(str(rendered.example.completions[0]), str(eos or "")):
        report.stops_in_answers.add(rendered.example.origin)
        report.stops[str(eos)] += 1


def remark_on_oddities(names: Iterable[str], origin: Origin, report: DataReport) -> None:
    for name in names:
        getattr(report, name).add(origin)


def remark_on_rest(over: PassedOver, origin: Origin, report: DataReport) -> None:
    """Count what nothing is made of, where it looks meant."""
    for name in over.meant:
        report.no_place.setdefault(name, Cases()).add(origin)
    for name in over.formats:
        report.other_formats.setdefault(name, Cases()).add(origin)


def remark_on_bos(
    whole: Tokenized, rendered: Rendered, tokenizer: PreTrainedTokenizerBase, adds_bos: bool, report: DataReport
) -> None:
    """Refuse a conversation that begins with two BOS tokens (E-DATA-0044); count one that begins with none, where the
    tokenizer puts one before plain text (`adds_bos`)."""
    bos, first = tokenizer.bos_token_id, whole.branches[0].ids[:2].tolist()
    if bos is not None and first == [bos, bos]:
        what = f"begins with {tokenizer.bos_token} twice: once by the chat template, once more"
        hint = "take it out of the messages, or out of the template"
        raise bad_row("E-DATA-0044", whole.origin, what, row=rendered.full, hint=hint)
    if adds_bos and first[:1] != [bos]:
        report.without_bos.add(whole.origin)


def _talks(example: Example) -> list[list[Message]]:
    return [part for part in (example.prompt, *example.completions) if isinstance(part, list)]


def _trained(rendered: Rendered, talk: list[Message]) -> list[Message]:
    """Those of `talk` of which something may be trained."""
    given = rendered.example.prompt if rendered.prompt is not None else None
    return talk[len(given) :] if isinstance(given, list) else talk


def _holds_special(example: Example, chat: Chat) -> bool:
    """Whether what others than the assistant say holds a token of the tokenizer's own, such as `<|im_end|>`."""
    messages = (message for talk in _talks(example) for message in talk)
    texts = (message.get("content") for message in messages if message["role"] != "assistant")
    return chat.special is not None and any(isinstance(text, str) and chat.special.search(text) for text in texts)


def _thinks_after_none(full: str, talk: list[Message]) -> bool:
    """Whether the template writes an empty thought before one that stands in the content."""
    said = [message["content"] for message in talk if isinstance(message.get("content"), str)]
    return "<think>" in full and len(TWO_THOUGHTS.findall(full)) > sum(len(TWO_THOUGHTS.findall(one)) for one in said)


def _leaves_tools_out(rendered: Rendered, chat: Chat) -> bool:
    """Names and descriptions also stand in calls and texts, so whether they are written is for the template to show."""
    talk = [message for part in _talks(rendered.example) for message in part]
    return bool(rendered.example.tools) and not chat.shows_tools(talk, rendered.example)


def _unknown_arguments(example: Example, chat: Chat) -> list[str]:
    """Template arguments whose names stand nowhere in the template."""
    template = chat.text(example) if example.template_kwargs else ""
    return [name for name in example.template_kwargs if not re.search(rf"\b{re.escape(name)}\b", template)]


def _quotes_arguments(rendered: Rendered, chat: Chat) -> bool:
    """Whether arguments that are JSON in a text are written as JSON once more, in quotes which the equal objects would
    not get. (Never by our own templates, which are given objects.)"""
    talk = [message for part in _talks(rendered.example) for message in part]
    quoted = {form for text in _arguments(talk) for form in (json.dumps(text), json.dumps(text, ensure_ascii=False))}
    found = [form for form in quoted if form in rendered.full]
    if not found:
        return False
    try:
        of_objects = chat.render([with_objects(message) for message in talk], rendered.example)
    except RenderError:  # it wants texts
        return False
    return any(rendered.full.count(form) > of_objects.count(form) for form in found)


def _arguments(talk: list[Message]) -> Iterator[str]:
    """Those of calls that are texts."""
    for message in talk:
        for call in message.get("tool_calls") or []:
            written = call.get("function", call).get("arguments")
            if isinstance(written, str) and written.strip():
                yield written
