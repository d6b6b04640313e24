"""The one place that knows everything: a model, data, an objective and settings become a run of the loop.

`Run` opens the model, makes optimiser, schedule and source, takes up a checkpoint where asked, trains, evaluates and
saves. Weights are safe on disk before anything else happens after the last step.
"""

from __future__ import annotations

import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import TrainOutput, enable_full_determinism, set_seed, speed_metrics

from posttrain import identity, snapshot
from posttrain.annotation import Annotation
from posttrain.backoff import BackOff, make_state_or_raise
from posttrain.course import Course, Rollouts, Samples, course_of, course_over, workload_of
from posttrain.data.fingerprint import fingerprint
from posttrain.errors import ConfigError
from posttrain.evaluate.best import note_best
from posttrain.evaluate.loss import evaluate_loss
from posttrain.events import Events
from posttrain.gauges import flops_of, machine_logs
from posttrain.keeping import Keeper, weights_to_use
from posttrain.locks import only_run_in
from posttrain.loop import Loop
from posttrain.models.available import free_memory
from posttrain.models.critic import Critic
from posttrain.models.memory import give_back_all, keeping_freed_pages
from posttrain.objectives.base import Metrics, Objective
from posttrain.optimization import check_holds, check_holds_all_of, make_optimizer, make_scheduler
from posttrain.optimizer_state import has_two_modes
from posttrain.planner import default_token_budget, make_plan
from posttrain.reference import ReferenceModel
from posttrain.session import Session
from posttrain.signals import StopRequest
from posttrain.types import Sample

logger = logging.getLogger("posttrain")


class TrainResult(TrainOutput):
    """transformers' `TrainOutput`, with the `epoch` that so many scripts ask it for. `last_loss` is the last step's,
    None if none was taken."""

    last_loss: float | None = None

    @property
    def epoch(self) -> float:
        return self.metrics["epoch"]


