"""The pictures of docs/masks.md: what is trained under each template, drawn with a tokenizer made of whole words.

    python scripts/draw_masks.py            # writes docs/images/masks-*.svg

A test draws them again and compares, so that the guide shows what the code does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.data.settings import DataSettings
from posttrain.data.templates import TEMPLATES, resolve_template
from posttrain.data.templates.table import EOS
from posttrain.data.view import token_view
from posttrain.data.view.svg import as_svg

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "images"
WORD = r" ?[\p{L}\p{N}']+|[^\s\p{L}\p{N}]|\s"
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "Six."},
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds two numbers."}}]
CALLING = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four."},
]
THINKING = [
    TURNS[0],
    {**TURNS[1], "reasoning_content": "Two and two."},
    TURNS[2],
    {**TURNS[3], "reasoning_content": "Three and three."},
]
ROW = {"messages": [SYSTEM, *TURNS]}
PICTURES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "chatml": ("chatml", "assistant", ROW, {}),
    "llama-3.1": ("llama-3.1", "assistant", ROW, {}),
    "gemma-3": ("gemma-3", "assistant", ROW, {}),
    "qwen-2.5": ("qwen-2.5", "assistant", ROW, {}),
    "mistral": ("mistral", "assistant", ROW, {}),
    "phi-3": ("phi-3", "assistant", ROW, {}),
    "zephyr": ("zephyr", "assistant", ROW, {}),
    "alpaca": ("alpaca", "assistant", {"messages": TURNS[:2]}, {}),
    "qwen-3-thinking": ("qwen-3", "assistant", {"messages": THINKING}, {}),
    "deepseek-r1-thinking": ("deepseek-r1", "assistant", {"messages": THINKING}, {}),
    "tools": ("lfm2", "assistant", {"messages": CALLING, "tools": TOOLS}, {}),
    "all": ("chatml", "all", ROW, {}),
    "completion": ("chatml", "completion", {"prompt": [SYSTEM, *TURNS[:3]], "completion": TURNS[3:]}, {}),
    "flags": ("chatml", "assistant", {"messages": [TURNS[0], {**TURNS[1], "train": False}, *TURNS[2:]]}, {}),
    "max-length": ("chatml", "assistant", ROW, {"max_length": 46}),
}
"""Name: the template, what is trained, the row, further settings."""


def word_tokenizer(text: str, special: list[str]) -> PreTrainedTokenizerFast:
    """A token a word: those of `text`, and the `special` ones."""
    words = {"<unk>": 0}
    for word in re.findall(r" ?[^\W_]+|\s|[^\w\s]|_", text):
        words.setdefault(word, len(words))
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<unk>")


def draw(name: str) -> str:
    """The picture called `name`, as SVG."""
    template, train_on, row, options = PICTURES[name]
    entry = TEMPLATES[template]
    special = ["<s>", "</s>", *(token for token in (*entry.ends, *entry.tokens) if token != EOS)]
    bare = word_tokenizer("", special)
    messages = row.get("messages") or [*row["prompt"], *row["completion"]]
    text = bare.apply_chat_template(
        messages, tools=row.get("tools"), chat_template=resolve_template(bare, template), tokenize=False
    )
    asked = bare.apply_chat_template(messages, chat_template=resolve_template(bare, template), tokenize=False)
    tokenizer = word_tokenizer(f"{text}{asked}", special)
    view = token_view(row, tokenizer, DataSettings(chat_template=template, **options), train_on)
    if view.error is not None:
        raise view.error
    unknown = [piece for piece in view.pieces if piece.id == tokenizer.unk_token_id]
    if unknown:
        raise ValueError(f"{name}: {len(unknown)} words are not in the vocabulary")
    return as_svg(view, f"{template}: which tokens are trained ({train_on})")


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"masks-{name}.svg").write_text(draw(name), "utf-8")
    print(f"{len(PICTURES)} pictures in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
