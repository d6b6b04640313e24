"""PPO runs: killed and resumed in the middle of a round they are the run that was not, value head and KL coefficient
included; however a step is cut; values of packed sequences are those of each alone; what is saved others load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import posttrain
from posttrain.data.planning import Packing, plan
from posttrain.models.critic import ValueHead
from posttrain.models.scoring import as_classifier
from posttrain.session import Session
from posttrain.types import Branch, Needs, Origin, Tokenized
from tests.invariants.test_rollout_runs import ROWS, few_vowels, samples, weights
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 3,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 8,
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "save_steps": 1,
    "max_sampling_rows": 5,
}
CASES: dict[str, dict[str, Any]] = {
    "adaptive": {"adap_kl_ctrl": True, "target": 0.5, "horizon": 20.0},
    "a round a step": {"num_mini_batches": 1, "num_ppo_epochs": 1, "missing_eos_penalty": 1.0},
    "several of a prompt": {"num_generations": 3, "whiten_rewards": True, "gradient_accumulation_steps": 2},
    "a value model": {"value_model": "qwen2"},
}


def make(folder: Path, adapter: bool = False, rewards: Any = few_vowels, **settings: Any) -> posttrain.PPOTrainer:
    words = chatml_tokenizer()
    valued = settings.pop("value_model", None)
    return posttrain.PPOTrainer(
        model=tiny_model("llama", len(words)),
        reward_model=rewards,
        value_model=None if valued is None else as_classifier(tiny_model(valued, len(words), seed=3)),
        args=posttrain.PPOConfig(str(folder), **{**SETTINGS, **settings}),
        train_dataset=ROWS,
        processing_class=words,
        peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1) if adapter else None,
    )


def head(trainer: posttrain.PPOTrainer) -> dict[str, torch.Tensor]:
    """The head's, or the value model's."""
    values = trainer.value_head if trainer.value_head is not None else trainer.value_model
    return {name: tensor.clone() for name, tensor in values.state_dict().items()}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "adapter"])
@pytest.mark.parametrize("case", CASES)
def test_resumed_it_is_the_same_run(case: str, adapter: bool, tmp_path: Path) -> None:
    options = {**CASES[case], "disable_dropout": False}
    whole = make(tmp_path / "whole", adapter, **options)
    whole.train()
    for step in (1, 3, 5):
        folder = tmp_path / f"resumed at {step}"
        make(folder, adapter, **options).train()
        resumed = make(folder, adapter, **options)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
        assert weights(resumed) == weights(whole)  # type: ignore[arg-type]
        assert all(torch.equal(tensor, head(whole)[name]) for name, tensor in head(resumed).items())
        assert samples(folder) == samples(tmp_path / "whole")
        if whole.kl is not None:
            assert resumed.kl is not None
            assert resumed.kl.coef == whole.kl.coef != 0.05
        for mine, other in zip(resumed.state.log_history, whole.state.log_history, strict=False):
            for name in ("loss", "grad_norm", "objective/kl", "objective/kl_coef", "loss/value_avg", "num_tokens"):
                assert mine.get(name) == other.get(name), name


def test_trained_again_it_begins_anew(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="no", **CASES["adaptive"])
    trainer.train()
    trainer.train()
    first = [one["objective/kl_coef"] for one in trainer.state.log_history if "objective/kl_coef" in one]
    assert first[0] == pytest.approx(0.05)


@pytest.mark.parametrize("case", CASES)
def test_a_step_may_be_cut_as_memory_wants_it(case: str, tmp_path: Path) -> None:
    logs = []
    for budget in (10_000, 40):
        trainer = make(tmp_path / str(budget), token_budget=budget, **{**CASES[case], "save_strategy": "no"})
        trainer.train()
        steps = [one for one in trainer.state.log_history if "loss" in one][:4]
        logs.append([one[name] for one in steps for name in ("loss", "grad_norm", "loss/value_avg", "val/ratio")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_of_packed_and_shared_are_those_of_each_alone(family: str, tmp_path: Path) -> None:
    """The value of a row is the head's of the state that its token is predicted from."""
    model = tiny_model(family).eval()
    value_head = torch.nn.Linear(32, 1)
    prompts = [list(range(5, 5 + n)) for n in (4, 7)]
    answers = [[[11, 23, 5, 80], [40, 41]], [[9, 60, 61]]]
    parts = [
        Tokenized(
            torch.tensor(prompt).numpy(),
            tuple(Branch(torch.tensor(ids).numpy(), torch.ones(len(ids), dtype=torch.bool).numpy()) for ids in said),
            Origin("here", 0),
        )
        for prompt, said in zip(prompts, answers, strict=True)
    ]
    expected = []
    with torch.no_grad():
        for prompt, said in zip(prompts, answers, strict=True):
            for ids in said:
                states = model.base_model(input_ids=torch.tensor([prompt + ids])).last_hidden_state[0]
                expected.append(value_head(states[len(prompt) - 1 : -1])[:, 0])
    session = Session.open(model, posttrain.PPOConfig(str(tmp_path), bf16=False, use_cpu=True), ValueHead(value_head))
    try:
        for shared in (False, True):
            (batch,) = plan([(part,) for part in parts], 1000, Packing(shared=shared and session.policy.shares_prompts))
            value_R = session.policy(batch, Needs(value=True)).value_R
            torch.testing.assert_close(value_R, torch.cat(expected), rtol=1e-4, atol=1e-5)
            assert session.policy(batch, Needs()).value_R is None
    finally:
        session.close()


