"""Every sample of the five real files: what is trained is what prefixes of the conversation say, worked out here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.data.doctor.content import RowReader
from posttrain.data.prepare import DataSettings, prepare
from posttrain.data.sources import read_rows
from posttrain.data.templates import resolve_template, without_markers
from posttrain.types import Example, Message
from tests.tiny_tokenizers import chatml_tokenizer

GSM8K = {"question": "prompt", "answer": "completion"}
FILES = {
    "alpaca_en_demo.json": (999, {}),
    "glaive_toolcall_en_demo.json": (300, {}),
    "dpo_en_demo.json": (300, {}),
    "kto_en_demo.json": (300, {}),
    "gsm8k_train.jsonl": (7473, GSM8K),
}


def rows_to_train(example: Example) -> Iterator[dict[str, Any]]:
    """One row an answer: pairs and ratings are trained on by other methods, but every answer is rendered alike."""
    for completion in example.completions:
        if example.prompt is None:
            yield {"messages": completion, "tools": example.tools}
        else:
            yield {"prompt": example.prompt, "completion": completion}


def expected(tokenizer: Any, row: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Token ids, and which are trained: those that begin inside a trained stretch of the rendered text."""
    if isinstance(row.get("prompt"), str):
        text = row["prompt"] + row["completion"] + tokenizer.eos_token
        stretches = [(len(row["prompt"]), len(text))]
    else:
        messages: list[Message] = row.get("messages") or [*row["prompt"], *row["completion"]]
        first = 0 if "messages" in row else len(row["prompt"])

        def render(count: int, ask: bool) -> str:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=ask, tools=row.get("tools")
            )

        text = render(len(messages), False)
        stretches = [
            (len(render(i, True)), len(render(i + 1, False)))
            for i, message in enumerate(messages)
            if message["role"] == "assistant" and i >= first
        ]
        if "messages" not in row:
            stretches = [(stretches[0][0], len(text))]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = np.array([begin for begin, _ in encoded["offset_mapping"]])
    trained = np.zeros(len(begins), dtype=bool)
    for begin, end in stretches:
        trained |= (begins >= begin) & (begins < end)
    return encoded["input_ids"], trained


@pytest.mark.parametrize("name", FILES)
def test_every_sample(name: str, shared_data: Path) -> None:
    count, names = FILES[name]
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = without_markers(str(resolve_template(tokenizer, "chatml")))  # one that knows tools
    reader = RowReader(DataSettings(column_map=names))
    examples = [reader.example(row, origin) for origin, row in read_rows(shared_data / name)]
    assert len(examples) >= count
    rows = [row for example in examples for row in rows_to_train(example)]
    prepared = prepare(rows, tokenizer, DataSettings(assistant_only=None))
    assert prepared.report.used == len(rows)
    for row, (part,) in zip(rows, prepared.samples, strict=True):
        ids, trained = expected(tokenizer, row)
        assert part.branches[0].ids.tolist() == ids
        assert np.array_equal(part.branches[0].supervised, trained), part.origin
