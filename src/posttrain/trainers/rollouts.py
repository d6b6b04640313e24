"""What a run asks of a trainer that samples: a source of rollouts, the engine behind it, and how it is evaluated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from posttrain.data.prompts import Prompt
from posttrain.errors import ConfigError, Stopped
from posttrain.evaluate.generation import stop_ids
from posttrain.models.forward import Policy
from posttrain.models.lean_decoding import sampling_bytes
from posttrain.models.weights import save_weights
from posttrain.planner import Workload
from posttrain.reference import Reference
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.engines.vllm import VllmEngine
from posttrain.rollout.evaluation import evaluate_rollouts
from posttrain.rollout.fitting import RowsAtOnce
from posttrain.rollout.generation import Rollout
from posttrain.rollout.log import SamplesLog
from posttrain.rollout.order import Rounds
from posttrain.rollout.samplers import EngineSampler, FunctionSampler
from posttrain.rollout.scoring import Judge
from posttrain.rollout.source import NO_RESAMPLING, Ask, Resampling, RolloutSource
from posttrain.session import Session
from posttrain.types import Batch, Needs

if TYPE_CHECKING:
    from posttrain.trainers.online import OnlineTrainer


class TrainerRollouts:
    """What the run asks of a trainer that samples (`posttrain.course.Rollouts`)."""

    def __init__(self, trainer: OnlineTrainer, prompts: list[Prompt], rounds: Rounds, rollout_func: Any):
        self.trainer, self.prompts, self.rounds, self.rollout_func = trainer, prompts, rounds, rollout_func
        self.log = SamplesLog(trainer.args.output_dir or ".", prompts)
        self.engine: LocalEngine | VllmEngine | None = None
        self.source = self._source(prompts, rounds, trainer.args.num_generations or 1, trainer.resampling())
        self.source.log, self.source.kl, self.source.entropy = self.log, trainer.kl, trainer.entropy

    def _source(
        self, prompts: Sequence[Prompt], rounds: Rounds, count: int, resampling: Resampling = NO_RESAMPLING
    ) -> RolloutSource:
        trainer, args = self.trainer, self.trainer.args
        learning = trainer.learning()
        return RolloutSource(
            prompts=prompts,
            rounds=rounds,
            count=count,
            sample=_not_open,
            judge=Judge(prompts, trainer._tokenizer, trainer.rewards, lambda: trainer.state),
            advantages=lambda rewards_NF, rollouts: trainer.advantages(rewards_NF, rollouts, count),
            learning=learning,
            token_budget=args.token_budget or 0,
            needs_old=trainer.logps_first or not rounds.is_on_policy or args.use_vllm,
            needs_reference=bool(args.beta),
            logps_first=trainer.logps_first,
            of_policy=trainer.of_policy,
            resampling=resampling,
        )

    def workload(self, session: Session) -> Workload:
        """Of a round: every group's prompt and completions of full length, which few are."""
        args = self.trainer.args
        longest_completion, count = args.max_completion_length or 0, args.num_generations or 1
        lengths = sorted((len(prompt.ids) for prompt in self.prompts), reverse=True)
        groups = max(1, args.per_device_train_batch_size * args.gradient_accumulation_steps // count)
        sampled = max(groups, self.rounds.prompts_per_round) * count
        longest = lengths[0] + longest_completion
        usual = groups * (sum(lengths) // len(lengths) + count * longest_completion // 2)
        beside = 0
        if self.rollout_func is None and not args.use_vllm:
            beside = sampling_bytes(session.policy, min(args.max_sampling_rows, sampled), longest)
        return Workload(usual, sum(lengths[:groups]) + groups * count * longest_completion, longest, beside)

    def identity(self) -> dict[str, Any]:
        args, trainer = self.trainer.args, self.trainer
        return {
            **{name: getattr(args, name) for name in args.MAKES_ROUNDS},
            "sampling": args.sampling(),
            "rewards": dict(zip(trainer.rewards.functions, trainer.rewards.weights, strict=True)),
            "rollout_func": self.rollout_func is not None,
            **({} if trainer.entropy is None else {"entropy control": trainer.entropy.settings}),
        }

    def open(self, session: Session, reference: Reference | None) -> None:
        args, source = self.trainer.args, self.source
        ends = self._ends(session)
        if args.use_vllm:
            self.engine = self._server(session, ends)
        elif not (isinstance(self.engine, LocalEngine) and self.engine.policy is session.policy):
            self.engine = LocalEngine(session.policy, ends, self._decode, args.max_sampling_rows)
        if isinstance(self.engine, LocalEngine):
            source.rows = RowsAtOnce(self.engine, args.max_sampling_rows)
        source.sample = self._sampler(self.prompts, ends)
        source.ask_policy = _asked(session.policy, with_values="old_value_R" in source.of_policy)
        source.ask_reference = None if reference is None else lambda batch: (reference(batch),)
        source.packing = self.trainer.run.annotation.packing(session)

    def _ends(self, session: Session) -> list[int]:
        """What ends a completion: the model's own tokens, and stop strings that are tokens, which no text shows."""
        known = self.trainer._tokenizer.get_added_vocab()
        stops = [known[text] for text in self.trainer.args.sampling().stop if text in known]
        return sorted({*stop_ids(session.policy.base, self.trainer._tokenizer), *stops})

    def _sampler(self, prompts: Sequence[Prompt], ends: Sequence[int]) -> Any:
        if self.rollout_func is not None:
            pad = self.trainer._tokenizer.pad_token_id
            end_ids = frozenset({*ends, *(() if pad is None else (pad,))})  # as in TRL
            limits, deadline = self.trainer.limits(), self.trainer.args.rollout_timeout
            return FunctionSampler(self.rollout_func, self.trainer, prompts, end_ids, *limits, deadline=deadline)
        assert self.engine is not None
        return EngineSampler(self.engine, prompts, self.trainer.args.sampling())

    def _server(self, session: Session, ends: Sequence[int]) -> VllmEngine:
        """One for all sessions, which gets the adapter of the present one."""
        args, model = self.trainer.args, self.trainer._model
        if not isinstance(model, PeftModel):
            raise ConfigError("use_vllm=True is honoured with an adapter only: other weights are not sent there",
                              hint="give peft_config, or leave use_vllm out")  # fmt: skip

        def save(into: Path) -> None:
            with session.precision.exported():
                save_weights(model, into)

        if isinstance(self.engine, VllmEngine):
            self.engine.save_adapter = save
            return self.engine
        name = args.vllm_server_model or model.get_base_model().config._name_or_path
        return VllmEngine(
            args.vllm_url(), name, args.vllm_server_timeout, save, Path(args.output_dir or ".") / "vllm", ends
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self.trainer._tokenizer.decode(ids, skip_special_tokens=True))

    def resumed(self, step: int) -> None:
        self.log.forget_after(step)
        for control in (self.source.kl, self.source.entropy):
            if step == 0 and control is not None:
                control.restart()

    def evaluate(
        self, session: Session, prompts: Any, stopped: Callable[[], bool], batch_done: Callable[[], None]
    ) -> dict[str, float] | None:
        args = self.trainer.args
        count = args.num_generations_eval or args.num_generations or 1
        a_round = max(1, args.per_device_eval_batch_size // count)
        source = self._source(prompts, Rounds(len(prompts), min(a_round, len(prompts)), 1, 1, 1, None), count)
        source.judge.learns = False
        source.sample = self._sampler(prompts, self._ends(session))
        source.ask_policy, source.ask_reference = self.source.ask_policy, self.source.ask_reference
        source.packing, source.stopped = self.source.packing, stopped
        source.token_budget = self.trainer.run._budget()
        try:
            return evaluate_rollouts(source, session.policy, self.trainer.objective(), batch_done)
        except Stopped:
            return None


def _not_open(places: Sequence[int], count: int, key: int, stopped: Callable[[], bool]) -> list[Rollout]:
    raise AssertionError("nothing can be sampled before the session is open")


def _asked(policy: Policy, with_values: bool) -> Ask:
    """What the policy says as it is now, without dropout and gradient: log-probabilities, and values."""

    @torch.no_grad()
    def ask(batch: Batch) -> tuple[torch.Tensor, ...]:
        training = policy.model.training
        policy.model.eval()
        try:
            outputs = policy(batch, Needs(value=with_values))
            return (outputs.logp_R,) if outputs.value_R is None else (outputs.logp_R, outputs.value_R)
        finally:
            policy.model.train(training)

    return ask
