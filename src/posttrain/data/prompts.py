"""Rows that are prompts, for methods that sample the completions themselves: `prompt`, text or messages, and whatever
the rewards need beside it (a ground truth, tests, ...), which is handed to them as it is written.

Left out: images, and prompts that end with the beginning of an answer (a template would close it).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.calls import parse_tools
from posttrain.data.chat import Chat
from posttrain.data.codes import UNFORESEEN, Row, bad_row, broken_promise
from posttrain.data.columns import read_columns
from posttrain.data.conversation import clean_messages
from posttrain.data.mixing import Mixture
from posttrain.data.places import half_a_character
from posttrain.data.rendering import RenderError
from posttrain.data.report import DataReport
from posttrain.data.sources import read_rows, source_name
from posttrain.data.templates import resolve_template
from posttrain.errors import ConfigError, DataError, UserError
from posttrain.types import Content, Example, Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("posttrain")
LIKELY = ("question", "query", "instruction", "input", "messages", "conversations", "problem", "text")
"""Columns that may be meant as the prompt."""


@dataclass(frozen=True)
class PromptSettings:
    """`max_length` is a prompt's most tokens: its beginning is cut off. `chat_template` is a name, a file or a
    template, None for the tokenizer's own, with further arguments `template_kwargs`; `column_map` renames columns, old
    to new."""

    column_map: Mapping[str, str] = field(default_factory=dict)
    max_length: int | None = None
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    on_bad_row: str = "error"


@dataclass(frozen=True)
class Prompt:
    """`ids` is what the model is given, `content` what the row says (text or messages), `columns` the row's others."""

    ids: np.ndarray
    content: Content
    columns: Mapping[str, Any]
    origin: Origin

    @property
    def is_conversational(self) -> bool:
        return isinstance(self.content, list)


def read_prompts(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, name: str = "train"
) -> tuple[list[Prompt], DataReport]:
    """Raises DataError for a row that is no prompt, or where `on_bad_row` is "skip" for none being left; ConfigError
    for what has no length, and so may have no end."""
    endless = dataset.is_stream if isinstance(dataset, Mixture) else not isinstance(dataset, str | Path | Sized)
    if endless:
        raise ConfigError(f"the {name} prompts have no length, so they may have no end: such are not honoured, for all "
                          "are read before the first step", hint="list(...) takes all of one that ends, and "
                          "list(itertools.islice(..., 10000)) some")  # fmt: skip
    report = DataReport(source_name(dataset, name))
    reader = _Reader(tokenizer, settings, report)
    prompts = [
        prompt for origin, row in read_rows(dataset, name, reader.reject) if (prompt := reader.read(row, origin))
    ]
    if not prompts:
        hint = f"the first: {report.first_error}" if report.first_error else None
        raise DataError(f"{report.source}: none of {report.rows} rows is a prompt", hint=hint, code="E-DATA-0031")
    if len({prompt.is_conversational for prompt in prompts}) > 1:
        raise DataError(f"{report.source} has prompts that are text and prompts that are messages", code="E-DATA-0016",
                        hint="write all of them one way: rewards are given completions of the same kind")  # fmt: skip
    return prompts, report


