"""The options that say how a file of examples is to be read: the same for every verb of `posttrain data`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.data.settings import DataSettings

READING: dict[str, Any] = {"format": "auto", "text_field": "text", "map": []}


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", default="auto", help="name of the rows' format (default: each row is asked)")
    parser.add_argument("--text-field", default="text", metavar="NAME", help="column of plain text (default: text)")
    parser.add_argument("--map", action="append", default=[], metavar="COLUMN=NAME,...",
                        help="rename columns first, e.g. question=prompt,answer=completion")  # fmt: skip


def add_policy(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--policy", choices=("error", "skip"), default="error", help=what)


def data_settings(options: argparse.Namespace, sources: Iterable[Any], **more: Any) -> DataSettings:
    """As the options say. Raises ConfigError for an unknown format, and for a column to be renamed that no row of
    `sources` has."""
    from posttrain.data.columns import parse_names
    from posttrain.data.formats import all_formats, choose
    from posttrain.data.settings import DataSettings
    from posttrain.data.sources import check_columns

    choose(options.format, all_formats(options.text_field))
    names = parse_names(options.map)
    settings = DataSettings(format=options.format, text_field=options.text_field, column_map=names, **more)
    check_columns(names, sources)
    return settings


def template_name(options: argparse.Namespace) -> str | None:
    """What `--chat-template` names, unless it is a tokenizer's folder: that is for `open_tokenizer`."""
    name: str | None = options.chat_template
    return None if name and Path(name).is_dir() else name


def open_tokenizer(options: argparse.Namespace) -> PreTrainedTokenizerBase | None:
    """The tokenizer of `--model`. Where `--chat-template` is another tokenizer's folder, its template becomes this
    one's own, as training takes it."""
    if not options.model:
        return None
    from posttrain.models.load import load_tokenizer, take_chat_template  # heavy, and not wanted without a model

    tokenizer = load_tokenizer(options.model)
    if options.chat_template and template_name(options) is None:
        take_chat_template(tokenizer, options.chat_template)
    return tokenizer


def given(options: argparse.Namespace, defaults: dict[str, Any]) -> list[str]:
    """The words of those options that are not at their defaults, to be typed again."""
    words: list[str] = []
    for name, default in defaults.items():
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if value == default:
            continue
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return words


SETTINGS: dict[str, dict[str, str]] = {
    "on_bad_row=skip": {
        "policy": "--policy skip", "rule": "--rule drop-unusable", "config": "--set dataset.on_bad_row=skip"
    },
    "format=...": {"format": "--format NAME", "config": "--set dataset.format=NAME"},
    'chat_template="chatml"': {"chat_template": "--chat-template chatml",
                               "config": "--set dataset.chat_template=chatml"},
}  # fmt: skip
"""What hints of the library name, and what a command that has such an option calls it."""


def in_flags(hint: str | None, options: argparse.Namespace) -> str | None:
    """`hint` with the flags of the command that was typed in place of the library's settings."""
    for setting, flags in SETTINGS.items() if hint else ():
        flag = next((flag for option, flag in flags.items() if option in options), setting)
        hint = (hint or "").replace(setting, flag)
    return hint


def whole_number(text: str) -> int:
    """For argparse: a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


whole_number.__name__ = "whole number"  # which argparse says of what is none
