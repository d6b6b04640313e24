"""What a folder of data holds: files that are one data set, or splits that must not become one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from posttrain.data.codes import excerpt
from posttrain.errors import DataError

SPLITS = {
    "train": "train", "training": "train",
    "val": "validation", "valid": "validation", "validation": "validation", "dev": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
"""Words in names of files that say what they are for, as on the hub."""
SAVED = "dataset_dict.json"
"""Written by `datasets` beside splits that were saved together."""
MOST_LOOKED_AT = 10_000
"""Entries below a folder that are looked at before a message."""


def split_of(name: str) -> str | None:
    """`train` of `train-00000-of-00002.parquet` and of `math_train.jsonl`; None where the name says nothing."""
    words = re.split(r"[\W\d_]+", name.partition(".")[0].lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def check_one_split(folder: Path, files: list[Path]) -> None:
    """Raises DataError (E-DATA-0151) for files of which some are to be held out: read as one data set they would be
    trained on."""
    if (folder / SAVED).is_file():
        parts = sorted(path for path in folder.iterdir() if (path / "state.json").is_file())
        raise _several(folder, parts or [folder / "SPLIT"], f"splits, saved together ({SAVED})")
    found = {path: split_of(path.name) for path in files}
    held_out = [path for path in files if found[path] not in (None, "train")]
    is_alone = [path for path in held_out if path.name.partition(".")[0].lower() in SPLITS]  # `val.jsonl` beside others
    if len({split for split in found.values() if split}) > 1 or (is_alone and len(held_out) < len(files)):
        names = excerpt(", ".join(path.name for path in files if found[path]))
        raise _several(folder, sorted(files, key=lambda path: path in held_out), f"several splits: {names}")


def _several(folder: Path, parts: list[Path], what: str) -> DataError:
    message = f"{folder}: the folder holds {what}; as one data set, what is held out would be trained on"
    hint = f"name one of them: {parts[0]}"
    if len(parts) > 1:
        hint += f"; and to validate on (--val, dataset.val_path) another: {parts[-1]}"
    return DataError(message, hint=f"{hint}; '{folder}/*' reads all files as one", code="E-DATA-0151")


def subfolders_with_data(folder: Path, is_data: Callable[[Path], bool]) -> list[Path]:
    """The folders in `folder` below which there is a data file; folders are not read through."""
    looked_at = islice(_below(folder), MOST_LOOKED_AT)
    found = {path.relative_to(folder).parts[0] for path in looked_at if is_data(path)}
    return [folder / name for name in sorted(found)]


def _below(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from (path for path in entry.rglob("*") if path.is_file())


def way_into(folder: Path, subfolders: list[Path]) -> str:
    """What to write to have data in subfolders read."""
    first = min(subfolders, key=lambda path: split_of(path.name) != "train")
    return f"name what is meant, e.g. {first}, or all as a pattern: '{folder}/**/*.jsonl'"
