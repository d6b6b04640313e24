"""`posttrain reward test`: a reward tried before it is trusted."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from posttrain.commands import EXIT_CODES
from posttrain.commands.reading import whole_number

if TYPE_CHECKING:
    from posttrain.rewards.check import Report

ABOUT = "try a reward on right, wrong, empty, huge and hostile completions, and on samples of a model"
WIDTH = 34


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    reward = commands.add_parser("reward", help="try rewards before training with them")
    verbs = reward.add_subparsers(title="verbs", required=True, metavar="VERB")
    test = verbs.add_parser("test", parents=[common], help=ABOUT, description=ABOUT, epilog=EXIT_CODES)
    test.add_argument("reward", metavar="FILE.py|NAME", help="a file with a reward function (it is run: it must be "
                      "yours), package.module:function, or a name such as numeric_answer")  # fmt: skip
    test.add_argument("--data", required=True, metavar="FILE", help="rows with a `prompt` and what the reward needs")
    test.add_argument("--function", metavar="NAME", help="which function of FILE.py, where there are several")
    test.add_argument("--gold", metavar="COLUMN", help="column of right answers (default: ground_truth, answer, "
                      "solution or completion); none: the reward judges form, do not ask for more")  # fmt: skip
    test.add_argument("--as", dest="form", metavar="TEXT", help="how right answers are written, e.g. 'Answer: {gold}' "
                      "(default: a few usual forms are tried)")  # fmt: skip
    test.add_argument("--map", action="append", default=[], metavar="COLUMN=NAME,...",
                      help="rename columns first, e.g. question=prompt")  # fmt: skip
    test.add_argument("--rows", type=whole_number, default=64, metavar="N", help="rows to try (default: 64)")
    test.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds that a call may take (60)")
    test.add_argument("--model", metavar="M", help="sample completions of this model as well")
    test.add_argument("--prompts", type=whole_number, default=8, metavar="N", help="with --model: prompts (8)")
    test.add_argument("--num-generations", type=whole_number, default=8, metavar="N", help="samples of each (8)")
    test.add_argument(
        "--max-completion-length", type=whole_number, default=256, metavar="N", help="tokens of one (256)"
    )
    test.add_argument("--temperature", type=float, default=1.0, metavar="T", help="of the samples (1.0)")
    test.add_argument("--seed", type=whole_number, default=0, metavar="N", help="of the samples (0)")
    test.set_defaults(command=_test)


def _test(options: argparse.Namespace) -> int:
    from posttrain.runner.reward_test import Samples, try_on_data

    samples = None
    if options.model is not None:
        samples = Samples(options.model, options.prompts, options.num_generations, options.max_completion_length,
                          options.temperature, options.seed)  # fmt: skip
    name, report = try_on_data(
        options.reward, options.data, options.function, options.gold, options.form, options.map, options.rows,
        options.timeout, samples,
    )  # fmt: skip
    if options.json:
        print(json.dumps({"reward": name, **report.to_dict()}))
    else:
        _say(name, report, options.quiet)
    return 0 if report.passed else 1


def _say(name: str, report: Report, quiet: bool) -> None:
    if not quiet:
        print(f"reward {name}")
        for trial in report.trials:
            each = 1000 * trial.seconds / max(1, len(trial.rewards))
            print(f"  {trial.name:{WIDTH}} {_values(trial)}  {each:.3g} ms each")
        if (found := report.separation) is not None:
            print(f"  right above wrong in {found.share:.1%} of {found.rows} rows (a tie counts half), {found.form}")
        if (signal := report.signal) is not None:
            print(f"  {signal.with_signal} of {signal.groups} groups of {signal.size} samples would have a signal")
    for warning in report.warnings:
        print(f"! {warning}", file=sys.stderr)
    for error in report.errors:
        print(f"✘ {error}", file=sys.stderr)
    reasons = "the reason" if len(report.errors) == 1 else f"the {len(report.errors)} reasons"
    print(f"✔ passed   {name}" if report.passed else f"✘ failed   {name}, for {reasons} above")


def _values(trial: Any) -> str:
    if trial.error is not None:
        return f"{'failed':32}"
    if not trial.said:
        return f"{'says nothing':32}"
    low, high = min(trial.said), max(trial.said)
    spread = f"{low:g} to {high:g}, mean {trial.mean:.4g}" if low != high else f"{low:g}"
    silent = len(trial.rewards) - len(trial.said)
    return f"{spread + (f' ({silent} unsaid)' if silent else ''):32}"