def test_what_is_saved(tmp_path: Path) -> None:
    """The model as ever, and the head beside it."""
    for adapter in (False, True):
        trainer = make(tmp_path / str(adapter), adapter, max_steps=1)
        trainer.train()
        trainer.save_model()
        for folder in (tmp_path / str(adapter), tmp_path / str(adapter) / "checkpoint-1"):
            stored = load_file(folder / "value_head.safetensors")
            assert all(torch.equal(tensor, head(trainer)[name]) for name, tensor in stored.items())
            base = tiny_model("llama", len(chatml_tokenizer()))
            loaded = (
                PeftModel.from_pretrained(base, folder) if adapter else AutoModelForCausalLM.from_pretrained(folder)
            )
            assert loaded.state_dict().keys() == trainer.model.state_dict().keys()


def test_a_run_with_another_credit_is_another_run(tmp_path: Path) -> None:
    make(tmp_path, max_steps=2).train()
    with pytest.raises(posttrain.CheckpointError, match="how completions are sampled"):
        make(tmp_path, lam=0.9).train(resume_from_checkpoint=True)


def test_an_optimiser_without_the_head(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    model = tiny_model("llama", len(words))
    args = posttrain.PPOConfig(str(tmp_path), **SETTINGS)
    own = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = posttrain.PPOTrainer(args, words, model, None, few_vowels, ROWS, optimizers=(own, None))
    with pytest.raises(posttrain.ConfigError, match="SGD does not hold the value head"):
        trainer.train()
    assert trainer.value_head is not None
    own.add_param_group({"params": list(trainer.value_head.parameters())})
    trainer.train()
    assert head(trainer)["weight"].abs().max() > 0


def test_a_value_model_in_bf16_learns_and_is_given_back(tmp_path: Path) -> None:
    """What it is given in comes back; checkpoints hold it, what is saved at the end is the policy alone."""
    trainer = make(tmp_path, adapter=True, value_model="llama", bf16=True, max_steps=2, vf_coef=1.0)
    before = head(trainer)
    trainer.train()
    after = head(trainer)
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    moved = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(after)
    stored = load_file(tmp_path / "checkpoint-2" / "value_model" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in after.items())
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / "value_model").exists()


