"""Settings that the methods share which sample their own completions (GRPO, RLOO): TRL 1.16's, and a few of ours."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar
from urllib.parse import urlsplit

from posttrain.course import data_seed
from posttrain.errors import ConfigError
from posttrain.rollout.order import Rounds
from posttrain.rollout.sampling import Sampling
from posttrain.trainers.config import PackedConfig
from posttrain.trainers.spellings import Rewrite, refused, renamed

GENERATION_KWARGS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "stop_strings": "stop",
    "stop": "stop",
    "seed": "seed",
    "max_tokens": "max_tokens",
    "max_new_tokens": "max_tokens",
}
"""What `generation_kwargs` may say, and what we call it."""
logger = logging.getLogger("posttrain")
LONGEST = 1e8
"""Seconds, three years: the system's timers take no more for sure."""
OF_VLLM_HERE = "Not honoured: vLLM is no part of this process; give it to `vllm serve`."
OF_VLLM = (
    "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
)  # fmt: skip
VLLM_FIELDS = (
    "vllm_mode", "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout",
    "vllm_server_model",
)  # fmt: skip
INSTEAD = {
    **dict.fromkeys(OF_VLLM, "vLLM is no part of this process; give it to `vllm serve`"),
    "dataset_streaming": "prompts are read whole before training; they are short",
    "dataset_format": "rows are prompts: a column `prompt`, text or messages (dataset_columns renames another)",
    "truncation_mode": "max_prompt_length cuts off a prompt's beginning",
    "train_sampling_strategy": "shuffle_dataset says whether prompts come in random order",
    "label_smoothing_factor": "it is of supervised training",
    "cast_lm_head_to_fp32": "the soft-max and what follows it are in fp32 anyway",
    "max_length": "set max_prompt_length and max_completion_length",
    "log_completions_hub_repo": "completions are written to samples.jsonl in output_dir",
    "max_tool_calling_iterations": "calling tools is not built yet; rollout_func can do it",
}
"""Settings that are not honoured, and what there is instead."""


