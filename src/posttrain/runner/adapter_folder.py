"""The folder of an adapter, opened with the model that it belongs to. Whatever is wrong with the folder is named."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

from posttrain.errors import ConfigError
from posttrain.models.load import load_model
from posttrain.shortage import is_out_of_memory

COPY = "copy the adapter's folder again, whole, or train it again"


def is_adapter(folder: str) -> bool:
    return (Path(folder) / CONFIG_NAME).is_file()


def open_adapter(folder: str, dtype: str) -> tuple[PeftModel, str]:
    """The model with the adapter in `folder`, and the model's name. Raises ConfigError."""
    base = _base_of(folder)
    _check_weights(Path(folder))
    model = load_model(base, dtype=dtype)
    try:
        return PeftModel.from_pretrained(model, folder), base
    except Exception as error:  # PEFT checks nothing: what it stumbles over may raise anything
        if is_out_of_memory(error):
            raise
        raise ConfigError(f"the adapter in {folder} cannot be put on {base}: {_said(error)}",
                          hint=f"is that the model it was trained on ({CONFIG_NAME}: base_model_name_or_path)? If so, "
                               f"{COPY}") from error  # fmt: skip


def _base_of(folder: str) -> str:
    path = Path(folder) / CONFIG_NAME
    try:
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
    except Exception as error:  # as above
        raise ConfigError(f"{path} is no configuration of an adapter: {_said(error)}", hint=COPY) from error
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
