"""Lines of text files, as UTF-8 or a complaint that names the line; a byte order mark and CRLF are fine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from posttrain.data.codes import excerpt
from posttrain.errors import DataError
from posttrain.types import Origin


def raw_lines(path: Path) -> Iterator[bytes]:
    """Lines as bytes: they end at a line feed only, so a U+2028 inside a string cuts nothing."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file):
            if number == 0 and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                hint = f"iconv -f UTF-16 -t UTF-8 {path} > fixed{path.suffix}"
                raise DataError(f"{path}: the file is UTF-16, not UTF-8", hint=hint, code="E-DATA-0003")
            yield raw.removeprefix(b"\xef\xbb\xbf") if number == 0 else raw


def text_lines(path: Path) -> Iterator[str]:
    return (decode(raw, Origin(str(path), index, index + 1)) for index, raw in enumerate(raw_lines(path)))


def decode(raw: bytes, origin: Origin) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        near = excerpt(raw[max(error.start - 40, 0) : error.start + 40].decode("utf-8", "replace").strip())
        message = f"{origin}:{column}  byte 0x{raw[error.start]:02x} is not UTF-8\n  | {near}"
        hint = "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
        raise DataError(message, hint=hint, code="E-DATA-0003") from None
