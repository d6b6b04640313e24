"""`samples.jsonl` in the run's folder: every completion with its rewards and its advantage, a line each.

A run that is taken up again at step n forgets the lines of the steps after it, which it will make anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.data.prompts import Prompt
from posttrain.rewards.functions import text_of
from posttrain.rollout.generation import Generation
from posttrain.rollout.scoring import Verdict

logger = logging.getLogger("posttrain")
NAME = "samples.jsonl"


class SamplesLog:
    def __init__(self, folder: str, prompts: Sequence[Prompt]):
        self.path, self.prompts = Path(folder) / NAME, prompts
        self.latest: list[dict[str, Any]] = []

    def __call__(self, generation: Generation, verdict: Verdict, step: int) -> None:
        """`step` counts from 0; lines have the number that the step will have in the log."""
        self.latest = self._lines(generation, verdict, step)
        lines = [_written(line) for line in self.latest]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8", errors="backslashreplace") as file:
                file.write("".join(f"{line}\n" for line in lines))
        except OSError as error:  # training goes on without
            logger.warning("%s is not written: %s", self.path, error.strerror or error)

    def _lines(self, generation: Generation, verdict: Verdict, step: int) -> list[dict[str, Any]]:
        extra = {name: values for name, values in verdict.extra.items() if len(values) == len(generation.rollouts)}
        for name in verdict.extra.keys() - extra.keys():
            logger.warning("log_extra(%r) was given %d values for %d completions; they are not in %s", name,
                           len(verdict.extra[name]), len(generation.rollouts), NAME)  # fmt: skip
        return [
            {
                "step": step + 1,
                "round": generation.index,
                "group": one.group,
                "prompt": self.prompts[one.prompt].content,
                "completion": content,
                "tokens": len(one.ids),
                "is_ended": one.is_ended,
                "rewards": {
                    name: None if math.isnan(value) else value
                    for name, value in zip(verdict.names, rewards, strict=True)
                },
                "advantage": one.advantage,
                **({"extra": {name: values[i] for name, values in extra.items()}} if extra else {}),
            }
            for i, (one, content, rewards) in enumerate(
                zip(generation.rollouts, verdict.contents, verdict.rewards_NF.tolist(), strict=True)
            )
        ]

    def shown(self, most: int | None, one_of_each_prompt: bool) -> str:
        """The latest round for people: a block for each completion."""
        lines = self.latest
        if one_of_each_prompt:
            lines = list({json.dumps(line["prompt"]): line for line in reversed(lines)}.values())[::-1]
        return "\n".join(
            f"step {line['step']}  rewards {line['rewards']}  advantage {line['advantage']:.3f}\n"
            f"  prompt      {text_of(line['prompt'])!r}\n  completion  {text_of(line['completion'])!r}"
            for line in lines[:most]
        )

    def forget_after(self, step: int) -> None:
        """Keep what was sampled for the first `step` steps."""
        if not self.path.is_file():
            return
        partial = self.path.with_name(f".{NAME}.partial")
        try:
            with self.path.open("rb") as old, partial.open("wb") as new:  # a kill may have cut a character in two
                for line in old:
                    if line.endswith(b"\n") and _step_of(line) <= step:
                        new.write(line)
            os.replace(partial, self.path)
        except OSError as error:  # as where it is written
            partial.unlink(missing_ok=True)
            logger.warning("%s keeps lines of steps after %d: %s", self.path, step, error.strerror or error)


def _written(line: dict[str, Any]) -> str:
    """As JSON; of what a reward has logged beside and JSON has no word for, its text."""
    try:
        return json.dumps(line, ensure_ascii=False, default=str)
    except (TypeError, ValueError):  # keys that are no text, a list that holds itself
        extra = {name: repr(value) for name, value in line.get("extra", {}).items()}
        return json.dumps({**line, "extra": extra}, ensure_ascii=False, default=str)


def _step_of(line: bytes) -> float:
    """The step that a line is of; a line that is not ours stays."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return -math.inf
    return step if isinstance(step, int) else -math.inf
