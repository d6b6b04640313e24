"""What Parquet, CSV and compressed files hold that JSON Lines do not, and numbers that no file may hold."""

from __future__ import annotations

import gzip
import json
import logging
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.change import convert, dedup
from posttrain.data.doctor.check import check
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.writing import write_rows
from posttrain.errors import DataError
from tests.doctor_files import codes, plain, row, write


def rows(source: object) -> list[dict[str, Any]]:
    return [found for _, found in read_rows(source)]


def error(source: object) -> DataError:
    with pytest.raises(DataError) as caught:
        rows(source)
    return caught.value


@pytest.fixture
def parquet() -> Any:
    return pytest.importorskip("pyarrow.parquet")


def table(parquet: Any, path: Path, columns: Any, names: list[str] | None = None) -> Path:
    import pyarrow

    made = pyarrow.table(columns) if names is None else pyarrow.Table.from_arrays(columns, names=names)
    parquet.write_table(made, path)
    return path


def test_two_parquet_columns_of_one_name(tmp_path: Path, parquet: Any) -> None:
    import pyarrow

    path = table(parquet, tmp_path / "a.parquet", [pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    found = error(path)
    assert found.code == "E-DATA-0007"
    assert "two columns are called 'text'" in found.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, float("nan")], {"a": float("-inf")}])
def test_no_number_in_parquet(tmp_path: Path, parquet: Any, value: Any) -> None:
    good = {float: 1.0, list: [1.0], dict: {"a": 1.0}}[type(value)]
    path = table(parquet, tmp_path / "a.parquet", {"text": ["a", "b", "c"], "score": [good, value, None]})
    found = error(path)
    assert found.code == "E-DATA-0005"
    assert found.message == f"{path}[1]  column `score` holds NaN or an infinity"
    rejected: list[str] = []
    read = [row["text"] for _, row in read_rows(path, reject=lambda error, origin: rejected.append(str(origin)))]
    assert (read, rejected) == (["a", "c"], [f"{path}[1]"])


def test_messages_as_json_in_a_column(tmp_path: Path, parquet: Any) -> None:
    texts = [json.dumps(one["messages"]) for one in plain(3)]
    tools = json.dumps([{"type": "function", "function": {"name": "f"}}])
    path = table(parquet, tmp_path / "a.parquet", {"messages": [*texts, "[broken"], "tools": [tools] * 4})
    read = rows(path)
    assert [one["messages"] for one in read[:3]] == [one["messages"] for one in plain(3)]
    assert check(str(path)).usable == 3
    path = table(parquet, tmp_path / "b.parquet", {"prompt": ["[1]", '[{"a": 1}]'], "completion": ["[]", "{}"]})
    assert rows(path) == [{"prompt": "[1]", "completion": "[]"}, {"prompt": '[{"a": 1}]', "completion": "{}"}]


BEYOND = '{"text": "a", "x": %s}\n'


@pytest.mark.parametrize("number", ["1e999", "-1E+400", "[1, 1e999]"])
def test_a_number_that_becomes_infinity(tmp_path: Path, number: str) -> None:
    for name, content in (("a.jsonl", BEYOND % number), ("a.json", f"[{BEYOND % number}]")):
        path = tmp_path / name
        path.write_text(content)
        found = error(path)
        assert found.code == "E-DATA-0005"
        assert "is read as infinity" in found.message
        assert found.message.startswith(f"{path}:1")
    path = tmp_path / "many.jsonl"
    path.write_text('{"text": "b", "x": 1e300}\n' * 50 + BEYOND % number)
    report = check(str(path), settings=DoctorSettings(parallel_bytes=1), processes=2)
    assert (report.rows, report.usable) == (51, 50)
    assert "E-DATA-0005" in [finding.code for finding in report.findings]


