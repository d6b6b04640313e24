"""What is said before the first step of a preference method, because it costs a run to find out afterwards: a learning
rate of supervised training, a reference that is not what training starts from, answers that the model cannot have been
made for."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from peft import PeftModel

from posttrain.data.planning import plan
from posttrain.session import Session
from posttrain.shortage import is_out_of_memory
from posttrain.trainers.config import PackedConfig
from posttrain.types import Batch, Branch, Needs, Sample, Tokenized

logger = logging.getLogger("posttrain")
NUM_ANSWERS, NUM_TOKENS = 16, 2048
"""How many good answers are looked at, and with how many tokens at most."""
LOOKED_THROUGH = 256
"""Rows that they are taken from."""
UNLIKELY, UNLIKELY_END = -6.0, -12.0
"""Mean log-probability of their tokens, and of their last ones, from which on down they are absurd: one in 400, and one
in 160,000. A model with a template that is not its own finds words a little, and the end of a turn very unlikely."""


@dataclass(frozen=True)
class Rates:
    """From which learning rate on it is too high, and what is usual: for all weights, and with an adapter."""

    whole: float = 1e-5
    adapter: float = 1e-4
    usual_whole: str = "5e-7 to 5e-6"
    usual_adapter: str = "5e-6 to 5e-5"


@dataclass(frozen=True)
class Betas:
    """What is tried, what is usual, and what comes of less and of more."""

    low: float = 0.01
    high: float = 0.5
    usual: str = "0.1"
    less: str = "the policy may leave the reference far behind and unlearn"
    more: str = "the policy will hardly move"


def warn_of_rate(args: PackedConfig, adapted: bool, rates: Rates) -> None:
    if args.learning_rate >= (rates.adapter if adapted else rates.whole):
        usual = f"{rates.usual_adapter} with an adapter" if adapted else f"{rates.usual_whole} for all weights"
        logger.warning("learning_rate=%g is one of supervised training; this method takes %s", args.learning_rate,
                       usual)  # fmt: skip


def warn_of_beta(args: Any, betas: Betas) -> None:
    """SimPO's scales log-probabilities per token."""
    losses = getattr(args, "loss_type", "")
    if "simpo" in (losses if isinstance(losses, list | tuple) else [losses]):
        betas = Betas(1.0, 10.0, "2 to 2.5", "its margin outweighs what is compared", "few tokens decide")
    for beta in args.beta if isinstance(args.beta, list | tuple) else [args.beta]:
        if not betas.low <= beta <= betas.high:
            logger.warning("beta=%g is outside of what is tried here (%g to %g; %s is usual): %s", beta, betas.low,
                           betas.high, betas.usual, betas.more if beta > betas.high else betas.less)  # fmt: skip


# --- the reference ----------------------------------------------------------------------------------------------------


def warn_of_reference(model: Any, ref_model: Any, ref_adapter: str | None) -> None:
    """Where the reference is another model than the one that training starts from, so that the first step is pulled
    towards it already."""
    if ref_model is not None:
        problem = _difference(model, ref_model)
    elif ref_adapter is not None:
        difference = _difference_of_adapters(_learned(model), _learned(model, ref_adapter))
        problem = None if difference is None else f"adapter {ref_adapter!r}: {difference}"
    else:
        return
    if problem is not None:
        logger.warning("the reference is not the model that training starts from: %s; rewards and margins begin away "
                       "from 0, and the policy is pulled back to it", problem)  # fmt: skip


def _difference(model: Any, ref_model: Any) -> str | None:
    own, others = _plain_weights(model), _plain_weights(ref_model)
    missing = sorted(own.keys() ^ others.keys())
    if missing:
        return f"{len(missing)} parameters are in one of them only (first: {missing[0]})"
    different = [name for name, weight in own.items() if not _equal(weight, others[name])]
    if different:
        return f"{len(different)} of {len(own)} parameters differ (first: {different[0]})"
    return _difference_of_adapters(_learned(model), _learned(ref_model))


