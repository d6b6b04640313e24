"""Lines of text files, compressed or not, as UTF-8 or a complaint that names the line; a byte order mark and CRLF are
fine."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from posttrain.data.codes import excerpt
from posttrain.errors import DataError
from posttrain.types import Origin

MAX_LINE = 32 * 2**20
"""Bytes of a line of JSON or text. What is longer is no row (it would have millions of tokens), and reading it whole
would fill the memory."""


HOLE = bytes(8)
"""NUL bytes in a row, as a file has them that was not written to its end, or a sparse one; no text has so many."""


class _TooLong(bytes):
    """The beginning of a line that is longer than `MAX_LINE`, or the hole in it."""


def raw_lines(path: Path, limited: bool = True) -> Iterator[bytes]:
    """Lines as bytes: they end at a line feed only, so a U+2028 inside a string cuts nothing. Where `limited`, a line
    that is too long comes as its beginning, which `decode` refuses."""
    limit = MAX_LINE if limited else -1
    with _opened(path) as file:
        first = True
        while raw := _next(file, limit, path):
            if first and raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                hint = f"iconv -f UTF-16 -t UTF-8 {path} > fixed{path.suffix}"
                raise DataError(f"{path}: the file is UTF-16, not UTF-8", hint=hint, code="E-DATA-0003")
            if limited and _is_cut(raw):
                raw = _too_long(raw)
                while (more := _next(file, limit, path)) and not more.endswith(b"\n"):
                    pass
            marked = first and raw.startswith(b"\xef\xbb\xbf")
            yield raw[3:] if marked else raw
            first = False


def line_at(path: Path, start: int) -> bytes:
    """The line that begins at this byte, as `raw_lines` has it."""
    with open(path, "rb") as file:
        file.seek(start)
        raw = file.readline(MAX_LINE)
    return _too_long(raw) if _is_cut(raw) else raw


def _too_long(raw: bytes) -> _TooLong:
    return _TooLong(HOLE if HOLE in raw else raw[:1000])


def _is_cut(raw: bytes) -> bool:
    return len(raw) == MAX_LINE and not raw.endswith(b"\n")


def _opened(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb")


def _next(file: BinaryIO | gzip.GzipFile, limit: int, path: Path) -> bytes:
    try:
        return file.readline(limit)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        message = f"{path}: the compressed file is damaged or breaks off: {error}"
        raise DataError(
            message, hint="write it again; gzip -t tells whether it is whole", code="E-DATA-0007"
        ) from error


def too_long(origin: Origin, beginning: str) -> DataError:
    message = f"{origin}  the row is longer than {MAX_LINE // 2**20} MiB\n  | {excerpt(beginning)}"
    return DataError(message, hint="write each row on a line of its own", code="E-DATA-0009")


def _full_of_nul(raw: bytes, origin: Origin) -> DataError:
    """They are counted and not quoted: there may be as many as the disk has room for."""
    if isinstance(raw, _TooLong):
        what = f"the line is longer than {MAX_LINE // 2**20} MiB, for it is full of NUL bytes"
    elif not raw.strip(b"\0\r\n"):
        what = "the line is nothing but NUL bytes"
    else:
        what = f"the line has {raw.count(0)} NUL bytes, from byte {raw.index(HOLE) + 1} on"
    hint = "the file was damaged or is not whole (a full disk, a crash, a download that broke off): write it again"
    return DataError(f"{origin}  {what}", hint=hint, code="E-DATA-0003")


def decode(raw: bytes, origin: Origin) -> str:
    if HOLE in raw or (raw[:1] == b"\0" and not raw.strip(b"\0\r\n")):
        raise _full_of_nul(raw, origin)
    if isinstance(raw, _TooLong):
        raise too_long(origin, raw.decode("utf-8", "replace"))
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        column = len(raw[: error.start].decode("utf-8")) + 1
        near = excerpt(raw[max(error.start - 40, 0) : error.start + 40].decode("utf-8", "replace").strip())
        message = f"{origin}:{column}  byte 0x{raw[error.start]:02x} is not UTF-8\n  | {near}"
        hint = "save the file as UTF-8 (iconv -f LATIN1 -t UTF-8, if it is Latin-1)"
        raise DataError(message, hint=hint, code="E-DATA-0003") from None
