"""What is refused at load, by name, because it would otherwise train wrongly without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM, T5Config, T5ForConditionalGeneration

from posttrain import ConfigError, SFTConfig
from posttrain.models.capabilities import PackedShortConv, adapt_to_packing, drops, head_shape
from posttrain.models.forward import open_policy
from posttrain.models.head import HeadShape
from posttrain.session import Session
from posttrain.types import Needs
from tests.tiny_batches import random_batch
from tests.tiny_models import SIZES, tiny_model


def mixtral(**options: Any) -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(vocab_size=97, num_local_experts=4, **SIZES, **options))


def test_a_mixture_of_experts_with_a_balancing_loss() -> None:
    with pytest.raises(ConfigError, match=r"MixtralForCausalLM is a mixture of experts with a load-balancing loss "
                                          r"\(coefficient 0.001\)") as caught:  # fmt: skip
        open_policy(mixtral(router_aux_loss_coef=0.001))
    assert caught.value.hint == "train without it: router_aux_loss_coef=0.0"
    assert open_policy(mixtral(), router_aux_loss_coef=0.0).is_packed


def test_a_balancing_loss_without_a_router() -> None:
    with pytest.raises(ConfigError, match=r"router_aux_loss_coef=0.1 but LlamaForCausalLM has no router"):
        open_policy(tiny_model("llama"), router_aux_loss_coef=0.1)


def test_an_encoder_decoder() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=97, d_model=16, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder; posttrain trains causal"):
        open_policy(model)


def test_a_model_without_a_head() -> None:
    config = BertConfig(vocab_size=97, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    with pytest.raises(ConfigError, match="BertModel has no language-model head"):
        open_policy(BertModel(config))


def test_an_adapter_on_the_head() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="an adapter on the language-model head is not supported") as caught:
        open_policy(model)
    assert caught.value.hint is not None
    assert "modules_to_save=['lm_head'] trains it whole" in caught.value.hint


def test_learned_prompts() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ConfigError, match=r"adapter 'default' is .*PROMPT_TUNING: prompts that are learned are not"):
        open_policy(get_peft_model(tiny_model("llama"), config))


def test_shapes_of_heads() -> None:
    assert head_shape(tiny_model("llama")) == HeadShape(1.0, None)
    model = tiny_model("llama")
    model.config.final_logit_softcapping = 30.0
    assert head_shape(model) == HeadShape(1.0, 30.0)
    model.config.model_type, model.config.logits_scaling = "granite", 8.0
    assert head_shape(model) == HeadShape(0.125, 30.0)


# --- LFM2's short convolution ---------------------------------------------------------------------------------------


def test_the_short_convolution_stops_at_segments_and_keeps_its_names(tmp_path: Path) -> None:
    model = tiny_model("lfm2")
    names, ids = list(model.state_dict()), random_batch((9,)).input_ids_T[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
    adapt_to_packing(model)
    assert list(model.state_dict()) == names
    assert sum(isinstance(module, PackedShortConv) for module in model.modules()) == 2
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)  # without a layout the original runs
    model.save_pretrained(tmp_path)
    assert torch.equal(type(model).from_pretrained(tmp_path)(input_ids=ids).logits, before)


def test_opened_twice_it_is_wrapped_once(tmp_path: Path) -> None:
    model, args = tiny_model("lfm2"), SFTConfig(str(tmp_path), bf16=False, report_to="none")
    batch = random_batch((9, 4))
    values = []
    for _ in range(2):
        session = Session.open(model, args)
        assert session.policy.is_packed
        with torch.no_grad():
            values.append(session.policy(batch, Needs()).logp_R)
        session.close()
    assert torch.equal(*values)
    assert sum(isinstance(module, PackedShortConv) for module in model.modules()) == 2


def test_an_adapter_added_after_training_reaches_the_convolution(tmp_path: Path) -> None:
    """PEFT replaces a child of the wrapper; the original, which runs without a layout, must follow."""
    model = tiny_model("lfm2")
    adapt_to_packing(model)
    ids = random_batch((9,)).input_ids_T[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["in_proj"], init_lora_weights=False))
        assert any(isinstance(module, nn.ModuleDict) for module in adapted.modules())
        assert (adapted(input_ids=ids).logits - before).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "rate", "is_one"),
    [("attention_dropout", 0.1, True), ("attention_dropout", 0.0, False), ("dropout_p", 0.2, True),
     ("router_jitter_noise", 0.01, True), ("moe_jitter_eps", 0.01, True), ("attn_pdrop", 1, True),
     ("attn_pdrop", None, False), ("dropout_rates", 0.1, False)],
)  # fmt: skip
def test_what_is_random_in_training(name: str, rate: Any, is_one: bool) -> None:
    module = nn.Linear(1, 1)
    setattr(module, name, rate)
    assert drops(module) is is_one
    assert drops(nn.Dropout(0.1))
    assert not drops(nn.Dropout(0.0))
