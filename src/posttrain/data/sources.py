"""Rows from wherever they are: a file, a folder, a glob, the hub, a data set, a list, a mixture of those. Each row
comes with its origin.

A data set on the Hugging Face hub is named `owner/name`, `owner/name:config`, `owner/name@split` or
`owner/name:config@split` (split: train), and loaded by hub.py. A file or folder of that name comes first.
"""

from __future__ import annotations

import difflib
import errno
import glob
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from posttrain.data.codes import Reject, Row, bad_row, excerpt, kind, refuse
from posttrain.data.folders import check_one_split, subfolders_with_data, way_into
from posttrain.data.hub import load_from_hub
from posttrain.data.json_files import read_json, read_json_lines
from posttrain.data.mixing import Mixture, Part, mixed_rows
from posttrain.data.parquet import clean_arrow_row, read_parquet
from posttrain.data.tables import read_csv
from posttrain.data.text_files import read_text
from posttrain.errors import ConfigError, DataError
from posttrain.types import Origin

Rows = Iterator[tuple[Origin, Row]]

READERS: dict[str, Callable[[Path, Reject], Rows]] = {
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".txt": read_text,
}
GZIPPED = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt")
"""Read as they are from `.jsonl.gz` and so on."""
logger = logging.getLogger("posttrain")
PACKED = {".gz": "gunzip", ".zst": "unzstd", ".bz2": "bunzip2", ".xz": "unxz", ".zip": "unzip"}
"""What unpacks files that are not read as they are."""
HUB_NAME = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(:(?P<config>[\w.-]+))?(@(?P<split>[\w.\[\]:%+-]+))?")


def read_rows(source: Any, name: str = "data", reject: Reject = refuse) -> Rows:
    """The rows of `source`. `name` is what rows without a file are called; `reject` is told of each row that cannot be
    read, and by default raises."""
    rejected = 0

    def count(error: DataError, origin: Origin) -> None:
        nonlocal rejected
        rejected += 1
        reject(error, origin)

    num_rows = 0
    for row in _opened(source, name, count):
        num_rows += 1
        yield row
    if num_rows + rejected == 0:
        message = f"{source_name(source, name)}: no rows"
        raise DataError(message, hint="check that it is the right one", code="E-DATA-0006")


def _opened(source: Any, name: str, reject: Reject) -> Rows:
    """The rows; where the system does not let them be read, that is said of the file."""
    try:
        yield from _dispatch(source, name, reject)
    except OSError as error:
        if error.errno == errno.ENOSPC or not isinstance(source, str | Path | Mixture):  # of the user's own making
            raise
        hint = "its rights: ls -l" if isinstance(error, PermissionError) else "whether the disk and the path are sound"
        where = error.filename or source_name(source, name)
        raise DataError(f"{where}: cannot be read: {error.strerror or error}", hint=f"see {hint}") from error


def path_of(source: str | Path) -> Path:
    """`~` is the home folder, also where no shell was asked."""
    path = Path(source)
    return path if path.exists() else Path(os.path.expanduser(path))


def source_name(source: Any, name: str = "data") -> str:
    """What to call the source in messages: the path as given, or `name`."""
    if isinstance(source, Mixture):
        return source.name
    return str(source) if isinstance(source, str | Path) else name


def files_of(source: Any) -> list[Any]:
    """The files of a folder or a glob, each a source of its own; anything else as it is."""
    if not isinstance(source, str | Path) or not str(source):
        return [source]
    try:
        path = path_of(source)
        if path.is_dir() and not _is_saved(path):
            return list(_files_in(path)) or [source]
        if not path.exists() and not hub_name(str(path)) and glob.has_magic(str(path)):
            return _found(str(path)) or [source]
    except OSError:  # said by whoever reads it
        pass
    return [source]


