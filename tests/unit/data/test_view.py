"""What is shown of a row: the same tokens and masks as in training, safely, in every form."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.data.view import RowView, parse_rows, texts, token_view, view_rows, visible
from posttrain.data.view.html import STYLE, as_html
from posttrain.data.view.svg import as_svg
from posttrain.data.view.text import as_text, legend
from posttrain.errors import ConfigError
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

ROW = {
    "messages": [
        {"role": "user", "content": "What is <b>two</b>? \u202eevil\x1b[31m"},
        {"role": "assistant", "content": "Four 🙂"},
    ]
}
PAIR = {"prompt": "The capital of France is", "completion": " Paris."}


def view(row: dict[str, Any] = ROW, train_on: str = "assistant", **options: Any) -> RowView:
    return token_view(row, chatml_tokenizer(), DataSettings(**options), train_on)


def joined(found: RowView, state: str) -> str:
    return "".join(piece.text for piece in found.pieces if piece.state == state)


def test_states_are_those_of_training() -> None:
    found = view()
    branch = prepare([ROW], chatml_tokenizer(), DataSettings(assistant_only=True)).samples[0][0].branches[0]
    assert [piece.id for piece in found.pieces] == branch.ids.tolist()
    assert [piece.trained for piece in found.pieces] == branch.supervised.tolist()
    assert joined(found, "trained") == "Four 🙂<|im_end|>\n"
    assert [piece.text for piece in found.pieces if piece.special] == ["<|im_start|>", "<|im_end|>"] * 2
    assert found.counts["trained"] + found.counts["masked"] == found.counts["tokens"] == len(branch.ids)


def test_train_on() -> None:
    assert joined(view(PAIR), "trained") == " Paris.<|im_end|>"
    assert joined(view(PAIR, "completion"), "trained") == " Paris.<|im_end|>"
    everything = view(PAIR, "all")
    assert not everything.pieces[0].trained  # nothing stands before it to predict it from
    assert everything.counts["masked"] == 1
    assert joined(view(train_on="completion"), "masked") == "<|im_start|>"  # no prompt: all of it
    with pytest.raises(ConfigError, match="train_on is 'al'"):
        view(train_on="al")


@pytest.mark.parametrize(("mode", "lost"), [("keep_start", 4), ("keep_end", 0)])
def test_what_a_limit_cuts_off(mode: str, lost: int) -> None:
    whole = view()
    found = view(max_length=len(whole.pieces) - 4, truncation_mode=mode)
    assert [piece.id for piece in found.pieces] == [piece.id for piece in whole.pieces]
    assert (found.counts["cut"], found.counts["trained_lost"]) == (4, lost)
    assert [piece.cut for piece in found.pieces].index(True) == (0 if mode == "keep_end" else len(whole.pieces) - 4)


def test_rows_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(
        '{"text": "one"}\n{"text": \n{"text": "three"}\n{"messages": [{"role": "assitant", "content": "x"}]}\n'
    )
    found = view_rows(str(file), [2, 0, 1, 3], plain_tokenizer())
    assert [len(item.pieces) > 0 for item in found] == [True, True, False, False]
    assert joined(found[0], "masked") + joined(found[0], "trained") == "three</s>"
    assert [item.error.code for item in found if item.error] == ["E-DATA-0002", "E-DATA-0012"]
    fix = f"posttrain data fix {file} --rule rename-role:assitant=assistant"
    assert found[3].to_dict()["error"]["hint"] == f'did you mean "assistant"?  fix: {fix}'
    with pytest.raises(ConfigError, match="has no row 9") as caught:
        view_rows(str(file), [9], plain_tokenizer())
    assert caught.value.hint == "its rows are 0 to 3"


def test_parse_rows() -> None:
    assert parse_rows("0,5-7, 6,2") == [0, 5, 6, 7, 2]
    for wrong in ("", "a", "1-", "-1", "3-1", "0-99999999"):
        with pytest.raises(ConfigError, match="rows"):
            parse_rows(wrong)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_pieces_make_up_the_text(text: str) -> None:
    tokenizer = plain_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert "".join(texts(np.array(ids), tokenizer)) == text


def test_pieces_of_sentencepiece_keep_their_spaces() -> None:
    class Words:
        words = ("▁The", "▁cat", "s", "<0xF0>")

        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(self.words[i].replace("▁", " ").replace("<0xF0>", "\ufffd") for i in ids).removeprefix(" ")

        def convert_ids_to_tokens(self, i: int) -> str:
            return self.words[i]

    assert texts(np.array([0, 1, 2, 3]), Words()) == [" The", " cat", "s", "\ufffd"]  # type: ignore[arg-type]


def test_visible() -> None:
    assert visible("a\tb\u202ec\u200d\x1b[1m\r\n\ue000é🙂") == "a\\tb\\u202ec\\u200d\\x1b[1m\\r↵\n\\ue000é🙂"


def test_marks() -> None:
    text = as_text(view(), color=False)
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "<|im_start|>user↵\nWhat is <b>two</b>? \\u202eevil\\x1b[31m<|im_end|>↵\n" in text
    assert "<|im_start|>assistant↵\n⟦Four 🙂<|im_end|>↵⟧\n" in text
    assert re.match(r"row\[0\]  \d+ tokens: \d+ trained, \d+ masked \(4 special\)\n", text)
    cut = as_text(view(max_length=len(view().pieces) - 2), color=False)
    assert "⟦Four 🙂⟧✂<|im_end|>↵✂\n" in cut
    assert "2 cut off, 2 of them to be trained" in cut


def test_marks_without_unicode() -> None:
    text = as_text(view(), color=False, encoding="ascii")
    assert "[[Four \\U0001f642<|im_end|>]]\n" in text
    assert legend(False, "ascii") == "[[trained]]  masked  %%cut off%%"


def test_colours() -> None:
    text = as_text(view(), color=True)
    assert "\x1b[1;4;32mF" in text  # underlined too
    assert "\x1b[2;35m<|im_start|>" in text
    assert re.sub(r"\x1b\[[\d;]*m", "", text).count("<|im_end|>") == 2
    assert "\x1b[31m" not in text  # the data's own


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page() -> None:
    hostile = {"text": "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\u202e"}
    page = Page(as_html([view(), view(hostile), view({"x": "<script>"})], "<title>"))
    assert {tag for tag, _ in page.tags} == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "span"
    }  # fmt: skip
    assert all(
        set(attrs) <= {"lang", "charset", "http-equiv", "content", "name", "class", "title"} for _, attrs in page.tags
    )
    assert "</pre><script>alert(1)</script><img src=x onerror=alert(1)>&amp;\\u202e" in page.text
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv"))
    assert (policy or "").startswith("default-src 'none'; style-src 'sha256-")
    assert STYLE in page.text
    assert "E-DATA-0010" in page.text


def test_picture() -> None:
    picture = as_svg(view(), "A <title>")
    root = ElementTree.fromstring(picture)
    assert picture == as_svg(view(), "A <title>")
    drawn = "".join(text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "Four 🙂<|im_end|>↵" in drawn
    assert "What is <b>two</b>? \\u202eevil" in drawn
    assert not [tag for tag in root.iter() if tag.tag.endswith(("script", "image", "foreignObject"))]
