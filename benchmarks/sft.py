"""Supervised fine-tuning side by side: posttrain and TRL on the same model, rows, order and seed, in one run.

    make bench                       # LoRA r=16 on all linears, and full fine-tuning
    .venv/bin/python benchmarks/sft.py --repeats 5 --only lora

Runs alternate, each in a process of its own, so that a machine that drifts drifts for all. Losses are compared first: a
speed-up that changes the result is none. What is quoted are ratios of medians; the JSON beside the table has all runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from posttrain.models.packaged import resolve

HERE = Path(__file__).resolve().parent
DATA = HERE.parent.parent / "shared" / "data" / "gsm8k_train.jsonl"
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
ENTRIES = (("posttrain", "default", {}), ("trl", "tuned", KEEP_MEMORY), ("trl", "documented", {}))
BF16_LOSS_TOLERANCE = 0.02

Runs = dict[tuple[str, str], list[dict[str, Any]]]


def main() -> None:
    options = _options()
    if not Path(options.data).exists():
        sys.exit(f"{options.data} is not there; give GSM8K's train.jsonl with --data")
    model = resolve("smollm2-135m-instruct")
    results = {}
    for kind in ("lora", "full") if options.only is None else (options.only,):
        runs = _measure(kind, model, options)
        _compare_losses(runs)
        results[kind] = runs
        print(_table(kind, runs), flush=True)
    record = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "results": {
            kind: {" ".join(entry): values for entry, values in runs.items()} for kind, runs in results.items()
        },
    }
    Path(options.json).write_text(json.dumps(record, indent=1))
    print(f"all runs: {options.json}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", choices=("lora", "full"))
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--json", default="benchmarks/sft.json")
    return parser.parse_args()


def _measure(kind: str, model: str, options: argparse.Namespace) -> Runs:
    runs: Runs = {(library, variant): [] for library, variant, _ in ENTRIES}
    for repeat in range(options.repeats):
        for library, variant, extra in ENTRIES:
            print(f"{kind}: run {repeat + 1}/{options.repeats} of {library} {variant}", file=sys.stderr, flush=True)
            runs[library, variant].append(_run(kind, library, variant, extra, model, options))
    return runs


def _run(kind: str, library: str, variant: str, extra: dict[str, str], model: str, options: argparse.Namespace) -> Any:
    command = [sys.executable, str(HERE / "worker.py"), "--model", model, "--data", options.data]
    command += ["--library", library, "--variant", variant, "--steps", str(options.steps)]
    command += ["--full"] if kind == "full" else []
    environment = {**os.environ, **extra, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{library} {variant} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def _compare_losses(runs: Runs) -> None:
    ours = runs["posttrain", "default"][0]["losses"]
    for (library, variant), values in runs.items():
        for mine, theirs in zip(ours, values[0]["losses"], strict=True):
            if abs(mine - theirs) > BF16_LOSS_TOLERANCE * theirs:
                sys.exit(f"losses differ from {library} {variant}: {ours} and {values[0]['losses']}")


def _table(kind: str, runs: Runs) -> str:
    base = _median(runs["posttrain", "default"], "tokens_per_second")
    lines = [f"\n{kind:12} {'tokens/s':>20} {'ours is':>9} {'peak memory':>12} {'first step':>11} {'of limit':>9}"]
    for (library, variant), values in runs.items():
        rates = [value["tokens_per_second"] for value in values]
        share = values[0]["hardware_share"]
        spread = f"{statistics.median(rates):.0f} ({min(rates):.0f}-{max(rates):.0f})"
        lines.append(
            f"{library + ' ' + variant:20} {spread:>12} {base / statistics.median(rates):>8.1f}x"
            f" {_median(values, 'peak_memory_gib'):>8.1f} GiB {_median(values, 'seconds_to_first_step'):>9.1f} s"
            f" {'' if share is None else format(share, '.0%'):>9}"
        )
    return "\n".join(lines)


def _median(values: list[dict[str, Any]], name: str) -> float:
    return statistics.median(value[name] for value in values)


if __name__ == "__main__":
    main()
