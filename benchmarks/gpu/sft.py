"""Supervised fine-tuning side by side on a GPU: posttrain, TRL as documented and tuned, and Unsloth.

    .venv/bin/python benchmarks/gpu/sft.py                    # LoRA and full fine-tuning, both workloads, three repeats
    .venv/bin/python benchmarks/gpu/sft.py --only lora --workload gsm8k --repeats 5

The same comparison as benchmarks/sft.py: each run in a process and an environment of its own, runs alternate, losses
are compared before anything is said of speed, and what is quoted are ratios of medians. Peak memory is what CUDA's
allocator gave out at most, "of limit" is against matrix products of the model's shapes on the same device. A peer that
cannot be installed here is left out, and a line says so.

No figures stand anywhere in this repository yet: they are recorded in benchmarks/RESULTS.md, with the device and this
command, once it has run on one. What a test can do without a GPU it does, with `--device cpu` and a tiny model: all but
`peak_memory_bytes` of benchmarks/worker.py is the same.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from environments import python_of
from sft import Entry, compare, options_parser

ENTRIES: dict[str, tuple[Entry, ...]] = {
    "cuda": (
        ("posttrain", "default", {}),
        ("trl", "tuned", {}),
        ("trl", "documented", {}),
        ("unsloth", "documented", {}),
    ),
    "cpu": (("posttrain", "default", {}), ("trl", "tuned", {}), ("trl", "documented", {})),
}


def main() -> None:
    parser = options_parser(__doc__, "benchmarks/gpu-sft.json")
    parser.add_argument("--device", choices=ENTRIES, default="cuda", help="cpu: to try the script itself")
    parser.add_argument("--one-environment", action="store_true", help="peers as they are installed beside posttrain")
    options = parser.parse_args()
    if options.device == "cuda" and not _has_cuda():
        sys.exit("there is no CUDA device here; benchmarks/sft.py measures a CPU")
    find = (lambda _: sys.executable) if options.one_environment else (lambda name: python_of(name, options.device))
    entries, pythons = installable(ENTRIES[options.device], find)
    compare(entries, pythons, options.device, options)


def installable(entries: Iterable[Entry], find: Callable[[str], str]) -> tuple[list[Entry], dict[str, str]]:
    """The entries whose library has an interpreter, and these; the others are named."""
    pythons: dict[str, str] = {}
    left_out: set[str] = set()
    for library, _, _ in entries:
        if library in pythons or library in left_out:
            continue
        try:
            pythons[library] = find(library)
        except (subprocess.CalledProcessError, OSError) as error:
            left_out.add(library)
            print(f"{library} is left out: it cannot be installed here ({error})", file=sys.stderr, flush=True)
    return [entry for entry in entries if entry[0] in pythons], pythons


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
