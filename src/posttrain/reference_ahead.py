"""What a reference says of the data, asked once before the first step and kept on disk.

It is kept under a hash of everything it depends on, so that later epochs and later runs cost no reference pass, and
none is ever taken from another model, other data or other settings. What was asked before a run was killed is not asked
again: every minute what there is so far is put beside it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import nn

from posttrain.data.arrays import write_arrays
from posttrain.data.fingerprint import fingerprint
from posttrain.data.planning import Packing, plan
from posttrain.errors import Interrupted
from posttrain.types import Sample, Tokenized

if TYPE_CHECKING:
    from posttrain.reference import Reference

logger = logging.getLogger("posttrain")
CHUNK = 64
"""Samples that are laid out together."""
KEEP_EVERY = 60.0
"""Seconds after which what there is so far is written."""


def precompute(
    samples: Sequence[Sample],
    reference: Reference,
    device: torch.device,
    token_budget: int,
    packing: Packing,
    folder: Path | None,
    depends_on: dict[str, Any],
    name: str,
    stopped: Callable[[], str | None] = lambda: None,
) -> list[Sample]:
    """`samples` with a column `ref_logp`: an array for each branch. From `folder` where they were computed before with
    all of `depends_on` the same."""
    if not samples:
        return []
    key = cache_key(samples, depends_on)
    chunks = [samples[start : start + CHUNK] for start in range(0, len(samples), CHUNK)]
    ends = list(accumulate(sum(sum(_counts(part)) for sample in chunk for part in sample) for chunk in chunks))
    whole = None if folder is None else folder / f"{key}.safetensors"
    values = _read(whole, [ends[-1]]) if whole is not None else None
    if values is not None:
        logger.info("reference log-probabilities of %s taken from %s", name, folder)
        return _with_column(samples, values)
    beginning = None if folder is None else folder / f"{key}.beginning.safetensors"
    parts = _begun(beginning, ends, name)
    asked = _computed(chunks[len(parts) :], reference, device, token_budget, packing, name, stopped)
    values = np.concatenate(_kept_on_the_way(parts, asked, beginning))
    if whole is not None and beginning is not None:
        _write(whole, values)
        with suppress(OSError):
            beginning.unlink(missing_ok=True)
    return _with_column(samples, values)


def _begun(path: Path | None, ends: list[int], name: str) -> list[np.ndarray]:
    """What a run that was killed has left, by chunks; `ends` are those of all."""
    values = None if path is None else _read(path, ends)
    if values is None:
        return []
    done = ends.index(len(values)) + 1
    logger.info("reference log-probabilities of %s: the first %d of %d rows were asked before",
                name, done * CHUNK, len(ends) * CHUNK)  # fmt: skip
    return np.split(values, ends[: done - 1])


def _kept_on_the_way(parts: list[np.ndarray], asked: Iterator[np.ndarray], path: Path | None) -> list[np.ndarray]:
    """`parts` and what is `asked` yet; written to `path` every minute, and when it ends early."""
    written, at = len(parts), time.monotonic()
    try:
        for part in asked:
            parts.append(part)
            if path is not None and time.monotonic() - at > KEEP_EVERY:
                _write(path, np.concatenate(parts))
                written, at = len(parts), time.monotonic()
    except BaseException:
        if path is not None and len(parts) > written:
            _write(path, np.concatenate(parts))
        raise
    return parts


def cache_key(samples: Sequence[Sample], depends_on: dict[str, Any]) -> str:
    parts = {**depends_on, "tokens": fingerprint(samples), "version": 1}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def weights_hash(model: nn.Module, adapters: Sequence[str] = ()) -> str:
    """Of every parameter and buffer, by name; of adapters only those named."""
    digest = hashlib.sha256()
    others = re.compile(r"\.lora_|\.modules_to_save\.|_magnitude_vector")
    for name, tensor in sorted((*model.named_parameters(), *model.named_buffers())):
        if others.search(name) and not any(f".{adapter}" in name for adapter in adapters):
            continue
        digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().to("cpu").contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _computed(
    chunks: Sequence[Sequence[Sample]],
    reference: Reference,
    device: torch.device,
    budget: int,
    packing: Packing,
    name: str,
    stopped: Callable[[], str | None],
) -> Iterator[np.ndarray]:
    """Of each chunk, in the samples' own order, whatever batches they were computed in."""
    from tqdm import tqdm

    packing = replace(packing, group_size=None, columns=())
    with tqdm(desc=f"reference ({name})", total=sum(map(len, chunks)), unit=" rows", delay=2, leave=False, disable=None,
              file=sys.stderr) as bar:  # fmt: skip
        for chunk in chunks:
            of_sample: dict[int, list[np.ndarray]] = {}
            for batch in plan(chunk, budget, packing):
                if signal := stopped():
                    raise Interrupted(f"Interrupted by {signal} before the first step; nothing to save.", None)
                logp_R = reference(batch.to(device)).float().cpu().numpy()
                for sequence, sample in enumerate(batch.sample_S):
                    of_sample.setdefault(sample, []).append(logp_R[batch.sequence_R.numpy() == sequence])
            yield np.concatenate([part for index in range(len(chunk)) for part in of_sample[index]])
            bar.update(len(chunk))


def _counts(part: Tokenized) -> list[int]:
    """Rows of each branch: supervised tokens that something comes before."""
    alone = not len(part.prefix)
    return [int(branch.supervised[1:].sum() if alone else branch.supervised.sum()) for branch in part.branches]


def _with_column(samples: Sequence[Sample], values: np.ndarray) -> list[Sample]:
    made, at = [], 0
    for sample in samples:
        parts = []
        for part in sample:
            arrays = []
            for count in _counts(part):
                arrays.append(values[at : at + count])
                at += count
            parts.append(replace(part, columns={**part.columns, "ref_logp": arrays}))
        made.append(tuple(parts))
    return made


def _read(path: Path, allowed: Sequence[int]) -> np.ndarray | None:
    """`allowed` are the numbers of values that there may be."""
    if not path.is_file():
        return None
    try:
        values = load_file(path)["logp"]
        if values.dtype != np.float32 or values.shape not in {(n,) for n in allowed} or not np.isfinite(values).all():
            raise ValueError(f"{values.shape} {values.dtype}, wanted {allowed[-1]} finite numbers")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("%s is damaged (%s); the reference is computed anew", path, error)
        return None
    return values


def _write(path: Path, values: np.ndarray) -> None:
    """A disk that will not have it is no reason to stop, and is said."""
    try:
        write_arrays(path, {"logp": values})
    except OSError as error:
        logger.warning("reference log-probabilities are not kept in %s: %s", path.parent, error.strerror or error)
