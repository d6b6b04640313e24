"""What passes between a program and its tests: lines of JSON that hold plain values, or the number of an object that
stays where it is. Imported by the scripts inside the sandbox, so it imports nothing of posttrain.

A value of a class of the program's own is never sent as itself: an object that claims to equal everything is a number
on the other side, and equals nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

LONGEST = 8_000_000
"""Bytes of a line."""
DEPTH = 200


class Broken(Exception):
    """The other side is gone, or says what is no message."""


class Channel:
    def __init__(self, reader: BinaryIO, writer: BinaryIO):
        self.reader, self.writer = reader, writer

    def send(self, message: Any) -> None:
        try:
            line = json.dumps(message, allow_nan=True).encode() + b"\n"
        except (ValueError, RecursionError):
            raise Broken from None
        if len(line) > LONGEST:
            raise Broken
        try:
            self.writer.write(line)
            self.writer.flush()
        except OSError:
            raise Broken from None

    def receive(self) -> Any:
        line = self.reader.readline(LONGEST + 1)
        if not line.endswith(b"\n"):
            raise Broken
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Broken from None


def take_standard_streams() -> Channel:
    """The channel that comes as standard input and output; these become nothing, so that what is printed goes nowhere
    and what is read ends at once."""
    reader, writer = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(nothing, number)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115 - as long as the process
    return Channel(os.fdopen(reader, "rb"), os.fdopen(writer, "wb"))


def pack(value: Any, keep: Callable[[Any], int], depth: int = 0) -> Any:
    """`value` as JSON; `keep` gives the number of what is no plain value. Subclasses of plain types are sent as what
    they hold, whatever their own methods say."""
    if depth > DEPTH:
        raise RecursionError("values nested too deep")
    kind = type(value)
    plain: Any
    for plain, sign in ((bool, None), (int, "i"), (float, "f"), (str, None), (bytes, "b"), (complex, "c")):
        if issubclass(kind, plain):
            return _scalar(plain, sign, value)
    if value is None:
        return None
    for plain, sign in ((list, "l"), (tuple, "t"), (set, "s"), (frozenset, "z")):
        if issubclass(kind, plain):
            return [sign, [pack(one, keep, depth + 1) for one in plain.__iter__(value)]]
    if issubclass(kind, dict):
        return ["d", [[pack(k, keep, depth + 1), pack(v, keep, depth + 1)] for k, v in dict.items(value)]]
    return ["o", keep(value)]


def _scalar(plain: type, sign: str | None, value: Any) -> Any:
    if plain is bool:
        return value
    if plain is str:
        return str.__str__(value)
    if plain is int:
        return [sign, hex(int.__add__(value, 0))]  # decimal has a limit on digits
    if plain is float:
        return [sign, float.__repr__(value)]
    if plain is bytes:
        return [sign, bytes.hex(value)]
    return [sign, [float.__repr__(complex(value).real), float.__repr__(complex(value).imag)]]


def unpack(message: Any, found: Callable[[int], Any]) -> Any:
    """Raises Broken for what `pack` never writes."""
    try:
        return _unpack(message, found)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        raise Broken from None


def _unpack(message: Any, found: Callable[[int], Any]) -> Any:
    if message is None or type(message) in (bool, str):
        return message
    sign, held = message
    if sign == "d":
        return {_unpack(key, found): _unpack(value, found) for key, value in held}
    if sign in COLLECTIONS:
        return COLLECTIONS[sign](_unpack(one, found) for one in held)
    if sign == "o":
        return found(held)
    return SCALARS[sign](held)


COLLECTIONS: dict[str, Any] = {"l": list, "t": tuple, "s": set, "z": frozenset}
SCALARS: dict[str, Any] = {
    "i": lambda text: int(text, 16),
    "f": float,
    "b": bytes.fromhex,
    "c": lambda parts: complex(float(parts[0]), float(parts[1])),
}
