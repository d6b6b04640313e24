"""`posttrain data fix`: a repaired copy of a file, by named rules."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from posttrain.commands import EXIT_CODES
from posttrain.commands.reading import READING, add_reading, data_settings, given


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    fix = verbs.add_parser("fix", parents=[common], help="write a repaired copy, by named rules", epilog=EXIT_CODES)
    fix.add_argument("file", help="a file of examples, a folder of them, or a name on the hub")
    fix.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="NAME",
        help="rename-role:OLD=NEW, drop-unusable, drop-duplicates, drop-equal-pairs, strip-control-characters or "
        "rename-roles (default: all but the first)",
    )
    fix.add_argument("-o", "--out", type=Path, help="where to write (default: train.fixed.jsonl of train.jsonl)")
    fix.add_argument("--report", type=Path, metavar="R.json", help="what was changed (default: beside the copy)")
    fix.add_argument("--force", action="store_true", help="write over a copy that is there")
    add_reading(fix)
    fix.set_defaults(command=_fix)


def _fix(options: argparse.Namespace) -> int:
    from posttrain.data.change.fix import COPIES, default_copy, default_report, fix
    from posttrain.data.doctor.rules import parse_rules
    from posttrain.data.writing import check_new_file, check_report, write_report
    from posttrain.errors import ConfigError

    parse_rules(options.rule)
    out = options.out or default_copy(options.file)
    report = options.report or default_report(out)
    if out.suffix.lower() not in COPIES:
        raise ConfigError(f"{out}: a repaired copy is written as {' or '.join(COPIES)}", hint=f"-o {out.stem}.jsonl")
    check_new_file(out, options.force, [options.file])
    check_report(report, "--report", [options.file, out])
    document = fix(options.file, out, data_settings(options, [options.file]), options.rule)
    write_report(report, document)
    if options.json:
        print(json.dumps({**document, "report": str(report)}, ensure_ascii=False))
    else:
        _print(document, report, options)
    return 0


def _print(document: dict[str, Any], report: Path, options: argparse.Namespace) -> None:
    from posttrain.data.doctor.findings import rows

    changed = "; ".join(f"{name} {rows(rule['count'])}" for name, rule in document["rules"].items() if rule["count"])
    print(f"✔ fixed    {document['out']} {rows(document['written'])} written: {changed or 'nothing had to be changed'}")
    if document["unusable"]:
        reading = given(options, {name: default for name, default in READING.items() if name != "map"})
        command = shlex.join(["posttrain", "data", "check", document["out"], *reading])
        print(f"! {rows(document['unusable'])} still cannot be used: {command} says why")
    print(f"✔ report   {report}")
