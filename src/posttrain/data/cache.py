"""Tokens of a file kept on disk, under a hash of everything they depend on.

The key covers the bytes of the files, the tokenizer, the chat template, the settings, this package's own code and the
libraries that render and tokenise; whatever of it changes, the tokens are made anew. An entry is one safetensors file
with a hash of its content, put in place by a rename: it is whole or not there, and a damaged one is made again, aloud.

Left out: data that have no file (lists, `datasets`, streams), rows that go through the user's own function, and extra
columns. They are tokenised every time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.arrays import write_arrays
from posttrain.data.mixing import Mixture
from posttrain.data.report import Cases, DataReport
from posttrain.data.settings import DataSettings
from posttrain.errors import DataError
from posttrain.folders import cache_root
from posttrain.types import Branch, Origin, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_SECONDS = 2.0
"""What takes less to make is not worth keeping."""
MAX_BYTES = 20 * 2**30
"""Beyond it the entries that were not used for longest are deleted."""
NOT_IN_TOKENS = ("packing_strategy", "shuffle", "shuffle_seed", "cache")
logger = logging.getLogger("posttrain")


def default_folder() -> Path:
    """`$POSTTRAIN_CACHE` or `~/.cache/posttrain`, and in it `tokens`."""
    return cache_root() / "tokens"


def cache_key(source: Any, tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> str | None:
    """The name of the entry; None where these tokens cannot be kept."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    files = _files(source)
    if files is None or backend is None or settings.formatting_func is not None or settings.columns:
        return None
    plain = {k: v for k, v in dataclasses.asdict(settings).items() if k not in NOT_IN_TOKENS}
    parts = {
        "source": repr(source) if isinstance(source, Mixture) else str(source),
        "files": [[str(path), _sha256(path)] for path in files],
        "settings": plain,
        "template file": _template_file(settings.chat_template),
        "tokenizer": [type(tokenizer).__name__, _without_state(backend.to_str())],
        "special tokens": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
        "template": tokenizer.chat_template,
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _files(source: Any) -> list[Path] | None:
    if isinstance(source, Mixture):
        each = [_files(part.source) for part in source.parts]
        return None if any(files is None for files in each) else [path for files in each for path in files or ()]
    if not isinstance(source, str | Path):
        return None
    path = Path(source)
    if path.is_dir():
        return sorted(found for found in path.iterdir() if found.is_file())
    return [path] if path.is_file() else None


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _template_file(name: str | None) -> str | None:
    return _sha256(Path(name)) if name and len(name) < 4096 and "\n" not in name and Path(name).is_file() else None


def _without_state(backend: str) -> str:
    """Truncation and padding are what the last caller left there; we set neither."""
    document = json.loads(backend)
    return json.dumps({k: v for k, v in document.items() if k not in ("truncation", "padding")}, sort_keys=True)


@lru_cache
def _code() -> str:
    """This package's data code and the libraries under it."""
    import jinja2
    import tokenizers
    import transformers

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*")):
        if path.suffix in (".py", ".jinja"):
            digest.update(path.read_bytes())
    versions = (transformers.__version__, tokenizers.__version__, jinja2.__version__)
    return f"{digest.hexdigest()} {versions}"


# --- entries --------------------------------------------------------------------------------------------------------


def write(folder: Path, key: str, examples: Sequence[Tokenized], report: DataReport) -> None:
    """Keep the tokens; a disk that will not have them is no reason to stop, and is said."""
    arrays = _as_arrays(examples)
    sources = sorted({example.origin.source for example in examples})
    index = {source: i for i, source in enumerate(sources)}
    arrays["source"] = np.array([index[example.origin.source] for example in examples], np.int32)
    about = {"sources": sources, "report": _plain_report(report), "sha256": _content_hash(arrays)}
    try:
        write_arrays(folder / f"{key}.safetensors", arrays, {"about": json.dumps(about)})
        _make_room(folder)
    except OSError as error:
        logger.warning("tokens are not kept in %s: %s", folder, error.strerror or error)


def read(folder: Path, key: str) -> tuple[list[Tokenized], DataReport] | None:
    """The tokens under `key` and the report that was made with them; None if they are not there."""
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            about = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        if _content_hash(arrays) != about["sha256"]:
            raise ValueError("its content does not match its hash")
        found = _from_arrays(arrays, about["sources"]), _report(about["report"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s is damaged (%s); the tokens are made anew", path, error)
        path.unlink(missing_ok=True)
        return None
    os.utime(path)
    return found


def _as_arrays(examples: Sequence[Tokenized]) -> dict[str, np.ndarray]:
    branches = [branch for example in examples for branch in example.branches]
    lines = [-1 if example.origin.line is None else example.origin.line for example in examples]
    return {
        "ids": np.concatenate([branch.ids for branch in branches]),
        "supervised": np.concatenate([branch.supervised for branch in branches]).astype(np.uint8),
        "length": np.array([len(branch.ids) for branch in branches], np.int64),
        "prefix": np.concatenate([example.prefix for example in examples]),
        "prefix_length": np.array([len(example.prefix) for example in examples], np.int64),
        "branches": np.array([len(example.branches) for example in examples], np.int64),
        "row": np.array([example.origin.row for example in examples], np.int64),
        "line": np.array(lines, np.int64),
    }


def _from_arrays(arrays: dict[str, np.ndarray], sources: list[str]) -> list[Tokenized]:
    ids, supervised = arrays["ids"], arrays["supervised"].astype(bool)
    parts = [slice(end - n, end) for end, n in zip(np.cumsum(arrays["length"]), arrays["length"], strict=True)]
    branches = iter([Branch(ids[part], supervised[part]) for part in parts])
    names = ("prefix_length", "branches", "row", "line", "source")
    examples, at = [], 0
    for length, count, row, line, source in zip(*(arrays[name] for name in names), strict=True):
        prefix, at = arrays["prefix"][at : at + length], at + length
        origin = Origin(sources[source], int(row), None if line < 0 else int(line))
        examples.append(Tokenized(prefix, tuple(next(branches) for _ in range(count)), origin))
    return examples


def _content_hash(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _make_room(folder: Path) -> None:
    entries = sorted(folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime)
    total = sum(path.stat().st_size for path in entries)
    for path in entries[:-1]:
        if total <= MAX_BYTES:
            return
        total -= path.stat().st_size
        path.unlink(missing_ok=True)


# --- the report -----------------------------------------------------------------------------------------------------


def _plain_report(report: DataReport) -> dict[str, Any]:
    plain = {name: _plain(value) for name, value in vars(report).items() if name != "first_error"}
    first = report.first_error
    return {**plain, "first_error": [first.message, first.hint, first.code] if first is not None else None}


def _plain(value: Any) -> Any:
    if isinstance(value, Cases):
        return {"count": value.count, "first": [dataclasses.astuple(origin) for origin in value.first]}
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _report(plain: dict[str, Any]) -> DataReport:
    made = DataReport(plain["source"])
    for field in dataclasses.fields(DataReport):
        if field.name in plain:
            setattr(made, field.name, _restored(plain[field.name], getattr(made, field.name), field.name))
    return made


def _restored(value: Any, present: Any, name: str) -> Any:
    if isinstance(present, Cases):
        return Cases(value["count"], list(_origins(value["first"])))
    if isinstance(present, Counter):
        return Counter(value)
    if name == "first_error" and value is not None:
        message, hint, code = value
        return DataError(message, hint=hint, code=code)
    if name == "left_out":
        return [(code, why) for code, why in value]
    if isinstance(present, dict):
        return {reason: Cases(cases["count"], list(_origins(cases["first"]))) for reason, cases in value.items()}
    return value


def _origins(plain: list[list[Any]]) -> Iterator[Origin]:
    return (Origin(*values) for values in plain)
