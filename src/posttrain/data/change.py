"""Files of examples made into others: another format, a part held out, without duplicates; and what they are made of.

All read rows as training does, so what cannot be trained on is named here too. Rows are compared by what they say, not
by how they are written: prompts and answers in canonical form, white space at their ends and repeats of it apart.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.codes import Row, bad_row
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.writing import write_rows
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Message, Origin

SKIPPED = "skipped"


@dataclass
class Reading:
    """The rows of `source` with what they say; unusable ones raise, or are counted where `policy` is skip."""

    source: Any
    settings: DataSettings
    skipped: int = 0

    def rows(self) -> Iterator[tuple[Origin, Row]]:
        return read_rows(self.source, reject=self._reject)

    def said(self) -> Iterator[tuple[Row, Said]]:
        reader = RowReader(self.settings)
        self.skipped = 0
        for origin, row in self.rows():
            try:
                yield row, reader.read(row, origin)
            except DataError as error:
                self._reject(error, origin)

    def examples(self) -> Iterator[Example]:
        reader = RowReader(self.settings)
        self.skipped = 0
        for origin, row in self.rows():
            try:
                yield reader.example(row, origin)
            except DataError as error:
                self._reject(error, origin)

    def _reject(self, error: DataError, _: Origin) -> None:
        if self.settings.on_bad_row == "error":
            raise error
        self.skipped += 1


# --- convert --------------------------------------------------------------------------------------------------------


def convert(source: Any, to: str, out: Path, settings: DataSettings) -> dict[str, int]:
    """Write the rows of `source` in the format `to`. A row that the format cannot hold raises DataError (E-DATA-0052),
    or is skipped with the others."""
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is no format to write", hint=f"known: {', '.join(TARGETS)}")
    reading = Reading(source, settings)

    def converted() -> Iterator[Row]:
        for example in reading.examples():
            try:
                yield {**TARGETS[to](example), **_others(example)}
            except DataError as error:
                reading._reject(error, example.origin)

    return {"written": write_rows(out, converted()), SKIPPED: reading.skipped}


def _others(example: Example) -> Row:
    """Tools, template arguments and the user's own columns go along."""
    extra: Row = {"tools": example.tools} if example.tools else {}
    if example.template_kwargs:
        extra["chat_template_kwargs"] = dict(example.template_kwargs)
    return {**extra, **{name: value for name, value in example.columns.items() if value is not None}}


def _messages(example: Example) -> list[Message]:
    """All of a supervised example as one conversation. Plain text has no turns."""
    if len(example.completions) != 1:
        raise _cannot(example, "pairs of answers are no supervised examples")
    prompt, completion = example.prompt, example.completions[0]
    if isinstance(completion, str) and prompt is None:
        raise _cannot(example, "plain text has no turns")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
    return [*before, *after]


def _cannot(example: Example, why: str) -> DataError:
    return bad_row("E-DATA-0052", example.origin, f"cannot be written so: {why}", hint="choose another format")


def _to_messages(example: Example) -> Row:
    return {"messages": _messages(example)}


def _to_prompt_completion(example: Example) -> Row:
    """Text stays text; a conversation is cut before its last assistant turn."""
    if isinstance(example.prompt, str) and isinstance(example.completions[0], str):
        return {"prompt": example.prompt, "completion": example.completions[0]}
    messages = _messages(example)
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
    if last == 0:
        raise _cannot(example, "nothing stands before an answer of the assistant")
    return {"prompt": messages[:last], "completion": messages[last:]}


TO_SHAREGPT = {"user": "human", "assistant": "gpt", "tool": "observation"}


def _to_sharegpt(example: Example) -> Row:
    turns: list[Row] = []
    for message in _messages(example):
        flags: Row = {key: message[key] for key in ("train", "train_detail") if key in message}
        calls, content = message.get("tool_calls"), message.get("content")
        unknown = set(message) - {"role", "content", "tool_calls", "name", "tool_call_id", *flags}
        if unknown:
            raise _cannot(example, f"ShareGPT has no place for {', '.join(sorted(unknown))}")
        if content or not calls:
            turns.append({"from": TO_SHAREGPT.get(message["role"], message["role"]), "value": content or "", **flags})
        if calls:
            functions = [call.get("function", call) for call in calls]
            value = functions[0] if len(functions) == 1 else functions
            whole = {key: flag for key, flag in flags.items() if key == "train"}  # a call's text has no ranges
            turns.append({"from": "function_call", "value": json.dumps(value, ensure_ascii=False), **whole})
    return {"conversations": turns}


def _to_alpaca(example: Example) -> Row:
    """`instruction` and `output`; earlier pairs become `history`, a system message `system`."""
    messages = _messages(example)
    plain = all(set(m) <= {"role", "content"} and isinstance(m.get("content"), str) for m in messages)
    if not plain:
        raise _cannot(example, "Alpaca has no place for tool calls, flags or thoughts")
    row: Row = {}
    if messages[0]["role"] == "system":
        row["system"] = messages[0]["content"]
        messages = messages[1:]
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise _cannot(example, "Alpaca wants the user and the assistant in turns")
    texts = [message["content"] for message in messages]
    pairs = [[question, answer] for question, answer in zip(texts[::2], texts[1::2], strict=True)]
    row |= {"instruction": pairs[-1][0], "input": "", "output": pairs[-1][1]}
    return {**row, "history": pairs[:-1]} if len(pairs) > 1 else row


