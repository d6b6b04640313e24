"""Preference pairs side by side and rated answers with their label, in text, with colours and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.cli import main
from posttrain.data.settings import DataSettings
from posttrain.data.view import PairView, RowView, token_view, view_rows
from posttrain.data.view.columns import beside, columns
from posttrain.data.view.html import as_html
from posttrain.data.view.pairs import any_view
from posttrain.data.view.text import as_text, legend
from tests.tiny_tokenizers import chatml_tokenizer

PROMPT = [{"role": "user", "content": "What is two plus two?"}]
PAIR = {
    "prompt": PROMPT,
    "chosen": [{"role": "assistant", "content": "Four 🙂"}],
    "rejected": [{"role": "assistant", "content": "Fo\u202ere <b>ver</b>"}],
}
TEXT_PAIR = {"prompt": "The capital of France is", "chosen": " Paris.", "rejected": " two."}
END = "<|im_end|>\n"


def pair(row: dict[str, Any] = PAIR, train_on: str = "assistant", **options: Any) -> PairView:
    found = any_view(row, chatml_tokenizer(), DataSettings(**options), train_on)
    assert isinstance(found, PairView)
    return found


def joined(found: RowView, **wanted: Any) -> str:
    return "".join(
        piece.text for piece in found.pieces if all(getattr(piece, name) == value for name, value in wanted.items())
    )


def test_both_answers_are_as_training_would_have_them() -> None:
    found = pair()
    for name, side in found.sides:
        alone = token_view({"prompt": PROMPT, "completion": PAIR[name]}, chatml_tokenizer())
        assert [(piece.id, piece.state) for piece in side.pieces] == [(piece.id, piece.state) for piece in alone.pieces]
    assert joined(found.chosen, trained=True) == "Four 🙂" + END
    assert joined(found.rejected, trained=True) == PAIR["rejected"][0]["content"] + END
    assert found.chosen.notes[0] == "read as preference pairs: columns `prompt`, `chosen`, `rejected`, as messages"


def test_what_is_alike() -> None:
    found = pair()
    ids = [[piece.id for piece in side.pieces] for _, side in found.sides]
    assert ids[0][: found.num_shared] == ids[1][: found.num_shared]
    assert ids[0][found.num_shared] != ids[1][found.num_shared]
    for _, side in found.sides:
        assert [piece.shared for piece in side.pieces] == [i < found.num_shared for i in range(len(side.pieces))]
    assert joined(found.chosen, shared=True).startswith("<|im_start|>user\nWhat is two plus two?")


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        (TEXT_PAIR, " Paris.<|im_end|>", " two.<|im_end|>"),
        ({"chosen": "a b", "rejected": "a c"}, " b<|im_end|>", " c<|im_end|>"),
        ({"chosen": [*PROMPT, *PAIR["chosen"]], "rejected": [*PROMPT, *PAIR["rejected"]]}, "Four 🙂" + END, None),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "a"},
          "rejected": {"from": "gpt", "value": "b"}}, "a" + END, "b" + END),
        ({**PAIR, "tools": "[]", "chat_template_kwargs": {}}, "Four 🙂" + END, None),
    ],
)  # fmt: skip
def test_every_form_of_a_pair(row: dict[str, Any], chosen: str, rejected: str | None) -> None:
    found = pair(row)
    assert joined(found.chosen, trained=True) == chosen
    assert rejected is None or joined(found.rejected, trained=True) == rejected


def test_masks_and_limits_are_the_settings() -> None:
    assert joined(pair(train_on="all").chosen, trained=False) == "<|im_start|>"
    cut = pair(max_length=len(pair().chosen.pieces) - 2)
    assert (cut.chosen.counts["cut"], cut.rejected.counts["cut"] > 2) == (2, True)
    renamed = {"q": PAIR["prompt"], "good": PAIR["chosen"], "bad": PAIR["rejected"]}
    names = {"q": "prompt", "good": "chosen", "bad": "rejected"}
    assert pair(renamed, column_map=names).chosen.pieces == pair().chosen.pieces
    assert pair(format="preference").num_shared == pair().num_shared


def test_the_same_answers_are_said_to_be() -> None:
    found = pair({**PAIR, "rejected": PAIR["chosen"]})
    assert found.num_shared == len(found.chosen.pieces)
    assert "chosen and rejected are the same tokens" in as_text(found, color=False)


def test_side_by_side() -> None:
    text = as_text(pair(), color=False, width=64)
    head, names, *lines = text.splitlines()
    assert re.fullmatch(
        r"row\[0\]  a pair: chosen \d+ tokens: \d+ trained, \d+ masked \(4 special\), "
        r"rejected \d+ tokens: .* \(4 special\); the first \d+ alike",
        head,
    )
    assert names == "chosen                         | rejected"
    body = [line for line in lines if "note:" not in line]
    assert {columns(line.split(" | ")[0]) for line in body} == {30}
    left, right = ("".join(line.split(" | ")[side].rstrip() for line in body) for side in (0, 1))
    assert left.startswith("‹<|im_start|>user↵What is two plus two?<|im_end|>↵<|im_start|>assistant↵")
    assert left.endswith("⟦F⟧›⟦our 🙂<|im_end|>↵⟧")
    assert "\\u202e" in right
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_below_one_another_where_it_is_narrow() -> None:
    text = as_text(pair(), color=False, width=40)
    assert " | " not in text
    assert text.index("chosen\n") < text.index("our 🙂") < text.index("rejected\n") < text.index("<b>ver</b>")


def test_without_unicode() -> None:
    text = as_text(pair(), color=False, encoding="ascii", width=80)
    assert text.isascii()
    assert "((<|im_start|>user" in text
    rows = [line for line in text.splitlines() if " | " in line]
    assert {line.index(" | ") for line in rows} == {38}
    assert legend(False, "ascii", pairs=True).endswith("  ((alike in both))")


def test_colours() -> None:
    text = as_text(pair(), color=True, width=80)
    assert "\x1b[2;35m<|im_start|>" in text
    assert "\x1b[2;4;32mF" in text  # alike, and trained
    assert "\x1b[1;4;32m" in text
    bare = re.sub(r"\x1b\[[\d;]*m", "", text)
    rows = [line for line in bare.splitlines() if " | " in line]
    assert {columns(line.split(" | ")[0]) for line in rows} == {38}
    assert legend(True, pairs=True).endswith("\x1b[2malike in both\x1b[0m")


@given(
    st.lists(st.tuples(st.sampled_from(["", "1"]), st.text(max_size=30)), max_size=5),
    st.lists(st.tuples(st.sampled_from(["", "1"]), st.text(max_size=30)), max_size=5),
    st.integers(10, 60),
)
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost_between_columns(left: list[Any], right: list[Any], width: int) -> None:
    half = (width - 3) // 2
    lines = list(beside(left, right, width))
    for line in lines:
        assert columns("".join(text for _, text in line)) <= width
    shown: tuple[list[str], list[str]] = ([], [])
    for line in lines:
        text = "".join(text for _, text in line)
        taken = next(i for i in range(len(text) + 1) if columns(text[:i]) == half and text[i : i + 3] == " | ")
        shown[0].append(text[:taken])
        shown[1].append(text[taken + 3 :])
    for side, given_ in zip(shown, (left, right), strict=True):
        wanted = "".join(text for _, text in given_)
        assert re.sub(r"\s", "", "".join(side)) == re.sub(r"\s", "", wanted)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page() -> None:
    page = Page(as_html([pair(), pair(TEXT_PAIR), *rated_views()]))
    assert page.open == []
    assert [attrs for tag, attrs in page.tags if tag == "div" and attrs] == [{"class": "pair"}] * 2
    assert page.text.count("chosen") >= 2
    assert "alike in both answers" in page.text
    faint = [attrs["class"] for tag, attrs in page.tags if tag == "span" and "shared" in str(attrs.get("class"))]
    assert "masked special shared" in faint
    assert "trained shared" in faint
    assert "Fo\\u202ere <b>ver</b>" in page.text
    assert "rated good (label true)" in page.text
    assert "alike in both answers" not in Page(as_html(rated_views())).text


def rated_views() -> list[Any]:
    rows = [
        {"prompt": "The capital of France is", "completion": " Paris.", "label": True},
        {"messages": [*PROMPT, *PAIR["chosen"]], "label": False},
    ]
    return [any_view(row, chatml_tokenizer()) for row in rows]


def test_rated_rows_show_their_label() -> None:
    good, bad = rated_views()
    assert (good.label, bad.label) == (True, False)
    assert as_text(good, color=False).splitlines()[0].endswith("; rated good (label true)")
    assert as_text(bad, color=True).splitlines()[0].endswith("; rated bad (label false)")
    assert (good.to_dict()["label"], "label" in token_view({"text": "a"}, chatml_tokenizer()).to_dict()) == (
        True,
        False,
    )
    assert joined(bad, trained=True) == "Four 🙂" + END
    assert good.notes[0].endswith("rated by `label`")


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({**PAIR, "rejected": []}, "E-DATA-0011"),
        ({**TEXT_PAIR, "rejected": " "}, "E-DATA-0013"),
        ({"prompt": "a", "chosen": ["b"], "rejected": "c"}, "E-DATA-0016"),
        ({"x": 1}, "E-DATA-0010"),
        ({**TEXT_PAIR, "label": 3, "rejected": None, "completion": "a"}, "E-DATA-0033"),
        ({"prompt": "a", "completion": "b", "label": 3}, "E-DATA-0028"),
        ({**PAIR, "chosen": [{"role": "assitant", "content": "a"}]}, "E-DATA-0012"),
    ],
)
def test_broken_rows(row: dict[str, Any], code: str) -> None:
    found = any_view(row, chatml_tokenizer())
    assert found.error is not None
    assert found.error.code == code


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chatml_tokenizer().save_pretrained(tmp_path / "model")
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (PAIR, TEXT_PAIR, {**TEXT_PAIR, "rejected": ""})))
    options = [str(file), "--model", str(tmp_path / "model"), "--rows"]
    assert main(["data", "tokens", *options, "0-1"]) == 0
    out = capsys.readouterr().out
    assert out.count("chosen  ") == 2
    assert out.endswith("‹alike in both›\n")
    assert main(["data", "preview", *options, "0,2", "--json", "--mask", "all", "--max-length", "8"]) == 3
    first, second = json.loads(capsys.readouterr().out)
    assert set(first) == {"row", "chosen", "rejected", "shared"}
    assert first["chosen"]["counts"]["cut"] > 0
    assert second["error"]["code"] == "E-DATA-0013"
    for mask in ([], ["--mask"], ["--mask", "assistant"], ["--mask", "completion"], ["--train-on", "completion"]):
        assert main(["data", "tokens", *options, "1", "--json", *mask]) == 0
        (row,) = json.loads(capsys.readouterr().out)
        assert next(token["text"] for token in row["chosen"]["tokens"] if token["state"] == "trained") == " Paris"
    assert main(["data", "tokens", *options, "0", "--html", str(tmp_path / "out.html")]) == 0
    assert '<div class="pair">' in (tmp_path / "out.html").read_text("utf-8")


def test_rows_of_a_file_keep_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps(TEXT_PAIR) + "\n")
    found = view_rows(str(file), [1, 0], chatml_tokenizer())
    assert [type(view) for view in found] == [PairView, RowView]
    assert [view.origin for view in found] == [f"{file}:2", f"{file}:1"]
