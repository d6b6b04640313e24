"""What a run does when memory runs out in the middle of a step, or before the first.

The step is redone from its beginning with the token budget halved; where a single sequence does not fit, more of its
activations are made again; where nothing is left to change, the run ends and says what was wanted, what was free and
what to set. None of it changes the loss: its divisor is known before the first forward, and how a step is cut shows in
the rounding of the last bit only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.errors import OutOfMemoryError
from posttrain.models.available import free_memory
from posttrain.optimizer_state import make_state
from posttrain.shortage import RETRY_CODE, Shortage, is_out_of_memory, shortage_of
from posttrain.types import Batch

logger = logging.getLogger("posttrain")


@dataclass
class BackOff:
    """`source` has the token budget, `asked` is the user's own; `recompute_more` goes one level up and says whether
    there was one, `recomputation` names it; `forget` drops what the unfinished step holds, `give_back` what lies free
    in the process; `free` says how many bytes can be had now."""

    source: Any
    recompute_more: Callable[[], bool]
    recomputation: Callable[[], str]
    forget: Callable[[], None]
    give_back: Callable[[], None]
    free: Callable[[], int]
    asked: int | None = None
    count: int = 0

    def make_room(self, step: int, shortage: Shortage, micro: Sequence[Batch], failed: Batch | None) -> None:
        """After a failure in `failed`, one of a step's micro-batches (None: in the optimiser's turn). Raises
        OutOfMemoryError where nothing is left to try."""
        self.forget()
        self.give_back()
        budget = min(self.source.token_budget, max((batch.num_tokens for batch in micro), default=1))
        can_be_cut = any(batch.can_be_cut for batch in ([failed] if failed is not None else micro))
        if can_be_cut:
            self.source.token_budget = max(1, budget // 2)
            tried = f"micro-batches of {budget} → {self.source.token_budget} tokens (same batch, same loss)"
        elif failed is not None and self.recompute_more():
            tried = f"activations recomputed: {self.recomputation()} (same loss)"
        else:
            raise self._nothing_left(step, shortage, failed)
        self.count += 1
        logger.warning("%s step %d, %s. Retried with %s. Run continues.", RETRY_CODE, step, shortage, tried)

    def release_unused(self, step: int, shortage: Shortage) -> None:
        """After a failure of the optimiser that changed nothing: what is free in pieces is given back as a whole."""
        self.give_back()
        self.count += 1
        logger.warning("%s step %d, %s. Retried after giving back what lay free. Run continues.",
                       RETRY_CODE, step, shortage)  # fmt: skip

    def _nothing_left(self, step: int, shortage: Shortage, failed: Batch | None) -> OutOfMemoryError:
        if failed is None:
            message = "gradients and the optimiser's state do not fit"
            hint = "train an adapter (peft_config), or set optim='adamw_bnb_8bit' or 'adafactor'"
        else:
            message = f"a single sequence of {failed.layout.max_length} tokens ({failed.origins_S[0]}) does not fit"
            hint = "lower max_length, train an adapter (peft_config), set bf16=True, or take a smaller model"
        return OutOfMemoryError(f"step {step}, {shortage}: {message}, and nothing is left to cut. Nothing was updated.",
                                hint=hint)  # fmt: skip


def make_state_or_raise(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Raises OutOfMemoryError for an optimiser's state that does not fit, before anything was updated."""
    try:
        make_state(optimizer)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        shortage = shortage_of(error, "before the first step", free_memory(device))
        raise OutOfMemoryError(
            f"{shortage}: the optimiser's state does not fit",
            hint="train an adapter (peft_config), or set optim='adamw_bnb_8bit'",
            code="E-OOM-0002",
        ) from None
