"""JSON as the standard has it: no NaN, no infinity (nor a number that becomes one), no key twice in one object."""

from __future__ import annotations

import json
import math
from typing import Any


class NotANumber(ValueError):
    """NaN or an infinity: Python writes them, but they are not JSON."""


class TooLarge(NotANumber):
    """A number such as 1e999, which is read as an infinity."""


class Repeated(ValueError):
    """An object with a key that stands twice, of which JSON readers keep the one or the other."""


def refuse_constant(name: str) -> float:
    raise NotANumber(name)


def finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise TooLarge(text)
    return value


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        keys = [key for key, _ in pairs]
        raise Repeated(next(key for key in keys if keys.count(key) > 1))
    return made


DECODER = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=_once_each)
LENIENT = json.JSONDecoder(parse_constant=refuse_constant, parse_float=finite)
"""The same but for repeated keys: for what stands in a text, and for speed."""


def decode_json(text: str) -> Any:
    """Raises ValueError for what is not JSON."""
    try:
        return LENIENT.decode(text)
    except NotANumber as error:
        raise NotANumber(f"{error} is no number of JSON's") from None
