"""KTO and ORPO beside TRL 1.16: every loss and option, full and with an adapter, three steps each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from peft import LoraConfig

import posttrain
from tests.parity.side_by_side import Rows, Trained, assert_same, near, train, trl
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

orpo = pytest.importorskip("trl.experimental.orpo")
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

TEXT: Rows = [
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
    for row in TEXT
]
RATED: Rows = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": i % 3 > 0}
    for i, row in enumerate(PAIRS)
]
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "logits/chosen", "logits/rejected",
           "log_odds_chosen")  # fmt: skip
"""Small differences of large sums: they agree to the rounding of what was added."""
SMALL = {"learning_rate": 1e-3}


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear")}


def compare(ours: Trained, theirs: Trained, leaving_out: Sequence[str] = ()) -> Trained:
    tokens = ("num_tokens", "eval_num_tokens")  # ours are those computed on: a prompt once, mismatched answers too
    assert_same(ours, theirs, [*leaving_out, *tokens, *REWARDS, *(f"eval_{name}" for name in REWARDS)])
    for entry, expected in zip(ours.history, theirs.history, strict=True):
        for name, value in expected.items():
            if name.removeprefix("eval_") in REWARDS and name not in leaving_out:
                prefix = name.removesuffix(name.removeprefix("eval_"))
                size = max(abs(expected.get(f"{prefix}logps/{side}", 0)) for side in ("chosen", "rejected"))
                assert entry[name] == pytest.approx(value, rel=1e-5, abs=1e-6 * size), name
    return theirs


# --- KTO ------------------------------------------------------------------------------------------------------------


def kto(folder: Path, rows: Rows, **settings: Any) -> Trained:
    """TRL is given a copy of the model as its reference, for it cannot make one of a model without a path."""
    settings = {"method": "KTO", **SMALL, **settings}
    given = settings.get("given", dict)

    def with_copy() -> dict[str, Any]:
        options = given()
        if "peft_config" not in options:
            options["ref_model"] = tiny_model(settings.get("model", "llama"), len(chatml_tokenizer()))
        return options

    theirs = train(trl, folder, rows, **{**settings, "given": with_copy})
    return compare(train(posttrain, folder, rows, **settings), theirs)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("loss", ["kto", "apo_zero_unpaired"])
def test_kto_losses(loss: str, adapted: bool, tmp_path: Path) -> None:
    theirs = kto(tmp_path, RATED, loss_type=loss, given=lora if adapted else dict)
    assert theirs.numbers[1] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_kto_families(family: str, tmp_path: Path) -> None:
    kto(tmp_path, RATED, model=family)


OPTIONS: dict[str, dict[str, Any]] = {
    "beta": {"beta": 0.5},
    "weights": {"desirable_weight": 1.3, "undesirable_weight": 0.7},
    "half a batch": {"per_device_train_batch_size": 3},
    "accumulation": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "as training goes": {"precompute_ref_log_probs": False},
    "cut": {"max_length": 30},
    "good answers only at first": {"per_device_train_batch_size": 2, "loss_type": "apo_zero_unpaired"},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_kto_options(option: str, tmp_path: Path) -> None:
    averages = ("entropy", "logits/chosen", "logits/rejected", "rewards/chosen", "rewards/rejected", "logps/chosen",
                "logps/rejected", "rewards/margins")  # fmt: skip
    settings = {"method": "KTO", **SMALL, **OPTIONS[option]}
    if option == "precomputed":
        kto(tmp_path, RATED, given=lora, **OPTIONS[option])
        return
    copy = {"ref_model": lambda: tiny_model("llama", len(chatml_tokenizer()))}
    theirs = train(trl, tmp_path, RATED, **{**settings, "given": lambda: {"ref_model": copy["ref_model"]()}})
    compare(train(posttrain, tmp_path, RATED, **settings), theirs, averages if option == "accumulation" else ())


def test_kto_of_pairs(tmp_path: Path) -> None:
    kto(tmp_path, PAIRS, per_device_train_batch_size=8)


@pytest.mark.parametrize("rows", [RATED, PAIRS], ids=["rated", "pairs"])
def test_kto_of_a_stream(rows: Rows, tmp_path: Path) -> None:
    """Mismatched answers are those of the batch; two passes, of which the first ends with a smaller one."""
    from tests.parity.side_by_side import as_dataset

    stream = as_dataset(rows).to_iterable_dataset()
    settings = {"method": "KTO", **SMALL, "per_device_train_batch_size": 4, "given": lora}
    ours, theirs = (train(library, tmp_path, stream, **settings) for library in (posttrain, trl))
    compare(ours, theirs, ["epoch"])  # the whole run over a stream counts as one


def test_kto_evaluation_in_batches_of_another_size(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        from tests.parity.side_by_side import as_dataset

        return {"eval_dataset": as_dataset(RATED), **lora()}

    settings = {"per_device_eval_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1}
    kto(tmp_path, RATED, given=given, per_device_train_batch_size=3, **settings)


def test_kto_evaluation(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        from tests.parity.side_by_side import as_dataset

        return {"eval_dataset": as_dataset(RATED[:4]), **lora()}

    settings = {"per_device_eval_batch_size": 6, "eval_strategy": "steps", "eval_steps": 1}
    kto(tmp_path, RATED, given=given, per_device_train_batch_size=6, **settings)


# --- ORPO -----------------------------------------------------------------------------------------------------------

THEIR_ORPO: Any = SimpleNamespace(ORPOConfig=orpo.ORPOConfig, ORPOTrainer=orpo.ORPOTrainer, __name__="trl")
NOT_THEIRS = ("logits/chosen", "logits/rejected", "eval_logits/chosen", "eval_logits/rejected")
"""TRL's are means over prompts and padding too."""


TEMPLATE = (
    "{% for m in messages %}{{ m.role + ':' + m.content + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEXT_APART: Rows = [
    {name: text.strip() if name == "prompt" else f" {text}" for name, text in row.items()} for row in TEXT
]


def without_bos() -> Any:
    """TRL's ORPO puts a BOS token before every prompt and an EOS token behind every answer that lacks one; ours has
    what the model is given, and gives, in use."""
    tokenizer = plain_tokenizer(template=TEMPLATE)
    tokenizer.bos_token = None
    return tokenizer


def check_orpo(folder: Path, rows: Rows, **settings: Any) -> Trained:
    settings = {"method": "ORPO", "tokenizer": without_bos, **SMALL, **settings}
    theirs = train(THEIR_ORPO, folder, rows, **settings)
    return compare(train(posttrain, folder, rows, **settings), theirs, NOT_THEIRS)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_orpo(family: str, adapted: bool, tmp_path: Path) -> None:
    theirs = check_orpo(tmp_path, PAIRS, model=family, given=lora if adapted else dict)
    assert theirs.numbers[1] > 0


@pytest.mark.parametrize(
    "option", [{"beta": 0.7}, {"max_length": 40}, {"per_device_train_batch_size": 3}], ids=lambda x: next(iter(x))
)
def test_orpo_options(option: dict[str, Any], tmp_path: Path) -> None:
    check_orpo(tmp_path, PAIRS, **option)


def test_orpo_text(tmp_path: Path) -> None:
    check_orpo(tmp_path, TEXT_APART)


def test_orpo_in_small_batches_is_the_same(tmp_path: Path) -> None:
    """However the step is cut."""
    runs = [
        train(posttrain, tmp_path / str(i), PAIRS, method="ORPO", **SMALL, **cut)
        for i, cut in enumerate(
            ({}, {"token_budget": 60}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3})
        )
    ]
    for run in runs[1:]:
        assert run.numbers == near(runs[0].numbers)
