"""An environment for each peer, so that neither sees the other's packages; built once and kept in `.bench/`."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".bench"
PACKAGES = {
    "cpu": {"trl": ["trl==1.16.0", "torch==2.13.0", "peft", "datasets"]},
    "cuda": {"trl": ["trl==1.16.0", "torch==2.13.0", "peft", "datasets", "liger-kernel"], "unsloth": ["unsloth"]},
}
PINS_ITS_OWN = ("unsloth",)
"""These want other versions than ours of what both use."""


def python_of(library: str, device: str = "cpu") -> str:
    """The interpreter to run `library` with: this one for posttrain, one of its own for a peer.

    Raises: CalledProcessError where it cannot be installed here.
    """
    packages = PACKAGES[device].get(library)
    if packages is None:
        return sys.executable
    folder = FOLDER / (library if device == "cpu" else f"{library}-{device}")
    python = folder / "bin" / "python"
    constraints = ROOT / "constraints.txt"
    wanted = hashlib.sha256(constraints.read_bytes() + repr(packages).encode()).hexdigest()
    stamp = folder / "installed"
    if stamp.is_file() and stamp.read_text() == wanted:
        return str(python)
    print(f"building the environment of {library} in {folder} (a few minutes, once)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    quiet = ["--quiet", "--disable-pip-version-check"]
    quiet += [] if library in PINS_ITS_OWN else ["--constraint", str(constraints)]
    subprocess.run([str(python), "-m", "pip", "install", *quiet, *packages], check=True)
    stamp.write_text(wanted)
    return str(python)
