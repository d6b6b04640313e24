"""How data are to be read, masked, cut, packed and ordered: plain values, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.data.columns import check_names
from posttrain.data.packing import STRATEGIES
from posttrain.errors import ConfigError

CHOICES: dict[str, tuple[str, ...]] = {
    "method": ("sft", "preference", "rated"),
    "truncation_mode": ("keep_start", "keep_end", "drop"),
    "packing_strategy": tuple(STRATEGIES),
    "on_bad_row": ("error", "skip"),
}


@dataclass(frozen=True)
class DataSettings:
    """`method` says which rows are wanted: "sft" for examples, "preference" for pairs, "rated" for answers with labels.
    `format="auto"` asks each row; `completion_only=None` trains the completion where a row has one, and
    `assistant_only=None` the assistant's turns where a row is a whole conversation; `chat_template` is a name, a file
    or a template, None for the tokenizer's own; `column_map` renames columns (old to new) before the format is told;
    `columns` are kept beside the tokens; `cache` is the folder where tokens of files are kept."""

    method: str = "sft"
    format: str = "auto"
    text_field: str = "text"
    column_map: Mapping[str, str] = field(default_factory=dict)
    formatting_func: Callable[[dict[str, Any]], str] | None = None
    completion_only: bool | None = None
    assistant_only: bool | None = False
    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation_mode: str = "keep_start"
    packing: bool = False
    packing_strategy: str = "bfd"
    on_bad_row: str = "error"
    shuffle: bool = False
    shuffle_seed: int = 42
    chat_template: str | None = None
    columns: tuple[str, ...] = ()
    cache: Path | None = None

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} is {getattr(self, name)!r}", hint=f"known: {', '.join(known)}")
        check_names(self.column_map)
        if self.max_length is not None and self.max_length < 1:
            raise ConfigError(f"max_length is {self.max_length}", hint="give a positive number of tokens, or None")
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs max_length", hint="set it to the number of tokens of a pack, e.g. 1024")
        if self.formatting_func is not None and self.completion_only:
            raise ConfigError(
                "a formatting_func makes one text of a row, so completion_only_loss has no completion to train",
                hint="leave one of them out; prompt-completion rows need no formatting_func",
            )