TARGETS: dict[str, Callable[[Example], Row]] = {
    "messages": _to_messages,
    "chatml": _to_messages,
    "prompt-completion": _to_prompt_completion,
    "sharegpt": _to_sharegpt,
    "alpaca": _to_alpaca,
}


# --- split and dedup ------------------------------------------------------------------------------------------------


def split(
    source: Any, share: float, seed: int, folder: Path, settings: DataSettings, by_group: str | None = None
) -> dict[str, int]:
    """Rows as they are into `train.jsonl` and `val.jsonl` of `folder`, about `share` of them into the second: whole
    groups, so that rows with the same prompt (or the same value in column `by_group`) are never on both sides.

    The rows are read twice; in memory lie eight bytes of each."""
    if not 0 < share < 1:
        raise ConfigError(f"--val {share} is no share", hint="a number between 0 and 1, e.g. 0.1")
    reading = Reading(source, settings)
    keys = np.array([_group(row, said, by_group) for row, said in reading.said()], dtype=np.uint64)
    held_out = _groups_to_hold_out(keys, share, seed)
    groups = len(np.unique(keys))
    if not 0 < len(held_out) < groups:
        hint = "every row belongs to one group" if groups == 1 else "take another share"
        raise DataError(f"{source}: {len(keys)} rows cannot be split so", hint=hint, code="E-DATA-0053")
    chosen = np.isin(keys, held_out)
    counts = {}
    for name, wanted in (("train", False), ("val", True)):
        rows = (row for (row, _), is_held in zip(reading.said(), chosen, strict=True) if is_held == wanted)
        counts[name] = write_rows(folder / f"{name}.jsonl", rows)
    return {**counts, "groups": groups, SKIPPED: reading.skipped}


def _group(row: Row, said: Said, by_group: str | None) -> int:
    if by_group is None:
        return _hash(said.prompt or "".join(said.answers))
    if by_group not in row:
        raise ConfigError(f"--by-group {by_group!r}: a row has no such column", hint=f"it has {', '.join(row)}")
    return _hash(json.dumps(row[by_group], sort_keys=True, default=str))


def _groups_to_hold_out(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Groups in random order until they have their share of the rows; as near to it as whole groups allow."""
    groups, sizes = np.unique(keys, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    reached = np.cumsum(sizes[order])
    count = int(np.argmin(np.abs(reached - share * len(keys)))) + 1 if len(groups) else 0
    return groups[order[:count]]


def dedup(source: Any, out: Path, settings: DataSettings, by_prompt: bool = False) -> dict[str, int]:
    """Rows as they are, without those that say what one before them says (or ask it, with `by_prompt`)."""
    reading, seen, dropped = Reading(source, settings), set[int](), 0

    def first_ones() -> Iterator[Row]:
        nonlocal dropped
        for row, said in reading.said():
            rest = () if by_prompt else (*said.answers, str(said.label), said.rest)
            key = _hash(said.prompt, *rest)
            if key in seen:
                dropped += 1
                continue
            seen.add(key)
            yield row

    return {"written": write_rows(out, first_ones()), "dropped": dropped, SKIPPED: reading.skipped}


def _hash(*texts: str) -> int:
    """64 bits of the texts, white space apart."""
    plain = "\0".join(" ".join(text.split()) for text in texts)
    return int.from_bytes(hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


# --- stats ----------------------------------------------------------------------------------------------------------

PERCENTILES = (0, 5, 25, 50, 75, 95, 99, 100)


def stats(source: Any, settings: DataSettings, tokenizer: Any = None) -> dict[str, Any]:
    """Rows by format, turns, and lengths of prompts, answers and whole rows: in characters, and with a tokenizer in
    tokens as training makes them."""
    reading = Reading(source, settings)
    formats: Counter[str] = Counter()
    turns: Counter[int] = Counter()
    lengths: dict[str, list[int]] = {"prompt": [], "answer": [], "row": []}
    for _, said in reading.said():
        formats[said.format] += 1
        turns[said.prompt.count("\r\t\r") + 1] += 1
        lengths["prompt"].append(len(said.prompt))
        lengths["answer"] += [len(answer) for answer in said.answers]
        lengths["row"].append(said.length)
    result: dict[str, Any] = {
        "rows": sum(formats.values()),
        SKIPPED: reading.skipped,
        "formats": dict(formats),
        "turns": {str(count): rows for count, rows in sorted(turns.items())},
        "characters": {name: _percentiles(values) for name, values in lengths.items()},
    }
    if tokenizer is not None:
        from posttrain.data.prepare import prepare

        prepared = prepare(source, tokenizer, settings)
        counts = [part.num_tokens for sample in prepared.samples for part in sample]
        result["tokens"] = {"row": _percentiles(counts), "total": sum(counts), "trained": prepared.report.supervised}
        lengths["tokens"] = counts
    result["histogram"] = _histogram(lengths.get("tokens") or lengths["row"])
    return result


def _percentiles(values: list[int]) -> dict[str, int]:
    if not values:
        return {}
    found = np.percentile(values, PERCENTILES, method="nearest")
    return {f"p{percent}": int(value) for percent, value in zip(PERCENTILES, found, strict=True)}


def _histogram(values: list[int], bins: int = 12) -> list[list[int]]:
    """`[from, to, rows]` of each bin, up to the 99th percentile; the rest is in the last."""
    if not values:
        return []
    array = np.array(values)
    high = max(int(np.percentile(array, 99)), int(array.min()) + 1)
    counts, edges = np.histogram(np.minimum(array, high), bins=bins, range=(int(array.min()), high))
    return [[int(a), int(b), int(n)] for a, b, n in zip(edges, edges[1:], counts, strict=False)]
