"""Mixtures: shares, order, ends, and that they are the same every time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import posttrain
from posttrain.data.prepare import DataSettings, prepare
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from tests.tiny_tokenizers import chatml_tokenizer

MANY = [{"text": f"a{i}"} for i in range(3000)]
FEW = [{"text": f"b{i}"} for i in range(50)]


def texts(mixture: object) -> list[str]:
    return [row["text"] for _, row in read_rows(mixture)]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.1])
def test_shares(share: float) -> None:
    seen = texts(posttrain.mix([MANY, MANY], [share, 1 - share], stop="first"))
    half = texts(posttrain.mix([MANY, FEW], [share * 7, (1 - share) * 7], stop="all"))
    assert len(seen) >= 3000
    assert sum(text[0] == "b" for text in half) / len(half) == pytest.approx(1 - share, abs=0.03)


def test_all_are_gone_through_in_order_and_the_small_one_again() -> None:
    seen = texts(posttrain.mix([MANY, FEW], [9, 1]))
    assert [text for text in seen if text[0] == "a"][:3000] == [row["text"] for row in MANY]
    small = [text for text in seen if text[0] == "b"]
    assert small == [f"b{i % 50}" for i in range(len(small))]
    assert min(Counter(small).values()) >= 5


def test_the_first_to_end_ends_it() -> None:
    seen = texts(posttrain.mix([MANY, FEW], stop="first"))
    assert [text for text in seen if text[0] == "b"] == [row["text"] for row in FEW]
    assert len(set(seen)) == len(seen) < 200


def test_the_same_every_time_and_another_with_another_seed() -> None:
    one, same, other = (texts(posttrain.mix([MANY, FEW], [3, 1], seed=seed)) for seed in (1, 1, 2))
    assert one == same != other


def test_files_and_lists_with_their_origins(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x\ny\n")
    origins = {str(origin) for origin, _ in read_rows(posttrain.mix([path, FEW]))}
    assert f"{path}:2" in origins
    assert "set 2[49]" in origins
    prepared = prepare(posttrain.mix([path, FEW]), chatml_tokenizer(), DataSettings())
    assert prepared.report.source == f"{path} + set 2"
    assert prepared.report.rows == prepared.report.used == len(prepared.samples) >= 52


def test_what_cannot_be_mixed(tmp_path: Path) -> None:
    for weights in ([1], [1, 0], [1, -2], [1, float("nan")], [1, True], [1, "2"]):
        with pytest.raises(ConfigError, match="weight"):
            posttrain.mix([MANY, FEW], weights)
    with pytest.raises(ConfigError, match="stop is 'never'"):
        posttrain.mix([MANY], stop="never")
    with pytest.raises(ConfigError, match="cannot begin an iterator again"):
        posttrain.mix([iter(MANY), FEW])
    with pytest.raises(ConfigError, match="set 2 has no usable row"):
        texts(posttrain.mix([MANY, []]))
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        texts(posttrain.mix([MANY, tmp_path / "no.jsonl"]))
