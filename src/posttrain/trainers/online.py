"""What the trainers share that sample their own completions: how they open, what a run asks of them, and what they
refuse.

Not here: tools, environments and several turns (refused by name; `rollout_func` does them), images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, set_seed

from posttrain.data.prompts import Prompt, PromptSettings, check_tokens, read_prompts
from posttrain.data.report import DataReport
from posttrain.data.templates import find_template
from posttrain.errors import ConfigError, Stopped
from posttrain.evaluate.generation import stop_ids
from posttrain.models.forward import Policy
from posttrain.models.weights import save_weights
from posttrain.objectives.base import Objective
from posttrain.planner import Workload
from posttrain.reference import Reference, ReferenceModel
from posttrain.rewards.check import SHORT_ROWS, Material, before_training
from posttrain.rollout.advantages import Advantages
from posttrain.rollout.engines.local import LocalEngine
from posttrain.rollout.engines.vllm import VllmEngine
from posttrain.rollout.evaluation import evaluate_rollouts
from posttrain.rollout.generation import Rollout
from posttrain.rollout.kl_control import KLControl
from posttrain.rollout.log import SamplesLog
from posttrain.rollout.order import Rounds
from posttrain.rollout.samplers import EngineSampler, FunctionSampler
from posttrain.rollout.scoring import Judge
from posttrain.rollout.source import NO_RESAMPLING, Ask, Learning, Resampling, RolloutSource
from posttrain.run import Run
from posttrain.session import Session
from posttrain.snapshot import capture_rng, restore_rng
from posttrain.trainers.answers import Follow
from posttrain.trainers.arguments import check_arguments
from posttrain.trainers.base import PackedTrainer, make_events
from posttrain.trainers.online_config import OnlineConfig
from posttrain.trainers.opening import as_dict, open_model
from posttrain.trainers.rewards import open_rewards
from posttrain.types import Batch, Needs, Sample, Tokenized

logger = logging.getLogger("posttrain")


class OnlineTrainer(PackedTrainer):
    """Base of GRPO, RLOO and PPO. A subclass says what its advantages are (`advantages`) and what its loss is
    (`objective` of its config). `of_policy` is what the policy is asked of a round before it learns from it."""

    args: OnlineConfig
    of_policy: ClassVar[tuple[str, ...]] = ("old_logp_R",)
    value_head: nn.Linear | None = None
    kl: KLControl | None = None

    @property
    def logps_first(self) -> bool:
        """Whether advantages are made of what policy and reference say."""
        return False

    def advantages(self, rewards_NF: np.ndarray, rollouts: Sequence[Rollout], group_size: int) -> Advantages:
        raise NotImplementedError

    def objective(self) -> Objective:
        raise NotImplementedError

    def learning(self) -> Learning:
        raise NotImplementedError

    def resampling(self) -> Resampling:
        """What becomes of groups without signal."""
        return Resampling()

    # --- opening ------------------------------------------------------------------------------------------------------

    def _open(self, model: Any, tokenizer: Any, peft_config: Any, quantization_config: Any) -> None:
        args = self.args
        check_arguments(args)
        set_seed(args.seed)  # adapters are initialised at random
        self._model, self._tokenizer = open_model(model, tokenizer, args, peft_config, quantization_config)
        if args.disable_dropout:
            for module in self._model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if not args.beta:
            said = f": {args.no_kl_reason}" if args.no_kl_reason else ""
            level = logging.INFO if said else logging.WARNING
            logger.log(
                level,
                "%s=0: nothing holds the policy to the model that training starts from%s%s",
                args.KL_WEIGHT,
                said,
                "" if said else f"; watch the rewards, or set {args.KL_WEIGHT} (no_kl_reason='...' if it is meant)",
            )
        self.data_reports: dict[str, DataReport] = {}

    def _start(
        self,
        reward_funcs: Any,
        reward_processing_classes: Any,
        train_dataset: Any,
        eval_dataset: Any,
        callbacks: list[Any] | None,
        optimizers: Any,
        rollout_func: Any,
    ) -> None:
        args = self.args
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        if train_dataset is None:
            raise ConfigError("train_dataset is required")
        self.rewards = open_rewards(reward_funcs, reward_processing_classes, args)
        prompts = self._prompts(train_dataset, "train")
        several = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
        eval_sets = {name: self._prompts(one, name or "eval") for name, one in several.items() if one is not None}
        self.rollouts = _Rollouts(self, prompts, args.rounds(len(prompts)), rollout_func)
        self.run = Run(
            model=self._model,
            processing_class=self._tokenizer,
            args=args,
            objective=self.objective(),
            events=make_events(args, callbacks, self._model, self._tokenizer),
            train_samples=_as_samples(prompts),
            eval_sets=eval_sets,  # type: ignore[arg-type]  # prompts; `_Rollouts.evaluate` takes them
            token_budget=args.token_budget,
            optimizers=optimizers,
            reference=self._reference() if args.beta else None,
            rollouts=self.rollouts,
            value_head=self.value_head,
        )
        if self.run.reference is not None and self.run.reference.moves:
            self.add_callback(Follow(self.run.reference))
        if args.log_completions:
            self.add_callback(_Show(self.rollouts.log))
        if args.eval_strategy != IntervalStrategy.NO and not eval_sets:
            raise ConfigError(f"eval_strategy={args.eval_strategy.value!r} needs an eval_dataset")

    def before_training(self) -> None:
        """As ever, and a short trial of the rewards (`reward_check`)."""
        super().before_training()
        if self.args.reward_check and self.rollouts.rollout_func is None:
            self._try_rewards()

    def _try_rewards(self) -> None:
        """On a few rows, before anything is sampled. Raises RewardError; changes no random state."""
        prompts = self.rollouts.prompts[:SHORT_ROWS]
        names = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
        self.rewards.extra = {"trainer_state": self.state, "log_extra": _ignore, "log_metric": _ignore}
        material = Material.of([prompt.content for prompt in prompts], columns, encode=self._encode)
        random = capture_rng()
        try:
            said = before_training(self.rewards, material, self.args.max_completion_length or 1)
        finally:
            restore_rng(random)
        for sentence in said:
            logger.warning("reward   tried before training: %s", sentence)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _prompts(self, dataset: Any, name: str) -> list[Prompt]:
        args = self.args
        template = find_template(args.chat_template_path or "")
        settings = PromptSettings(
            as_dict(args.dataset_columns),
            args.max_prompt_length,
            template.name if template is not None else None,
            as_dict(args.chat_template_kwargs),
            args.on_bad_row,
        )
        prompts, report = read_prompts(dataset, self._tokenizer, settings, name)
        self.data_reports[name] = report
        base = self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model
        config = base.config.get_text_config()
        places = config.max_position_embeddings if config.model_type == "gpt2" else None
        assert args.max_completion_length is not None
        check_tokens(prompts, base.get_input_embeddings().weight.shape[0], places, args.max_completion_length)
        lost = report.num_skipped or report.truncated.count
        logger.log(
            logging.WARNING if lost else logging.INFO,
            "data     %s: %d prompts%s",
            report.source,
            report.used,
            f", {report.num_skipped} skipped, {report.truncated.count} cut to max_prompt_length" if lost else "",
        )
        return prompts

    def _reference(self) -> ReferenceModel:
        args = self.args
        if args.sync_ref_model and isinstance(self._model, PeftModel):
            raise ConfigError("sync_ref_model=True is not honoured with an adapter: its reference has no weights",
                              hint="train all weights (no peft_config), or leave it out")  # fmt: skip
        return ReferenceModel(None, None, False, None, moves=args.sync_ref_model)

    @property
    def reward_func_names(self) -> list[str]:
        return list(self.rewards.functions)

    @property
    def reward_weights(self) -> list[float]:
        return list(self.rewards.weights)

    @property
    def num_generations(self) -> int | None:
        return self.args.num_generations

    @property
    def max_completion_length(self) -> int | None:
        return self.args.max_completion_length

    @property
    def temperature(self) -> float:
        return self.args.temperature

    @property
    def beta(self) -> float:
        return self.args.beta

    @property
    def reward_funcs(self) -> list[Any]:
        return list(self.rewards.functions.values())

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample, judge, and say what the loss would be (default: of the trainer's own set; a string names one)."""
        if ignore_keys is not None:
            raise ConfigError("evaluate(ignore_keys=...) is not honoured")
        if isinstance(eval_dataset, str) and eval_dataset in self.run.eval_sets:
            sets: Any = {"": self.run.eval_sets[eval_dataset]}
        elif eval_dataset is None:
            sets = self.run.eval_sets
        else:
            several = eval_dataset if isinstance(eval_dataset, Mapping) else {"": eval_dataset}
            sets = {name: self._prompts(one, name or "eval") for name, one in several.items()}
        metrics = self.run.evaluate(sets, prefix=metric_key_prefix)
        assert metrics is not None
        return metrics


