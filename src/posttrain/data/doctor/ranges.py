"""A large JSONL file, read by several processes: each takes ranges of whole lines.

Lines that are fine are decoded here; those that are not are given to the one reader of JSON Lines, in their place. So
there is one place that says what is wrong with a line, and it is not in the way of the million that are right.
"""

from __future__ import annotations

import codecs
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.tally import Counting, Tally
from posttrain.data.json_files import read_line
from posttrain.data.lines import line_at
from posttrain.data.settings import DataSettings
from posttrain.data.strict_json import DECODER
from posttrain.errors import UserError
from posttrain.types import Origin

BLOCK = 4 * 2**20
LONGEST_LINE = 2**20
"""Longer ones take the careful way."""
BLANK = b" \t\r\n\v\f"
LONG = b"?"
"""Stands for a long line; no JSON, and no line, for that would end."""


@dataclass(frozen=True)
class Range:
    path: Path
    start: int
    stop: int
    first_line: int


@dataclass(frozen=True)
class Orders:
    """What every worker needs to know."""

    data: DataSettings
    settings: DoctorSettings
    max_errors: int
    key_limit: int


def can_be_cut(path: Path, settings: DoctorSettings) -> bool:
    if (
        path.suffix.lower() not in (".jsonl", ".ndjson")
        or not path.is_file()
        or path.stat().st_size < settings.parallel_bytes
    ):
        return False
    with open(path, "rb") as file:
        return file.read(2) not in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def cut(path: Path) -> tuple[list[Range], int]:
    """Ranges of whole lines of about `BLOCK` bytes, and how many lines the file has."""
    ranges, start, position, lines, first_line = [], 0, 0, 0, 1
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            end = block.rfind(b"\n")
            position += len(block)
            if end >= 0:
                stop = position - len(block) + end + 1
                ranges.append(Range(path, start, stop, first_line))
                lines += block.count(b"\n")
                start, first_line = stop, lines + 1
    if start < position:
        ranges.append(Range(path, start, position, first_line))
        lines += 1
    return ranges, lines


def tallies(ranges: list[Range], orders: Orders, processes: int) -> Iterator[Tally]:
    """A tally of each range, in order. At most two ranges a process are under way or waiting to be taken."""
    if processes == 1:
        yield from (tally_range(part, orders) for part in ranges)
        return
    waiting: list[Future[Tally]] = []
    parts = iter(ranges)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), initializer=_let_parent_decide) as pool:
        try:
            for part in parts:
                waiting.append(pool.submit(tally_range, part, orders))
                if len(waiting) >= 2 * processes:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        except BrokenProcessPool:
            message = f"{ranges[0].path}: a process that read a part of it was killed"
            raise UserError(message, hint="--processes 1 needs the least memory") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _let_parent_decide() -> None:
    """An interrupt from the terminal reaches every process; the one that started them answers for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def tally_range(part: Range, orders: Orders) -> Tally:
    counting = Counting(orders.data, orders.settings, orders.max_errors, orders.key_limit)
    name = str(part.path)
    for row, (line, start, raw) in enumerate(_lines(part)):
        origin, value = Origin(name, row, line), _decoded(raw)
        if not isinstance(value, dict):
            whole = raw if raw != LONG else line_at(part.path, start)
            value = read_line(whole, origin, counting.reject) if whole.strip() else None
        if value is not None:
            counting.row(value, origin)
    return counting.tally


def _lines(part: Range) -> Iterator[tuple[int, int, bytes]]:
    """The number, position and bytes of each line that is not blank; `LONG` of one that may be too long to be read."""
    with open(part.path, "rb") as file:
        file.seek(part.start)
        line, start = part.first_line, part.start
        while start < part.stop:
            raw = file.readline(LONGEST_LINE)
            length = len(raw)
            more = raw
            while not more.endswith(b"\n") and (more := file.readline(LONGEST_LINE)):
                length += len(more)
                raw = LONG
            if start == 0:
                raw = raw.removeprefix(codecs.BOM_UTF8)
            if raw.strip(BLANK):
                yield line, start, raw
            start += length
            line += 1


def _decoded(raw: bytes) -> Any:
    try:
        return DECODER.decode(raw.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
