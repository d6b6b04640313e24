"""Preference optimisation beside TRL 1.16: every loss type and option, full and with an adapter, three steps each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import posttrain
from posttrain.objectives.dpo import F_DIVERGENCES, OF_ANY_DIVERGENCE
from tests.parity.side_by_side import Rows, Trained, as_dataset, assert_same, train, trl
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

TEXT_PAIRS: Rows = [
    {
        "prompt": f"What is {i} plus two? " * (1 + i % 2),
        "chosen": f"It is {i + 2}, I think." * (1 + i % 3),
        "rejected": f"No idea, {i} or so." * (1 + i % 2),
    }
    for i in range(6)
]
PAIRS: Rows = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in TEXT_PAIRS
]
SHORT: Rows = [
    {
        "prompt": [{"role": "user", "content": f"Is it {i}?"}],
        "chosen": [{"role": "assistant", "content": f"Yes, {i}."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    for i in range(6)
]
IMPLICIT: Rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in PAIRS]
IMPLICIT_TEXT: Rows = [
    {"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in TEXT_PAIRS
]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "logits/chosen", "logits/rejected")
OVER_TOKENS = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""Where a step has several micro-batches, ours are over its tokens; TRL's are means of means."""
SMALL = {"learning_rate": 1e-3}

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.1},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.2},
    "sft": {},
    "sigmoid_norm": {},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear")}


def both(folder: Path, rows: Rows, **settings: Any) -> tuple[Trained, Trained]:
    """TRL is given a second copy of the model as its reference (it cannot make one of a model without a path)."""
    settings = {"method": "DPO", **SMALL, **settings}
    family, given = settings.get("model", "llama"), settings.get("given", dict)

    def with_copy() -> dict[str, Any]:
        options = given()
        if "peft_config" not in options and isinstance(family, str):
            options.setdefault("ref_model", tiny_model(family, len(chatml_tokenizer())))
        return options

    return train(posttrain, folder, rows, **settings), train(trl, folder, rows, **{**settings, "given": with_copy})


def compare(folder: Path, rows: Rows, leaving_out: Sequence[str] = (), **settings: Any) -> Trained:
    """Rewards are small differences of large sums, and mean logits of numbers of both signs: they agree to the rounding
    of what was added."""
    ours, theirs = both(folder, rows, **settings)
    assert_same(ours, theirs, [*leaving_out, *REWARDS, *(f"eval_{name}" for name in REWARDS)])
    for entry, expected in zip(ours.history, theirs.history, strict=True):
        for prefix in ("", "eval_"):
            for name in (f"{prefix}{name}" for name in REWARDS if name not in leaving_out):
                if name not in expected:
                    continue
                size = 1e-6 * abs(expected[f"{prefix}logps/chosen"])
                assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=size), name
    return theirs


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str, adapted: bool, tmp_path: Path) -> None:
    given = lora if adapted else dict
    theirs = compare(tmp_path, PAIRS, loss_type=[loss], given=given, **LOSSES[loss])
    assert theirs.numbers[1] > 0  # there is a gradient


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, adapted: bool, tmp_path: Path) -> None:
    compare(tmp_path, PAIRS, model=family, given=lora if adapted else dict)


OPTIONS: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.03},
    "mixture": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "mixture without weights": {"loss_type": ["sigmoid", "hinge"]},
    "ld": {"ld_alpha": 0.3},
    "ld, none of the rest": {"ld_alpha": 0.0},
    "ld and sft": {"ld_alpha": 0.3, "loss_type": ["sigmoid", "sft"]},
    "wpo": {"use_weighting": True},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "alpha of 1": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
    "js with ipo": {"f_divergence_type": "js_divergence", "loss_type": ["ipo"]},
    "cut": {"max_length": 40},
    "precomputed": {"precompute_ref_log_probs": True},
    "asked each time": {"precompute_ref_log_probs": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option(name: str, tmp_path: Path) -> None:
    compare(tmp_path, PAIRS, **OPTIONS[name])


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("loss", [name for name in OF_ANY_DIVERGENCE if name != "sft"])
@pytest.mark.parametrize("divergence", [name for name in F_DIVERGENCES if name != "reverse_kl"])
def test_divergences(divergence: str, loss: str, adapted: bool, tmp_path: Path) -> None:
    """Of short answers, at a rate that leaves the policy near its reference: the exponential of a sum of many nats has
    the sum's rounding, and far away little else."""
    settings = {"f_divergence_type": divergence, "loss_type": [loss], "learning_rate": 1e-5, **LOSSES[loss]}
    ours, theirs = both(tmp_path, SHORT, given=lora if adapted else dict, **settings)
    assert ours.numbers == pytest.approx(theirs.numbers, rel=1e-5, abs=1e-12)


def test_the_end_is_kept(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        compare(tmp_path, PAIRS, max_length=40, truncation_mode="keep_end")


@pytest.mark.parametrize("rows", [TEXT_PAIRS, IMPLICIT, IMPLICIT_TEXT], ids=["text", "implicit", "implicit text"])
def test_rows_of_every_kind(rows: Rows, tmp_path: Path) -> None:
    compare(tmp_path, rows)


def test_accumulated_over_micro_batches(tmp_path: Path) -> None:
    compare(tmp_path, PAIRS, OVER_TOKENS, per_device_train_batch_size=2, gradient_accumulation_steps=3)


@pytest.mark.parametrize("loss", ["aot", "sft"])
def test_losses_of_whole_batches_are_accumulated_too(loss: str, tmp_path: Path) -> None:
    compare(
        tmp_path, PAIRS, OVER_TOKENS, loss_type=[loss], per_device_train_batch_size=3, gradient_accumulation_steps=2
    )


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        return {"ref_model": tiny_model("llama", len(chatml_tokenizer()), seed=5)}

    theirs = compare(tmp_path, PAIRS, given=given)
    assert theirs.history[0]["rewards/margins"] != 0


def test_an_adapter_that_was_trained_before_is_its_own_reference(tmp_path: Path) -> None:
    def adapted(vocabulary: int) -> Any:
        model = get_peft_model(tiny_model("llama", vocabulary), LoraConfig(r=4, target_modules="all-linear"))
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.1)
        return model

    for precompute in (True, False):
        compare(tmp_path / str(precompute), PAIRS, model=adapted, precompute_ref_log_probs=precompute)


def test_evaluation(tmp_path: Path) -> None:
    compare(
        tmp_path,
        PAIRS,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        given=lambda: {"eval_dataset": as_dataset(PAIRS[2:])},
    )


def test_epochs(tmp_path: Path) -> None:
    ours, theirs = both(tmp_path, PAIRS, num_train_epochs=2, per_device_train_batch_size=3)
    assert [e["loss"] for e in ours.history if "loss" in e] == pytest.approx(
        [e["loss"] for e in theirs.history if "loss" in e], rel=1e-5
    )
