"""What a file of another format must not lose: ratings, rejected answers, a user's own columns; and that it is read
again before it is in place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.cli import main
from posttrain.data.change import TARGETS, convert
from posttrain.data.doctor.check import check
from posttrain.data.formats import rated as rated_format
from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from tests.doctor_files import pair, rated, row, write
from tests.tiny_tokenizers import chatml_tokenizer

S = DataSettings()
SKIP = DataSettings(on_bad_row="skip")
RATED = [rated("1 + 1?", "2", True), rated("1 + 1?", "3", False), rated("2 + 2?", "4", True)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [found for _, found in read_rows(path)]


def refused(rows: Any, to: str, out: Path, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        convert(rows, to, out, options.pop("settings", S), **options)
    assert not out.exists()
    assert not list(out.parent.glob(".*")), "nothing half written"
    return caught.value


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_ratings_that_would_be_lost_are_refused(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rated_format, "ANSWERS", rated_format.ANSWERS[:-1])  # Alpaca as it is read elsewhere
    out = tmp_path / f"a.{suffix}"
    error = refused(RATED, "alpaca", out)
    assert error.code == "E-DATA-0052"
    assert error.message == (
        "data[0]  cannot be written as alpaca: its rating (`label`) would be lost, and bad answers trained on like "
        "good ones"
    )
    assert "--keep desirable" in (error.hint or "")
    assert refused(RATED, "alpaca", out, settings=SKIP).message.endswith("not a single row is left to write")


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_only_the_answers_rated_good(tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"a.{suffix}"
    assert convert(RATED, "alpaca", out, S, keep="desirable") == {"written": 2, "left_out": 1, "skipped": 0}
    kept = lines(out)
    assert [(one["instruction"], one["output"]) for one in kept] == [("1 + 1?", "2"), ("2 + 2?", "4")]
    assert not any("label" in one for one in kept)


@pytest.mark.parametrize("to", ["messages", "prompt-completion", "sharegpt", "alpaca"])
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_ratings_stay_ratings_where_there_is_a_place_for_them(tmp_path: Path, to: str, suffix: str) -> None:
    out = tmp_path / f"a.{suffix}"
    convert(RATED, to, out, S)
    found = check(str(out))
    assert found.labels == {"good": 2, "bad": 1}
    convert(RATED, to, tmp_path / "all.jsonl", S, keep="all")
    assert check(str(tmp_path / "all.jsonl")).labels == {}
    assert len(lines(tmp_path / "all.jsonl")) == 3


@pytest.mark.parametrize("to", ["messages", "prompt-completion", "sharegpt", "alpaca"])
def test_a_pair_never_loses_its_rejected_answer_unasked(tmp_path: Path, to: str) -> None:
    rows, out = [pair("Q?", "good", "bad")], tmp_path / "a.jsonl"
    assert "rejected answer would be lost" in refused(rows, to, out).message
    convert(rows, to, out, S, keep="chosen")
    convert(str(out), "messages", tmp_path / "b.jsonl", S)
    assert lines(tmp_path / "b.jsonl") == [row("Q?", "good")]


def test_what_is_to_be_kept_says_nothing_of_the_others(tmp_path: Path) -> None:
    convert(RATED, "alpaca", tmp_path / "b.jsonl", S, keep="chosen")
    assert check(str(tmp_path / "b.jsonl")).labels == {"good": 2, "bad": 1}
    assert "rejected" in refused([pair("Q?", "a", "b")], "alpaca", tmp_path / "a.jsonl", keep="desirable").message
    with pytest.raises(ConfigError, match="known: desirable, all, chosen"):
        convert(RATED, "alpaca", tmp_path / "a.jsonl", S, keep="good")
    bad = [one for one in RATED if not one["label"]]
    assert refused(bad, "alpaca", tmp_path / "a.jsonl", keep="desirable").hint == "no answer is rated good"


def test_plain_rows_do_not_become_ratings(tmp_path: Path) -> None:
    rows = [{"instruction": "Q?", "output": "A", "label": True}]
    named = DataSettings(format="alpaca")
    error = refused(rows, "messages", tmp_path / "a.jsonl", settings=named)
    assert "a plain example would be read back as a rated one" in error.message
    convert(rows, "messages", tmp_path / "a.jsonl", named, keep="all")
    assert lines(tmp_path / "a.jsonl") == [row("Q?", "A")]


def test_own_columns_that_mean_something_in_the_new_format(tmp_path: Path) -> None:
    error = refused([{**row("Q?", "A"), "input": "mine"}], "alpaca", tmp_path / "a.jsonl")
    assert "its own column `input` means something there" in error.message
    assert error.hint == "rename it: --map input=own_input"
    history = {**row("Q?", "A"), "history": [["a", "b"]]}
    assert "would not be read back with the same words" in refused([history], "alpaca", tmp_path / "a.jsonl").message
    other = {"instruction": "Q?", "output": "A", "messages": row("another", "one")["messages"]}
    assert convert([row("1", "2"), other], "messages", tmp_path / "b.jsonl", SKIP)["skipped"] == 0
    named = DataSettings(format="alpaca")
    assert "`messages`" in refused([other], "messages", tmp_path / "a.jsonl", settings=named).message


def test_a_file_is_read_again_before_it_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.data.writing._line", lambda _: '{"prompt": "another", "completion": "row"}')
    error = refused([row("Q?", "A")], "prompt-completion", tmp_path / "a.jsonl")
    assert error.code == "E-DATA-0054"
    assert error.message == f"{tmp_path}/a.jsonl: row 0 of the new file would not be read back as it was: it says " + (
        "something else"
    )


def test_text_that_looks_like_messages_stays_text(tmp_path: Path) -> None:
    for text in ("[]", "{}", '[{"name": "x"}]', "[1]", '[{"role": "user", "content": "Hi"}]'):
        convert([{"prompt": "List?", "completion": text}], "prompt-completion", tmp_path / "b.csv", S)
        assert lines(tmp_path / "b.csv") == [{"prompt": "List?", "completion": text}]


def test_alpaca_with_earlier_turns_as_a_table(tmp_path: Path) -> None:
    rows = [
        {"instruction": "c", "input": "", "output": "d", "system": "s", "history": [["a", "b,\n\"x\""]]},
        {"instruction": "e", "input": "", "output": "f"},
    ]  # fmt: skip
    for suffix in ("csv", "parquet"):
        convert(rows, "alpaca", tmp_path / f"a.{suffix}", S)
        convert(str(tmp_path / f"a.{suffix}"), "alpaca", tmp_path / f"{suffix}.jsonl", S)
        assert lines(tmp_path / f"{suffix}.jsonl") == rows


TOOLS = [
    {"function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}},
    {"function": {"name": "g", "parameters": {"type": "object", "properties": {"x": {"enum": [1, "a"]}}}}},
    {"function": {"name": "h", "parameters": {"type": "object", "properties": {"y": [1]}}}},
]


def test_tools_of_different_shapes_as_parquet(tmp_path: Path) -> None:
    def calls(arguments: dict[str, Any], tool: Any) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        turns = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        return {"messages": turns, "tools": [{"type": "function", **tool}]}

    rows = [calls({"x": "1"}, TOOLS[0]), calls({"x": 1, "n": None}, TOOLS[1]), calls({"y": [1, "a"]}, TOOLS[2])]
    convert(rows, "messages", tmp_path / "a.parquet", S)
    convert(str(tmp_path / "a.parquet"), "messages", tmp_path / "b.jsonl", S)
    assert lines(tmp_path / "b.jsonl") == rows


@pytest.mark.parametrize("to", ["messages", "sharegpt", "prompt-completion"])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_the_real_tool_calls_as_tables(shared_data: Path, tmp_path: Path, to: str, suffix: str) -> None:
    out = tmp_path / f"a.{suffix}"
    keep = "last" if to == "prompt-completion" else None
    done = convert(str(shared_data / "glaive_toolcall_en_demo.json"), to, out, S, keep)
    assert (done["written"], done["skipped"]) == (300, 0)
    assert check(str(out)).usable == 300


def test_the_real_ratings_and_pairs(shared_data: Path, tmp_path: Path) -> None:
    kto, dpo = str(shared_data / "kto_en_demo.json"), str(shared_data / "dpo_en_demo.json")
    out = tmp_path / "a.jsonl"
    convert(kto, "alpaca", out, S)
    assert check(str(out)).labels == check(kto).labels
    good = check(kto).labels["good"]
    done = convert(kto, "prompt-completion", out, S, keep="desirable")
    assert done["written"] == good
    out.unlink()
    assert "rejected" in refused(dpo, "messages", out).message
    assert convert(dpo, "messages", out, S, keep="chosen")["written"] == 300


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = write(tmp_path / "pairs.jsonl", [pair("Q?", "a", "b")]), tmp_path / "a.jsonl"
    words = ["data", "convert", str(source), "--to", "alpaca", "-o", str(out)]
    assert main(words) == 3
    said = capsys.readouterr().err
    assert f"E-DATA-0052 {source}:1  cannot be written as alpaca: its rejected answer would be lost" in said
    assert "  = --keep chosen writes the chosen answers" in said
    assert not out.exists()
    assert main([*words, "--keep", "chosen", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"written": 1, "left_out": 0, "skipped": 0, "out": str(out)}


def called(ids: tuple[str, ...] = ("call_1", "call_2"), **message: Any) -> dict[str, Any]:
    calls = [{"id": one, "type": "function", "function": {"name": "add", "arguments": {"n": n}}}
             for n, one in enumerate(ids)]  # fmt: skip
    results = [{"role": "tool", "tool_call_id": one, "name": "add", "content": str(n)} for n, one in enumerate(ids)]
    turns = [
        {"role": "user", "name": "Ann", "content": "Add."},
        {"role": "assistant", "content": "", "tool_calls": calls, **message},
        *reversed(results),
        {"role": "assistant", "name": "Bot", "content": "Done."},
    ]
    return {"messages": turns}


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize("one", [called(), called(("call_1",)), called(name="Bot"), called(content="I add.")],
                         ids=["two calls", "one call", "a name", "words"])  # fmt: skip
def test_names_and_ids_survive_sharegpt(one: Any, suffix: str, tmp_path: Path) -> None:
    """Results that come in another order than their calls are told by their ids."""
    convert([one], "sharegpt", tmp_path / f"a.{suffix}", S)
    convert(str(tmp_path / f"a.{suffix}"), "messages", tmp_path / "b.jsonl", S)
    assert lines(tmp_path / "b.jsonl") == [one]


@pytest.mark.parametrize("to", ["messages", "prompt-completion", "sharegpt"])
def test_an_id_or_a_name_that_is_lost_is_noticed(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for lost in ("tool_call_id", "name", "id"):
        turns = {**TARGETS}
        whole = turns[to]
        monkeypatch.setitem(TARGETS, to, lambda example, whole=whole, lost=lost: without(whole(example), lost))
        error = refused([called()], to, tmp_path / "a.jsonl", keep="last" if to == "prompt-completion" else None)
        monkeypatch.setitem(TARGETS, to, whole)
        assert "would not be read back" in error.message


def without(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        return {name: without(item, key) for name, item in value.items() if name != key or "arguments" in value}
    if isinstance(value, list):
        return [without(item, key) for item in value]
    return value.replace('"id": ', '"was": ') if isinstance(value, str) and key == "id" else value


def test_what_a_call_has_beside_is_not_lost_unsaid(tmp_path: Path) -> None:
    one = called()
    one["messages"][1]["tool_calls"][0]["index"] = 7
    assert "would not be read back" in refused([one], "sharegpt", tmp_path / "a.jsonl").message
    convert([one], "messages", tmp_path / "a.jsonl", S)
    assert lines(tmp_path / "a.jsonl") == [one]
    assert "no place for tool calls" in refused([called()], "alpaca", tmp_path / "b.jsonl").message


CHAT = {"messages": [*row("Q1?", "A1.")["messages"], *row("Q2?", "A2.")["messages"]]}
GIVEN = {"prompt": CHAT["messages"][:3], "completion": CHAT["messages"][3:]}


@pytest.mark.parametrize(("to", "name"), [("prompt-completion", "prompt-completion"), ("alpaca", "Alpaca")])
def test_several_answers_do_not_become_one(to: str, name: str, tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    error = refused([CHAT], to, out)
    assert error.message == f"data[0]  cannot be written as {name}: 1 earlier turn would no longer be trained"
    assert error.hint == "write messages or sharegpt, which keep all of them; --keep last trains the last answer alone"
    assert convert([CHAT, row("Q?", "A")], to, out, SKIP) == {"written": 1, "skipped": 1}
    assert convert([CHAT], to, out, S, keep="last")["written"] == 1
    convert(str(out), "messages", tmp_path / "b.jsonl", S)
    before, (question, answer) = CHAT["messages"][:2], CHAT["messages"][2:]
    assert lines(tmp_path / "b.jsonl") == [{"messages": [before[0], {**before[1], "train": False}, question, answer]}]


def test_the_last_answer_has_to_be_one_that_is_trained(tmp_path: Path) -> None:
    one = {"messages": [*CHAT["messages"][:3], {**CHAT["messages"][3], "train": False}]}
    assert "its last answer is not to be trained" in refused([one], "alpaca", tmp_path / "a.jsonl", keep="last").message


@pytest.mark.parametrize("to", ["messages", "sharegpt"])
def test_what_a_prompt_holds_stays_untrained(to: str, tmp_path: Path) -> None:
    history = {"instruction": "Q2?", "output": "A2.", "history": [["Q1?", "A1."]]}
    convert([GIVEN, history], to, tmp_path / "a.jsonl", S)
    convert(str(tmp_path / "a.jsonl"), "prompt-completion", tmp_path / "b.jsonl", S)
    for one in lines(tmp_path / "a.jsonl"):
        assert [turn.get("train") for turn in one["messages" if to == "messages" else "conversations"]] == [
            None, False, None, None,
        ]  # fmt: skip
    for one in lines(tmp_path / "b.jsonl"):
        assert [turn["content"] for turn in one["completion"]] == ["A2."]


def test_a_prompt_and_its_completion_stay_what_they_are(tmp_path: Path) -> None:
    early = {"prompt": CHAT["messages"][:1], "completion": CHAT["messages"][1:]}
    convert([GIVEN, early], "prompt-completion", tmp_path / "a.jsonl", S)
    assert lines(tmp_path / "a.jsonl") == [GIVEN, early]


def test_a_rating_is_of_the_last_answer_alone(tmp_path: Path) -> None:
    convert([{**CHAT, "label": True}], "messages", tmp_path / "a.jsonl", S, keep="desirable")
    (one,) = lines(tmp_path / "a.jsonl")
    assert [turn.get("train") for turn in one["messages"]] == [None, False, None, None]
    convert([{**CHAT, "label": True}], "prompt-completion", tmp_path / "b.jsonl", S)
    assert lines(tmp_path / "b.jsonl") == [{**GIVEN, "label": True}]


FLAG = st.sampled_from([{}, {}, {"train": True}, {"train": False}])
CONVERSATIONS = st.tuples(
    st.booleans(),
    st.lists(st.tuples(st.sampled_from(["Hi?", "Who?", "Where?"]), st.sampled_from(["Me.", "Here.", "No."]), FLAG),
             min_size=1, max_size=3),
    st.integers(0, 5),
)  # fmt: skip


def written_as(conversation: Any) -> dict[str, Any]:
    """A conversation whole, cut in two, or as Alpaca."""
    with_system, exchanges, cut = conversation
    turns = [{"role": "system", "content": "Be brief."}] if with_system else []
    for question, answer, flag in exchanges:
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **flag}]
    if cut < 2:
        return {"messages": turns}
    bare = [{key: turn[key] for key in ("role", "content")} for turn in turns]
    if cut == 2:
        *history, (question, answer, _) = exchanges
        pairs = [[asked, said] for asked, said, _ in history]
        return {"instruction": question, "output": answer, "history": pairs}
    at = max(1, len(turns) - cut)
    return {"prompt": bare[:at], "completion": bare[at:]}


@settings(max_examples=80, deadline=None)
@given(CONVERSATIONS, st.sampled_from([*TARGETS]), st.sampled_from([*TARGETS]))
def test_what_is_trained_is_what_was_trained(
    tmp_path_factory: pytest.TempPathFactory, conversation: Any, there: str, back: str
) -> None:
    """In whatever formats a row is written on the way, unless it is refused."""
    folder, one = tmp_path_factory.mktemp("convert"), written_as(conversation)
    expected = trained_text(one)
    for number, to in enumerate((there, back)):
        out = folder / f"{number}.jsonl"
        if (code := refusal(one, to, out)) is not None:
            assert code in ("E-DATA-0052", "E-DATA-0022")
            assert to not in ("messages", "chatml", "sharegpt") or not expected
            return
        (one,) = lines(out)
        assert trained_text(one) == expected


def refusal(one: dict[str, Any], to: str, out: Path) -> str | None:
    try:
        convert([one], to, out, S)
    except DataError as error:
        return error.code
    return None


def trained_text(one: dict[str, Any]) -> str:
    """Every trained character, in order, with what stands before it."""
    tokenizer = chatml_tokenizer()
    try:
        made = prepare([one], tokenizer, DataSettings(assistant_only=None))
    except DataError:  # every answer of it is left out
        return ""
    branches = [branch for sample in made.samples for branch in sample[0].branches]
    return "|".join(
        f"{tokenizer.decode([token])}{'*' if is_trained else ''}"
        for branch in branches
        for token, is_trained in zip(branch.ids, branch.supervised, strict=True)
    )


def test_rows_of_tokens_have_no_text(tmp_path: Path) -> None:
    both = {"input_ids": [5, 6, 7], **row("Q?", "A")}
    for tokens in ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, both):
        error = refused([tokens], "messages", tmp_path / "a.jsonl")
        assert error.code == "E-DATA-0052"
        assert error.message.startswith('data[0]  "input_ids" holds token ids: a row that is tokenised has no text')
    assert "--map input_ids=own_input_ids" in (error.hint or "")
    named = DataSettings(column_map={"input_ids": "own_input_ids"})
    assert convert([both], "messages", tmp_path / "a.jsonl", named)["written"] == 1
    assert check([both], data=named).formats == {"read as messages: column `messages` with keys `role`, `content`": 1}


@pytest.mark.parametrize("to", ["messages", "sharegpt", "alpaca"])
def test_a_transcript_is_not_made_one_message(to: str, tmp_path: Path) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows: list[dict[str, Any]] = [
        {"chosen": talk + " So.", "rejected": talk + " No."},
        {"prompt": talk, "completion": " So."},
    ]
    for one in rows:
        with pytest.raises(DataError, match="would become one message") as caught:
            convert([one], to, tmp_path / "out.jsonl", DataSettings(), keep="chosen")
        assert caught.value.code == "E-DATA-0052"
        assert "docs/data.md" in (caught.value.hint or "")
    assert convert(rows, "prompt-completion", tmp_path / "text.jsonl", DataSettings(), keep="chosen")["written"] == 2
    asked = {"prompt": "Go on with this chat:\nHuman: Hi\nAssistant: Hello", "completion": "Human: Bye"}
    assert convert([asked], to, tmp_path / "asked.jsonl", DataSettings())["written"] == 1


@pytest.mark.parametrize("to", ["messages", "prompt-completion"])
def test_both_answers_of_a_pair_rated(tmp_path: Path, to: str) -> None:
    """What KTO learns from them is what it learns from the pairs."""
    chat = {"prompt": [{"role": "user", "content": "Q?"}], "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [{"role": "assistant", "content": "bad"}], "id": 7}  # fmt: skip
    whole = {name: [*chat["prompt"], *chat[name]] for name in ("chosen", "rejected")}  # type: ignore[misc]
    rows, out = [chat, whole], tmp_path / "a.jsonl"
    assert convert(rows, to, out, S, keep="both") == {"written": 4, "left_out": 0, "skipped": 0}
    assert [one["label"] for one in lines(out)] == [True, False] * 2
    assert [one.get("id") for one in lines(out)] == [7, 7, None, None]
    settings = DataSettings(method="rated", completion_only=True, columns=("label",))
    first, second = (prepare(one, chatml_tokenizer(), settings, "train").samples for one in (rows, str(out)))
    assert len(first) == 4
    seen, expected = (
        sorted(
            ([*one.prefix, *one.branches[0].ids], one.branches[0].supervised.sum(), one.columns["label"])
            for (one,) in some
        )
        for some in (second, first)
    )
    assert seen == expected


def test_nothing_of_a_pair_is_lost_that_is_rated(tmp_path: Path) -> None:
    rows, out = [{**pair("Q?", "good", "bad"), "label": "safety"}], tmp_path / "a.jsonl"
    error = refused(rows, "messages", out, keep="both")
    assert "its own `label` would be lost" in error.message
    assert "--map label=own_label" in (error.hint or "")
    assert "it is no pair, and has no rating" in refused([CHAT], "messages", out, keep="both").message


def test_only_pairs_have_two_answers_to_rate(tmp_path: Path) -> None:
    same = pair("Q?", "same", "same")
    assert "the very answer" in refused([same], "messages", tmp_path / "a.jsonl", keep="both").message
    convert(RATED, "messages", tmp_path / "b.jsonl", S, keep="both")
    assert check(str(tmp_path / "b.jsonl")).labels == {"good": 2, "bad": 1}