def _difference_of_adapters(own: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> str | None:
    """Of what adapters have learned."""
    if own and not others:
        return "the adapter has been trained before, and the reference has none that has"
    if others and not own:
        return "the reference has an adapter that has been trained, and the model has none that has"
    if own.keys() != others.keys():
        return "their adapters change different layers"
    different = [name for name, weight in own.items() if not _equal(weight, others[name])]
    return f"{len(different)} of {len(own)} parameters of their adapters differ" if different else None


def _learned(model: Any, adapter: str | None = None) -> dict[str, torch.Tensor]:
    """Weights of LoRA adapters, those that are active or this one, by names without the adapter's; none where all that
    begins with zeros is zero still, which changes nothing."""
    if not isinstance(model, PeftModel):
        return {}
    wanted = model.active_adapters if adapter is None else [adapter]
    found = {}
    for name, weight in model.named_parameters():
        layer, is_lora, part = name.partition(".lora_")
        if is_lora and set(words := part.split(".")) & set(wanted):
            found[".lora_".join((layer, ".".join(word for word in words if word not in wanted)))] = weight
    begins_with_zeros = (weight for name, weight in found.items() if re.search(r"\.lora_(B|embedding_A)", name))
    return found if any(bool(weight.any()) for weight in begins_with_zeros) else {}


def _plain_weights(model: Any) -> dict[str, torch.Tensor]:
    """By the names that they have without adapters."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    named = base.named_parameters()
    return {name.replace(".base_layer", ""): weight for name, weight in named if ".lora_" not in name}


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """In the less precise of the two dtypes."""
    if one.shape != other.shape:
        return False
    dtype = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.detach().to(dtype), other.detach().to(one.device, dtype))


# --- the answers ------------------------------------------------------------------------------------------------------


def warn_of_unlikely_answers(session: Session, samples: Sequence[Sample]) -> None:
    """Where the model, as it is, finds the good answers absurdly unlikely. One short forward pass."""
    trees = list(_good_answers(samples))
    if not trees:
        return
    batches = plan([(tree,) for tree in trees], NUM_TOKENS)
    try:
        values = [_logps(session, batch) for batch in batches]
    except Exception as error:
        if is_out_of_memory(error):  # training will find out, and knows what to do
            return
        raise
    mean = torch.cat(values).mean().item()
    ends = torch.cat([v[_last_rows(batch.sequence_R)] for v, batch in zip(values, batches, strict=True)]).mean().item()
    if mean < UNLIKELY:
        logger.warning(
            "the model finds the good answers absurdly unlikely (%.1f a token on average, as logarithm, in %d rows): "
            "look at them with `posttrain data tokens`; the chat template may not be the model's own, or the text not "
            "of its language; train it on them first (SFT)", mean, len(trees))  # fmt: skip
    elif ends < UNLIKELY_END:
        logger.warning(
            "the model would never end its answers as these %d rows do (%.1f for the last token, as logarithm): the "
            "chat template may not be the model's own, or the model was never trained to end its turns; train it on "
            "the answers first (SFT)", len(trees), ends)  # fmt: skip


@torch.no_grad()
def _logps(session: Session, batch: Batch) -> torch.Tensor:
    model = session.policy.model
    training = model.training
    model.eval()
    try:
        return session.policy(batch, Needs()).logp_R.float().cpu()
    finally:
        model.train(training)


def _good_answers(samples: Sequence[Sample]) -> Iterator[Tokenized]:
    """The chosen answers, or those rated good, of the first rows, each behind its prompt. Rows that are too long are
    passed over; where all are, the first stands for them, cut."""
    tokens, fitting = 0, 0
    trees = (tree for sample in samples for tree in sample if tree.columns.get("label", True))
    longest = None
    for tree in islice(trees, LOOKED_THROUGH):
        tree = replace(tree, branches=tree.branches[:1], columns={})
        if fitting < NUM_ANSWERS and tokens + tree.num_tokens <= NUM_TOKENS:
            fitting, tokens = fitting + 1, tokens + tree.num_tokens
            yield tree
        elif longest is None:
            longest = tree
    if not fitting and longest is not None:
        half, (answer,) = NUM_TOKENS // 2, longest.branches
        cut = Branch(answer.ids[:half], answer.supervised[:half])
        yield replace(longest, prefix=longest.prefix[-half:], branches=(cut,))


def _last_rows(sequence_R: torch.Tensor) -> torch.Tensor:
    """The last row of each sequence, whose rows come in order."""
    ends = torch.ones_like(sequence_R, dtype=torch.bool)
    ends[:-1] = sequence_R[1:] != sequence_R[:-1]
    return ends.cpu()
