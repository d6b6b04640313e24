"""The configuration of a run: its sections, their keys and defaults, and what becomes of each key.

Sections and keys are those of existing `training-config.json` files. A key that is unknown is refused with a
suggestion, one that is known but not built yet is refused by name; nothing is read by nobody. `training` takes every
field of `SFTConfig` beside its own keys.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from posttrain.errors import ConfigError
from posttrain.runner.documents import parse_value, read_document
from posttrain.runner.methods import METHODS, ONLINE

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(_Section):
    """What is trained."""

    name: str = Field(description="A folder, a hub id, or smollm2-135m-instruct.")
    max_seq_length: int | None = Field(1024, description="Longest sequence in tokens; null for no limit.")
    dtype: Literal["auto", "float32", "bfloat16"] | None = Field(None, description="Dtype to load weights in.")
    load_in_4bit: bool = Field(False, description="Not built yet: only false.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub.")
    local_only: bool = Field(False, description="Never ask the hub.")


class LoraSection(_Section):
    """The adapter; `enabled: false` trains the whole model."""

    enabled: bool = True
    r: int = 16
    lora_alpha: float = 16
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = Field(default_factory=lambda: list(ALL_LINEARS))
    bias: Literal["none", "all", "lora_only"] = "none"
    use_gradient_checkpointing: bool | Literal["unsloth"] = Field(False, description="'unsloth' means true.")
    random_state: int | None = Field(None, description="Seed of the adapter's first values; default: training.seed.")
    use_rslora: bool = False
    use_dora: bool = False
    modules_to_save: list[str] | None = None
    finetune_vision_layers: bool = Field(False, description="Not built: only false.")
    finetune_language_layers: bool = Field(True, description="Only true.")
    finetune_attention_modules: bool = Field(True, description="false leaves q, k, v and o projections out.")
    finetune_mlp_modules: bool = Field(True, description="false leaves gate, up and down projections out.")


class MixedSource(_Section):
    """One of several data sets."""

    path: str
    weight: float = Field(1.0, gt=0, description="How likely the next row is from here, beside the other weights.")


class DatasetSection(_Section):
    """What it is trained on."""

    path: str | None = Field(
        None, description="JSONL, JSON, CSV, Parquet or text file, a folder of them, or owner/name on the hub."
    )
    mixture: list[MixedSource] | None = Field(None, description="Several of those, instead of `path`.")
    mix_until: Literal["all", "first"] = Field("all", description="A mixture ends with the last or the first to end.")
    streaming: bool = Field(False, description="Read as training goes, for what does not fit in memory.")
    cache: bool = Field(True, description="Keep tokens of files in ~/.cache/posttrain (or $POSTTRAIN_CACHE).")
    val_path: str | None = Field(None, description="Held-out data of the same kind.")
    format: str = Field("auto", description="auto, or the name of a format.")
    text_field: str = "text"
    columns: dict[str, str] | None = Field(
        None, description="Columns to rename, old to new, e.g. {question: prompt, answer: completion}."
    )
    chat_template: str | None = Field(
        None, description="auto, a name (chatml, ...), a .jinja file, or a tokenizer whose template to take."
    )
    train_on: Literal["assistant", "all"] = Field(
        "assistant", description="assistant: completions and assistant turns; all: every token."
    )
    on_bad_row: Literal["error", "skip"] = "error"
    num_proc: int | None = Field(None, description="Accepted; tokenization runs in the tokenizer's own threads.")


class RewardSection(_Section):
    """One of the rewards of GRPO, RLOO and PPO."""

    function: str = Field(description="file.py[:function], package.module:function, a library's name or a model.")
    weight: float = Field(1.0, description="Beside the other rewards' weights.")


class SaveSection(_Section):
    """What is left behind."""

    lora_path: str = Field("models/checkpoints/lora", description="Where the adapter (or the full model) goes.")
    merged_path: str | None = Field(None, description="Not built yet: only null.")
    gguf_path: str | None = Field(None, description="Not built yet: only null.")
    gguf_quantization: str = Field(
        "Q8_0",
        pattern=r"(?i)^(f32|f16|bf16|q8_0|q[2-6]_k(_[sml])?|q[45]_[01]|iq\d_\w+)$",
        description="With gguf_path.",
    )


class RunConfig(_Section):
    """A whole configuration file."""

    schema_version: Literal[1] = 1
    method: str = Field("sft", description=f"One of {', '.join(METHODS)}.")
    model: ModelSection
    dataset: DatasetSection
    lora: LoraSection = LoraSection()
    rewards: list[RewardSection] | None = Field(None, description="What completions are worth (grpo, rloo, ppo).")
    training: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the method's config (SFTConfig, ...)."
    )
    save: SaveSection = SaveSection()


# Known keys whose other values would be lies today.
NOT_BUILT = (
    ("model", "load_in_4bit", False, "QLoRA is not built yet"),
    ("lora", "finetune_vision_layers", False, "models with images are not built yet"),
    ("lora", "finetune_language_layers", True, "there is nothing else to train"),
    ("save", "merged_path", None, "merging is not built yet; peft's merge_and_unload does it"),
    ("save", "gguf_path", None, "GGUF export is not built yet"),
)


def load_config(path: Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read, override (`section.key=value`) and check. Raises ConfigError naming the key and the way out."""
    document = read_document(path)
    for override in overrides:
        _override(document, override)
    try:
        config = RunConfig.model_validate(document)
    except ValidationError as error:
        raise _explained(error, path) from None
    if config.method not in METHODS:
        near = difflib.get_close_matches(config.method, METHODS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(METHODS)}"
        raise ConfigError(f"{path}: method is {config.method!r}", hint=hint)
    if (config.dataset.path is None) == (config.dataset.mixture is None):
        both = "is missing" if config.dataset.path is None else "and dataset.mixture are both given"
        raise ConfigError(f"{path}: dataset.path {both}", hint="give one of dataset.path and dataset.mixture")
    if (config.method in ONLINE) != bool(config.rewards):
        if config.rewards:
            raise ConfigError(f"{path}: rewards is not honoured with method {config.method}", hint="leave it out")
        raise ConfigError(f"{path}: rewards is missing: what is a completion worth?",
                          hint="rewards: [{function: rewards.py}]")  # fmt: skip
    for section, key, built, why in NOT_BUILT:
        value = getattr(getattr(config, section), key)
        if value != built:
            raise ConfigError(f"{path}: {section}.{key}={value!r} is not honoured: {why}", hint=f"set it to {built}")
    return config