class _Show(TrainerCallback):
    """Prints completions of the latest round whenever there is a log line."""

    def __init__(self, log: SamplesLog):
        self.log = log

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.log.latest:
            print(self.log.shown(args.num_completions_to_print, args.log_unique_prompts), flush=True)
            self.log.latest = []


class _Rollouts:
    """What the run asks of a trainer that samples (`posttrain.run.Rollouts`)."""

    def __init__(self, trainer: OnlineTrainer, prompts: list[Prompt], rounds: Rounds, rollout_func: Any):
        self.trainer, self.prompts, self.rounds, self.rollout_func = trainer, prompts, rounds, rollout_func
        self.log = SamplesLog(trainer.args.output_dir or ".", prompts)
        self.engine: LocalEngine | VllmEngine | None = None
        self.source = self._source(prompts, rounds, trainer.args.num_generations or 1, trainer.resampling())
        self.source.log, self.source.kl = self.log, trainer.kl

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

    @property
    def workload(self) -> Workload:
        """Of a round: every group's prompt and completions of full length, which few are."""
        args = self.trainer.args
        longest_completion, count = args.max_completion_length or 0, args.num_generations or 1
        lengths = sorted((len(prompt.ids) for prompt in self.prompts), reverse=True)
        groups = max(1, args.per_device_train_batch_size * args.gradient_accumulation_steps // count)
        longest = lengths[0] + longest_completion
        usual = groups * (sum(lengths) // len(lengths) + count * longest_completion // 2)
        return Workload(usual, sum(lengths[:groups]) + groups * count * longest_completion, longest)

    def identity(self) -> dict[str, Any]:
        args, trainer = self.trainer.args, self.trainer
        return {
            **{name: getattr(args, name) for name in args.MAKES_ROUNDS},
            "sampling": args.sampling(),
            "rewards": dict(zip(trainer.rewards.functions, trainer.rewards.weights, strict=True)),
            "rollout_func": self.rollout_func is not None,
        }

    def open(self, session: Session, reference: Reference | None, stopped: Callable[[], bool]) -> None:
        args, source = self.trainer.args, self.source
        ends = self._ends(session)
        if args.use_vllm:
            self.engine = self._server(session)
        else:
            self.engine = LocalEngine(session.policy, ends, self._decode, args.max_sampling_rows)
        source.sample = self._sampler(self.prompts, ends)
        source.ask_policy = _asked(session.policy, with_values="old_value_R" in source.of_policy)
        source.ask_reference = None if reference is None else lambda batch: (reference(batch),)
        source.packing = self.trainer.run._packing(session)
        source.stopped = stopped

    def _ends(self, session: Session) -> list[int]:
        """What ends a completion: the model's own tokens, and stop strings that are tokens, which no text shows."""
        known = self.trainer._tokenizer.get_added_vocab()
        stops = [known[text] for text in self.trainer.args.sampling().stop if text in known]
        return sorted({*stop_ids(session.policy.base, self.trainer._tokenizer), *stops})

    def _sampler(self, prompts: Sequence[Prompt], ends: Sequence[int]) -> Any:
        if self.rollout_func is not None:
            pad = self.trainer._tokenizer.pad_token_id
            end_ids = frozenset({*ends, *(() if pad is None else (pad,))})  # as in TRL
            vocabulary = self.trainer._model.get_input_embeddings().weight.shape[0]
            return FunctionSampler(self.rollout_func, self.trainer, prompts, end_ids, vocabulary)
        assert self.engine is not None
        return EngineSampler(self.engine, prompts, self.trainer.args.sampling())

    def _server(self, session: Session) -> VllmEngine:
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
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        name = args.vllm_server_model or model.get_base_model().config._name_or_path
        return VllmEngine(url, name, args.vllm_server_timeout, save, Path(args.output_dir or ".") / "vllm")

    def _decode(self, ids: list[int]) -> str:
        return str(self.trainer._tokenizer.decode(ids, skip_special_tokens=True))

    def resumed(self, step: int) -> None:
        self.log.forget_after(step)
        if step == 0 and self.source.kl is not None:
            self.source.kl.restart()

    def evaluate(
        self, session: Session, prompts: Any, stopped: Callable[[], bool], batch_done: Callable[[], None]
    ) -> dict[str, float] | None:
        args = self.trainer.args
        count = args.num_generations_eval or args.num_generations or 1
        a_round = max(1, args.per_device_eval_batch_size // count)
        source = self._source(prompts, Rounds(len(prompts), min(a_round, len(prompts)), 1, 1, 1, None), count)
        source.sample = self._sampler(prompts, self._ends(session))
        source.ask_policy, source.ask_reference = self.source.ask_policy, self.source.ask_reference
        source.packing, source.stopped = self.source.packing, stopped
        source.token_budget = self.trainer.run._budget()
        try:
            return evaluate_rollouts(source, session.policy, self.trainer.run.objective, batch_done)
        except Stopped:
            return None


def _ignore(*_: Any) -> None:
    """What a reward logs of completions that no one has sampled."""


def _not_open(places: Sequence[int], count: int, key: int, stopped: Callable[[], bool]) -> list[Rollout]:
    raise AssertionError("nothing can be sampled before the session is open")


def _as_samples(prompts: Sequence[Prompt]) -> list[Sample]:
    """Prompts as the run counts and fingerprints data."""
    return [(Tokenized(prompt.ids, (), prompt.origin),) for prompt in prompts]


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
