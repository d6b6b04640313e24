"""`--fix`: a copy of the rows without what can be mended without asking. The file it came from is never touched. `data
fix` does the same by chosen rules.

Rules: rows that cannot be used, exact duplicates and pairs that choose what they reject are left out; control
characters are taken out of what can be trained on; columns and roles get the names that formats look for. All else
stays as it is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.codes import Row
from posttrain.data.columns import rename_columns
from posttrain.data.conversation import ALIASES
from posttrain.data.doctor.census import as_trained, trained_rows
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.doctor.patterns import CONTROL, ESCAPE
from posttrain.data.doctor.rules import CONVERSATIONS, RENAME, TRAINED, Rules, rename_roles, unmatched
from posttrain.data.flags import DETAIL
from posttrain.data.pipeline import Pipeline
from posttrain.data.report import Cases, DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.tokens import is_tokenized
from posttrain.data.writing import write_rows
from posttrain.errors import ConfigError, DataError
from posttrain.types import Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = {
    "dropped_unusable": "unusable rows left out",
    "dropped_duplicates": "exact duplicates left out",
    "dropped_equal_pairs": "pairs that choose what they reject left out",
    "stripped_control_characters": "rows freed of control characters",
    "renamed_columns": "rows with columns renamed",
    "renamed_roles": "rows with roles renamed",
}

BLANKS = {"\x0b": "\n", "\x0c": "\n", "\x85": "\n", **dict.fromkeys("\x1c\x1d\x1e\x1f", " ")}
"""Control characters that part words, and what parts them as well: a line's end, or a space for a separator."""


def repair(
    sources: list[Any], out: Path, data: DataSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, int]:
    """Write the repaired rows of `sources` to `out`; how many rows were written and what each rule changed. With a
    tokenizer, rows that training with it would refuse are unusable too. Raises DataError where a source breaks off: a
    copy of its beginning is no repaired copy."""
    check_target(sources, out)
    changes: dict[str, Cases] = {}
    rows = mended(sources, data, Rules(), changes, usable_with(tokenizer, data))
    written = write_rows(out, rows, why_empty=lambda: left_out(changes))
    return {"written": written, **{rule: changes.get(rule, Cases()).count for rule in RULES}}


def left_out(changes: dict[str, Cases]) -> str:
    """Why nothing is left, by rules."""
    found = [(what, changes[rule].count) for rule, what in RULES.items() if rule in changes and "left out" in what]
    return "; ".join(f"{what}: {count}" for what, count in found) + ("; data check says more" if found else "")


def check_target(sources: list[Any], out: Path) -> None:
    """Raises ConfigError where `out` is no place for the copy."""
    if out.suffix.lower() not in (".jsonl", ".json"):
        raise ConfigError(f"--fix {out}: a repaired copy is written as .jsonl or .json", hint=f"--fix {out.stem}.jsonl")
    for source in sources:
        path = Path(source) if isinstance(source, str | Path) else None
        if path is not None and path.exists() and out.exists() and os.path.samefile(path, out):
            raise ConfigError(f"--fix {out} is what is checked; it is never written over", hint="name another file")
    if out.exists():
        raise ConfigError(f"--fix {out}: there is such a file already", hint="delete it, or name another one")
    if not out.parent.is_dir():
        raise ConfigError(f"--fix {out}: there is no folder {out.parent}", hint="create it first")


Check = Callable[[Row, RowReader, Origin], None]


def usable_with(tokenizer: PreTrainedTokenizerBase | None, data: DataSettings) -> Check:
    """Raises DataError for a row that cannot be trained on with this model."""
    pipeline = None if tokenizer is None else Pipeline(tokenizer, as_trained(data, "error"), DataReport("data"))

    def check(row: Row, reader: RowReader, origin: Origin) -> None:
        for part in trained_rows(row, reader, origin):
            if pipeline is not None:
                pipeline.one(part, origin)

    return check


