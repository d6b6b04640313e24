"""`posttrain data convert`, `split`, `dedup` and `stats`: a file of examples made into others, and measured."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.commands import EXIT_CODES
from posttrain.commands.reading import (
    add_policy,
    add_reading,
    data_settings,
    open_tokenizer,
    template_name,
    whole_number,
)
from posttrain.commands.skipped import Report

if TYPE_CHECKING:
    from posttrain.data.settings import DataSettings


ARTICLES = {"prompt": "a", "answer": "an", "row": "a"}


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    reading = argparse.ArgumentParser(add_help=False, parents=[common])
    reading.add_argument("file", help="a file of examples, a folder of them, or a name on the hub")
    add_reading(reading)
    add_policy(reading, "what to do with unusable rows")
    reading.add_argument("--report", type=Path, metavar="R.json", help="list the rows that --policy skip leaves out "
                         "(default: beside what is written), and near duplicates")  # fmt: skip
    writing = argparse.ArgumentParser(add_help=False, parents=[reading])
    writing.add_argument("-o", "--out", type=Path, required=True, help="where to write")
    writing.add_argument("--force", action="store_true", help="write over what is there")

    convert = verbs.add_parser("convert", parents=[writing], help="write the rows in another format", epilog=EXIT_CODES)
    convert.add_argument(
        "--to", required=True, metavar="FORMAT", help="messages, prompt-completion, sharegpt or alpaca"
    )
    convert.add_argument("--keep", metavar="WHAT", help="of ratings: desirable (the good ones) or all, unrated; "
                         "of pairs: chosen, or both, rated; of conversations: last, others untrained")  # fmt: skip
    convert.set_defaults(command=_convert)

    split = verbs.add_parser("split", parents=[writing], help="hold a part out", epilog=EXIT_CODES)
    split.add_argument("--val", type=float, default=0.1, metavar="SHARE", help="share of the rows (default: 0.1)")
    split.add_argument("--seed", type=whole_number, default=0)
    split.add_argument("--by-group", metavar="COLUMN", help="rows of one value stay together (default: of one prompt)")
    split.add_argument("--near", action="store_true", help="rows that are nearly the same stay together, too")
    split.add_argument("--similarity", type=float, metavar="S", help="with --near: how near, up to 1 (default: 0.8)")
    split.set_defaults(command=_split)

    dedup = verbs.add_parser("dedup", parents=[writing], help="leave out rows that say the same", epilog=EXIT_CODES)
    dedup.add_argument("--key", choices=("row", "prompt"), default="row", help="what must be the same")
    dedup.add_argument("--near", action="store_true", help="also rows that are nearly the same")
    dedup.add_argument("--similarity", type=float, metavar="S", help="with --near: how near, up to 1 (default: 0.8)")
    dedup.set_defaults(command=_dedup)

    stats = verbs.add_parser("stats", parents=[reading], help="formats, turns and lengths", epilog=EXIT_CODES)
    stats.add_argument("--model", metavar="M", help="count tokens as this model's tokenizer makes them")
    stats.add_argument("--chat-template", metavar="NAME", help="with --model: another chat template than its own")
    stats.set_defaults(command=_stats)


def _settings(options: argparse.Namespace, **more: Any) -> DataSettings:
    return data_settings(options, [options.file], on_bad_row=options.policy, assistant_only=None, **more)


def _convert(options: argparse.Namespace) -> int:
    from posttrain.data.change import convert
    from posttrain.data.change.fix import default_report
    from posttrain.data.writing import check_new_file

    check_new_file(options.out, options.force, [options.file])
    report = Report(options, default_report(options.out), [options.out])
    counts = convert(options.file, options.to, options.out, _settings(options), options.keep, report.skipped)
    return _say(options, counts, report)


def _split(options: argparse.Namespace) -> int:
    from posttrain.data.change import split
    from posttrain.data.writing import check_new_file
    from posttrain.errors import ConfigError

    near = _similarity(options)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"-o {options.out}: no such folder can be made: {error.strerror}") from error
    files = [options.out / name for name in ("train.jsonl", "val.jsonl")]
    for file in files:
        check_new_file(file, options.force, [options.file])
    report = Report(options, options.out / "split.report.json", files)
    counts = split(
        options.file, options.val, options.seed, options.out, _settings(options), options.by_group, report.skipped, near
    )
    ended = _say(options, counts, report)
    if near is None and not options.json:
        print("· near duplicates may stand on both sides: --near keeps them together")
    return ended


def _similarity(options: argparse.Namespace) -> float | None:
    """From which on rows are nearly the same; None where nobody asks."""
    from posttrain.data.doctor.settings import DoctorSettings
    from posttrain.errors import ConfigError

    if not options.near and options.similarity is not None:
        raise ConfigError("--similarity is for near duplicates", hint="--near looks for them")
    default: float = DoctorSettings.near_similarity
    return (default if options.similarity is None else options.similarity) if options.near else None


def _dedup(options: argparse.Namespace) -> int:
    from posttrain.data.change import dedup
    from posttrain.data.change.fix import default_report
    from posttrain.data.writing import check_new_file

    check_new_file(options.out, options.force, [options.file])
    similarity = _similarity(options)
    report = Report(options, default_report(options.out), [options.out])
    by_prompt = options.key == "prompt"
    found = dedup(options.file, options.out, _settings(options), by_prompt, similarity, report.skipped)
    groups = found.pop("groups", None)
    for first, *others in (groups or [])[: 20 if options.verbose else 3] if not options.json else []:
        print(f"  {', '.join(others[:3])}{', ...' if others[3:] else ''} nearly as {first}")
    counts = found if groups is None else {**found, "groups": len(groups)}
    return _say(options, counts, report, {} if groups is None else {"groups": groups})


def _say(
    options: argparse.Namespace, counts: dict[str, int], report: Report, more: dict[str, Any] | None = None
) -> int:
    about = {**counts, "out": str(options.out)}
    report.write({**about, **(more or {})})
    if options.json:
        print(json.dumps({**about, **({"report": str(report.path)} if report.is_written else {})}))
    else:
        words = [f"{count} {name}" for name, count in counts.items() if count or name == "written"]
        print(f"✔ {options.out}: {', '.join(words)}")
        report.say()
    return 0


def _stats(options: argparse.Namespace) -> int:
    from posttrain.data.change import stats
    from posttrain.errors import ConfigError

    report = Report(options)
    if options.chat_template is not None and options.model is None:
        raise ConfigError("--chat-template is what tokens are made with, so it needs --model",
                          hint="--model PATH-OR-NAME")  # fmt: skip
    tokenizer = open_tokenizer(options)
    found = stats(options.file, _settings(options, chat_template=template_name(options)), tokenizer, report.skipped)
    report.write(found)
    if options.json:
        print(json.dumps(found if report.is_written else {**found, "skipped_rows": [*report.rows()]}))
        return 0
    print(f"{options.file}: {found['rows']} rows" + (f", {found['skipped']} skipped" if found["skipped"] else ""))
    for name, rows in found["formats"].items():
        print(f"  {rows} {name}")
    unit = "tokens" if tokenizer else "characters"
    for name, values in found[unit].items():
        if isinstance(values, dict) and values:
            print(
                f"  {unit} of {ARTICLES[name]} {name}: " + ", ".join(f"{key} {value}" for key, value in values.items())
            )
    widest = max((rows for *_, rows in found["histogram"]), default=1)
    for low, high, rows in found["histogram"]:
        print(f"  {low:>7}-{high:<7} {'#' * round(40 * rows / widest):<40} {rows}")
    report.say()
    return 0
