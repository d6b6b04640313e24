"""What surrounds the steps is TRL 1.16's and transformers': evaluation, callbacks, best model, saved models, state."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, EarlyStoppingCallback, EvalPrediction, TrainerCallback

import posttrain
from tests.parity.side_by_side import (
    AVERAGES,
    CHAT_PAIRS,
    CHATS,
    TEXTS,
    as_dataset,
    assert_same,
    check,
    compared,
    make_trainer,
    near,
    train_both,
    trl,
)
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizers import chatml_tokenizer, plain_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

HELD_OUT = CHAT_PAIRS[::-1][:5]
EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}


def held_out(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"eval_dataset": as_dataset(HELD_OUT), **more}


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)


# --- evaluation -----------------------------------------------------------------------------------------------------

EVALUATIONS: dict[str, dict[str, Any]] = {
    "every step, an incomplete batch": {**EVERY_STEP, "per_device_eval_batch_size": 2},
    "every second step": {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 5},
    "every epoch": {"eval_strategy": "epoch", "num_train_epochs": 2, "per_device_train_batch_size": 2},
    "every epoch, the last begun": {"eval_strategy": "epoch", "max_steps": 5, "per_device_train_batch_size": 2},
    "at the start": {**EVERY_STEP, "eval_on_start": True},
    "later": {**EVERY_STEP, "eval_delay": 2},
    "of packs": {**EVERY_STEP, "packing": True, "max_length": 80, "per_device_train_batch_size": 9},
    "not of packs": {**EVERY_STEP, "packing": True, "max_length": 80, "eval_packing": False},
    "dft": {**EVERY_STEP, "loss_type": "dft"},
    "label smoothing": {**EVERY_STEP, "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluation_during_training(name: str, tmp_path: Path) -> None:
    theirs = check(tmp_path, CHAT_PAIRS, given=held_out(), **EVALUATIONS[name])
    assert any("eval_loss" in entry for entry in theirs.history)


def test_several_evaluation_sets(tmp_path: Path) -> None:
    """TRL logs each set's accuracy and entropy under the same name; ours have the set's. Their mean loss is ours alone,
    and callbacks hear of all sets at once, so that `metrics["eval_loss"]` is always there."""

    def given() -> dict[str, Any]:
        return {"eval_dataset": {"one": as_dataset(HELD_OUT), "two": as_dataset(CHATS)}}

    ours, theirs = train_both(tmp_path, CHAT_PAIRS, given=given, metric_for_best_model="two_loss", **EVERY_STEP)
    assert_same(ours, theirs, leaving_out=[f"eval_{name}" for name in (*AVERAGES, "num_tokens")])
    assert ours.trainer.state.best_metric == near(theirs.trainer.state.best_metric)
    mine, expected = ours.trainer.evaluate(), theirs.trainer.evaluate()
    assert mine["eval_loss"] == near((expected["eval_one_loss"] + expected["eval_two_loss"]) / 2)
    for name in ("one", "two"):
        mine, expected = ours.trainer.evaluate(name), theirs.trainer.evaluate(name)
        assert compared(mine) == near(compared(expected))


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluate_before_and_after_training(family: str, tmp_path: Path) -> None:
    both = [make_trainer(one, tmp_path, CHAT_PAIRS, model=family, given=held_out()) for one in (posttrain, trl)]
    for trains_then in (True, False):
        mine, expected = (compared(trainer.evaluate()) for trainer in both)
        assert mine == near(expected)
        mine, expected = (trainer.evaluate(as_dataset(CHATS), metric_key_prefix="test") for trainer in both)
        assert mine["test_loss"] == near(expected["test_loss"])
        for trainer in both if trains_then else ():
            trainer.train()


def test_an_evaluation_by_hand_finds_no_best_model(tmp_path: Path) -> None:
    for library in (posttrain, trl):
        trainer = make_trainer(library, tmp_path, CHAT_PAIRS, given=held_out(), metric_for_best_model="loss")
        trainer.evaluate()
        assert trainer.state.best_metric is None


def metrics_of(seen: EvalPrediction) -> dict[str, Any]:
    """Numbers that depend on everything that is handed over: values, shapes, order and padding."""
    labels, predictions = seen.label_ids, seen.predictions
    weights = np.arange(1, predictions.size + 1).reshape(predictions.shape) % 101
    positions = np.arange(labels.size).reshape(labels.shape) % 103
    return {
        "predictions": float((np.where(predictions == -100, 0, predictions) * weights).mean()),
        "labels": float((labels * positions).mean()),
        "rows": len(labels),
        "eval_width": labels.shape[1],
    }


def likeliest(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def first_words(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits[..., :7]


@pytest.mark.parametrize("more", [{}, {"per_device_eval_batch_size": 2}, {"eval_accumulation_steps": 1}], ids=str)
@pytest.mark.parametrize("preprocess", [None, likeliest, first_words])
def test_metrics_of_ones_own(preprocess: Callable[..., Any] | None, more: dict[str, Any], tmp_path: Path) -> None:
    given = held_out(compute_metrics=metrics_of, preprocess_logits_for_metrics=preprocess)
    theirs = check(tmp_path, CHAT_PAIRS, given=given, **EVERY_STEP, **more)
    assert "eval_predictions" in theirs.history[1]


def test_predict(tmp_path: Path) -> None:
    def given() -> dict[str, Any]:
        return {"compute_metrics": lambda p: {"n": float((p.label_ids != -100).sum())}}

    def predicted(library: Any) -> tuple[Any, Any]:
        trainer = make_trainer(
            library, tmp_path / library.__name__, CHAT_PAIRS, given=given, per_device_eval_batch_size=2
        )
        return trainer, trainer.predict(CHAT_PAIRS if library is posttrain else trainer.train_dataset)

    (ours, mine), (_, other) = predicted(posttrain), predicted(trl)
    assert mine.predictions.shape == other.predictions.shape
    seen = mine.label_ids != -100
    assert (mine.label_ids == other.label_ids).all()
    assert mine.predictions[seen] == pytest.approx(other.predictions[seen], rel=1e-4, abs=1e-5)
    for name in ("test_loss", "test_n"):
        assert mine.metrics[name] == near(other.metrics[name])
    assert ours.state.log_history == []


def test_inputs_and_losses_for_metrics(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    wanted = {"include_for_metrics": ["inputs", "loss"], "per_device_eval_batch_size": 2}
    check(tmp_path, CHAT_PAIRS, given=held_out(compute_metrics=keep), eval_strategy="epoch", max_steps=1, **wanted)
    mine, expected = seen
    assert (mine.inputs == expected.inputs).all()
    assert mine.losses == near(expected.losses)


def test_metrics_batch_by_batch(tmp_path: Path) -> None:
    class Count:
        """Sums over batches until it is asked for the result."""

        total = 0.0

        def __call__(self, seen: EvalPrediction, compute_result: bool) -> dict[str, float]:
            self.total += float(seen.predictions.float().std()) * len(seen.label_ids)
            return {"spread": self.total} if compute_result else {}

    batches = {"batch_eval_metrics": True, "per_device_eval_batch_size": 2}
    check(tmp_path, CHAT_PAIRS, given=lambda: held_out(compute_metrics=Count())(), **EVERY_STEP, **batches)


# --- callbacks ------------------------------------------------------------------------------------------------------


class Recorder(TrainerCallback):
    """Every event, with the state and the decisions that the callback saw."""

    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []


def _recording(event: str) -> Callable[..., None]:
    def record(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        decisions = {name: value for name, value in vars(control).items() if name.startswith("should_")}
        self.events.append((event, state.global_step, state.epoch, state.max_steps, state.num_train_epochs, decisions))

    return record


for _event in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(Recorder, _event, _recording(_event))


class StopAt(TrainerCallback):
    """Decides at the end of a step: `stop` is `should_training_stop` or `should_epoch_stop`."""

    def __init__(self, step: int, stop: str):
        self.step, self.stop = step, stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            setattr(control, self.stop, True)


def events_of_both(folder: Path, callbacks: Callable[[], list[Any]] = list, **settings: Any) -> list[list[Any]]:
    recorders: list[Recorder] = []

    def given() -> dict[str, Any]:
        recorders.append(Recorder())
        return held_out(callbacks=[*callbacks(), recorders[-1]])()

    train_both(folder, CHAT_PAIRS, given=given, per_device_train_batch_size=2, **settings)
    return [recorder.events for recorder in recorders]


EVENTS: dict[str, dict[str, Any]] = {
    "steps alone": {},
    "by steps": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "logging_steps": 2,
        "max_steps": 5,
    },
    "by epochs": {
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "logging_strategy": "epoch",
        "num_train_epochs": 2,
        "eval_on_start": True,
    },
    "by epochs, the last begun": {"eval_strategy": "epoch", "save_strategy": "epoch", "num_train_epochs": 1.4},
    "the best": {
        "eval_strategy": "epoch",
        "save_strategy": "best",
        "metric_for_best_model": "loss",
        "num_train_epochs": 3,
    },
    "several evaluation batches": {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2},
    "nothing logged": {"logging_strategy": "no"},
}


@pytest.mark.parametrize("name", EVENTS)
def test_events(name: str, tmp_path: Path) -> None:
    ours, theirs = events_of_both(tmp_path, **EVENTS[name])
    assert ours == theirs


def test_events_of_a_run_that_a_callback_ends(tmp_path: Path) -> None:
    by_epochs = {"eval_strategy": "epoch", "save_strategy": "epoch", "max_steps": 9}
    ours, theirs = events_of_both(tmp_path, lambda: [StopAt(4, "should_training_stop")], **by_epochs)
    assert ours == theirs
    assert "on_evaluate" in [event for event, *_ in ours[-6:]]


def test_events_of_an_accumulated_step(tmp_path: Path) -> None:
    """`on_substep_end` comes between micro-batches of our own cutting (`token_budget`), here none."""
    ours, theirs = events_of_both(tmp_path, gradient_accumulation_steps=2, num_train_epochs=2)
    assert ours == [event for event in theirs if event[0] != "on_substep_end"]


def test_events_of_an_epoch_that_a_callback_ends(tmp_path: Path) -> None:
    ours, theirs = events_of_both(tmp_path, lambda: [StopAt(2, "should_epoch_stop")], num_train_epochs=2)
    assert ours == theirs


# --- what remains ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_adapter", [False, True])
def test_best_model_and_early_stopping(is_adapter: bool, tmp_path: Path) -> None:
    """The "best" is the greatest loss, so that it is not the last."""

    def given() -> dict[str, Any]:
        adapter = {"peft_config": lora()} if is_adapter else {}
        return held_out(callbacks=[EarlyStoppingCallback(early_stopping_patience=2)], **adapter)()

    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "load_best_model_at_end": True}
    best = {"metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 9}
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, given=given, **EVERY_STEP, **saved, **best)
    assert_same(ours, theirs)
    mine, expected = ours.trainer.state, theirs.trainer.state
    assert (mine.global_step, mine.best_global_step) == (expected.global_step, expected.best_global_step) == (3, 1)
    assert Path(mine.best_model_checkpoint).name == Path(expected.best_model_checkpoint).name
    for trained in (ours, theirs):
        assert trained.trainer.evaluate()["eval_loss"] == near(expected.best_metric)
    kept = [sorted(path.name for path in (tmp_path / one).glob("checkpoint-*")) for one in ("posttrain", "trl")]
    assert kept[0] == kept[1] == ["checkpoint-1", "checkpoint-3"]


def test_state_and_result(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **EVERY_STEP}
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, given=held_out(), **saved)
    mine, expected = (
        json.loads((tmp_path / one / "checkpoint-2" / "trainer_state.json").read_text()) for one in ("posttrain", "trl")
    )
    assert expected.keys() <= mine.keys()
    for entry, other in zip(mine["log_history"], expected["log_history"], strict=True):
        assert other.keys() <= entry.keys()
    for name in ("epoch", "eval_steps", "global_step", "logging_steps", "max_steps", "num_train_epochs", "save_steps"):
        assert mine[name] == expected[name]
    assert isinstance(ours.result, type(theirs.result))
    assert theirs.result.metrics.keys() <= ours.result.metrics.keys()
    assert compared(ours.result.metrics) == near(compared(theirs.result.metrics))
    assert ours.result.epoch == theirs.trainer.state.epoch == 4.0
    for trained, folder in ((ours, tmp_path / "mine"), (theirs, tmp_path / "theirs")):
        folder.mkdir()
        trained.trainer.args.output_dir = str(folder)
        trained.trainer.save_state()
        assert (folder / "trainer_state.json").is_file()


OTHER_END = {"tokenizer": plain_tokenizer, "eos_token": "<|im_end|>"}


@pytest.mark.parametrize("settings", [{}, OTHER_END], ids=["as they come", "another end"])
def test_special_tokens(settings: dict[str, Any], tmp_path: Path) -> None:
    """The tokenizer's end of sequence is the model's and generation's too; otherwise the model would not stop."""
    rows = TEXTS if settings else CHAT_PAIRS
    models = [trained.trainer.model for trained in train_both(tmp_path, rows, **settings)]
    mine, expected = (model.generation_config.to_dict() for model in models)
    assert mine == expected
    assert 4 in np.atleast_1d(mine["eos_token_id"])
    mine, expected = (model.config.to_dict() for model in models)
    assert mine == {**expected, "use_cache": True}  # TRL turns the cache off for good


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 30).view(1, -1)).logits


SAVED = {
    **{f"{family}, full": (family, None) for family in FAMILIES},
    **{f"{family}, lora": (family, {}) for family in FAMILIES},
    "rslora": ("llama", {"use_rslora": True}),
    "dora": ("llama", {"use_dora": True}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "tied head": ("gemma3", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_models_load_without_us(name: str, tmp_path: Path) -> None:
    family, adapter = SAVED[name]
    given = dict if adapter is None else lambda: {"peft_config": lora(**adapter)}
    ours, theirs = train_both(tmp_path, CHAT_PAIRS, model=family, given=given)
    folder = tmp_path / "saved"
    ours.trainer.save_model(str(folder))
    if adapter is None:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
    else:
        loaded = PeftModel.from_pretrained(tiny_model(family, len(chatml_tokenizer())), str(folder))
    expected = logits_of(ours.trainer.model)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(expected, logits_of(theirs.trainer.model), rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template == chatml_tokenizer().chat_template
