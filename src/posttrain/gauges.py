"""What a log line says of the machine: memory, operations, and the share of what it could do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from posttrain.meter import Meter
from posttrain.models.flops import flops_counter, measure_limit
from posttrain.models.memory import peak_memory_bytes
from posttrain.session import Session
from posttrain.types import Batch


def machine_logs(
    session: Session, args: TrainingArguments, state: Callable[[], Any]
) -> Callable[[Meter], dict[str, float]]:
    """`state()` is transformers' `TrainerState` as it is then."""
    limit = measure_limit(session.policy.base, session.precision.compute_dtype)
    device = session.policy.device

    def logs(meter: Meter) -> dict[str, float]:
        extra = {"peak_memory_gib": peak_memory_bytes(device) / 2**30}
        if meter.seconds > 0:
            extra["hardware_share"] = meter.flops / meter.seconds / limit
        if args.include_num_input_tokens_seen != "no":
            extra["num_input_tokens_seen"] = state().num_input_tokens_seen
        return extra

    return logs


def flops_of(session: Session) -> Callable[[Batch], float]:
    """Of a batch's forward and backward through every model that is open."""
    counters = [flops_counter(policy.base) for policy in session.policies()]
    return lambda batch: sum(count(batch) for count in counters)
