"""Models and tokenizers by name, from the hub's formats on disk or in the user's cache."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants
from safetensors import SafetensorError
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from posttrain.errors import ConfigError
from posttrain.hub import OFFLINE, answer, first_line, is_an_answer, without_retries_told
from posttrain.models.packaged import resolve
from posttrain.models.scoring import is_saved_classifier

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "auto": "auto"}
HUB_NAME = re.compile(r"(?!\.)([\w.-]+/)?[\w.-]+")
FILLER = "<extra_id_"
"""What tokens begin with that nothing says: they make up the difference to a multiple of 64."""
logger = logging.getLogger("posttrain")


def load_model(
    name: str, options: dict[str, Any] | None = None, *, dtype: str = "float32", scorer: bool = False
) -> PreTrainedModel:
    """A causal language model, or with `scorer` a reward model if it was saved as one. `options` are keyword arguments
    of `from_pretrained`; `dtype` holds where they name none. Raises ConfigError where there is no such model."""
    options = dict(options or {})
    if options.get("trust_remote_code"):
        raise ConfigError("trust_remote_code=True is not honoured: code from the hub is never run")
    if is_adapter(name):  # transformers would put it into a model that has no say in it
        raise _no_adapter(name)
    wanted = options.pop("dtype", None) or options.pop("torch_dtype", None) or dtype
    if isinstance(wanted, str):
        if wanted not in DTYPES:
            raise ConfigError(f"dtype={wanted!r} is unknown", hint=f"choose one of {sorted(DTYPES)}")
        wanted = DTYPES[wanted]

    def load(path: str, **options: Any) -> PreTrainedModel:
        kind = AutoModelForCausalLM
        if scorer and is_saved_classifier(AutoConfig.from_pretrained(path, **_where(options))):
            kind, options = AutoModelForSequenceClassification, {"num_labels": 1, **options}
        # Weights that are pickled can run code when they are read, so they are not.
        return kind.from_pretrained(path, dtype=wanted, **{"use_safetensors": True, **options})

    made = _loaded(name, options, load)
    if getattr(made, "_hf_peft_config_loaded", False):  # one on the hub
        raise _no_adapter(name)
    return made


def is_adapter(name: str) -> bool:
    """Whether it is a folder of PEFT's."""
    return (Path(name) / "adapter_config.json").is_file()


def _no_adapter(name: str) -> ConfigError:
    return ConfigError(f"{name} is an adapter, not a model",
                       hint="give the model that it belongs to, or merge the adapter into it first; SFTTrainer, "
                       "DPOTrainer and the like go on with one that lies in a folder")  # fmt: skip


def load_tokenizer(name: str, options: dict[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """`options` are keyword arguments of the model's `from_pretrained`; those that say where to look hold here too."""
    return _loaded(name, _where(options or {}), AutoTokenizer.from_pretrained)


def _loaded(name: str, options: dict[str, Any], load: Callable[..., Any]) -> Any:
    """What `load` makes of a folder or a name on the hub; where the hub does not answer, of what was downloaded before.
    Raises ConfigError."""
    path, silence = resolve(name), None
    if HUB_NAME.fullmatch(path) and not Path(path).exists() and not constants.HF_HUB_OFFLINE:
        silence = None if options.get("local_files_only") else _silence(path)
    if silence is not None:
        options = {**options, "local_files_only": True}
    try:
        with without_retries_told():
            made = load(path, **options)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise _no_model(name, silence or error) from error
    if silence is not None:
        logger.warning("model    %s: %s; read what was downloaded before (%s)", name, silence, OFFLINE)
    return made


@lru_cache
def _silence(name: str) -> Exception | None:
    """Why the hub does not answer; asked once for model and tokenizer."""
    error = answer(lambda seconds: HfApi().model_info(name, timeout=seconds, expand=["sha"]))
    if is_an_answer(error):
        return None
    return OSError(f"there is no such folder, and the hub cannot be reached: {first_line(error)}")


def _where(options: dict[str, Any]) -> dict[str, Any]:
    """Those that say where to look."""
    names = ("revision", "local_files_only", "cache_dir", "token", "subfolder", "force_download")
    return {name: value for name, value in options.items() if name in names}


def _template_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat template {path} cannot be read: {error}") from None


def _no_model(name: str, error: Exception) -> ConfigError:
    first_line = str(error).strip().splitlines()[0]
    return ConfigError(
        f"cannot load the model {name!r}: {first_line}",
        hint="give a folder with config.json and safetensors, a hub id, or 'smollm2-135m-instruct'",
    )


def set_eos_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """Let `token` end a sequence, for the tokenizer, the model and generation alike."""
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"eos_token={token!r} is not in the tokenizer's vocabulary")
    tokenizer.eos_token = token
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if tokenizer.eos_token_id not in known:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *known]


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token: str | None = None) -> None:
    """A padding token for those who pad later (generation); training never does."""
    token = token or tokenizer.pad_token or tokenizer.eos_token
    if token not in tokenizer.get_vocab():
        raise ConfigError(f"pad_token={token!r} is not in the tokenizer's vocabulary")
    tokenizer.pad_token = token
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:  # a reward model generates nothing
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def take_chat_template(tokenizer: PreTrainedTokenizerBase, source: str) -> list[AddedToken]:
    """Take the chat template of the tokenizer `source`, and those of its special tokens that are missing, which are
    returned."""
    other = load_tokenizer(source)
    if not other.chat_template:
        raise ConfigError(f"the tokenizer {source} has no chat template", hint="name a template, e.g. chatml")
    tokenizer.chat_template = other.get_chat_template()
    vocabulary = tokenizer.get_vocab()
    added = [token for token in other.added_tokens_decoder.values() if token.content not in vocabulary]
    tokenizer.add_tokens(added)
    tokenizer.eos_token = other.eos_token
    return added


def set_chat_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Take the chat template from a `.jinja` file, or from another tokenizer with the special tokens that it needs.

    Returns the ids of tokens that were added, for which the model's embeddings were enlarged (to a multiple of 64, with
    unused tokens making up the difference, as TRL does)."""
    path = Path(source)
    if path.is_file():
        tokenizer.chat_template = _template_file(path)
        return []
    added = take_chat_template(tokenizer, source)
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.resize_token_embeddings(len(tokenizer.get_vocab()), pad_to_multiple_of=64)
    rows = model.get_input_embeddings().weight.shape[0]
    fillers = (AddedToken(f"{FILLER}{i}>") for i in range(rows))
    while rows > len(tokenizer.get_vocab()):
        filler = next(fillers)
        if tokenizer.add_tokens(filler):
            added.append(filler)
    return tokenizer.convert_tokens_to_ids([token.content for token in added])
