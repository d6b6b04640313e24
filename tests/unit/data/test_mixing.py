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
    with pytest.raises(DataError, match=r"no\.jsonl: no such file"):
        texts(posttrain.mix([MANY, tmp_path / "no.jsonl"]))


BAD = [{"text": "fine"}, {"text": ""}, {"nothing": 1}, *({"text": f"c{i}"} for i in range(20))]


def test_a_bad_row_is_counted_once_however_often_its_part_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\nbroken\n' + "".join(f'{{"text": "d{i}"}}\n' for i in range(20)))
    mixture = posttrain.mix([MANY, path, BAD], [8, 1, 1])
    report = prepare(mixture, chatml_tokenizer(), DataSettings(on_bad_row="skip")).report
    assert {reason: cases.count for reason, cases in report.skipped.items()} == {
        "broken JSON": 1, "empty text": 1, "unknown format": 1
    }  # fmt: skip
    assert report.rows == report.used + 3
    assert len(report.left_out) == 3
    cut = posttrain.mix([MANY, [{"prompt": "x " * 50, "completion": "y"}, {"text": "z"}]], [9, 1])
    report = prepare(cut, chatml_tokenizer(), DataSettings(on_bad_row="skip", max_length=16)).report
    assert report.skipped["nothing left to train within max_length"].count == 1
    assert report.rows == report.used + 1


@pytest.mark.parametrize("stop", ["all", "first"])
@pytest.mark.parametrize("where", ["file", "list", "unusable", "folder"])
def test_a_part_without_a_usable_row_is_named(tmp_path: Path, stop: str, where: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("broken\n" * 3)
    (tmp_path / "u.jsonl").write_text('{"text": ""}\n' * 3)
    sources = {"file": tmp_path / "data" / "a.jsonl", "list": [], "unusable": tmp_path / "u.jsonl",
               "folder": tmp_path / "data"}  # fmt: skip
    source: object = sources[where]
    name = source if where != "list" else "set 2"
    for parts in ([FEW, source], [source, FEW]) if where != "list" else ([FEW, source],):
        with pytest.raises(DataError) as caught:
            prepare(posttrain.mix(parts, stop=stop), chatml_tokenizer(), DataSettings(on_bad_row="skip"))
        assert caught.value.message.startswith(f"{name} has no usable row to mix in")
        assert caught.value.code == "E-DATA-0006"


def test_parts_that_are_folders_globs_and_mixtures(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    inner = posttrain.mix([FEW, tmp_path / "a"])
    mixture = posttrain.mix([inner, str(tmp_path / "b" / "*.jsonl"), tmp_path / "b"])
    prepared = prepare(mixture, chatml_tokenizer(), DataSettings(on_bad_row="skip"))
    assert prepared.report.num_skipped == 0


def test_what_people_give_mix() -> None:
    import numpy as np

    same = texts(posttrain.mix([MANY, FEW], [3, 1]))
    for weights in (np.array([3, 1]), np.array([3.0, 1.0], np.float32), (3, 1), (w for w in (3, 1)), [np.int64(3), 1]):
        assert texts(posttrain.mix([MANY, FEW], weights)) == same
    assert posttrain.mix({"a.jsonl": 3, "b.jsonl": 1}) == posttrain.mix(["a.jsonl", "b.jsonl"], [3, 1])


@pytest.mark.parametrize(
    ("sources", "weights", "says"),
    [
        ("train.jsonl", None, "a mixture is made of a list of data sets, saw 'train.jsonl'"),
        (Path("train.jsonl"), None, "a mixture is made of a list of data sets"),
        (7, None, "a mixture is made of a list of data sets, saw a number"),
        ({"a.jsonl": 1}, [1], "has the weights in it"),
        ({"train": MANY}, None, "is not a positive number"),
        ([{"text": "a"}, {"text": "b"}], None, "set 1 of a mixture is a dict: one row"),
        (["a.jsonl"], 3, "mixture weights are 3"),
        (["a.jsonl"], "3", "mixture weights are '3'"),
        (["a.jsonl"], {"a.jsonl": 3}, "is not a positive number"),
        ([], None, "a mixture of 0 data sets"),
    ],
)
def test_what_is_no_mixture(sources: object, weights: object, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        posttrain.mix(sources, weights)  # type: ignore[arg-type]
    assert says in caught.value.message


def test_one_data_set_is_no_mixture() -> None:
    datasets = pytest.importorskip("datasets")
    with pytest.raises(ConfigError, match="saw a Dataset"):
        posttrain.mix(datasets.Dataset.from_list(FEW))


def test_parts_are_known_however_their_paths_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "One and one."}\n')
    for paths in (["./a.jsonl", "b.jsonl"], ["./*.jsonl"], [".//a.jsonl"]):
        mixture = posttrain.mix(paths)
        assert prepare(mixture, chatml_tokenizer(), DataSettings()).report.used >= 1


@pytest.mark.parametrize("stop", ["all", "first"])
def test_a_part_that_max_length_leaves_nothing_of_is_named_with_the_reason(tmp_path: Path, stop: str) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text('{"prompt": "' + "Two plus two? " * 30 + '", "completion": "Four."}\n')
    with pytest.raises(DataError) as caught:
        prepare(posttrain.mix([FEW, path], stop=stop), chatml_tokenizer(), DataSettings(max_length=20))
    assert caught.value.message.startswith(f"{path} has no usable row to mix in (")
    assert caught.value.message.endswith(" nothing left to train within max_length)")
    assert (caught.value.hint or "").startswith("raise max_length")
