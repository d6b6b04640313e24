"""Which turns and which of their characters the data themselves ask to be trained or left out.

A message may say `train` or `training` (true, false) or `weight` (1, 0); a part of its content the same, or Axolotl's
`train_detail` (`begin_offset`, `end_offset` inclusive, `train`). All become `train` and `train_detail` of the message:
`[begin, end, train]` with `end` exclusive. Weights between 0 and 1 are refused: a token is trained or it is not. So are
keys that look like a flag misspelt, or are another library's name for one (`trian`, `loss`); templates get all others.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from posttrain.data.codes import Row, bad_row, excerpt, kind
from posttrain.data.rendering import REASONING
from posttrain.types import Message, Origin

KEYS = ("train", "training", "weight")
DETAIL = "train_detail"
OFFSETS = ("begin_offset", "end_offset")
RANGE = 'a range is {"begin_offset": 0, "end_offset": 8, "train": false}, both ends inclusive'
USUAL = {*KEYS, DETAIL, *OFFSETS, *REASONING, "role", "content", "name", "tool_calls", "tool_call_id", "type", "text"}
"""Keys of messages, parts and ranges that are no flags misspelt."""
FOREIGN = {"ignore", "ignored", "loss", "loss_mask", "loss_weight", "loss_scale", "mask", "masked", "no_loss",
           "train_loss", "trainable", "trained", "is_trained", "train_on", "train_on_turn", "supervise", "supervised",
           "learn"}  # fmt: skip
"""What others call such a flag, in some cases the other way round."""
PIECES = {"train", "training", "trained", "trainable", "loss", "mask", "masked", "supervise", "supervised"}
"""Words in the names of flags (`is_train`, `no_train`, `compute_loss`), of keys that say yes or no."""
YES_OR_NO = ("true", "false", "yes", "no", "0", "1")
WORDS = "true trains the turn, false leaves it out"
SIMILAR = 0.85
"""One letter too many or too few in a short word: `trains`, but not `height`."""


def spoken(message: Message) -> Message:
    """`message` as templates get it: without its flags."""
    return {key: value for key, value in message.items() if key not in (*KEYS, DETAIL)}


def has_flags(messages: list[Message]) -> bool:
    return any("train" in message or DETAIL in message for message in messages)


def normalise(message: Message, field: str, row: Row, origin: Origin) -> Message:
    """`message` with its flags, however they are written, as `train` and `train_detail`. Content in parts becomes one
    text, for few templates of language models know parts. Raises E-DATA-0042 for what is no flag, or where two
    disagree."""
    if len(message) > 2:  # more than a role and what it says
        _check_places(message, field, row, origin, OFFSETS)
        for i, call in enumerate(message.get("tool_calls") or []):
            _check_places(call, f"{field}.tool_calls[{i}]", row, origin, (*KEYS, DETAIL))
    flag = _flag(message, field, row, origin)
    ranges = [(where := f"{field}.{DETAIL}[{i}]", _range(item, where, row, origin))
              for i, item in _details(message, field, row, origin)]  # fmt: skip
    clean = spoken(message)
    content = message.get("content")
    if isinstance(content, list):
        clean["content"], parts = _joined(content, f"{field}.content", row, origin)
        ranges += parts
    if flag is not None:
        clean["train"] = flag
    if ranges:
        _check_ranges(ranges, clean.get("content"), row, origin)
        clean[DETAIL] = [item for _, item in ranges]
    return clean


def _check_places(message: Mapping[str, Any], field: str, row: Row, origin: Origin, keys: tuple[str, ...]) -> None:
    """Raises E-DATA-0042 for `keys` in a part of a message where nothing would be made of them."""
    if (key := next((key for key in keys if message.get(key) is not None), None)) is not None:
        what, hint = "stands where it says nothing", f"give it to the message, as `train` or `{DETAIL}`; {RANGE}"
        raise bad_row("E-DATA-0042", origin, what, field=f"{field}.{key}", seen=message[key], row=row, hint=hint)


def _flag(message: Mapping[str, Any], field: str, row: Row, origin: Origin) -> bool | None:
    """What the first of the keys says; None where there is none. A key that seems to be meant as one is refused."""
    for key in message:
        if (
            key not in USUAL
            and message[key] is not None
            and (meant := _meant_as(str(key), _says_yes_or_no(message[key])))
        ):
            what = "is no key that posttrain knows, and seems to say whether to train"
            hint = f'did you mean "{meant}"? {WORDS}; rename the key if it says something else'
            raise bad_row("E-DATA-0042", origin, what, field=f"{field}.{key}", seen=message[key], row=row, hint=hint)
    said = {key: _boolean(message[key], f"{field}.{key}", row, origin) for key in KEYS if message.get(key) is not None}
    if len(set(said.values())) > 1:
        what = "contradict each other"
        raise bad_row("E-DATA-0042", origin, what, field=f"{field}: {', '.join(said)}", row=row, hint="keep one")
    return next(iter(said.values()), None)


def is_like_a_flag(key: str, value: object) -> bool:
    """Whether a column seems to say whether its row, or a part of it, is to be trained."""
    return _says_yes_or_no(value) and _meant_as(key, True) is not None


@lru_cache(maxsize=1000)
def _meant_as(key: str, is_yes_or_no: bool) -> str | None:
    """The flag that `key` is a slip of, or another library's name for; None for a key of its own."""
    spelt = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key.strip()).lower().replace("-", "_")
    if spelt in FOREIGN or (is_yes_or_no and PIECES.intersection(spelt.split("_"))):
        return "train"
    for flag in (*KEYS, DETAIL):
        if sorted(spelt) == sorted(flag) or difflib.SequenceMatcher(None, spelt, flag).ratio() >= SIMILAR:
            return flag
    return None


