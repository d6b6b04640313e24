"""What ordinary scripts do beside training: each found once to go wrong, each as TRL has it or refused by name."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM, TrainerCallback

import posttrain
from posttrain.errors import CheckpointError, ConfigError, DataError
from tests.parity.side_by_side import CHAT_PAIRS, CHATS, TEXTS, as_dataset, make_trainer, near, train_both
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
BEST = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "f1", "greater_is_better": True}


def scored(values: list[float]) -> Any:
    """`compute_metrics` that says one of `values` after another."""
    left = iter(values)
    return lambda: {"eval_dataset": as_dataset(CHATS), "compute_metrics": lambda _: {"f1": next(left)}}


def train(folder: Path, rows: Any = CHAT_PAIRS, resume: Any = None, **settings: Any) -> Any:
    trainer = make_trainer(posttrain, folder, rows, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_metric_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, max_steps=4, **BEST, given=scored([math.nan, 0.5, 0.9, 0.2] * 2))
    assert ours.trainer.state.best_metric == theirs.trainer.state.best_metric == 0.9
    assert ours.trainer.state.best_global_step == 3


def test_the_best_checkpoint_is_found_where_the_folder_was_moved(tmp_path: Path) -> None:
    more = {**BEST, "save_total_limit": 1}
    train(tmp_path / "a", max_steps=4, **more, given=scored([0.1, 0.9, 0.2, 0.3]))
    shutil.move(tmp_path / "a", tmp_path / "b")
    resumed = train(tmp_path / "b", resume=True, max_steps=6, **more, given=scored([0.4, 0.5]))
    assert resumed.state.best_model_checkpoint == str(tmp_path / "b" / "checkpoint-2")
    assert sorted(path.name for path in (tmp_path / "b").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]


def test_no_clipping_written_as_infinity(tmp_path: Path) -> None:
    train(tmp_path, max_grad_norm=float("inf"), save_strategy="steps", save_steps=1).save_model()


def test_an_adapter_of_another_name(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        model = tiny_model("llama", len(chatml_tokenizer()))
        adapter = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"), adapter_name="mine")
        return {"model": adapter, **scored([0.1, 0.9, 0.2, 0.3])()}

    whole = train(tmp_path, max_steps=4, **BEST, given=given)
    assert whole.state.best_global_step == 2
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-3"), max_steps=4, **BEST, given=given)
    assert resumed.state.global_step == 4


def test_a_schedule_with_milestones_is_taken_up(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        model = tiny_model("llama", len(chatml_tokenizer()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
        return {"model": model, "optimizers": (optimizer, schedule)}

    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 1, "given": given}
    whole = train(tmp_path, **more)
    resumed = train(tmp_path, resume=str(tmp_path / "checkpoint-1"), **more)
    rates = [[e["learning_rate"] for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert rates[0] == rates[1] == near([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_bad_row_of_a_stream_loses_nothing(tmp_path: Path) -> None:
    rows = [*TEXTS * 300, {"text": 3}]
    stream = as_dataset(TEXTS).to_iterable_dataset()
    del stream

    class Stream:
        def __iter__(self) -> Any:
            return iter(rows)

    more = {"per_device_train_batch_size": 250, "max_steps": 20, "save_strategy": "steps", "save_steps": 500}
    with pytest.raises(DataError, match=r"\[1800\]") as caught:
        train(tmp_path, Stream(), **more)
    (note,) = caught.value.__notes__
    saved = Path(note.rpartition(" ")[2])
    assert saved.is_dir()
    assert int(saved.name.rpartition("-")[2]) >= 4


def test_each_pass_over_a_shuffled_stream_has_its_order(tmp_path: Path) -> None:
    stream = as_dataset(CHAT_PAIRS).to_iterable_dataset().shuffle(seed=3, buffer_size=6)
    ours, theirs = train_both(tmp_path, stream, per_device_train_batch_size=2, max_steps=6)
    assert ours.numbers == near(theirs.numbers)


def test_a_chat_that_the_users_function_rendered_has_its_end_already(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()

    def given() -> dict[str, Any]:
        return {"formatting_func": lambda row: tokenizer.apply_chat_template(row["messages"], tokenize=False)}

    ours, theirs = train_both(tmp_path, CHATS, given=given)
    assert ours.numbers == near(theirs.numbers)


@pytest.mark.parametrize("change", [{"loss_type": "dft"}, {"learning_rate": 0.5}, {"lr_scheduler_type": "constant"}])
def test_going_on_as_another_run_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    train(tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(CheckpointError, match="was written with"):
        train(tmp_path, resume=True, max_steps=5, **change)


def test_an_optimiser_that_holds_nothing_that_learns(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        model = tiny_model("llama", len(chatml_tokenizer()))
        optimizer = torch.optim.AdamW(model.parameters())
        lora = LoraConfig(r=2, target_modules="all-linear")
        return {"model": model, "optimizers": (optimizer, None), "peft_config": lora}

    with pytest.raises(ConfigError, match="holds none of the parameters"):
        train(tmp_path, given=given)


def test_gemma_2_generates_and_has_metrics(tmp_path: Path) -> None:
    """It caps its attention scores, which transformers' SDPA cannot; it says the same as before, though."""
    torch.manual_seed(0)
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0, "sliding_window": 4}
    config = Gemma2Config(vocab_size=len(chatml_tokenizer()), hidden_size=32, intermediate_size=48, head_dim=8,
                          num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **caps)  # fmt: skip
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager")
    ids = torch.randint(5, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    seen: list[Any] = []

    class InBetween(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
            model.eval()
            with torch.no_grad():
                seen.append((model(ids, attention_mask=mask).logits,
                             model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)))  # fmt: skip
            model.train()

    model.eval()
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits
        said = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    given = {"model": model, "eval_dataset": as_dataset(CHATS), "compute_metrics": lambda _: {"n": 1.0},
             "callbacks": [InBetween()]}  # fmt: skip
    trainer = make_trainer(posttrain, tmp_path, CHAT_PAIRS, given=lambda: given)
    trainer.train()
    assert trainer.evaluate()["eval_n"] == 1.0
    logits, generated = seen[0]
    torch.testing.assert_close(logits[mask.bool()], before[mask.bool()], rtol=1e-4, atol=1e-5)
    assert torch.equal(generated, said)


def test_rows_that_are_lost_are_said_to_whoever_configured_no_logging(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "posttrain"):
        rows = [{"prompt": "a " * 40, "completion": "b"}, {"prompt": "a", "completion": "b"}]
        make_trainer(posttrain, tmp_path, rows, max_length=20)
    assert "1 skipped (nothing left to train within max_length)" in caplog.text


@pytest.mark.parametrize("name", ["compute_loss", "train_dataset", "data_collator"])
def test_what_is_set_afterwards_and_would_not_be_heeded(name: str, tmp_path: Path) -> None:
    trainer = make_trainer(posttrain, tmp_path, TEXTS)
    with pytest.raises(ConfigError, match=rf"trainer.{name} = ... is not honoured"):
        setattr(trainer, name, None)
    trainer.accelerator.print("scripts end so")


def test_hooks_in_a_mixin_are_found() -> None:
    class Mixin:
        def compute_loss(self) -> None: ...

    with pytest.raises(ConfigError, match="compute_loss would never be called"):
        type("Mine", (Mixin, posttrain.SFTTrainer), {"__module__": "users"})


@pytest.mark.parametrize("late", [0, 300])
def test_a_stream_that_does_not_fit_the_model(late: int, tmp_path: Path) -> None:
    """Known before training begins, or when the row comes: with its name in both cases."""
    rows = [{"text": "word"}] * late + [{"text": "word " * 3000}] * 3
    stream = as_dataset(rows).to_iterable_dataset()
    with pytest.raises((ConfigError, DataError), match=r"\[\d+\]? .*has \d+ tokens, the model \d+ places"):
        make_trainer(posttrain, tmp_path, stream, model="gpt2", max_length=None, max_steps=200).train()


def test_rows_longer_than_learned_positions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has \d+ tokens, the model \d+ places"):
        make_trainer(posttrain, tmp_path, [{"text": "word " * 3000}], model="gpt2", max_length=None)
