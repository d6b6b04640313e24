"""Reward models as rewards: a sequence classifier with one label, ours or transformers', asked with its own tokenizer.

A prompt and its completion are rendered with the reward model's chat template where they are messages, as TRL does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedConfig

from posttrain.errors import ConfigError
from posttrain.rewards.library import LIBRARY
from posttrain.types import Content

BATCH = 16
HEADS = ("score", "classifier", "classification_head")
"""What transformers calls the layer that scores."""


@dataclass
class RewardModel:
    """`template_kwargs` are the chat template's."""

    model: Any
    tokenizer: Any
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.eval().requires_grad_(False)

    @property
    def config(self) -> Any:
        return self.model.config

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> RewardModel:
        """Raises ConfigError for a model that gives more than one number, or has no tokenizer."""
        config = getattr(model, "config", None)
        if not isinstance(config, PreTrainedConfig):
            raise ConfigError(f"reward_funcs has {type(model).__name__}, which is no reward model: it is no model of "
                              "transformers", hint="AutoModelForSequenceClassification(num_labels=1) loads one; a "
                              "function may ask any other")  # fmt: skip
        labels = getattr(config, "num_labels", 1)
        if labels != 1:
            raise ConfigError(f"the reward model has {labels} labels; a reward is one number",
                              hint="load it with num_labels=1")  # fmt: skip
        if tokenizer is None:
            if not config._name_or_path:
                raise ConfigError("reward_processing_classes is needed: the reward model does not say where its "
                                  "tokenizer lies")  # fmt: skip
            tokenizer = _tokenizer_of(config._name_or_path)
        return cls(model, tokenizer)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Content], completions: Sequence[Content], **_: Any) -> list[float]:
        texts = [self._text(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        scores = [0.0] * len(texts)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            inputs = self.tokenizer([texts[index] for index in chosen], return_tensors="pt", padding=True,
                                    padding_side="right", add_special_tokens=False)  # fmt: skip
            logits = self.model(**inputs.to(self.model.device)).logits[:, 0].float().tolist()
            for index, value in zip(chosen, logits, strict=True):
                scores[index] = value
        return scores

    def _text(self, prompt: Content, completion: Content) -> str:
        if isinstance(prompt, str) and isinstance(completion, str):
            return prompt + completion
        messages = [*prompt, *completion]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.template_kwargs))

    def move_to(self, device: torch.device) -> None:
        """Where the policy is, unless it was put somewhere on purpose."""
        here = next(self.model.parameters()).device
        if here.type == "cpu" != device.type and getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device)


def load_reward_model(name: str, tokenizer: Any) -> RewardModel:
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, dtype="auto", output_loading_info=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        known = ", ".join(LIBRARY)
        raise ConfigError(f"reward_funcs names {name!r}, which is no reward model: {error}",
                          hint=f"known by name: {known}; yours: package.module:function") from None  # fmt: skip
    missing = [key for key in found["missing_keys"] if key.split(".")[0] in HEADS]
    if missing and not (Path(name) / "adapter_config.json").is_file():  # an adapter brings its own
        raise ConfigError(f"reward_funcs names {name!r}, which scores nothing: it has no {missing[0]}",
                          hint="train a reward model first (RewardTrainer, method: reward)")  # fmt: skip
    return RewardModel.of(model, tokenizer or _tokenizer_of(name))  # of an adapter, not its base's


def _tokenizer_of(name: str) -> Any:
    """Raises ConfigError."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the reward model {name!r} has no tokenizer that can be read",
                          hint="save the one it was trained with beside it (tokenizer.save_pretrained), or pass it as "
                               "reward_processing_classes") from error  # fmt: skip
