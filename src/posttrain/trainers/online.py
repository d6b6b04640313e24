"""What the trainers share that sample their own completions: how they open, how they evaluate, and what they refuse.
What a run asks of them is in trainers/rollouts.py.

Not here: tools, environments and several turns (refused by name; `rollout_func` does them), images.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from peft import PeftModel
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, set_seed

from posttrain.data.prompts import Prompt, PromptSettings, check_tokens, read_prompts
from posttrain.data.report import DataReport
from posttrain.data.templates import find_template
from posttrain.errors import ConfigError
from posttrain.models.capabilities import learned_places
from posttrain.models.critic import Critic
from posttrain.objectives.base import Objective
from posttrain.reference import ReferenceModel
from posttrain.rewards.check import SHORT_ROWS, Material, before_training, encoder
from posttrain.rollout.advantages import Advantages
from posttrain.rollout.entropy_control import EntropyControl
from posttrain.rollout.generation import Rollout
from posttrain.rollout.kl_control import KLControl
from posttrain.rollout.log import SamplesLog
from posttrain.rollout.source import Learning, Resampling
from posttrain.run import Run
from posttrain.snapshot import capture_rng, restore_rng
from posttrain.trainers.answers import Follow
from posttrain.trainers.arguments import check_arguments
from posttrain.trainers.base import PackedTrainer, make_events
from posttrain.trainers.online_config import OnlineConfig
from posttrain.trainers.opening import as_dict, open_model, read_config, turn_dropout_off
from posttrain.trainers.rewards import open_rewards, refuse_online
from posttrain.trainers.rollouts import TrainerRollouts
from posttrain.types import Sample, Tokenized

logger = logging.getLogger("posttrain")


class OnlineTrainer(PackedTrainer):
    """Base of GRPO, RLOO and PPO. A subclass says what its settings are (`CONFIG`), its advantages (`advantages`) and
    its loss (`objective`). `of_policy` is what the policy is asked of a round before it learns from it.

    Args:
        model: a `PreTrainedModel`, a `PeftModel`, or the name or folder of one.
        reward_funcs: functions `(completions, **columns) -> list of numbers or None` (also asynchronous ones), reward
            models, names of either (`package.module:name`, or a model's), or a list of several.
        args: the method's config, or a plain `TrainingArguments`.
        train_dataset, eval_dataset: rows with a `prompt`, text or messages; other columns reach the rewards. The
            evaluation set may be a dict of several.
        processing_class: the tokenizer (`tokenizer=` is read as this); default: the model's own.
        reward_processing_classes: tokenizers of reward models.
        peft_config: an adapter to add.
        rollout_func: `(prompts, trainer) -> {prompt_ids, completion_ids, logprobs, ...}`, in the place of our sampling.
        optimizers, callbacks: as in transformers.

    Raises: ConfigError for anything that would not be honoured, DataError for rows that cannot be used.
    """

    CONFIG: ClassVar[type[OnlineConfig]]
    args: OnlineConfig
    of_policy: ClassVar[tuple[str, ...]] = ("old_logp_R",)
    critic: Critic | None = None
    kl: KLControl | None = None
    entropy: EntropyControl | None = None

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        reward_processing_classes: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Any = None,
        rollout_func: Any = None,
        environment_factory: Any = None,
        **older: Any,
    ):
        processing_class = older.pop("tokenizer", None) or processing_class
        self.args = read_config(self.CONFIG, model, args, older, type(self).__name__)
        refuse_online(tools=tools, environment_factory=environment_factory)
        self._open(model, processing_class, peft_config, quantization_config)
        self._start(
            reward_funcs, reward_processing_classes, train_dataset, eval_dataset, callbacks, optimizers, rollout_func
        )

    @property
    def logps_first(self) -> bool:
        """Whether advantages are made of what policy and reference say."""
        return False

    def advantages(self, rewards_NF: np.ndarray, rollouts: Sequence[Rollout], group_size: int) -> Advantages:
        raise NotImplementedError

    def objective(self) -> Objective:
        """As it is for the step that comes next."""
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
            turn_dropout_off(self._model)
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
        self.rollouts = TrainerRollouts(self, prompts, args.rounds(len(prompts)), rollout_func)
        self.run = Run(
            model=self._model,
            processing_class=self._tokenizer,
            args=args,
            objective=self.objective(),
            events=make_events(args, callbacks, self._model, self._tokenizer),
            train_samples=_as_samples(prompts),
            eval_sets=eval_sets,  # type: ignore[arg-type]  # prompts; `TrainerRollouts.evaluate` takes them
            token_budget=args.token_budget,
            optimizers=optimizers,
            reference=self._reference() if args.beta else None,
            rollouts=self.rollouts,
            critic=self.critic,
            schedule=None if self.entropy is None else lambda epoch: self.objective(),
            follow=None if self.entropy is None else self.entropy.follow,
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
        material = Material.of([prompt.content for prompt in prompts], columns, encode=encoder(self._tokenizer))
        random = capture_rng()
        try:
            said = before_training(self.rewards, material, self.args.max_completion_length or 1)
        finally:
            restore_rng(random)
        for sentence in said:
            logger.warning("reward   tried before training: %s", sentence)

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
        assert args.max_completion_length is not None
        check_tokens(prompts, *self.limits(), args.max_completion_length)
        lost = report.num_skipped or report.truncated.count
        logger.log(
            logging.WARNING if lost else logging.INFO,
            "data     %s: %d prompts%s",
            report.source,
            report.used,
            f", {report.num_skipped} skipped, {report.truncated.count} cut to max_prompt_length" if lost else "",
        )
        for note in report.notes():
            logger.info("         %s", note)
        return prompts

    def limits(self) -> tuple[int, int | None]:
        """How many tokens are known to every model that reads what is sampled, and for how many in a row it has places,
        where they are learned."""
        models = self._readers()
        places = [number for model in models if (number := learned_places(model)) is not None]
        return min(one.get_input_embeddings().weight.shape[0] for one in models), min(places, default=None)

    def _readers(self) -> list[Any]:
        return [self._model, *([] if self.critic is None else self.critic.models.values())]

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


def _ignore(*_: Any) -> None:
    """What a reward logs of completions that no one has sampled."""


def _as_samples(prompts: Sequence[Prompt]) -> list[Sample]:
    """Prompts as the run counts and fingerprints data."""
    return [(Tokenized(prompt.ids, (), prompt.origin),) for prompt in prompts]
