"""An environment for each peer, so that neither sees the other's packages; built once and kept in `.bench/`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench"
PACKAGES = {"trl": ["trl==1.16.0", "torch==2.13.0", "peft", "datasets"]}


def python_of(library: str) -> str:
    """The interpreter to run `library` with: this one for posttrain, one of its own for a peer."""
    if library not in PACKAGES:
        return sys.executable
    folder = FOLDER / library
    python = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256(constraints.read_bytes() + repr(PACKAGES[library]).encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    print(f"building the environment of {library} in {folder} (a few minutes, once)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    quiet = ["--quiet", "--disable-pip-version-check", "--constraint", str(constraints)]
    subprocess.run([str(python), "-m", "pip", "install", *quiet, *PACKAGES[library]], check=True)
    stamp.write_text(wanted)
    return str(python)
