"""JSON: a completion is a JSON object or array, or one that fits a schema. A Markdown fence around it is allowed.

A bare number or string is JSON too, but no one asks for one; it is worth nothing here. So is JSON with NaN, with keys
that stand twice, with numbers of thousands of digits, or nested so deep that reading it would end the stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.functions import RewardFunction, text_of
from posttrain.types import Content

FENCE = re.compile(r"\A\s*```(?:json)?[ \t]*\n(.*)\n[ \t]*```\s*\Z", re.DOTALL)
NOTHING = object()


def read_json(text: str) -> Any:
    """The object or array that `text` is, or NOTHING."""
    fenced = FENCE.match(text)
    try:
        value = json.loads(fenced.group(1) if fenced else text, parse_constant=_refuse, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return NOTHING
    return value if isinstance(value, dict | list) else NOTHING


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def json_valid(completions: Sequence[Content], **_: Any) -> list[float]:
    """1.0 for a JSON object or array, else 0.0."""
    return [float(read_json(text_of(content)) is not NOTHING) for content in completions]


def json_schema(schema: dict[str, Any] | None = None, column: str = "schema") -> RewardFunction:
    """1.0 where the completion is JSON that fits `schema`, or else the one in its row's `column` (an object, or its
    text), else 0.0; None where a row has no schema. References to other documents are not followed."""
    fixed = None if schema is None else _validator(schema)

    def reward(completions: Sequence[Content], **columns: Any) -> list[float | None]:
        if fixed is None and column not in columns:
            raise ConfigError(f"reward function 'json_schema' finds no schemas: the data has no column {column}",
                              hint="give the schema: json_schema({...})")  # fmt: skip
        wanted = [fixed] * len(completions) if fixed is not None else [_of_row(one) for one in columns[column]]
        return [
            None if validator is None else float(_fits(validator, text_of(content)))
            for validator, content in zip(wanted, completions, strict=True)
        ]

    reward.__name__ = reward.__qualname__ = "json_schema"
    return reward


def _of_row(given: Any) -> Any:
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ConfigError(f"json_schema: a row's schema is no JSON: {error}") from None
    return _validator(given)


def _validator(schema: Any) -> Any:
    try:
        from jsonschema import exceptions, validators
        from referencing import Registry
    except ImportError:
        raise ConfigError("json_schema needs jsonschema, which is not installed",
                          hint='pip install "posttrain[rewards]"') from None  # fmt: skip
    kind = validators.validator_for(schema, default=validators.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except (exceptions.SchemaError, TypeError, AttributeError) as error:
        said = str(getattr(error, "message", error))
        raise ConfigError(f"json_schema: this is no JSON schema: {said}") from None
    return kind(schema, registry=Registry())


def _fits(validator: Any, text: str) -> bool:
    from referencing.exceptions import Unresolvable

    value = read_json(text)
    try:
        return value is not NOTHING and bool(validator.is_valid(value))
    except RecursionError:
        return False
    except Unresolvable as error:
        raise ConfigError(f"json_schema: the schema refers to what is not in it: {error}") from None
