"""Which parameters decay, in which optimiser, and the schedules' first and last learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer
from transformers.optimization import get_reduce_on_plateau_schedule

from posttrain import ConfigError, SFTConfig
from posttrain.optimization import follows_metrics, make_optimizer, make_scheduler
from posttrain.session import Session
from tests.tiny_models import FAMILIES, tiny_model


def settings(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(str(folder), weight_decay=0.1, learning_rate=1e-3, report_to="none", bf16=False, **options)


def decay_of(optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> dict[str, float]:
    names = {parameter: name for name, parameter in named.items()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize("family", FAMILIES)
def test_decay_leaves_out_what_transformers_leaves_out(family: str, tmp_path: Path) -> None:
    model, args = tiny_model(family), settings(tmp_path)
    ours = decay_of(make_optimizer(args, model, dict(model.named_parameters())), dict(model.named_parameters()))
    theirs = Trainer(model, args).create_optimizer()
    assert ours == decay_of(theirs, dict(model.named_parameters()))
    assert set(ours.values()) == {0.0, 0.1}
    assert all((value == 0.0) == ("norm" in name or "ln_" in name or "bias" in name) for name, value in ours.items())


def test_all_of_an_adapter_decays(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear"))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decays = decay_of(make_optimizer(settings(tmp_path), model, trained), trained)
    assert len(decays) == len(trained) == 28
    assert set(decays.values()) == {0.1}


def test_the_optimizer_holds_the_fp32_masters(tmp_path: Path) -> None:
    model, args = tiny_model("llama"), settings(tmp_path)
    args.bf16 = True
    mine = dict(model.named_parameters())
    session = Session.open(model, args)
    optimizer = make_optimizer(args, model, session.trained)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in mine.values()}
    assert {p.dtype for p in held} == {torch.float32}
    assert decay_of(optimizer, mine)["model.norm.weight"] == 0.0
    session.close()


OPTIMIZERS = {
    "adamw_torch": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "lr": 1e-3}),
    "adamw_torch_fused": (torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-6, "lr": 1e-3, "fused": True}),
    "sgd": (torch.optim.SGD, {"lr": 1e-3}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-3}),
    "adagrad": (torch.optim.Adagrad, {"lr": 1e-3}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_named_optimizer_with_its_settings(name: str, tmp_path: Path) -> None:
    kind, expected = OPTIMIZERS[name]
    args = settings(tmp_path, optim=name, adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = make_optimizer(args, tiny_model("llama"), dict(tiny_model("llama").named_parameters()))
    assert type(optimizer) is kind
    assert {key: optimizer.param_groups[0][key] for key in expected} == expected


def test_a_chosen_class_wins(tmp_path: Path) -> None:
    model = tiny_model("llama")
    chosen = (torch.optim.SGD, {"lr": 0.5, "momentum": 0.9})
    optimizer = make_optimizer(settings(tmp_path), model, dict(model.named_parameters()), chosen)
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.5, 0.9)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'adamw_anyprecision'.*torchdistx"):
        make_optimizer(settings(tmp_path, optim="adamw_anyprecision"), tiny_model("llama"), {})


def test_a_factory_finds_the_masters_in_the_model(tmp_path: Path) -> None:
    """As transformers takes them: called without arguments, it gives what makes an optimiser of a whole model."""

    def factory() -> Any:
        return lambda model, lr: torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)

    model, args = tiny_model("llama"), settings(tmp_path)
    args.bf16 = True
    session = Session.open(model, args)
    with session.precision.exported():
        optimizer = make_optimizer(args, model, session.trained, (factory, {"lr": 0.5}))
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(session.trained.values())
    assert optimizer.param_groups[0]["lr"] == 0.5
    session.close()


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("linear", {"warmup_steps": 2}, [0, 0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", {"warmup_ratio": 0.5}, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]),
        ("constant", {}, [1] * 7),
        ("constant_with_warmup", {"warmup_steps": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1]),
        ("cosine", {}, [1, 0.933, 0.75, 0.5, 0.25, 0.067, 0]),
        ("cosine_with_min_lr", {"lr_scheduler_kwargs": {"min_lr_rate": 0.5}},
         [1, 0.967, 0.875, 0.75, 0.625, 0.533, 0.5]),
    ],
)  # fmt: skip
def test_schedules(name: str, options: dict[str, Any], expected: list[float], tmp_path: Path) -> None:
    args = settings(tmp_path, lr_scheduler_type=name, **options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    scheduler = make_scheduler(args, optimizer, max_steps=6)
    rates = []
    for _ in range(7):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx(expected, abs=1e-3)


def test_which_schedules_follow_a_metric(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert follows_metrics(get_reduce_on_plateau_schedule(optimizer))
    assert not follows_metrics(make_scheduler(settings(tmp_path), optimizer, 6))
    greedy = settings(tmp_path, lr_scheduler_type="greedy", eval_strategy="epoch")
    assert follows_metrics(make_scheduler(greedy, optimizer, 6))
