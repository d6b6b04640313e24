"""Reward models beside TRL 1.16: losses, margins, centering, families, full and with an adapter, three steps each."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification

import posttrain
from posttrain.models.scoring import as_classifier
from tests.parity.side_by_side import Rows, Trained, as_dataset, assert_same, train, trl
from tests.parity.test_kto_orpo import PAIRS, TEXT
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]
OF_BATCHES = ("min_reward", "max_reward")
SMALL = (*OF_BATCHES, "mean_reward", "margin")
"""Sums and differences of scores near 1: they agree to the rounding of these."""


def scorer(family: str) -> Any:
    """A model with a score, for so many tokens; the same each time."""

    def make(vocabulary: int) -> Any:
        model = tiny_model(family, vocabulary)
        model.config.pad_token_id = 0
        made = as_classifier(model)
        with torch.no_grad():
            made.score.weight.copy_(torch.linspace(-1, 1, made.score.weight.numel()).view_as(made.score.weight))
        return made

    return make


def lora() -> dict[str, Any]:
    return {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")}


def check(folder: Path, rows: Rows, family: str = "llama", **settings: Any) -> Trained:
    settings = {"method": "Reward", "learning_rate": 1e-3, "model": scorer(family), **settings}
    theirs = train(trl, folder, rows, **settings)
    ours = train(posttrain, folder, rows, **settings)
    assert_same(ours, theirs, ("num_tokens", "eval_num_tokens", *SMALL, *(f"eval_{name}" for name in SMALL)))
    for entry, expected in zip(ours.history, theirs.history, strict=True):
        for name in {*SMALL, *(f"eval_{name}" for name in SMALL)} & expected.keys():
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=5e-6), name
    return theirs


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "lfm2"])
def test_families(family: str, adapted: bool, tmp_path: Path) -> None:
    theirs = check(tmp_path, PAIRS, family, given=lora if adapted else dict)
    assert theirs.numbers[1] > 0


WITH_MARGIN: Rows = [{**row, "margin": 0.3 * i - 0.5} for i, row in enumerate(PAIRS)]
IMPLICIT: Rows = [{"chosen": r["prompt"] + r["chosen"], "rejected": r["prompt"] + r["rejected"]} for r in PAIRS]
OPTIONS: dict[str, tuple[Rows, dict[str, Any]]] = {
    "margins": (WITH_MARGIN, {}),
    "centering": (PAIRS, {"center_rewards_coefficient": 0.1}),
    "margins and centering": (WITH_MARGIN, {"center_rewards_coefficient": 0.1}),
    "only short ones": (PAIRS, {"max_length": 50}),
    "text": (TEXT, {}),
    "implicit prompts": (IMPLICIT, {}),
    "half a batch": (PAIRS, {"per_device_train_batch_size": 3}),
    "accumulation": (PAIRS, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option: str, tmp_path: Path) -> None:
    rows, settings = OPTIONS[option]
    if option == "accumulation":  # least and greatest are means over micro-batches, and ours is one
        settings = {"method": "Reward", "learning_rate": 1e-3, "model": scorer("llama"), **settings}
        ours, theirs = (train(library, tmp_path, rows, **settings) for library in (posttrain, trl))
        assert_same(ours, theirs, ("num_tokens", *SMALL))
        return
    check(tmp_path, rows, **settings)


def test_evaluation(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        return {"eval_dataset": as_dataset(PAIRS[:4])}

    check(tmp_path, PAIRS, given=given, eval_strategy="steps", eval_steps=1)


@pytest.mark.parametrize("of_training", [True, False])
def test_margins_of_one_set_only(of_training: bool, tmp_path: Path) -> None:
    rows, others = (WITH_MARGIN, PAIRS) if of_training else (PAIRS, WITH_MARGIN)
    check(tmp_path, rows, given=lambda: {"eval_dataset": as_dataset(others[:4])}, eval_strategy="steps", eval_steps=1)


def test_a_padding_token_that_ends_turns(tmp_path: Path) -> None:
    """transformers reads the score before it."""

    def tokenizer() -> Any:
        made = chatml_tokenizer()
        made.chat_template = made.chat_template.replace("<|im_end|>\\n", "<|im_end|>")
        made.pad_token = made.eos_token
        return made

    check(tmp_path, PAIRS, tokenizer=tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_transformers_loads_what_is_saved(family: str, kind: str, tmp_path: Path) -> None:
    """From a language model, whose layers are taken; the scores of padded batches are those of training."""
    from posttrain import RewardConfig, RewardTrainer

    tokenizer = chatml_tokenizer()
    model = tiny_model(family, len(tokenizer))
    args = RewardConfig(str(tmp_path), max_steps=2, bf16=False, report_to="none", learning_rate=1e-2,
                        per_device_train_batch_size=3)  # fmt: skip
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    given = {} if kind == "full" else {"peft_config": adapter}
    trainer = RewardTrainer(copy.deepcopy(model), args, train_dataset=PAIRS, eval_dataset=PAIRS,
                            processing_class=tokenizer, **given)  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_accuracy", "eval_margin", "eval_calibration_error", "eval_length_correlation"} <= metrics.keys()
    trainer.save_model(str(tmp_path / "model"))
    if kind == "adapter":
        from peft import PeftModel

        base = as_classifier(copy.deepcopy(model))
        base.config.pad_token_id = tokenizer.pad_token_id
        loaded: Any = PeftModel.from_pretrained(base, tmp_path / "model")
    else:
        if kind == "merged":
            trainer.model.merge_and_unload().save_pretrained(tmp_path / "merged")
        place = tmp_path / ("merged" if kind == "merged" else "model")
        loaded, about = AutoModelForSequenceClassification.from_pretrained(place, output_loading_info=True)
        assert not any(about.values()), about
    loaded.eval()
    texts = [
        tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        for row in PAIRS
        for side in ("chosen", "rejected")
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    batch.pop("token_type_ids", None)
    with torch.no_grad():
        scores = loaded(**batch).logits[:, 0].view(-1, 2)
    assert metrics["eval_accuracy"] == pytest.approx((scores[:, 0] > scores[:, 1]).float().mean().item())
    assert metrics["eval_margin"] == pytest.approx((scores[:, 0] - scores[:, 1]).mean().item(), rel=1e-4, abs=1e-6)


def test_peft_alone_loads_an_adapter_that_was_saved(tmp_path: Path) -> None:
    """From its folder, base model and score included: nothing of posttrain's is asked."""
    from peft import AutoPeftModelForSequenceClassification

    from posttrain import RewardConfig, RewardTrainer

    tokenizer = chatml_tokenizer()
    tiny_model("llama", len(tokenizer)).save_pretrained(tmp_path / "base")
    args = RewardConfig(str(tmp_path), max_steps=2, bf16=False, report_to="none", learning_rate=1e-2,
                        per_device_train_batch_size=3)  # fmt: skip
    trainer = RewardTrainer(str(tmp_path / "base"), args, train_dataset=PAIRS, eval_dataset=PAIRS,
                            processing_class=tokenizer, **lora())  # fmt: skip
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(str(tmp_path / "model"))
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1).eval()
    differences = []
    for row in PAIRS:
        scores = []
        for side in ("chosen", "rejected"):
            text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                scores.append(loaded(input_ids=ids).logits.item())
        differences.append(scores[0] - scores[1])
    assert metrics["eval_margin"] == pytest.approx(sum(differences) / len(differences), rel=1e-4, abs=1e-6)
