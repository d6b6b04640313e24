"""What to rename where a row is of no known format: columns by their usual names in other people's files, as a map that
has been tried on the row, so that the hint works as it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from posttrain.data.codes import Row

QUESTION = ("instruction", "question", "query", "problem", "input", "prompt")
ANSWER = ("response", "answer", "output", "completion", "solution")
SYSTEM = ("system_prompt", "system_message")
CONTEXT = ("context",)
PAIRS = (("chosen", "rejected"), ("response_j", "response_k"), ("chosen_response", "rejected_response"),
         ("response_chosen", "response_rejected"))  # fmt: skip
"""The better answer and the worse one."""
ALONE = {
    "conversation": ("messages", "conversations"),
    "dialog": ("messages", "conversations"),
    "dialogue": ("messages", "conversations"),
    "content": ("text",),
}
"""Columns that are a whole example, and what they may be called."""


def likely_names(row: Row, reads: Callable[[Row], bool]) -> dict[str, str]:
    """The names, old to new, under which `row` is read, as `reads` says of a row; none where nothing likely is."""
    columns = [column for column, value in row.items() if value is not None]
    for names in _guesses(columns):
        new = {names.get(column, column): value for column, value in row.items()}
        if names and len(new) == len(row) and reads(new):
            return names
    return {}


def _guesses(columns: list[str]) -> Iterator[dict[str, str]]:
    """What holds most of the columns comes first."""
    question, answer = _first(QUESTION, columns), _first(ANSWER, columns)
    system, context = _first(SYSTEM, columns), _first(CONTEXT, columns)
    if question:
        for good, bad in PAIRS:
            if good in columns and bad in columns:
                yield _names((question, "prompt"), (good, "chosen"), (bad, "rejected"))
    if question and answer:
        if question == "instruction" or system or context:
            yield _names((question, "instruction"), (context, "input"), (answer, "output"), (system, "system"))
        yield _names((question, "prompt"), (answer, "completion"))
    for column, targets in ALONE.items():
        for target in targets if column in columns else ():
            yield _names((column, target))


def _first(known: tuple[str, ...], columns: list[str]) -> str | None:
    return next((name for name in known if name in columns), None)


def _names(*pairs: tuple[str | None, str]) -> dict[str, str]:
    return {old: new for old, new in pairs if old is not None and old != new}
