"""Preference methods side by side: posttrain and TRL on the same model, rows, order and seed, in one run.

    .venv/bin/python benchmarks/preference.py                       # DPO on both sets of pairs, the others on one
    .venv/bin/python benchmarks/preference.py --method kto --workload demo --repeats 2

Every step includes the reference's pass, in both libraries: nothing is taken from a cache. Runs alternate, each in a
process and an environment of its own. Losses are compared first. What is quoted are ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from environments import python_of
from sft import HERE, KEEP_MEMORY, run_worker

from posttrain.models.packaged import resolve

DATA = HERE.parent.parent / "shared" / "data" / "dpo_en_demo.json"
METHODS, WORKLOADS = ("dpo", "orpo", "kto", "reward"), ("demo", "long_prompts")
ENTRIES = (("posttrain", "default", {}), ("trl", "tuned", KEEP_MEMORY), ("trl", "tuned, few at a time", KEEP_MEMORY),
           ("trl", "documented", {}))  # fmt: skip
LOSS_TOLERANCE = 0.05
"""Relative, in bf16; of the first step, where all have the same weights. ORPO's tokens differ by TRL's EOS."""


def main() -> None:
    options = _options()
    entries = [entry for entry in ENTRIES if entry[0] == "posttrain" or entry[1] in options.beside]
    if not Path(options.data).exists():
        sys.exit(f"{options.data} is not there; give a ShareGPT ranking file with --data")
    model = resolve("smollm2-135m-instruct")
    results = {}
    for method, workload in _cells(options):
        runs: dict[str, list[Any]] = {}
        for repeat in range(options.repeats):
            for library, variant, extra in entries:
                name = f"{library} {variant}"
                print(f"{method}, {workload}: run {repeat + 1}/{options.repeats} of {name}", file=sys.stderr,
                      flush=True)  # fmt: skip
                command = [python_of(library), str(HERE / "preference_worker.py"), "--model", model]
                command += ["--data", options.data, "--library", library, "--variant", variant]
                command += ["--method", method, "--workload", workload, "--steps", str(options.steps)]
                command += ["--batch", str(options.batch)]
                made = runs.setdefault(name, [])
                if made != [None]:  # out of memory, as it would be again
                    made.append(run_worker(command, extra, name))
        _compare_losses(runs)
        results[f"{method}, {workload}"] = runs
        print(_table(f"{method}, {workload}", runs), flush=True)
    Path(options.json).write_text(json.dumps(results, indent=1))
    print(f"all runs: {options.json}")


def _cells(options: argparse.Namespace) -> list[tuple[str, str]]:
    cells = [(method, workload) for method in METHODS for workload in WORKLOADS]
    if options.method is None and options.workload is None:
        cells = [(method, workload) for method, workload in cells if method == "dpo" or workload == "demo"]
    return [
        cell for cell in cells if cell[0] in (options.method or METHODS) and cell[1] in (options.workload or WORKLOADS)
    ]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, nargs="*")
    parser.add_argument("--workload", choices=WORKLOADS, nargs="*")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--data", default=str(DATA))
    others = [variant for library, variant, _ in ENTRIES if library != "posttrain"]
    parser.add_argument("--beside", nargs="*", choices=others, default=others, help="of TRL, these variants only")
    parser.add_argument("--json", default="benchmarks/preference.json")
    return parser.parse_args()


def _compare_losses(runs: dict[str, list[Any]]) -> None:
    ours = runs["posttrain default"][0]["losses"][0]
    for name, values in runs.items():
        if values == [None]:
            continue
        theirs = values[0]["losses"][0]
        if abs(ours - theirs) > LOSS_TOLERANCE * abs(theirs):
            sys.exit(f"the first loss differs from {name}: {ours} and {theirs}")


def _table(title: str, runs: dict[str, list[Any]]) -> str:
    lines = [f"\n{title:24} {'rows/s':>18} {'ours is':>8} {'peak memory':>12} {'first step':>11}"]
    base = _median(runs["posttrain default"], "rows_per_second")
    for name, values in runs.items():
        if values == [None]:
            lines.append(f"{name:24} {'out of memory':>18}")
            continue
        rates = [value["rows_per_second"] for value in values]
        rate = statistics.median(rates)
        spread = f"{rate:.3f} ({min(rates):.3f}-{max(rates):.3f})"
        lines.append(
            f"{name:24} {spread:>18} {base / rate:>7.1f}x {_median(values, 'peak_memory_gib'):>8.1f} GiB"
            f" {_median(values, 'seconds_to_first_step'):>9.1f} s"
        )
    return "\n".join(lines)


def _median(values: list[dict[str, Any]], name: str) -> float:
    return statistics.median(value[name] for value in values)


if __name__ == "__main__":
    main()
