"""`posttrain data check`: what a file of examples is, how long, and what is wrong with it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.commands import EXIT_CODES

if TYPE_CHECKING:
    from posttrain.data.doctor.check import CheckReport
    from posttrain.data.settings import DataSettings

MAX_PROCESSES = 8
SIGNS = {"error": "", "warning": "! ", "info": "· "}


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    check = verbs.add_parser("check", parents=[common], epilog=EXIT_CODES,
                             help="what a file is, how many rows, how long, and what is wrong with them")  # fmt: skip
    check.add_argument("files", nargs="+", metavar="FILE", help="files, folders or names on the hub, as one data set")
    check.add_argument("--val", metavar="FILE", help="validation data that must have nothing in common with it")
    check.add_argument("--format", default="auto", help="name of the rows' format (default: each row is asked)")
    check.add_argument("--text-field", default="text", metavar="NAME", help="column of plain text (default: text)")
    check.add_argument("--map", action="append", default=[], metavar="COLUMN=NAME,...",
                       help="rename columns first, e.g. question=prompt,answer=completion")  # fmt: skip
    check.add_argument("--max-errors", type=int, default=50, metavar="N", help="bad rows to list (default: 50)")
    check.add_argument("--policy", choices=("error", "skip"), default="error",
                       help="whether rows that cannot be used are errors, or are skipped and warned of")  # fmt: skip
    check.add_argument("--report", type=Path, metavar="R.json", help="write everything that was found")
    check.add_argument("--model", metavar="M", help="count tokens as this model's tokenizer makes them")
    check.add_argument("--chat-template", metavar="NAME", help="with --model: another chat template than its own")
    check.add_argument("--max-length", type=int, metavar="N", help="with --model: the limit, in tokens")
    check.add_argument("--strict", action="store_true", help="warnings are refused as well")
    check.add_argument("--fix", type=Path, metavar="OUT", help="write a repaired copy")
    check.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another threshold")
    check.add_argument("--processes", type=int, metavar="N", help="processes for large JSONL files (default: as cores)")
    check.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    from posttrain.data.doctor.check import check
    from posttrain.data.doctor.repair import check_target, repair
    from posttrain.data.doctor.settings import parse_settings
    from posttrain.errors import ConfigError

    data, settings = _data_settings(options), parse_settings(options.set)
    if options.max_length is not None and options.model is None:
        raise ConfigError("--max-length counts tokens, so it needs --model", hint="--model PATH-OR-NAME")
    _refuse_sources(options)
    if options.fix:
        check_target([*options.files, *([options.val] if options.val else [])], options.fix)
    common: dict[str, Any] = {
        "val": options.val,
        "data": data,
        "settings": settings,
        "tokenizer": _tokenizer(options),
        "max_errors": options.max_errors,
        "processes": _processes(options.processes),
        "progress": not (options.quiet or options.json),
    }
    found = check(options.files, **common)
    document = found.to_dict()
    if not options.json:
        _print(found, options)
    if options.fix and found.is_unread:
        document["fix"] = None
        print(f"--fix {options.fix} was not written: the rest of a file cannot be read, and a copy would lack it\n"
              "  = mend that place first", file=sys.stderr)  # fmt: skip
    elif options.fix:
        document["fix"] = {
            "path": str(options.fix), **repair(options.files, options.fix, data, common["tokenizer"])
        }  # fmt: skip
        found = (
            check([str(options.fix)], **{**common, "data": _without_names(data)})
            if document["fix"]["written"]
            else found
        )
        document["fixed"] = found.to_dict()
        if not options.json:
            _print_fix(document["fix"], found)
    document["refused"] = bool(found.errors or (options.strict and found.warnings))
    if options.report:
        _write_report(options.report, document)
    if options.json:
        print(json.dumps(document, allow_nan=False, ensure_ascii=False))
    return 3 if document["refused"] else 0


def _data_settings(options: argparse.Namespace) -> DataSettings:
    from posttrain.data.columns import parse_names
    from posttrain.data.formats import all_formats, choose
    from posttrain.data.settings import DataSettings

    choose(options.format, all_formats(options.text_field))
    return DataSettings(
        format=options.format,
        text_field=options.text_field,
        column_map=parse_names(options.map),
        on_bad_row=options.policy,
        max_length=options.max_length,
        chat_template=options.chat_template,
    )


def _without_names(data: DataSettings) -> DataSettings:
    """For the repaired copy, whose columns have their new names."""
    import dataclasses

    return dataclasses.replace(data, column_map={})


def _refuse_sources(options: argparse.Namespace) -> None:
    """A report is not written over what is checked."""
    from posttrain.errors import ConfigError

    for name in [*options.files, *([options.val] if options.val else [])]:
        there = options.report is not None and options.report.exists() and os.path.exists(name)
        if there and os.path.samefile(name, options.report):
            raise ConfigError(f"--report {options.report} is what is checked", hint="name another file")


def _processes(asked: int | None) -> int:
    if asked is not None:
        return max(1, asked)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, MAX_PROCESSES)


def _tokenizer(options: argparse.Namespace) -> Any:
    if options.model is None:
        return None
    from posttrain.models.load import load_tokenizer

    return load_tokenizer(options.model)


def _print(found: CheckReport, options: argparse.Namespace) -> None:
    from posttrain.data.doctor.findings import rows
    from posttrain.data.report import number

    names = ", ".join(Path(name).name or name for name in found.sources)
    unusable = found.rows - found.usable
    usable = f": {number(found.usable)} usable, {number(unusable)} not" if unusable else ""
    print(f"{'✔' if found.rows and not unusable else '!'} data     {names} {rows(found.rows)}{usable}")
    for described, count in list(found.formats.items())[:3]:
        print(f"           {described}" + (f" ({number(count)})" if len(found.formats) > 1 else ""))
    if found.usable:
        print(f"✔ length   {found.lengths.in_words()}")
    if len(found.languages) > 1 or options.verbose:
        parts = ", ".join(f"{name} {number(count)}" for name, count in list(found.languages.items())[:5])
        print(f"✔ language {parts or 'none told'} (a guess, by script and frequent words)")
    if found.labels:
        print(f"✔ labels   {number(found.labels['good'])} good, {number(found.labels['bad'])} bad")
    if found.validation:
        about = found.validation
        print(f"✔ val      {Path(about['source']).name} {rows(about['rows'])}: {number(about['usable'])} usable")
    for item in found.findings:
        _print_finding(item, found, options)
    counts = f"{_several(found.errors, 'error')}, {_several(found.warnings, 'warning')}"
    sign = "✔" if not (found.errors or found.warnings) else "!"
    print(f"{sign} checked  {counts} in {found.seconds:.1f} s")


def _print_finding(item: Any, found: CheckReport, options: argparse.Namespace) -> None:
    first = f" (first: {', '.join(item.first[: 5 if options.verbose else 2])})" if item.first else ""
    print(f"{SIGNS[item.severity]}{item.code} {item.sentence}{first}")
    bad = [bad for bad in found.bad_rows if bad["code"] == item.code]
    for row in bad[: len(bad) if options.verbose else 1]:
        print("  " + str(row["message"]).replace("\n", "\n  "))
    details = item.details.get("shown") or item.details.get("pairs") or []
    for line in details[: 5 if options.verbose else 1]:
        print(f"  | {line}")
    print(f"  = {_named(item.fix, options)}")


def _named(fix: str, options: argparse.Namespace) -> str:
    """The way out as it can be typed."""
    import shlex

    return fix.replace("FILE", shlex.join(options.files)) if "FILE" in fix else fix


def _print_fix(counts: dict[str, Any], found: CheckReport) -> None:
    from posttrain.data.doctor.findings import rows
    from posttrain.data.doctor.repair import RULES
    from posttrain.data.report import number

    changed = "; ".join(f"{what}: {number(counts[rule])}" for rule, what in RULES.items() if counts[rule])
    written = f"{counts['path']} {rows(counts['written'])} written"
    print(f"✔ fixed    {written}: {changed or 'nothing had to be changed'}")
    if counts["written"]:
        print(f"{'!' if found.errors else '✔'} again    {_several(found.errors, 'error')}, "
              f"{_several(found.warnings, 'warning')} in the copy")  # fmt: skip


def _several(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _write_report(path: Path, document: dict[str, Any]) -> None:
    """Beside it and renamed, so that a report is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        temporary.write_text(
            text + "\n", "utf-8", errors="backslashreplace"
        )  # half of a surrogate pair, as JSON says it
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"report in {path}", file=sys.stderr)
