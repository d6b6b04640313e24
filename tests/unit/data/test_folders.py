"""Folders: files that are one data set, splits that are not, and what lies below."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.cli import main
from posttrain.data.doctor.check import check
from posttrain.data.folders import split_of
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import DataError
from tests.doctor_files import plain, write
from tests.tiny_tokenizers import chatml_tokenizer


def files(folder: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / name, plain(2, start=10 * i))
    return folder


def refused(source: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    return caught.value


@pytest.mark.parametrize(
    ("names", "train", "other"),
    [
        (("train.jsonl", "val.jsonl"), "train.jsonl", "val.jsonl"),
        (("test.jsonl", "train.jsonl", "validation.jsonl"), "train.jsonl", "validation.jsonl"),
        (("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl"),
         "train-00000-of-00002.jsonl", "test-00000-of-00001.jsonl"),
        (("gsm8k_test.jsonl", "gsm8k_train.jsonl"), "gsm8k_train.jsonl", "gsm8k_test.jsonl"),
        (("chats.jsonl", "dev.jsonl"), "chats.jsonl", "dev.jsonl"),
        (("test.jsonl", "val.jsonl"), "test.jsonl", "val.jsonl"),
    ],
)  # fmt: skip
def test_splits_in_one_folder_are_refused(names: tuple[str, ...], train: str, other: str, tmp_path: Path) -> None:
    folder = files(tmp_path, *names)
    found = refused(folder)
    assert found.code == "E-DATA-0151"
    assert found.message.startswith(f"{folder}: the folder holds several splits: ")
    assert f"name one of them: {folder / train}; and to validate on" in (found.hint or "")
    assert f"another: {folder / other}; '{folder}/*' reads all" in (found.hint or "")
    tokenizer, settings = chatml_tokenizer(), DataSettings()
    for read in (lambda: check(folder), lambda: prepare(folder, tokenizer, settings),
                 lambda: list(read_rows(posttrain.mix([folder], weights=[1], seed=0)))):  # fmt: skip
        with pytest.raises(DataError, match="the folder holds several splits"):
            read()
    assert len(list(read_rows(f"{folder}/*"))) == 2 * len(names)
    assert prepare(folder / train, tokenizer, settings).report.used == 2


@pytest.mark.parametrize(
    "names",
    [("a.jsonl", "b.jsonl"), ("train_a.jsonl", "train_b.jsonl"), ("train.jsonl", "extra.jsonl"), ("val.jsonl",),
     ("trained.jsonl", "devices.jsonl", "tests.jsonl"), ("eval_math.jsonl", "chats.jsonl")],
)  # fmt: skip
def test_other_folders_are_one_data_set(names: tuple[str, ...], tmp_path: Path) -> None:
    assert len(list(read_rows(files(tmp_path, *names)))) == 2 * len(names)


def test_what_our_own_split_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "all.jsonl", plain(20))
    assert main(["data", "split", str(path), "-o", str(tmp_path / "splits")]) == 0
    assert main(["data", "check", str(tmp_path / "splits")]) == 3
    assert "E-DATA-0151" in capsys.readouterr().err
    train, val = (str(tmp_path / "splits" / name) for name in ("train.jsonl", "val.jsonl"))
    assert main(["data", "check", train, "--val", val]) == 0


def test_splits_that_were_saved_together(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    part = datasets.Dataset.from_list(plain(2))
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "saved"))
    found = refused(tmp_path / "saved")
    assert found.code == "E-DATA-0151"
    assert str(tmp_path / "saved" / "train") in (found.hint or "")
    assert len(list(read_rows(tmp_path / "saved" / "train"))) == 2


def test_the_split_that_a_name_says() -> None:
    said = {"train.jsonl.gz": "train", "my-dev-set.csv": "validation", "TEST_1.json": "test", "restraint.jsonl": None}
    assert {name: split_of(name) for name in said} == said


def test_subfolders_with_data_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = files(tmp_path, "a.jsonl", "more/b.jsonl", "more/deeper/c.csv", "other/d.jsonl")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "e.png").write_text("x")
    with caplog.at_level(logging.WARNING, "posttrain"):
        assert len(list(read_rows(folder))) == len(list(read_rows(folder))) == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"data     {folder}: passed over pictures, no data of a known type",
        f"data     {folder}: subfolders are not read, and more, other hold data: name what is meant, e.g. "
        f"{folder / 'more'}, or all as a pattern: '{folder}/**/*.jsonl'",
    ]


def test_a_folder_of_folders(tmp_path: Path) -> None:
    found = refused(files(tmp_path, "train/a.jsonl", "test/b.jsonl"))
    assert found.message == f"{tmp_path}: no data file in it, but in its subfolders, which are not read"
    assert (found.hint or "").startswith(f"name what is meant, e.g. {tmp_path / 'train'}, or all")
    with pytest.raises(DataError, match="in its subfolders"):
        check(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt.report.json").write_text(json.dumps({}))
    assert "no file of a known type" in refused(tmp_path / "empty").message
