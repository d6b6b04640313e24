"""Near duplicates: what counts as one, the sample that is looked at in large data, and that it is said."""

from __future__ import annotations

import sys

import pytest

from posttrain.data.doctor.sketches import shingles
from tests.doctor_files import codes, examine, finding, name, plain, row

STORY = " ".join(name(i) for i in range(60))


def told(extra: str = "") -> dict[str, object]:
    return row("Tell me a story.", f"{STORY} {extra}")


def test_near_duplicates_are_named_in_pairs() -> None:
    report = examine([told(), *plain(5), told("The end.")])
    found = finding(report, "W-DATA-0102")
    assert found.count == 1
    assert found.details == {"pairs": ["data[6] ~ data[0]"]}
    assert "nearly an earlier one" in found.sentence


def test_case_punctuation_and_space_make_no_difference() -> None:
    shouted = row("Tell me a story", STORY.upper().replace(" ", ",  "))
    assert codes([told(), shouted]) == ["W-DATA-0102"]


def test_exact_duplicates_are_not_near_ones() -> None:
    assert codes([told(), told()]) == ["W-DATA-0101"]


def test_ratings_that_contradict_one_another_are_not_near_duplicates() -> None:
    good, bad = ({**told(), "label": label} for label in (True, False))
    assert codes([good, bad]) == ["E-DATA-0062"]
    assert codes([good, {**told("The end."), "label": True}]) == ["E-DATA-0063", "W-DATA-0102"]
    assert sorted(codes([good, bad, {**told("The end."), "label": False}])) == ["E-DATA-0062", "W-DATA-0102"]


def test_the_threshold_is_a_setting() -> None:
    rows = [told(), told(" ".join(name(i) for i in range(100, 120)))]
    assert "W-DATA-0102" not in codes(rows)
    assert "W-DATA-0102" in codes(rows, near_similarity=0.6)


def test_texts_without_spaces_are_compared_by_characters() -> None:
    text = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳"
    assert codes([row("?", text), row("?", text + "云")])[0] == "W-DATA-0102"
    assert shingles("a b c d", 3) in ([b"a b c", b"b c d"], [b"b c d", b"a b c"])
    assert shingles("天地玄黄", 3)


def test_of_large_data_a_seeded_sample_is_looked_at_and_said() -> None:
    rows = [*plain(200), *(told(f"{i}") for i in range(20))]
    first, again, other = (examine(rows, near_rows=60, seed=seed) for seed in (0, 0, 1))
    note = finding(first, "W-DATA-0119")
    assert note.severity == "info"
    assert note.sentence.startswith("near duplicates were looked for among 60 rows drawn from 220")
    assert finding(first, "W-DATA-0102") == finding(again, "W-DATA-0102")
    assert finding(first, "W-DATA-0102").first != finding(other, "W-DATA-0102").first


def test_left_out_and_said() -> None:
    report = examine([told(), told("The end.")], near_rows=0)
    assert [(f.code, f.severity) for f in report.findings] == [("W-DATA-0104", "warning"), ("W-DATA-0119", "info")]


def test_without_datasketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    note = finding(examine(plain(3)), "W-DATA-0119")
    assert "not installed" in note.sentence
    assert note.fix == "pip install 'posttrain[data]'"


def test_near_rows_of_the_validation_data() -> None:
    found = finding(examine([*plain(5), told()], [told("The end."), *plain(2, start=9)]), "W-DATA-0103")
    assert (found.count, found.first) == (1, ("data[0]",))
    assert "W-DATA-0103" not in codes([told()], [told()])  # that is an exact one
