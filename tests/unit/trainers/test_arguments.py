"""Every setting is honoured, harmless or refused by name; none is accepted and read by nobody."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

import posttrain
from posttrain import ConfigError, SFTConfig, SFTTrainer
from posttrain.trainers.arguments import HARMLESS, HONOURED, REFUSED, check_arguments
from posttrain.trainers.base import NEVER_CALLED
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

SOURCE = Path(posttrain.__file__).parent
OUR_FIELDS = {f.name for f in dataclasses.fields(SFTConfig)} - {f.name for f in dataclasses.fields(TrainingArguments)}


def trainer(tmp_path: Path, **options: object) -> SFTTrainer:
    tokenizer = chatml_tokenizer()
    config = {name: options.pop(name) for name in list(options) if name in SFTConfig.__dataclass_fields__}
    args = SFTConfig(str(tmp_path), bf16=False, disable_tqdm=True, **config)
    rows = [{"text": f"number {i}"} for i in range(4)]
    return SFTTrainer(tiny_model(vocabulary=len(tokenizer)), args, train_dataset=rows, processing_class=tokenizer,
                      **options)  # fmt: skip


def test_every_field_of_transformers_stands_in_exactly_one_table() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    tables = [set(HONOURED), set(HARMLESS), set(REFUSED)]
    assert set.union(*tables) == fields
    assert sum(len(table) for table in tables) == len(fields)


@pytest.mark.parametrize("name", sorted(HONOURED | OUR_FIELDS))
def test_what_is_honoured_is_read_somewhere(name: str) -> None:
    """By our code, or by transformers' optimiser, reporting and flow code, which is handed `args`."""
    tables = ("arguments.py", "spellings.py")
    ours = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name not in tables)
    handed_on = {
        "optim", "optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rate",
        "warmup_steps", "logging_strategy", "logging_steps", "logging_first_step", "eval_steps", "eval_delay",
        "save_steps",
        "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "tf32",
        "gradient_checkpointing", "gradient_checkpointing_kwargs",
    }  # fmt: skip
    assert name in handed_on or re.search(rf"args\.{name}\b|self\.{name}\b|\"{name}\"", ours), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fp16", True),
        ("torch_compile", True),
        ("push_to_hub", True),
        ("ignore_data_skip", True),
        ("label_names", ["x"]),
        ("bf16_full_eval", True),
        ("skip_memory_metrics", False),
        ("train_sampling_strategy", "batch_rebalance"),
    ],
)
def test_what_is_refused_is_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        trainer(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("trust_remote_code", True), ("activation_offloading", True), ("loss_type", "huber"), ("packing_strategy", "x"),
     ("truncation_mode", "middle"), ("on_bad_row", "ignore"), ("token_budget", 0), ("dataset_kwargs", {"a": 1}),
     ("learning_rate", "abc"), ("num_train_epochs", "x"),
     ("per_device_train_batch_size", 0), ("gradient_accumulation_steps", 0),
     ("learning_rate", -1), ("learning_rate", None), ("learning_rate", [1]), ("learning_rate", float("nan")),
     ("learning_rate", True), ("max_steps", 2.5), ("num_train_epochs", 0), ("num_train_epochs", -1),
     ("per_device_train_batch_size", 1.5), ("gradient_accumulation_steps", 1.5), ("weight_decay", -1),
     ("weight_decay", None), ("max_grad_norm", -1), ("adam_beta1", 2), ("neftune_noise_alpha", -5),
     ("neftune_noise_alpha", "abc"), ("seed", None), ("seed", 1.5), ("seed", -1), ("token_budget", 1.5),
     ("disable_tqdm", "abc"), ("packing", "maybe"), ("packing", 2), ("include_num_input_tokens_seen", "foo"),
     ("gradient_checkpointing_kwargs", 5), ("logging_steps", -1), ("logging_steps", 0), ("save_steps", 0),
     ("eval_steps", -1), ("output_dir", 5), ("output_dir", ["a"]), ("output_dir", ""), ("deepspeed", "x.json"),
     ("lr_scheduler_kwargs", 5), ("log_level", "foo"), ("accelerator_config", 5), ("label_smoothing_factor", 1.5),
     ("max_length", 0), ("dataset_text_field", 3)],
)  # fmt: skip
def test_our_own_fields_are_checked(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        SFTConfig(**{"output_dir": str(tmp_path), name: value})


@pytest.mark.parametrize(("word", "value"), [("no", False), ("off", False), ("Yes", True), ("true", True), (1, True)])
@pytest.mark.parametrize("name", ["packing", "bf16", "shuffle_dataset", "full_determinism", "dataloader_drop_last"])
def test_words_for_true_and_false(tmp_path: Path, name: str, word: object, value: bool) -> None:
    assert getattr(SFTConfig(str(tmp_path), **{name: word, "max_length": 8}), name) is value


def test_an_output_folder_may_be_a_path_or_left_out(tmp_path: Path) -> None:
    assert SFTConfig(tmp_path).output_dir == str(tmp_path)
    assert SFTConfig().output_dir == SFTConfig(output_dir=None).output_dir == "trainer_output"


@pytest.mark.parametrize("name", ["report_to", "lr_scheduler_kwargs", "optim_args"])
def test_what_only_shows_later_is_named_too(tmp_path: Path, name: str) -> None:
    value = {"report_to": "nothing-known", "lr_scheduler_kwargs": {"foo": 1}, "optim_args": "foo"}[name]
    with pytest.raises(ConfigError, match=name):
        trainer(tmp_path, **{name: value}).train()


@pytest.mark.parametrize("wrong", [{"lora_dropout": -1.0}, {"modules_to_save": ["nope"]}])
def test_what_peft_passes_over(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"peft_config: {next(iter(wrong))}"):
        trainer(tmp_path, peft_config=LoraConfig(**{"target_modules": "all-linear", **wrong}))


def test_a_harmless_field_is_mentioned_once_it_is_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        check_arguments(SFTConfig(str(tmp_path), dataloader_num_workers=4))
    assert "dataloader_num_workers is not needed: batches are laid out in the training process" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="posttrain"):
        check_arguments(SFTConfig(str(tmp_path)))
    assert caplog.text == ""


