"""Code with unit tests: the program in a completion passes its row's tests.

What a model writes is never trusted. It runs in one sandbox, its tests in another; the tests call the program's
functions through a pipe and see plain values, so that a program cannot read its tests, change what `assert` means, or
return something that claims to equal everything (sandbox/). Where there is no sandbox the reward refuses to run.

Tests are Python: a text of assertions, or a list of texts; `check(candidate)` with the column `entry_point` as in
HumanEval. Names that they use and neither define nor import are the program's. Objects of the program's own classes can
be called, asked for attributes and items, and read as text; they are equal to themselves alone. The program is what
stands in the last Python block of the completion, or all of it where there is no block; it has Python's own library.

Left out: other languages, packages, and tests by input and output.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.deadline import Shares
from posttrain.rewards.functions import RewardError, RewardFunction, text_of
from posttrain.rewards.sandbox.run import Limits, NotStarted, Verdict, examine
from posttrain.rewards.sandbox.walls import require
from posttrain.types import Content

logger = logging.getLogger("posttrain")
BLOCK = re.compile(r"```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL | re.IGNORECASE)
LONGEST = 1_000_000
ATTEMPTS = 3
ALMOST = 0.9
"""Of its time: what has used as much and not passed was ended by it."""


def code(
    column: str = "tests", seconds: float = 10.0, megabytes: int = 512, i_accept_unsandboxed_code: bool = False
) -> RewardFunction:
    """1.0 where the program passes all tests of its row's `column` within `seconds` and `megabytes`, else 0.0; None
    where a row has no tests, or where so many programs run for ever that there was no time left for this one.

    `i_accept_unsandboxed_code` runs it without a sandbox: what a model wrote can then read, change and send whatever
    you can. Raises ConfigError where there is no sandbox and this was not said."""
    if not (seconds > 0 and megabytes >= 64):
        raise ConfigError(
            f"code(seconds={seconds}, megabytes={megabytes}): seconds must be above 0, megabytes 64 or more"
        )
    limits = Limits(seconds, megabytes)

    def code_tests(completions: Sequence[Content], **columns: Any) -> list[float | None]:
        if not i_accept_unsandboxed_code:
            require()
        if column not in columns:
            raise ConfigError(f"reward function 'code_tests' finds no tests: the data has no column {column}",
                              hint='name it: code(column="test_list")')  # fmt: skip
        entries = columns.get("entry_point") or [None] * len(completions)
        texts = [text_of(content) for content in completions]
        tests = [_tests(one, entry) for one, entry in zip(columns[column], entries, strict=True)]
        at_once = min(8, os.cpu_count() or 1)
        shares, shortened = Shares(limits.seconds, sum(map(bool, tests)), at_once), []

        def judged(number: int) -> float | None:
            if not tests[number]:
                return None
            if len(texts[number]) > LONGEST:
                return 0.0
            within = replace(limits, seconds=shares.next())
            started = time.monotonic()
            verdict = _examined(program_of(texts[number]), tests[number], within, not i_accept_unsandboxed_code)
            took_all = time.monotonic() - started >= ALMOST * within.seconds
            if verdict.passed != verdict.of and within.seconds < limits.seconds and took_all:
                shortened.append(within.seconds)
                return None
            return float(verdict.passed == verdict.of)

        with ThreadPoolExecutor(max_workers=at_once) as several:
            values = list(several.map(judged, range(len(texts))))
        if shortened:
            said = "reward   code_tests: no time was left for %d of %d programs, ended after %.2g s and not judged"
            logger.warning(said, len(shortened), len(texts), min(shortened))
        return values

    return code_tests


def _examined(text: str, tests: list[str], limits: Limits, is_shut_in: bool) -> Verdict:
    """Raises RewardError where the sandbox does not start, which must not look like a wrong program."""
    for _ in range(ATTEMPTS):
        with suppress(NotStarted):
            return examine(text, tests, limits, is_shut_in)
    raise RewardError(f"code_tests: the sandbox did not start, {ATTEMPTS} times in a row", code="E-REWARD-0005",
                      hint="is bubblewrap (bwrap) still there, and the machine not too busy?")  # fmt: skip


def program_of(text: str) -> str:
    """The last Python block, or the text."""
    blocks = BLOCK.findall(text)
    return str(blocks[-1]) if blocks else text


def _tests(given: Any, entry: Any) -> list[str]:
    """Raises ConfigError for what is no test."""
    texts = [given] if isinstance(given, str) else given
    if texts is None:
        return []
    if not isinstance(texts, list | tuple) or not all(isinstance(one, str) for one in texts):
        raise ConfigError(f"code_tests: a row's tests are {type(given).__name__}, not Python text or a list of texts")
    kept = [one for one in texts if one.strip()]
    if kept and entry and any("def check(" in one for one in kept):
        kept.append(f"check({entry})")
    return kept


code_tests = code()
