"""Supervised fine-tuning side by side: posttrain and TRL on the same model, rows, order and seed, in one run.

    make bench                       # LoRA r=16 on all linears and full fine-tuning, on GSM8K and on uneven samples
    .venv/bin/python benchmarks/sft.py --repeats 5 --only lora --workload gsm8k
    .venv/bin/python benchmarks/sft.py --tuning       # TRL tuned, and with each further flag that might make it faster

Runs alternate, each in a process and an environment of its own, so that a machine that drifts drifts for all. Losses
are compared as soon as a run has ended, and any that differ end it all: a speed-up that changes the result is none.
What is quoted are ratios of medians; the JSON beside the table has all runs. Warm-up is long enough for the memory of a
run to be there: the first steps of any library on a CPU are spent asking for pages. Where a library does not fit into
this machine's memory, the table says so, and the same eight samples a step are given to it two at a time. "Of limit" is
the arithmetic that the samples need (no padding, no logits of prompts, what a step's samples begin with alike once) a
second, over what this machine reaches with nothing but matrix products of the model's shapes, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from environments import python_of
from worker import TRIED

from posttrain.models.packaged import resolve

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "gsm8k_train.jsonl"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
WORKLOADS = ("gsm8k", "uneven")
"""Those of a run that names none."""
ON_DEMAND = ("instructed",)
LINUX = sys.platform.startswith("linux")
Entry = tuple[str, str, dict[str, str]]
ENTRIES: tuple[Entry, ...] = (
    ("posttrain", "default", {}),
    ("trl", "tuned", KEEP_MEMORY),
    ("trl", "tuned, two at a time", KEEP_MEMORY),
    ("trl", "documented", {}),
)
"""Eight samples a step. Two at a time pad less; which is the best of TRL depends on workload and machine."""
TWO_AT_A_TIME: tuple[Entry, ...] = (("trl", "documented, two at a time", {}),)
"""Of the uneven samples eight at a time, padded to the longest, are more than some machines hold."""
TUNING: tuple[Entry, ...] = (
    ("posttrain", "default", {}),
    ("trl", "tuned", KEEP_MEMORY),
    *(("trl", f"tuned, {name}", KEEP_MEMORY) for name in TRIED),
)
OTHER_BATCHES = ("tuned, grouped by length",)
"""Variants whose steps are of other samples, and so have other losses."""
BF16_LOSS_TOLERANCE = 0.02

Runs = dict[tuple[str, str], list[Any]]


def main() -> None:
    parser = options_parser(__doc__, "benchmarks/sft.json")
    parser.add_argument("--tuning", action="store_true", help="TRL with each of the flags that might make it faster")
    options = parser.parse_args()
    entries = TUNING if options.tuning else ENTRIES
    if options.tuning and options.json == parser.get_default("json"):
        options.json = "benchmarks/sft-tuning.json"
    compare(entries, {library: python_of(library) for library, _, _ in ENTRIES}, "cpu", options)


def options_parser(about: str, record: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=6, help="steps not counted, first")
    parser.add_argument("--only", choices=("lora", "full"))
    parser.add_argument("--workload", choices=(*WORKLOADS, *ON_DEMAND))
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--beside", nargs="*", metavar="VARIANT", help="of the others, these variants only")
    parser.add_argument("--json", default=record)
    return parser


def compare(entries: Sequence[Entry], pythons: dict[str, str], device: str, options: argparse.Namespace) -> None:
    """Measure `entries`, print a table of each kind and workload, and write all runs beside it."""
    if not Path(options.data).exists():
        sys.exit(f"{options.data} is not there; give GSM8K's train.jsonl with --data")
    if options.warmup >= options.steps:
        sys.exit(f"--warmup {options.warmup} leaves none of --steps {options.steps} to measure")
    model = resolve(options.model)
    if options.beside is not None and (
        unknown := set(options.beside) - {one for _, one, _ in (*entries, *TWO_AT_A_TIME)}
    ):
        sys.exit(f"--beside knows no {', '.join(sorted(unknown))}")
    results = {}
    for workload in WORKLOADS if options.workload is None else (options.workload,):
        for kind in ("lora", "full") if options.only is None else (options.only,):
            smaller = TWO_AT_A_TIME if (workload, device) == ("uneven", "cpu") else ()
            known = (*entries, *(entry for entry in smaller if entry not in entries))
            if options.beside is not None:
                known = tuple(entry for entry in known if entry[0] == "posttrain" or entry[1] in options.beside)
                if len(known) == 1 and options.beside:
                    sys.exit(f"none of --beside {options.beside} is run with {workload}")
            runs: Runs = {(library, variant): [] for library, variant, _ in known}
            results[f"{kind}, {workload}"] = runs
            try:
                _measure(runs, known, pythons, [kind, workload, model, device], options)
            finally:
                if any(runs.values()):
                    _write(results, device, Path(options.json))
            print(_table(f"{kind}, {workload}", runs), flush=True)
    print(f"all runs: {options.json}")


def _write(results: dict[str, Runs], device: str, path: Path) -> None:
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": device,
        "results": {
            kind: {" ".join(entry): values for entry, values in runs.items()} for kind, runs in results.items()
        },
    }
    path.write_text(json.dumps(record, indent=1))


def _measure(
    runs: Runs, entries: Sequence[Entry], pythons: dict[str, str], what: Sequence[str], options: argparse.Namespace
) -> None:
    kind, workload, model, device = what
    for repeat in range(options.repeats):
        for library, variant, extra in entries:
            progress = f"{kind}, {workload}: run {repeat + 1}/{options.repeats} of {library} {variant}"
            print(progress, file=sys.stderr, flush=True)
            command = [pythons[library], str(HERE / "worker.py"), "--model", model, "--data", options.data]
            command += ["--library", library, "--variant", variant, "--steps", str(options.steps), "--device", device]
            command += ["--warmup", str(options.warmup)]
            command += ["--workload", workload, *(["--full"] if kind == "full" else [])]
            if None in runs[library, variant]:  # it would not fit a second time
                continue
            runs[library, variant].append(run_worker(command, extra, f"{library} {variant}"))
            _compare_losses(runs, library, variant)


def run_worker(command: list[str], extra: dict[str, str], name: str) -> Any:
    """What a worker says of its run; None where memory ran out. Raises SystemExit where it failed otherwise."""
    environment = {**os.environ, **extra, "HF_HUB_OFFLINE": "1"}
    first_to_go = ["sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$@"', "sh"] if LINUX else []
    done = subprocess.run([*first_to_go, *command], capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode == -signal.SIGKILL or "can't allocate memory" in done.stderr:
        print(f"{name}: out of memory", file=sys.stderr, flush=True)
        return None
    if done.returncode or not lines:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def _compare_losses(runs: Runs, library: str, variant: str) -> None:
    """Of the last run of a variant with our first."""
    first, last = runs["posttrain", "default"][0], runs[library, variant][-1]
    if first is None:
        sys.exit("posttrain itself ran out of memory")
    if last is None or variant in OTHER_BATCHES:
        return
    ours, theirs = first["losses"], last["losses"]
    if any(abs(a - b) > BF16_LOSS_TOLERANCE * b for a, b in zip(ours, theirs, strict=True)):
        sys.exit(f"losses differ from {library} {variant}: {ours} and {theirs}")


def _table(kind: str, runs: Runs) -> str:
    """Shares of tokens trained and of the limit are ours to say; both libraries compute on the same samples."""
    ours = [value for value in runs["posttrain", "default"] if value is not None]
    base, trained = _median(ours, "tokens_per_second"), _median(ours, "trained_share")
    per_rate = _median(ours, "hardware_share_per_token_per_second")
    lines = [
        f"\n{kind:30} {'tokens/s':>18} {'trained/s':>9} {'ours is':>8} {'peak memory':>12} {'first step':>11}"
        f" {'of limit':>9}"
    ]
    for (library, variant), values in runs.items():
        values = [value for value in values if value is not None]
        if not values:
            lines.append(f"{library + ' ' + variant:30} {'out of memory':>18}")
            continue
        rates = [value["tokens_per_second"] for value in values]
        rate = statistics.median(rates)
        spread = f"{rate:.0f} ({min(rates):.0f}-{max(rates):.0f})"
        lines.append(
            f"{library + ' ' + variant:30} {spread:>18} {rate * trained:>9.0f} {base / rate:>7.1f}x"
            f" {_median(values, 'peak_memory_gib'):>8.1f} GiB {_median(values, 'seconds_to_first_step'):>9.1f} s"
            f" {rate * per_rate:>9.0%}"
        )
    return "\n".join(lines)


def _median(values: list[dict[str, Any]], name: str) -> float:
    return statistics.median(value[name] for value in values)


if __name__ == "__main__":
    main()
