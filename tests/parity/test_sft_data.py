"""Token ids, labels, packs and their order equal those of TRL 1.16's SFTTrainer, option by option.

TRL shifts the labels: the one at a sequence's first position is never used. With `packing_strategy="wrapped"` it is
used (the documents of a pack attend across), so the first position is compared everywhere.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from posttrain.data.prepare import prepare
from posttrain.data.settings import DataSettings
from posttrain.types import Sample
from tests.tiny_tokenizers import SPECIAL, chatml_tokenizer, plain_tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.parity

TEXTS = ["The capital of France is Paris.", "Two plus two is four.</s>", "A list: 1, 2, 3", " Hello there! 🙂", "Hi"]
TEXT_ROWS = [{"text": TEXTS[i % 5] + " Two plus two." * (i % 4)} for i in range(30)]
PAIR_ROWS = [{"prompt": f"What is {i} plus two?", "completion": f" It is {i + 2}." * (1 + i % 3)} for i in range(30)]
USER = [[{"role": "user", "content": row["prompt"]}] for row in PAIR_ROWS]
ASSISTANT = [[{"role": "assistant", "content": row["completion"]}] for row in PAIR_ROWS]
CHAT_PAIR_ROWS = [{"prompt": u, "completion": a} for u, a in zip(USER, ASSISTANT, strict=True)]
CHAT_ROWS = [
    {"messages": u + a + v + b} for u, a, v, b in zip(USER, ASSISTANT, USER[::-1], ASSISTANT[1:], strict=False)
]
TURN_ROWS = [
    {"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHAT_ROWS
]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOL_ROWS = [
    {**row, "tools": json.dumps([{"name": f"add{i}"}]), "chat_template_kwargs": {"mood": "gladly "}}
    for i, row in enumerate(CHAT_PAIR_ROWS)
]


def theirs(rows: list[dict], tokenizer: PreTrainedTokenizerBase, folder: Path, formatting: Any, **args: Any) -> Any:
    """The train set as TRL's trainer prepares it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config = trl.SFTConfig(str(folder), report_to="none", use_cpu=True, bf16=False, **args), LlamaForCausalLM(config)
    return trl.SFTTrainer(
        config[1],
        args=config[0],
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        formatting_func=formatting,
    ).train_dataset


def labelled(samples: list[Sample]) -> list[tuple[list[int], list[int]]]:
    found = []
    for sample in samples:
        ids = np.concatenate([part.branches[0].ids for part in sample])
        supervised = np.concatenate([part.branches[0].supervised for part in sample])
        found.append((ids.tolist(), np.where(supervised, ids, -100).tolist()))
    return found


CASES: dict[str, tuple[list[dict], Any, dict[str, Any]]] = {
    "text": (TEXT_ROWS, plain_tokenizer, {}),
    "text with bos": (TEXT_ROWS, lambda: plain_tokenizer(bos=True), {}),
    "another text column": ([{"body": r["text"]} for r in TEXT_ROWS], plain_tokenizer, {"dataset_text_field": "body"}),
    "max_length": (TEXT_ROWS, plain_tokenizer, {"max_length": 9}),
    "keep_end": (PAIR_ROWS, plain_tokenizer, {"max_length": 9, "truncation_mode": "keep_end"}),
    "answers cut off": (PAIR_ROWS, plain_tokenizer, {"max_length": 14}),
    "prompt-completion": (PAIR_ROWS, lambda: plain_tokenizer(bos=True), {}),
    "completion_only off": (PAIR_ROWS, plain_tokenizer, {"completion_only_loss": False}),
    "chat pairs": (CHAT_PAIR_ROWS, chatml_tokenizer, {}),
    "chat pairs, completion_only off": (CHAT_PAIR_ROWS, chatml_tokenizer, {"completion_only_loss": False}),
    "chat pairs, bos": (CHAT_PAIR_ROWS, lambda: chatml_tokenizer(bos=True), {}),
    "tools and template arguments": (TOOL_ROWS, lambda: plain_tokenizer(template=TOOL_TEMPLATE), {}),
    "messages": (CHAT_ROWS, chatml_tokenizer, {}),
    "from and value": (TURN_ROWS, chatml_tokenizer, {}),
    "assistant_only": (CHAT_ROWS, lambda: chatml_tokenizer(marked=True), {"assistant_only_loss": True}),
    "assistant_only, cut": (
        CHAT_ROWS,
        lambda: chatml_tokenizer(marked=True),
        {"assistant_only_loss": True, "max_length": 40},
    ),
    "assistant_only of completions": (
        CHAT_PAIR_ROWS,
        lambda: chatml_tokenizer(marked=True),
        {"assistant_only_loss": True},
    ),
    "assistant_only of pairs": (
        CHAT_PAIR_ROWS,
        lambda: chatml_tokenizer(marked=True),
        {"assistant_only_loss": True, "completion_only_loss": False},
    ),
    "eos_token": (TEXT_ROWS, plain_tokenizer, {"eos_token": "<|im_end|>"}),
    "bfd": (TEXT_ROWS, plain_tokenizer, {"packing": True, "max_length": 24}),
    "bfd_split": (TEXT_ROWS, plain_tokenizer, {"packing": True, "max_length": 24, "packing_strategy": "bfd_split"}),
    "wrapped": (PAIR_ROWS, plain_tokenizer, {"packing": True, "max_length": 24, "packing_strategy": "wrapped"}),
    "shuffled": (TEXT_ROWS, plain_tokenizer, {"shuffle_dataset": True, "seed": 5}),
    "shuffled packs": (
        PAIR_ROWS,
        plain_tokenizer,
        {"shuffle_dataset": True, "seed": 5, "packing": True, "max_length": 40},
    ),
    "tokens": (
        [{"input_ids": list(range(i, 9 + i)), "labels": [-100] * 4 + list(range(i + 4, i + 9))} for i in range(9)],
        plain_tokenizer,
        {"max_length": 7},
    ),
    "tokens with a mask": (
        [{"input_ids": [7, 8, 9], "completion_mask": [0, 1, 1]} for _ in range(3)],
        plain_tokenizer,
        {"completion_only_loss": True},
    ),
}
NAMES = {
    "dataset_text_field": "text_field",
    "completion_only_loss": "completion_only",
    "assistant_only_loss": "assistant_only",
    "shuffle_dataset": "shuffle",
    "seed": "shuffle_seed",
}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_labels(case: str, tmp_path: Path) -> None:
    rows, make_tokenizer, args = CASES[case]
    tokenizer = make_tokenizer()
    if "eos_token" in args:
        tokenizer.eos_token = args["eos_token"]
    settings = {"max_length": 1024} | {NAMES.get(name, name): v for name, v in args.items() if name != "eos_token"}
    ours = labelled(prepare(json.loads(json.dumps(rows)), tokenizer, DataSettings(**settings)).samples)
    expected = theirs(rows, make_tokenizer(), tmp_path, None, **args)
    assert ours == [(row["input_ids"], row["labels"]) for row in expected]


