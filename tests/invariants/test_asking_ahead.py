"""What the reference says ahead of training: kept, found again, never mistaken for another's, and not lost to a kill, a
full disk or short memory."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from posttrain import ConfigError
from posttrain.errors import Interrupted
from tests.invariants.test_references import ROWS, first, lora, model, trainer

OTHERS: list[dict[str, Any]] = [
    {"prompt": f"Name {i}. ", "chosen": f"Number {i} it is.", "rejected": "Why?"} for i in range(4)
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def two_adapters(active: str) -> Any:
    made = get_peft_model(model(), lora(), adapter_name="a")
    made.add_adapter("b", lora())
    draw = torch.Generator().manual_seed(5)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=draw)
    made.set_adapter(active)
    return made


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
        patch.setattr(reference_ahead, "SHARE_OF_TIME", math.inf)
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
    monkeypatch.setattr(reference_ahead, "SHARE_OF_TIME", math.inf)
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
