"""Every finding: a few rows that have it, named by code, count and place, and the same without it that have not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.codes import REASONS
from posttrain.data.doctor.check import check
from posttrain.data.doctor.kinds import KINDS
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.settings import DataSettings
from posttrain.errors import ConfigError, DataError
from tests.doctor_files import codes, examine, finding, pair, plain, rated, row, write
from tests.tiny_tokenizers import chatml_tokenizer

ROOT = Path(__file__).resolve().parents[3]
GERMAN = "Das ist nicht der Weg, den wir mit dem Auto auf dieser Straße nehmen, und auch nicht die andere."
ENGLISH = "This is not the way that you would take with the car, and it is not what we can do for them."
LONG = "The quick brown fox jumps over the lazy dog while seven wizards brew a potion of jade and amber by the river. "
KEY = "AKIA" + "ABCDEFGHIJKLMNOP"

QUESTION = "What is the capital of France?"
TALK = "\n\nHuman: Is it so?\n\nAssistant:"
PAIRS = [
    pair(f"Question {i}?", f"A good answer {i}." + " More of it." * (i % 2), f"A bad answer {i}, too.")
    for i in range(40)
]
RATINGS = [rated(f"Question {i}?", f"Answer {i}.", i % 2 == 0) for i in range(40)]


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]}


# Of each code: rows that have it, how many, and the nearest rows that do not. Validation rows come second in a pair.
CASES: dict[str, tuple[Any, int, Any]] = {
    "E-DATA-0060": ([pair("Q?", "same", "same"), pair("R?", "a", "b")], 1, [pair("Q?", "same", "other")]),
    "E-DATA-0061": ((plain(9), plain(3, start=6)), 3, (plain(9), plain(3, start=9))),
    "E-DATA-0062": ([rated("Q?", "A.", True), rated("Q?", "A.", False)], 2,
                    [rated("Q?", "A.", True), rated("Q?", "B.", False)]),
    "E-DATA-0063": ([rated(f"{i}?", f"{i}.", True) for i in range(40)], 40, RATINGS),
    "E-DATA-0064": ([*plain(5), pair("Q?", "a", "b")], 1, plain(5)),
    "E-DATA-0065": ([*RATINGS[:2], {**RATINGS[3], "label": None}], 1, [{**row("Q?", "A."), "label": None}]),
    "W-DATA-0101": ([*plain(5), plain(1)[0]], 1, plain(6)),
    "W-DATA-0102": ([row("Tell.", LONG * 2), row("Tell!", LONG * 2 + "End.")], 1, [row("Tell.", LONG * 2), *plain(5)]),
    "W-DATA-0103": (([row("Tell.", LONG * 2)], [row("Tell!", LONG * 2 + "End.")]), 1, ([row("Tell.", LONG)], plain(3))),
    "W-DATA-0104": ([row("Why?", "Because."), row("Why?", "Who knows.")], 2,
                    [row("Why?", "Because."), row("How?", "So.")]),
    "W-DATA-0105": ([pair("Q?", "a", "b"), pair("Q?", "b", "a")], 2, [pair("Q?", "a", "b"), pair("Q?", "b", "c")]),
    "W-DATA-0106": ((plain(3), [row("Name number 1.", "Nobody.")]), 1, (plain(3), [row("Name number 7.", "Nobody.")])),
    "W-DATA-0108": ([row("Do it.", "I'm sorry, but I can't."), row("And?", "As an AI language model, no.")], 2,
                    [row("What is GPT?", "A large model; people are sorry for what it cannot do.")]),
    "W-DATA-0109": ([*plain(40), *[row(f"Q {i}?", "Have you tried turning it off?") for i in range(8)]], 8,
                    [*plain(40), *[row(f"Q {i}?", "yes") for i in range(8)]]),
    "W-DATA-0110": ([pair(f"Q {i}?", f"{i} and much more of it", f"{i}") for i in range(40)], 40, PAIRS),
    "W-DATA-0111": ([*[rated(f"{i}?", f"{i}.", True) for i in range(40)], rated("no?", "no", False)], 40, RATINGS),
    "W-DATA-0112": ([row("Hi", "A\x08B")], 1, [row("Hi", "A\tB\r\n")]),
    "W-DATA-0113": ([row("Hi", "if \u202eadmin\u202c")], 1, [row("Hi", "שלום")]),
    "W-DATA-0114": ([row("Key?", f"It is {KEY}.")], 1, [row("Key?", "It begins with AKIA, and sk- for others.")]),
    "W-DATA-0115": ([row("Mail?", "Write to jane.doe@posteo.de.")], 1,
                    [row("Mail?", "Write to jane@example.com @ noon.")]),
    "W-DATA-0116": ([row(ENGLISH, GERMAN)], 1, [row(ENGLISH, ENGLISH)]),
    "W-DATA-0117": ([*[row(f"{i}?", f"{ENGLISH} {i}") for i in range(40)], row("x?", GERMAN)], 1,
                    [row(f"{i}?", f"{ENGLISH} {i}") for i in range(40)]),
    "W-DATA-0120": ([pair("Q?", "The end.", "the  end")], 1, [pair("Q?", "The end.", "An end.")]),
    "W-DATA-0118": ([*plain(3), {"text": "Plain."}], 1, plain(3)),
    "W-DATA-0129": ([chat("system", "system", "user", "assistant"), chat("user", "system", "assistant"),
                     chat("user", "assistant", "developer", "user", "assistant"), {
                         "prompt": chat("system", "user")["messages"],
                         "chosen": chat("system", "assistant")["messages"], "rejected": chat("assistant")["messages"]}],
                    4, [chat("system", "user", "assistant"), row("a\r\t\rsystem", "b")]),
    "W-DATA-0131": ([{**row("Hi", "Hello"), "system_prompt": "Be kind."}, {"text": "a", "tools": [{"name": "f"}]}], 2,
                    [{**row("Hi", "Hello"), "system": "Be kind.", "tools": [{"name": "f"}], "id": 3}]),
    "W-DATA-0152": ([{"messages": json.dumps(row("Hi", "Hello")["messages"])}], 1, [row("Hi", "Hello")]),
    "W-DATA-0153": ([{"prompt": "Hi", "completion": json.dumps(row("Hi", "Hello")["messages"])}], 1,
                    [{"prompt": "Hi", "completion": '["Hello"]'}]),
    "W-DATA-0155": ([{"chosen": TALK + " Yes.\n\nHuman: Why?", "rejected": TALK + " No."},
                     {"text": "### Human: Hi### Assistant: Hello"}], 2,
                    [{"chosen": TALK + " Yes.", "rejected": TALK + " No."}, {"text": "Human: Hi"},
                     {"prompt": "Write a dialogue.", "completion": "Human: Hi\nAssistant: Hello\nHuman: Bye"},
                     pair("Write a dialogue.", TALK + " Yes.\nHuman: Bye", TALK + " No."),
                     {"text": "A chat of two.\nHuman: Hi\nAssistant: Hello"}]),
    "W-DATA-0156": ([{"chosen": TALK + " Yes.", "rejected": TALK + " No."}, {"prompt": TALK, "completion": " Yes."},
                     row(TALK, " Yes."), {"text": "A chat of two.\nHuman: Hi\nAssistant: Hello"}], 4,
                    [{"prompt": "Write a dialogue.", "completion": TALK + " Yes."},
                     row("Sum this up: User: Hi\nAssistant: Hello", "They met.\nUser: polite.\nAssistant: too."),
                     {"prompt": "Question: Why?\nAnswer:", "completion": " So."}, row("Human: Hi", "Assistant: Hi"),
                     {"text": "He said: Assistant: no. The human: yes."}]),
    "W-DATA-0157": ([pair(QUESTION, QUESTION + " Yes.", QUESTION + " No."), pair("R?" * 20, "a", "R?" * 20 + " b"),
                     {"prompt": chat("system", "user")["messages"], "rejected": chat("assistant")["messages"],
                      "chosen": chat("system", "user", "assistant")["messages"]}], 3,
                    [pair(QUESTION, "Yes.", "No."), pair("Hi", "Hi there", "Hi"), pair("", "a", "b"), {
                        "chosen": chat("user", "assistant")["messages"],
                        "rejected": chat("user", "assistant", "assistant")["messages"]}]),
    "W-DATA-0158": ([row(" ", "Hello"), {"messages": [{"role": "system", "content": ""}, *row("a", "b")["messages"]]}],
                    2, [chat("system", "user", "assistant"), {"prompt": "", "completion": "Hello"}]),
    "W-DATA-0161": ([{"chosen": [*chat("user", "assistant")["messages"], *row("Why?", "So.")["messages"]],
                      "rejected": [*chat("user", "assistant")["messages"], *row("How?", "So.")["messages"]]}], 1,
                    [pair("Q?", "a", "b"), {"chosen": row("Why?", "So.")["messages"],
                                            "rejected": row("Why?", "No.")["messages"]}]),
    "W-DATA-0162": ([{**pair("Q?", "a", "b"), "margin": 0.5}, {**pair("R?", "a", "b"), "margin": None},
                     pair("S?", "a", "b")], 2, [{**pair("Q?", "a", "b"), "margin": 0}]),
    "W-DATA-0132": ([{**row("Hi", "Hello"), "text": "Hi: Hello"}, *plain(3)], 1, [{**row("Hi", "Hello"), "text": ""}]),
}  # fmt: skip
ELSEWHERE = {
    "W-DATA-0107",
    "W-DATA-0119",
    "W-DATA-0130",
    "W-DATA-0135",
    "W-DATA-0145",
    "W-DATA-0150",
    "W-DATA-0151",
    "W-DATA-0154",
    "W-DATA-0159",
    "W-DATA-0160",
    *(f"W-DATA-01{n}" for n in range(21, 29)),
}
"""Tested in test_doctor_lengths.py, test_doctor_near.py, test_duplicates.py, test_marks.py, test_flags.py and
test_doctor_models.py."""


def parted(given: Any) -> tuple[Any, Any]:
    return given if isinstance(given, tuple) else (given, None)


@pytest.mark.parametrize("code", CASES)
def test_the_finding(code: str, tmp_path: Path) -> None:
    having, count, _ = CASES[code]
    rows, val = parted(having)
    report = examine(write(tmp_path / "a.jsonl", rows), write(tmp_path / "b.jsonl", val) if val else None)
    found = finding(report, code)
    assert (found.count, found.severity) == (count, KINDS[code].severity)
    assert found.fix
    assert all(re.fullmatch(r".*[ab]\.jsonl:\d+", where) for where in found.first)


@pytest.mark.parametrize("code", CASES)
def test_rows_without_it(code: str) -> None:
    rows, val = parted(CASES[code][2])
    assert code not in codes(rows, val)


def test_every_code_has_a_case_and_stands_in_the_guide() -> None:
    assert set(KINDS) == set(CASES) | ELSEWHERE
    assert not set(KINDS) & set(REASONS), "codes are never used twice"
    guide = (ROOT / "docs" / "data.md").read_text("utf-8")
    assert [code for code in (*KINDS, *REASONS) if code not in guide] == []


def test_nothing_wrong() -> None:
    report = examine(plain(50))
    assert report.findings == []
    assert (report.rows, report.usable, report.errors, report.warnings) == (50, 50, 0, 0)
    assert report.formats == {"read as messages: column `messages` with keys `role`, `content`": 50}


def test_what_is_found_is_named_by_line(tmp_path: Path) -> None:
    rows = [*plain(4), plain(2)[1], row("Hi", "A\x00B")]
    report = examine(write(tmp_path / "t.jsonl", rows))
    assert finding(report, "W-DATA-0101").first == (f"{tmp_path}/t.jsonl:5",)
    assert finding(report, "W-DATA-0112").first == (f"{tmp_path}/t.jsonl:6",)


def test_several_files_are_one_data_set(tmp_path: Path) -> None:
    paths = [write(tmp_path / "a.jsonl", plain(3)), write(tmp_path / "b.jsonl", plain(2, start=2))]
    report = examine(paths)
    assert report.rows == 5
    assert finding(report, "W-DATA-0101").first == (f"{tmp_path}/b.jsonl:1",)


BROKEN = '{"messages": [{"role": "usr", "content": "Hi"}]}\nnot json\n{"text": ""}\n{"text": "ok"}\n{"text": "\xff"}\n'


def test_bad_rows_are_findings(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(BROKEN.encode("latin-1"))
    report = examine(path)
    assert (report.rows, report.usable, report.errors) == (5, 1, 4)
    assert {f.code: f.first[0] for f in report.findings} == {
        "E-DATA-0012": f"{path}:1", "E-DATA-0002": f"{path}:2", "E-DATA-0014": f"{path}:3", "E-DATA-0003": f"{path}:5"
    }  # fmt: skip
    fix = f"posttrain data fix {path} --rule rename-role:usr=user"
    assert finding(report, "E-DATA-0012").fix == f'did you mean "user"?  fix: {fix}'
    assert report.bad_rows[0]["message"].startswith(f'{path}:1:24  "messages[0].role" is "usr"')
    skipping = examine(path, data=DataSettings(on_bad_row="skip"))
    assert (skipping.errors, skipping.warnings) == (0, 4)


def test_an_array_that_breaks_off_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text('[{"text": "a"}, {"text": "b"}, {"text": ', "utf-8")
    report = examine(path)
    assert report.usable == 2
    assert finding(report, "E-DATA-0002").severity == "error"


def test_an_empty_file_is_an_error_and_a_missing_one_is_raised(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").touch()
    assert codes(tmp_path / "t.jsonl") == ["E-DATA-0006"]
    with pytest.raises(DataError, match="no such file"):
        examine(tmp_path / "u.jsonl")


def test_validation_rows_that_cannot_be_used_are_said() -> None:
    assert "E-DATA-0010" in codes(plain(3), [{"x": 1}])


def test_thresholds_are_settings() -> None:
    rows = [pair(f"Q {i}?", f"{i} and more" if i % 10 < 6 else f"{i}", f"{i}, yes") for i in range(40)]
    assert "W-DATA-0110" not in codes(rows)
    assert "W-DATA-0110" in codes(rows, longer_share=0.5)
    assert "W-DATA-0109" in codes(
        [*plain(40), *[row(f"Q {i}?", "yes") for i in range(8)]], repeated_answer_characters=1
    )


@pytest.mark.parametrize("value", [0, 1, 15, 10**9])
def test_thresholds_that_no_sketch_could_be_made_with(value: int) -> None:
    with pytest.raises(ConfigError, match=f"near_permutations is {value}"):
        DoctorSettings(near_permutations=value)


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_number_of_thousands_of_digits(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    text = '{"text": "a", "n": ' + "9" * 5000 + "}"
    path.write_text(text if kind == "jsonl" else f"[{text}]")
    (bad,) = examine(path).bad_rows
    column = 20 if kind == "jsonl" else 21
    assert str(bad["message"]).startswith(f'{path}:1:{column}  "n": a number has more digits than can be read')


def test_columns_are_renamed_first() -> None:
    rows = [{"question": f"{i}?", "answer": f"{i}."} for i in range(3)]
    assert codes(rows) == ["E-DATA-0010"]
    report = examine(rows, data=DataSettings(column_map={"question": "prompt", "answer": "completion"}))
    assert (report.usable, report.findings) == (3, [])


def test_tokens_are_rows_too() -> None:
    report = examine([{"input_ids": [1, 2]}, {"input_ids": [1, 2]}])
    assert (report.usable, [f.code for f in report.findings]) == (2, ["W-DATA-0101"])


def test_the_report_as_json(tmp_path: Path) -> None:
    document = examine(write(tmp_path / "t.jsonl", [*plain(3), plain(1)[0]])).to_dict()
    assert document["schema_version"] == 1
    assert document["findings"][0]["code"] == "W-DATA-0101"
    assert document["lengths"]["unit"] == "characters"
    assert (document["errors"], document["warnings"], document["usable"]) == (0, 1, 4)


def test_a_stream_is_read_twice_for_tokens() -> None:
    tokenizer = chatml_tokenizer()
    assert check(iter(plain(3)), tokenizer=tokenizer).lengths.to_dict()["rows"] == 3


def test_origins_of_files_that_come_again(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    first, second = write(folder / "a.jsonl", plain(3)), write(folder / "b.jsonl", plain(3, start=3))
    report = examine([second, folder])
    assert report.rows == 9
    assert finding(report, "W-DATA-0101").first == tuple(f"{second}:{line}" for line in (1, 2, 3))
    assert finding(examine([first, folder]), "W-DATA-0101").first == tuple(f"{first}:{line}" for line in (1, 2, 3))


COLUMNS = (
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "label", "text", "instruction", "output",
    "input_ids", "tools", "system",
)  # fmt: skip
SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=6)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "human", 3]), "content": SCALARS}
) | st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", "function_call"]), "value": SCALARS})
VALUES = SCALARS | TURNS | st.lists(TURNS | SCALARS, max_size=3)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=4), min_size=1, max_size=5))
def test_no_row_is_a_crash(rows: list[dict[str, Any]]) -> None:
    report = examine(rows)
    assert report.rows == len(rows)
    assert report.usable + sum(f.count for f in report.findings if f.code in REASONS) == len(rows)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_line_nested_too_deeply_is_a_finding(tmp_path: Path, processes: int) -> None:
    path = tmp_path / "t.jsonl"
    deep = "[" * 200_000 + "]" * 200_000
    path.write_text(f'{{"text": "a"}}\n{{"text": {deep}}}\n{{"text": "b"}}\n')
    report = check(path, settings=DoctorSettings(parallel_bytes=1), processes=processes)
    assert finding(report, "E-DATA-0002").count == 1
    assert report.usable in (1, 2)


def calling(question: str, *names: str) -> Any:
    calls = [{"function": {"name": name, "arguments": {}}} for name in names]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "tool_calls": calls}]}


def test_calls_without_content_are_told_apart() -> None:
    rows = [calling("Do.", "open"), calling("Do.", "close"), calling("Do.", "open", "close")]
    assert codes(rows) == ["W-DATA-0104"]  # one prompt, three answers
    assert codes([*rows, rows[0]]) == ["W-DATA-0101", "W-DATA-0104"]
    prompt, (good, bad) = rows[0]["messages"][:1], (one["messages"][1:] for one in rows[:2])
    assert codes([{"prompt": prompt, "chosen": good, "rejected": bad}]) == []
    assert codes([{"prompt": prompt, "chosen": good, "rejected": good}]) == ["E-DATA-0060"]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize(
    ("raw", "code"),
    [
        ('{"text": "a", "score": NaN}', "E-DATA-0005"),
        ('{"text": "a", "text": "b"}', "E-DATA-0008"),
        ('"text"', "E-DATA-0004"),
        ('{"text": "caf\udce9"}', "E-DATA-0003"),
        ('{"text": "half \\ud800"}', "E-DATA-0024"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "E-DATA-0022"),
    ],
)
def test_one_bad_row_is_one_bad_row(kind: str, position: int, raw: str, code: str, tmp_path: Path) -> None:
    lines = [f'{{"text": "Row {name}."}}' for name in "bcdf"]
    lines.insert(position, raw)
    text = "\n".join(lines) if kind == "jsonl" else "[" + ",\n".join(lines) + "]"
    path = tmp_path / f"a.{kind}"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    report = examine(path)
    found = finding(report, code)
    assert (found.count, report.rows, report.usable) == (1, 5, 4)
    assert found.first[0] == f"{path}:{position + 1}"


STOPS = {
    "open quote": ("b.csv", 'prompt,completion\na,b\n"c,d\ne,f\n', "E-DATA-0007"),
    "broken array": ("b.json", '[{"text": "a"}, {"text": ]', "E-DATA-0002"),
    "no Parquet": ("b.parquet", "x,y\n1,2\n", "E-DATA-0001"),
    "half a Parquet": ("b.parquet", "PAR1 and no more", "E-DATA-0007"),
    "empty": ("b.jsonl", "", "E-DATA-0006"),
}


@pytest.mark.parametrize("fault", STOPS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_file_that_breaks_off_is_an_error_and_the_others_are_read(fault: str, policy: str, tmp_path: Path) -> None:
    name, text, code = STOPS[fault]
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text(text)
    write(folder / "c.jsonl", plain(3))
    report = examine(folder, data=DataSettings(on_bad_row=policy))
    found = finding(report, code)
    assert (found.severity, report.is_unread) == ("error", True)
    assert found.first[0].startswith(f"{folder}/{name}")
    assert report.usable >= 3
    assert not examine(folder / "c.jsonl").is_unread


@pytest.mark.parametrize("label", [1, 0, "true", "False", "bad", 0.5, "1"])
@pytest.mark.parametrize("answer", [{"prompt": "Q?", "completion": "A."}, plain(1)[0]])
def test_a_label_that_is_no_boolean(label: Any, answer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{**answer, "label": label}, {**answer, "label": True}])
    found = finding(examine(path), "E-DATA-0028")
    assert (found.count, found.first) == (1, (f"{path}:1",))
    assert '"label" is' in str(examine(path).bad_rows[0]["message"])
    assert "true (a good answer)" in found.fix


def test_labels_of_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\nQ?,A.,true\nR?,B.,FALSE\nS?,C.,1\n")
    report = examine(path)
    assert report.labels == {"good": 1, "bad": 1}
    assert finding(report, "E-DATA-0028").first == (f"{path}:4",)
    path.write_text("prompt,completion,liked\nQ?,A.,true\nR?,B.,FALSE\n")
    report = examine(path, data=DataSettings(column_map={"liked": "label"}))
    assert report.labels == {"good": 1, "bad": 1}


def test_a_label_that_rates_nothing_is_a_column_like_any_other() -> None:
    report = examine([{"prompt": "Q?", "completion": "A.", "label": "sports"}])
    assert (report.usable, report.labels, report.findings) == (1, {}, [])


def test_optional_columns_make_no_other_format() -> None:
    rows = [{"instruction": "Say a.", "output": "a"}, {"instruction": "Say b.", "input": "loudly", "output": "B"}]
    assert codes(rows) == []


def test_what_none_of_the_assistant_can_be_trained_on() -> None:
    silent = row("Hi", "Hello")
    silent["messages"][1]["train"] = False
    system = {"messages": [{"role": "system", "content": "Be kind."}]}
    assert finding(examine([silent, system, *plain(3)]), "E-DATA-0022").count == 2
    asked = row("Hi", "Hello")
    asked["messages"][0]["train"], asked["messages"][1]["train"] = True, False
    assert codes([asked]) == []
