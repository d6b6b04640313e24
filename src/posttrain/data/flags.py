"""Which turns and which of their characters the data themselves ask to be trained or left out.

A message may say `train` or `training` (true, false) or `weight` (1, 0); a part of its content the same, or Axolotl's
`train_detail` (`begin_offset`, `end_offset` inclusive, `train`). All become `train` and `train_detail` of the message:
`[begin, end, train]` with `end` exclusive. Weights between 0 and 1 are refused: a token is trained or it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from posttrain.data.codes import Row, bad_row, kind
from posttrain.types import Message, Origin

KEYS = ("train", "training", "weight")
DETAIL = "train_detail"


def spoken(message: Message) -> Message:
    """`message` as templates get it: without its flags."""
    return {key: value for key, value in message.items() if key not in (*KEYS, DETAIL)}


def has_flags(messages: list[Message]) -> bool:
    return any("train" in message or DETAIL in message for message in messages)


def normalise(message: Message, field: str, row: Row, origin: Origin) -> Message:
    """`message` with its flags, however they are written, as `train` and `train_detail`. Content in parts becomes one
    text, for few templates of language models know parts. Raises E-DATA-0042 for what is no flag, or where two
    disagree."""
    flag = _flag(message, field, row, origin)
    detail = [_range(item, f"{field}.{DETAIL}[{i}]", row, origin) for i, item in _details(message, field, row, origin)]
    clean = spoken(message)
    content = message.get("content")
    if isinstance(content, list):
        clean["content"], parts = _joined(content, f"{field}.content", row, origin)
        detail += parts
    if flag is not None:
        clean["train"] = flag
    if detail:
        clean[DETAIL] = detail
        _check_ranges(clean, field, row, origin)
    return clean


def _flag(message: Mapping[str, Any], field: str, row: Row, origin: Origin) -> bool | None:
    """What the first of the keys says; None where there is none."""
    said = {key: _boolean(message[key], f"{field}.{key}", row, origin) for key in KEYS if message.get(key) is not None}
    if len(set(said.values())) > 1:
        what = "contradict each other"
        raise bad_row("E-DATA-0042", origin, what, field=f"{field}: {', '.join(said)}", row=row, hint="keep one")
    return next(iter(said.values()), None)


def _boolean(value: object, field: str, row: Row, origin: Origin) -> bool:
    if value in (0, 1) and isinstance(value, bool | int | float):
        return bool(value)
    shown = value if isinstance(value, int | float) else kind(value)
    hint = "write true or false (1 or 0); a token cannot be trained by half"
    raise bad_row("E-DATA-0042", origin, f"is {shown}", field=field, seen=value, row=row, hint=hint)


def _details(message: Message, field: str, row: Row, origin: Origin) -> list[tuple[int, Any]]:
    detail = message.get(DETAIL) or []
    if not isinstance(detail, list):
        raise bad_row("E-DATA-0042", origin, f"is {kind(detail)}, not a list", field=f"{field}.{DETAIL}", row=row)
    return list(enumerate(detail))


def _range(item: Any, field: str, row: Row, origin: Origin) -> list[Any]:
    if isinstance(item, list | tuple) and len(item) == 3:
        return [item[0], item[1], item[2]]
    begin, end = (item.get("begin_offset"), item.get("end_offset")) if isinstance(item, Mapping) else (None, None)
    if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end):
        hint = 'a range is {"begin_offset": 0, "end_offset": 8, "train": false}, both ends inclusive'
        raise bad_row("E-DATA-0042", origin, "is no range of characters", field=field, row=row, hint=hint)
    flag = _flag(item, field, row, origin)
    if flag is None:
        raise bad_row("E-DATA-0042", origin, "does not say whether to train", field=field, row=row)
    return [begin, end + 1, flag]


def _check_ranges(message: Message, field: str, row: Row, origin: Origin) -> None:
    content = message.get("content")
    length = len(content) if isinstance(content, str) else 0
    furthest = max(end for _, end, _ in message[DETAIL])
    if furthest > length:
        what = f"ends at character {furthest - 1}, but the content has {length} characters"
        raise bad_row("E-DATA-0042", origin, what, field=f"{field}.{DETAIL}", row=row)


def _joined(parts: list[Any], field: str, row: Row, origin: Origin) -> tuple[str, list[list[Any]]]:
    """The text of all parts, and the ranges of those that have a flag."""
    text, ranges = "", []
    for i, part in enumerate(parts):
        flag = _flag(part, f"{field}[{i}]", row, origin)
        if flag is not None and part["text"]:
            ranges.append([len(text), len(text) + len(part["text"]), flag])
        text += part["text"]
    return text, ranges
