"""A model seen as a function from a packed batch to the log-probabilities of its supervised tokens.

`Policy` holds the transformers (or PEFT) model and knows the two ways to run it: packed, all sequences end to end in
one row; and padded, one row a sequence, for a family whose layers do not honour the packed layout. Both give the same
`Outputs`; which one runs was decided by the self-check at load (`open_policy`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from posttrain.errors import ConfigError
from posttrain.models import attention, capabilities
from posttrain.models.critic import Critic
from posttrain.models.head import HeadShape, rows_of, token_logps
from posttrain.models.recomputation import keeping_recipes
from posttrain.types import Batch, Layout, Needs, Origin, Outputs

logger = logging.getLogger("posttrain")


@dataclass
class Policy:
    """`model` as the user knows it, `base` without the PEFT wrapper. `shares_prompts`: a prompt may stand in a batch
    once, before all its answers. `neftune_alpha` adds noise to the embeddings while training (NEFTune, arXiv
    2310.05914): uniform, of size `alpha / sqrt(length x D)`, each sequence's own length. `recomputes_cheap_parts`:
    models/recomputation.py. `critic` says what is to be expected of a state."""

    model: Any
    base: Any
    shape: HeadShape
    is_packed: bool = True
    shares_prompts: bool = True
    neftune_alpha: float | None = None
    recomputes_cheap_parts: bool = False
    critic: Critic | None = None

    @property
    def device(self) -> torch.device:
        return self.base.get_input_embeddings().weight.device

    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        """Log-probabilities of `batch.target_R`, with gradients where gradients are enabled."""
        batch = batch.to(self.device)
        head = self.base.get_output_embeddings()
        bias = getattr(head, "bias", None)  # PEFT's wrapper of a tied head with trainable tokens has none
        hidden_RD = rows_of(self.states(batch), batch.rows_R)
        outputs = token_logps(hidden_RD, head.weight, bias, batch.target_R, self.shape, needs)
        if not needs.value:
            return outputs
        assert self.critic is not None
        return replace(outputs, value_R=self.critic.values(hidden_RD, batch, self.model.training))

    def states(self, batch: Batch) -> torch.Tensor:
        """The last hidden state of every token, `(T, D)`."""
        with keeping_recipes() if self.recomputes_cheap_parts and torch.is_grad_enabled() else nullcontext():
            return self._packed(batch) if self.is_packed else self._padded(batch)

    @classmethod
    def of(cls, model: Any, base: Any) -> Policy:
        """Raises ConfigError for a head that is not plainly there."""
        _check_head(base)
        return cls(model, base, capabilities.head_shape(base))

    def plain(self, ids_T: torch.Tensor) -> torch.Tensor:
        """What the model's own forward says of the tokens of one sequence: `per_row` of it alone."""
        logits_TV = self.base(input_ids=ids_T[None], use_cache=False).logits[0, :-1].float()
        return logits_TV.log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]

    @property
    def vocabulary(self) -> int:
        return int(self.base.get_input_embeddings().weight.shape[0])

    @property
    def drops(self) -> bool:
        """Whether anything is dropped at random in training."""
        return any(capabilities.drops(module) for module in self.model.modules())

    @property
    def tolerance(self) -> float:
        """How far apart two ways to compute the same may lie, relative to its size."""
        return 0.05 if self.base.get_input_embeddings().weight.dtype in (torch.bfloat16, torch.float16) else 1e-4

    def _packed(self, batch: Batch) -> torch.Tensor:
        # A mask of four dimensions is handed through as it is, so none is built; attention reads `layout` instead.
        no_mask = torch.empty(1, 1, 0, 0, device=self.device)
        layout = replace(batch.layout, made={})
        output = self.base.base_model(
            **self._inputs(batch.input_ids_T[None], layout),
            position_ids=batch.position_ids_T[None],
            attention_mask=no_mask,
            layout=layout,
            use_cache=False,
            **({"keeps_weights": False} if self.recomputes_cheap_parts else {}),
        )
        layout.made.clear()  # what the backward pass needs of it autograd has
        return output.last_hidden_state[0]

    def _padded(self, batch: Batch) -> torch.Tensor:
        layout = batch.layout
        rows, longest = batch.num_sequences, layout.max_length
        starts_S1 = torch.tensor(layout.starts, device=self.device)[:, None]
        mask_SL = torch.arange(longest, device=self.device) < torch.tensor(layout.lengths, device=self.device)[:, None]
        index_SL = (starts_S1 + torch.arange(longest, device=self.device)).clamp(max=batch.num_tokens - 1)
        padded = Layout(tuple(range(0, rows * longest, longest)), layout.lengths)
        output = self.base.base_model(
            **self._inputs(batch.input_ids_T[index_SL], padded), attention_mask=mask_SL.long(), use_cache=False
        )
        return output.last_hidden_state[mask_SL]

    def _inputs(self, input_ids: torch.Tensor, layout: Layout) -> dict[str, torch.Tensor]:
        if self.neftune_alpha is None or not self.base.training:
            return {"input_ids": input_ids}
        embeds = self.base.get_input_embeddings()(input_ids)
        size_T = torch.zeros(input_ids.numel())
        for start, length in zip(layout.starts, layout.lengths, strict=True):
            size_T[start : start + length] = self.neftune_alpha / (length * embeds.shape[-1]) ** 0.5
        noise = torch.zeros_like(embeds).uniform_(-1, 1)
        return {"inputs_embeds": embeds + noise * size_T.view(*input_ids.shape, 1).to(embeds)}


