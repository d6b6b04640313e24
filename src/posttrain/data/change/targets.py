"""The formats that rows are written in: a function each, from an example to a row without the user's own columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

from posttrain.data.codes import Row, bad_row
from posttrain.data.conversation import is_answered
from posttrain.data.doctor.content import as_messages
from posttrain.data.flags import DETAIL
from posttrain.data.formats.transcripts import begins_as_one, is_transcript
from posttrain.data.rendering import REASONING
from posttrain.errors import DataError
from posttrain.types import Example, Message

TRANSCRIPT = (
    "make messages of its turns first (the guide has the lines that do it: docs/data.md, Conversations in one text), "
    "or --to prompt-completion, which keeps the text"
)


def cannot(example: Example, to: str, why: str, hint: str | None = "choose another format") -> DataError:
    return bad_row("E-DATA-0052", example.origin, f"cannot be written as {to}: {why}", hint=hint)


def _messages(example: Example, to: str) -> list[Message]:
    """All of a supervised example as one conversation. Plain text has no turns."""
    (completion,) = example.completions
    if isinstance(completion, str) and example.prompt is None:
        raise cannot(example, to, "plain text has no turns")
    if isinstance(example.prompt, str) and begins_as_one(example.prompt) and is_transcript(example):
        why = "its text is a conversation (Human: ... Assistant: ...), which would become one message"
        raise cannot(example, to, why, TRANSCRIPT)
    return [*_given(example), *as_messages(completion, "assistant")]


def _given(example: Example) -> list[Message]:
    """The prompt as part of a conversation, in which nothing else says that its answers are not trained. (Of ratings
    the last answer alone is.)"""
    messages = as_messages(example.prompt or [], "user")
    if _is_rated(example):
        return messages
    return [{**m, "train": False} if m["role"] == "assistant" and "train" not in m else m for m in messages]


def _is_rated(example: Example) -> bool:
    return isinstance(example.columns.get("label"), bool)


def _check_one_answer(example: Example, before: list[Message], to: str) -> None:
    """Before the last answer nothing may be trained that would not be from then on."""
    trained = 0 if _is_rated(example) else sum(is_answered([message]) for message in before)
    if trained:
        why = f"{trained} earlier turn{'s' if trained > 1 else ''} would no longer be trained"
        hint = "write messages or sharegpt, which keep all of them; --keep last trains the last answer alone"
        raise cannot(example, to, why, hint)


def _to_messages(example: Example) -> Row:
    return {"messages": _messages(example, "messages")}


def _to_prompt_completion(example: Example) -> Row:
    """Prompt and completion stay what they are; a conversation is cut before its last assistant turn."""
    (completion,) = example.completions
    if example.prompt is not None and isinstance(example.prompt, str) == isinstance(completion, str):
        return {"prompt": example.prompt, "completion": completion}
    messages = _messages(example, "prompt-completion")
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise cannot(example, "prompt-completion", "nothing stands before an answer of the assistant")
    _check_one_answer(example, messages[:last], "prompt-completion")
    return {"prompt": messages[:last], "completion": messages[last:]}


TO_SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}


def _to_sharegpt(example: Example) -> Row:
    turns: list[Row] = []
    for message in _messages(example, "ShareGPT"):
        flags: Row = {key: message[key] for key in ("train", "train_detail") if key in message}
        calls, content = message.get("tool_calls"), message.get("content")
        extra = {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}
        unknown = set(message) - {"role", "content", "tool_calls", *extra, *flags}
        if unknown:
            raise cannot(example, "ShareGPT", f"it has no place for {', '.join(sorted(unknown))}")
        if content or extra or not calls:
            role = TO_SHAREGPT.get(message["role"], message["role"])
            turns.append({"from": role, "value": content or "", **flags, **extra})
        if calls:
            functions = [_function(call) for call in calls]
            value = functions[0] if len(functions) == 1 else functions
            whole = {key: flag for key, flag in flags.items() if key == "train"}  # a call's text has no ranges
            turns.append({"from": "function_call", "value": json.dumps(value, ensure_ascii=False), **whole})
    return {"conversations": turns}


def _function(call: Row) -> Row:
    """With the id that it is answered by, for which our reader looks there."""
    names = {"id": call["id"]} if call.get("id") is not None and "function" in call else {}
    return {**names, **call.get("function", call)}


def _without_usual_flag(message: Message, is_last: bool) -> Message:
    """Without a flag that says what goes without saying: the last turn, the assistant's, is trained. (Earlier answers
    that are trained are refused by themselves.)"""
    is_usual = message.get("train") is (message["role"] == "assistant" if is_last else False)
    is_usual = is_usual or (not is_last and message["role"] == "assistant")
    return {key: value for key, value in message.items() if key != "train" or not is_usual}


def _no_place_in_alpaca(message: Message) -> Iterator[str]:
    """What a message has beside a role and a text, in words."""
    names = {
        "tool_calls": "tool calls",
        "train": "train flags",
        DETAIL: "train flags",
        **dict.fromkeys(REASONING, "thoughts"),
    }
    yield from (names.get(key, f"`{key}`") for key in message if key not in ("role", "content"))
    if not isinstance(message.get("content"), str) and "tool_calls" not in message:
        yield "messages without content"


def _to_alpaca(example: Example) -> Row:
    """`instruction` and `output`; earlier pairs, none of them trained, become `history`, a system message `system`."""
    *before, answer = _messages(example, "Alpaca")
    messages = [*(_without_usual_flag(m, is_last=False) for m in before), _without_usual_flag(answer, is_last=True)]
    if found := {what for message in messages for what in _no_place_in_alpaca(message)}:
        raise cannot(
            example,
            "Alpaca",
            f"it has no place for {', '.join(sorted(found, key=lambda what: (what[0] == '`', what)))}",
        )
    row: Row = {}
    if messages[0]["role"] == "system":
        row["system"] = messages[0]["content"]
        messages = messages[1:]
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise cannot(example, "Alpaca", "it wants the user and the assistant in turns")
    _check_one_answer(example, before, "Alpaca")
    texts = [message["content"] for message in messages]
    pairs = [[question, answer] for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    row |= {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    return {**row, "history": pairs[:-1]} if len(pairs) > 1 else row


TARGETS: dict[str, Callable[[Example], Row]] = {
    "messages": _to_messages,
    "chatml": _to_messages,
    "prompt-completion": _to_prompt_completion,
    "sharegpt": _to_sharegpt,
    "alpaca": _to_alpaca,
}
