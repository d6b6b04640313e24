"""A hash of tokenized data: the same tokens with the same masks and labels in the same order have the same one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from posttrain.types import Sample


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 over every sequence's length, token ids, supervised mask and numbers beside them, and where samples
    begin."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(len(sample).to_bytes(4, "little"))
        for part in sample:
            digest.update(len(part.prefix).to_bytes(4, "little"))
            digest.update(np.ascontiguousarray(part.prefix, dtype=np.int64).tobytes())
            for branch in part.branches:
                digest.update(len(branch.ids).to_bytes(4, "little"))
                digest.update(np.ascontiguousarray(branch.ids, dtype=np.int64).tobytes())
                digest.update(np.ascontiguousarray(branch.supervised, dtype=np.bool_).tobytes())
            for name, value in sorted(part.columns.items()):
                if isinstance(value, bool | int | float | np.number):  # a label, a margin
                    digest.update(f"{name}={float(value)!r}".encode())
    return digest.hexdigest()
