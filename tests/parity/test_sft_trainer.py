"""Three optimiser steps give TRL 1.16's losses, gradient norms and metrics: families, adapters, losses, data, packing.

TRL pads and masks, ours packs, so what is compared is two ways to compute the same thing. Dropout is not compared: the
two draw their random numbers for tensors of different shapes.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, TrainingArguments

import posttrain
from tests.parity.side_by_side import (
    CHAT_PAIRS,
    CHATS,
    PAIRS,
    TEXTS,
    TOKENS,
    Rows,
    as_dataset,
    assert_same,
    check,
    near,
    numbers_of_theirs,
    train,
    train_both,
    trl,
)
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings})


# --- models and adapters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(tmp_path, CHAT_PAIRS, model=family)
    assert "padded batches" not in caplog.text  # what a model falls back to that fails the self-check


ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "alpha": {"lora_alpha": 32},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "targets by name": {"target_modules": ["q_proj", "v_proj", "c_attn"]},
    "head trained": {"modules_to_save": ["lm_head"]},
    "bias trained": {"bias": "all"},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lora(family: str, adapter: str, tmp_path: Path) -> None:
    check(tmp_path, CHAT_PAIRS, model=family, given=lambda: {"peft_config": lora(**ADAPTERS[adapter])})


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_that_has_learned_before(family: str, tmp_path: Path) -> None:
    def model(vocabulary: int) -> PeftModel:
        return get_peft_model(tiny_model(family, vocabulary), lora(init_lora_weights=False))  # B is not zero

    check(tmp_path, CHAT_PAIRS, model=model)


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_under_an_adapter(family: str, tmp_path: Path) -> None:
    check(tmp_path, CHAT_PAIRS, model=family, gradient_checkpointing=True, given=lambda: {"peft_config": lora()})


def with_head(family: str, tied: bool) -> Callable[[int], PreTrainedModel]:
    """A model whose head is its embeddings, or is not, against its family's habit."""

    def make(vocabulary: int) -> PreTrainedModel:
        model = tiny_model(family, vocabulary)
        embeddings = model.get_input_embeddings().weight
        model.config.tie_word_embeddings = tied
        model.get_output_embeddings().weight = embeddings if tied else torch.nn.Parameter(embeddings.detach().flip(0))
        return model

    return make