def _says_yes_or_no(value: object) -> bool:
    return value in (0, 1) if isinstance(value, int | float) else str(value).strip().lower() in YES_OR_NO


def _boolean(value: object, field: str, row: Row, origin: Origin) -> bool:
    if value in (0, 1) and isinstance(value, bool | int | float):
        return bool(value)
    shown = f"text ({excerpt(value, width=40)!r})" if isinstance(value, str) else kind(value)
    what = f"is {value}" if isinstance(value, int | float) else f"is {shown} and says neither true nor false"
    hint = "write true or false (1 or 0); a token cannot be trained by half"
    raise bad_row("E-DATA-0042", origin, what, field=field, seen=value, row=row, hint=hint)


def _details(message: Message, field: str, row: Row, origin: Origin) -> list[tuple[int, Any]]:
    detail = message.get(DETAIL)
    if not isinstance(detail, list | None):
        raise bad_row("E-DATA-0042", origin, f"is {kind(detail)}, not a list", field=f"{field}.{DETAIL}", row=row)
    return list(enumerate(detail or []))


def _range(item: Any, field: str, row: Row, origin: Origin) -> list[Any]:
    """`[begin, end, train]` with `end` exclusive: as Axolotl writes it, or in the form that it has here already."""
    if isinstance(item, list | tuple) and len(item) == 3:
        begin, end = (_offset(item[i], f"{field}[{i}]", item, row, origin) for i in (0, 1))
        flag = _boolean(item[2], f"{field}[2]", row, origin)
    elif isinstance(item, Mapping):
        begin, end = (_offset(item.get(key), f"{field}.{key}", item, row, origin) for key in OFFSETS)
        end += 1
        said = _flag(item, field, row, origin)
        if said is None:
            raise bad_row("E-DATA-0042", origin, "does not say whether to train", field=field, seen=item, row=row)
        flag = said
    else:
        what = f"is {kind(item)}, no range of characters"
        raise bad_row("E-DATA-0042", origin, what, field=field, seen=item, row=row, hint=RANGE)
    if begin >= end:
        what = f"is no range of characters: it ends at {end - 1}, before it begins"
        raise bad_row("E-DATA-0042", origin, what, field=field, seen=item, row=row, hint=RANGE)
    return [begin, end, flag]


def _offset(value: Any, field: str, item: Any, row: Row, origin: Origin) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    what = "is missing" if value is None else f"is {value}" if isinstance(value, int | float) else f"is {kind(value)}"
    raise bad_row(
        "E-DATA-0042", origin, f"{what}, not a place in the content", field=field, seen=item, row=row, hint=RANGE
    )


def _check_ranges(ranges: list[tuple[str, list[Any]]], content: Any, row: Row, origin: Origin) -> None:
    """Each with its field: within the content, and no two on one another, for they would have to agree."""
    length = len(content) if isinstance(content, str) else 0
    before, reached = "", 0
    for field, (begin, end, _) in sorted(ranges, key=lambda item: item[1][:2]):
        if end > length:
            what = f"ends at character {end - 1}, but the content has {length} characters"
            raise bad_row("E-DATA-0042", origin, what, field=field, row=row, hint="characters are counted from 0")
        if begin < reached:
            what = f"overlaps {before} (characters {begin} to {min(end, reached) - 1})"
            raise bad_row("E-DATA-0042", origin, what, field=field, row=row, hint="let a character stand in one range")
        before, reached = field, end


def _joined(parts: list[Any], field: str, row: Row, origin: Origin) -> tuple[str, list[tuple[str, list[Any]]]]:
    """The text of all parts, and the ranges of those that have a flag, each with its field."""
    text, ranges = "", []
    for i, part in enumerate(parts):
        _check_places(part, f"{field}[{i}]", row, origin, (DETAIL, *OFFSETS))
        flag = _flag(part, f"{field}[{i}]", row, origin)
        if flag is not None and part["text"]:
            ranges.append((f"{field}[{i}]", [len(text), len(text) + len(part["text"]), flag]))
        text += part["text"]
    return text, ranges
