"""What a verb left out, in a file and on the screen: nothing is skipped unlisted."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.commands.reading import in_flags

NUM_SHOWN = 5


class Report:
    """Where `skipped` rows are listed: the file of `--report`, or `default` beside what is written, if one was skipped
    (or an earlier report is there, which would then be out of date). A verb that writes nothing has no default, and
    says them."""

    def __init__(self, options: argparse.Namespace, default: Path | None = None, written: Iterable[Path] = ()):
        from posttrain.data.change.reading import Skipped
        from posttrain.data.writing import check_report

        self.options, self.skipped, self.is_written = options, Skipped(), False
        self.path: Path | None = options.report or (default if options.policy == "skip" else None)
        if self.path is not None:
            check_report(self.path, "--report", [options.file, *written])

    def write(self, document: dict[str, Any]) -> None:
        from posttrain.data.writing import write_report

        if self.path is None or not (self.options.report or self.skipped.count or self.path.exists()):
            return
        document = {"schema_version": 1, "source": str(self.options.file), **document}
        write_report(self.path, document, skipped_rows=self.rows())
        self.is_written = True

    def say(self) -> None:
        """On the screen: where the list is, or its beginning."""
        count = self.skipped.count
        if not count:
            return
        if self.is_written:
            print(f"! skipped  {count} row{'' if count == 1 else 's'}, listed in {self.path}")
            return
        shown = count if self.options.verbose else NUM_SHOWN
        for row in islice(self.rows(), shown):
            print(f"! skipped  {row['code']} {str(row['message']).partition(chr(10))[0]}")
        if count > shown:
            print(f"           and {count - shown} more\n  = --report R.json lists them all")

    def rows(self) -> Iterator[dict[str, Any]]:
        for row in self.skipped:
            yield {**row, "hint": in_flags(row["hint"], self.options)}
