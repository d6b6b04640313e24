"""The first rows of real files under several templates: every mask equals one computed here by rendering prefixes.

Alpaca and ShareGPT with tools are read without a setting; GSM8K's columns are mapped in one line.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from posttrain.data.formats import detect, formats
from posttrain.data.pipeline import Pipeline
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.templates import TEMPLATES, resolve_template
from posttrain.data.templates.table import EOS
from posttrain.types import Example
from tests.tiny_tokenizers import SPECIAL, plain_tokenizer

NUM_ROWS = 40


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    entry = TEMPLATES[name]
    tokens = dict.fromkeys(token for token in (*entry.ends, *entry.tokens) if token != EOS and token not in SPECIAL)
    return plain_tokenizer(extra=tuple(tokens))


def by_prefixes(example: Example, tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[list[int], list[bool]]:
    """Ids and mask: what an assistant's turn adds to the conversation before it with a generation prompt."""
    before = example.prompt if isinstance(example.prompt, list) else []
    completion = example.completions[0]
    assert isinstance(completion, list)
    messages = [*before, *completion]

    def text(upto: int, prompt: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:upto],
                tools=example.tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        )

    full = text(len(messages))
    said = [False] * len(full)
    for i in range(len(before), len(messages)):
        if messages[i]["role"] == "assistant":
            start, end = len(text(i, prompt=True)), len(text(i + 1))
            assert full.startswith(text(i, prompt=True))
            said[start:end] = [True] * (end - start)
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], [any(said[start:end]) for start, end in encoded["offset_mapping"]]


@pytest.mark.parametrize("file", ["alpaca_en_demo.json", "glaive_toolcall_en_demo.json"])
@pytest.mark.parametrize("name", ["chatml", "qwen-2.5", "lfm2", "mistral", "granite-3"])
def test_masks(file: str, name: str, shared_data: Path) -> None:
    tokenizer = tokenizer_of(name)
    template = resolve_template(tokenizer, name)
    report = DataReport(file)
    conversations = "glaive" in file
    pipeline = Pipeline(tokenizer, DataSettings(assistant_only=conversations, chat_template=name), report)
    rows = list(islice(read_rows(str(shared_data / file)), NUM_ROWS))
    for origin, row in rows:
        branch = pipeline.one(row, origin).branches[0]
        table = formats()
        ids, mask = by_prefixes(detect(row, origin, table).parse(row, origin), tokenizer, template or "")
        assert branch.ids.tolist() == ids
        assert branch.supervised.tolist() == mask
    assert (report.endless.count, report.given_otherwise.count, report.boundary_moved.count) == (0, 0, 0)
    assert report.tools_left_out.count == 0


def test_gsm8k(shared_data: Path) -> None:
    tokenizer = tokenizer_of("chatml")
    pipeline = Pipeline(tokenizer, DataSettings(), DataReport("gsm8k"))
    for origin, row in islice(read_rows(str(shared_data / "gsm8k_train.jsonl")), NUM_ROWS):
        branch = pipeline.one({"prompt": row["question"] + "\n", "completion": row["answer"]}, origin).branches[0]
        assert tokenizer.decode(branch.ids[branch.supervised]) == row["answer"] + "</s>"