def mended(
    sources: list[Any], data: DataSettings, rules: Rules, changes: dict[str, Cases], check: Check
) -> Iterator[Row]:
    """The rows that are left of `sources`, repaired by `rules`; what each changed is added to `changes`."""
    reader = RowReader(dataclasses.replace(data, column_map={}))
    seen, roles_seen, roles_used = set[Any](), set[str](), set[str]()

    def note(change: str, origin: Origin) -> None:
        changes.setdefault(change, Cases()).add(origin)

    def drop(error: DataError, origin: Origin) -> None:
        if not rules.has("drop-unusable"):
            raise DataError(error.message, hint="--rule drop-unusable leaves such lines out", code=error.code)
        note("dropped_unusable", origin)

    for source in sources:
        for origin, row in read_rows(source, reject=drop):
            bare = Origin(origin.source, origin.row)
            try:
                named = rename_columns(row, data.column_map, bare)
            except DataError as error:
                drop(error, origin)
                continue
            spelt, used = rename_roles(named, rules.roles, roles_seen)
            clean = _stripped(spelt, reader, bare) if rules.has("strip-control-characters") else spelt
            roles = clean
            try:
                said = reader.read(clean, bare)
                check(clean, reader, bare)
                rule = _reason_to_drop(said, seen, rules)
            except DataError as error:
                if rules.has("drop-unusable"):
                    drop(error, origin)
                    continue
                note("unusable", origin)
            else:
                if rule:
                    note(rule, origin)
                    continue
                roles = _with_usual_roles(clean) if rules.has("rename-roles") else clean
            roles_used |= used
            changed = {
                "renamed_columns": list(named) != list(row),
                "stripped_control_characters": clean != spelt,
                "renamed_roles": roles != clean,
                **{f"{RENAME}:{old}={rules.roles[old]}": True for old in used},
            }
            for change in (name for name, is_so in changed.items() if is_so):
                note(change, origin)
            yield roles
    if missing := unmatched(rules.roles, roles_used, roles_seen):
        raise missing


def _reason_to_drop(said: Said, seen: set[Any], rules: Rules) -> str | None:
    if rules.has("drop-equal-pairs") and len(said.answers) > 1 and said.answers[0] == said.answers[1]:
        return "dropped_equal_pairs"
    if not rules.has("drop-duplicates"):
        return None
    key = hash((said.prompt, said.answers, said.label, said.rest))
    if key in seen:
        return "dropped_duplicates"
    seen.add(key)
    return None


def _stripped(row: Row, reader: RowReader, origin: Origin) -> Row:
    """`row` without control characters in what can be trained on. A column of the user's own stays as it is."""
    names = {*TRAINED, reader.text_field} - ({*row} if is_tokenized(row) else set())
    clean = {name: _without_control(value) if name in names else value for name, value in row.items()}
    if clean == row or _has_ranges(row):  # which count characters
        return row
    try:
        own = reader.parsed(clean, origin)[0].columns
    except DataError:  # of no format as it is, so that any of them may be meant
        own = {}
    return {name: row[name] if name in own else value for name, value in clean.items()}


def _has_ranges(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value.get(DETAIL)) or any(map(_has_ranges, value.values()))
    return isinstance(value, list) and any(map(_has_ranges, value))


def _without_control(value: Any) -> Any:
    if isinstance(value, str):
        return CONTROL.sub(lambda found: BLANKS.get(found[0], ""), ESCAPE.sub("", value))
    if isinstance(value, dict):
        return {key: _without_control(item) for key, item in value.items()}
    return [_without_control(item) for item in value] if isinstance(value, list | tuple) else value


def _with_usual_roles(row: Row) -> Row:
    """Roles of messages under their usual names; ShareGPT's `from` keeps its own words, which are usual there."""
    return {key: _renamed(value) if key in CONVERSATIONS else value for key, value in row.items()}


def _renamed(value: Any) -> Any:
    if isinstance(value, list):
        return [_renamed(item) for item in value]
    if isinstance(value, dict) and isinstance(value.get("role"), str):
        spelt = value["role"].strip().lower()
        return {**value, "role": ALIASES.get(spelt, spelt)}
    return value
