"""`posttrain data ...`: look at, check and change files of examples. Each verb is a module of its own."""

from __future__ import annotations

import argparse
from typing import Any

from posttrain.commands import data_change, data_check, data_fix, data_tokens

VERBS: tuple[Any, ...] = (data_check, data_tokens, data_change, data_fix)


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    data = commands.add_parser("data", help="look at, check and change files of examples")
    verbs = data.add_subparsers(title="verbs", required=True, metavar="VERB")
    for verb in VERBS:
        verb.add(verbs, common)
