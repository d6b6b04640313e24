"""Checkpoint folders that are whole or not there.

`checkpoint-N` is written as `checkpoint-N.partial`: the files, each synced to disk, then `MANIFEST.json` with the size
and SHA-256 of every one, then one rename. The new folder is read back and verified before anything older is deleted,
and what is deleted is never the last valid one, the best one, or another run's. A folder whose files do not match its
manifest, or whose manifest does not match its own hash, is named and passed over when a run resumes. Nothing here is
pickled: tensors are safetensors, the rest JSON.

Left out: what goes into a checkpoint. `snapshot.py` knows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import CheckpointError

MANIFEST = "MANIFEST.json"
SCHEMA = "urn:posttrain:checkpoint:1"
SEAL = "manifest_sha256"
UNREADABLE = float("inf")
_NAME = re.compile(r"checkpoint-(\d+)$")
logger = logging.getLogger("posttrain")


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run in one folder. `limit` is how many to keep (None: all); the best is kept besides."""

    output_dir: Path
    run_id: str
    limit: int | None = None

    def write(self, step: int, fill: Callable[[Path], None], best: Path | None = None) -> Path:
        """Make `checkpoint-{step}`: `fill` writes its files into the folder it is given. Returns the final path.

        Whatever fails on the way, checkpoints that were there before are untouched."""
        self._put_back()
        for left in self.output_dir.glob("checkpoint-*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        final = self.output_dir / f"checkpoint-{step}"
        partial = final.with_name(final.name + ".partial")
        partial.mkdir(parents=True)
        try:
            fill(partial)
            manifest = {"schema_version": 1, "$schema": SCHEMA, "run_id": self.run_id, "step": step,
                        "sequence": self._next_sequence(), "files": _hashes(partial)}  # fmt: skip
            write_json(partial / MANIFEST, {**manifest, SEAL: _seal(manifest)})
            _sync_folder(partial)
            self._move_into_place(partial, final)
        except Exception:
            shutil.rmtree(partial, ignore_errors=True)  # a full disk gets its space back
            raise
        self._prune(keep={final, best} if best else {final})
        return final

    def latest(self) -> Path | None:
        """The newest valid checkpoint in the folder, whichever run wrote it; invalid ones are named in the log."""
        self._put_back()
        for path in self._newest_first():
            try:
                verify(path)
            except CheckpointError as error:
                logger.warning("%s Passed over.", error.message)
            else:
                return path
        return None

    def _newest_first(self) -> list[Path]:
        found = [path for path in self.output_dir.glob("checkpoint-*") if _NAME.search(path.name)]
        return sorted(found, key=lambda path: (_sequence(path), _step(path)), reverse=True)

    def _next_sequence(self) -> int:
        return 1 + int(max((s for s in map(_sequence, self._newest_first()) if s != UNREADABLE), default=0))

    def _put_back(self) -> None:
        """Undo the first half of a replacement whose second half never came, because the process died between."""
        for replaced in self.output_dir.glob("checkpoint-*.replaced"):
            final = replaced.with_suffix("")
            if final.exists():
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                os.replace(replaced, final)

    def _move_into_place(self, partial: Path, final: Path) -> None:
        replaced = final.with_name(final.name + ".replaced")
        if final.exists():
            os.replace(final, replaced)
        try:
            os.replace(partial, final)
            _sync_folder(self.output_dir)
            verify(final)
        except Exception:
            if replaced.exists():
                shutil.rmtree(final, ignore_errors=True)
                os.replace(replaced, final)
            raise
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, keep: set[Path]) -> None:
        """Delete this run's oldest beyond the limit; called only once the newest is verified."""
        if not self.limit:
            return
        own = [path for path in self._newest_first() if _manifest_or_empty(path).get("run_id") == self.run_id]
        kept = {path.resolve() for path in keep}
        room = self.limit - sum(path.resolve() in kept for path in own)
        for path in own:
            if path.resolve() in kept:
                continue
            room -= 1
            if room < 0:
                left = path.with_name(path.name + ".partial")  # so that half a deletion does not look like a checkpoint
                os.replace(path, left)
                shutil.rmtree(left)


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a whole checkpoint. Raises CheckpointError naming the first file that is missing, short or
    altered."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        seal, files = manifest.pop(SEAL, None), manifest["files"].items()
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no {MANIFEST}: it was not completed, or another tool wrote it.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / MANIFEST} cannot be read ({error}).") from None
    if manifest.get("schema_version") != 1:
        raise CheckpointError(f"{path} has schema version {manifest.get('schema_version')}; this posttrain reads 1.")
    if seal != _seal(manifest):
        raise CheckpointError(f"{path} is not whole: {MANIFEST} does not match its own hash.")
    for name, expected in files:
        file = path / name
        if file.is_symlink() or not file.is_file():
            raise CheckpointError(f"{path} is not whole: {name} is missing.")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"{path} is not whole: {name} has {file.stat().st_size} of {expected['bytes']} bytes."
            )
        if _sha256(file) != expected["sha256"]:
            raise CheckpointError(f"{path} is not whole: {name} does not match its hash.")
    return manifest


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, synced to disk. Numbers must be finite."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _hashes(folder: Path) -> dict[str, dict[str, Any]]:
    hashes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        hashes[file.relative_to(folder).as_posix()] = {"sha256": _sha256(file), "bytes": file.stat().st_size}
    return hashes


def _seal(manifest: dict[str, Any]) -> str:
    """The hash of a manifest's content, kept beside it."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _manifest_or_empty(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def _sequence(path: Path) -> float:
    """Which write this was, counted over the folder; without a readable manifest it passes for the newest, so that it
    is looked at first and named."""
    value = _manifest_or_empty(path).get("sequence")
    return value if isinstance(value, int) else UNREADABLE


def _step(path: Path) -> int:
    match = _NAME.search(path.name)
    return int(match.group(1)) if match else 0