@dataclass
class Run:
    """`train_samples` is a list, or a function that starts a new pass over a stream. `predict` computes the user's own
    metrics over an evaluation set; `schedule` has the objective for each moment, in epochs, where it changes, and
    `follow` is told what each step's metrics summed up to; `first_look` is called before the first step, while the
    model is what it was. With `rollouts` completions are sampled as training goes: `train_samples` are the prompts
    alone, and evaluation sets are what it knows how to evaluate. A `critic` is trained beside the model."""

    model: Any
    processing_class: Any
    args: TrainingArguments
    objective: Objective
    events: Events
    train_samples: Samples
    eval_sets: Mapping[str, Sequence[Sample]]
    token_budget: int | None = None
    predict: Callable[[Session, Sequence[Sample], str], dict[str, float]] | None = None
    reference: ReferenceModel | None = None
    schedule: Callable[[float], Objective] | None = None
    follow: Callable[[Mapping[str, tuple[float, float]]], Metrics] | None = None
    first_look: Callable[[Session], None] | None = None
    rollouts: Rollouts | None = None
    critic: Critic | None = None
    optimizers: tuple[Any, Any] = (None, None)
    optimizer_choice: tuple[type, dict[str, Any]] | None = None
    session: Session | None = None
    source: Any = None
    optimizer: Any = None
    scheduler: Any = None
    columns: tuple[str, ...] = ()
    annotation: Annotation = field(init=False, repr=False)
    keeper: Keeper = field(init=False, repr=False)
    identity: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        samples_its_own = self.rollouts is not None
        self.annotation = Annotation(self.objective, self.reference, self.columns, self.args, samples_its_own)
        run_id = time.strftime("%Y%m%d-%H%M%S-") + secrets.token_hex(2)
        kept = (self.model, self.processing_class, self.args, self.events, run_id)
        self.keeper = Keeper(*kept, self.reference, self.critic)

    # --- training ---------------------------------------------------------------------------------------------------

    def train(self, resume: str | bool | None) -> TrainResult:
        """Raises Interrupted, NonFiniteError, CheckpointError, ConfigError, LockedError."""
        args = self.args
        (enable_full_determinism if args.full_determinism else set_seed)(args.seed)
        self.source = None
        course = self._course()
        source, max_steps, epochs = course.source, course.max_steps, course.epochs
        with only_run_in(Path(args.output_dir), self.keeper.run_id), self._open() as session, StopRequest() as stop:
            session.policy.model.train()
            source.packing = self.annotation.packing(session)
            if self.first_look is not None:
                self.first_look(session)
            self._ask_ahead(session, source, stop)
            started = time.time()
            source.token_budget = self._plan(session)
            self.source = source
            if self.rollouts is not None:
                self.rollouts.open(session, self.annotation.asker(session))
                source.stopped = lambda: stop.received is not None
            loop = self._loop(session, source, max_steps, epochs, stop)
            if self.rollouts is not None:
                source.report = loop.meter.add
                source.load_state({})  # what an earlier run has sampled
            folder = self.keeper.folder_to_resume(resume)
            self.identity = self._identity(session)
            rng = self._take_up(session, loop, folder) if folder is not None else None
            if rng is None:
                self.events.reset_state()
            make_state_or_raise(self.optimizer, session.policy.device)
            first_step = self.events.state.global_step
            if first_step >= max_steps:
                logger.warning("%s is at step %d of %d: nothing is left to train", folder, first_step, max_steps)
            self.events.start(max_steps, epochs, self.optimizer, self.scheduler, self.model)
            if rng is not None:
                snapshot.restore_rng(rng)
            if self.rollouts is not None:
                self.rollouts.resumed(first_step)
            if args.eval_on_start and first_step == 0:
                self.evaluate(self.eval_sets, stop)
            try:
                loop.run(stop)
            finally:  # the model is given back with the weights to use
                if has_two_modes(self.optimizer):
                    self.optimizer.eval()
                    session.precision.publish()
            return self._finish(session, loop, started, first_step)

    def _course(self) -> Course:
        if self.rollouts is None:
            return course_of(self.train_samples, self.args, self._budget())
        source = self.rollouts.source
        source.token_budget = self._budget()
        return course_over(source, self.args)

    def _budget(self) -> int:
        if self.source is not None:  # as training has found it
            return self.source.token_budget
        return self.token_budget or default_token_budget(self.args.device)

    # --- memory -----------------------------------------------------------------------------------------------------

    def _plan(self, session: Session) -> int:
        """Decide what is made again in the backward pass, and the token budget, which is returned."""
        args = self.args
        rollouts = self.rollouts
        work = workload_of(self.train_samples, args, self._budget()) if rollouts is None else rollouts.workload(session)
        return make_plan(
            session,
            work,
            optimizer=str(getattr(args.optim, "value", args.optim)),
            token_budget=self.token_budget,
            recompute=getattr(args, "recompute", "auto"),
            max_memory=getattr(args, "max_memory", None),
        ).token_budget

    def _backoff(self, session: Session, source: Any) -> BackOff:
        return BackOff(
            source=source,
            recompute_more=session.recompute_more,
            recomputation=lambda: session.recomputation,
            forget=session.precision.drop_gradients,
            give_back=give_back_all,
            free=lambda: free_memory(session.policy.device),
            asked=self.token_budget,
        )

    def _loop(self, session: Session, source: Any, max_steps: int, max_epochs: int, stop: StopRequest) -> Loop:
        args = self.args
        if not session.trained:
            raise ConfigError("no parameter is trained", hint="leave something unfrozen, or give peft_config")
        optimizer, scheduler = self.optimizers
        if optimizer is not None:
            check_holds(optimizer, session.trained)
        with session.precision.exported():  # the optimiser finds the masters in the model
            beside = {} if self.critic is None else self.critic.models
            chosen = self.optimizer_choice
            self.optimizer = optimizer or make_optimizer(args, self.model, session.trained, chosen, beside)
        if self.critic is not None:
            check_holds_all_of(self.critic.name, self.optimizer, session.trained)
        self.scheduler = scheduler or make_scheduler(args, self.optimizer, max_steps)
        return Loop(
            annotate=self.annotation.of_batches(session),
            forward=session.policy,
            objective=self.objective,
            source=source,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            parameters=list(session.trained.values()),
            events=self.events,
            max_steps=max_steps,
            max_epochs=max_epochs,
            max_grad_norm=args.max_grad_norm or 0.0,
            settle=session.precision.settle,
            publish=session.precision.publish,
            evaluate=lambda: self._evaluate_due(stop),
            save=lambda state: self.keeper.write_checkpoint(
                session, self.optimizer, self.scheduler, self.identity, state
            ),
            extra_logs=machine_logs(session, args, lambda: self.events.state),
            flops=flops_of(session),
            backoff=self._backoff(session, source),
            schedule=self.schedule,
            follow=self.follow,
        )

    def _finish(self, session: Session, loop: Loop, started: float, first_step: int) -> TrainResult:
        args, state = self.args, self.events.state
        steps = state.global_step - first_step
        metrics = speed_metrics("train", started, num_samples=loop.samples, num_steps=steps)
        train_loss = loop.total_loss / max(1, state.global_step)
        metrics |= {"total_flos": state.total_flos, "train_loss": train_loss}
        if loop.backoff.count:
            metrics["oom_backoffs"] = loop.backoff.count
        metrics = self.events.log(metrics)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            self.keeper.read_weights(session, Path(state.best_model_checkpoint))
            session.precision.publish()
        self.events.train_end()
        result = TrainResult(state.global_step, train_loss, metrics)
        result.last_loss = loop.last_loss
        return result

    def _ask_ahead(self, session: Session, source: Any, stop: StopRequest) -> None:
        """Before anything is learned: the reference is remembered, or asked all its questions ahead."""
        if not self.annotation.open(session):
            return
        sets = [("train", source.samples), *((name or "eval", samples) for name, samples in self.eval_sets.items())]
        train, *others = self.annotation.ask_ahead(session, sets, self._budget(), lambda: stop.received)
        source.samples = self.train_samples = train
        self.eval_sets = dict(zip(self.eval_sets, others, strict=True))
        source.packing = self.annotation.packing(session)

    # --- evaluation -------------------------------------------------------------------------------------------------

    def evaluate(
        self,
        sets: Mapping[str, Sequence[Sample]],
        stop: StopRequest | None = None,
        *,
        prefix: str = "eval",
        logged: bool = True,
    ) -> dict[str, float] | None:
        """Metrics of every set under `prefix` (or `prefix_<name>`), logged and told to callbacks unless not `logged`;
        with several sets also their mean loss as `prefix_loss`. None if a signal came meanwhile."""
        if not sets:
            raise ConfigError("there is nothing to evaluate", hint="give eval_dataset, or set eval_strategy='no'")
        metrics: dict[str, float] = {}
        metrics_by_set: list[dict[str, float]] = []  # logged together, or after a signal not at all
        with self._open() as session, _evaluating(session), weights_to_use(session, self.optimizer):
            for name, samples in sets.items():
                one = self._evaluate_set(session, samples, f"{prefix}_{name}" if name else prefix, stop)
                if one is None:
                    return None
                metrics_by_set.append(one)
        for one in metrics_by_set:
            metrics |= self.events.log(one) if logged else one
        if "" not in sets:
            metrics[f"{prefix}_loss"] = sum(metrics[f"{prefix}_{name}_loss"] for name in sets) / len(sets)
        if logged:
            self.events.evaluated(metrics)
        return metrics

    def _evaluate_due(self, stop: StopRequest) -> dict[str, float] | None:
        """An evaluation that is part of training, and so may find the best model."""
        metrics = self.evaluate(self.eval_sets, stop)
        if metrics is not None:
            note_best(self.events, metrics)
        return metrics

    def _objective_now(self) -> Objective:
        """That of the last step: at the end of an epoch the next one has not begun."""
        if self.schedule is None:
            return self.objective
        step = 0.0 if self.source is None else 1 / max(1, self.source.steps_per_epoch)
        return self.schedule(max(0.0, (self.events.state.epoch or 0.0) - step))

    def _evaluate_set(
        self, session: Session, samples: Sequence[Sample], prefix: str, stop: StopRequest | None
    ) -> dict[str, float] | None:
        args, started = self.args, time.time()

        def stopped() -> bool:
            return stop is not None and stop.received is not None

        if self.rollouts is not None:
            self.rollouts.open(session, self.annotation.asker(session))
            values = self.rollouts.evaluate(session, samples, stopped, self.events.prediction_step)
        else:
            samples = self.annotation.complete(session, samples, prefix, self._budget())
            values = evaluate_loss(
                session.policy,
                self._objective_now(),
                samples,
                args.per_device_eval_batch_size,
                self._budget(),
                stopped=stopped,
                batch_done=self.events.prediction_step,
                packing=self.annotation.packing(session, args.per_device_eval_batch_size),
                annotate=self.annotation.of_batches(session),
            )
        if values is None:
            return None
        metrics = {f"{prefix}_{name}": value for name, value in values.items()}
        if self.predict is not None:
            metrics |= self.predict(session, samples, prefix)
        steps = math.ceil(len(samples) / args.per_device_eval_batch_size)
        metrics |= speed_metrics(prefix, started, num_samples=len(samples), num_steps=steps)
        return metrics | {f"{prefix}_num_tokens": float(self.events.state.num_input_tokens_seen)}

    # --- what is kept -----------------------------------------------------------------------------------------------

    def write_model(self, folder: Path) -> None:
        """Weights, tokenizer and settings, so that the folder can be loaded by PEFT or transformers as it is."""
        self.keeper.write_model(folder, self.session)

    def _take_up(self, session: Session, loop: Loop, folder: Path) -> dict[str, Any]:
        """Load everything a checkpoint holds; the random state is returned, to be set last."""
        loop_state, rng = self.keeper.take_up(folder, session, self.optimizer, self.scheduler, self.identity)
        loop.load_resume_state(loop_state)
        loop.last_checkpoint = str(folder)
        return rng

    def _identity(self, session: Session) -> dict[str, Any]:
        args, samples = self.args, self.train_samples
        made = {
            **identity.of_settings(args),
            "training data (hash of its tokens)": None if callable(samples) else fingerprint(samples),
            "number of trained parameters": sum(parameter.numel() for parameter in session.trained.values()),
            "optimizer": type(self.optimizer).__name__,
            "adapter": identity.of_adapter(self.model),
            **identity.of_objective(self.objective, args),
            **identity.of_reference(self.reference, session, args),
        }
        if self.rollouts is not None:
            made["how completions are sampled"] = identity.comparable(self.rollouts.identity())
        if not (self.optimizers[0] or self.optimizer_choice):
            made |= identity.of_schedule(args)
        return made

    # --- the open model ---------------------------------------------------------------------------------------------

    @contextmanager
    def _open(self) -> Iterator[Session]:
        """The session in use, or one for the time being."""
        if self.session is not None:
            yield self.session
            return
        with keeping_freed_pages(self.args.device):
            self.session = Session.open(self.model, self.args, self.critic)
            try:
                yield self.session
            finally:
                self.annotation.close()
                session, self.session = self.session, None
                session.close()


@contextmanager
def _evaluating(session: Session) -> Iterator[None]:
    model, training = session.policy.model, session.policy.model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
