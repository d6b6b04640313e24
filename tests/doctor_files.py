"""Small data sets for the tests of the doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from posttrain.data.doctor.check import CheckReport, check
from posttrain.data.doctor.findings import Finding
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.settings import DataSettings

Row = dict[str, Any]


def row(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def plain(count: int, start: int = 0) -> list[Row]:
    """Rows that nothing is wrong with."""
    return [row(f"Name number {i}.", f"{name(i)} comes after {name(i - 1)}.") for i in range(start, start + count)]


def name(number: int) -> str:
    """A word of its own for each number, so that no two rows are alike."""
    return "".join("bdfglmnprs"[int(digit)] + "aeiou"[int(digit) // 2] for digit in str(number + 1000))


def pair(question: str, chosen: str, rejected: str) -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def rated(question: str, answer: str, label: bool) -> Row:
    return {"prompt": question, "completion": answer, "label": label}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def examine(rows: Any, val: Any = None, data: DataSettings | None = None, **settings: Any) -> CheckReport:
    return check(rows, val=val, data=data, settings=DoctorSettings(**settings))


def codes(rows: Any, val: Any = None, **settings: Any) -> list[str]:
    return [finding.code for finding in examine(rows, val, **settings).findings]


def finding(report: CheckReport, code: str) -> Finding:
    return next(found for found in report.findings if found.code == code)
