"""Memory that runs out, in every phase of a step: the step is redone in smaller pieces from its very beginning, and the
run ends bit for bit as one that had the smaller pieces from the start, dropout included. Where a single sequence does
not fit, its activations are made again; where nothing is left, exit code 8.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from posttrain.errors import OutOfMemoryError
from posttrain.models import head, precision
from tests.invariants.short_runs import ROOT, Spec, assert_same_end, end_state, make_trainer, rows

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "2254857830 bytes. Error code 12 (Cannot allocate memory)"
)
Fault = Callable[[Any, pytest.MonkeyPatch, "Fuse"], None]


class Fuse:
    """Fails at call number `at` (from 1), `times` times."""

    def __init__(self, at: int, times: int = 1, error: type[Exception] = RuntimeError):
        self.at, self.times, self.error, self.calls = at, times, error, 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1
        if self.at <= self.calls < self.at + self.times:
            raise self.error(CPU_MESSAGE)


def wrap(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, before: Callable[..., None]) -> None:
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def in_training(trainer: Any, fuse: Fuse) -> Callable[[], None]:
    """Opening the model runs forwards too."""
    return lambda: fuse() if torch.is_grad_enabled() and trainer.model.training else None


def forward_fails(trainer: Any, monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    layers = [module for name, module in trainer.model.named_modules() if name.endswith("layers.1")]
    armed = in_training(trainer, fuse)
    layers[0].register_forward_hook(lambda *_: armed())


def head_fails(trainer: Any, monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    original = head._TokenLogps.forward

    def forward(ctx: Any, *args: Any) -> Any:
        if ctx.needs_input_grad[0]:
            fuse()
        return original(ctx, *args)

    monkeypatch.setattr(head._TokenLogps, "forward", staticmethod(forward))


def backward_fails(trainer: Any, monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    layers = [module for name, module in trainer.model.named_modules() if name.endswith("layers.0")]

    def listen(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(fuse)

    layers[0].register_forward_hook(listen)


def gradients_fail(trainer: Any, monkeypatch: pytest.MonkeyPatch, fuse: Fuse) -> None:
    wrap(monkeypatch, precision.MixedPrecision, "settle", fuse)


PHASES: dict[str, Fault] = {
    "forward": forward_fails,
    "head": head_fails,
    "backward": backward_fails,
    "gradients": gradients_fail,
}


def short(folder: Path, lora: bool = False, **arguments: Any) -> Any:
    defaults = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "token_budget": 40}
    return make_trainer(Spec(str(folder), lora=lora, arguments=defaults | arguments))


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("phase", PHASES)
def test_a_step_that_does_not_fit_is_redone_as_if_it_had_been_cut_so(
    phase: str, lora: bool, bf16: bool, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    with monkeypatch.context() as patches:
        trainer = short(tmp_path / "short", lora, bf16=bf16)
        PHASES[phase](trainer, patches, Fuse(at=1))
        trainer.train()
    budget = trainer.run.source.token_budget
    assert budget < 40
    warned = [message for message in caplog.messages if message.startswith("E-OOM-0003")]
    assert len(warned) == 1
    assert warned[0].startswith(f"E-OOM-0003 step 1, {phase}: wanted 2.1 GiB, ")
    assert f" → {budget} tokens (same batch, same loss). Run continues." in warned[0]
    assert trainer.state.log_history[-1]["oom_backoffs"] == 1
    undisturbed = short(tmp_path / "long", lora, bf16=bf16, token_budget=budget)
    undisturbed.train()
    trainer.state.log_history[-1].pop("oom_backoffs")
    assert_same_end(end_state(trainer), end_state(undisturbed))


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, torch.OutOfMemoryError])
def test_later_and_again(error: type[Exception], quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of the run, twice in a row and once more: the loss is that of an undisturbed run."""
    losses = []
    for at in ((), (2, 3, 6)):
        trainer = short(tmp_path / str(len(at)))
        fuses = [Fuse(step, error=error) for step in at]
        for fuse in fuses:
            forward_fails(trainer, monkeypatch, fuse)
        trainer.train()
        assert all(fuse.calls >= fuse.at for fuse in fuses)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        assert trainer.state.log_history[-1].get("oom_backoffs", 0) == len(at)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_nothing_of_the_batch_that_failed_stays(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, fuse, alive = short(tmp_path), Fuse(at=1), []
    layer = next(module for name, module in trainer.model.named_modules() if name.endswith("layers.0"))

    def note(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad and fuse.calls == 0:
            alive.append(weakref.ref(output))

    layer.register_forward_hook(note)
    backward_fails(trainer, monkeypatch, fuse)
    from posttrain.backoff import BackOff

    left: list[int] = []

    def look() -> None:
        gc.collect()
        left.append(sum(reference() is not None for reference in alive))

    wrap(monkeypatch, BackOff, "make_room", look)
    trainer.train()
    assert len(alive) > 0
    assert left == [0]


def test_the_budget_is_part_of_a_checkpoint(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was resumed after a failure goes on in the same pieces, and so bit for bit."""
    settings = {"save_strategy": "steps", "save_steps": 2}
    whole = short(tmp_path / "whole", **settings)
    forward_fails(whole, monkeypatch, Fuse(at=1))
    whole.train()
    again = short(tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again.run.source.token_budget == whole.run.source.token_budget < 40
    assert_same_end(end_state(again), end_state(whole))
    saved = json.loads((tmp_path / "whole" / "checkpoint-2" / "state.json").read_text())["loop"]
    assert (saved["token_budget"], saved["oom_backoffs"]) == (whole.run.source.token_budget, 1)
    other = short(tmp_path / "whole", token_budget=100, **settings)
    other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert other.run.source.token_budget == 100  # asked for since


def test_a_stream_is_not_read_on_when_a_step_is_redone(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = []
    for fails in (True, False):
        arguments = {
            "max_steps": 4,
            "save_strategy": "no",
            "eval_strategy": "no",
            "token_budget": 40 if fails else ends[0][2],
        }
        stream = make_trainer(Spec(str(tmp_path), arguments=arguments), train=Stream())
        if fails:
            forward_fails(stream, monkeypatch, Fuse(at=1))
        stream.train()
        stream.state.log_history[-1].pop("oom_backoffs", None)
        ends.append((*end_state(stream), stream.run.source.token_budget))
    assert_same_end(ends[0][:2], ends[1][:2])


class Stream:
    """Rows without a length."""

    def __iter__(self) -> Any:
        return iter(rows())


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "auto"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_that_saves_memory_has_the_same_numbers(
    recompute: str, lora: bool, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Bit for bit: recomputation, freed pages that go back, copies that are let go; dropout and bf16 included."""
    arguments = {"bf16": True, "eval_strategy": "steps", "eval_steps": 2}
    tight = short(tmp_path / "tight", lora, max_memory="1000", recompute=recompute, **arguments)
    tight.train()
    plenty = short(tmp_path / "plenty", lora, **arguments | {"token_budget": tight.run.source.token_budget})
    plenty.train()
    assert "it may not fit" in caplog.text
    assert_same_end(end_state(tight), end_state(plenty))


# --- a single sequence, the optimiser, evaluation -------------------------------------------------------------------


def test_a_single_sequence_that_does_not_fit_is_recomputed(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Which changes no bit of the result."""
    trainer = short(tmp_path / "a", token_budget=1)
    forward_fails(trainer, monkeypatch, Fuse(at=1, times=2))
    trainer.train()
    assert [message.split("with ")[1] for message in caplog.messages if "E-OOM" in message] == [
        "activations recomputed: selective (same loss). Run continues.",
        "activations recomputed: full (same loss). Run continues.",
    ]
    trainer.state.log_history[-1].pop("oom_backoffs")
    undisturbed = short(tmp_path / "b", token_budget=1)
    undisturbed.train()
    assert_same_end(end_state(trainer), end_state(undisturbed))


def test_where_nothing_is_left_to_try_the_run_says_what_to_set(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = short(tmp_path)
    forward_fails(trainer, monkeypatch, Fuse(at=1, times=100))
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(
        OutOfMemoryError, match=r"step 1, forward: wanted 2\.1 GiB, .* free: a single sequence"
    ) as caught:
        trainer.train()
    assert caught.value.exit_code == 8
    assert "max_length" in str(caught.value.hint)
    assert "peft_config" in str(caught.value.hint)
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "rmsprop"])
def test_an_optimiser_that_failed_before_it_changed_anything_tries_again(
    optim: str, quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    ends = []
    for fuse in (Fuse(at=2), Fuse(at=0)):
        trainer = short(tmp_path / str(fuse.at), optim=optim)
        trainer.add_callback(type("Arm", (Arm,), {"fuse": fuse}))
        trainer.train()
        trainer.state.log_history[-1].pop("oom_backoffs", None)
        ends.append(end_state(trainer))
    assert_same_end(*ends)
    assert [message for message in caplog.messages if "step 2, optimiser step: wanted 2.1 GiB" in message]


class Arm(TrainerCallback):
    """Lets the optimiser fail: before it does anything, or once half of the parameters are updated."""

    fuse: Fuse
    halfway = False

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        step = optimizer.step

        def failing(*args: Any, **kwargs: Any) -> Any:
            if self.halfway:
                groups = optimizer.param_groups[1:]
                kept = [parameter.grad for group in groups for parameter in group["params"]]
                for group in groups:
                    for parameter in group["params"]:
                        parameter.grad = None
                step(*args, **kwargs)
                for parameter, grad in zip([p for g in groups for p in g["params"]], kept, strict=True):
                    parameter.grad = grad
            self.fuse()
            return step(*args, **kwargs)

        optimizer.step = failing


def test_an_update_that_is_torn_is_never_saved(quick: None, tmp_path: Path) -> None:
    trainer = short(tmp_path, save_strategy="steps", save_steps=1)
    trainer.add_callback(type("Arm", (Arm,), {"fuse": Fuse(at=3), "halfway": True}))
    with pytest.raises(
        OutOfMemoryError, match=r"step 3, optimiser step: .* could not be finished.*checkpoint-2"
    ) as caught:
        trainer.train()
    assert (caught.value.code, caught.value.exit_code) == ("E-OOM-0002", 8)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


def test_evaluation_is_cut_too(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    trainer = short(tmp_path)
    expected = trainer.evaluate()["eval_loss"]
    original, fuse = trainer.run.objective, Fuse(at=1)

    class Objective:
        needs, needs_reference, is_sum = original.needs, original.needs_reference, original.is_sum

        def __call__(self, outputs: Any, batch: Any) -> Any:
            fuse()
            return original(outputs, batch)

    trainer.run.objective = Objective()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    assert any(message.startswith("E-OOM-0003 evaluation: wanted 2.1 GiB") for message in caplog.messages)
    fuse.times = 1000
    fuse.calls = 0
    with pytest.raises(OutOfMemoryError, match=r"evaluation: wanted .* a single sequence"):
        trainer.evaluate()


# --- for real -------------------------------------------------------------------------------------------------------

REAL = """
import logging, resource, sys
import psutil, torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback
from posttrain import SFTConfig, SFTTrainer
from tests.tiny_tokenizers import plain_tokenizer

folder, budget, room = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
logging.basicConfig(level=logging.WARNING, format="%(message)s")

class Limit(TrainerCallback):
    def on_train_begin(self, *_, **__):
        if room:
            limit = psutil.Process().memory_info().vms + room * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=270, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
                                     num_attention_heads=8, num_key_value_heads=4))
data = [{"input_ids": [5 + (i * j) % 250 for j in range(256)]} for i in range(1, 33)]
args = SFTConfig(folder, per_device_train_batch_size=8, max_steps=2, bf16=False, token_budget=budget, logging_steps=1,
                 save_strategy="no", report_to="none", disable_tqdm=True, learning_rate=1e-3)
trainer = SFTTrainer(model, args, train_dataset=data, processing_class=plain_tokenizer(), callbacks=[Limit])
trainer.train()
print(trainer.run.source.token_budget)
save_file({name: value.detach().clone() for name, value in model.state_dict().items()}, folder + "/end.safetensors")
"""


def real(folder: Path, budget: int, room: int) -> subprocess.CompletedProcess[str]:
    folder.mkdir()
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", REAL, str(folder), str(budget), str(room)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
def test_under_a_limit_of_the_kernels(tmp_path: Path) -> None:
    """A step of 2,048 tokens keeps about 220 MiB, and 120 are to be had."""
    limited = real(tmp_path / "limited", 4096, 120)
    assert limited.returncode == 0, limited.stderr[-3000:]
    assert "E-OOM-0003 step 1, " in limited.stderr
    budget = int(limited.stdout.split()[-1])
    assert budget < 2048
    free = real(tmp_path / "free", budget, 0)
    assert free.returncode == 0, free.stderr[-3000:]
    assert "E-OOM" not in free.stderr
    one, other = (load_file(tmp_path / name / "end.safetensors") for name in ("limited", "free"))
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []
