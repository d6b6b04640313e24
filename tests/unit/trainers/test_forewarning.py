"""What is said before the first step of a preference method."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    ORPOConfig,
    ORPOTrainer,
    RewardConfig,
    RewardTrainer,
)
from posttrain.errors import ConfigError
from posttrain.trainers.forewarning import warn_of_reference
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea."} for i in range(4)
]
REFERENCE = "the reference is not the model that training starts from"
UNLIKELY = "absurdly unlikely"
NO_END = "would never end its answers"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def settings(**options: Any) -> dict[str, Any]:
    return {"max_steps": 1, "per_device_train_batch_size": 2, "bf16": False, "save_strategy": "no", "report_to": "none",
            "disable_tqdm": True, "learning_rate": 1e-6, **options}  # fmt: skip


def model() -> Any:
    return tiny_model("llama", len(chatml_tokenizer()))


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def saying(logits: dict[str, float]) -> Any:
    """A model whose logits are these for the tokens of these texts and 0 for others, whatever it has read."""
    made, tokenizer = model(), chatml_tokenizer()
    with torch.no_grad():
        made.model.norm.weight.zero_()
        made.lm_head.bias = torch.nn.Parameter(torch.zeros(made.lm_head.out_features))
        for text, logit in logits.items():
            made.lm_head.bias[tokenizer(text, add_special_tokens=False)["input_ids"]] = logit
    return made


# --- the reference ----------------------------------------------------------------------------------------------------


def test_the_starting_model_is_no_surprise(caplog: pytest.LogCaptureFixture) -> None:
    start = model()
    warn_of_reference(start, copy.deepcopy(start), None)
    warn_of_reference(start, copy.deepcopy(start).to(torch.bfloat16), None)
    warn_of_reference(get_peft_model(copy.deepcopy(start), lora()), start, None)
    warn_of_reference(start, None, None)
    assert not caplog.messages


def test_another_model_is_named(caplog: pytest.LogCaptureFixture) -> None:
    start = model()
    other = copy.deepcopy(start)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    warn_of_reference(start, other, None)
    assert REFERENCE in caplog.text
    assert "1 of" in caplog.text
    assert "layers.1.mlp.up_proj.weight" in caplog.text


def test_an_adapter_that_has_been_trained_before(caplog: pytest.LogCaptureFixture) -> None:
    start = model()
    adapted = get_peft_model(copy.deepcopy(start), lora())
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).fill_(0.1)
    warn_of_reference(adapted, start, None)
    assert "the adapter has been trained before" in caplog.text


@pytest.mark.parametrize(("policy", "ref"), [("policy", "ref"), ("default", "default_ref"), ("policy", "pol")])
def test_another_adapter(policy: str, ref: str, caplog: pytest.LogCaptureFixture) -> None:
    adapted = get_peft_model(model(), lora(), adapter_name=policy)
    adapted.add_adapter(ref, lora())
    weights = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            if f".{policy}." in name:
                weights[name.replace(f".{policy}.", f".{ref}.")].copy_(weight)
    warn_of_reference(adapted, None, ref)
    assert not caplog.messages
    with torch.no_grad():
        next(p for name, p in weights.items() if f"lora_B.{policy}." in name).fill_(0.1)
    warn_of_reference(adapted, None, ref)
    assert f"adapter '{ref}': the adapter has been trained before, and the reference has none" in caplog.text
    caplog.clear()
    with torch.no_grad():
        next(p for name, p in weights.items() if f"lora_B.{ref}." in name).fill_(0.2)
    warn_of_reference(adapted, None, ref)
    assert "1 of" in caplog.text
    assert f"adapter '{ref}'" in caplog.text


def test_an_adapter_of_embeddings(caplog: pytest.LogCaptureFixture) -> None:
    """There it is the other factor that begins with zeros."""
    start = model()
    adapted = get_peft_model(copy.deepcopy(start), LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    warn_of_reference(adapted, start, None)
    assert not caplog.messages
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_embedding_A" in name).fill_(0.1)
    warn_of_reference(adapted, start, None)
    assert "the adapter has been trained before" in caplog.text


def trained(start: Any, value: float = 0.1, **options: Any) -> Any:
    adapted = get_peft_model(copy.deepcopy(start), LoraConfig(**{"r": 4, "target_modules": "all-linear", **options}))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.fill_(value)
    return adapted


def test_a_reference_with_an_adapter_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    start = model()
    warn_of_reference(start, get_peft_model(copy.deepcopy(start), lora()), None)  # fresh: it changes nothing
    warn_of_reference(trained(start), trained(start), None)
    assert not caplog.messages
    for policy, said in {
        start: "the reference has an adapter that has been trained",
        get_peft_model(copy.deepcopy(start), lora()): "the reference has an adapter that has been trained",
        trained(start, 0.2): "of their adapters differ",
        trained(start, target_modules=["q_proj"]): "their adapters change different layers",
    }.items():
        warn_of_reference(policy, trained(start), None)
        assert said in caplog.text
        caplog.clear()


def test_the_trainer_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = tiny_model("llama", len(chatml_tokenizer()), seed=1)
    DPOTrainer(model(), other, DPOConfig(str(tmp_path), **settings()), train_dataset=ROWS,
               processing_class=chatml_tokenizer())  # fmt: skip
    assert REFERENCE in caplog.text


# --- the answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "config"), [(DPOTrainer, DPOConfig), (ORPOTrainer, ORPOConfig), (KTOTrainer, KTOConfig)]
)
def test_answers_that_the_model_finds_absurd(
    trainer: Any, config: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = trainer(saying({"~": 30.0}), args=config(str(tmp_path), **settings()), train_dataset=ROWS,
                   processing_class=chatml_tokenizer())  # fmt: skip
    made.train()
    assert UNLIKELY in caplog.text


def test_an_end_that_the_model_would_never_write(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = chatml_tokenizer()
    rows = [{**row, "chosen": row["chosen"] * 20} for row in ROWS]
    endless = saying({"It is 0123.": 6.0, str(tokenizer.eos_token): -10.0})
    made = DPOTrainer(endless, args=DPOConfig(str(tmp_path), **settings()), train_dataset=rows,
                      processing_class=tokenizer)  # fmt: skip
    made.train()
    assert NO_END in caplog.text
    assert UNLIKELY not in caplog.text


def test_only_good_answers_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a model that is sure of nothing nothing is absurd, and bad answers may be."""
    tokenizer = chatml_tokenizer()
    rows = [{"prompt": "Say it.", "completion": text, "label": text == "yes"} for text in ("yes", "~~~~~~~~~~~") * 2]
    agreeing = saying({"yes": 9.0, str(tokenizer.eos_token): 9.0})
    made = KTOTrainer(agreeing, args=KTOConfig(str(tmp_path), **settings()), train_dataset=rows,
                      processing_class=tokenizer)  # fmt: skip
    made.train()
    assert UNLIKELY not in caplog.text
    assert NO_END not in caplog.text