def test_a_reference_that_follows_knows_no_values(tmp_path: Path) -> None:
    """Of its own, and a model that was given, beside a head and beside a value model."""
    words = chatml_tokenizer()
    for number, (given, valued) in enumerate([(None, None), (7, None), (None, "llama")]):
        args = posttrain.PPOConfig(str(tmp_path / str(number)), **{**SETTINGS, "max_steps": 3}, sync_ref_model=True,
                                   ref_model_sync_steps=1)  # fmt: skip
        trainer = posttrain.PPOTrainer(
            args, words, tiny_model("llama", len(words)),
            None if given is None else tiny_model("llama", len(words), seed=given), few_vowels, ROWS,
            value_model=None if valued is None else as_classifier(tiny_model(valued, len(words), seed=3)),
        )  # fmt: skip
        trainer.train()
        stored = load_file(tmp_path / str(number) / "checkpoint-3" / "reference.safetensors")
        assert stored.keys() == {name for name, _ in trainer.model.named_parameters()}


def test_a_value_model_that_cannot_be_opened_leaves_the_policy_as_it_was(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    policy = tiny_model("llama", len(words))
    before = policy.config._attn_implementation
    valued = as_classifier(tiny_model("llama", len(words), seed=1))
    prompted = get_peft_model(valued, PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    trainer = posttrain.PPOTrainer(posttrain.PPOConfig(str(tmp_path), **SETTINGS), words, policy, None, few_vowels,
                                   ROWS, value_model=prompted)  # fmt: skip
    with pytest.raises(posttrain.ConfigError, match="prompts that are learned"):
        trainer.train()
    assert policy.config._attn_implementation == before


def test_a_value_model_that_cannot_be_one(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    policy = tiny_model("llama", len(words))
    scored = as_classifier(tiny_model("llama", len(words), seed=1))
    frozen = as_classifier(tiny_model("llama", len(words), seed=1)).requires_grad_(False)
    for given, message in (
        (3, "value_model must be a model or the name of one, got int"),
        (as_classifier(tiny_model("llama", 20)), "value_model knows 20 tokens, the policy says"),
        (as_classifier(policy), "value_model has layers of the policy"),
        (frozen, "value_model's score is frozen"),
        (get_peft_model(scored, LoraConfig(r=2, target_modules=["q_proj"])), "value_model's score is frozen"),
        ("no/such/folder", "cannot load the model 'no/such/folder'"),
    ):
        with pytest.raises(posttrain.ConfigError, match=message):
            posttrain.PPOTrainer(posttrain.PPOConfig(str(tmp_path), **SETTINGS), words, policy, None, few_vowels, ROWS,
                                 value_model=given)  # fmt: skip
    other = tiny_model("llama", len(words), seed=2)
    with pytest.raises(posttrain.ConfigError, match="value_model has layers of ref_model"):
        posttrain.PPOTrainer(posttrain.PPOConfig(str(tmp_path), **SETTINGS), words, policy, other, few_vowels, ROWS,
                             value_model=as_classifier(other))  # fmt: skip
    short = tiny_model("gpt2", len(words))
    short.transformer.wpe = torch.nn.Embedding(12, short.config.hidden_size)
    with pytest.raises(posttrain.UserError, match="12"):
        posttrain.PPOTrainer(posttrain.PPOConfig(str(tmp_path), **SETTINGS), words, policy, None, few_vowels, ROWS,
                             value_model=as_classifier(short))  # fmt: skip
    own = torch.optim.SGD(policy.parameters(), lr=0.1)
    scored = as_classifier(tiny_model("llama", len(words), seed=1))
    trainer = posttrain.PPOTrainer(posttrain.PPOConfig(str(tmp_path), **SETTINGS), words, policy, None, few_vowels,
                                   ROWS, value_model=scored, optimizers=(own, None))  # fmt: skip
    with pytest.raises(posttrain.ConfigError, match="SGD does not hold the value model"):
        trainer.train()


def test_evaluation_leaves_the_coefficient_alone(tmp_path: Path) -> None:
    trainer = make(tmp_path, save_strategy="no", **CASES["adaptive"])
    trainer.train()
    assert trainer.kl is not None
    before = trainer.kl.coef
    metrics = trainer.evaluate(ROWS)
    assert trainer.kl.coef == before
    assert metrics["eval_val/ratio"] == pytest.approx(1.0)
    assert {"eval_loss", "eval_objective/scores", "eval_loss/value_avg", "eval_reward"} <= metrics.keys()
