"""Where posttrain keeps what it has fetched, tokenized or compiled."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """`$POSTTRAIN_CACHE`, or a folder in the user's cache directory. Raises RuntimeError for a user without a home."""
    own = os.environ.get("POSTTRAIN_CACHE")
    root = Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "posttrain"
    return root.expanduser()