# --- beta --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [[], [0.1, 0.0], [0.1, "x"], "high", [True], float("inf"), -1])
def test_a_beta_that_is_none(beta: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beta"):
        DPOConfig(str(tmp_path), beta=beta)


def test_one_beta_for_each_epoch(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), beta=[0.5, 0.1])
    assert [args.beta_at(epoch) for epoch in (0, 0.5, 0.9999999, 1.0, 1.5, 2.0, 7.3)] == [0.5, 0.5, *[0.1] * 5]
    assert args.objective(1.0).settings.beta == 0.1


def test_a_stream_has_one_epoch(tmp_path: Path) -> None:
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: iter(ROWS))
    with pytest.raises(ConfigError, match="a stream has but one"):
        DPOTrainer(model(), args=DPOConfig(str(tmp_path), **settings(beta=[0.1, 0.2])), train_dataset=stream,
                   processing_class=chatml_tokenizer())  # fmt: skip


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"beta": 0.5}, ""),
        ({"beta": 5.0}, "beta=5 is outside of what is tried here (0.01 to 0.5; 0.1 is usual)"),
        ({"beta": 0.001}, "unlearn"),
        ({"beta": [0.1, 0.7], "num_train_epochs": 2, "max_steps": -1}, "beta=0.7 is outside"),
        ({"beta": 2.5, "loss_type": "simpo"}, ""),
        ({"beta": 0.1, "loss_type": "simpo"}, "beta=0.1 is outside of what is tried here (1 to 10"),
    ],
)
def test_betas_that_nobody_takes(
    options: dict[str, Any], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    DPOTrainer(model(), args=DPOConfig(str(tmp_path), **settings(**options)), train_dataset=ROWS,
               processing_class=chatml_tokenizer())  # fmt: skip
    assert said in caplog.text
    assert bool(said) == ("is outside of what is tried" in caplog.text)


@pytest.mark.parametrize(
    ("trainer", "config", "rate", "adapted", "said"),
    [
        (DPOTrainer, DPOConfig, 1e-5, False, "5e-7 to 5e-6 for all weights"),
        (DPOTrainer, DPOConfig, 5e-5, True, ""),
        (ORPOTrainer, ORPOConfig, 1e-5, False, ""),
        (ORPOTrainer, ORPOConfig, 1e-4, True, ""),
        (ORPOTrainer, ORPOConfig, 2e-5, False, "5e-6 to 1e-5 for all weights"),
        (RewardTrainer, RewardConfig, 1e-4, False, "1e-5 for all weights"),
        (RewardTrainer, RewardConfig, 1e-4, True, ""),
    ],
)
def test_rates_of_supervised_training(
    trainer: Any, config: Any, rate: float, adapted: bool, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    peft = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS" if config is RewardConfig else "CAUSAL_LM")
    trainer(model(), args=config(str(tmp_path), **settings(learning_rate=rate)), train_dataset=ROWS,
            processing_class=chatml_tokenizer(), peft_config=peft if adapted else None)  # fmt: skip
    assert bool(said) == ("is one of supervised training" in caplog.text)
    assert said in caplog.text


def test_a_weight_of_the_odds_that_nobody_takes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ORPOTrainer(model(), args=ORPOConfig(str(tmp_path), **settings(beta=50.0)), train_dataset=ROWS,
                processing_class=chatml_tokenizer())  # fmt: skip
    assert "beta=50 is outside of what is tried here (0.01 to 1" in caplog.text


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"loss_weights": 2.0}, "loss_weights"),
        ({"loss_weights": []}, "loss_weights"),
        ({"loss_weights": ["a"]}, "loss_weights"),
        ({"loss_weights": [float("nan")]}, "loss_weights"),
        ({"loss_weights": [-1.0]}, "below 0"),
        ({"loss_type": [["sigmoid"]]}, "loss_type"),
        ({"beta": [0.1, float("nan")]}, "beta"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, "discopop_tau"),
        ({"loss_type": "discopop", "discopop_tau": -1.0}, "discopop_tau"),
        ({"max_prompt_length": 0}, "max_prompt_length"),
        ({"precompute_ref_batch_size": 0}, "precompute_ref_batch_size"),
        ({"loss_type": "sft", "ld_alpha": 0.5}, "ld_alpha"),
        ({"loss_type": "sft", "f_divergence_type": "js_divergence"}, "f_divergence_type"),
    ],
)
def test_values_that_mean_nothing(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=named):
        DPOConfig(str(tmp_path), **options)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_said_of_a_stream_too(stream: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of its first rows, where it can be read twice; and of a tokenizer without a chat template."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{**row, "chosen": "~~~~~~~~~~~"} for row in ROWS])
    tokenizer = plain_tokenizer()
    made = DPOTrainer(saying({"It is 0123.": 9.0}), args=DPOConfig(str(tmp_path), **settings()),
                      train_dataset=rows.to_iterable_dataset() if stream else rows,
                      processing_class=tokenizer)  # fmt: skip
    assert caplog.text.count("the tokenizer has no chat template") == 1
    made.train()
    assert caplog.text.count(UNLIKELY) == 1


def test_rows_that_are_too_long_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """And where all are, one is looked at in part."""
    long = [{**row, "prompt": row["prompt"] + "word " * 3000} for row in ROWS]
    for rows in ([long[0], *ROWS], long):
        caplog.clear()
        made = DPOTrainer(saying({"~": 30.0}), args=DPOConfig(str(tmp_path), max_length=None, **settings()),
                          train_dataset=rows, processing_class=chatml_tokenizer())  # fmt: skip
        made.train()
        assert UNLIKELY in caplog.text