@pytest.mark.parametrize("number", ["NaN", "1e999"])
def test_no_number_in_json_inside_a_text(tmp_path: Path, number: str) -> None:
    text = '[{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "{\\"name\\": \\"f\\", ' + (
        f'\\"arguments\\": {{\\"x\\": {number}}}}}"}}]'
    )
    (tmp_path / "a.jsonl").write_text('{"conversations": ' + text + "}\n")
    assert codes(tmp_path / "a.jsonl") == ["E-DATA-0015"]
    (tmp_path / "a.csv").write_text(f'messages\n"[{{""role"": ""user"", ""content"": ""a"", ""n"": {number}}}]"\n')
    assert codes(tmp_path / "a.csv") == ["E-DATA-0011"]


def test_no_number_is_written(tmp_path: Path) -> None:
    for suffix in ("jsonl", "json"):
        with pytest.raises(DataError) as caught:
            write_rows(tmp_path / f"a.{suffix}", [{"text": "a", "x": float("nan")}])
        assert caught.value.code == "E-DATA-0005"
    with pytest.raises(DataError) as caught:
        write_rows(tmp_path / "a.csv", [{"text": "half \ud800"}])
    assert caught.value.code == "E-DATA-0051"
    assert list(tmp_path.iterdir()) == []


def test_a_parquet_column_of_several_types_is_named(tmp_path: Path, parquet: Any) -> None:
    with pytest.raises(DataError, match="column `id`") as caught:
        write_rows(tmp_path / "a.parquet", [{"id": 1}, {"id": "b"}])
    assert caught.value.code == "E-DATA-0051"
    write_rows(tmp_path / "a.parquet", [{"meta": {"a": 1}}, {"meta": [1]}])
    assert rows(tmp_path / "a.parquet") == [{"meta": '{"a": 1}'}, {"meta": "[1]"}]


def test_ratings_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\na,b,True\na,c,false\na,d,maybe\n")
    assert [one["label"] for one in rows(path)] == [True, False, "maybe"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "a"}\n{"text": "b"}\n'), ("a.csv", "text\na\nb\n"), ("a.txt", "a\nb"),
                          ("a.json", '[{"text": "a"}, {"text": "b"}]')]
)  # fmt: skip
def test_compressed_files(tmp_path: Path, name: str, content: str) -> None:
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(content.encode()))
    assert rows(path) == rows(tmp_path) == rows(str(tmp_path / "*.gz")) == [{"text": "a"}, {"text": "b"}]
    assert check(str(path)).usable == 2
    path.write_bytes(gzip.compress(content.encode() * 1000)[:-20])
    assert "is damaged or breaks off" in error(path).message
    path.write_bytes(b"no gzip")
    assert error(path).code == "E-DATA-0007"


def test_a_mistake_in_a_compressed_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n{"messages": [{"role": "usr", "content": "x"}]}\nbroken\n'))
    report = check(str(path))
    assert {finding.code: finding.first for finding in report.findings} == {
        "E-DATA-0012": (f"{path}:2",), "E-DATA-0002": (f"{path}:3",)
    }  # fmt: skip


def test_what_is_passed_over_in_a_folder_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path / "a.jsonl", [row("a", "b")])
    for name in ("README.md", "more.jsonl.zst", "b.gz", ".hidden"):
        (tmp_path / name).write_text("x")
    (tmp_path / "parts").mkdir()
    with caplog.at_level(logging.WARNING, "posttrain"):
        assert len(rows(tmp_path)) == len(rows(tmp_path)) == 1
    assert [record.getMessage() for record in caplog.records] == [
        f"data     {tmp_path}: passed over README.md, b.gz, more.jsonl.zst, parts, no data of a known type"
    ]


