"""Sampling in as much memory as there is: where it runs out, fewer rows are sampled at once.

Every completion has random numbers of its own, so that who shares a step with it changes nothing but the rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from posttrain.errors import OutOfMemoryError
from posttrain.models.available import free_memory
from posttrain.models.memory import give_back_all
from posttrain.rollout.engines import Completion, Request
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.sampling import Sampling
from posttrain.shortage import RETRY_CODE, Shortage, is_out_of_memory, shortage_of

logger = logging.getLogger("posttrain")


@dataclass
class RowsAtOnce:
    """How many rows `engine` has come down to, of those that were `asked` for, as a checkpoint keeps it: a run that is
    taken up again goes on with as many, since products of another shape are rounded otherwise."""

    engine: LocalEngine
    asked: int

    def state(self) -> dict[str, Any]:
        return {} if self.engine.max_rows >= self.asked else {"sampling_rows": [self.asked, self.engine.max_rows]}

    def load_state(self, state: dict[str, Any]) -> None:
        asked, rows = state.get("sampling_rows", (None, None))
        if asked == self.asked:
            self.engine.max_rows = rows


def generate_fitting(
    engine: LocalEngine,
    requests: Sequence[Request],
    sampling: Sampling,
    stopped: Callable[[], bool] = lambda: False,
    landed: Callable[[int], object] = lambda count: None,
) -> list[list[Completion]]:
    """`engine.generate`, begun again with half as many rows where memory runs out; the engine keeps to them. `landed`
    is told of a negative number where completions are lost so. Raises OutOfMemoryError where a single row does not
    fit."""
    told, is_again = 0, False

    def tell(count: int) -> None:
        nonlocal told
        told += count
        landed(count)

    while True:
        try:
            if is_again:  # what is laid out for decoding may have been half done
                engine.update_weights()
            return engine.generate(requests, sampling, stopped, tell)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = shortage_of(error, "sampling", free_memory(engine.policy.device))
        # the error is gone by now, and with it the frames that hold keys and values
        tell(-told)
        is_again = True
        give_back_all()
        engine.max_rows = _fewer(min(engine.max_rows, sum(one.count for one in requests)), requests, sampling, shortage)


def _fewer(rows: int, requests: Sequence[Request], sampling: Sampling, shortage: Shortage) -> int:
    """Half of them."""
    if rows <= 1:
        longest = max(len(one.prompt_ids) for one in requests)
        raise OutOfMemoryError(
            f"{shortage}: a single completion of up to {sampling.max_tokens} tokens, after a prompt of up to "
            f"{longest}, does not fit",
            hint="lower the completion's length (max_completion_length) or the prompt's, or take a smaller model",
        )
    logger.warning("%s %s. Retried with %d → %d completions at once (same completions). Run continues.",
                   RETRY_CODE, shortage, rows, rows // 2)  # fmt: skip
    return rows // 2
