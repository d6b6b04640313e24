"""Folders that are named as rewards: a reward model, and what only looks like one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

from posttrain.errors import ConfigError
from posttrain.models.scoring import as_classifier
from posttrain.rewards.models import RewardModel, load_reward_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer


def test_a_language_model_scores_nothing(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    tiny_model("llama", len(words)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="scores nothing: it has no score"):
        load_reward_model(str(tmp_path), words)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_reward_model_scores_as_it_did(adapted: bool, tmp_path: Path) -> None:
    words = chatml_tokenizer()
    model = as_classifier(tiny_model("llama", len(words)))
    if adapted:
        model.save_pretrained(tmp_path / "base")
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"],
                                                 task_type="SEQ_CLS"))  # fmt: skip
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path / "model")
    model.eval()
    ids = torch.tensor([words("word and word")["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.item()
        found = load_reward_model(str(tmp_path / "model"), words).model(input_ids=ids).logits.item()
    assert found == pytest.approx(expected, rel=1e-5)


def test_what_the_template_is_told_and_where_the_model_is() -> None:
    words = chatml_tokenizer()
    words.chat_template = "{{ tone }}:{% for m in messages %}{{ m.content }};{% endfor %}"
    model = RewardModel.of(as_classifier(tiny_model("llama", len(words))), words)
    model.template_kwargs = {"tone": "kind"}
    user, assistant = ([{"role": role, "content": role[:1]}] for role in ("user", "assistant"))
    assert model._text(user, assistant) == "kind:u;a;"
    model.move_to(torch.device("meta"))
    assert {parameter.device.type for parameter in model.model.parameters()} == {"meta"}


def test_one_without_a_tokenizer(tmp_path: Path) -> None:
    as_classifier(tiny_model("llama")).save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_reward_model(str(tmp_path), None)
    assert caught.value.message == f"the reward model {str(tmp_path)!r} has no tokenizer that can be read"
    assert "tokenizer.save_pretrained" in (caught.value.hint or "")
    model = LlamaForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="has no tokenizer that can be read"):
        RewardModel.of(model, None)


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    as_classifier(tiny_model("llama")).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    with pytest.raises(ConfigError, match="which is no reward model: "):
        load_reward_model(str(tmp_path), chatml_tokenizer())


def test_a_module_that_is_no_model_of_transformers() -> None:
    with pytest.raises(ConfigError) as caught:
        RewardModel.of(torch.nn.Linear(2, 1), chatml_tokenizer())
    assert caught.value.message.startswith("reward_funcs has Linear, which is no reward model: ")
