"""A split that keeps together rows that nearly say the same."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from posttrain.cli import main
from posttrain.data.change import split
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError
from tests.doctor_files import codes, name, row, write

WORDS = [name(number) for number in range(15)]


def nearly_alike(families: int = 30, members: int = 4) -> list[dict[str, object]]:
    """Families of rows with a long answer in common, each asked for in other words."""
    chance, found = random.Random(5), []
    for _ in range(families):
        answer = [chance.choice(WORDS) for _ in range(200)]
        for n in range(members):
            found.append(row(f"Tell {name(100 + len(found))}", " ".join([*answer, str(n)])))
    chance.shuffle(found)
    return found


@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_stay_together(seed: int, tmp_path: Path) -> None:
    path = write(tmp_path / "in.jsonl", nearly_alike())
    for folder_name, near in (("apart", None), ("together", 0.8)):
        folder = tmp_path / folder_name
        folder.mkdir()
        counts = split(path, 0.2, seed, folder, DataSettings(), near=near)
        said = codes(folder / "train.jsonl", folder / "val.jsonl")
        assert ("W-DATA-0103" in said) == (near is None)
        assert counts["train"] + counts["val"] == 120
        assert counts["val"] == 24
        rows = [one for file in ("train", "val") for _, one in read_rows(folder / f"{file}.jsonl")]
        assert sorted(map(str, rows)) == sorted(map(str, nearly_alike()))
    assert (counts["groups"], counts["near"]) == (30, 90)


def test_the_command_says_what_it_did_not_look_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "in.jsonl", nearly_alike())
    command = ["data", "split", str(path), "--val", "0.2", "-o"]
    assert main([*command, str(tmp_path / "a")]) == 0
    assert "near duplicates may stand on both sides: --near" in capsys.readouterr().out
    assert main([*command, str(tmp_path / "b"), "--near"]) == 0
    out = capsys.readouterr().out
    assert "90 near" in out
    assert "may stand" not in out
    assert main([*command, str(tmp_path / "c"), "--similarity", "0.9"]) == 2
    assert "--near looks for them" in capsys.readouterr().err


def test_no_similarity(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--similarity 0 is none"):
        split(nearly_alike(2), 0.5, 0, tmp_path, DataSettings(), near=0)


def test_the_check_names_it(tmp_path: Path) -> None:
    from tests.doctor_files import examine, finding

    one, *others = nearly_alike(1)
    assert "posttrain data split --near" in finding(examine([one], others), "W-DATA-0103").fix