def open_policy(
    model: Any,
    *,
    kind: type[Policy] = Policy,
    neftune_alpha: float | None = None,
    router_aux_loss_coef: float | None = None,
) -> Policy:
    """Prepare a transformers or PEFT model for packed batches and prove on a few tokens that it honours them.

    The model's attention implementation is switched to ours; generation and plain forwards go on working and use SDPA.

    Raises: ConfigError where the model cannot be trained faithfully (mixture-of-experts balancing loss, prompt tuning,
        a head that is not a plain linear layer, logits that are more than head x hidden state).
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    _refuse_adapters(model)
    capabilities.refuse_unsupported(base, router_aux_loss_coef)
    attention.register()
    policy = kind.of(model, base)
    with _own_attention(policy):
        expected = _plain(policy)
    capabilities.adapt_to_packing(base)
    own = base.config._attn_implementation
    if base._supports_attention_backend:
        base.set_attn_implementation(attention.PACKED_ATTENTION)
    policy.is_packed = base._supports_attention_backend and _keeps_segments_apart(policy)
    problem = _difference(policy, expected) if policy.is_packed else "it runs padded"
    if problem:
        policy.is_packed = False
    if not policy.is_packed:
        base.set_attn_implementation(own)
        problem = _difference(policy, expected)
        logger.warning("%s does not honour packed sequences; training with padded batches", type(base).__name__)
    if problem:
        raise ConfigError(
            f"{type(base).__name__}: {problem}; its logits are more than its head times its hidden states"
        )
    policy.shares_prompts = policy.is_packed and _shares_prompts(policy)
    if policy.is_packed and not policy.shares_prompts:
        logger.warning("%s does not honour shared prompts; a batch repeats the prompt before each of its answers",
                       type(base).__name__)  # fmt: skip
    policy.neftune_alpha = neftune_alpha
    return policy


def _refuse_adapters(model: Any) -> None:
    peft_config = getattr(model, "peft_config", {})
    for name, config in peft_config.items() if isinstance(peft_config, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise ConfigError(f"adapter '{name}' is {config.peft_type}: prompts that are learned are not supported")


def _check_head(base: Any) -> None:
    head = base.get_output_embeddings()
    if head is None:
        raise ConfigError(f"{type(base).__name__} has no language-model head")
    if hasattr(head, "base_layer") or not hasattr(head, "weight"):
        raise ConfigError(
            "an adapter on the language-model head is not supported: log-probabilities are computed from its weight",
            hint="leave 'lm_head' out of target_modules (modules_to_save=['lm_head'] trains it whole)",
        )


# --- the self-check -------------------------------------------------------------------------------------------------

_CHECK_LENGTHS = (6, 9, 5)


def _check_batch(policy: Policy, salt: int = 0) -> Batch:
    """Three short sequences; `salt` changes the middle one only."""
    return arbitrary_batch(policy, _CHECK_LENGTHS, salt)


def arbitrary_batch(policy: Policy, lengths: Sequence[int], salt: int = 0) -> Batch:
    """Sequences of arbitrary tokens of these lengths, all of them supervised but the first."""
    vocabulary = policy.vocabulary
    sequences = [
        [(7919 * (i + 1) * (j + 3) + 104729 * (i == 1) * salt) % vocabulary for j in range(n)]
        for i, n in enumerate(lengths)
    ]
    starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
    rows = [s + j for s, n in zip(starts, lengths, strict=True) for j in range(n - 1)]
    flat = torch.tensor([token for sequence in sequences for token in sequence])
    return Batch(
        input_ids_T=flat,
        position_ids_T=torch.cat([torch.arange(n) for n in lengths]),
        layout=Layout(starts, tuple(lengths)),
        rows_R=torch.tensor(rows),
        target_R=flat[torch.tensor(rows) + 1],
        sequence_R=torch.tensor([i for i, n in enumerate(lengths) for _ in range(n - 1)]),
        sample_S=tuple(range(len(lengths))),
        origins_S=(Origin("self-check", 0),) * len(lengths),
        counts={"tokens": len(rows), "sequences": len(lengths)},
    )


@contextmanager
def _own_attention(policy: Policy) -> Iterator[None]:
    """Evaluation mode, no gradients, whatever attention the model came with."""
    training = policy.base.training
    policy.base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        policy.base.train(training)


def _plain(policy: Policy) -> torch.Tensor:
    """Each sequence through the model's own forward, alone."""
    batch = _check_batch(policy).to(policy.device)
    segments = zip(batch.layout.starts, batch.layout.lengths, strict=True)
    return torch.cat([policy.plain(batch.input_ids_T[start : start + length]) for start, length in segments])


