"""Three optimiser steps give TRL 1.16's losses, gradient norms and metrics: families, adapters, losses and data."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests.parity.side_by_side import CHAT_PAIRS, CHATS, PAIRS, TEXTS, TOKENS, Rows, check
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import CHATML_MARKED, chatml_tokenizer, plain_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("family", FAMILIES)
def test_full(family: str, tmp_path: Path) -> None:
    check(tmp_path, CHAT_PAIRS, model=family)


def lora(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "by name": {"target_modules": ["q_proj", "v_proj"]},
    "head saved": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, adapter: str, tmp_path: Path) -> None:
    settings = ADAPTERS[adapter]
    if adapter == "by name" and family == "gpt2":
        settings = {"target_modules": ["c_attn"]}
    check(tmp_path, CHAT_PAIRS, model=family, given=lambda: {"peft_config": lora(**settings)})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_model_that_has_been_trained_before(family: str, tmp_path: Path) -> None:
    def model(vocabulary: int) -> peft.PeftModel:
        wrapped = peft.get_peft_model(tiny_model(family, vocabulary), lora(init_lora_weights=False))
        return wrapped

    check(tmp_path, CHAT_PAIRS, model=model)


def tie(model: Any, tied: bool) -> Any:
    """The model with or without a head of its own."""
    model.config.tie_word_embeddings = tied
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings().weight
    head.weight = embeddings if tied else torch.nn.Parameter(embeddings.detach().clone().flip(0))
    return model


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("gemma3", False), ("qwen3", True), ("gpt2", False), ("lfm2", False)]
)
def test_head(family: str, tied: bool, adapter: bool, tmp_path: Path) -> None:
    given = (lambda: {"peft_config": lora(modules_to_save=["lm_head"])}) if adapter else dict
    check(tmp_path, CHAT_PAIRS, model=lambda v: tie(tiny_model(family, v), tied), given=given)


@cache
def plain_history(folder):
    return


MARKED = lambda: chatml_tokenizer(marked=True)
import json

SHAREGPT = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHATS]
LABELS = [
    {"input_ids": r["input_ids"], "labels": [-100] * (i % 5) + r["input_ids"][i % 5 :]} for i, r in enumerate(TOKENS)
]
MASKS = [
    {"input_ids": r["input_ids"], "completion_mask": [0] * (i % 5) + [1] * (12 - i % 5)} for i, r in enumerate(TOKENS)
]
DATA: dict[str, tuple[Any, dict[str, Any]]] = {
    "text": (TEXTS, {"tokenizer": plain_tokenizer}),
    "text field": ([{"body": r["text"]} for r in TEXTS], {"tokenizer": plain_tokenizer, "dataset_text_field": "body"}),
    "prompt-completion": (PAIRS, {"tokenizer": plain_tokenizer}),
    "messages": (CHATS, {}),
    "sharegpt": (SHAREGPT, {}),
    "completion_only False": (CHAT_PAIRS, {"completion_only_loss": False}),
    "completion_only True": (CHAT_PAIRS, {"completion_only_loss": True}),
    "completion_only False, text": (PAIRS, {"completion_only_loss": False, "tokenizer": plain_tokenizer}),
    "assistant_only": (CHATS, {"assistant_only_loss": True, "tokenizer": MARKED}),
    "assistant_only pairs": (CHAT_PAIRS, {"assistant_only_loss": True, "tokenizer": MARKED}),
    "eos_token": (TEXTS, {"tokenizer": plain_tokenizer, "eos_token": "<|im_end|>"}),
    "keep_start": (CHAT_PAIRS, {"max_length": 40}),
    "keep_end": (CHAT_PAIRS, {"max_length": 20, "truncation_mode": "keep_end"}),
    "shuffle": (CHAT_PAIRS, {"shuffle_dataset": True, "seed": 3, "per_device_train_batch_size": 2}),
    "labels": (LABELS, {"tokenizer": plain_tokenizer}),
    "labels skip": (LABELS, {"tokenizer": plain_tokenizer, "dataset_kwargs": {"skip_prepare_dataset": True}}),
    "masks": (MASKS, {"tokenizer": plain_tokenizer, "completion_only_loss": True}),
    "masks ignored": (MASKS, {"tokenizer": plain_tokenizer}),
    "tokens": (TOKENS, {"tokenizer": plain_tokenizer, "max_length": 9}),
    "formatting": (
        PAIRS,
        {
            "tokenizer": plain_tokenizer,
            "given": lambda: {"formatting_func": lambda row: f"{row['prompt']}! {row['completion']}"},
        },
    ),
    "dft": (CHAT_PAIRS, {"loss_type": "dft"}),
    "smoothing": (CHAT_PAIRS, {"label_smoothing_factor": 0.1}),
    "dft smoothing": (CHAT_PAIRS, {"label_smoothing_factor": 0.1, "loss_type": "dft"}),
    "chunked": (CHAT_PAIRS, {"loss_type": "chunked_nll"}),
    "padding_free": (CHAT_PAIRS, {"padding_free": True, "max_length": None}),
    "bfd": (CHAT_PAIRS, {"packing": True, "max_length": 64, "per_device_train_batch_size": 9}),
    "bfd cut": (CHAT_PAIRS, {"packing": True, "max_length": 33, "per_device_train_batch_size": 9}),
    "bfd_split": (
        CHAT_PAIRS,
        {"packing": True, "max_length": 33, "packing_strategy": "bfd_split", "per_device_train_batch_size": 19},
    ),
    "bfd-requeue": (
        CHAT_PAIRS,
        {"packing": True, "max_length": 33, "packing_strategy": "bfd-requeue", "per_device_train_batch_size": 19},
    ),
    "wrapped": (
        CHAT_PAIRS,
        {"packing": True, "max_length": 33, "packing_strategy": "wrapped", "per_device_train_batch_size": 19},
    ),
    "ckpt": (CHAT_PAIRS, {"gradient_checkpointing": True}),
    "pad_to": (CHAT_PAIRS, {"pad_to_multiple_of": 64}),
    "pad_token": (CHAT_PAIRS, {"pad_token": "<s>"}),
}


@pytest.mark.parametrize("case", DATA)
def test_data(case: str, tmp_path: Path) -> None:
    rows, settings = DATA[case]
    check(tmp_path, rows, **settings)
