"""The folder of an adapter, opened with the model that it belongs to. Whatever is wrong with the folder is named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedTokenizerBase

from posttrain.errors import ConfigError
from posttrain.models.load import load_model, load_tokenizer
from posttrain.shortage import is_out_of_memory

COPY = "copy the adapter's folder again, whole, or train it again"


def open_adapter(
    folder: str, dtype: str, options: dict[str, Any] | None = None, *, trainable: bool = False
) -> PeftModel:
    """The model with the adapter in `folder`. `options` are those of the model. Raises ConfigError."""
    base = base_of(folder)
    _check_weights(Path(folder))
    model = load_model(base, options, dtype=dtype)
    try:
        with warnings.catch_warnings():  # the rest of the adapter would begin anew
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, folder, is_trainable=trainable)
    except Exception as error:  # PEFT checks nothing: what it stumbles over may raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"the adapter in {folder} cannot be put on {base}: {_said(error)}",
                          hint=f"is that the model it was trained on ({CONFIG_NAME}: base_model_name_or_path)? If so, "
                               f"{COPY}") from error  # fmt: skip


def config_of(folder: str) -> PeftConfig:
    """Raises ConfigError."""
    try:
        return PeftConfig.from_pretrained(folder)
    except Exception as error:  # as above
        path = Path(folder) / CONFIG_NAME
        raise ConfigError(f"{path} is no configuration of an adapter: {_said(error)}", hint=COPY) from error


def tokenizer_of(folder: str, options: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The one beside the adapter, or that of its model, whose `options` say where it lies. Raises ConfigError."""
    try:
        return load_tokenizer(folder)
    except ConfigError:  # an adapter that was saved without
        return load_tokenizer(base_of(folder), options)


def base_of(folder: str) -> str:
    """The name of the model that it belongs to. Raises ConfigError."""
    path = Path(folder) / CONFIG_NAME
    base = config_of(folder).base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise ConfigError(f"{path} does not say which model the adapter belongs to",
                          hint="name it there: base_model_name_or_path")  # fmt: skip
    return base


def _check_weights(folder: Path) -> None:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        if not (folder / WEIGHTS_NAME).is_file():
            raise ConfigError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}: an adapter without its weights", hint=COPY)
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read: {_said(error)}", hint=COPY) from error


def _said(error: Exception) -> str:
    """Its words in one line: torch's first one says nothing."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