def _override(document: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"--set {override!r} is not of the form section.key=value")
    *sections, key = name.strip().split(".")
    target = document
    for section in sections:
        target = target.setdefault(section, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
    target[key] = parse_value(text)


def _explained(error: ValidationError, path: Path) -> ConfigError:
    first = error.errors()[0]
    where = [str(part) for part in first["loc"]]
    name = ".".join(where)
    if first["type"] == "extra_forbidden":
        return unknown_key(str(path), name, _known_keys(where[:-1]))
    if first["type"] == "missing":
        is_section = len(where) == 1
        hint = f"add the section `{name}:` with its keys" if is_section else f"add it, or --set {name}=..."
        return ConfigError(f"{path}: {name} is missing", hint=hint)
    if first["type"] in ("model_type", "model_attributes_type"):
        what = f"is {first['input']!r}, not a section"
        return ConfigError(f"{path}: {name} {what}", hint=f"keys: {', '.join(_known_keys(where))}")
    return ConfigError(f"{path}: {name} is {first['input']!r}: {first['msg'].lower()}")


def unknown_key(source: str, name: str, known: Iterable[str]) -> ConfigError:
    """A refusal that suggests what was meant."""
    *sections, key = name.split(".")
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    hint = f"did you mean {'.'.join([*sections, near[0]])}?" if near else f"known: {', '.join(sorted(known))}"
    return ConfigError(f"{source}: {name} is not a known key", hint=hint)


def _known_keys(sections: list[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for section in sections:
        if section.isdigit():  # an entry of a list of sections
            continue
        annotation = model.model_fields[section].annotation
        lists: dict[str, type[BaseModel]] = {"mixture": MixedSource, "rewards": RewardSection}
        annotation = lists.get(section, annotation)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
