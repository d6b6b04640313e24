"""Which model is the reference: never the policy, never what another run asked, and the same after resuming."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from posttrain import CheckpointError, ConfigError, DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from posttrain.errors import Interrupted
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import chatml_tokenizer

ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i} plus two? ", "chosen": f"It is {i + 2}.", "rejected": f"No idea, {i}."} for i in range(8)
]
OTHERS: list[dict[str, Any]] = [
    {"prompt": f"Name {i}. ", "chosen": f"Number {i} it is.", "rejected": "Why?"} for i in range(4)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def model(seed: int = 0) -> Any:
    return tiny_model("llama", len(chatml_tokenizer()), seed=seed)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(folder: Path, made: Any = None, ref: Any = None, *, peft: Any = None, rows: Any = ROWS,
            eval_rows: Any = None, **options: Any) -> DPOTrainer:  # fmt: skip
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 2, "learning_rate": 1e-3, "bf16": False, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, **options,
    }  # fmt: skip
    return DPOTrainer(made or model(), ref, DPOConfig(str(folder), **settings), train_dataset=rows,
                      eval_dataset=eval_rows, processing_class=chatml_tokenizer(), peft_config=peft)  # fmt: skip


def first(one: DPOTrainer, name: str) -> float:
    return next(float(entry[name]) for entry in one.state.log_history if name in entry)


def two_adapters(active: str) -> Any:
    made = get_peft_model(model(), lora(), adapter_name="a")
    made.add_adapter("b", lora())
    draw = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=draw)
    made.set_adapter(active)
    return made


# --- what was asked ahead -----------------------------------------------------------------------------------------


def test_another_active_adapter_is_another_reference(tmp_path: Path) -> None:
    for active in "ab":
        one = trainer(tmp_path, two_adapters(active), precompute_ref_log_probs=True)
        one.train()
        assert first(one, "rewards/margins") == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_that_is_not_asked_is_no_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a fresh adapter the reference is the base: other random numbers in the adapter ask nothing anew."""
    from posttrain import reference_ahead

    asked: list[int] = []
    original = reference_ahead._computed
    monkeypatch.setattr(reference_ahead, "_computed", lambda chunks, *rest: asked.append(1) or original(chunks, *rest))
    for seed in (1, 2):
        trainer(tmp_path, peft=lora(), precompute_ref_log_probs=True, seed=seed).train()
    assert asked == [1]


@pytest.mark.parametrize("kind", ["adapter off", "another model", "another adapter", "asked each time"])
def test_sets_that_come_later_are_asked_too(kind: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "adapter off": {"peft": lora()},
        "another model": {"ref": model()},
        "another adapter": {"made": two_adapters("a"), "ref_adapter_name": "b"},
        "asked each time": {"precompute_ref_log_probs": False},
    }[kind]
    one = trainer(tmp_path, eval_rows=OTHERS, **{"precompute_ref_log_probs": True, **given})
    one.train()
    known, later = one.evaluate(), one.evaluate(OTHERS)
    assert later["eval_loss"] == pytest.approx(known["eval_loss"], rel=1e-5)
    assert later["eval_rewards/margins"] == pytest.approx(known["eval_rewards/margins"], rel=1e-4, abs=1e-6)
    assert known["eval_rewards/margins"] != 0


def test_where_the_starting_weights_are_gone_that_is_said(tmp_path: Path) -> None:
    one = trainer(tmp_path, precompute_ref_log_probs=True)
    one.train()
    with pytest.raises(ConfigError, match="the reference, the weights that training started from, is gone"):
        one.evaluate(OTHERS)


def test_a_signal_while_the_reference_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain import reference_ahead

    original = reference_ahead.plan

    def signalled(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*given)

    monkeypatch.setattr(reference_ahead, "plan", signalled)
    with pytest.raises(Interrupted, match="before the first step"):
        trainer(tmp_path, precompute_ref_log_probs=True).train()


