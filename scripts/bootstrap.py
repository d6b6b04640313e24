"""Make `.venv` with posttrain in it, on a machine that may have nothing but python3 and make.

    python3 scripts/bootstrap.py --extras demo     # what `make demo` needs
    python3 scripts/bootstrap.py --extras dev      # that, and tests, linters, TRL for the parity tests

Standard library only. Debian and Ubuntu ship python3 without ensurepip; there it installs python3-venv with apt-get, as
root or through sudo where that asks for no password, and says what to type where it cannot. A stamp of the profile,
pyproject.toml and constraints.txt makes every later call return at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

OLDEST_PYTHON = (3, 11)
BY_HAND = "sudo apt-get install python3-venv"

EXTRAS = {"demo": "", "dev": "[data,dev,optimizers,parity,rewards]"}
"""What each profile installs beside the core; a later profile has all of an earlier one."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Create .venv and install posttrain into it.")
    parser.add_argument("--extras", choices=list(EXTRAS), default="demo", help="how much to install (default: demo)")
    profile = parser.parse_args().extras
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return fail(
            f"Python {wanted} or later is needed, this is {sys.version.split()[0]}: make PYTHON=/path/to/python3"
        )
    if is_ready(profile):
        return 0
    started = time.monotonic()
    try:
        make_venv()
        install(profile)
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        return fail(str(error))
    stamp(profile).write_text(fingerprint(profile), "utf-8")
    say(f"ready in {time.monotonic() - started:.0f} s: {VENV.name}")
    return 0


def is_ready(profile: str) -> bool:
    """Whether this profile, or one that has all of it, was installed from the files as they are now."""
    names = list(EXTRAS)
    at_least = names[names.index(profile) :]
    return PYTHON.exists() and any(
        stamp(name).exists() and stamp(name).read_text("utf-8") == fingerprint(name) for name in at_least
    )


def stamp(profile: str) -> Path:
    return VENV / f".posttrain-{profile}"


def fingerprint(profile: str) -> str:
    """Changes when anything that decides what gets installed does, a moved checkout included."""
    digest = hashlib.sha256(f"{profile} {EXTRAS[profile]} {ROOT}".encode())
    for name in ("pyproject.toml", "constraints.txt"):
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def make_venv() -> None:
    """`.venv` with a working pip, whatever this machine's Python was stripped of."""
    if has_pip():
        return
    say(f"creating {VENV.name} with Python {sys.version.split()[0]}")
    made = run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made != 0 or not has_pip():
        install_venv_package()
        run([sys.executable, "-m", "venv", "--clear", str(VENV)])


def has_pip() -> bool:
    return PYTHON.exists() and run([str(PYTHON), "-m", "pip", "--version"], check=False) == 0


def install_venv_package() -> None:
    """Debian and Ubuntu keep ensurepip in a package of its own."""
    apt = shutil.which("apt-get")
    as_root = [] if hasattr(os, "geteuid") and os.geteuid() == 0 else ["sudo", "-n"]
    if apt is None or (as_root and shutil.which("sudo") is None):
        raise ValueError(f"this Python has no ensurepip; install it first, e.g.: {BY_HAND}")
    say("this Python has no ensurepip: installing python3-venv")
    run([*as_root, apt, "update", "-qq"], check=False)
    if run([*as_root, apt, "install", "-y", "-qq", "python3-venv"], check=False) != 0:
        raise ValueError(f"python3-venv could not be installed; try: {BY_HAND}")


def install(profile: str) -> None:
    say(f"installing posttrain{EXTRAS[profile]} with pinned dependencies (a few minutes the first time)")
    options = ["--disable-pip-version-check", "--no-input", "--quiet", "--constraint", str(ROOT / "constraints.txt")]
    run([str(PYTHON), "-m", "pip", "install", *options, "--editable", f"{ROOT}{EXTRAS[profile]}"], show=True)


def run(command: list[str], check: bool = True, show: bool = False) -> int:
    """Run quietly; what a checked command said is shown when it fails."""
    shown = None if show else subprocess.PIPE
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=shown, stderr=shown, text=True, check=False)
    if check and done.returncode != 0:
        raise ValueError(f"`{' '.join(command)}` failed ({done.returncode})\n{done.stdout or ''}{done.stderr or ''}")
    return done.returncode


def say(line: str) -> None:
    print(f"setup: {line}", flush=True)


def fail(line: str) -> int:
    print(f"setup: {line}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main())
