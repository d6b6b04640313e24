"""Tokens kept on disk: the same as those made anew, and made anew whenever anything they depend on is another."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import posttrain
from posttrain.data import cache
from posttrain.data.prepare import DataSettings, Prepared, prepare
from tests.tiny_tokenizers import chatml_tokenizer

LINES = (
    '{"prompt": "One?", "completion": " 1"}\n{"prompt": "Two?", "completion": ""}\n'
    '{"prompt": "3?", "completion": "x"}\n'
)


@pytest.fixture(autouse=True)
def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MIN_SECONDS", 0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text(LINES * 20)
    return path


def settings(folder: Path, **given: Any) -> DataSettings:
    return DataSettings(on_bad_row="skip", max_length=8, cache=folder / "cache", **given)


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "cache").glob("*"))


def assert_same(one: Prepared, other: Prepared) -> None:
    assert vars(one.report).keys() == vars(other.report).keys()
    firsts = [report.first_error for report in (one.report, other.report)]
    assert [str(first) for first in firsts] == [str(firsts[0])] * 2
    assert len({first and first.code for first in firsts}) == 1
    assert one.report.to_dict() == other.report.to_dict()
    assert one.report.summary() == other.report.summary()
    assert len(one.samples) == len(other.samples)
    for (a,), (b,) in zip(one.samples, other.samples, strict=True):
        assert a.origin == b.origin
        assert np.array_equal(a.branches[0].ids, b.branches[0].ids)
        assert np.array_equal(a.branches[0].supervised, b.branches[0].supervised)
        assert (a.branches[0].ids.dtype, a.branches[0].supervised.dtype) == (
            b.branches[0].ids.dtype, b.branches[0].supervised.dtype)  # fmt: skip


def test_kept_tokens_are_those_made_anew(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chatml_tokenizer()
    without = prepare(path, tokenizer, dataclasses.replace(settings(tmp_path), cache=None))
    first = prepare(path, tokenizer, settings(tmp_path))
    assert len(entries(tmp_path)) == 1
    with caplog.at_level(logging.INFO, "posttrain"):
        again = prepare(path, tokenizer, settings(tmp_path))
    assert "taken from" in caplog.text
    assert_same(first, without)
    assert_same(again, without)
    assert again.report.num_skipped == 20


def test_a_mixture_is_kept_too(path: Path, tmp_path: Path) -> None:
    mixture = posttrain.mix([path, path], [1, 2])
    one, again = (prepare(mixture, chatml_tokenizer(), settings(tmp_path)) for _ in range(2))
    assert_same(one, again)
    prepare(posttrain.mix([path, path], [1, 3]), chatml_tokenizer(), settings(tmp_path))
    assert len(entries(tmp_path)) == 2


def test_whatever_changes_makes_them_anew(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(**given: Any) -> int:
        prepare(path, given.pop("tokenizer", chatml_tokenizer()), settings(tmp_path, **given))
        return len(entries(tmp_path))

    assert count() == count() == 1
    path.write_text(path.read_text() + LINES)
    assert count() == 2
    assert count(completion_only=False) == 3
    assert count(truncation_mode="keep_end") == 4
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template += "{# another #}"
    assert count(tokenizer=tokenizer) == 5
    tokenizer.add_tokens(["One"])
    assert count(tokenizer=tokenizer) == 6
    tokenizer.eos_token = "One"
    assert count(tokenizer=tokenizer) == 7
    monkeypatch.setattr(cache, "_code", lambda: "newer")
    assert count() == 8


def test_what_leaves_the_tokens_alone_shares_them(path: Path, tmp_path: Path) -> None:
    for given in ({}, {"shuffle": True}, {"shuffle_seed": 3}):
        prepare(path, chatml_tokenizer(), settings(tmp_path, **given))
    assert len(entries(tmp_path)) == 1


def test_what_cannot_be_kept(path: Path, tmp_path: Path) -> None:
    rows = [{"text": "a"}]
    prepare(rows, chatml_tokenizer(), settings(tmp_path))
    prepare(path, chatml_tokenizer(), settings(tmp_path, formatting_func=lambda row: row["prompt"]))
    prepare(path, chatml_tokenizer(), settings(tmp_path, columns=("prompt",)))
    assert entries(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "other"])
def test_a_damaged_entry_is_made_anew_aloud(
    path: Path, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(path, chatml_tokenizer(), settings(tmp_path))
    (entry,) = entries(tmp_path)
    content = bytearray(entry.read_bytes())
    content[-3] ^= 1
    damaged = {"cut": content[:-1], "flip": content, "empty": b"", "other": b"x" * 1000}[damage]
    entry.write_bytes(damaged)
    again = prepare(path, chatml_tokenizer(), settings(tmp_path))
    assert "is damaged" in caplog.text
    assert_same(first, again)
    assert entries(tmp_path) == [entry]


def test_a_folder_that_cannot_be_written(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file")
    prepared = prepare(path, chatml_tokenizer(), settings(tmp_path))
    assert len(prepared.samples) == 40
    assert "tokens are not kept" in caplog.text


def test_old_entries_make_room(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(path, chatml_tokenizer(), settings(tmp_path))
    (old,) = entries(tmp_path)
    os.utime(old, (0, 0))
    monkeypatch.setattr(cache, "MAX_BYTES", old.stat().st_size + 1)
    prepare(path, chatml_tokenizer(), settings(tmp_path, completion_only=False))
    (left,) = entries(tmp_path)
    assert left != old


def test_what_is_said_of_columns_is_kept_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"prompt": "One?", "completion": " 1", "system": "Be brief.", "text": "One? It is 1", "label": null}\n' * 3
    )
    first, again = (prepare(path, chatml_tokenizer(), settings(tmp_path)) for _ in range(2))
    assert_same(first, again)
    assert (again.report.no_place["system"].count, again.report.other_formats["text"].count) == (3, 3)
    assert first.report.notes() == again.report.notes()