def test_formatting_func(tmp_path: Path) -> None:
    rows = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIR_ROWS]

    def formatted(row: dict[str, str]) -> str:
        return f"Q: {row['question']} A: {row['answer']}"

    ours = prepare(rows, plain_tokenizer(), DataSettings(formatting_func=formatted))
    expected = theirs(rows, plain_tokenizer(), tmp_path, formatted)
    assert labelled(ours.samples) == [(row["input_ids"], row["labels"]) for row in expected]


def test_gsm8k_packed(shared_data: Path, tmp_path: Path) -> None:
    lines = (shared_data / "gsm8k_train.jsonl").read_text().splitlines()[:1500]
    rows = [{"prompt": r["question"] + "\n", "completion": r["answer"]} for r in map(json.loads, lines)]
    ours = prepare(rows, plain_tokenizer(), DataSettings(packing=True, max_length=600, shuffle=True))
    expected = theirs(rows, plain_tokenizer(), tmp_path, None, packing=True, max_length=600, shuffle_dataset=True)
    assert labelled(ours.samples) == [(row["input_ids"], row["labels"]) for row in expected]
    assert [[part.num_tokens for part in sample] for sample in ours.samples] == expected["seq_lengths"]


SAME = ("qwen3_instruct_2507", "llama3", "gemma", "gemma3", "phi3", "lfm2", "lfm2_v2", "cohere", "smolvlm")
CHAT = CHAT_ROWS[3]["messages"]


def _trained(template: Path) -> tuple[str, str]:
    """All of one conversation, and the part of it that `assistant_only` trains, under a template of TRL's."""
    text = template.read_text("utf-8")
    tokens = set(re.findall(r"<\|[a-zA-Z_]+\|>|<[a-z_]+of_turn>", text)) - set(SPECIAL)
    tokenizer = plain_tokenizer(extra=tuple(sorted(tokens)), template=text)
    ((tokenized,),) = prepare([{"messages": CHAT}], tokenizer, DataSettings(assistant_only=True)).samples
    branch = tokenized.branches[0]
    return tokenizer.decode(branch.ids), tokenizer.decode(branch.ids[branch.supervised])


@pytest.mark.parametrize("family", SAME)
def test_a_models_own_template_trains_what_trls_training_template_marks(family: str) -> None:
    folder = Path(trl.__file__).parent / "chat_templates"
    assert _trained(folder / f"{family}.jinja") == _trained(folder / f"{family}_training.jinja")


def test_qwen2_5_differs_by_the_line_break_that_the_generation_prompt_gives() -> None:
    """TRL's training template marks it too, though the model is never asked to write it."""
    folder = Path(trl.__file__).parent / "chat_templates"
    text, ours = _trained(folder / "qwen2_5.jinja")
    assert text == _trained(folder / "qwen2_5_training.jinja")[0]
    answers = [message["content"] + "<|im_end|>\n" for message in CHAT if message["role"] == "assistant"]
    assert ours == "".join(answers)
    assert _trained(folder / "qwen2_5_training.jinja")[1] == "".join("\n" + answer for answer in answers)
