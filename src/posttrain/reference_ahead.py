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
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from posttrain.data.arrays import write_arrays
from posttrain.data.fingerprint import fingerprint
from posttrain.data.planning import Packing, plan
from posttrain.errors import Interrupted
from posttrain.models.memory import give_back_freed_memory
from posttrain.shortage import is_out_of_memory, shortage_of, smaller_budget
from posttrain.types import Batch, Sample, Tokenized

logger = logging.getLogger("posttrain")
CHUNK, CHUNK_BUDGETS = 64, 4
"""Samples that are laid out together: so many, or of so many times the token budget."""
KEEP_EVERY = 60.0
"""Seconds after which what there is so far is written."""
SHARE_OF_TIME = 0.05
"""Of a run's time that goes into writing it, at most: all of it is written each time."""


def precompute(
    samples: Sequence[Sample],
    reference: Callable[[Batch], torch.Tensor],
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
    chunks = list(_chunks(samples, token_budget))
    ends = list(accumulate(sum(sum(_counts(part)) for sample in chunk for part in sample) for chunk in chunks))
    if folder is None:
        found = _computed(chunks, reference, device, token_budget, packing, name, stopped)
        return _with_column(samples, np.concatenate(list(found)))
    key = cache_key(samples, depends_on)
    whole = folder / f"{key}.safetensors"
    beginning = folder / f"{key}.{token_budget}{'s' * packing.shared}{'b' * packing.beginnings}.beginning.safetensors"
    values = _read(whole, [ends[-1]])
    if values is None:
        parts = _begun(beginning, ends, chunks, name)
        asked = _computed(chunks[len(parts) :], reference, device, token_budget, packing, name, stopped)
        values = np.concatenate(_kept_on_the_way(parts, asked, beginning))
        if not _write(whole, values):
            return _with_column(samples, values)
    else:
        logger.info("reference log-probabilities of %s taken from %s", name, folder)
    with suppress(OSError):
        for path in folder.glob(f"{key}.*.beginning.safetensors"):
            path.unlink(missing_ok=True)
    return _with_column(samples, values)


def _chunks(samples: Sequence[Sample], token_budget: int) -> Iterator[Sequence[Sample]]:
    start = tokens = 0
    for at, sample in enumerate(samples):
        size = sum(part.num_tokens for part in sample)
        if at > start and (at - start == CHUNK or tokens + size > CHUNK_BUDGETS * token_budget):
            yield samples[start:at]
            start, tokens = at, 0
        tokens += size
    yield samples[start:]


def _begun(path: Path, ends: list[int], chunks: Sequence[Sequence[Sample]], name: str) -> list[np.ndarray]:
    """What a run that was killed has left, by chunks; `ends` are those of all."""
    values = _read(path, ends)
    if values is None:
        return []
    done = ends.index(len(values)) + 1
    before, rows = (sum(map(len, some)) for some in (chunks[:done], chunks))
    logger.info("reference log-probabilities of %s: the first %d of %d rows were asked before", name, before, rows)
    return np.split(values, ends[: done - 1])


def _kept_on_the_way(parts: list[np.ndarray], asked: Iterator[np.ndarray], path: Path) -> list[np.ndarray]:
    """`parts` and what is `asked` yet; written to `path` every minute, and when it ends early."""
    written, at, every = len(parts), time.monotonic(), KEEP_EVERY
    try:
        for part in asked:
            parts.append(part)
            if (began := time.monotonic()) - at > every:
                _write(path, np.concatenate(parts))
                written, at = len(parts), time.monotonic()
                every = max(KEEP_EVERY, (at - began) / SHARE_OF_TIME)
    except BaseException:
        if len(parts) > written:
            _write(path, np.concatenate(parts))
        raise
    return parts


def cache_key(samples: Sequence[Sample], depends_on: dict[str, Any]) -> str:
    parts = {**depends_on, "tokens": fingerprint(samples), "version": 2}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@lru_cache(maxsize=1)
def versions() -> tuple[str, ...]:
    """Of what computes log-probabilities: this package's own code for it, and the libraries under it."""
    import peft
    import transformers

    home, digest = Path(__file__).parent, hashlib.sha256()
    cut = (home / "data" / f"{name}.py" for name in ("planning", "grouping", "beginnings"))
    files = [*(home / "models").glob("*.py"), *(home / "native").rglob("*"), *cut, home / "types.py",
             *home.glob("reference*.py")]  # fmt: skip
    for path in sorted(path for path in files if path.suffix in (".py", ".cpp", ".h")):
        digest.update(path.read_bytes())
    return digest.hexdigest(), torch.__version__, transformers.__version__, peft.__version__


PART_OF_ADAPTER = re.compile(r"\.lora_|\.modules_to_save\.|_magnitude_vector")
"""After it, in a parameter's name, comes the adapter's, between dots."""


def _partner(name: str) -> str:
    """Of the factor of a LoRA update that begins at random the one that begins with zeros."""
    return name.replace(".lora_A.", ".lora_B.").replace(".lora_embedding_B.", ".lora_embedding_A.")


def weights_hash(model: nn.Module, adapters: Sequence[str] = (), at_most: int | None = None) -> str:
    """Of every parameter and buffer, by name; of adapters only those named. With `at_most`, of about so many evenly
    spaced elements of what was learned: training moves them all, and no more are read."""
    digest = hashlib.sha256()
    learned = dict(model.named_parameters())
    for name, tensor in sorted((*learned.items(), *([] if at_most is not None else model.named_buffers()))):
        if (partner := _partner(name)) in learned and not learned[partner].any():
            continue  # at random still, and without effect
        if (part := PART_OF_ADAPTER.search(name)) and not set(name[part.end() :].split(".")) & set(adapters):
            continue
        digest.update(f"{name.replace('.base_layer', '')} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten()
        flat = flat[:: 1 if at_most is None else max(1, flat.numel() // at_most)].to("cpu").contiguous()
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _computed(
    chunks: Sequence[Sequence[Sample]],
    reference: Callable[[Batch], torch.Tensor],
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
            found = None
            while found is None:
                batches, shortage = plan(chunk, budget, packing), None
                try:
                    found = _of_chunk(batches, reference, device, stopped)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    shortage = shortage_of(error, "asking the reference", None)
                if shortage is not None:  # the error is gone by now, and with it what it held
                    give_back_freed_memory()
                    budget = smaller_budget(budget, batches, shortage)
            yield np.concatenate([part for index in range(len(chunk)) for part in found[index]])
            bar.update(len(chunk))


def _of_chunk(
    batches: Sequence[Batch],
    reference: Callable[[Batch], torch.Tensor],
    device: torch.device,
    stopped: Callable[[], str | None],
) -> dict[int, list[np.ndarray]]:
    """Log-probabilities of each sample's branches."""
    of_sample: dict[int, list[np.ndarray]] = {}
    for batch in batches:
        if signal := stopped():
            raise Interrupted(f"Interrupted by {signal} before the first step; nothing to save.", None)
        logp_R = reference(batch.to(device)).float().cpu().numpy()
        for sequence, sample in enumerate(batch.sample_S):
            of_sample.setdefault(sample, []).append(logp_R[batch.sequence_R.numpy() == sequence])
    return of_sample


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
        with safe_open(path, "numpy") as file:
            values, about = file.get_tensor("logp"), file.metadata() or {}
        if values.dtype != np.float32 or values.shape not in {(n,) for n in allowed} or not np.isfinite(values).all():
            raise ValueError(f"{values.shape} {values.dtype}, wanted {allowed[-1]} finite numbers")
        if about.get("sha256") != _sha256(values):
            raise ValueError("its numbers are not those that were written")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        logger.warning("%s is damaged (%s); the reference is computed anew", path, error)
        return None
    return values


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()


def _write(path: Path, values: np.ndarray) -> bool:
    """A disk that will not have it is no reason to stop, and is said."""
    try:
        write_arrays(path, {"logp": values}, {"sha256": _sha256(values)})
    except OSError as error:
        logger.warning("reference log-probabilities are not kept in %s: %s", path.parent, error.strerror or error)
        return False
    return True