@dataclass
class OnlineConfig(PackedConfig):
    """`per_device_train_batch_size` counts completions, as in TRL. Raises ConfigError for a setting that is not
    honoured, naming it."""

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *PackedConfig._VALID_DICT_FIELDS,
        "generation_kwargs",
        "chat_template_kwargs",
        "transformers_continuous_batching_config",
    ]
    NOT_HONOURED: ClassVar[tuple[str, ...]] = (
        "max_length", "log_completions_hub_repo", "dataset_streaming", "dataset_format", "truncation_mode",
        "train_sampling_strategy", "label_smoothing_factor",
    )  # fmt: skip
    MAKES_ROUNDS: ClassVar[tuple[str, ...]] = (
        "num_generations", "steps_per_generation", "num_iterations", "max_completion_length", "beta",
        "mask_truncated_completions", "shuffle_dataset", "use_vllm",
    )  # fmt: skip
    SPELLINGS: ClassVar[dict[str, Rewrite]] = {
        "use_transformers_paged": renamed("use_transformers_continuous_batching"),
        "vllm_guided_decoding_regex": renamed("vllm_structured_outputs_regex"),
        "vllm_sampling_params": refused(
            "vllm_sampling_params", "set temperature, top_p, top_k, min_p, and generation_kwargs={'stop': [...]}"
        ),
    }
    KL_WEIGHT: ClassVar[str] = "beta"
    LEAST_GENERATIONS: ClassVar[int] = 2
    LEAST_GENERATIONS_EVAL: ClassVar[int] = 1

    learning_rate: float = field(default=1e-6, metadata={"help": "Peak learning rate."})
    max_length: int | None = field(default=None, metadata={"help": "Not of this method."})
    disable_dropout: bool = field(default=False, metadata={"help": "Turn dropout off in the model and its adapters."})
    num_generations: int | None = field(default=8, metadata={"help": "Completions of each prompt, which are compared."})
    num_generations_eval: int | None = field(default=None, metadata={"help": "The same in evaluation."})
    max_completion_length: int | None = field(default=512, metadata={"help": "Most tokens of a completion."})
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Longest prompt in tokens: its beginning is cut off. Default: no limit."}
    )
    shuffle_dataset: bool | None = field(default=True, metadata={"help": "Take prompts in random order."})
    generation_batch_size: int | None = field(
        default=None, metadata={"help": "Completions that are sampled together. Default: those of a step."}
    )
    steps_per_generation: int | None = field(
        default=None, metadata={"help": "Batches that one round of sampling makes. Default: those of a step."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Of sampling, and of the log-probabilities trained on."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens of this much probability."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many likeliest tokens; 0: from all."})
    min_p: float | None = field(
        default=None, metadata={"help": "Sample from tokens of at least this share of the likeliest one's probability."}
    )
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: what was said becomes less likely."})
    generation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": f"Further settings of sampling: {', '.join(GENERATION_KWARGS)}."}
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further arguments of the chat template, such as enable_thinking."}
    )
    cache_implementation: str | None = field(
        default=None, metadata={"help": "Accepted; sampling keeps keys and values its own way."}
    )
    ds3_gather_for_generation: bool = field(default=True, metadata={"help": "Accepted; nothing is sharded."})
    use_transformers_continuous_batching: bool = field(
        default=False, metadata={"help": "Accepted; rows leave and enter the batch as they end anyway."}
    )
    transformers_continuous_batching_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Accepted; rows leave and enter the batch as they end anyway."}
    )
    use_vllm: bool = field(
        default=False, metadata={"help": "Let a vLLM server sample (vllm_mode='server'); with an adapter only."}
    )
    vllm_mode: str = field(default="colocate", metadata={"help": "With use_vllm only 'server' is honoured."})
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Of the server: http://host:port."})
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Without a base URL: its host."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Without a base URL: its port."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for an answer."})
    vllm_model_impl: str = field(default="vllm", metadata={"help": OF_VLLM_HERE})
    vllm_enable_sleep_mode: bool = field(default=False, metadata={"help": OF_VLLM_HERE})
    vllm_structured_outputs_regex: str | None = field(default=None, metadata={"help": OF_VLLM_HERE})
    vllm_group_port: int = field(default=51216, metadata={"help": OF_VLLM_HERE})
    vllm_gpu_memory_utilization: float = field(default=0.3, metadata={"help": OF_VLLM_HERE})
    vllm_max_model_length: int | None = field(default=None, metadata={"help": OF_VLLM_HERE})
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": OF_VLLM_HERE})
    vllm_server_model: str | None = field(
        default=None, metadata={"help": "What the server calls the model. Default: the model's own name."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL divergence to the reference."})
    num_iterations: int = field(default=1, metadata={"help": "How often each completion is learned from."})
    epsilon: float = field(default=0.2, metadata={"help": "How far a ratio may fall below 1 before it is clipped."})
    epsilon_high: float | None = field(default=None, metadata={"help": "And rise above. Default: epsilon."})
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Of each reward function. Default: 1 each."}
    )
    reward_timeout: float = field(
        default=300.0, metadata={"help": "Seconds that a reward function may take over a step's completions."}
    )
    rollout_timeout: float = field(
        default=3600.0, metadata={"help": "Seconds that rollout_func may take over a round's completions."}
    )
    reward_check: bool = field(
        default=True,
        metadata={
            "help": "Try the rewards on right, wrong, empty and huge completions before the first step (not with "
            "a rollout_func, which may give them more than the data has)."
        },
    )
    mask_truncated_completions: bool = field(
        default=False, metadata={"help": "Do not learn from completions that were cut off."}
    )
    sync_ref_model: bool = field(
        default=False, metadata={"help": "Let the reference follow the policy (TR-DPO); not with an adapter."}
    )
    ref_model_mixup_alpha: float = field(
        default=0.6, metadata={"help": "With sync_ref_model: share of the policy in what the reference becomes."}
    )
    ref_model_sync_steps: int = field(default=512, metadata={"help": "With sync_ref_model: every so many steps."})
    no_kl_reason: str | None = field(
        default=None, metadata={"help": "Why beta may be 0: nothing then holds the policy to where it started."}
    )
    log_completions: bool = field(
        default=False, metadata={"help": "Print some completions when logging; all are in samples.jsonl."}
    )
    log_multimodal: bool = field(default=True, metadata={"help": "Accepted; there are no images."})
    num_completions_to_print: int | None = field(default=None, metadata={"help": "With log_completions: how many."})
    log_unique_prompts: bool = field(default=False, metadata={"help": "With log_completions: one of each prompt."})
    log_completions_hub_repo: str | None = field(default=None, metadata={"help": "Not honoured; see samples.jsonl."})
    max_sampling_rows: int = field(
        default=64, metadata={"help": "Most completions that are sampled at the same time; others wait."}
    )

    # --- what follows from them ---------------------------------------------------------------------------------------

    def _read_spellings(self) -> None:
        super()._read_spellings()
        if self.epsilon_high is None:
            self.epsilon_high = self.epsilon
        batch, given = self.per_device_train_batch_size, self.generation_batch_size
        if given is not None and self.steps_per_generation not in (None, given / batch):
            raise ConfigError(f"generation_batch_size={given} and steps_per_generation={self.steps_per_generation} "
                              "contradict each other", hint="give one of them")  # fmt: skip
        if given is not None:
            if given % batch or given < 1:
                raise ConfigError(f"generation_batch_size={given} must be a multiple of per_device_train_batch_size="
                                  f"{batch}")  # fmt: skip
            self.steps_per_generation = given // batch
        if self.steps_per_generation is None:
            self.steps_per_generation = self.gradient_accumulation_steps
        self.generation_batch_size = batch * self.steps_per_generation

    def _check_choices(self) -> None:
        super()._check_choices()
        for name in self.NOT_HONOURED:
            value = getattr(self, name)
            if value != type(self).__dataclass_fields__[name].default:
                raise ConfigError(f"{name}={value!r} is not honoured: {INSTEAD[name]}")
        least = {"num_generations": self.LEAST_GENERATIONS, "max_completion_length": 1, "num_iterations": 1,
                 "max_sampling_rows": 1, "ref_model_sync_steps": 1, "steps_per_generation": 1}  # fmt: skip
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ConfigError(f"{name}={value!r} must be at least {low}")
        in_evaluation, low = self.num_generations_eval, self.LEAST_GENERATIONS_EVAL
        if in_evaluation is not None and (not isinstance(in_evaluation, int) or in_evaluation < low):
            raise ConfigError(f"num_generations_eval={in_evaluation!r} must be at least {low}")
        assert self.generation_batch_size is not None
        assert self.num_generations is not None
        if self.generation_batch_size % self.num_generations:
            raise ConfigError(
                f"generation_batch_size={self.generation_batch_size} completions (per_device_train_batch_size x "
                f"steps_per_generation) are no whole number of groups of num_generations={self.num_generations}",
                hint="make per_device_train_batch_size x gradient_accumulation_steps a multiple of num_generations",
            )
        if self.beta < 0:
            raise ConfigError(f"beta={self.beta} must be at least 0")
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ConfigError(f"ref_model_mixup_alpha={self.ref_model_mixup_alpha} must be in [0, 1]")
        if self.sync_ref_model and not self.beta:
            raise ConfigError("sync_ref_model=True moves a reference that beta=0 does not ask",
                              hint="set beta, or leave it out")  # fmt: skip
        if self.temperature <= 0:
            raise ConfigError(f"temperature={self.temperature} must be above 0: completions of a prompt must differ")
        if self.use_vllm and self.vllm_mode != "server":
            raise ConfigError(f"use_vllm=True with vllm_mode={self.vllm_mode!r} is not honoured",
                              hint="leave it out (sampling is in this process), or run `vllm serve MODEL "
                                   "--enable-lora` and set vllm_mode='server'")  # fmt: skip
        for name in (*VLLM_FIELDS, *OF_VLLM):
            value = getattr(self, name)
            if value == type(self).__dataclass_fields__[name].default:
                continue
            if not self.use_vllm:  # as in many scripts, where it means nothing either
                logger.info("%s=%r is not needed: completions are sampled in this process", name, value)
            elif name in OF_VLLM:
                raise ConfigError(f"{name}={value!r} is not honoured: {INSTEAD[name]}")
        if self.use_vllm:
            self.vllm_url()
        for name in ("reward_timeout", "rollout_timeout", "vllm_server_timeout"):
            seconds = getattr(self, name)
            if not 0 < seconds <= LONGEST:
                raise ConfigError(f"{name}={seconds!r} must be above 0 seconds, and {LONGEST:g} at most")
        self.sampling()

    def vllm_url(self) -> str:
        """Of the server. Raises ConfigError for what is no address."""
        url = self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        try:
            parts = urlsplit(url)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:  # brackets that do not close, a port that is none
            is_address = False
        if not is_address:
            name = "vllm_server_base_url" if self.vllm_server_base_url else "vllm_server_host and vllm_server_port"
            raise ConfigError(f"{url!r} ({name}) is no address of a server",
                              hint="such as http://localhost:8000; an IPv6 host stands in brackets")  # fmt: skip
        return url

    def sampling(self) -> Sampling:
        """Raises ConfigError for values that mean nothing."""
        given = self.generation_kwargs or {}
        if not isinstance(given, dict):
            raise ConfigError(f"generation_kwargs={given!r} must be a mapping, or one as JSON",
                              hint=f"such as {{'stop': ['\\n']}}; known: {', '.join(GENERATION_KWARGS)}")  # fmt: skip
        given = {name: value for name, value in given.items() if (name, value) != ("do_sample", True)}
        for name in given:
            if name not in GENERATION_KWARGS:
                raise ConfigError(f"generation_kwargs[{name!r}] is not honoured",
                                  hint=f"known: {', '.join(GENERATION_KWARGS)}")  # fmt: skip
        values: dict[str, Any] = {
            "max_tokens": self.max_completion_length,
            "temperature": self.temperature,
            "top_k": self.top_k if self.top_k and self.top_k > 0 else 0,
            "top_p": self.top_p,
            "min_p": self.min_p or 0.0,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            **{GENERATION_KWARGS[name]: value for name, value in given.items()},
        }
        stop = values.get("stop", ())
        if stop is not None and not isinstance(stop, str | list | tuple):
            raise ConfigError(f"generation_kwargs['stop']={stop!r} must be a text or a list of them")
        values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop or ())
        if values["max_tokens"] != self.max_completion_length:
            raise ConfigError(f"generation_kwargs says {values['max_tokens']!r} tokens, max_completion_length "
                              f"{self.max_completion_length}", hint="set max_completion_length alone")  # fmt: skip
        if values["temperature"] != self.temperature:
            raise ConfigError("generation_kwargs['temperature'] differs from temperature, which training uses",
                              hint="set temperature alone")  # fmt: skip
        return Sampling(**values)

    def rounds(self, num_prompts: int) -> Rounds:
        """Raises ConfigError where there are not enough prompts for a round."""
        assert self.generation_batch_size
        assert self.num_generations
        assert self.steps_per_generation
        a_round = self.generation_batch_size // self.num_generations
        if num_prompts < a_round:
            raise ConfigError(f"{num_prompts} prompts do not fill a round of {a_round} "
                              f"(generation_batch_size / num_generations)",
                              hint="give more prompts, or lower generation_batch_size")  # fmt: skip
        return Rounds(num_prompts, a_round, self.steps_per_generation, self.num_iterations,
                      self.gradient_accumulation_steps, data_seed(self) if self.shuffle_dataset else None)  # fmt: skip