@pytest.mark.parametrize("place", ["tools", "arguments", "own"])
def test_objects_without_keys_in_parquet(place: str, tmp_path: Path) -> None:
    """Parquet has no place for them, and tools without arguments are full of them."""
    tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    answer: dict[str, Any] = {"role": "assistant", "content": "Noon."}
    row: dict[str, Any] = {"messages": [{"role": "user", "content": "Time?"}, answer]}
    if place == "tools":
        row["tools"] = [tool]
    elif place == "arguments":
        answer["tool_calls"] = [call]
    else:
        row["meta"] = {}
    path = tmp_path / "a.parquet"
    assert write_rows(path, [row]) == 1
    (back,) = [read for _, read in read_rows(path)]
    if place == "own":
        assert back["meta"] == "{}"
    else:
        assert back == row


def test_a_parquet_file_of_nul_bytes(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(bytes(5000))
    found = error(str(tmp_path / "a.parquet"))
    assert "begins with NUL bytes" in found.message
    assert "download it, again" in (found.hint or "")


def typed(pyarrow: Any) -> Any:
    """A table with a column of every type that JSON has not, and of some that Python has not."""
    day = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    return pyarrow.table({
        "messages": [[*row("Q?", "A")["messages"]], [*row("R?", "B")["messages"]]],
        "key": [b"\xff\x00", None],
        "at": pyarrow.array([day, None], pyarrow.timestamp("s", tz="UTC")),
        "nanoseconds": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "day": [day.date(), None],
        "price": pyarrow.array([Decimal("1.50"), Decimal("20.25")], pyarrow.decimal128(9, 2)),
        "small": pyarrow.array([1, 2], pyarrow.int8()),
        "score": pyarrow.array([0.1, 2], pyarrow.float32()),
        "nothing": pyarrow.array([None, None], pyarrow.int32()),
        "pairs": pyarrow.array([[("a", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
        "meta": [{"id": b"\x01", "at": day}, {"id": None, "at": day}],
    })  # fmt: skip


def test_the_types_of_parquet_are_kept(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source, (once, other) = tmp_path / "a.parquet", (tmp_path / "b.parquet", tmp_path / "c.parquet")
    parquet.write_table(typed(pyarrow), source)
    table = parquet.read_table(source)
    dedup(str(source), once, DataSettings())
    convert(str(source), "messages", other, DataSettings())
    assert parquet.read_table(once).equals(table)
    assert parquet.read_table(other).select(table.drop(["nothing"]).column_names).equals(table.drop(["nothing"]))


def test_files_that_do_not_agree_on_a_type(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in").mkdir()
    for number, kind in enumerate((pyarrow.int8(), pyarrow.float32())):
        named = {"prompt": [f"{number}?"], "completion": ["A"], "n": pyarrow.array([number], kind)}
        parquet.write_table(pyarrow.table(named), tmp_path / "in" / f"{number}.parquet")
    dedup(str(tmp_path / "in"), tmp_path / "a.parquet", DataSettings())
    assert [one["n"] for one in parquet.read_table(tmp_path / "a.parquet").to_pylist()] == [0, 1.0]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("value", [b"\xff", {"id": [b"\x01"]}])
def test_bytes_do_not_become_text(value: Any, suffix: str, tmp_path: Path) -> None:
    rows = [{**row("Q?", "A"), "day": date(2024, 5, 6)}, {**row("R?", "B"), "key": value}]
    with pytest.raises(DataError, match="column `key` holds bytes, which JSON has not") as caught:
        dedup(rows, tmp_path / f"a.{suffix}", DataSettings())
    assert caught.value.code == "E-DATA-0051"
    assert ".parquet, which has a type for them" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []
    dedup(rows[:1], tmp_path / f"a.{suffix}", DataSettings())
    ((_, back),) = read_rows(tmp_path / f"a.{suffix}")
    assert back["day"] == "2024-05-06"


def test_what_arrow_cannot_hold_is_no_text_where_json_has_not_got_it(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    rows = [{**row("Q?", "A"), "meta": {"a": date(2024, 5, 6)}}, {**row("R?", "B"), "meta": [1]}]
    with pytest.raises(DataError, match="column `meta` holds a date, which would become text"):
        dedup(rows, tmp_path / "a.parquet", DataSettings())
