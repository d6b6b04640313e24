"""`--fix`: a copy of the rows without what can be mended without asking. The file it came from is never touched.

Rules: rows that cannot be used, exact duplicates and pairs that choose what they reject are left out; control
characters are taken out of all texts; columns and roles get the names that formats look for. All else stays as it is.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.codes import Row
from posttrain.data.columns import rename_columns
from posttrain.data.conversation import ALIASES
from posttrain.data.doctor.census import as_trained, trained_rows
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.doctor.patterns import CONTROL
from posttrain.data.pipeline import Pipeline
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
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
CONVERSATIONS = ("messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected")


def repair(
    sources: list[Any], out: Path, data: DataSettings, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, int]:
    """Write the repaired rows of `sources` to `out`; how many rows were written and what each rule changed. With a
    tokenizer, rows that training with it would refuse are unusable too. Raises DataError where a source breaks off: a
    copy of its beginning is no repaired copy."""
    check_target(sources, out)
    counts: Counter[str] = Counter()
    write_rows(out, _repaired(sources, data, counts, usable_with(tokenizer, data)))
    return {"written": counts["written"], **{rule: counts[rule] for rule in RULES}}


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


def _repaired(sources: list[Any], data: DataSettings, counts: Counter[str], check: Check) -> Iterator[Row]:
    reader = RowReader(data)
    seen: set[Any] = set()

    def drop(error: DataError, origin: Origin) -> None:
        counts["dropped_unusable"] += 1

    for source in sources:
        for origin, row in read_rows(source, reject=drop):
            clean = _without_control(row)
            bare = Origin(origin.source, origin.row)
            try:
                said = reader.read(clean, bare)
                check(clean, reader, bare)
                renamed = rename_columns(clean, data.column_map, bare)
            except DataError as error:
                drop(error, origin)
                continue
            if rule := _reason_to_drop(said, seen):
                counts[rule] += 1
                continue
            roles = _with_usual_roles(renamed)
            counts["stripped_control_characters"] += clean != row
            counts["renamed_columns"] += list(renamed) != list(clean)
            counts["renamed_roles"] += roles != renamed
            counts["written"] += 1
            yield roles


def _reason_to_drop(said: Said, seen: set[Any]) -> str | None:
    if len(said.answers) > 1 and said.answers[0] == said.answers[1]:
        return "dropped_equal_pairs"
    key = hash((said.prompt, said.answers, said.label, said.rest))
    if key in seen:
        return "dropped_duplicates"
    seen.add(key)
    return None


def _without_control(value: Any) -> Any:
    if isinstance(value, str):
        return CONTROL.sub("", value)
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