@pytest.mark.parametrize("name", ["data_collator", "compute_loss_func", "quantization_config"])
def test_arguments_that_cannot_be_honoured_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        trainer(tmp_path, **{name: object()})


@pytest.mark.parametrize("wrong", [{"target_modules": ["nope"]}, {"r": 0}])
def test_an_adapter_that_does_not_fit_is_explained(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="peft_config: "):
        trainer(tmp_path, peft_config=LoraConfig(**{"target_modules": "all-linear", **wrong}))


def test_unknown_arguments_are_type_errors(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="SFTTrainer has no argument 'no_such_thing'"):
        trainer(tmp_path, no_such_thing=1)
    with pytest.raises(ConfigError, match="SFTTrainer has no argument 'peft_confg'\n  = did you mean 'peft_config'"):
        trainer(tmp_path, peft_confg=None)
    with pytest.raises(TypeError, match="SFTConfig has no argument 'learning_rat'\n  = did you mean 'learning_rate'"):
        SFTConfig(str(tmp_path), learning_rat=1e-3)


def test_older_spellings_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="posttrain"):
        config = SFTConfig(str(tmp_path), max_seq_length=77, evaluation_strategy="no", no_cuda=True, warmup_ratio=0.1,
                           group_by_length=True, overwrite_output_dir=True, max_steps=None)  # fmt: skip
    assert (config.max_length, config.use_cpu, config.warmup_steps, config.max_steps) == (77, True, 0.1, -1)
    assert config.train_sampling_strategy == "group_by_length"
    assert "read max_seq_length as max_length=77" in caplog.text
    with pytest.raises(ConfigError, match="save_safetensors"):
        SFTConfig(str(tmp_path), save_safetensors=False)


def test_arguments_that_moved_into_the_config(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    built = SFTTrainer(
        model=tiny_model(vocabulary=len(tokenizer)),
        tokenizer=tokenizer,
        args=TrainingArguments(str(tmp_path), use_cpu=True, num_train_epochs=2, report_to="none"),
        train_dataset=[{"body": "number one two"}],
        dataset_text_field="body",
        max_seq_length=5,
        dataset_num_proc=2,
    )
    assert (built.args.max_length, built.args.dataset_text_field, built.args.num_train_epochs) == (5, "body", 2)
    assert built.args.bf16 is False  # a plain TrainingArguments means what it says
    assert built.tokenizer is built.processing_class is tokenizer
    assert len(built.run.train_samples[0][0].branches[0].ids) == 5


@pytest.mark.parametrize("name", sorted(NEVER_CALLED))
def test_hooks_the_loop_would_never_call_are_refused(name: str) -> None:
    assert hasattr(Trainer, name) or name == "_prepare_dataset"  # TRL's own
    with pytest.raises(ConfigError, match=rf"{name} would never be called"):
        type("Mine", (SFTTrainer,), {name: lambda self: None, "__module__": "users"})


def test_evaluating_needs_something_to_evaluate(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eval_strategy='steps' needs an eval_dataset"):
        trainer(tmp_path, eval_strategy="steps", eval_steps=1)


def test_skip_prepare_dataset_takes_tokens_as_they_are(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    args = SFTConfig(str(tmp_path), max_length=2, dataset_kwargs={"skip_prepare_dataset": True})
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}]
    built = SFTTrainer(tiny_model(vocabulary=len(tokenizer)), args, train_dataset=rows, processing_class=tokenizer)
    assert built.run.train_samples[0][0].branches[0].ids.tolist() == [5, 6, 7, 8]
    with pytest.raises(ConfigError, match="skip_prepare_dataset"):
        SFTTrainer(tiny_model(vocabulary=len(tokenizer)), args, train_dataset=[{"text": "a"}],
                   processing_class=tokenizer)  # fmt: skip


def test_unlike_transformers_trainer_says_so() -> None:
    with pytest.raises(AttributeError, match="posttrain"):
        SFTTrainer.__new__(SFTTrainer).hyperparameter_search  # noqa: B018


def test_what_the_trainer_cannot_be_made_of(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    rows, args = [{"text": "a"}], SFTConfig(str(tmp_path), bf16=False)
    for wrong, given in {
        "model must be": {"model": None},
        "args must be an SFTConfig": {"args": {"max_steps": 1}},
        "processing_class is needed": {"processing_class": None},
        "and the model embeddings for 20 tokens only": {"model": tiny_model("llama", 20)},
    }.items():
        usual = {"model": tiny_model("llama", len(tokenizer)), "args": args, "processing_class": tokenizer}
        with pytest.raises(ConfigError, match=wrong):
            SFTTrainer(**{**usual, "train_dataset": rows, **given})