@pytest.mark.parametrize("ends_by", ["a signal", "being killed"])
def test_what_was_asked_is_not_asked_again(ends_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two rows; the run ends in the third. What there was of it is kept when it ends, or every minute."""
    from posttrain import reference_ahead

    monkeypatch.setattr(reference_ahead, "CHUNK", 2)
    trainer(tmp_path / "a", precompute_ref_log_probs=True).train()
    folder = tmp_path / "cache" / "reference"
    (whole,) = folder.iterdir()
    kept = whole.rename(tmp_path / whole.name).read_bytes()
    original, laid_out = reference_ahead.plan, []

    def counted(chunk: Any, *rest: Any) -> Any:
        laid_out.append(chunk)
        if len(laid_out) == 3 and ends_by == "a signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif len(laid_out) == 3:
            monkeypatch.setattr(reference_ahead, "_write", lambda *_: None)  # nothing is written any more
            raise KeyboardInterrupt
        return original(chunk, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reference_ahead, "plan", counted)
        patch.setattr(reference_ahead, "KEEP_EVERY", 0.0 if ends_by == "being killed" else 3600.0)
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            trainer(tmp_path / "b", precompute_ref_log_probs=True).train()
    monkeypatch.undo()
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(reference_ahead, "CHUNK", 2)
    (beginning,) = folder.iterdir()
    assert beginning.name.endswith(".beginning.safetensors")
    laid_out.clear()
    monkeypatch.setattr(reference_ahead, "plan", lambda chunk, *rest: laid_out.append(chunk) or original(chunk, *rest))
    trainer(tmp_path / "c", precompute_ref_log_probs=True).train()
    assert len(laid_out) == (len(ROWS) + 1) // 2 - 2
    assert [path.name for path in folder.iterdir()] == [whole.name]
    assert whole.read_bytes() == kept


def on_a_full_disk(write: Any) -> Any:
    """`write`, while no file of this process may be larger than 100 bytes."""

    def limited(*given: Any) -> Any:
        before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            return write(*given)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            signal.signal(signal.SIGXFSZ, handler)

    return limited


def test_a_disk_that_is_full_costs_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from posttrain import reference_ahead

    whole = trainer(tmp_path / "a", precompute_ref_log_probs=True)
    whole.train()
    (kept,) = (tmp_path / "cache" / "reference").iterdir()
    kept.unlink()
    monkeypatch.setattr(reference_ahead, "write_arrays", on_a_full_disk(reference_ahead.write_arrays))
    again = trainer(tmp_path / "b", precompute_ref_log_probs=True)
    again.train()
    assert "reference log-probabilities are not kept" in caplog.text
    assert list((tmp_path / "cache" / "reference").iterdir()) == []
    assert first(again, "loss") == first(whole, "loss")


def test_a_disk_that_has_no_room_for_the_whole_keeps_the_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from posttrain import reference_ahead

    monkeypatch.setattr(reference_ahead, "CHUNK", 2)
    monkeypatch.setattr(reference_ahead, "KEEP_EVERY", 0.0)
    write = reference_ahead.write_arrays

    def full(path: Path, *rest: Any) -> None:
        if ".beginning." not in path.name:
            raise OSError(28, "No space left on device")
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(reference_ahead, "write_arrays", full)
        trainer(tmp_path / "a", precompute_ref_log_probs=True).train()
    assert "are not kept" in caplog.text
    (beginning,) = (tmp_path / "cache" / "reference").iterdir()
    monkeypatch.setattr(reference_ahead, "_of_chunk", lambda *_: pytest.fail("it was asked again"))
    trainer(tmp_path / "b", precompute_ref_log_probs=True).train()
    assert not beginning.exists()


@pytest.mark.parametrize("damage", ["a bit", "the end"])
def test_numbers_that_are_not_those_that_were_written(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path / "a", precompute_ref_log_probs=True)
    whole.train()
    (kept,) = (tmp_path / "cache" / "reference").iterdir()
    content = bytearray(kept.read_bytes())
    content[-3] ^= 1
    kept.write_bytes(content if damage == "a bit" else content[:-3])
    again = trainer(tmp_path / "b", precompute_ref_log_probs=True)
    again.train()
    assert "is damaged" in caplog.text
    assert first(again, "loss") == first(whole, "loss")


def test_memory_that_does_not_suffice_for_asking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from posttrain import reference_ahead

    whole = trainer(tmp_path / "a", precompute_ref_log_probs=True, dataset_cache=False)
    whole.train()
    original, asked = reference_ahead._of_chunk, []

    def short(batches: Any, *rest: Any) -> Any:
        asked.append(max(batch.num_tokens for batch in batches))
        if asked[-1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(batches, *rest)

    monkeypatch.setattr(reference_ahead, "_of_chunk", short)
    again = trainer(tmp_path / "b", precompute_ref_log_probs=True, dataset_cache=False)
    again.train()
    assert "asking the reference: wanted 2.0 GiB" in caplog.text
    assert asked[0] > 100 >= asked[-1]
    assert first(again, "loss") == pytest.approx(first(whole, "loss"), rel=1e-5)


def test_settings_of_an_adapter_are_the_same_in_every_process() -> None:
    code = (
        "import json; from peft import LoraConfig; from posttrain.reference import _settings; "
        "print(json.dumps(_settings(LoraConfig(target_modules=['q_proj', 'k_proj', 'v_proj', 'o_proj', 'up_proj']))))"
    )
    said = {
        subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, check=True,
                       capture_output=True, text=True).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(said) == 1


def test_asked_ahead_where_that_saves_something(tmp_path: Path) -> None:
    def is_ahead(**options: Any) -> bool:
        reference = trainer(tmp_path, rows=ROWS * 8, **options).run.reference
        assert reference is not None
        return reference.precompute

    assert is_ahead(peft=lora(), max_steps=40)  # of 16 an epoch
    assert not is_ahead(peft=lora(), max_steps=3)
    assert is_ahead(peft=lora(), max_steps=-1, num_train_epochs=2)
    assert not is_ahead(peft=lora(), max_steps=-1, num_train_epochs=1)
    assert is_ahead(max_steps=16)  # instead of a copy of all weights
    assert not is_ahead(max_steps=3)


def test_killed_while_the_cache_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the last of its bytes: nothing is taken from it, and nothing of it is wrong."""
    from posttrain.data import arrays

    undisturbed = trainer(tmp_path / "a", precompute_ref_log_probs=True, dataset_cache=False)
    undisturbed.train()

    def killed(source: Any, target: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arrays.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / "b", precompute_ref_log_probs=True).train()
    (tmp_path / "cache" / "reference").mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache" / "reference" / "0123456789abcdef.partial").write_bytes(b"half")  # what SIGKILL leaves
    again = trainer(tmp_path / "c", precompute_ref_log_probs=True)
    again.train()
    assert [first(again, name) for name in ("loss", "grad_norm")] == [
        first(undisturbed, name) for name in ("loss", "grad_norm")
    ]


# --- references that could not serve ------------------------------------------------------------------------------


def test_the_adapter_that_is_trained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it would follow the policy"):
        trainer(tmp_path, get_peft_model(model(), lora()), ref_adapter_name="default")


def test_the_layers_that_are_trained(tmp_path: Path) -> None:
    base = model()
    made = get_peft_model(base, lora())
    with pytest.raises(ConfigError, match="has layers of the model that is trained"):
        trainer(tmp_path, made, base)
    assert any(parameter.requires_grad for parameter in made.parameters())


@pytest.mark.parametrize("adapted", [False, True])
def test_an_adapter_that_is_not_there(adapted: bool, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ref_adapter_name='ref' is no adapter of the model"):
        trainer(tmp_path, get_peft_model(model(), lora()) if adapted else None, ref_adapter_name="ref")


@pytest.mark.parametrize(
    "options",
    [{"precompute_ref_log_probs": True}, {"sync_ref_model": True}, {"ref_adapter_name": "a"}, {"ref": model(1)}],
)
def test_losses_that_ask_no_reference(options: dict[str, Any], tmp_path: Path) -> None:
    name = "ref_model" if "ref" in options else next(iter(options))
    with pytest.raises(ConfigError, match=f"{name} is not honoured with loss_type"):
        trainer(tmp_path, loss_type="simpo", beta=2.0, **options)


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"beta": 0.3}, "settings of the loss"),
        ({"label_smoothing": 0.2, "loss_type": "robust"}, "loss_type"),
        ({"ld_alpha": 0.5}, "settings of the loss"),
        ({"use_weighting": True}, "settings of the loss"),
        ({"made": model(1)}, "reference"),
        ({"ref": model(1)}, "reference"),
        ({"sync_ref_model": True, "precompute_ref_log_probs": False}, "reference"),
    ],
)
def test_another_loss_or_reference_is_another_run(changed: dict[str, Any], named: str, tmp_path: Path) -> None:
    options = {"precompute_ref_log_probs": True, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **options).train()
    with pytest.raises(CheckpointError, match=named):
        trainer(tmp_path, **{**options, **changed}).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("ahead", [False, True])
