"""Settings and arguments of the preference trainers: all of TRL's names, each honoured, accepted for a reason, or
refused by name; none read by nobody."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments

import posttrain
from posttrain import ConfigError
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

trl = pytest.importorskip("trl")
SOURCE = Path(posttrain.__file__).parent
THEIRS = {"DPO": "trl", "KTO": "trl", "Reward": "trl", "ORPO": "trl.experimental.orpo"}
OF_TRANSFORMERS = {field.name for field in dataclasses.fields(TrainingArguments)}
ACCEPTED = {  # nothing that they could change exists here
    "precompute_ref_batch_size", "padding_value", "padding_free", "pad_to_multiple_of", "dataset_num_proc",
}  # fmt: skip
REFUSED: dict[str, Any] = {
    "ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 3, "activation_offloading": True,
    "trust_remote_code": True, "generate_during_eval": True, "max_completion_length": 5, "is_encoder_decoder": True,
}  # fmt: skip
"""With a value that is refused."""


def config_class(method: str) -> Any:
    return getattr(posttrain, f"{method}Config")


def fields(kind: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(kind) if field.init}


@pytest.mark.parametrize("method", THEIRS)
def test_every_field_of_theirs_is_known(method: str) -> None:
    theirs = getattr(importlib.import_module(THEIRS[method]), f"{method}Config")
    assert not fields(theirs) - fields(config_class(method))


@pytest.mark.parametrize("method", THEIRS)
def test_every_argument_of_their_trainer_is_known(method: str) -> None:
    theirs = getattr(importlib.import_module(THEIRS[method]), f"{method}Trainer")
    ours = getattr(posttrain, f"{method}Trainer")
    known = inspect.signature(ours.__init__).parameters
    for position, name in enumerate(inspect.signature(theirs.__init__).parameters):
        assert name in known, name
        assert list(known).index(name) == position, f"{name} is given by position in scripts"


@pytest.mark.parametrize("method", THEIRS)
def test_every_field_is_read_refused_or_accepted_for_a_reason(method: str) -> None:
    tables = ("arguments.py", "spellings.py")
    ours = "".join(path.read_text() for path in SOURCE.rglob("*.py") if path.name not in tables)
    for name in fields(config_class(method)) - OF_TRANSFORMERS - ACCEPTED - set(REFUSED):
        assert re.search(rf"args\.{name}\b|self\.{name}\b|\"{name}\"", ours), name


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("method", THEIRS)
def test_what_is_refused_is_named(method: str, name: str, tmp_path: Path) -> None:
    if name not in fields(config_class(method)):
        pytest.skip("not a setting of this method")
    with pytest.raises(ConfigError, match=name):
        config_class(method)(str(tmp_path), **{name: REFUSED[name]})


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [("DPO", "label_smoothing_factor", 0.1), ("DPO", "discopop_tau", 0.2), ("DPO", "simpo_gamma", 1.0),
     ("DPO", "f_alpha_divergence_coef", 0.9), ("DPO", "loss_type", "sigmoids"), ("DPO", "loss_weights", [1.0, 2.0]),
     ("DPO", "beta", 0), ("DPO", "beta", "much"), ("DPO", "ld_alpha", 2.0), ("DPO", "f_divergence_type", "kl"),
     ("DPO", "truncation_mode", "middle"), ("DPO", "label_smoothing", 0.1), ("KTO", "beta", -0.1),
     ("KTO", "loss_type", "sigmoid"), ("KTO", "undesirable_weight", -1), ("ORPO", "beta", 0),
     ("ORPO", "label_smoothing_factor", 0.1), ("Reward", "center_rewards_coefficient", -1),
     ("Reward", "truncation_mode", "keep_start"), ("Reward", "label_smoothing_factor", 0.1)],
)  # fmt: skip
def test_values_that_mean_nothing(method: str, name: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        config_class(method)(str(tmp_path), **{name: value})


def test_what_is_heeded_beside_the_right_loss(tmp_path: Path) -> None:
    for options in ({"loss_type": "discopop", "discopop_tau": 0.2}, {"loss_type": ["simpo"], "simpo_gamma": 1.0},
                    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.9}):  # fmt: skip
        posttrain.DPOConfig(str(tmp_path), **options)


ROWS = [{"prompt": f"number {i}", "chosen": f" {i}", "rejected": " none", "label": True} for i in range(4)]
RATED = [{"prompt": f"number {i}", "completion": f" {i}", "label": i % 2 == 0} for i in range(4)]


def trainer(method: str, folder: Path, **options: Any) -> Any:
    tokenizer = options.pop("words", None) or chatml_tokenizer()
    args = options.pop("args", None) or config_class(method)(str(folder), bf16=False, report_to="none")
    kind = getattr(posttrain, f"{method}Trainer")
    given = {"train_dataset": RATED if method == "KTO" else ROWS, "processing_class": tokenizer}
    return kind(tiny_model(vocabulary=len(tokenizer)), args=args, **{**given, **options})


@pytest.mark.parametrize("method", THEIRS)
def test_older_spellings(method: str, tmp_path: Path) -> None:
    """`tokenizer=`, a plain TrainingArguments, settings given to the trainer, as in notebooks of some age."""
    words = chatml_tokenizer()
    plain = TrainingArguments(str(tmp_path), report_to="none", use_cpu=True)
    made = trainer(method, tmp_path, args=plain, processing_class=None, tokenizer=words, max_length=64)
    assert made.args.max_length == 64
    assert made.processing_class is words
    assert isinstance(made.args, config_class(method))
    if method != "Reward":
        assert trainer(method, tmp_path, beta=0.3).args.beta == 0.3


@pytest.mark.parametrize("name", ["data_collator", "compute_metrics"])
@pytest.mark.parametrize("method", THEIRS)
def test_hooks_that_would_never_be_called(method: str, name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        trainer(method, tmp_path, **{name: lambda *_: None})


@pytest.mark.parametrize("method", THEIRS)
def test_another_methods_rows_are_refused_by_name(method: str, tmp_path: Path) -> None:
    other = [{"prompt": "a", "completion": "b"}] if method == "KTO" else RATED
    with pytest.raises(posttrain.DataError, match=r"E-DATA|KTO|no known format|columns"):
        trainer(method, tmp_path, words=chatml_tokenizer(), train_dataset=other)
