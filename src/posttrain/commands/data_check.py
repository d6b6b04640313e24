"""`posttrain data check`: what a file of examples is, how long, and what is wrong with it."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.commands import EXIT_CODES
from posttrain.commands.reading import (
    READING,
    add_policy,
    add_reading,
    data_settings,
    given,
    in_flags,
    open_tokenizer,
    template_name,
    whole_number,
)

if TYPE_CHECKING:
    from posttrain.data.doctor.check import CheckReport
    from posttrain.data.settings import DataSettings

MAX_PROCESSES = 8
MAX_COLUMNS = 20
CHECKING: dict[str, Any] = {
    "val": None, "policy": "error", "model": None, "chat_template": None, "max_length": None, "strict": False,
    "set": [], "near": None,
}  # fmt: skip
"""Options that belong to a command which is to be typed again, with their defaults."""
SIGNS = {"error": "", "warning": "! ", "info": "· "}
REST = "; nothing is known of the rest, which cannot be read"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    check = verbs.add_parser("check", parents=[common], epilog=EXIT_CODES,
                             help="what a file is, how many rows, how long, and what is wrong with them")  # fmt: skip
    check.add_argument("files", nargs="+", metavar="FILE", help="files, folders or names on the hub, as one data set")
    check.add_argument("--val", metavar="FILE", help="validation data that must have nothing in common with it")
    add_reading(check)
    check.add_argument(
        "--max-errors", type=whole_number, default=50, metavar="N", help="bad rows to list (default: 50)"
    )
    add_policy(check, "whether rows that cannot be used are errors, or are skipped and warned of")
    check.add_argument("--report", type=Path, metavar="R.json", help="write everything that was found")
    check.add_argument("--model", metavar="M", help="count tokens as this model's tokenizer makes them")
    check.add_argument("--chat-template", metavar="NAME", help="with --model: another chat template than its own")
    check.add_argument("--max-length", type=int, metavar="N", help="with --model: the limit, in tokens")
    check.add_argument("--strict", action="store_true", help="warnings are refused as well")
    check.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired copy")
    check.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another threshold")
    check.add_argument(
        "--processes", type=whole_number, metavar="N", help="processes for large JSONL files (default: as cores)"
    )
    check.add_argument("--near", type=_rows_or_all, metavar="N|all",
                       help="rows among which near duplicates are looked for (default: 50000; 0: none)")  # fmt: skip
    check.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    from posttrain.data.doctor.check import check
    from posttrain.data.doctor.repair import check_target
    from posttrain.data.doctor.settings import parse_settings
    from posttrain.data.writing import check_report, write_report

    near = [] if options.near is None else [f"near_rows={sys.maxsize if options.near == 'all' else options.near}"]
    settings, sources = parse_settings([*options.set, *near]), [*options.files, *([options.val] if options.val else [])]
    _refuse_lonely(options)
    if options.report:
        check_report(options.report, "--report", [*sources, *([options.fix] if options.fix else [])])
    if options.fix:
        check_target(sources, options.fix)
    data = data_settings(options, sources, on_bad_row=options.policy, max_length=options.max_length,
                         chat_template=template_name(options))  # fmt: skip
    common: dict[str, Any] = {
        "val": options.val,
        "data": data,
        "settings": settings,
        "tokenizer": open_tokenizer(options),
        "max_errors": options.max_errors,
        "processes": _processes(options.processes),
        "progress": not (options.quiet or options.json),
    }
    found = _as_typed(check(options.files, **common), options)
    document, is_lost = found.to_dict(), False
    if not options.json:
        _print(found, options)
    if options.fix and found.is_unread:
        document["fix"] = None
        print(f"--fix {options.fix} was not written: the rest of a file cannot be read, and a copy would lack it\n"
              "  = mend that place first", file=sys.stderr)  # fmt: skip
    elif options.fix:
        document["fix"], again = _fixed(options, data, common)
        is_lost = again is None
        if again is not None:
            found, document["fixed"] = again, again.to_dict()
            if not options.json:
                _print_fix(document["fix"], found)
    document["refused"] = bool(found.errors or (options.strict and found.warnings) or is_lost)
    if options.report:
        write_report(options.report, document)
        print(f"report in {options.report}", file=sys.stderr)
    if options.json:
        print(json.dumps(document, allow_nan=False, ensure_ascii=False))
    return 3 if document["refused"] else 0


def _fixed(
    options: argparse.Namespace, data: DataSettings, common: dict[str, Any]
) -> tuple[dict[str, Any] | None, CheckReport | None]:
    """What was repaired, and the check of the copy; neither where nothing is left to write."""
    from posttrain.data.doctor.check import check
    from posttrain.data.doctor.repair import repair
    from posttrain.errors import DataError

    try:
        counts = repair(options.files, options.fix, data, common["tokenizer"])
    except DataError as error:
        if error.code != "E-DATA-0031":
            raise
        print(f"--fix {options.fix} was not written: nothing is left\n  = {error.hint}", file=sys.stderr)
        return None, None
    again = check([str(options.fix)], **{**common, "data": _without_names(data)})
    return {"path": str(options.fix), **counts}, again


def _without_names(data: DataSettings) -> DataSettings:
    """For the repaired copy, whose columns have their new names."""
    return dataclasses.replace(data, column_map={})


def _rows_or_all(text: str) -> str:
    return text if text == "all" else str(whole_number(text))


def _refuse_lonely(options: argparse.Namespace) -> None:
    """What would have no effect is a mistake."""
    from posttrain.errors import ConfigError

    if options.max_length is not None and options.model is None:
        raise ConfigError("--max-length counts tokens, so it needs --model", hint="--model PATH-OR-NAME")
    if options.chat_template is not None and options.model is None:
        raise ConfigError("--chat-template is what tokens are made with, so it needs --model",
                          hint="--model PATH-OR-NAME")  # fmt: skip


def _processes(asked: int | None) -> int:
    if asked is not None:
        return max(1, asked)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_PROCESSES)


def _print(found: CheckReport, options: argparse.Namespace) -> None:
    from posttrain.data.doctor.findings import rows
    from posttrain.data.report import number

    names = ", ".join(Path(name).name or name for name in found.sources)
    unusable = found.rows - found.usable
    usable = f": {number(found.usable)} usable, {number(unusable)} not" if unusable else ""
    rest = REST if found.is_unread and found.rows else ""
    sign = "✔" if found.rows and not unusable and not rest else "!"
    print(f"{sign} data     {names} {rows(found.rows)}{usable}{rest}")
    for described, count in list(found.formats.items())[:3]:
        print(f"           {described}" + (f" ({number(count)})" if len(found.formats) > 1 else ""))
    if found.unused:
        more = len(found.unused) - MAX_COLUMNS
        names = ", ".join(list(found.unused)[:MAX_COLUMNS])
        print(f"           columns not used: {names}" + (f" and {number(more)} more" if more > 0 else ""))
    if found.usable:
        print(f"✔ length   {found.lengths.in_words()}")
    if len(found.languages) > 1 or options.verbose:
        parts = ", ".join(f"{name} {number(count)}" for name, count in list(found.languages.items())[:5])
        print(f"✔ language {parts or 'none told'} (a guess, by script and frequent words)")
    if found.labels:
        print(f"✔ labels   {number(found.labels['good'])} good, {number(found.labels['bad'])} bad")
    if found.validation:
        about = found.validation
        rest = REST if about["unread"] and about["rows"] else ""
        sign = "✔" if about["rows"] == about["usable"] > 0 and not rest else "!"
        usable = f"{number(about['usable'])} usable{rest}"
        print(f"{sign} val      {Path(about['source']).name} {rows(about['rows'])}: {usable}")
    for item in found.findings:
        _print_finding(item, found, options)
    counts = f"{_several(found.errors, 'error')}, {_several(found.warnings, 'warning')}"
    sign = "✔" if not (found.errors or found.warnings) else "!"
    print(f"{sign} checked  {counts} in {found.seconds:.1f} s")


def _print_finding(item: Any, found: CheckReport, options: argparse.Namespace) -> None:
    first = f" (first: {', '.join(item.first[: 5 if options.verbose else 2])})" if item.first else ""
    print(f"{SIGNS[item.severity]}{item.code} {item.sentence}{first}")
    is_rest = "unread" in item.details or "unread_validation" in item.details
    bad = [] if is_rest else [bad for bad in found.bad_rows if bad["code"] == item.code]
    for row in bad[: len(bad) if options.verbose else 1]:
        print("  " + str(row["message"]).replace("\n", "\n  "))
    details = item.details.get("shown") or item.details.get("pairs") or []
    for line in details[: 5 if options.verbose else 1]:
        print(f"  | {line}")
    print(f"  = {item.fix}")


def _as_typed(found: CheckReport, options: argparse.Namespace) -> CheckReport:
    """With commands in its ways out that can be typed as they stand: the files' names, and the options given."""
    findings = [dataclasses.replace(item, fix=_typed(item.fix, options)) for item in found.findings]
    bad_rows = [{**bad, "hint": in_flags(bad["hint"], options)} for bad in found.bad_rows]
    return dataclasses.replace(found, findings=findings, bad_rows=bad_rows)


def _typed(fix: str, options: argparse.Namespace) -> str:
    reading = given(options, READING)
    check = shlex.join(["posttrain", "data", "check", *options.files, *given(options, {**READING, **CHECKING})])
    fix = (in_flags(fix, options) or fix).replace("posttrain data check FILE", check)
    fix = fix.replace("check VALIDATION", shlex.join(["check", options.val or "VALIDATION", *reading]))
    return f"{fix} {shlex.join(reading)}" if reading and "posttrain data fix " in fix else fix


def _print_fix(counts: dict[str, Any], found: CheckReport) -> None:
    from posttrain.data.doctor.findings import rows
    from posttrain.data.doctor.repair import RULES
    from posttrain.data.report import number

    changed = "; ".join(f"{what}: {number(counts[rule])}" for rule, what in RULES.items() if counts[rule])
    written = f"{counts['path']} {rows(counts['written'])} written"
    print(f"✔ fixed    {written}: {changed or 'nothing had to be changed'}")
    print(f"{'!' if found.errors else '✔'} again    {_several(found.errors, 'error')}, "
          f"{_several(found.warnings, 'warning')} in the copy")  # fmt: skip


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
