"""Rows that are nearly the same, left out: the first of each group stays, and what only looks alike stays too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.cli import main
from posttrain.data.change import dedup
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.sketches import Sketches, shingles
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError
from tests.doctor_files import name, pair, plain, rated, row, write

pytest.importorskip("datasketch")
S = DataSettings()
STORY = " ".join(name(i) for i in range(60))


def told(extra: str = "", question: str = "Tell me a story.") -> dict[str, Any]:
    return row(question, f"{STORY} {extra}")


def near(rows: list[Any], tmp_path: Path, similarity: float = 0.8, by_prompt: bool = False) -> tuple[list[Any], Any]:
    out = tmp_path / "out.jsonl"
    found = dedup(rows, out, S, by_prompt, similarity)
    return [kept for _, kept in read_rows(out)], found


def test_the_first_of_a_group_stays_and_groups_are_named(tmp_path: Path) -> None:
    rows = [*plain(5), told(), told("The end."), told(), told("THE  end!"), *plain(3, start=9)]
    kept, found = near(rows, tmp_path)
    assert kept == [*plain(5), told(), *plain(3, start=9)]
    assert found == {"written": 9, "dropped": 1, "near": 2, "skipped": 0, "groups": [["data[5]", "data[6]", "data[8]"]]}


def test_the_threshold(tmp_path: Path) -> None:
    rows = [told(), told(" ".join(name(i) for i in range(100, 130)))]
    assert near(rows, tmp_path)[1]["near"] == 0
    assert near(rows, tmp_path, 0.5)[1]["near"] == 1
    for wrong in (0, 1.5, -1):
        with pytest.raises(ConfigError, match="--similarity"):
            near(rows, tmp_path, wrong)


def test_what_only_looks_alike_stays(tmp_path: Path) -> None:
    asked = f"{STORY} What is it about?"
    for rows in (
        [row(asked, "A journey."), row(asked, "A ship.")],
        [rated(asked, STORY, True), rated(asked, f"{STORY} so", False)],
        [pair(asked, "yes of course", "no never"), pair(asked, "no never", "yes of course")],
        [row("Twelve plus one?", "13"), row("Twelve plus two?", "14")],
    ):
        kept, found = near(rows, tmp_path)
        assert (kept, found["near"]) == (rows, 0)
    kept, found = near([row(asked, "A journey."), row(f"{asked} Now", "A ship.")], tmp_path, by_prompt=True)
    assert found["near"] == 1


def test_across_formats(tmp_path: Path) -> None:
    rows = [told(), {"prompt": "Tell me a story.", "completion": f"{STORY} The end."}]
    assert near(rows, tmp_path)[1]["near"] == 1


def test_no_chain_drops_what_is_not_like_the_one_that_stays(tmp_path: Path) -> None:
    words = [name(i) for i in range(200)]
    rows = [row("Go on.", " ".join(words[start : start + 100])) for start in range(0, 60, 5)]
    kept, found = near(rows, tmp_path)
    assert 1 < len(kept) < len(rows)
    for first, *others in found["groups"]:
        for other in others:
            assert abs(int(first[5:-1]) - int(other[5:-1])) * 5 <= 20


def test_sketches_agree_with_the_true_similarity() -> None:
    generator, settings = np.random.default_rng(0), DoctorSettings()
    sketches = Sketches(settings)
    words = [name(i) for i in range(300)]
    texts = [" ".join(generator.choice(words, 80)) for _ in range(300)]
    for i in range(300):
        changed = texts[i].split()
        for at in generator.choice(80, i % 12, replace=False):
            changed[at] = "changed"
        texts.append(" ".join(changed))
    sets = [set(shingles(text, 3)) for text in texts]
    found = sketches.earlier(sketches.of(map(list, sets)))
    truth = [len(sets[i] & sets[i - 300]) / len(sets[i] | sets[i - 300]) for i in range(300, 600)]
    near = [found[i] == i - 300 for i in range(300, 600)]
    assert not (found[:300] >= 0).any()
    assert all(hit for hit, true in zip(near, truth, strict=True) if true > 0.95)
    assert sum(hit for hit, true in zip(near, truth, strict=True) if true < 0.7) == 0
    assert sum(near) >= 0.7 * sum(true >= 0.8 for true in truth)


def test_without_datasketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ConfigError, match="need datasketch"):
        near(plain(2), tmp_path)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", [told(), *plain(3), told("The end.")])
    assert main(["data", "dedup", "a.jsonl", "-o", "b.jsonl"]) == 0
    assert capsys.readouterr().out == "✔ b.jsonl: 5 written\n"
    words = ["data", "dedup", "a.jsonl", "-o", "b.jsonl", "--force", "--near"]
    assert main([*words, "--report", "r.json"]) == 0
    assert capsys.readouterr().out == "  a.jsonl:5 nearly as a.jsonl:1\n✔ b.jsonl: 4 written, 1 near, 1 groups\n"
    assert json.loads(Path("r.json").read_text())["groups"] == [["a.jsonl:1", "a.jsonl:5"]]
    assert main([*words, "--similarity", "1"]) == 0
    assert "5 written" in capsys.readouterr().out
    assert main([*words[:-1], "--similarity", "0.9"]) == 2
    assert "--near looks for them" in capsys.readouterr().err