@pytest.mark.parametrize("is_adapter", [False, True])
@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("qwen3", True), ("gemma3", False), ("gpt2", False), ("lfm2", False)]
)
def test_tied_and_untied_heads(family: str, tied: bool, is_adapter: bool, tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        return {"peft_config": lora(modules_to_save=["lm_head"])} if is_adapter else {}

    check(tmp_path, CHAT_PAIRS, model=with_head(family, tied), given=given)


def test_a_first_token_in_gpt2s_loss(tmp_path: Path) -> None:
    """Where the first token of a row is a label, nothing can predict it. transformers leaves it out of the count that
    it divides by for models whose loss it knows, and GPT-2's is not among them (`Trainer._loss_shifts_labels`), so that
    TRL's training loss is too small there; the loss of its own `evaluate` is right, and ours."""
    first = [
        train(library, tmp_path, TEXTS, model="gpt2", tokenizer=plain_tokenizer, max_steps=1, learning_rate=0.0)
        for library in (posttrain, trl)
    ]
    ours, theirs = (trained.history[0]["loss"] for trained in first)
    supervised = int(first[0].history[0]["num_tokens"]) - len(TEXTS)
    assert ours == near(theirs * (supervised + len(TEXTS)) / supervised)
    assert ours == near(first[1].trainer.evaluate(as_dataset(TEXTS))["eval_loss"])


# --- losses, masks, lengths -----------------------------------------------------------------------------------------


def marked() -> Any:
    return chatml_tokenizer(marked=True)


PACKED = {"packing": True, "per_device_train_batch_size": 99}
CHANGES: dict[str, tuple[Rows, dict[str, Any], dict[str, Any]]] = {
    "dft": (CHAT_PAIRS, {"loss_type": "dft"}, {}),
    "label smoothing": (CHAT_PAIRS, {"label_smoothing_factor": 0.1}, {}),
    "prompts too": (CHAT_PAIRS, {"completion_only_loss": False}, {}),
    "prompts too, text": (PAIRS, {"completion_only_loss": False}, {"tokenizer": plain_tokenizer}),
    "assistant only": (CHATS, {"assistant_only_loss": True}, {"tokenizer": marked}),
    "assistant only, of pairs": (
        CHAT_PAIRS,
        {"assistant_only_loss": True},
        {"tokenizer": marked, "completion_only_loss": False},
    ),
    "end of sequence": (TEXTS, {"eos_token": "<|im_end|>"}, {"tokenizer": plain_tokenizer}),
    "cut": (CHAT_PAIRS, {"max_length": 40}, {}),
    "cut at the start": (CHAT_PAIRS, {"truncation_mode": "keep_end"}, {"max_length": 20}),
    "shuffled": (CHAT_PAIRS, {"shuffle_dataset": True}, {"seed": 3, "per_device_train_batch_size": 2}),
    "packs, cut": (CHAT_PAIRS, {"max_length": 33}, PACKED),
    "packs, split": (CHAT_PAIRS, {"packing_strategy": "bfd_split"}, {"max_length": 33, **PACKED}),
    "packs, wrapped": (CHAT_PAIRS, {"packing_strategy": "wrapped"}, {"max_length": 33, **PACKED}),
    "packs, some a step": (CHAT_PAIRS, {"per_device_train_batch_size": 2}, {"max_length": 70, "packing": True}),
}
CHANGES_NOTHING: dict[str, tuple[Rows, dict[str, Any], dict[str, Any]]] = {
    "chunked_nll": (CHAT_PAIRS, {"loss_type": "chunked_nll"}, {}),
    "dft has no smoothing": (CHAT_PAIRS, {"label_smoothing_factor": 0.1}, {"loss_type": "dft"}),
    "completions only": (CHAT_PAIRS, {"completion_only_loss": True}, {}),
    "assistant only, of completions": (CHAT_PAIRS, {"assistant_only_loss": True}, {"tokenizer": marked}),
    "padding free": (CHAT_PAIRS, {"padding_free": True}, {"max_length": None}),
    "packs": (CHAT_PAIRS, {"packing": True}, {"max_length": 99}),
    "checkpointing": (CHAT_PAIRS, {"gradient_checkpointing": True}, {}),
    "padded further": (CHAT_PAIRS, {"pad_to_multiple_of": 64}, {}),
    "padding token": (CHAT_PAIRS, {"pad_token": "<s>"}, {}),
    "older name": (CHAT_PAIRS, {"packing_strategy": "bfd-requeue"}, {"max_length": 99, **PACKED}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option(name: str, tmp_path: Path) -> None:
    rows, option, rest = CHANGES[name]
    theirs = check(tmp_path, rows, **rest, **option)
    assert theirs.numbers != near(numbers_of_theirs(tmp_path, rows, **rest))


@pytest.mark.parametrize("name", CHANGES_NOTHING)
def test_an_option_that_changes_no_number(name: str, tmp_path: Path) -> None:
    rows, option, rest = CHANGES_NOTHING[name]
    theirs = check(tmp_path, rows, **rest, **option)
    assert theirs.numbers == near(numbers_of_theirs(tmp_path, rows, **rest))


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lfm2"])
def test_packs(family: str, strategy: str, tmp_path: Path) -> None:
    given = {"completion_only_loss": True, "packing_strategy": strategy, "max_length": 40}
    if family == "gpt2" and strategy == "wrapped":
        given["max_length"] = 500  # one pack: a later one could begin with a label (see above)
    check(tmp_path, CHAT_PAIRS, model=family, **PACKED, **given)


def test_packs_of_a_short_convolution(tmp_path: Path) -> None:
    """TRL cannot pack LFM2 without a CUDA kernel; ours gives what its unpacked rows give."""
    packed = {"model": "lfm2", "packing": True, "max_length": 99}
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        train(trl, tmp_path, CHAT_PAIRS, **packed)
    assert_same(train(posttrain, tmp_path, CHAT_PAIRS, **packed), train(trl, tmp_path, CHAT_PAIRS, model="lfm2"))


def test_small_micro_batches(tmp_path: Path) -> None:
    theirs = train(trl, tmp_path, CHAT_PAIRS)
    for budget in (1, 80, 150):
        assert_same(train(posttrain, tmp_path, CHAT_PAIRS, token_budget=budget), theirs)


# --- formats --------------------------------------------------------------------------------------------------------

SHAREGPT = [{"conversations": [{"from": m["role"], "value": m["content"]} for m in row["messages"]]} for row in CHATS]
LABELS = [{**row, "labels": [-100] * (i % 5) + row["input_ids"][i % 5 :]} for i, row in enumerate(TOKENS)]
MASKS = [{**row, "completion_mask": [0] * (i % 5) + [1] * (12 - i % 5)} for i, row in enumerate(TOKENS)]
QUESTIONS = [{"question": row["prompt"], "answer": row["completion"]} for row in PAIRS]


def joined(row: dict[str, str]) -> str:
    return f"Q: {row['question']} A: {row['answer']}"


FORMATS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "text": (TEXTS, {"tokenizer": plain_tokenizer}),
    "text elsewhere": (
        [{"body": row["text"]} for row in TEXTS],
        {"tokenizer": plain_tokenizer, "dataset_text_field": "body"},
    ),
    "prompt and completion": (PAIRS, {"tokenizer": plain_tokenizer}),
    "messages": (CHATS, {}),
    "from and value": (SHAREGPT, {}),
    "formatting_func": (QUESTIONS, {"tokenizer": plain_tokenizer, "given": lambda: {"formatting_func": joined}}),
    "tokens": (TOKENS, {"max_length": 9}),
    "labels": (LABELS, {}),
    "labels, not prepared": (LABELS, {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": 9}),
    "mask": (MASKS, {"completion_only_loss": True}),
    "mask that is not asked for": (MASKS, {}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format(name: str, tmp_path: Path) -> None:
    rows, settings = FORMATS[name]
    check(tmp_path, rows, **settings)


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)


def test_a_template_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(TEMPLATE)
    theirs = check(tmp_path, CHAT_PAIRS, chat_template_path=str(path))
    assert theirs.numbers != near(numbers_of_theirs(tmp_path, CHAT_PAIRS))


@pytest.mark.parametrize("adapter", [None, {}, {"modules_to_save": ["lm_head"]}], ids=["full", "lora", "lora, head"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_tokenizer_whose_template_adds_tokens(family: str, adapter: dict | None, tmp_path: Path) -> None:
    other = plain_tokenizer(
        extra=("<|a|>", "<|b|>"), template=TEMPLATE.replace("<s>", "<|a|>").replace("</s>", "<|b|>")
    )
    other.eos_token = "<|b|>"
    other.save_pretrained(tmp_path / "other")
    ours, theirs = train_both(
        tmp_path,
        CHAT_PAIRS,
        model=family,
        tokenizer=plain_tokenizer,
        chat_template_path=str(tmp_path / "other"),
        given=dict if adapter is None else lambda: {"peft_config": lora(**adapter)},
    )
    assert_same(ours, theirs)
    mine, expected = ours.trainer.processing_class, theirs.trainer.processing_class
    assert mine.get_vocab() == expected.get_vocab()
    assert (mine.eos_token, mine.chat_template) == (expected.eos_token, expected.chat_template)


# --- ways to call it ------------------------------------------------------------------------------------------------


def test_the_same_arguments_with_the_same_defaults() -> None:
    parameters = list(inspect.signature(trl.SFTTrainer.__init__).parameters)
    assert list(inspect.signature(posttrain.SFTTrainer.__init__).parameters) == [*parameters, "older"]
    fields = [field.name for field in dataclasses.fields(trl.SFTConfig)]
    mine, expected = posttrain.SFTConfig("out", bf16=False), trl.SFTConfig("out", bf16=False, use_cpu=True)
    different = {name for name in fields if getattr(mine, name) != getattr(expected, name)}
    assert different == {"gradient_checkpointing", "activation_checkpointing"}


def test_plain_training_arguments(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        plain = {"max_steps": 3, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 1}
        quiet = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        return {"args": TrainingArguments(str(tmp_path), **plain, **quiet)}

    check(tmp_path, CHAT_PAIRS, given=given)


def test_older_spellings(tmp_path: Path) -> None:
    modern = {"max_length": 40, "eval_strategy": "steps", "eval_steps": 2, "warmup_steps": 0.5}
    theirs = train(trl, tmp_path, CHAT_PAIRS, given=lambda: {"eval_dataset": as_dataset(CHATS)}, **modern)
    older = {"evaluation_strategy": "steps", "eval_steps": 2, "warmup_ratio": 0.5}
    names = {"eval_dataset": CHATS, "tokenizer": chatml_tokenizer(), "processing_class": None}
    assert_same(train(posttrain, tmp_path, CHAT_PAIRS, given=lambda: names, max_seq_length=40, **older), theirs)
    names["max_seq_length"] = 40
    assert_same(train(posttrain, tmp_path, CHAT_PAIRS, given=lambda: names, **older), theirs)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_a_model_by_name(is_adapter: bool, tmp_path: Path) -> None:
    tiny_model("llama", len(chatml_tokenizer())).save_pretrained(tmp_path / "model")
    chatml_tokenizer().save_pretrained(tmp_path / "model")

    def given() -> dict[str, Any]:
        named = {"model": str(tmp_path / "model"), "processing_class": None}
        return {**named, "peft_config": lora()} if is_adapter else named

    check(tmp_path, CHAT_PAIRS, given=given, model_init_kwargs={"dtype": "float32"})
