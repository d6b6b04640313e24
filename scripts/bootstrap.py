"""Make `.venv` with posttrain in it, on a machine that may have nothing but python3 and make.

    python3 scripts/bootstrap.py --extras demo     # what `make demo` needs
    python3 scripts/bootstrap.py --extras dev      # that, and tests, linters, TRL for the parity tests

Standard library only. Debian and Ubuntu ship python3 without ensurepip and pip; there the virtual environment is made
bare and pip's own wheel, whose hash stands below, is fetched from the package index and installs itself. A stamp of
the profile, pyproject.toml and constraints.txt makes every later call return at once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

OLDEST_PYTHON = (3, 11)
PIP_WHEEL = "pip-26.2.1-py3-none-any.whl"
PIP_SHA256 = "71138adf1f4ca900cdb7d289c21b7494329f2332b6d85f0e1c42108c0384ed3e"
DEFAULT_INDEX = "https://pypi.org/simple"

EXTRAS = {"demo": "", "dev": "[data,dev,parity]"}
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
        say(f"this Python has no ensurepip: fetching {PIP_WHEEL}")
        run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(VENV)])
        install_pip()


def has_pip() -> bool:
    return PYTHON.exists() and run([str(PYTHON), "-m", "pip", "--version"], check=False) == 0


def install_pip() -> None:
    """A wheel is a zip that Python can run: pip installs itself from its own file."""
    with tempfile.TemporaryDirectory() as scratch:
        wheel = Path(scratch, PIP_WHEEL)
        wheel.write_bytes(fetch_pip())
        run([str(PYTHON), str(wheel / "pip"), "install", "--quiet", "--no-index", str(wheel)])


def fetch_pip() -> bytes:
    """The pinned wheel from the package index (PEP 503), its hash checked."""
    index = os.environ.get("PIP_INDEX_URL", DEFAULT_INDEX).rstrip("/") + "/pip/"
    link = re.search(rf'href="([^"#]*{re.escape(PIP_WHEEL)})', fetch(index).decode("utf-8", "replace"))
    if link is None:
        raise ValueError(f"{index} does not list {PIP_WHEEL}; install python3-venv and run this again")
    wheel = fetch(urllib.parse.urljoin(index, link.group(1)))
    found = hashlib.sha256(wheel).hexdigest()
    if found != PIP_SHA256:
        raise ValueError(f"{PIP_WHEEL}: sha256 is {found}, expected {PIP_SHA256}")
    return wheel


def fetch(url: str) -> bytes:
    try:
        return read(url, ssl.create_default_context())
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError):
            raise ValueError(f"{url}: {error.reason}") from error
    # A bare machine has no CA certificates either. What is fetched here is trusted by its hash alone; pip, which
    # brings certificates of its own, fetches all the rest.
    unverified = ssl.create_default_context()
    unverified.check_hostname, unverified.verify_mode = False, ssl.CERT_NONE
    return read(url, unverified)


def read(url: str, context: ssl.SSLContext) -> bytes:
    with urllib.request.urlopen(url, timeout=60, context=context) as answer:
        return bytes(answer.read())


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
