"""What the samples of a step begin with alike is computed once, and nothing shows it but the time: same losses, same
weights, same counts of tokens, however the step is cut. Where something is random in each sample, each has its own, and
what is predicted is computed for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from posttrain.data import planning
from posttrain.models.forward import Policy
from posttrain.types import Batch
from tests.invariants.short_runs import End, Spec, end_state, make_trainer

NUM_ALIKE = 12
ADAPTER = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
SGD = {"optim": "sgd", "learning_rate": 0.5}  # its steps are as exact as the gradients


def rows(supervised: bool = False) -> list[dict[str, list[int]]]:
    """One opening, then tokens of each row's own; `supervised` says whether the opening is predicted, too."""
    opening = [5 + 7 * j % 250 for j in range(NUM_ALIKE)]
    built = []
    for i in range(8):
        ids = [*opening, *(5 + (37 * i + 11 * j * j) % 250 for j in range(3 + 2 * i))]
        built.append({"input_ids": ids, "labels": ids if supervised else [*[-100] * NUM_ALIKE, *ids[NUM_ALIKE:]]})
    return built


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every batch that went through the model."""
    seen: list[int] = []
    states = Policy.states

    def counted(self: Policy, batch: Batch) -> torch.Tensor:
        seen.append(batch.num_tokens)
        return states(self, batch)

    monkeypatch.setattr(Policy, "states", counted)
    return seen


def trained(folder: Path, train: Any, adapter: LoraConfig | None = None, **arguments: Any) -> End:
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
               "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "token_budget": 1000}  # fmt: skip
    spec = Spec(str(folder), lora=adapter is not None, arguments=options | SGD | arguments)
    trainer = make_trainer(spec, train=train, adapter=adapter)
    trainer.train()
    return end_state(trainer)


def never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "find_beginnings", lambda openings, sizes: [None] * len(openings))


@pytest.mark.parametrize("adapter", [None, ADAPTER], ids=["full", "lora"])
def test_nothing_shows_it(
    quick: None, tmp_path: Path, computed: list[int], adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(len(row["input_ids"]) for row in rows())
    ends = [trained(tmp_path, rows(), adapter, token_budget=budget) for budget in (30, 60, 1000)]
    assert sum(computed[-2:]) == whole - 6 * NUM_ALIKE
    never(monkeypatch)
    plain = trained(tmp_path, rows(), adapter)
    assert sum(computed[-2:]) == whole
    for end in ends:
        for name, value in plain[0].items():
            if name.startswith("weight/"):
                assert (end[0][name] - value).norm() <= 2e-6 * value.norm() + 1e-7, name
        for one, other in zip(end[1]["log_history"], plain[1]["log_history"], strict=True):
            assert one.keys() == other.keys()
            for name in one.keys() - {"total_flos"}:
                assert one[name] == pytest.approx(other[name], rel=2e-6, abs=1e-7), name


def test_what_is_predicted_is_computed_for_each(quick: None, tmp_path: Path, computed: list[int]) -> None:
    trained(tmp_path, rows(supervised=True))
    assert sum(computed[-2:]) == sum(len(row["input_ids"]) for row in rows())


@pytest.mark.parametrize("arguments", [{"adapter": LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")},
                                       {"neftune_noise_alpha": 5.0}], ids=["dropout", "noise"])  # fmt: skip
def test_what_is_random_is_so_in_each_sample(
    quick: None, tmp_path: Path, computed: list[int], arguments: dict[str, Any]
) -> None:
    trained(tmp_path, rows(), **arguments)
    assert sum(computed[-2:]) == sum(len(row["input_ids"]) for row in rows())


def test_evaluation_too(quick: None, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"per_device_eval_batch_size": 8, "token_budget": 1000, "report_to": "none", "bf16": False}
    trainer = make_trainer(Spec(str(tmp_path), arguments=arguments), evaluation=rows())
    found = trainer.evaluate()
    whole = sum(len(row["input_ids"]) for row in rows())
    assert computed[-1] == whole - 7 * NUM_ALIKE
    never(monkeypatch)
    plain = trainer.evaluate()
    assert computed[-1] == whole
    for name in ("eval_loss", "eval_mean_token_accuracy", "eval_entropy", "eval_num_tokens"):
        assert found[name] == pytest.approx(plain[name], rel=1e-6), name
