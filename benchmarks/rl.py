"""GRPO side by side: posttrain and TRL on the same model, prompts and sizes, in one run; and sampling alone.

    .venv/bin/python benchmarks/rl.py                       # 2 prompts x 8 completions x up to 128 tokens, LoRA
    .venv/bin/python benchmarks/rl.py --part sampling --repeats 5

Runs alternate, each in a process and an environment of its own. Both sample by themselves, so completions differ; that
losses and gradients agree on the same completions is `tests/parity/test_grpo.py`. What is quoted are ratios of medians.
Sampling alone is beside transformers' `generate` with the same adapter, batch and lengths; its limit is a step that is
nothing but the products with the frozen weights, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from environments import python_of
from sft import DATA, HERE, KEEP_MEMORY, run_worker

from posttrain.models.packaged import resolve

PARTS = ("sampling", "steps")
ENTRIES = (("posttrain", "default", {}), ("trl", "tuned", KEEP_MEMORY), ("trl", "documented", {}))


def main() -> None:
    options = _options()
    if not Path(options.data).exists():
        sys.exit(f"{options.data} is not there; give GSM8K's train.jsonl with --data")
    if options.warmup < 1 or options.steps <= options.warmup:
        sys.exit(f"--warmup {options.warmup} leaves none of --steps {options.steps} to measure")
    entries = [entry for entry in ENTRIES if entry[0] == "posttrain" or entry[1] in options.beside]
    model = resolve("smollm2-135m-instruct")
    results = {}
    for part in PARTS if options.part is None else (options.part,):
        runs: dict[str, list[Any]] = {}
        for repeat in range(options.repeats):
            for library, variant, extra in entries:
                name = f"{library} {variant}"
                print(f"{part}: run {repeat + 1}/{options.repeats} of {name}", file=sys.stderr, flush=True)
                command = [python_of(library), str(HERE / "rl_worker.py"), "--model", model, "--data", options.data]
                command += ["--library", library, "--variant", variant, "--part", part]
                command += ["--steps", str(options.steps), "--warmup", str(options.warmup)]
                made = runs.setdefault(name, [])
                if made != [None]:  # out of memory, as it would be again
                    made.append(run_worker(command, extra, name))
        results[part] = runs
        print(_table(part, runs), flush=True)
    Path(options.json).write_text(json.dumps(results, indent=1))
    print(f"all runs: {options.json}")


def _table(part: str, runs: dict[str, list[Any]]) -> str:
    rate = "tokens_per_second" if part == "sampling" else "completion_tokens_per_second"
    own = _median(runs["posttrain default"], rate)
    lines = [f"{part}: tokens/s, times as fast, peak memory (GiB)" + (", s a step" if part == "steps" else "")]
    for name, made in runs.items():
        if made == [None]:
            lines.append(f"  {name:20} out of memory")
            continue
        value, memory = _median(made, rate), _median(made, "peak_memory_gib")
        lowest, highest = min(one[rate] for one in made), max(one[rate] for one in made)
        line = f"  {name:20} {value:7.0f} ({lowest:.0f}-{highest:.0f})  {own / value:5.2f}x  {memory:5.2f}"
        if part == "steps":
            line += f"  {_median(made, 'seconds_per_step'):6.2f}  (mean length {_median(made, 'mean_length'):.0f})"
        elif made[0]["limit"]:
            line += f"  {100 * value / _median(made, 'limit'):.0f} % of {_median(made, 'limit'):.0f}, products alone"
        lines.append(line)
    return "\n".join(lines)


def _median(made: list[Any], name: str) -> float:
    return statistics.median(one[name] for one in made)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS)
    others = [variant for library, variant, _ in ENTRIES if library == "trl"]
    parser.add_argument("--beside", nargs="*", choices=others, default=others, help="of TRL, these variants only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps not counted, first")
    parser.add_argument("--data", default=str(DATA))
    parser.add_argument("--json", default="benchmarks/rl.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
