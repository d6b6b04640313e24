"""Batched greedy answers equal those made one at a time, end where they should, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from posttrain.evaluate.generation import generate_answers, stop_ids

PAD, END, START = 0, 1, 2
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEMPLATE = (
    "{% for m in messages %}<start>{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<start>{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<end>": END, "<start>": START}
    words |= {letter: len(words) + index for index, letter in enumerate(LETTERS)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<end>", "extra_special_tokens": {"turn_token": "<start>"}}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATE, padding_side="right", **special)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=29, **sizes, eos_token_id=END, pad_token_id=PAD, bos_token_id=START)
    made = LlamaForCausalLM(config).float()
    with torch.no_grad():
        made.lm_head.weight.mul_(20)  # clear winners, so that rounding decides nothing
    return made


def asking(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "user", "content": text}] for text in texts]


PROMPTS = asking("abc", "the quick brown fox".replace(" ", ""), "z", "hello", "abcabcabcabc", "qq", "mnop")


def answer(model: Any, tokenizer: Any, prompts: list[Any] = PROMPTS, **settings: Any) -> list[str]:
    return generate_answers(model, tokenizer, prompts, 12, **{"progress": False, **settings})


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_a_batch_answers_as_one_at_a_time(model: Any, tokenizer: Any, batch_size: int) -> None:
    alone = [text for prompt in PROMPTS for text in answer(model, tokenizer, [prompt])]
    assert len(set(alone)) > 1
    assert answer(model, tokenizer, batch_size=batch_size) == alone


def test_answers_equal_a_plain_greedy_loop(model: Any, tokenizer: Any) -> None:
    model.eval()
    ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True)["input_ids"]
    made: list[int] = []
    with torch.no_grad():
        while len(made) < 12 and END not in made:
            made.append(int(model(torch.tensor([ids + made])).logits[0, -1].argmax()))
    expected = tokenizer.decode([token for token in made if token != END], skip_special_tokens=True)
    assert answer(model, tokenizer)[0] == expected


def test_every_stop_token_of_the_generation_config_ends_an_answer(model: Any, tokenizer: Any) -> None:
    first, *rest = answer(model, tokenizer, PROMPTS[:1])[0].split()
    stop = next(token for token in rest if token != first)
    model.generation_config.eos_token_id = [END, tokenizer.convert_tokens_to_ids(stop)]
    assert stop_ids(model, tokenizer) == sorted(model.generation_config.eos_token_id)
    shorter = answer(model, tokenizer, PROMPTS[:1])[0].split()
    assert shorter == [first, *rest[: rest.index(stop)]]


def test_the_tokenizers_own_end_stops_too(model: Any, tokenizer: Any) -> None:
    model.generation_config.eos_token_id = None
    assert stop_ids(model, tokenizer) == [END]


@pytest.mark.parametrize("mode", [True, False])
def test_model_and_tokenizer_come_back_as_they_were(model: Any, tokenizer: Any, mode: bool) -> None:
    model.train(mode)
    answer(model, tokenizer)
    assert model.training is mode
    assert tokenizer.padding_side == "right"
    assert not torch.is_inference_mode_enabled()


def test_the_mode_comes_back_after_an_error(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.train()
    monkeypatch.setattr("posttrain.rollout.engines.local._Flight.step", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answer(model, tokenizer)
    assert model.training
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_cannot_be_packed_answers_by_its_own_generate(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answer(model, tokenizer)
    monkeypatch.setattr("posttrain.models.forward._keeps_segments_apart", lambda _: False)
    monkeypatch.setattr("posttrain.rollout.engines.local.LocalEngine.generate", lambda *_, **__: 1 / 0)
    assert answer(model, tokenizer, batch_size=2) == expected


def test_training_goes_on_after_answers(model: Any, tokenizer: Any) -> None:
    """Nothing made under inference mode is left in the model's caches."""
    answer(model, tokenizer)
    ids = torch.tensor([[3, 4, 5]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def test_no_prompts_no_answers(model: Any, tokenizer: Any) -> None:
    assert answer(model, tokenizer, []) == []
