"""A large file in parts: whatever the cut and however many processes, the report is that of one reading."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.doctor import ranges
from posttrain.data.doctor.check import CheckReport, check
from posttrain.data.doctor.settings import DoctorSettings
from tests.doctor_files import plain, row

SMALL = DoctorSettings(parallel_bytes=1, near_rows=40)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Good rows, and every kind of trouble between them; no line feed at the end."""
    lines = [json.dumps(one) for one in plain(120)]
    lines[10] = "not json"
    lines[11] = ""
    lines[12] = "\ufeff" + lines[12]
    lines[30] = lines[29]
    lines[31] = '{"messages": [{"role": "usr", "content": "x"}]}'
    lines[40] = json.dumps(row("Mail?", "Write to jane.doe@posteo.de."))
    lines[41] = "[1]"
    lines[42] = '{"text": NaN}'
    lines[44] = '{"text": "a", "text": "b"}'
    lines[43] = json.dumps(row("Long?", "x" * 3000))
    lines[60] = json.dumps({"text": "snow ☃ and a line separator \u2028."}, ensure_ascii=False)
    lines[-1] = '{"messages": [{"role": "user"'
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    return path


def comparable(report: CheckReport) -> dict[str, Any]:
    """All of it: which rows are shown first, too."""
    return {**report.to_dict(), "seconds": 0}


@pytest.mark.parametrize("block", [700, 4000, 10**7])
@pytest.mark.parametrize("longest", [2**20, 500])
@pytest.mark.parametrize("max_errors", [50, 3])
def test_parts_make_the_same_report(
    path: Path, monkeypatch: pytest.MonkeyPatch, block: int, longest: int, max_errors: int
) -> None:
    whole = check(path, settings=SMALL, max_errors=max_errors)
    monkeypatch.setattr(ranges, "BLOCK", block)
    monkeypatch.setattr(ranges, "LONGEST_LINE", longest)
    one_process = ranges.tallies
    monkeypatch.setattr(ranges, "tallies", lambda parts, orders, _: one_process(parts, orders, 1))
    assert comparable(check(path, settings=SMALL, processes=2, max_errors=max_errors)) == comparable(whole)


def test_two_processes_make_the_same_report(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BLOCK", 4000)
    assert comparable(check(path, settings=SMALL, processes=2)) == comparable(check(path, settings=SMALL))


def test_ranges_cover_the_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "BLOCK", 1000)
    parts, lines = ranges.cut(path)
    text = path.read_bytes()
    assert b"".join(text[part.start : part.stop] for part in parts) == text
    assert lines == 120
    assert [text[: part.start].count(b"\n") + 1 for part in parts] == [part.first_line for part in parts]
    assert len(parts) > 5


def test_only_large_json_lines_are_cut(tmp_path: Path) -> None:
    small, other, utf16 = tmp_path / "a.jsonl", tmp_path / "a.txt", tmp_path / "b.jsonl"
    for file in (small, other):
        file.write_text("{}\n" * 100)
    utf16.write_text("{}\n" * 100, "utf-16")
    settings = DoctorSettings(parallel_bytes=10)
    assert ranges.can_be_cut(small, settings)
    assert not ranges.can_be_cut(small, dataclasses.replace(settings, parallel_bytes=1000))
    assert not ranges.can_be_cut(other, settings)
    assert not ranges.can_be_cut(utf16, settings)
    assert not ranges.can_be_cut(tmp_path / "none.jsonl", settings)
