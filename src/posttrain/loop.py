"""The training loop, one for every method.

A step takes its micro-batches from the source, sums the objective's terms over them, divides by counts known before the
first forward, checks that loss and gradient are finite, and updates. How the step was cut cannot change the result. The
loop knows no method, no model family and no file format; RL is another source, not another loop.

Order of callbacks, logging, evaluation and saving is transformers'. What the loop adds: a non-finite loss or gradient
never reaches the weights, a signal ends the run at a step boundary with everything saved, and a step that memory does
not suffice for is redone in smaller pieces.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import torch

from posttrain.backoff import BackOff
from posttrain.errors import Interrupted, NonFiniteError, OutOfMemoryError, Stopped, UserError
from posttrain.events import Events
from posttrain.meter import Meter
from posttrain.objectives.base import Metrics, Objective, by_given_names
from posttrain.optimization import follows_metrics
from posttrain.optimizer_state import has_two_modes, mark, nothing_changed
from posttrain.shortage import Shortage, is_out_of_memory, shortage_of
from posttrain.signals import StopRequest
from posttrain.snapshot import capture_rng, restore_rng
from posttrain.types import Batch, Needs, Outputs

logger = logging.getLogger("posttrain")


class Source(Protocol):
    """Where a step's micro-batches come from."""

    token_budget: int

    @property
    def steps_per_epoch(self) -> int: ...

    def micro_batches(self, step: int) -> list[Batch]:
        """What step `step` computes on, cut to the token budget that is set now."""
        ...

    def epoch_after(self, step: int) -> float: ...

    def tokens(self, step: int, micro: list[Batch]) -> int:
        """How many tokens of data step `step` has used."""
        ...

    def state(self, position: int) -> dict[str, Any]:
        """What a run that resumes before step `position` cannot make again, as plain values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


@dataclass
class Loop:
    """Everything one run needs. `annotate` puts a batch on the model's device and gives it the columns that are not
    known from the data (a reference's log-probabilities); `parameters` are what the optimiser trains (masters and
    adapters); `settle` completes their gradients, `publish` copies them into the computing weights; `evaluate` returns
    metrics and `save` a checkpoint's path. `position` is the step of the source that comes next, ahead of `global_step`
    where a callback ended an epoch early; `phase` is what is being done. `schedule` has an objective for each epoch
    (or part of one); `follow` is told what each step's metrics summed up to, and says what else is to be logged."""

    annotate: Callable[[Batch], Batch]
    forward: Callable[[Batch, Needs], Outputs]
    objective: Objective
    source: Source
    optimizer: torch.optim.Optimizer
    scheduler: Any
    parameters: Sequence[torch.nn.Parameter]
    events: Events
    max_steps: int
    max_epochs: int
    max_grad_norm: float
    settle: Callable[[], None]
    publish: Callable[[], None]
    evaluate: Callable[[], dict[str, float] | None]
    save: Callable[[dict[str, Any]], str]
    extra_logs: Callable[[Meter], dict[str, float]]
    flops: Callable[[Batch], float]
    backoff: BackOff
    schedule: Callable[[float], Objective] | None = None
    follow: Callable[[Mapping[str, tuple[float, float]]], Metrics] | None = None
    position: int = 0
    meter: Meter = field(default_factory=Meter)
    _taken: set[str] = field(default_factory=set, repr=False)
    total_loss: float = 0.0
    samples: int = 0
    last_loss: float | None = None
    grad_norm: float = 0.0
    learning_rate: float = 0.0
    epoch_end_due: bool = False
    last_checkpoint: str | None = None
    phase: str = "forward"

    def run(self, stop: StopRequest) -> None:
        """From the present step to the last, or until a callback says stop. Raises Interrupted, NonFiniteError."""
        state = self.events.state
        if state.global_step > 0:  # the run may have been interrupted between a step and what was due after it
            self._after_step(stop)
        per_epoch = self.source.steps_per_epoch
        while state.global_step < self.max_steps and self.position < self.max_epochs * per_epoch:
            if self.events.control.should_training_stop:
                break
            if self.position % per_epoch == 0:
                self.events.epoch_begin()
            self._step(self.position, stop)
            is_last = state.global_step >= self.max_steps
            self.epoch_end_due = is_last or self.position % per_epoch == 0
            self.events.step_end()
            self._after_step(stop)

    def _step(self, step: int, stop: StopRequest) -> None:
        """One optimiser step."""
        rng = capture_rng()
        if has_two_modes(self.optimizer):
            self.optimizer.train()  # type: ignore[attr-defined]
            self.publish()
        self.events.step_begin()
        if self.schedule is not None:
            self.objective = self.schedule(self.source.epoch_after(step))
        self.meter.start_step()
        micro = self._batches(step, stop, rng)
        counts, drawn = total_counts(micro), capture_rng()  # a stream may have drawn numbers
        while (loss := self._gradients(step, micro, counts, stop, rng)) is None:
            micro = self.source.micro_batches(step)
            restore_rng(drawn)
        self.events.pre_optimizer_step()
        self._update()
        self.publish()
        self.events.optimizer_step()
        self.learning_rate = float(self.optimizer.param_groups[0]["lr"])
        self._advance_scheduler()
        self.optimizer.zero_grad()
        self._account(micro, counts, loss)

    def _batches(self, step: int, stop: StopRequest, rng: dict[str, Any]) -> list[Batch]:
        try:
            return self.source.micro_batches(step)
        except Stopped:  # as if this step had never begun
            self._discard(rng)
            self._leave(stop)
        except Exception as error:  # a stream came upon a bad row, a reward failed, completions did not fit
            failed = self._named(error, f"step {self.events.state.global_step + 1}, making batches")
        self.meter.discard_step()
        restore_rng(rng)
        raise self._once_saved(failed)

    def _gradients(
        self, step: int, micro: list[Batch], counts: dict[str, float], stop: StopRequest, rng: dict[str, Any]
    ) -> float | None:
        """The step's loss, its gradients clipped; or None where memory did not suffice and the step, cut into smaller
        pieces, is to be begun again."""
        batch, shortage = None, None
        try:
            loss = torch.zeros((), device=self.parameters[0].device)
            if not micro:  # nothing to learn from; what momentum there is goes on
                for parameter in self.parameters:
                    parameter.grad = torch.zeros_like(parameter)
            for batch in micro:
                loss += self._micro_batch(batch, counts)
                if batch is not micro[-1]:
                    self.events.substep_end()
                if stop.received:
                    self._discard(rng)  # as if this step had never begun
                    self._leave(stop)
            self.phase = "gradients"
            self.settle()
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm or float("inf"))
            loss_value, self.grad_norm = torch.stack([loss.float(), norm.float()]).tolist()  # the one host sync
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = shortage_of(error, self.phase, self.backoff.free())
        if shortage is not None:  # the error is gone by now, and with it the frames that hold activations
            self._discard(rng)
            failed = None if shortage.phase == "gradients" else batch
            self.backoff.make_room(self.events.state.global_step + 1, shortage, micro, failed)
            return None
        if not (_finite(loss_value) and _finite(self.grad_norm)):
            self.optimizer.zero_grad()
            self.publish()  # the copies may be gone
            raise self._non_finite(step, micro, loss_value)
        return loss_value

    def _discard(self, rng: dict[str, Any]) -> None:
        """Undo what an unfinished step has done."""
        self.optimizer.zero_grad()
        self.publish()
        self.meter.discard_step()
        restore_rng(rng)

    def _update(self) -> None:
        """The optimiser's turn. Gradients outlive a failure in it, so it may simply try once more, as long as nothing
        was changed yet."""
        for is_last in (False, True):
            marked, shortage = mark(self.optimizer), None
            try:
                self.optimizer.step()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                shortage = shortage_of(error, "optimiser step", self.backoff.free())
            if shortage is None:
                return
            if is_last or not nothing_changed(self.optimizer, marked):
                raise self._torn(shortage)
            self.backoff.release_unused(self.events.state.global_step + 1, shortage)

    def _named(self, error: Exception, phase: str) -> UserError:
        """`error` as the user's to mend. One that memory ran out with is let go, and with it the frames that hold
        what has to be freed; what is nobody's to mend is raised."""
        if isinstance(error, UserError):
            return error
        if not is_out_of_memory(error):
            raise error
        shortage = shortage_of(error, phase, self.backoff.free())
        return OutOfMemoryError(
            f"{shortage}: it does not fit. Nothing was updated.",
            hint="sample fewer completions at once (max_sampling_rows) or shorter ones (max_completion_length), or "
            "lower token_budget",
        )

    def _once_saved(self, error: UserError) -> UserError:
        """Save what was trained before `error`, which gets a note that says where."""
        step = self.events.state.global_step
        if isinstance(error, OutOfMemoryError):
            self.backoff.give_back()
        if isinstance(error, NonFiniteError) and not all(bool(one.isfinite().all()) for one in self.parameters):
            error.add_note(f"The weights of step {step} are not finite, and not saved. "
                           f"Last checkpoint: {self.last_checkpoint or 'none yet'}")  # fmt: skip
        elif step:
            self._save()
            error.add_note(f"Everything up to step {step} is saved: {self.last_checkpoint}")
        return error

    def _torn(self, shortage: Shortage) -> OutOfMemoryError:
        step = self.events.state.global_step + 1
        kept = self.last_checkpoint or "none yet"
        return OutOfMemoryError(
            f"step {step}, {shortage}: the update could not be finished. Last good checkpoint: {kept}.",
            hint="train an adapter (peft_config), or set optim='adamw_bnb_8bit' or 'adafactor'",
            code="E-OOM-0002",
        )

    def _micro_batch(self, batch: Batch, counts: dict[str, float]) -> torch.Tensor:
        self.phase = "forward"
        batch = self.annotate(batch)
        terms, metrics = self.objective(self.forward(batch, self.objective.needs), batch)
        loss = torch.stack([term / max(1, counts[unit]) for unit, term in terms.items()]).sum()
        self.phase = "backward"
        loss.backward()
        self.meter.add(metrics)
        return loss.detach()

    def _account(self, micro: list[Batch], counts: dict[str, float], loss: float) -> None:
        state = self.events.state
        tokens = self.source.tokens(self.position, micro)
        flops = sum(self.flops(batch) for batch in micro)
        if self.follow is not None:
            self.meter.add(self.follow(self.meter.sums_of_step()))
        self.meter.end_step(loss, tokens, counts.get("tokens", 0), flops)
        self.total_loss += loss
        self.samples += len({sample for batch in micro for sample in batch.sample_S})
        self.last_loss = loss
        state.global_step += 1
        self.position += 1
        state.epoch = self.source.epoch_after(self.position)
        state.num_input_tokens_seen += tokens
        state.total_flos += flops

    def _advance_scheduler(self) -> None:
        if not follows_metrics(self.scheduler):
            self.scheduler.step()

    # --- what is due after a step -----------------------------------------------------------------------------------

    def _after_step(self, stop: StopRequest) -> None:
        """Everything between two steps. A resumed run begins with what its checkpoint says is still due. The end of a
        run ends its epoch too, as in transformers, so that what is due every epoch is not missed."""
        self._act(stop)
        control = self.events.control
        if self.epoch_end_due or control.should_epoch_stop or control.should_training_stop:
            self.epoch_end_due = False
            if control.should_epoch_stop:  # what is left of this epoch is passed over
                self.position += -self.position % self.source.steps_per_epoch
            self.events.epoch_end()
            self._act(stop)
        if stop.received:
            self._leave(stop)

    def _act(self, stop: StopRequest) -> None:
        control = self.events.control
        if control.should_log and self.meter.steps:
            self._log()
        if control.should_evaluate:
            self._evaluate(stop)
        if self.events.control.should_save:
            self.events.control.should_save = False  # a run that resumes from this checkpoint has saved it already
            self._save()
            self.events.save()

    def _log(self) -> None:
        mean_loss = self.meter.loss_sum / self.meter.steps
        extra = self.extra_logs(self.meter)
        rates = self.meter.drain()
        logs = {"loss": mean_loss, "grad_norm": self.grad_norm, "learning_rate": self.learning_rate}
        logs |= rates | {"num_tokens": float(self.events.state.num_input_tokens_seen)} | extra
        named, taken = by_given_names(logs)
        for name in set(taken) - self._taken:
            logger.warning("log_metric(%r) is logged as 'logged/%s': the run has a number of that name", name, name)
        self._taken |= set(taken)
        self.events.log(named)

    def _evaluate(self, stop: StopRequest) -> None:
        failed = None
        try:
            metrics = self.evaluate()
        except Exception as error:  # a reward failed, say; the evaluation is still due where the run is taken up again
            failed = self._named(error, f"evaluation after step {self.events.state.global_step}")
        if failed is not None:
            raise self._once_saved(failed)
        if metrics is None:  # a signal came; evaluation is still due, and the resumed run begins with it
            self._leave(stop)
        if follows_metrics(self.scheduler):
            self.scheduler.step(metrics[self._metric_followed(metrics)])

    def _metric_followed(self, metrics: dict[str, float]) -> str:
        name = self.events.args.metric_for_best_model or "loss"
        return name if name in metrics else f"eval_{name}"

    def _save(self) -> None:
        self.last_checkpoint = self.save(self.resume_state())

    def resume_state(self) -> dict[str, Any]:
        """What the loop needs to go on, as plain values."""
        return {
            "meter": self.meter.state(),
            "total_loss": self.total_loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "epoch_end_due": self.epoch_end_due,
            "epoch_stop_due": self.events.control.should_epoch_stop and self.position % self.source.steps_per_epoch > 0,
            "position": self.position,
            "source": self.source.state(self.position),
            "token_budget": self.source.token_budget,
            "token_budget_asked": self.backoff.asked,
            "oom_backoffs": self.backoff.count,
            "evaluation_due": self.events.control.should_evaluate,
            "save_due": self.events.control.should_save,
        }

    def load_resume_state(self, saved: dict[str, Any]) -> None:
        self.meter.load_state(saved["meter"])
        self.total_loss, self.grad_norm = saved["total_loss"], saved["grad_norm"]
        self.learning_rate, self.epoch_end_due = saved["learning_rate"], saved["epoch_end_due"]
        self.position = saved["position"]
        self.source.load_state(saved.get("source", {}))
        self.backoff.count = saved.get("oom_backoffs", 0)
        if "token_budget" in saved and saved["token_budget_asked"] == self.backoff.asked:
            self.source.token_budget = saved["token_budget"]  # the cut shows in the last bit
        control = self.events.control
        control.should_evaluate, control.should_save = saved["evaluation_due"], saved["save_due"]
        control.should_epoch_stop = saved["epoch_stop_due"]

    # --- leaving ----------------------------------------------------------------------------------------------------

    def _leave(self, stop: StopRequest) -> NoReturn:
        """Save at the last step boundary and raise Interrupted."""
        step = self.events.state.global_step
        if step == 0:
            raise Interrupted(f"Interrupted by {stop.received} before the first step; nothing to save.", None)
        self._save()
        raise Interrupted(f"Interrupted at step {step} ({stop.received}). Saved {self.last_checkpoint}.",
                          self.last_checkpoint)  # fmt: skip

    def _non_finite(self, step: int, micro: list[Batch], loss: float) -> NonFiniteError:
        """Find the sequences at fault, without touching weights or gradients."""
        culprits: list[str] = []
        with torch.no_grad():
            for batch in micro:
                value_R = self.forward(batch, Needs()).per_row(batch)
                bad = batch.sequence_R.to(value_R.device)[~torch.isfinite(value_R)].unique().tolist()
                culprits += [str(batch.origins_S[i]) for i in bad]
        rows = culprits or [str(origin) for batch in micro for origin in batch.origins_S]
        shown = ", ".join(rows[:8]) + (f" and {len(rows) - 8} more" if len(rows) > 8 else "")
        what = f"loss became {loss}" if not _finite(loss) else f"gradient norm became {self.grad_norm}"
        kept = self.last_checkpoint or "none yet; the weights are as they were before this step"
        return NonFiniteError(
            f"step {step + 1}: {what} (batch rows {shown}). Nothing was updated; last good checkpoint: {kept}.",
            hint="lower the learning rate, check these rows, or train in fp32 (bf16=False)",
        )


def total_counts(micro: Sequence[Batch]) -> dict[str, float]:
    """Counts over all micro-batches of a step, known before any forward."""
    totals: dict[str, float] = {}
    for batch in micro:
        for unit, count in batch.counts.items():
            totals[unit] = totals.get(unit, 0) + count
    return totals


def _finite(value: float) -> bool:
    return value - value == 0
