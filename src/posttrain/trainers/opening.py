"""What a trainer is given, made ready: settings of any age, a model and its tokenizer."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, TypeVar

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import align_special_tokens

from posttrain.errors import ConfigError, UnknownArgumentError
from posttrain.models import adapters
from posttrain.models.adapter_folder import config_of, open_adapter, tokenizer_of
from posttrain.models.load import FILLER, is_adapter, load_model, load_tokenizer, set_eos_token, set_pad_token
from posttrain.trainers.config import PackedConfig
from posttrain.trainers.spellings import TRAINER_GONE, TRAINER_TO_CONFIG, Rewrite, renamed, say_read_as
from posttrain.trainers.templates import take_template

logger = logging.getLogger("posttrain")
Config = TypeVar("Config", bound=PackedConfig)
TRAINER_ARGUMENTS = (
    "model", "args", "train_dataset", "eval_dataset", "processing_class", "tokenizer", "peft_config", "callbacks",
    "optimizers", "optimizer_cls_and_kwargs", "formatting_func", "compute_metrics", "reward_funcs", "reward_model",
    "reward_processing_classes", "ref_model", "value_model", "rollout_func",
)  # fmt: skip
"""What a misspelt one may have meant."""


def read_config(
    kind: type[Config], model: Any, args: TrainingArguments | None, older: dict[str, Any], trainer: str
) -> Config:
    """`args` as a `kind`, with what was once given to the trainer itself."""
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise ConfigError(f"model must be a transformers or PEFT model, or the name of one, got {type(model).__name__}")
    moved = _moved(kind, older)
    if older:
        _refuse_unknown(kind, next(iter(older)), trainer)
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        args = kind(f"{name.rstrip('/').split('/')[-1]}-{trainer.removesuffix('Trainer')}")
    if not isinstance(args, TrainingArguments):
        article = "an" if kind.__name__.startswith("S") else "a"
        raise ConfigError(f"args must be {article} {kind.__name__} or a TrainingArguments, got {type(args).__name__}")
    if not isinstance(args, kind):
        known = {f.name for f in dataclasses.fields(kind) if f.init}
        fields = [f for f in dataclasses.fields(args) if f.init]
        for field in fields:
            if field.name not in known and getattr(args, field.name) != field.default:
                raise ConfigError(f"args.{field.name} of {type(args).__name__} is no setting of {kind.__name__}")
        given = {f.name: getattr(args, f.name) for f in fields if f.name in known}
        if given["train_sampling_strategy"] == TrainingArguments.train_sampling_strategy:  # KTO has another default
            del given["train_sampling_strategy"]
        args = kind(**given)
    return dataclasses.replace(args, **moved) if moved else args


def _moved(kind: type[PackedConfig], older: dict[str, Any]) -> dict[str, Any]:
    """What of `older` a `kind` takes today, under the names it has there; what is read leaves `older`."""
    moved: dict[str, Any] = {}
    for name in list(older):
        if name in TRAINER_GONE:
            older.pop(name)
            say_read_as(name, {})
        elif TRAINER_TO_CONFIG.get(name) in _settings(kind):
            setting, value = TRAINER_TO_CONFIG[name], older.pop(name)
            rewrite = _spellings(kind).get(setting, renamed(setting))
            today = rewrite(value)
            say_read_as(name, {f"args.{key}": one for key, one in today.items()})
            moved |= today
    return moved


def _spellings(kind: type[PackedConfig]) -> dict[str, Rewrite]:
    return dict(getattr(kind, "SPELLINGS", {}))


def _settings(kind: type[PackedConfig]) -> set[str]:
    """Keyword arguments that a `kind` takes, older spellings of its own included."""
    return {field.name for field in dataclasses.fields(kind) if field.init} | _spellings(kind).keys()


def _refuse_unknown(kind: type[PackedConfig], name: str, trainer: str) -> None:
    settings = _settings(kind)
    if name in settings:
        raise UnknownArgumentError(trainer, name, [], hint=f"it is a setting: args={kind.__name__}({name}=...)")
    known = [*TRAINER_ARGUMENTS, *(old for old, setting in TRAINER_TO_CONFIG.items() if setting in settings)]
    raise UnknownArgumentError(trainer, name, known)


def refuse(**given: Any) -> None:
    instead = {
        "data_collator": "batches are packed; put the labels into the dataset (input_ids, labels)",
        "compute_loss_func": "write an objective (posttrain.objectives)",
        "model_init": "give the model",
        "preprocess_logits_for_metrics": "logits are never made",
        "compute_metrics": "it wants logits, which are never made; see the metrics under rewards/ and logps/",
    }
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} is not honoured: {instead[name]}")


def open_model(
    model: Any, tokenizer: Any, args: PackedConfig, peft_config: Any, quantization_config: Any
) -> tuple[Any, PreTrainedTokenizerBase]:
    if quantization_config is not None:
        raise ConfigError("quantization_config is not honoured yet: QLoRA is not built")
    if isinstance(model, str) and is_adapter(model):  # training goes on with it
        name, options = model, as_dict(args.model_init_kwargs)
        model = open_adapter(name, dtype_to_load(args, config_of(name)), options, trainable=True)
        tokenizer = tokenizer or tokenizer_of(name, options)
    elif isinstance(model, str):
        name, options = model, as_dict(args.model_init_kwargs)
        model = load_model(name, options, dtype=dtype_to_load(args, peft_config))
        tokenizer = tokenizer or load_tokenizer(name, options)
    elif args.model_init_kwargs is not None:
        raise ConfigError("model_init_kwargs is not honoured: the model is loaded already")
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if base.get_output_embeddings() is None or not hasattr(base, "generation_config"):
        raise ConfigError(f"{type(base).__name__} is no causal language model: it has no head that says the next token",
                          hint="AutoModelForCausalLM loads one")  # fmt: skip
    if tokenizer is None and not model.config._name_or_path:
        raise ConfigError("processing_class is needed: the model does not say where its tokenizer lies",
                          hint="pass the tokenizer as processing_class")  # fmt: skip
    tokenizer = tokenizer or load_tokenizer(model.config._name_or_path)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ConfigError(
            f"processing_class must be a tokenizer, got {type(tokenizer).__name__}; images are not supported"
        )
    if getattr(args, "eos_token", None) is not None:
        set_eos_token(model, tokenizer, args.eos_token)
    added = take_template(model, tokenizer, args.chat_template_path) if args.chat_template_path else []
    said = [token for token in tokenizer.convert_ids_to_tokens(added) if not token.startswith(FILLER)]
    if said and peft_config is None and isinstance(model, PeftModel):
        raise ConfigError(f"chat_template_path={args.chat_template_path!r} adds {len(said)} tokens, which the adapter "
                          "would leave as random as they are",
                          hint="merge the adapter first (model.merge_and_unload()), then give peft_config")  # fmt: skip
    if peft_config is not None:
        if added:
            _train_added_tokens(peft_config, added)
        model = adapters.add_adapter(model, peft_config)
    set_pad_token(model, tokenizer, args.pad_token)
    align_special_tokens(model, tokenizer)  # what ends a turn in training ends it in generation
    return model, tokenizer


def dtype_to_load(args: PackedConfig, peft_config: Any) -> str:
    """fp32 where all of it is trained. Frozen weights in the dtype they are computed in, so that no second copy lies
    beside them; as they are on disk where some of them are trained after all."""
    if peft_config is None:
        return "float32"
    trains_more = getattr(peft_config, "modules_to_save", None) or getattr(peft_config, "trainable_token_indices", None)
    return "bfloat16" if args.bf16 and not trains_more else "auto"


def turn_dropout_off(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def as_dict(given: dict[str, Any] | str | None) -> dict[str, Any]:
    return dict(given) if isinstance(given, dict) else {}  # transformers has parsed a string into a dict by now


def _train_added_tokens(peft_config: Any, added: list[int]) -> None:
    """New tokens have random embeddings: train those rows, and the head that must learn to say them."""
    indices = peft_config.trainable_token_indices or {}
    indices.setdefault("embed_tokens", []).extend(added)
    peft_config.trainable_token_indices = indices
    kept = list(peft_config.modules_to_save or [])
    if "lm_head" not in kept:
        logger.warning("the chat template added tokens; lm_head is trained whole so that the model can say them")
        peft_config.modules_to_save = [*kept, "lm_head"]
