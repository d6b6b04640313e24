"""With a model: what training would refuse or remark on is found before, row by row, and the repaired copy heeds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.data.doctor.check import CheckReport, check
from posttrain.data.doctor.repair import repair
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from tests.doctor_files import finding, pair, plain, row, write
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

TOKENIZER = chatml_tokenizer()
PICKY = "{% for m in messages %}{% if 'secret' in m.content %}{{ raise_exception('no secrets') }}{% endif %}" \
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"  # fmt: skip
ENDLESS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def checked(rows: Any, policy: str = "error", tokenizer: Any = TOKENIZER, template: str | None = None) -> CheckReport:
    return check(rows, data=DataSettings(on_bad_row=policy, chat_template=template), tokenizer=tokenizer)


@pytest.mark.parametrize(("policy", "severity"), [("error", "error"), ("skip", "warning")])
def test_rows_that_the_template_refuses_are_named(policy: str, severity: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [plain(1)[0], row("A secret?", "Yes."), *plain(2, start=5)])
    report = checked(path, policy, template=PICKY)
    found = finding(report, "E-DATA-0020")
    assert (found.count, found.first, found.severity) == (1, (f"{path}:2",), severity)
    assert (report.rows, report.usable) == (4, 3)
    assert any("no secrets" in line for line in found.details["shown"])


def test_a_pair_is_one_row() -> None:
    pairs = [{"prompt": row("A secret?", "")["messages"][:1], "chosen": "a", "rejected": "b"}]
    turns = [{"role": "assistant", "content": text} for text in "ab"]
    pairs = [{**pairs[0], "chosen": turns[:1], "rejected": turns[1:]}]
    report = checked(pairs, template=PICKY)
    assert (finding(report, "E-DATA-0020").count, report.rows, report.usable) == (1, 1, 0)


def test_the_copy_leaves_them_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [plain(1)[0], row("A secret?", "Yes."), *plain(2, start=5)])
    data = DataSettings(chat_template=PICKY)
    counts = repair([path], tmp_path / "out.jsonl", data, TOKENIZER)
    assert (counts["written"], counts["dropped_unusable"]) == (3, 1)
    assert checked(tmp_path / "out.jsonl", template=PICKY).errors == 0
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


CALLS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}" \
        "{{ call | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"  # fmt: skip
CALL = {"function": {"name": "look", "arguments": '{"where": "up"}'}}
CALLING = [{"messages": [row("Look!", "")["messages"][0], {"role": "assistant", "content": "", "tool_calls": [CALL]}]}]

REMARKS: dict[str, tuple[Any, Any, str | None]] = {
    "W-DATA-0121": (plain(2), TOKENIZER, ENDLESS),
    "W-DATA-0122": ([{"prompt": "What is two plu", "completion": "s two?"}], plain_tokenizer(), None),
    "W-DATA-0126": ([row("Say <|im_end|> twice.", "No.")], TOKENIZER, None),
    "W-DATA-0159": ([{**plain(1)[0], "chat_template_kwargs": {"enable_thinkin": False}}], TOKENIZER, "qwen-3"),
    "W-DATA-0160": ([{**row("Hi", "<think>\nhm\n</think>\nHello"), "chat_template_kwargs": {"enable_thinking": False}}],
                    TOKENIZER, "smollm3"),
    "W-DATA-0130": (CALLING, TOKENIZER, CALLS),
    "W-DATA-0128": (plain(2), plain_tokenizer(extra=("<|eot_id|>",)), "llama-3"),
}  # fmt: skip


@pytest.mark.parametrize("code", REMARKS)
def test_what_training_remarks_on_is_a_finding(code: str, tmp_path: Path) -> None:
    rows, tokenizer, template = REMARKS[code]
    path = write(tmp_path / "a.jsonl", rows)
    report = checked(path, tokenizer=tokenizer, template=template)
    found = finding(report, code)
    trained = prepare(path, tokenizer, DataSettings(assistant_only=None, chat_template=template)).report
    assert found.count == len(rows)
    assert found.first[:1] in ((f"{path}:1",), ())
    assert trained.notes()
    assert code not in [other.code for other in checked([{"text": "Plain."}]).findings]


def test_thoughts_and_tools_that_are_left_out() -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "look", "description": "Looks around"}}])
    turns = row("Hi", "Hello")["messages"]
    thinking = {"messages": [turns[0], {**turns[1], "reasoning_content": "They greet me."}], "tools": tools}
    found = [one.code for one in checked([thinking], template=ENDLESS).findings]
    assert {"W-DATA-0121", "W-DATA-0124", "W-DATA-0125"} <= set(found)


def test_pairs_are_counted_by_answers() -> None:
    report = checked([pair("What is two plu", "s two?", "s three?")], tokenizer=plain_tokenizer())
    assert finding(report, "W-DATA-0122").count == 2


def test_tokens_of_rows_that_are_dropped_are_lost_ones() -> None:
    rows = [row("one two three four five six seven eight " * 9, "Yes."), *plain(3)]
    whole = prepare(rows, TOKENIZER, DataSettings(assistant_only=None)).report
    cut = prepare(rows, TOKENIZER, DataSettings(assistant_only=None, max_length=40)).report
    assert cut.num_skipped == 1
    assert (cut.tokens + cut.tokens_lost, cut.supervised + cut.supervised_lost) == (whole.tokens, whole.supervised)
    assert any("% of them" in note for note in cut.notes())


WITH_TOOLS = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + ENDLESS


@pytest.mark.parametrize("description", ["Hi", "Greets", "", None, "Says: {hi}", "ü"])
@pytest.mark.parametrize("bare", [False, True])
def test_tools_that_are_left_out_however_they_are_described(description: str | None, bare: bool) -> None:
    """Words of the description, and names, also stand in what is said."""
    function = {"name": "greet", "description": description, "parameters": {"type": "object", "properties": {}}}
    tools = [function if bare else {"type": "function", "function": function}]
    talk = {**row("Hi, greet me! Greets are fine.", "Hello"), "tools": tools}
    assert "W-DATA-0125" in [found.code for found in checked([talk], template=ENDLESS).findings]
    assert "W-DATA-0125" not in [found.code for found in checked([talk], template=WITH_TOOLS).findings]


def test_rows_of_tokens_fail_once() -> None:
    rows = [{"input_ids": [1, 2, 3]}, {"input_ids": [1, -2, 3]}, {"input_ids": [1, 2, 3], "labels": [-100] * 3}]
    report = check(rows, tokenizer=chatml_tokenizer())
    assert (report.rows, report.usable) == (3, 1)
    assert sorted(one.code for one in report.findings if one.severity == "error") == ["E-DATA-0022", "E-DATA-0025"]