def _dispatch(source: Any, name: str, reject: Reject) -> Rows:
    if isinstance(source, Mixture):

        def read(part: Part, is_again: bool) -> Rows:  # a bad row is told of once, however often its part is read
            return _dispatch(part.source, part.name, _pass_over if is_again else reject)

        return mixed_rows(source, read)
    if isinstance(source, str | Path):
        if not str(source):
            raise DataError("a name of nothing, where a file should be", hint="is a variable of the shell not set?")
        path = path_of(source)
        return _read_path(path, str(path if str(source).startswith("~") else source), reject)
    datasets = sys.modules.get("datasets")  # whoever passes a data set has imported it already
    if datasets is not None and isinstance(source, datasets.Dataset | datasets.IterableDataset):
        return _read_dataset(source, name)
    if datasets is not None and isinstance(source, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise DataError(f"{name} has splits {list(source)}", hint=f'choose one: dataset["{next(iter(source))}"]')
    if isinstance(source, Iterable) and not isinstance(source, Mapping | bytes):
        return _read_objects(source, name, reject)
    raise DataError(
        f"{name}: cannot read rows from {kind(source)}",
        hint="give a path, a datasets.Dataset, a datasets.IterableDataset or a list of dicts",
    )


def _pass_over(error: DataError, origin: Origin) -> None:
    """It was told of before."""


def _read_objects(source: Iterable[Any], name: str, reject: Reject) -> Rows:
    for index, row in enumerate(source):
        origin = Origin(name, index)
        if isinstance(row, Mapping):
            yield origin, dict(row)
        else:
            what = f"is {kind(row)}, not a dict"
            reject(bad_row("E-DATA-0004", origin, what, row=row, hint="each row is a dict of columns"), origin)


def _read_dataset(dataset: Any, name: str) -> Rows:
    if getattr(dataset, "format", {}).get("type") == "custom":
        raise DataError(
            f"{name}: a data set with a transform (`with_transform`) cannot be prepared ahead of training",
            hint="apply the transform with `dataset.map` first",
        )
    plain = dataset.with_format(None)
    if hasattr(dataset, "set_epoch"):  # a stream's order belongs to its pass; the copy has forgotten which it is
        plain.set_epoch(dataset.epoch)
    for index, row in enumerate(plain):
        yield Origin(name, index), clean_arrow_row(row)


def _read_path(path: Path, given: str, reject: Reject) -> Rows:
    if path.is_dir():
        return _read_folder(path, reject)
    if path.is_file():
        return _read_file(path, reject)
    if hub := hub_name(given):
        return _read_dataset(load_from_hub(hub, given), given)
    if glob.has_magic(given) and not path.is_symlink():
        if not (found := _found(given)):
            raise DataError(f"{given}: no file matches this pattern", hint=_there(path.parent) or "check the folder")
        return _read_files(found, given, reject)
    raise _missing(path, given)


def hub_name(given: str, root: Path = Path()) -> re.Match[str] | None:
    """The parts of a name on the hub; None for what names a file, or a folder that is there."""
    is_file_name = (root / given.partition("/")[0]).is_dir() or kind_of(Path(given)) in READERS
    return None if is_file_name else HUB_NAME.fullmatch(given)


def kind_of(path: Path) -> str:
    """The suffix that tells how a file is read: of `a.jsonl.gz` it is `.jsonl`."""
    suffix, inner = path.suffix.lower(), Path(path.stem).suffix.lower()
    return inner if suffix == ".gz" and inner in GZIPPED else suffix


def _read_file(path: Path, reject: Reject) -> Rows:
    if not path.is_file():
        raise _missing(path, str(path))
    reader = READERS.get(kind_of(path))
    if reader is None:
        hint = f"known: {', '.join(READERS)}"
        if program := PACKED.get(path.suffix.lower()):
            hint = f"unpack it first ({program} {shlex.quote(str(path))}); {hint}, and {', '.join(GZIPPED)} as .gz"
        raise DataError(f"{path}: unknown file type {path.suffix!r}", hint=hint)
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty", hint="check that it was written to its end", code="E-DATA-0006")
    return reader(path, reject)


def _read_folder(folder: Path, reject: Reject) -> Rows:
    if _is_saved(folder):
        import datasets

        return _read_dataset(datasets.load_from_disk(str(folder)), str(folder))
    files = _files_in(folder)
    if not files and (below := subfolders_with_data(folder, _is_data)):
        message = f"{folder}: no data file in it, but in its subfolders, which are not read"
        raise DataError(message, hint=way_into(folder, below))
    return _read_files(files, str(folder), reject)


def _is_saved(folder: Path) -> bool:
    """Whether `datasets` wrote it (`save_to_disk`)."""
    return (folder / "state.json").is_file() and any(folder.glob("*.arrow"))


def _files_in(folder: Path) -> list[Path]:
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in entries if not path.is_dir() and _is_data(path)]
    check_one_split(folder, files)
    if files:
        below = subfolders_with_data(folder, _is_data)
        others = tuple(path.name for path in entries if path not in files and path not in below)
        _say_passed_over(folder, others, tuple(below))
    return files


