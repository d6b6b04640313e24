"""JSON arrays of which an element is no JSON: it is one bad row where it can be told from the next one, and the end of
what is read where that would be a guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from posttrain.data.doctor.check import CheckReport, check
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError

GOOD = {"prompt": "One and one?", "completion": " Two."}
BROKEN = {
    "no quotes around a key": b'{"prompt": "a", completion: "b"}',
    "a comma too many": b'{"prompt": "a", "completion": "b",}',
    "a value too few": b'{"prompt": "a", "completion": }',
    "single quotes": b"{'prompt': 'a', 'completion': 'b'}",
    "Python": b'{"prompt": "a", "completion": None, "tags": [True, {"b": False}]}',
    "a comment": b'{"prompt": "a", "completion": "b" /* why "not" [] {} */ }',
    "a line feed in a text": b'{"prompt": "a\nb", "completion": "b"}',
    "a back slash": rb'{"prompt": "\alpha", "completion": "[\"{\"]"}',
    "quotes within a text": b'{"prompt": "say "hi" now", "completion": "b"}',
    "no object": b"None",
    "no element": b"",
    "too deep": b'{"prompt": ' + b"[" * 40000 + b"]" * 40000 + b"}",
}
SWALLOWING = {
    "a quote too many": b'{"prompt": "a"", "completion": "b"}',
    "a quote too few": b'{"prompt": "a, "completion": "b"}',
    "no quote at the end": b'{"prompt": "a", "completion": "b}',
    "a bracket too few": b'{"prompt": ["a", "completion": "b"}',
    "no bracket at the end": b'{"prompt": "a", "completion": "b"',
    "a bracket too many": b'{"prompt": "a"}}',
}


def skipping(path: Path) -> CheckReport:
    return check(path, data=DataSettings(on_bad_row="skip"))


def refused(path: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert caught.value.code == "E-DATA-0002"
    return caught.value


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("fault", BROKEN)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_broken_element_is_one_bad_row(fault: str, position: int, indent: int | None, tmp_path: Path) -> None:
    elements = [json.dumps(GOOD, indent=indent).encode()] * 4
    elements.insert(position, BROKEN[fault])
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join(elements) + b"]\n")
    report = skipping(path)
    line = 1 + position * elements[position - 1].count(b"\n") + position
    if fault == "no element" and position == 4:  # said of the bracket that stands in its place
        assert "expecting another element" in refused(path).message
    assert (report.rows, report.usable, report.is_unread) == (5, 4, False)
    (found,) = [one for one in report.findings if one.code == "E-DATA-0002"]
    assert found.count == 1
    assert str(found.first[0]) == f"{path}:{line}"
    assert f"{path}:{line}" in refused(path).message


@pytest.mark.parametrize(("between", "place"), [(b"\n", ":3:1"), (b" ", ":2:31"), (b",\n,", ":3:1")])
def test_a_comma_too_few_or_too_many_takes_no_row_with_it(between: bytes, place: str, tmp_path: Path) -> None:
    one, path = b'{"text": "a", "number": "b"}', tmp_path / "a.json"
    path.write_bytes(b"[\n " + one + between + one + b"]")
    assert refused(path).message.startswith(f"{path}{place}  not valid JSON")
    report = skipping(path)
    assert (report.usable, report.rows, report.is_unread) == (2, 3, False)


@pytest.mark.parametrize("fault", SWALLOWING)
@pytest.mark.parametrize("indent", [None, 1])
def test_where_the_next_row_begins_is_not_guessed(fault: str, indent: int | None, tmp_path: Path) -> None:
    good, path = json.dumps(GOOD, indent=indent).encode(), tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join([good, SWALLOWING[fault], good, good, good]) + b"]")
    report = skipping(path)
    assert (report.is_unread, report.errors) == (True, 1)
    assert report.usable <= 2, "the first, and where a bracket stands too many what comes before it"


def test_what_is_not_json_behind_what_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "a"},\n{"text": "caf\xe9",},\n{"text": "b"},\n{"text": "c",},\n{"text": "d"}]')
    report = skipping(path)
    assert (report.usable, report.rows) == (3, 5)
    assert {one.code: one.first for one in report.findings if one.code[0] == "E"} == {
        "E-DATA-0003": (f"{path}:2",), "E-DATA-0002": (f"{path}:4",)
    }  # fmt: skip


def test_many_broken_elements(tmp_path: Path) -> None:
    """Were what follows each of them read again, this would never end."""
    path, settings = tmp_path / "a.json", DoctorSettings(near_rows=0)
    broken = ",\n".join(['{"text": "a",}', '{"text": "b"}'] * 20_000)
    without_commas = "\n".join(['{"text": "a"}'] * 20_000)
    for text, rows, usable in ((broken, 40_000, 20_000), (without_commas, 39_999, 20_000)):
        path.write_text(f"[{text}]")
        report = check(path, settings=settings)
        assert (report.rows, report.usable) == (rows, usable)
