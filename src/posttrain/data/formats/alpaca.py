"""Alpaca: `instruction`, `input`, `output`, and LLaMA-Factory's `system` and `history` (earlier pairs) beside them.

It becomes a conversation (instruction and input in one user message), so that the model's own chat template is trained
and not the prompt of 2023's Alpaca, which no model asks for any more.
"""

from __future__ import annotations

from posttrain.data.codes import AS_TEXT, Row, bad_row, kind
from posttrain.data.formats.build import build, filled_text
from posttrain.types import Example, Message, Origin

SHAPE = "`instruction`, `input`, `output`"
COLUMNS = {"instruction", "input", "output", "history"}
PAIRS = 'earlier turns are pairs: [["the first question", "its answer"], ...]'


def matches(row: Row) -> bool:
    return isinstance(row.get("instruction"), str) and "output" in row


def is_rendered(row: Row) -> bool:
    """Whether a column `text` beside it says the same in the prompt of 2023, as in the data set on the hub."""
    if not matches(row) or not isinstance(text := row.get("text"), str):
        return False
    words = [part for column in ("instruction", "input", "output") if isinstance(part := row.get(column), str)]
    said = "".join(text.split())
    return isinstance(row["output"], str) and all("".join(part.split()) in said for part in words)


def describe(row: Row) -> str:
    """One description for all rows: those without `input`, `system` or `history` are of no other format."""
    rendered = "; `text`, which says the same, is left out (format=text reads it)"
    return "read as Alpaca: columns `instruction`, `input`, `output`, as a conversation" + (
        rendered if is_rendered(row) else ""
    )


def parse(row: Row, origin: Origin) -> Example:
    output = filled_text(row, "output", origin, "E-DATA-0013")
    parts = [row.get("instruction"), row.get("input")]
    if not isinstance(parts[1], str | None):
        raise bad_row("E-DATA-0011", origin, f"is {kind(parts[1])}, not text", field="input", seen=parts[1], row=row,
                      hint=AS_TEXT)  # fmt: skip
    question = "\n\n".join(part for part in parts if isinstance(part, str) and part.strip())
    if not question:
        raise bad_row("E-DATA-0014", origin, "is empty, and so is `input`", field="instruction", row=row)
    prompt = [*_history(row, origin), {"role": "user", "content": question}]
    used = COLUMNS | {"text"} if is_rendered(row) else COLUMNS
    return build(row, origin, prompt, [{"role": "assistant", "content": output}], used)


def _history(row: Row, origin: Origin) -> list[Message]:
    messages: list[Message] = []
    if not isinstance(row.get("history"), list | None):
        what = f"is {kind(row['history'])}, not a list of pairs [question, answer]"
        raise bad_row("E-DATA-0011", origin, what, field="history", seen=row["history"], row=row, hint=PAIRS)
    for i, pair in enumerate(row.get("history") or []):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            what = "is not a pair of texts [question, answer]"
            raise bad_row("E-DATA-0011", origin, what, field=f"history[{i}]", seen=pair, row=row, hint=PAIRS)
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages
