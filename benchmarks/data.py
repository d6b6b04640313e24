"""How long `posttrain data check` takes, and how much memory: a file of messages is made, the command runs in a process
of its own, and seconds, rows per second and the peak of resident memory (of all its processes together) are printed as
one line of JSON.

    python benchmarks/data.py --rows 1000000
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

WORDS = [
    f"{start}{end}" for start in ("wa", "lo", "mi", "ter", "gan", "su") for end in ("ter", "n", "ling", "ps", "re")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path, help="check this one instead of making one")
    parser.add_argument("options", nargs="*", help="more options of the command, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.file or _make(Path(folder) / "rows.jsonl", given.rows)
        print(json.dumps({"bytes": path.stat().st_size, **_run(path, given.options)}))


def _make(path: Path, num_rows: int) -> Path:
    """Rows of about 250 bytes; one in a hundred stands twice."""
    generator = random.Random(0)
    line = ""
    with open(path, "w", encoding="utf-8") as file:
        for i in range(num_rows):
            if i % 100 != 99 or not line:
                words = generator.choices(WORDS, k=28)
                question, answer = f"{' '.join(words[:10])} {i}?", f"{' '.join(words[10:])}."
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                line = json.dumps({"messages": turns}) + "\n"
            file.write(line)
    return path


def _run(path: Path, options: list[str]) -> dict[str, object]:
    started, peak = time.monotonic(), 0
    command = [sys.executable, "-m", "posttrain.cli", "data", "check", str(path), "--json", *options]
    child = subprocess.Popen(command, stdout=subprocess.PIPE)
    process = psutil.Process(child.pid)
    while child.poll() is None:
        peak = max(peak, _memory(process))
        if peak and (child.stdout is None or time.monotonic() - started > 3600):
            break
        try:
            child.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
    seconds = time.monotonic() - started
    assert child.stdout is not None
    found = json.loads(child.stdout.read())
    return {
        "rows": found["rows"],
        "seconds": round(seconds, 1),
        "rows_per_second": round(found["rows"] / seconds),
        "peak_rss_mb": round(peak / 1e6),
        "exit": child.returncode,
        "findings": {item["code"]: item["count"] for item in found["findings"]},
        "load_average": round(psutil.getloadavg()[0], 1),
    }


def _memory(process: psutil.Process) -> int:
    """Resident bytes of it and all it started. Shared pages count in each, so this is an upper bound."""
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


if __name__ == "__main__":
    main()
