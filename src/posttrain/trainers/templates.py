"""A chat template for a model that is to be trained: by the name of one of ours, or as models/load.py finds it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from posttrain.data.templates import end_tokens, find_template, missing_tokens, resolve_template, without_markers
from posttrain.models.load import set_chat_template

logger = logging.getLogger(__name__)


def take_template(model: Any, tokenizer: PreTrainedTokenizerBase, source: str) -> list[int]:
    """Take the chat template of that name, of a `.jinja` file, or of another tokenizer, and let generation stop where
    its turns end. Returns the ids of tokens that were added."""
    if find_template(source) is None or Path(source).exists():
        return set_chat_template(model, tokenizer, source)
    tokenizer.chat_template = without_markers(resolve_template(tokenizer, source) or "")
    missing = missing_tokens(tokenizer, source)
    if missing:
        logger.warning("chat template %s: %s are no tokens of the tokenizer, but text", source, ", ".join(missing))
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    ends = tokenizer.convert_tokens_to_ids(list(end_tokens(tokenizer, source)))
    model.generation_config.eos_token_id = list(dict.fromkeys([*known, *ends]))
    return []
