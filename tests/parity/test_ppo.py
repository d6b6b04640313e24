"""PPO beside a slow plain one, written from the papers in float64: one completion at a time, the model's own forward,
no packing, sums written as loops. Whole runs of two rounds on the same completions; parameters agree to 3e-6, a
thousandth of one update.

TRL has no PPO any more. What its last versions did otherwise is told in docs/ppo.md.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import posttrain
from posttrain.models.scoring import as_classifier
from posttrain.rollout.order import Rounds
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import plain_tokenizer

pytestmark = pytest.mark.parity
Tensor = torch.Tensor
PROMPTS = [{"prompt": f"Count from {i} " * (1 + i % 2), "start": i} for i in range(12)]
SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-4,  # gradients that are nothing but rounding move nothing
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 3,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "total_episodes": 12,
    "response_length": 16,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}
ROUNDING = 3e-6
"""Of weights, after eight updates of up to 3e-3 each: a run in fp32 beside sums in fp64."""
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one batch": {"num_mini_batches": 1, "per_device_train_batch_size": 6},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "k3": {"kl_estimator": "k3", "kl_coef": 0.5},
    "whitened rewards": {"whiten_rewards": True},
    "no end": {"missing_eos_penalty": 1.0},
    "discounted": {"gamma": 0.9, "lam": 0.6},
    "clipped": {"cliprange": 0.01, "cliprange_value": 0.01, "vf_coef": 1.0},
    "adaptive KL": {"adap_kl_ctrl": True, "target": 0.01, "horizon": 20.0, "kl_coef": 0.3},
    "without KL": {"kl_coef": 0.0, "no_kl_reason": "it is the case to test"},
    "several of a prompt": {"num_generations": 3},
    "another reference": {"ref_model": 7},
    "a value model": {"value_model": 5, "vf_coef": 1.0, "weight_decay": 0.1},
    "a value model, clipped": {"value_model": 5, "cliprange_value": 0.01, "num_generations": 3},
}


def completion(ids: list[int], place: int, end: int) -> list[int]:
    length = 3 + (sum(ids) + 5 * place) % 9
    said = [5 + (sum(ids) + 31 * place + 17 * j * j) % 200 for j in range(length)]
    return said + ([end] if (sum(ids) + place) % 3 else [])


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    words, seen = trainer.processing_class, dict[str, int]()
    prompt_ids, completion_ids = [], []
    for prompt in prompts:
        place = seen[prompt] = seen.get(prompt, -1) + 1
        prompt_ids.append(words(prompt)["input_ids"])
        completion_ids.append(completion(prompt_ids[-1], place, words.eos_token_id))
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def reward(completion_ids: list[list[int]], start: list[int], **_: Any) -> list[float]:
    return [(sum(ids) % 7) / 7 - one / 12 for ids, one in zip(completion_ids, start, strict=True)]


# --- the plain one ----------------------------------------------------------------------------------------------------


@dataclass
class Said:
    """A completion, and what was thought of it when its round began."""

    prompt: list[int]
    ids: list[int]
    score: float
    logp: list[float]
    reference: list[float]
    value: list[float]
    advantage: list[float]
    target: list[float]


class Plain:
    """`args` are a PPOConfig's fields; everything computes in float64. Values are the head's of the policy's states, or
    those of `value_model`."""

    def __init__(self, model: Any, reference: Any, words: Any, args: Any, value_model: Any = None):
        self.model, self.reference, self.words, self.args = (
            model.double().eval(),
            reference.double().eval(),
            words,
            args,
        )
        self.weight = nn.Parameter(torch.zeros(model.config.hidden_size, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.value_model = None if value_model is None else value_model.double().eval()
        values = [self.weight, self.bias] if value_model is None else list(value_model.parameters())
        self.trained = [*(p for p in model.parameters() if p.requires_grad), *values]
        groups = [{"params": [p for p in self.trained if p.dim() > 1], "weight_decay": args.weight_decay},
                  {"params": [p for p in self.trained if p.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
        self.optimizer = torch.optim.AdamW(groups, args.learning_rate, (0.9, 0.999), args.adam_epsilon)
        self.beta = args.kl_coef
        self.losses: list[float] = []
        self.kls: list[float] = []

    def think(self, model: Any, prompt: list[int], ids: list[int]) -> tuple[list[Tensor], list[Tensor]]:
        """log p and value of each token of a completion; the state before a token is that of the token before it."""
        tokens = torch.tensor([prompt + ids])
        output = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        states, weight, bias = output.hidden_states[-1][0], self.weight, self.bias
        if self.value_model is not None:
            states = self.value_model.model(input_ids=tokens, use_cache=False).last_hidden_state[0]
            weight, bias = self.value_model.score.weight[0], torch.zeros_like(self.bias)
        logps, values = [], []
        for t in range(len(prompt), tokens.shape[1]):
            logits = output.logits[0, t - 1] / self.args.temperature
            logps.append(logits[tokens[0, t]] - torch.logsumexp(logits, 0))
            values.append(states[t - 1] @ weight + bias)
        return logps, values

    def round(self, number: int, rounds: Rounds) -> list[Said]:
        said = []
        for place in rounds.prompts(number):
            for i in range(self.args.num_generations):
                prompt = self.words(PROMPTS[place]["prompt"])["input_ids"]
                ids = completion(prompt, i, self.words.eos_token_id)
                score = reward([ids], [PROMPTS[place]["start"]])[0]
                if ids[-1] != self.words.eos_token_id:
                    score -= self.args.missing_eos_penalty or 0.0
                with torch.no_grad():
                    logps, values = self.think(self.model, prompt, ids)
                    references, _ = self.think(self.reference, prompt, ids)
                numbers = [[one.item() for one in part] for part in (logps, references, values)]
                said.append(Said(prompt, ids, score, *numbers, [], []))
        self.credit(said)
        return said

    def credit(self, said: list[Said]) -> None:
        args, rewards = self.args, []
        divergence = 0.0
        for one in said:
            earned = []
            for logp, reference in zip(one.logp, one.reference, strict=True):
                x = logp - reference
                kl = x if args.kl_estimator == "k1" else math.exp(-x) - 1 + x
                divergence += kl / len(said)
                earned.append(-self.beta * kl)
            earned[-1] += one.score
            rewards.append(earned)
        if args.whiten_rewards:
            every = [r for earned in rewards for r in earned]
            mean, deviation = _moments(every)
            rewards = [[(r - mean) / deviation + mean for r in earned] for earned in rewards]
        for one, earned in zip(said, rewards, strict=True):
            after, later = 0.0, 0.0
            for t in reversed(range(len(earned))):
                later = earned[t] + args.gamma * after - one.value[t] + args.gamma * args.lam * later
                one.advantage.insert(0, later)
                one.target.insert(0, later + one.value[t])
                after = one.value[t]
        mean, deviation = _moments([a for one in said for a in one.advantage])
        for one in said:
            one.advantage = [(a - mean) / deviation for a in one.advantage]
        self.kls.append(divergence)
        if args.adap_kl_ctrl:
            error = max(-0.2, min(0.2, (divergence - args.target) / args.target))
            self.beta *= 1 + error * len(said) / args.horizon

    def loss(self, batch: list[Said]) -> Tensor:
        args, parts = self.args, []
        for one in batch:
            logps, values = self.think(self.model, one.prompt, one.ids)
            for t, (logp, value) in enumerate(zip(logps, values, strict=True)):
                ratio = torch.exp(logp - one.logp[t])
                policy = torch.minimum(
                    ratio * one.advantage[t],
                    torch.clamp(ratio, 1 - args.cliprange, 1 + args.cliprange) * one.advantage[t],
                )
                near = one.value[t] + torch.clamp(value - one.value[t], -args.cliprange_value, args.cliprange_value)
                error = torch.maximum((value - one.target[t]) ** 2, (near - one.target[t]) ** 2) / 2
                parts.append(-policy + args.vf_coef * error)
        return torch.stack(parts).mean()

    def train(self) -> None:
        args = self.args
        size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        a_round = size * args.num_mini_batches
        prompts = a_round // args.num_generations
        batches = args.gradient_accumulation_steps * args.num_mini_batches
        rounds = Rounds(
            len(PROMPTS), prompts, batches, args.num_ppo_epochs, args.gradient_accumulation_steps, args.seed
        )
        for number in range(args.total_episodes // a_round):
            said = self.round(number, rounds)
            order = rounds.deal(number, len(said))
            for _ in range(args.num_ppo_epochs):
                for first in range(0, a_round, size):
                    self.optimizer.zero_grad()
                    loss = self.loss([said[i] for i in order[first : first + size]])
                    loss.backward()
                    nn.utils.clip_grad_norm_(self.trained, args.max_grad_norm)
                    self.optimizer.step()
                    self.losses.append(loss.item())


def _moments(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) + 1e-8)


# --- both -------------------------------------------------------------------------------------------------------------


def both(folder: Path, adapter: bool = False, **options: Any) -> tuple[posttrain.PPOTrainer, Plain]:
    words = plain_tokenizer(eos=False)
    other, valued = options.pop("ref_model", None), options.pop("value_model", None)
    value_model = None if valued is None else as_classifier(tiny_model("llama", len(words), seed=valued))
    value_start = copy.deepcopy(value_model)
    model = tiny_model("llama", len(words))
    start = copy.deepcopy(model)
    args = posttrain.PPOConfig(str(folder), **{**SETTINGS, **options})
    trainer = posttrain.PPOTrainer(
        args=args,
        processing_class=words,
        model=model,
        ref_model=None if other is None else tiny_model("llama", len(words), seed=other),
        reward_model=reward,
        value_model=value_model,
        train_dataset=PROMPTS,
        rollout_func=rollout,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if adapter else None,
    )
    copied = copy.deepcopy(trainer.model)
    reference = start if other is None else tiny_model("llama", len(words), seed=other)
    trainer.train()
    theirs = Plain(copied, reference, words, args, value_start)
    theirs.train()
    return trainer, theirs


def check(trainer: posttrain.PPOTrainer, theirs: Plain) -> None:
    logs = [one for one in trainer.state.log_history if "loss" in one]
    assert [one["loss"] for one in logs] == pytest.approx(theirs.losses, rel=1e-4, abs=2e-6)
    logged = [one["objective/kl"] for one in logs if "objective/kl" in one]
    assert logged == pytest.approx(theirs.kls if theirs.beta else [], abs=1e-4)
    expected = dict(theirs.model.named_parameters())
    assert expected.keys() == dict(trainer.model.named_parameters()).keys()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=ROUNDING, msg=name)
    if theirs.value_model is not None:
        assert trainer.value_head is None
        assert trainer.value_model is not None
        expected = dict(theirs.value_model.named_parameters())
        for name, parameter in trainer.value_model.named_parameters():
            torch.testing.assert_close(parameter.double(), expected[name], rtol=0, atol=ROUNDING, msg=name)
        return
    assert trainer.value_head is not None
    torch.testing.assert_close(trainer.value_head.weight[0].double(), theirs.weight, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(trainer.value_head.bias[0].double(), theirs.bias, rtol=0, atol=ROUNDING)
    assert theirs.weight.abs().max() > 1e-3


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(option: str, tmp_path: Path) -> None:
    trainer, theirs = both(tmp_path, **OPTIONS[option])
    check(trainer, theirs)
    if option == "adaptive KL":
        assert trainer.kl is not None
        assert trainer.kl.coef == pytest.approx(theirs.beta, rel=1e-6)
        assert theirs.beta != 0.3


def test_an_adapter_and_the_model_without_it(tmp_path: Path) -> None:
    check(*both(tmp_path, adapter=True))
