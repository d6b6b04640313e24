"""What can be wrong with files of examples, in every file type where it can be: named, and skipped where asked, with
every other row used."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.data import lines
from posttrain.data.doctor.check import check
from posttrain.data.prepare import DataSettings, prepare
from posttrain.errors import ConfigError, DataError
from tests.tiny_tokenizers import chatml_tokenizer

GOOD: dict[str, Any] = {"prompt": "One and one?", "completion": " Two."}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def chat(*messages: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(messages)}


USER, ANSWER = CHAT["messages"]
# name: (good row, bad row, code, field or words of the message)
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "int for str": (GOOD, {"prompt": "a", "completion": 3}, "E-DATA-0011", '"completion" is a number'),
    "list for str": (GOOD, {"prompt": "a", "completion": ["b"]}, "E-DATA-0016", '"prompt"'),
    "missing field": (GOOD, {"prompt": "a", "completion": None}, "E-DATA-0010", "known format"),
    "mixed schemas": (GOOD, {"prompt": "a", "reply": "b"}, "E-DATA-0010", "`prompt`, `reply`"),
    "missing role": (CHAT, chat(USER, {"content": "x"}), "E-DATA-0011", '"messages[1]" has no role'),
    "unknown role": (CHAT, chat(USER, {"role": "assitant", "content": "x"}), "E-DATA-0012", 'did you mean "assistant"'),
    "empty completion": (GOOD, {"prompt": "a", "completion": ""}, "E-DATA-0013", '"completion" is empty'),
    "white space only": (GOOD, {"prompt": "a", "completion": " \n\t"}, "E-DATA-0013", '"completion" is empty'),
    "empty turn": (CHAT, chat(USER, {"role": "assistant", "content": ""}), "E-DATA-0013", '"messages[1]"'),
    "no turn to train": (CHAT, chat(USER, {**ANSWER, "train": False}), "E-DATA-0022", 'says "train": false'),
    "half a character": (GOOD, {"prompt": "a", "completion": "\ud800"}, "E-DATA-0024", "half a character"),
    "call without a name": (CHAT, chat(USER, {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}),
                            "E-DATA-0015", '"messages[1].tool_calls[0]"'),
    "broken arguments": (CHAT, chat(USER, {"role": "assistant", "tool_calls": [
        {"function": {"name": "add", "arguments": '{"a": '}}]}), "E-DATA-0015",
        '"messages[1].tool_calls[0].function.arguments" is not valid JSON'),
    "broken range": (CHAT, chat(USER, {**ANSWER, "train_detail": [
        {"begin_offset": 3, "end_offset": 9, "train": True}]}), "E-DATA-0042",
        '"messages[1].train_detail[0]" ends at character 9'),
    "another method's": (GOOD, {"prompt": "a", "chosen": "b", "rejected": "b"}, "E-DATA-0017", "preference pairs"),
}  # fmt: skip
NOT_IN: dict[str, tuple[str, ...]] = {
    "csv": ("int for str", "list for str", "half a character", "missing field", "mixed schemas", "another method's"),
    "parquet": ("int for str", "list for str", "half a character"),
}

RAW: dict[str, tuple[bytes, str, str]] = {
    "broken": (b'{"prompt": "a", completion: "b"}', "E-DATA-0002", "not valid JSON"),
    "cut off": (b'{"prompt": "a", "comple', "E-DATA-0002", "not valid JSON"),
    "not utf-8": (b'{"prompt": "caf\xe9", "completion": "b"}', "E-DATA-0003", "byte 0xe9 is not UTF-8"),
    "NUL bytes": (b"\0" * 5000, "E-DATA-0003", "NUL bytes"),
    "NUL bytes behind": (b'{"prompt": "a", "comple' + b"\0" * 300, "E-DATA-0003", "300 NUL bytes, from byte 24 on"),
    "NUL bytes before": (
        b"\0" * 300 + b'{"prompt": "a", "completion": "b"}',
        "E-DATA-0003",
        "300 NUL bytes, from byte 1",
    ),
    "too many NUL bytes": (b"\0" * 6000, "E-DATA-0003", "for it is full of NUL bytes"),
    "too long": (b'{"prompt": "' + b"a" * 6000, "E-DATA-0009", "longer than"),
    "too deep": (b'{"prompt": ' + b"[" * 4000, "E-DATA-0002", "nested too deeply"),
    "NaN": (b'{"prompt": "a", "completion": "b", "score": NaN}', "E-DATA-0005", "NaN is not JSON"),
    "repeated key": (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "E-DATA-0008", 'key "prompt" stands twice'),
    "an array": (b'["a", "b"]', "E-DATA-0004", "is a list, not an object"),
}


def write_json(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1))


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(column for row in rows for column in row)))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = dict.fromkeys(column for row in rows for column in row)
    parquet.write_table(pyarrow.Table.from_pylist([{**columns, **row} for row in rows]), path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet,
}  # fmt: skip
CASES = [(kind, fault) for kind in WRITERS for fault in ROWS if fault not in NOT_IN.get(kind, ())]
POSITIONS = [(kind, position) for kind in WRITERS for position in (0, 2, 4)]
"""The first row of five, one in the middle, the last."""


def place(kind: str, position: int) -> str:
    """Where a complaint about that row of a file says that it is (an object of a JSON array has several lines)."""
    return {"jsonl": f":{position + 1}", "json": ":", "csv": f":{position + 2}", "parquet": f"[{position}]"}[kind]


def write(path: Path, kind: str, good: dict[str, Any], bad: dict[str, Any], position: int) -> Path:
    rows = [good] * 4
    rows.insert(position, bad)
    WRITERS[kind](path / f"a.{kind}", rows)
    return path / f"a.{kind}"


def read(path: Path, policy: str, template: str | None = None, **options: Any) -> Any:
    settings = DataSettings(on_bad_row=policy, assistant_only=None, **options)
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    return prepare(path, tokenizer, settings)


def assert_named_and_skipped(
    path: Path, code: str, words: str, place: str, good: int, bad: int = 1, template: str | None = None
) -> None:
    with pytest.raises(DataError) as caught:
        read(path, "error", template)
    assert caught.value.code == code, caught.value
    assert f"{path}{place}" in str(caught.value)
    assert words in str(caught.value)
    report = read(path, "skip", template).report
    assert (report.used, report.num_skipped, report.rows) == (good, bad, good + bad)


@pytest.mark.parametrize(("kind", "fault"), CASES, ids=[f"{fault}, {kind}" for kind, fault in CASES])
@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_bad_row(kind: str, fault: str, position: int, tmp_path: Path) -> None:
    good, bad, code, words = ROWS[fault]
    path = write(tmp_path, kind, good, bad, position)
    assert_named_and_skipped(path, code, words, place(kind, position), good=4)


@pytest.mark.parametrize(("kind", "position"), POSITIONS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_prompt_that_leaves_no_room_for_its_answer(kind: str, position: int, policy: str, tmp_path: Path) -> None:
    """It is not trained, whatever the policy, and counted and named; a data set of nothing else is an error."""
    bad = {"prompt": GOOD["prompt"] * 10, "completion": GOOD["completion"]}
    path = write(tmp_path, kind, GOOD, bad, position)
    report = read(path, policy, max_length=20).report
    assert (report.used, report.num_skipped, report.rows) == (4, 1, 5)
    ((code, why),) = report.left_out
    assert code == "E-DATA-0030"
    assert f"{path}{place(kind, position)}" in why
    assert "nothing left to train within max_length" in report.summary()
    with pytest.raises(DataError, match="max_length=3 leaves no token to train in any row") as caught:
        read(path, policy, max_length=3)
    assert caught.value.code == "E-DATA-0031"
    assert read(path, policy, max_length=20, truncation_mode="keep_end").report.used == 5


@pytest.mark.parametrize(("kind", "position"), POSITIONS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_pair_of_one_answer(kind: str, position: int, policy: str, tmp_path: Path) -> None:
    pair = {"prompt": "One and one?", "chosen": " Two.", "rejected": " Three."}
    path = write(tmp_path, kind, pair, {**pair, "rejected": " Two."}, position)
    report = check(path, data=DataSettings(on_bad_row=policy))
    (found,) = [finding for finding in report.findings if finding.code == "E-DATA-0060"]
    assert (found.severity, found.count) == ("error", 1)
    assert found.first[0].startswith(f"{path}{place(kind, position)}")


SYSTEM = {"role": "system", "content": "Be brief."}
TWO_SYSTEMS = chat(SYSTEM, {**SYSTEM, "content": "Be kind."}, USER, ANSWER)
FIRST_ONLY = (
    "{% for m in messages %}{% if loop.first or m.role != 'system' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize(("kind", "position"), POSITIONS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_two_system_turns(kind: str, position: int, policy: str, tmp_path: Path) -> None:
    """Said by the check and in training where the template writes both, an error where it leaves one out."""
    path = write(tmp_path, kind, CHAT, TWO_SYSTEMS, position)
    report = read(path, policy).report
    assert (report.used, report.odd_systems.count) == (5, 1)
    assert f"{report.odd_systems.first[0]}".startswith(f"{path}{place(kind, position)}")
    (found,) = [found for found in check(path).findings if found.code == "W-DATA-0129"]
    assert (found.severity, found.count) == ("warning", 1)
    assert found.first[0].startswith(f"{path}{place(kind, position)}")
    words = '"messages[1]" is of role system, which the chat template leaves out'
    assert_named_and_skipped(path, "E-DATA-0043", words, place(kind, position), good=4, template=FIRST_ONLY)


@pytest.mark.parametrize(("kind", "position"), POSITIONS)
def test_a_row_that_the_template_refuses(kind: str, position: int, tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    )
    path = write(tmp_path, kind, CHAT, chat(SYSTEM, USER, ANSWER), position)
    words = "the chat template refuses the conversation (system → user → assistant): System role not supported"
    assert_named_and_skipped(path, "E-DATA-0020", words, place(kind, position), good=4, template=template)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("policy", ["error", "skip"])
def test_a_broken_template_is_nobodys_row(kind: str, policy: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind, CHAT, {"messages": [{"role": "nobody"}]}, 4)  # which is not even read
    with pytest.raises(ConfigError, match=r"line 2: no Jinja template: unexpected '}'") as caught:
        read(path, policy, chat_template="{% for m in messages %}\n{{ m.content }{% endfor %}")
    assert caught.value.code == "E-DATA-0047"
    assert str(path) not in str(caught.value)


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("fault", RAW)
def test_a_bad_line(fault: str, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 5500)
    raw, code, words = RAW[fault]
    path = tmp_path / "a.jsonl"
    written = [json.dumps(GOOD).encode()] * 4
    written.insert(position, raw)
    path.write_bytes(b"\n".join(written))
    assert_named_and_skipped(path, code, words, f":{position + 1}", good=4)


@pytest.mark.parametrize("position", [0, 2, 4])
@pytest.mark.parametrize("fault", ["not utf-8", "NaN", "repeated key", "an array", "too long"])
def test_a_bad_element_of_a_whole_array(
    fault: str, position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MAX_LINE", 5500)
    raw, code, words = RAW[fault]
    raw = raw + b'"}' if fault == "too long" else raw
    elements = [json.dumps(GOOD).encode()] * 4
    elements.insert(position, raw)
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join(elements) + b"]")
    assert_named_and_skipped(path, code, words, f":{position + 1}", good=4)


@pytest.mark.parametrize("fault", ["cut off", "too deep"])
def test_a_bad_element_of_an_array(fault: str, tmp_path: Path) -> None:
    """An array whose element does not end cannot be gone on with; others: test_broken_arrays.py."""
    raw, code, words = RAW[fault]
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + json.dumps(GOOD).encode() + b",\n" + raw + b"]")
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=words) as caught:
            read(path, policy)
        assert caught.value.code == code
        assert f"{path}:2" in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("change", [lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n")])
def test_marks_of_windows_are_fine(kind: str, change: Callable[[str], str], tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, [GOOD] * 3)
    path.write_bytes(change(path.read_text()).replace("\r\r", "\r").encode())
    assert read(path, "error").report.used == 3


@pytest.mark.parametrize(
    ("text", "code", "words", "place", "good"),
    [
        (b"prompt,completion\na,b\nc\nd,e\n", "E-DATA-0007", "has 1 fields, but the header has 2", ":3", 2),
        (b'prompt,completion\na,b\n"c"x,y\nd,e\n', "E-DATA-0007", "broken CSV", ":3", 2),
        (b"prompt,completion\na,b\ncaf\xe9,y\nd,e\n", "E-DATA-0003", "byte 0xe9 is not UTF-8", ":3", 2),
        (b'\n\nprompt,completion\na,b\nc,""\nd,e\n', "E-DATA-0013", '"completion" is empty', ":5", 2),
        (b'prompt,completion\n"a\nb",c\nd\ne,f\n', "E-DATA-0007", "has 1 fields", ":4", 2),
    ],
)
def test_a_bad_row_of_a_table(text: bytes, code: str, words: str, place: str, good: int, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    assert_named_and_skipped(path, code, words, place, good)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        (b"prompt,completion\ra,b\rc,d\r", "E-DATA-0007", "carriage return only"),
        (b'prompt,completion\na,b\n"c,d\ne,f\n', "E-DATA-0007", ":3  broken CSV"),
        (b" \n\n", "E-DATA-0006", "white space only"),
        (b"prompt,,completion\na,b,c\n", "E-DATA-0007", "twice or not at all"),
    ],
)
def test_a_table_that_cannot_be_read_at_all(text: bytes, code: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(text)
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=words) as caught:
            read(path, policy)
        assert caught.value.code == code


def test_headers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('prompt, completion ,"a, note\nof two lines"\na,b,c\n')
    assert read(path, "error").report.used == 1


def test_messages_in_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerows([["messages", "n"], [json.dumps(CHAT["messages"]), 1], ["[broken", 2]])
    path.write_text(buffer.getvalue())
    assert_named_and_skipped(path, "E-DATA-0011", '"messages" is not valid JSON', ":3", good=1)


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_parquet(path, [{**GOOD, "prompt": f"question {i} " * 50} for i in range(500)])
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 200] = b"\xff" * 200
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match=r"damaged|not UTF-8|not a Parquet"):
        read(path, "error")


def test_text_in_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    broken = pyarrow.array([b"a", b"caf\xe9", b"c"]).view(pyarrow.string())
    table = pyarrow.table({"prompt": broken, "completion": ["x", "y", "z"]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path)
    assert_named_and_skipped(path, "E-DATA-0003", "not UTF-8", "[1]", good=2)


def test_the_place_shown_is_that_of_the_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"content": "assitant", "role": "user"}, {"role": "assitant", "content": "x"}]}\n')
    with pytest.raises(DataError) as caught:
        read(path, "error")
    column = path.read_text().index('"role": "assitant"') + len('"role": ') + 1
    assert f"{path}:1:{column} " in str(caught.value)


def test_a_very_long_line_is_not_read_whole(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"prompt": "')
        for _ in range(100):
            file.write(b"a" * 2**20)
        file.write(b'", "completion": "b"}\n' + json.dumps(GOOD).encode())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_named_and_skipped(path, "E-DATA-0009", "longer than 32 MiB", ":1", good=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024
