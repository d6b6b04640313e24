"""Mathematical equivalence: a completion's answer equals the row's, whatever form it has (Math-Verify).

Math-Verify computes what it is given, and some of what models write computes for ever, its own time limits
notwithstanding (Math-Verify issue 65: towers of powers). So it runs in a process of its own, which is ended at a
deadline and started anew. What was overdue is worth `overdue`, is named in the log and counted.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.answers import as_text, gold_of
from posttrain.rewards.deadline import Shares
from posttrain.rewards.functions import RewardFunction, shown, text_of
from posttrain.rewards.worker import Late, Worker
from posttrain.types import Content

logger = logging.getLogger("posttrain")
SCRIPT = Path(__file__).with_name("equivalence_worker.py")
SECONDS = 5.0
LONGEST = 20_000
"""Characters from a completion's end that Math-Verify reads."""
WORKER = Worker(SCRIPT)
atexit.register(WORKER.close)


def maths(column: str | None = None, seconds: float = SECONDS, overdue: float | None = 0.0) -> RewardFunction:
    """1.0 where the answers are the same, 0.0 where they are not or there is none, None where the row has none that can
    be read. `column` has the right answers (default: ground_truth, answer or solution); `overdue` is what a completion
    is worth that takes more than `seconds`, or too much memory."""
    if not seconds > 0:
        raise ConfigError(f"maths(seconds={seconds}) must be above 0")

    def math_answer(completions: Sequence[Content], **columns: Any) -> list[float | None]:
        values: list[float | None] = []
        late, shares = [], Shares(seconds, len(completions))
        for content, gold in zip(completions, gold_of(columns, column, "math_answer"), strict=True):
            within = shares.next()  # all of them may take for ever
            try:
                values.append(None if gold is None else _judged(text_of(content), as_text(gold), within))
            except Late:
                values.append(overdue if within == seconds else None)  # None: there was no time to find out
                late.append(content)
        if late:
            said = "reward   math_answer: %d of %d took more than %g s and are worth %s, the first %s"
            logger.warning(said, len(late), len(completions), seconds, overdue, shown(late[0]))
        if note := columns.get("log_metric"):
            note("rewards/math_answer/overdue", len(late) / max(1, len(completions)))
        return values

    return math_answer


def _judged(text: str, gold: str, seconds: float) -> float | None:
    reply = WORKER.ask({"gold": gold, "text": text[-LONGEST:]}, seconds)
    if "missing" in reply:
        raise ConfigError(f"math_answer needs math-verify, which cannot be imported: {reply['missing']}",
                          hint='pip install "posttrain[rewards]"')  # fmt: skip
    same = reply["same"]
    return None if same is None else float(same)


math_answer = maths()
