"""Reward models: a causal model with one number as its head, read at the last token of an answer.

They are transformers' sequence-classification models with one label, so that what is saved is loaded by
`AutoModelForSequenceClassification`. Those read the score at the last token that is not padding; whoever lays out a
batch leaves such tokens off its ends.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from posttrain.errors import ConfigError
from posttrain.models.forward import Policy
from posttrain.models.head import HeadShape
from posttrain.types import Batch, Needs, Outputs

logger = logging.getLogger("posttrain")


class Scorer(Policy):
    """A reward model seen as a function from a packed batch to a score for each sequence."""

    def __call__(self, batch: Batch, needs: Needs) -> Outputs:
        batch = batch.to(self.device)
        hidden_TD = self.states(batch)
        last_S = torch.tensor(batch.layout.last_tokens).to(hidden_TD.device, non_blocking=True)
        score_S = self.base.score(hidden_TD[last_S])[:, 0].float()
        nothing = score_S.new_zeros(0)
        return Outputs(nothing, nothing.bool(), score_S=score_S)

    @classmethod
    def of(cls, model: Any, base: Any) -> Policy:
        return cls(model, base, HeadShape())

    def plain(self, ids_T: torch.Tensor) -> torch.Tensor:
        hidden_1TD = self.base.base_model(input_ids=ids_T[None], use_cache=False).last_hidden_state
        return self.base.score(hidden_1TD[0, -1:])[:, 0].float().expand(len(ids_T) - 1)


def is_classifier(base: Any) -> bool:
    return base.get_output_embeddings() is None and isinstance(getattr(base, "score", None), torch.nn.Module)


def classifier_class(config: Any) -> type[PreTrainedModel]:
    """The class that puts a score on models of this kind. One that transformers lacks is made, and registered with it
    for as long as this process lasts."""
    if type(config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        found: type[PreTrainedModel] = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        return found
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ConfigError(f"{type(config).__name__} is of no causal language model: there is nothing to put a score on")
    causal = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    base = next(kind for kind in causal.__mro__ if kind.__name__.endswith("PreTrainedModel") and kind is not causal)
    name = causal.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    made = type(name, (GenericForSequenceClassification, base), {"config_class": type(config)})
    AutoModelForSequenceClassification.register(type(config), made, exist_ok=True)
    logger.warning("transformers has no %s; other programs that load this reward model must import "
                   "posttrain.models.scoring and call classifier_class(config) first", name)  # fmt: skip
    return made


def as_classifier(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with a score in the place of its language-model head; its layers are the same objects. The score's first
    values are random."""
    if is_classifier(model):
        if model.config.get_text_config().num_labels != 1:
            raise ConfigError(f"the model has {model.config.num_labels} labels; a reward model has one score",
                              hint="load it with num_labels=1")  # fmt: skip
        return model
    config = model.config
    kind = classifier_class(config)
    config.num_labels = 1
    with torch.device("meta"):  # its layers are the model's own, so it needs none
        made = kind(config)
    text = config.get_text_config()
    made.score = torch.nn.Linear(text.hidden_size, 1, bias=False, device=model.device, dtype=model.dtype)
    torch.nn.init.normal_(made.score.weight, std=getattr(text, "initializer_range", 0.02))
    setattr(made, made.base_model_prefix, model.base_model)
    config.architectures = [kind.__name__]
    made.train(model.training)
    return made


def is_saved_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
