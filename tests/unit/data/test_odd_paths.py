"""What is no ordinary file under an ordinary name: read, or named with the way out; never a bare error of Python's."""

from __future__ import annotations

import gzip
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from posttrain.data.change import convert
from posttrain.data.doctor.check import check
from posttrain.data.mixing import mix
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError
from tests.doctor_files import plain, write


def rows(source: Any) -> list[Any]:
    return [row for _, row in read_rows(source)]


def refused(source: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        rows(source)
    assert caught.value.hint
    return caught.value


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", plain(3))
    for source in ("~/a.jsonl", Path("~/a.jsonl"), "~", "~/*.jsonl", mix(["~/a.jsonl"])):
        assert rows(source) == plain(3)
        assert check(source).usable == 3
    assert refused("~/b.jsonl").message == f"{tmp_path}/b.jsonl: no such file"
    assert "no such file" in refused("~nobody-of-that-name/b.jsonl").message


def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()
    write(Path("~/a.jsonl"), plain(2))
    assert rows("~/a.jsonl") == plain(2)


@pytest.mark.parametrize("name", ["a.ndjson", "a.NDJSON", "a.jsonl.gz", "a.ndjson.gz"])
def test_other_names_of_json_lines(name: str, tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", plain(3)).read_bytes()
    path = tmp_path / "other" / name
    path.parent.mkdir()
    path.write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert rows(path) == rows(path.parent) == plain(3)
    out = tmp_path / "out.jsonl"
    assert convert(str(path), "messages", out, DataSettings())["written"] == 3


@pytest.mark.parametrize("name", ["a.jsonl.zst", "a.json.bz2", "a.zip", "a.parquet.gz"])
def test_what_has_to_be_unpacked_first(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"packed")
    error = refused(tmp_path / name)
    assert error.message == f"{tmp_path / name}: unknown file type '{Path(name).suffix}'"
    assert f"{tmp_path / name})" in str(error.hint)
    assert "unpack it first (" in str(error.hint)


def test_pipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "a.jsonl"
    os.mkfifo(pipe)
    for source in (pipe, tmp_path):  # nothing waits for somebody to write
        assert refused(source).message == f"{pipe}: no file, but a pipe or a device"
    assert main(["data", "check", "/dev/null"]) == 3
    assert "E-DATA-0001 /dev/null: no file, but a pipe or a device\n  = " in capsys.readouterr().err
    read, written = os.pipe()
    try:
        threading.Thread(target=os.write, args=(written, b"{}\n"), daemon=True).start()
        assert "no file, but a pipe" in refused(f"/dev/fd/{read}").message
    finally:
        os.close(read)
        os.close(written)


def test_links(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", plain(2))
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert rows(tmp_path / "b.jsonl") == plain(2)
    (tmp_path / "c.jsonl").symlink_to("gone.jsonl")
    for source in (tmp_path / "c.jsonl", tmp_path, f"{tmp_path}/c.*"):
        assert refused(source).message == f"{tmp_path}/c.jsonl: a link to gone.jsonl, which is not there"
    (tmp_path / "d.jsonl").symlink_to("d.jsonl")
    assert "a link to d.jsonl" in refused(tmp_path / "d.jsonl").message


def test_a_name_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """`posttrain data check "$DATA"`: the folder that one stands in is not meant."""
    assert "a name of nothing" in refused("").message
    assert main(["data", "check", ""]) == 3
    assert "a variable of the shell" in capsys.readouterr().err


def test_our_own_reports_in_a_folder_are_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("nope\n" + write(source, plain(3)).read_text())
    out = tmp_path / "out"
    out.mkdir()
    for verb in ("convert --to messages", "dedup"):
        words = ["data", *verb.split(), str(source), "-o", str(out / f"{verb[:5]}.jsonl"), "--policy", "skip"]
        assert main(words) == 0
    assert main(["data", "fix", str(source), "-o", str(out / "fixed.jsonl")]) == 0
    assert len(list(out.glob("*.report.json"))) == 3
    assert len(rows(out)) == 9
    assert check(str(out)).errors == 0


def test_patterns(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", plain(2))
    error = refused(f"{tmp_path}/*.json")
    assert error.message == f"{tmp_path}/*.json: no file matches this pattern"
    assert error.hint == f"in {tmp_path} there is: a.jsonl"
    assert "no file matches" in refused(f"{tmp_path}/none/*.json").message
    (tmp_path / "sub.jsonl").mkdir()
    assert rows(tmp_path) == plain(2)
    assert refused(f"{tmp_path}/*.jsonl").message == f"{tmp_path}/sub.jsonl: no file, but a folder"


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt", "jsonl.gz", "parquet"])
def test_a_file_that_may_not_be_read(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"PAR1 and so on")
    forbid(monkeypatch, path)
    error = refused(path)
    assert (error.code, error.message) == ("E-DATA-0001", f"{path}: cannot be read: Permission denied")
    assert error.hint == "see its rights: ls -l"
    write(tmp_path / "b.jsonl", plain(2))
    report = check(str(tmp_path))
    assert (report.usable, report.is_unread) == (2, True)


def forbid(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """As for another user, also where the tests run as one who may read everything."""
    allowed = open

    def guarded(file: Any, *args: Any, **options: Any) -> Any:
        if str(file) == str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return allowed(file, *args, **options)

    monkeypatch.setattr("builtins.open", guarded)


def test_an_error_of_the_system_while_reading(tmp_path: Path) -> None:
    name = "x" * 300
    assert f"{name}.jsonl: cannot be read: File name too long" in refused(tmp_path / f"{name}.jsonl").message
    assert "no such file" in refused("a\0b.jsonl").message


def test_an_error_of_the_users_own_iterator_is_the_users_own() -> None:
    def failing() -> Any:
        yield plain(1)[0]
        raise ConnectionError("mine")

    with pytest.raises(ConnectionError, match="mine"):
        rows(failing())


@pytest.mark.parametrize("at", [4, 200, -20])
def test_a_damaged_parquet_file(at: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    source, path = write(tmp_path / "a.jsonl", plain(2000)), tmp_path / "a.parquet"
    convert(str(source), "messages", path, DataSettings())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert main(["data", "check", str(path)]) == 3
    said = capsys.readouterr().out
    assert f"E-DATA-0007 nothing can be read from here on: broken table row (first: {path}[0])" in said
    assert f"{path}: the Parquet file is damaged or breaks off" in said
    path.write_bytes(whole[:at] + bytes(len(whole[at : at + 12])) + whole[at:][12:])
    assert main(["data", "check", str(path), "--json"]) in (0, 3)
    found = json.loads(capsys.readouterr().out)
    assert {one["code"] for one in found["findings"] if one["severity"] == "error"} <= {"E-DATA-0007", "E-DATA-0003"}
