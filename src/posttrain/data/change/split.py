"""A part of the rows held out, so that nothing in it was trained on."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.data.change.dedup import open_sketches
from posttrain.data.change.reading import SKIPPED, Reading, Skipped, hashed
from posttrain.data.codes import Row
from posttrain.data.doctor.compare import is_greeting
from posttrain.data.doctor.content import TURN, Said, earlier_answers
from posttrain.data.doctor.sketches import shingles
from posttrain.data.settings import DataSettings
from posttrain.data.writing import write_rows
from posttrain.errors import ConfigError, DataError


def split(
    source: Any,
    share: float,
    seed: int,
    folder: Path,
    settings: DataSettings,
    by_group: str | None = None,
    skipped: Skipped | None = None,
    near: float | None = None,
) -> dict[str, int]:
    """Rows as they are into `train.jsonl` and `val.jsonl` of `folder`, about `share` of them into the second: whole
    groups, so that rows with the same prompt (or the same value in column `by_group`) are never on both sides, in
    whatever format they are; nor are a conversation and one that goes on from its prompt, nor two that begin with the
    same exchange and part then. With `near`, a similarity, rows that nearly say the same are not either.

    The rows are read three times, once more for `near`; in memory lie 24 bytes of each, and 16 of each of the
    assistant's earlier turns; a quarter of a kilobyte of each for `near`."""
    if not 0 < share < 1:
        raise ConfigError(f"--val {share} is no share", hint="a number between 0 and 1, e.g. 0.1")
    reading = Reading(source, settings, skipped)
    keys = _by_prompt(reading) if by_group is None else _by_column(reading, by_group, settings)
    num_near = 0
    if near is not None:
        keys, num_near = _with_near(keys, reading, near)
    held_out = _groups_to_hold_out(keys, share, seed)
    groups = len(np.unique(keys))
    if not 0 < len(held_out) < groups:
        hint = "every row belongs to one group" if groups == 1 else "take another share"
        raise DataError(f"{source}: {len(keys)} rows cannot be split so", hint=hint, code="E-DATA-0053")
    chosen = np.isin(keys, held_out)
    counts = {}
    for name, wanted in (("train", False), ("val", True)):
        rows = (row for (_, row, _), is_held in zip(reading.said(), chosen, strict=True) if is_held == wanted)
        counts[name] = write_rows(folder / f"{name}.jsonl", rows)
    joined = {} if near is None else {"near": num_near}
    return {**counts, "groups": groups, **joined, SKIPPED: reading.skipped}


def _by_column(reading: Reading, by_group: str, settings: DataSettings) -> np.ndarray:
    return np.array([_value(row, by_group, settings) for _, row, _ in reading.said()], dtype=np.uint64)


def _value(row: Row, by_group: str, settings: DataSettings) -> int:
    old_names = {new: old for old, new in settings.column_map.items()}
    column = by_group if by_group in row else old_names.get(by_group, by_group)
    if column not in row:
        raise ConfigError(f"--by-group {by_group!r}: a row has no such column", hint=f"it has {', '.join(row)}")
    return hashed(json.dumps(row[column], sort_keys=True, default=str))


def _by_prompt(reading: Reading) -> np.ndarray:
    """A group for each row: the first of its prefixes that ties it to others. A prompt does that some row asks last,
    and an exchange does, with all before it, that is no greeting. Rows that share such a prefix share all before it, so
    that it is the first for each of them."""
    prefixes, last = array("Q"), array("Q")
    for _, _, said in reading.said():
        prefixes.extend(_prefixes(said))
        last.append(len(prefixes) - 1)
    if not last:
        return np.arange(0)
    keys, ends = np.frombuffer(prefixes, dtype=np.uint64), np.frombuffer(last, dtype=np.uint64).astype(np.int64)
    begins = np.concatenate([[0], ends[:-1] + 1])
    is_exchange = (np.arange(len(keys)) - np.repeat(begins, ends + 1 - begins)) % 2 == 1
    ties = ~is_exchange & np.isin(keys, keys[ends])
    ties[is_exchange] = ~is_greeting(keys[is_exchange], len(ends))
    tying = np.flatnonzero(ties)
    return keys[tying[np.searchsorted(tying, begins)]]


def _prefixes(said: Said) -> Iterator[int]:
    """What stands before each of the assistant's turns, and up to the end of each but the last, in order, as numbers:
    a prompt, an exchange, a prompt, ...; the row's prompt comes last. White space is folded: two prompts that differ in
    nothing else are nearly the same question, and on one side they do no harm."""
    prompt = said.prompt or "".join(said.answers)
    before, done = blake2b(digest_size=8), 0
    for end in (*(edge for turn in earlier_answers(said.prompt) for edge in turn), len(prompt)):
        before.update(" ".join(prompt[done:end].split()).encode("utf-8", "surrogatepass") + b"\0")
        yield int.from_bytes(before.digest(), "big")
        done = end


def _with_near(keys: np.ndarray, reading: Reading, similarity: float) -> tuple[np.ndarray, int]:
    """`keys` with one key for groups of which rows nearly say the same, and how many rows nearly say what an earlier
    one does. They are compared as the check compares validation data with training data (doctor/near.py)."""
    sketches = open_sketches(similarity)
    settings = sketches.settings
    texts = (TURN.join((said.prompt, *said.answers)) for _, _, said in reading.said())
    alike = sketches.earlier(sketches.of(shingles(settings.cut(text), settings.near_words) for text in texts))
    near = np.flatnonzero(alike >= 0)
    groups, group_of = np.unique(keys, return_inverse=True)
    joined_to = list(range(len(groups)))

    def root(group: int) -> int:
        while joined_to[group] != group:
            joined_to[group] = group = joined_to[joined_to[group]]
        return group

    for one, other in zip(group_of[near].tolist(), group_of[alike[near]].tolist(), strict=True):
        joined_to[root(one)] = root(other)
    roots = np.array([root(group) for group in range(len(groups))], dtype=np.int64)
    return groups[roots[group_of]], len(near)


def _groups_to_hold_out(keys: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Groups in random order until they have their share of the rows; as near to it as whole groups allow."""
    groups, sizes = np.unique(keys, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(groups))
    reached = np.cumsum(sizes[order])
    count = int(np.argmin(np.abs(reached - share * len(keys)))) + 1 if len(groups) else 0
    return groups[order[:count]]
