"""Which pairs a reward model was trained on. `reward_training_data.json` lies beside its weights, so that a later
evaluation leaves those pairs out: what was learned by heart proves nothing.

A pair is known by a hash of its tokens alone, whatever its margin and wherever its prompt ends.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from posttrain.errors import ConfigError
from posttrain.evaluate.validation import write_whole
from posttrain.types import Sample

NAME = "reward_training_data.json"
SCHEMA = 1
DIGITS = 24
"""96 bits of each hash: a million pairs are 27 MB, and no two of them share one."""


def pair_hash(sample: Sample) -> str:
    """Of the better answer and of the worse one, each with its prompt."""
    digest = hashlib.sha256()
    (pair,) = sample
    for branch in pair.branches:
        ids = np.concatenate([np.asarray(pair.prefix, dtype=np.int64), np.asarray(branch.ids, dtype=np.int64)])
        digest.update(len(ids).to_bytes(4, "little"))
        digest.update(ids.tobytes())
    return digest.hexdigest()[:DIGITS]


def held_out(samples: Sequence[Sample], learned: Collection[str]) -> list[int]:
    """Places of the pairs that are not among the `learned`; of those that are repeated the first."""
    first: dict[str, int] = {}
    for place, sample in enumerate(samples):
        first.setdefault(pair_hash(sample), place)
    return [place for key, place in first.items() if key not in learned]


def write_learned(learned: Collection[str], folder: Path) -> None:
    said = {"schema_version": SCHEMA, "pairs": sorted(learned)}
    write_whole(folder / NAME, json.dumps(said, separators=(",", ":")) + "\n")


def read_learned(folder: Path) -> set[str] | None:
    """None where the folder does not say. Raises ConfigError for a file that cannot be read."""
    path = folder / NAME
    if not path.is_file():
        return None
    way_out = "save the reward model again, or delete the file if you are sure of what is held out"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint=way_out) from None
    pairs = said.get("pairs") if isinstance(said, dict) and said.get("schema_version") == SCHEMA else None
    if not isinstance(pairs, list) or not all(isinstance(one, str) for one in pairs):
        raise ConfigError(f"{path} is no list of pairs of schema {SCHEMA}", hint=way_out)
    return set(pairs)