def _values(policy: Policy, batch: Batch) -> torch.Tensor:
    return policy(batch, Needs()).per_row(batch)


def _difference(policy: Policy, expected_R: torch.Tensor) -> str | None:
    with _own_attention(policy):
        value_R = _values(policy, _check_batch(policy))
    gap = (value_R - expected_R).abs().max().item()
    allowed = policy.tolerance * max(1.0, expected_R.abs().max().item())
    return None if gap <= allowed else f"log-probabilities differ from its own forward by up to {gap:.3g}"


def _keeps_segments_apart(policy: Policy) -> bool:
    """Other tokens in the middle sequence leave the first and last bit for bit alone (same shapes, same kernels)."""
    with _own_attention(policy):
        try:
            one, other = (_values(policy, _check_batch(policy, salt)) for salt in (0, 1))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it cannot take the layout at all
            return False
    middle = slice(_CHECK_LENGTHS[0] - 1, _CHECK_LENGTHS[0] + _CHECK_LENGTHS[1] - 2)
    gap = (one - other).abs()
    gap[middle] = 0
    return gap.max().item() < 1e-5 and not torch.equal(one[middle], other[middle])


SHARED = Layout((0, 5, 8, 12, 13), (5, 3, 4, 1, 2), (-1, 0, 0, 2, 2))
"""A prompt, an answer, another, and two ends of the latter."""


def _shares_prompts(policy: Policy) -> bool:
    """One prompt with two answers, of which one has two ends, says of them what it says when it is repeated."""
    vocabulary = policy.vocabulary
    ids = [torch.arange(n) * 7919 % vocabulary + salt for n, salt in ((5, 0), (3, 1), (4, 2), (1, 3), (2, 4))]
    prompt, answer, other, end, other_end = (part.clamp(max=vocabulary - 1) for part in ids)
    shared = torch.cat([prompt, answer, other, end, other_end])
    repeated = torch.cat([prompt, answer, prompt, other, end, prompt, other, other_end])
    targets = torch.cat([answer, other, end, other_end])
    with _own_attention(policy):
        try:
            one, other = (
                _values(policy, _answers(tokens, layout, torch.tensor(rows), targets))
                for tokens, layout, rows in (
                    (shared, SHARED, (4, 5, 6, 4, 8, 9, 10, 11, 11, 13)),
                    (repeated, Layout((0, 8, 18), (8, 10, 11)), (4, 5, 6, 12, 13, 14, 15, 16, 26, 27)),
                )
            )
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
    allowed = policy.tolerance * max(1.0, other.abs().max().item())
    return (one - other).abs().max().item() <= allowed


def _answers(ids_T: torch.Tensor, layout: Layout, rows_R: torch.Tensor, target_R: torch.Tensor) -> Batch:
    positions = [torch.arange(end - n, end) for n, end in zip(layout.lengths, layout.context_lengths, strict=True)]
    return Batch(
        input_ids_T=ids_T,
        position_ids_T=torch.cat(positions),
        layout=layout,
        rows_R=rows_R,
        target_R=target_R,
        sequence_R=torch.tensor([0] * 3 + [1] * 5 + [2] * 2),
        sample_S=(0, 0, 0),
        origins_S=(Origin("self-check", 0),) * 3,
        counts={"tokens": 10, "sequences": 3},
    )