class _Reader:
    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: PromptSettings, report: DataReport):
        self.tokenizer, self.settings, self.report = tokenizer, settings, report
        self.chat: Chat | None = None

    def reject(self, error: DataError, origin: Origin) -> None:
        """A row that could not even be read."""
        self.report.rows += 1
        self._skip(error, origin)

    def read(self, row: Row, origin: Origin) -> Prompt | None:
        self.report.rows += 1
        try:
            prompt = self._read_safely(row, origin)
        except DataError as error:
            self._skip(error, origin)
            return None
        self.report.used += 1
        self.report.tokens += len(prompt.ids)
        self.report.conversational += prompt.is_conversational
        return prompt

    def _skip(self, error: DataError, origin: Origin) -> None:
        if self.settings.on_bad_row == "error":
            raise error
        self.report.skip(error, origin)

    def _read_safely(self, row: Row, origin: Origin) -> Prompt:
        try:
            return self._read(row, origin)
        except UserError:
            raise
        except UnicodeEncodeError:
            raise half_a_character(row, origin) from None
        except UNFORESEEN as error:
            raise broken_promise(error, row, origin) from error

    def _read(self, row: Row, origin: Origin) -> Prompt:
        row = read_columns(row, self.settings.column_map, origin)
        content = row.get("prompt")
        if content is None:
            raise _no_prompt(row, origin)
        if isinstance(content, str):
            if not content.strip():
                raise bad_row("E-DATA-0014", origin, "is empty", field="prompt", seen=content, row=row)
            ids = self.tokenizer(content)["input_ids"]
        else:
            content = clean_messages(content, "prompt", row, origin)
            check_last_turn(content, row, origin)
            ids = self.tokenizer(self._rendered(content, row, origin), add_special_tokens=False)["input_ids"]
        columns = {name: value for name, value in row.items() if name != "prompt"}
        return Prompt(self._limited(np.array(ids, dtype=np.int64), origin), content, columns, origin)

    def _rendered(self, messages: list[dict[str, Any]], row: Row, origin: Origin) -> str:
        if self.chat is None:
            name = self.settings.chat_template
            self.chat = Chat(self.tokenizer, resolve_template(self.tokenizer, name), name)
            self.chat.check()
        kwargs = {**self.settings.template_kwargs, **(row.get("chat_template_kwargs") or {})}
        example = Example(messages, (), origin, tools=parse_tools(row, origin), template_kwargs=kwargs)
        try:
            if example.tools and not self.chat.shows_tools(messages, example):
                self.report.tools_left_out.add(origin)
            return self.chat.render(messages, example, generation_prompt=True)
        except RenderError as error:
            what = f"cannot be rendered: {error}"
            raise bad_row("E-DATA-0043", origin, what, field="prompt", seen=messages, row=row) from None

    def _limited(self, ids: np.ndarray, origin: Origin) -> np.ndarray:
        most = self.settings.max_length
        if most is None or len(ids) <= most:
            return ids
        self.report.truncated.add(origin)
        self.report.tokens_lost += len(ids) - most
        return ids[-most:]


def _no_prompt(row: Row, origin: Origin) -> DataError:
    found = next((name for name in LIKELY if row.get(name)), None)
    columns = ", ".join(f"`{name}`" for name in row)
    hint = (
        f'dataset_columns={{"{found}": "prompt"}} reads `{found}` as the prompt' if found else "give a column `prompt`"
    )
    return bad_row("E-DATA-0010", origin, f"has no `prompt` (columns {columns})", row=row, hint=hint)


def check_last_turn(messages: Sequence[Mapping[str, Any]], row: Row, origin: Origin) -> None:
    """Raises DataError for one that the model is to write."""
    if messages[-1]["role"] == "assistant":
        what = "ends with a turn of the assistant, which is what the model is to write"
        raise bad_row("E-DATA-0016", origin, what, field="prompt", seen=messages[-1], row=row,
                      hint="end prompts with the user's turn")  # fmt: skip


def check_tokens(
    prompts: Sequence[Prompt],
    rows: int,
    places: int | None,
    completion: int,
    hint: str = "lower max_completion_length or set max_prompt_length",
) -> None:
    """Raises ConfigError for tokens that the model has no embedding for, or more of them than it has places."""
    for prompt in prompts:
        if int(prompt.ids.max()) >= rows:
            raise ConfigError(f"{prompt.origin} has token {int(prompt.ids.max())}, and the model embeddings for {rows} "
                              "tokens only", hint="give the tokenizer that belongs to the model")  # fmt: skip
        if places is not None and len(prompt.ids) + completion > places:
            raise ConfigError(f"{prompt.origin} has {len(prompt.ids)} tokens; with max_completion_length={completion} "
                              f"that is more than the model's {places} places",
                              hint=hint)  # fmt: skip
