"""What the batches of a run carry beside their tokens: columns of the data, and what the reference says of them.

The reference is asked batch by batch as training goes, or ahead of it, when its answers become a column of the samples
and it may be let go. A run that samples its own completions asks it by itself (rollout/source.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import TrainingArguments

from posttrain import native
from posttrain.data.planning import REPEATS, REPEATS_WITH_KERNELS, Packing
from posttrain.errors import ConfigError
from posttrain.objectives.base import Objective
from posttrain.reference import Reference, ReferenceModel
from posttrain.reference_ahead import precompute
from posttrain.session import Session
from posttrain.types import Batch, Sample

SAID_AHEAD = "ref_logp"
"""The column of samples that the reference has been asked about."""


@dataclass
class Annotation:
    """`columns` are those of the samples that reach the objective. `samples_its_own`: there are no samples before
    completions are sampled, and those who sample them ask the reference."""

    objective: Objective
    reference: ReferenceModel | None
    columns: tuple[str, ...]
    args: TrainingArguments
    samples_its_own: bool = False

    def packing(self, session: Session, batch_size: int | None = None) -> Packing:
        """What the objective asks of batches, as far as the model can give it."""
        shared = session.policy.shares_prompts and session.policy.neftune_alpha is None
        has_kernels = native.runs(session.policy.device, session.precision.compute_dtype)
        return Packing(
            shared=shared,
            # What is dropped, or is noise, is to be another in each sample.
            beginnings=shared and not any(policy.drops for policy in session.policies()),
            repeats=REPEATS_WITH_KERNELS if has_kernels else REPEATS,
            group_size=None if self.objective.is_sum else batch_size or self.args.per_device_train_batch_size,
            columns=self.columns,
            prompts=self.objective.needs.prompts,
        )

    @property
    def is_ahead(self) -> bool:
        """Whether samples bring what the reference says."""
        return SAID_AHEAD in self.columns

    def open(self, session: Session) -> bool:
        """Before anything is learned: the reference is remembered. True where `ask_ahead` is to follow."""
        if self.reference is None:
            return False
        self.reference.open(session)
        return self.reference.precompute and not self.is_ahead

    def ask_ahead(
        self,
        session: Session,
        sets: Sequence[tuple[str, Sequence[Sample]]],
        token_budget: int,
        stopped: Callable[[], str | None],
    ) -> list[list[Sample]]:
        """Every set, of a name, with what the reference says of it. Afterwards the reference is not needed."""
        reference = self.reference
        assert reference is not None
        ask, depends_on = reference.ask(session), reference.depends_on(session)
        device, packing = session.policy.device, self.packing(session)
        try:
            said = [
                precompute(samples, ask, device, token_budget, packing, reference.folder, depends_on, name, stopped)
                for name, samples in sets
            ]
        finally:
            reference.close()
        self.columns = (*self.columns, SAID_AHEAD)
        return said

    def complete(self, session: Session, samples: Sequence[Sample], name: str, token_budget: int) -> Sequence[Sample]:
        """`samples` that come later, with what the reference says of them where it was asked ahead about all others.
        Raises ConfigError where it is gone."""
        reference = self.reference
        if reference is None or not self.is_ahead or SAID_AHEAD in samples[0][0].columns:
            return samples
        if not reference.can_be_asked:
            raise ConfigError("the reference, the weights that training started from, is gone: it was asked ahead",
                              hint="give this set as eval_dataset, or set precompute_ref_log_probs=False")  # fmt: skip
        ask, packing = reference.ask(session), self.packing(session)
        try:
            return precompute(samples, ask, session.policy.device, token_budget, packing, None, {}, name)
        finally:
            reference.close()

    def close(self) -> None:
        """With the session: a reference with a model of its own gives it back."""
        if self.reference is not None:
            self.reference.close()

    def asker(self, session: Session) -> Reference | None:
        """The reference as it answers now."""
        if self.reference is None:
            return None
        self.reference.open(session)
        return self.reference.ask(session)

    def of_batches(self, session: Session) -> Callable[[Batch], Batch]:
        """What makes a batch ready for the objective: on the device, and with the reference's answers."""
        device = session.policy.device
        is_asked = not self.is_ahead and not self.samples_its_own
        if (ask := self.asker(session) if is_asked else None) is None:
            return lambda batch: batch.to(device)

        def annotate(batch: Batch) -> Batch:
            batch = batch.to(device)
            return batch.with_columns(ref_logp_R=ask(batch))

        return annotate
