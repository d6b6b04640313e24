"""A reference that follows the policy (`sync_ref_model`), beside TRL 1.16: of its own, or a model that was given; and
what it has become is part of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import posttrain
from posttrain import CheckpointError, ConfigError
from tests.parity.side_by_side import Rows, near, train, trl
from tests.parity.test_kto_orpo import PAIRS, RATED
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
ROWS: dict[str, Rows] = {"DPO": PAIRS, "KTO": RATED}
FOLLOW: dict[str, Any] = {
    "sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.7, "max_steps": 6,
    "learning_rate": 1e-3, "per_device_train_batch_size": 3,
}  # fmt: skip


def copy() -> dict[str, Any]:
    return {"ref_model": tiny_model("llama", len(chatml_tokenizer()))}


@pytest.mark.parametrize("given", [dict, copy], ids=["its own", "given"])
@pytest.mark.parametrize("method", ROWS)
def test_follows_as_theirs_does(method: str, given: Any, tmp_path: Path) -> None:
    settings = {"method": method, **FOLLOW}
    theirs = train(trl, tmp_path, ROWS[method], given=copy, **settings)
    ours = train(posttrain, tmp_path, ROWS[method], given=given, **settings)
    assert ours.numbers == near(theirs.numbers)
    still = train(posttrain, tmp_path / "still", ROWS[method], **{**settings, "sync_ref_model": False,
                  "ref_model_sync_steps": 512, "ref_model_mixup_alpha": 0.6})  # fmt: skip
    assert still.numbers[:4] == near(ours.numbers[:4])
    assert still.numbers[4:] != near(ours.numbers[4:])


@pytest.mark.parametrize("given", [dict, copy], ids=["its own", "given"])
@pytest.mark.parametrize("step", [1, 3, 5])
def test_killed_and_resumed(step: int, given: Any, tmp_path: Path) -> None:
    def trainer() -> Any:
        args = posttrain.DPOConfig(str(tmp_path), bf16=False, save_strategy="steps", save_steps=1, logging_steps=1,
                                   report_to="none", disable_tqdm=True, **FOLLOW)  # fmt: skip
        words = chatml_tokenizer()
        return posttrain.DPOTrainer(tiny_model("llama", len(words)), args=args, train_dataset=PAIRS,
                                    processing_class=words, **given())  # fmt: skip

    undisturbed, resumed = trainer(), trainer()
    undisturbed.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    for (name, one), (_, other) in zip(
        undisturbed.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    (tmp_path / f"checkpoint-{step}" / "reference.safetensors").unlink()
    with pytest.raises(CheckpointError):
        trainer().train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))


@pytest.mark.parametrize("given", [dict, copy], ids=["its own", "given"])
def test_small_steps_are_not_rounded_away(given: Any, tmp_path: Path) -> None:
    """In bf16 a reference follows as one in fp32 does, be it a model of its own; and it is given back as it became."""
    words, moved = chatml_tokenizer(), {}
    for bf16 in (False, True):
        options = {**FOLLOW, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.02, "learning_rate": 1e-4}
        args = posttrain.DPOConfig(str(tmp_path), bf16=bf16, save_strategy="no", report_to="none", disable_tqdm=True,
                                   **options)  # fmt: skip
        one = posttrain.DPOTrainer(tiny_model("llama", len(words)), args=args, train_dataset=PAIRS,
                                   processing_class=words, **given())  # fmt: skip
        one.train()
        assert one.run.reference is not None
        start = dict(tiny_model("llama", len(words)).named_parameters())
        now = one.run.reference._own_weights()
        moved[bf16] = sum(float((now[name].float() - start[name]).norm()) for name in now)
        if (model := one.run.reference.model) is not None:
            one.run.reference.close()
            for name, parameter in model.named_parameters():
                assert parameter.dtype == torch.float32
                assert torch.equal(parameter, now[name])
    assert moved[False] > 1e-3
    assert moved[True] == pytest.approx(moved[False], rel=0.1)


def test_a_reference_without_a_place_for_what_the_policy_becomes(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    other = get_peft_model(tiny_model("llama", len(words)), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ConfigError, match=r"wants a reference like the model: model\..* is missing in ref_model"):
        posttrain.DPOTrainer(
            tiny_model("llama", len(words)), other, posttrain.DPOConfig(str(tmp_path), **FOLLOW), train_dataset=PAIRS,
            processing_class=words,
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [{"precompute_ref_log_probs": True}, {"ref_model_mixup_alpha": 1.5},
                                   {"ref_model_sync_steps": 0}], ids=lambda wrong: next(iter(wrong)))  # fmt: skip
def test_what_cannot_be_had_together(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        posttrain.DPOConfig(str(tmp_path), **{**FOLLOW, **wrong})


def test_not_with_an_adapter(tmp_path: Path) -> None:
    words = chatml_tokenizer()
    with pytest.raises(ConfigError, match="sync_ref_model=True is not honoured with an adapter"):
        posttrain.DPOTrainer(
            tiny_model("llama", len(words)), args=posttrain.DPOConfig(str(tmp_path), **FOLLOW), train_dataset=PAIRS,
            processing_class=words, peft_config=LoraConfig(r=2, target_modules="all-linear"),
        )  # fmt: skip
