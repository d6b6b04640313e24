"""For how many tokens a model has places, where it has learned them."""

from __future__ import annotations

import pytest
from transformers import OPTConfig, OPTForCausalLM

from posttrain.models.capabilities import learned_places
from tests.tiny_models import tiny_model


@pytest.mark.parametrize(("family", "places"), [("llama", None), ("gemma3", None), ("gpt2", 512)])
def test_of_families(family: str, places: int | None) -> None:
    assert learned_places(tiny_model(family, 100)) == places


def test_opt_keeps_two_for_itself() -> None:
    config = OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
                       max_position_embeddings=30, word_embed_proj_dim=16)  # fmt: skip
    assert learned_places(OPTForCausalLM(config)) == 30