def test_the_checkpoint_itself_is_no_reference(ahead: bool, tmp_path: Path) -> None:
    """`model=checkpoint` and `resume_from_checkpoint=checkpoint` together would have the reference begin half-way."""
    from transformers import AutoModelForCausalLM

    options = {"precompute_ref_log_probs": ahead, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, **options).train()
    half_way = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1", dtype=torch.float32)
    with pytest.raises(CheckpointError, match="reference"):
        trainer(tmp_path, half_way, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("adapted", [False, True])
def test_another_model_given_as_reference_is_another_run(adapted: bool, tmp_path: Path) -> None:
    options = {"peft": lora() if adapted else None, "precompute_ref_log_probs": False, "save_strategy": "steps",
               "save_steps": 1}  # fmt: skip
    undisturbed = trainer(tmp_path, None, model(5), **options)
    undisturbed.train()
    resumed = trainer(tmp_path, None, model(5), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert first(resumed, "loss") == first(undisturbed, "loss")
    with pytest.raises(CheckpointError, match="reference"):
        trainer(tmp_path, None, model(6), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_the_same_run_however_it_is_written(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path, loss_type=("sigmoid", "sft"), loss_weights=(1, 0.5), **options).train()
    resumed = trainer(tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.state.global_step == 2


# --- KTO ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "warned"), [(4, False), (5, True), (6, False)])
def test_an_answer_alone_in_its_batch(
    count: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{i}?", "completion": f"{i}.", "label": i % 2 == 0} for i in range(count)]
    args = KTOConfig(str(tmp_path), per_device_train_batch_size=4, bf16=False, report_to="none")
    KTOTrainer(model(), args=args, train_dataset=rows, processing_class=chatml_tokenizer())
    assert warned == ("is alone in its batch" in caplog.text)


def test_token_ids_are_for_supervised_training(tmp_path: Path) -> None:
    from posttrain import DataError

    rows = [{"input_ids": [1, 2, 3], **row} for row in ROWS]
    with pytest.raises(DataError, match="holds token ids, which supervised training alone reads"):
        trainer(tmp_path, rows=rows)