def _is_data(path: Path) -> bool:
    return kind_of(path) in READERS and not _is_report(path)


def _is_report(path: Path) -> bool:
    """Of those that our own commands write beside what they write, by its name."""
    return path.name.endswith(".report.json")


def _found(pattern: str) -> list[Path]:
    return [Path(found) for found in sorted(glob.glob(pattern, recursive=True))]


@lru_cache
def _say_passed_over(folder: Path, names: tuple[str, ...], subfolders: tuple[Path, ...]) -> None:
    """Once, though a folder may be read again and again."""
    if names:
        logger.warning("data     %s: passed over %s, no data of a known type", folder, excerpt(", ".join(names)))
    if subfolders:
        shown, way_out = excerpt(", ".join(path.name for path in subfolders)), way_into(folder, list(subfolders))
        logger.warning("data     %s: subfolders are not read, and %s hold data: %s", folder, shown, way_out)


def _read_files(files: list[Path], given: str, reject: Reject) -> Rows:
    if not files:
        raise DataError(f"{given}: no file of a known type in it", hint=f"known: {', '.join(READERS)}")
    for path in files:
        yield from _read_file(path, reject)


def _missing(path: Path, given: str) -> DataError:
    if path.exists():
        what, hint = "a pipe or a device", "data are read more than once: write them to a file first, and name that"
        if path.is_dir():
            what, hint = "a folder", "name the files in it, or it alone"
        return DataError(f"{given}: no file, but {what}", hint=hint)
    if path.is_symlink():
        return DataError(f"{given}: a link to {os.readlink(path)}, which is not there", hint="mend or delete the link")
    if not path.parent.is_dir():
        return DataError(f"{given}: no such file (there is no folder {path.parent} either)", hint="check the path")
    names = [entry.name for entry in path.parent.iterdir()]
    similar = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    meant = f"did you mean {' or '.join(similar)}?" if similar else _there(path.parent)
    return DataError(f"{given}: no such file", hint=meant)


def _there(folder: Path) -> str | None:
    """What could have been meant."""
    if not folder.is_dir():
        return None
    there = sorted(entry.name for entry in folder.iterdir() if kind_of(entry) in READERS)
    return f"in {folder} there is: {excerpt(', '.join(there) or 'no data file')}"


def check_columns(names: Mapping[str, str], sources: Iterable[Any]) -> None:
    """Raises ConfigError for a column to be renamed that no row has. Most files are read for a row and no further; what
    cannot be read is for whoever reads on."""
    missing, seen = set(names), dict[str, None]()
    for source in sources:
        try:
            for _, row in read_rows(source, reject=lambda *_: None) if missing else ():
                missing.difference_update(row)
                seen.update(dict.fromkeys(row))
                if not missing:
                    return
        except DataError:
            continue
    if missing and seen:
        name = min(missing)
        similar = difflib.get_close_matches(name, seen, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"columns: {excerpt(', '.join(seen))}"
        raise ConfigError(f"--map {name}={names[name]}: no row has a column {name!r}", hint=hint)
