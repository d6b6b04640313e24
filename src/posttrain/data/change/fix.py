"""A repaired copy of a file, by named rules, and a report of what each of them changed. The file itself is never
touched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from posttrain.data.doctor.repair import left_out, mended, usable_with
from posttrain.data.doctor.rules import RENAME, REPAIRS, parse_rules
from posttrain.data.report import Cases
from posttrain.data.settings import DataSettings
from posttrain.data.sources import source_name
from posttrain.data.writing import write_rows

COPIES = (".jsonl", ".json")
"""Tables would not keep what a row's values are."""


def default_copy(source: str) -> Path:
    """`train.fixed.jsonl` beside `train.jsonl`."""
    path = Path(source)
    return path.with_name(f"{path.stem}.fixed{path.suffix if path.suffix in COPIES else '.jsonl'}")


def default_report(copy: Path) -> Path:
    return copy.with_name(f"{copy.stem}.report.json")


def fix(source: Any, out: Path, data: DataSettings, rules: Iterable[str] = ()) -> dict[str, Any]:
    """Write the rows of `source` to `out`, repaired by `rules` (none: by all that ask nobody); the report. Rows that
    cannot be used and are not to be dropped stay as they are, and are counted as `unusable`.

    Raises: ConfigError for an unknown rule, or one that renames a role that is not there; DataError for a line that
        cannot be read, unless such are to be dropped.
    """
    asked = parse_rules(rules)
    changes: dict[str, Cases] = {}
    rows = mended([source], data, asked, changes, usable_with(None, data))
    written = write_rows(out, rows, why_empty=lambda: left_out(changes))
    names = [name for name in REPAIRS if asked.has(name)]
    names += [f"{RENAME}:{old}={new}" for old, new in asked.roles.items()]
    if data.column_map:
        names.append("renamed_columns")
    found = {name: changes.get(REPAIRS.get(name, name), Cases()) for name in names}
    return {
        "schema_version": 1,
        "source": source_name(source),
        "out": str(out),
        "written": written,
        "unusable": changes.get("unusable", Cases()).count,
        "rules": {name: {"count": c.count, "first": [str(origin) for origin in c.first]} for name, c in found.items()},
    }
