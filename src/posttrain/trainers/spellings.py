"""Yesterday's spellings, read as today's, with a line that says so.

Scripts in everybody's notebooks write `tokenizer=`, `max_seq_length=` or `evaluation_strategy=`; none of them runs on
today's transformers. Here they do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.errors import ConfigError

logger = logging.getLogger("posttrain")

Rewrite = Callable[[Any], dict[str, Any]]


def renamed(new: str) -> Rewrite:
    return lambda value: {new: value}


def refused(name: str, instead: str) -> Rewrite:
    """Set to anything at all, it is refused."""

    def rewrite(value: Any) -> dict[str, Any]:
        if value is not None:
            raise ConfigError(f"{name}={value!r} is not honoured: {instead}")
        return {}

    return rewrite


def _gone(_: Any) -> dict[str, Any]:
    return {}


def _warmup_ratio(value: Any) -> dict[str, Any]:
    return {"warmup_steps": value} if value else {}  # a fraction below 1 is a ratio in today's transformers


def _group_by_length(value: Any) -> dict[str, Any]:
    return {"train_sampling_strategy": "group_by_length"} if value else {}


def _safetensors(value: Any) -> dict[str, Any]:
    if value is False:
        raise ConfigError("save_safetensors=False is not honoured: weights are written as safetensors only")
    return {}


CONFIG_SPELLINGS: dict[str, Rewrite] = {
    "max_seq_length": renamed("max_length"),
    "evaluation_strategy": renamed("eval_strategy"),
    "no_cuda": renamed("use_cpu"),
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "warmup_ratio": _warmup_ratio,
    "group_by_length": _group_by_length,
    "save_safetensors": _safetensors,
    "overwrite_output_dir": _gone,
    "logging_dir": _gone,
    "dataset_batch_size": _gone,
    "num_of_sequences": _gone,
    "chars_per_token": _gone,
    "use_mps_device": _gone,
    "use_liger_loss": _gone,  # logits are never made whole
    "unsloth_num_chunks": _gone,
    "unsloth_logit_chunk_multiplier": _gone,
    "unsloth_grpo_mini_batch": _gone,
}

# Arguments that trainers once took and that belong to the config today.
TRAINER_TO_CONFIG = {
    "max_seq_length": "max_length",
    "dataset_text_field": "dataset_text_field",
    "dataset_num_proc": "dataset_num_proc",
    "dataset_kwargs": "dataset_kwargs",
    "packing": "packing",
    "eval_packing": "eval_packing",
    "model_init_kwargs": "model_init_kwargs",
    "neftune_noise_alpha": "neftune_noise_alpha",
    "beta": "beta",
    "label_smoothing": "label_smoothing",
    "loss_type": "loss_type",
    "max_length": "max_length",
    "max_prompt_length": "max_prompt_length",
    "precompute_ref_log_probs": "precompute_ref_log_probs",
    "ref_adapter_name": "ref_adapter_name",
}
TRAINER_GONE = ("dataset_batch_size", "num_of_sequences", "chars_per_token", "infinite")


def modern_config(given: dict[str, Any], own: Mapping[str, Rewrite]) -> dict[str, Any]:
    """Keyword arguments of a config, old spellings replaced, its `own` too. None for `max_steps` means that it is not
    set; `warmup_steps` comes before `warmup_ratio` unless it is 0, as in transformers. Raises ConfigError for two
    spellings that contradict each other."""
    if given.get("warmup_ratio") is not None and "warmup_steps" in given:
        given = {k: v for k, v in given.items() if k != ("warmup_ratio" if given["warmup_steps"] else "warmup_steps")}
    known, modern = {**CONFIG_SPELLINGS, **own}, dict[str, Any]()
    given = _without_unsaid(given, known)
    for name, value in given.items():
        if name in known:
            rewritten = known[name](value)
            say_read_as(name, rewritten)
            for new, meant in rewritten.items():
                other = given.get(new, modern.get(new, meant))
                if other != meant:
                    raise ConfigError(f"{name}={value!r} means {new}={meant!r}, and {new}={other!r} contradicts it",
                                      hint="give one of them")  # fmt: skip
            modern |= rewritten
        elif name in ("max_steps", "num_train_epochs") and value is None:
            continue
        else:
            modern[name] = value
    return modern


def _without_unsaid(given: dict[str, Any], known: Mapping[str, Rewrite]) -> dict[str, Any]:
    """Both spellings of a setting stand in what older versions have written out, one of them at its default, which
    says nothing: the old at None (`no_cuda`: False), or the new at None where that has no meaning of its own."""
    rest = dict(given)
    for old in known.keys() & given.keys():
        value = given[old]
        if value is None or (old, value) == ("no_cuda", False):
            if old != "max_seq_length" or "max_length" in given:
                rest.pop(old)
            continue
        for new in known[old](value):
            if new != "max_length" and new in rest and rest[new] is None:
                rest.pop(new)
    return rest


def say_read_as(old: str, rewritten: dict[str, Any]) -> None:
    if rewritten:
        logger.warning("read %s as %s", old, ", ".join(f"{name}={value!r}" for name, value in rewritten.items()))
    else:
        logger.info("%s is not needed any more", old)
