"""Reading rows: every kind of source, and what is said about the ones that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from posttrain.data.sources import read_rows
from posttrain.errors import DataError


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def rows(source: object) -> list[dict]:
    return [row for _, row in read_rows(source)]


def error(source: object) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    return caught.value


ROWS = [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b"}\n'),
        ("windows.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}'),
        ("a.json", '[{"text": "a"},\n {"text": "b"}]\n'),
        ("lines.json", '{"text": "a"}\n{"text": "b"}\n'),
        ("a.csv", "text\na\nb\n"),
        ("a.tsv", "text\na\nb\n"),
        ("a.txt", "a\n\nb"),
    ],
)
def test_files(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert rows(write(tmp_path, name, content)) == ROWS


def test_parquet_and_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    assert rows(tmp_path / "a.parquet") == ROWS
    assert rows(tmp_path / "saved") == ROWS
    assert rows(dataset) == ROWS
    assert rows(dataset.to_iterable_dataset()) == ROWS
    assert rows(dataset.with_format("torch")) == ROWS
    assert rows(ROWS) == ROWS
    splits = error(datasets.DatasetDict(train=dataset))
    assert splits.hint == 'choose one: dataset["train"]'
    assert "with_transform" in error(dataset.with_transform(lambda row: row)).message


def test_arrow_nulls_leave_messages_but_not_other_columns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    messages = [{"role": "user", "content": "hi", "name": None}, {"role": "tool", "content": "4", "name": "add"}]
    dataset = datasets.Dataset.from_dict({"messages": [messages], "note": [{"a": None, "b": 1}], "empty": [None]})
    (row,) = rows(dataset)
    assert row["messages"][0] == {"role": "user", "content": "hi"}
    assert row["note"] == {"a": None, "b": 1}
    assert row["empty"] is None


def test_folders_and_globs_read_files_in_order(tmp_path: Path) -> None:
    write(tmp_path, "b.jsonl", '{"text": "b"}')
    write(tmp_path, "a.jsonl", '{"text": "a"}')
    write(tmp_path, "README.md", "not data")
    assert rows(tmp_path) == ROWS
    assert rows(str(tmp_path / "*.jsonl")) == ROWS
    (tmp_path / "empty").mkdir()
    assert "no file of a known type" in error(tmp_path / "empty").message


def test_origins(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\n\n{"text": "b"}\n')
    assert [str(origin) for origin, _ in read_rows(path)] == [f"{path}:1", f"{path}:3"]
    path = write(tmp_path, "a.json", '[\n  {\n    "text": "a"\n  },\n  {"text": "b"}\n]')
    assert [str(origin) for origin, _ in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    path = write(tmp_path, "a.csv", 'text,n\n"a\nb",1\n\nc,2\n')
    assert [str(origin) for origin, _ in read_rows(path)] == [f"{path}:2", f"{path}:5"]
    assert [str(origin) for origin, _ in read_rows(ROWS, name="train")] == ["train[0]", "train[1]"]


def test_csv_with_semicolons(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'prompt;completion\n"a;b";c, d\n')
    assert rows(path) == [{"prompt": "a;b", "completion": "c, d"}]


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "code", "where", "says", "hint"),
    [
        (
            "a.jsonl",
            GOOD + '{"text": "a" "b": 1}\n',
            "2",
            ":2:14",
            "Expecting ',' delimiter",
            "each row is one JSON object",
        ),
        ("a.jsonl", GOOD + '{"text": "a"} // note\n', "2", ":2:15", "Extra data", "JSON has no comments"),
        ("a.jsonl", GOOD + "// note\n", "2", ":2:1", "Expecting value", "JSON has no comments"),
        ("a.jsonl", GOOD + "{'text': 'a'}\n", "2", ":2:2", "Expecting property name", "double quotes"),
        ("a.jsonl", GOOD + '{"text": None}\n', "2", ":2:10", "Expecting value", "JSON says null"),
        ("a.jsonl", GOOD + '{"text": "a",}\n', "2", ":2", "", "comma too many"),
        ("a.jsonl", GOOD + '{"text": "cut o', "2", ":2:10", "Unterminated string", "the last line breaks off"),
        ("a.jsonl", GOOD + '{"a": 1}{"a": 2}\n', "2", ":2:9", "Extra data", "second object"),
        ("a.jsonl", '{\n  "text": "a"\n}\n', "2", ":1:", "Expecting property name", "here each line is one object"),
        ("a.jsonl", GOOD + '{"text": "a", "x": NaN}\n', "5", ":2", "NaN is not JSON", "write null"),
        ("a.jsonl", GOOD + '["a"]\n', "4", ":2", "is a list, not an object", "named .json"),
        ("a.jsonl", GOOD + '"a"\n', "4", ":2", "is text, not an object", '{"text": "..."}'),
        ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n', "3", ":2:14", "byte 0xe9 is not UTF-8", "UTF-8"),
        ("a.jsonl", GOOD.encode("utf-16"), "3", "", "UTF-16", "iconv"),
        ("a.jsonl", "", "6", "", "the file is empty", "written to its end"),
        ("a.jsonl", "\n\n", "6", "", "no rows", "right one"),
        ("a.json", "[]", "6", "", "no rows", "right one"),
        ("a.json", '[{"text": "a"},\n {"text": "b"},\n]', "2", ":3:1", "expecting another element", "comma too many"),
        ("a.json", '[{"text": "a"}\n {"text": "b"}]', "2", ":2:2", "expecting ',' or ']'", "commas between"),
        ("a.json", '[{"text": "a"},\n {"text": "b"', "2", ":2:14", "Expecting ',' delimiter", "the file breaks off"),
        ("a.json", '[{"text": "a"}, 3]', "4", ":1", "is a number, not an object", "each row is an object"),
        ("a.json", '{"data": [{"text": "a"}]}', "1", "", "one JSON object (keys data)", "jq '.data'"),
        ("a.json", '[{"text": "a"}]\n[{"text": "b"}]', "2", ":2:1", "the array ends before this", ""),
        ("a.json", "text", "2", ":1", "expected a JSON array", "[{...}, {...}]"),
        ("a.csv", "a,b\n1,2\n1,2,3\n", "7", ":3", "has 3 fields, but the header has 2", "put quotes around"),
        ("a.csv", 'a,b\n1,2\n1,"2\n3,4\n', "7", ":3", "broken CSV: unexpected end of data", "written twice"),
        ("a.csv", "a,a\n1,2\n", "7", ":1", "names a column twice", ""),
        ("a.parquet", "nothing", "1", "", "not a Parquet file", ""),
        ("a.doc", "nothing", "1", "", "unknown file type '.doc'", "known: .jsonl"),
    ],
)
def test_what_is_said_of_a_bad_file(
    tmp_path: Path, name: str, content: str | bytes, code: str, where: str, says: str, hint: str
) -> None:
    path = write(tmp_path, name, content)
    found = error(path)
    assert found.code == f"E-DATA-000{code}"
    assert found.message.startswith(path + where)
    assert says in found.message
    assert hint in (found.hint or "")


def test_excerpt_shows_the_place(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a" "b": 1}\n')
    assert '\n  | {"text": "a"  → "b": 1}' in error(path).message


def test_missing_files_name_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "train.jsonl", GOOD)
    assert error(tmp_path / "trian.jsonl").hint == "did you mean train.jsonl?"
    assert error(tmp_path / "x").hint == f"in {tmp_path} there is: train.jsonl"
    assert "there is no folder" in error(tmp_path / "nowhere" / "x.jsonl").message


def test_other_objects_are_refused() -> None:
    assert "cannot read rows from a number" in error(3).message
    assert "data[1]  is text, not a dict" in error([{"text": "a"}, "b"]).message


def test_reject_goes_on_after_a_bad_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '{"text": "a"}\nbroken\n{"text": "b"}\n')
    rejected: list[str] = []
    read = [row for _, row in read_rows(path, reject=lambda error, origin: rejected.append(str(origin)))]
    assert read == ROWS
    assert rejected == [f"{path}:2"]


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of `datasets`, which asks the network; the rest is real."""
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(path: str, name: str | None, split: str) -> object:
        asked.append((path, name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("openai/gsm8k", "openai/gsm8k:main", "openai/gsm8k@test[:10]", "openai/gsm8k:main@test"):
        assert rows(name) == ROWS
    assert asked == [
        ("openai/gsm8k", None, "train"),
        ("openai/gsm8k", "main", "train"),
        ("openai/gsm8k", None, "test[:10]"),
        ("openai/gsm8k", "main", "test"),
    ]
    assert [str(origin) for origin, _ in read_rows("openai/gsm8k")] == ["openai/gsm8k[0]", "openai/gsm8k[1]"]


def test_a_name_that_is_neither_here_nor_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = error("no-such-owner/no-such-set@test")
    assert "no such file, and not to be had from the hub as split 'test'" in said.message
    assert said.hint is not None
    assert "owner/name:config@split" in said.hint
