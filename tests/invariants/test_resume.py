"""A run that was killed, signalled or that crashed goes on as if nothing had happened: N steps = k steps, an end, and
N - k steps after resuming. Compared bit for bit are all weights, all optimiser tensors, the generators' states, the log
without timings, the scheduler, and what callbacks keep.

Six steps over two epochs, the last step of each epoch incomplete. LoRA has dropout 0.1.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from posttrain import ConfigError, Interrupted
from tests.invariants.short_runs import (
    Crash,
    End,
    Incident,
    RunServer,
    Spec,
    assert_same_end,
    end_state,
    make_trainer,
    read_end,
    rows,
)

KINDS = {
    "lora-fp32": Spec("", lora=True),
    "lora-bf16": Spec("", lora=True, arguments={"bf16": True}),
    "full-fp32": Spec(""),
    "full-bf16": Spec("", arguments={"bf16": True}),
}


def with_arguments(spec: Spec, folder: Path, **arguments: Any) -> Spec:
    return dataclasses.replace(spec, folder=str(folder), arguments=spec.arguments | arguments)


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(runs: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The end of a kind's undisturbed run with these arguments, computed once."""
    ends: dict[str, End] = {}

    def end(kind: str, **arguments: Any) -> End:
        key = f"{kind} {arguments}"
        if key not in ends:
            spec = with_arguments(KINDS[kind], tmp_path_factory.mktemp("undisturbed"), **arguments)
            ended = runs.run(spec)
            assert ended.status == 0, ended.stderr
            ends[key] = read_end(spec)
        return ends[key]

    return end


def killed_and_resumed(runs: RunServer, spec: Spec, incident: Incident) -> End:
    assert runs.run(dataclasses.replace(spec, incident=incident)).status == -signal.SIGKILL
    ended = runs.run(dataclasses.replace(spec, resume=True))
    assert ended.status == 0, ended.stderr
    return read_end(spec)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_killed_after_any_step(runs: RunServer, undisturbed: Any, tmp_path: Path, kind: str, step: int) -> None:
    spec = with_arguments(KINDS[kind], tmp_path)
    end = killed_and_resumed(runs, spec, Incident("on_step_begin", step, "SIGKILL"))
    assert end[1]["global_step"] == 6
    assert_same_end(end, undisturbed(kind))


SECOND = {"save_steps": 2, "neftune_noise_alpha": 5.0, "logging_steps": 3}


@pytest.mark.parametrize("step", [2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["lora-bf16", "full-fp32"])
def test_killed_with_new_weights_not_yet_saved(
    runs: RunServer, undisturbed: Any, tmp_path: Path, kind: str, step: int
) -> None:
    """With a checkpoint every second step only, NEFTune's noise, and log lines that span a checkpoint."""
    spec = with_arguments(KINDS[kind], tmp_path, **SECOND)
    end = killed_and_resumed(runs, spec, Incident("on_optimizer_step", step, "SIGKILL"))
    assert_same_end(end, undisturbed(kind, **SECOND))


def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume(quick: None, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        make_trainer(Spec(str(tmp_path), incident=Incident("on_step_end", 1, "raise"))).train()
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=True, but .* has no valid checkpoint"):
        make_trainer(Spec(str(tmp_path))).train(resume_from_checkpoint=True)


def test_killed_again_and_again(runs: RunServer, undisturbed: Any, tmp_path: Path) -> None:
    """Dying after every single step changes nothing either."""
    spec = with_arguments(KINDS["lora-fp32"], tmp_path)
    for step in range(1, 6):
        again = dataclasses.replace(spec, incident=Incident("on_step_begin", step, "SIGKILL"), resume=step > 1)
        assert runs.run(again).status == -signal.SIGKILL
    ended = runs.run(dataclasses.replace(spec, resume=True))
    assert ended.status == 0, ended.stderr
    assert_same_end(read_end(spec), undisturbed("lora-fp32"))


# --- crashed, at every callback of every step -----------------------------------------------------------------------

SETTINGS: dict[str, Spec] = {
    "lora": Spec("", lora=True, arguments={"neftune_noise_alpha": 5.0}),
    "full": Spec("", arguments={"neftune_noise_alpha": 5.0, "train_sampling_strategy": "group_by_length"}),
    "by epoch": Spec(
        "",
        patience=1,
        arguments={
            "eval_strategy": "epoch",
            "save_strategy": "epoch",
            "logging_strategy": "epoch",
            "load_best_model_at_end": True,
        },
    ),
    "evaluated by epoch, saved by step": Spec("", arguments={"eval_strategy": "epoch", "logging_steps": 4}),
    "ends within an epoch": Spec("", arguments={"max_steps": 5, "eval_strategy": "epoch", "logging_strategy": "epoch"}),
    "patient": Spec(
        "", patience=2, arguments={"learning_rate": 0.5, "eval_steps": 1, "load_best_model_at_end": True}
    ),
}  # fmt: skip


def in_process(spec: Spec) -> End:
    trainer = make_trainer(spec)
    trainer.train(resume_from_checkpoint=spec.resume)
    return end_state(trainer)


def crashed_and_resumed(spec: Spec, incident: Incident) -> End:
    with pytest.raises((Crash, Interrupted)):
        in_process(dataclasses.replace(spec, incident=incident))
    return in_process(dataclasses.replace(spec, resume=True))


class Diary(TrainerCallback):
    """Which events came in which step, once each, from the first checkpoint on."""

    def __init__(self) -> None:
        self.pages: list[tuple[str, int]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(_args: Any, state: Any, _control: Any, **_objects: Any) -> None:
            if (name, state.global_step) not in self.pages and (self.pages or name == "on_save"):
                self.pages.append((name, state.global_step))

        return note


@pytest.mark.parametrize("name", SETTINGS)
def test_crashed_at_an_event(quick: None, tmp_path: Path, name: str) -> None:
    """A dozen of all events of the run, spread evenly over it, others for each setting."""
    settings, diary = SETTINGS[name], Diary()
    trainer = make_trainer(with_arguments(settings, tmp_path / "undisturbed"), callbacks=(diary,))
    trainer.train()
    expected, events = end_state(trainer), diary.pages[: diary.pages.index(("on_train_end", trainer.state.global_step))]
    if settings.patience is not None:  # once stopped early, a resumed run goes on: see the next test
        events = [(event, step) for event, step in events if step < trainer.state.global_step]
    chosen = sorted({list(SETTINGS).index(name) + i * len(events) // 12 for i in range(12)})
    assert len(chosen) >= 8
    for event, step in (events[i % len(events)] for i in chosen):
        spec = with_arguments(settings, tmp_path / f"{event}-{step}")
        assert_same_end(crashed_and_resumed(spec, Incident(event, step, "raise")), expected)


def test_a_run_that_a_callback_has_ended_goes_on_when_resumed(quick: None, tmp_path: Path) -> None:
    """As in transformers: stopping at a time limit and resuming later is what many callbacks are for."""
    spec = with_arguments(SETTINGS["patient"], tmp_path)
    assert in_process(spec)[1]["global_step"] == 4
    assert in_process(dataclasses.replace(spec, resume=True, patience=9))[1]["global_step"] == 6


@pytest.mark.parametrize(
    ("event", "strategy"),
    [("on_save", "steps"), ("on_epoch_end", "steps"), ("on_epoch_begin", "steps"), ("on_step_begin", "steps"),
     ("on_save", "epoch"), ("on_epoch_begin", "epoch"), ("on_step_begin", "epoch")],
)  # fmt: skip
def test_an_epoch_that_a_callback_has_ended_stays_ended(quick: None, tmp_path: Path, event: str, strategy: str) -> None:
    """Two steps of each epoch, so that the third step of neither comes; crashed around the first one's end."""

    class Leave(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step % 2 == 0

    def train(folder: Path, incident: Incident | None = None, resume: bool = False) -> End:
        arguments = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": strategy}
        trainer = make_trainer(Spec(str(folder), arguments=arguments, incident=incident), callbacks=(Leave(),))
        trainer.train(resume_from_checkpoint=resume)
        return end_state(trainer)

    expected = train(tmp_path / "undisturbed")
    assert (expected[1]["global_step"], expected[1]["epoch"]) == (4, pytest.approx(1 + 4 / 5))
    with pytest.raises(Crash):
        train(tmp_path / "crashed", Incident(event, 2, "raise"))
    assert_same_end(train(tmp_path / "crashed", resume=True), expected)


OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
SCHEDULES: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {},
    "polynomial": {},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {},
    "reduce_lr_on_plateau": {"patience": 0, "factor": 0.5},
    "cosine_with_min_lr": {"min_lr": 1e-4},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-4},
    "warmup_stable_decay": {"num_decay_steps": 2},
    "greedy": {"patience": 0, "min_lr": 1e-4, "factor": 0.5},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes(quick: None, tmp_path: Path, optimizer: str) -> None:
    settings = Spec("", arguments={"optim": optimizer})
    expected = in_process(with_arguments(settings, tmp_path / "undisturbed"))
    spec = with_arguments(settings, tmp_path / "crashed")
    assert_same_end(crashed_and_resumed(spec, Incident("on_step_begin", 3, "raise")), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_resumes(quick: None, tmp_path: Path, schedule: str) -> None:
    """Those that follow a metric too, whose best is infinite until the first evaluation."""
    arguments = {"lr_scheduler_type": schedule, "lr_scheduler_kwargs": SCHEDULES[schedule], "logging_steps": 1,
                 "metric_for_best_model": "loss", "learning_rate": 0.3, "eval_steps": 2}  # fmt: skip
    settings = Spec("", arguments=arguments)
    expected = in_process(with_arguments(settings, tmp_path / "undisturbed"))
    rates = [entry["learning_rate"] for entry in expected[1]["log_history"] if "learning_rate" in entry]
    assert len(rates) == 6
    assert schedule == "constant" or len(set(rates)) > 1
    for step in (1, 4):
        spec = with_arguments(settings, tmp_path / f"crashed-{step}")
        assert_same_end(crashed_and_resumed(spec, Incident("on_step_begin", step, "raise")), expected)


def test_every_schedule_of_transformers_is_tested() -> None:
    from transformers.trainer_utils import SchedulerType

    assert {kind.value for kind in SchedulerType} == set(SCHEDULES)


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_stream_resumes(quick: None, tmp_path: Path, step: int) -> None:
    """Resuming reads past what the first steps used, over the stream's end too (ten rows, four a step)."""
    from datasets import Dataset

    def train(folder: Path, incident: Incident | None = None, resume: bool = False) -> End:
        trainer = make_trainer(Spec(str(folder), arguments={"max_steps": 6}, incident=incident), train=stream())
        trainer.train(resume_from_checkpoint=resume)
        return end_state(trainer)

    def stream() -> Any:
        return Dataset.from_list(rows()).to_iterable_dataset()

    expected = train(tmp_path / "undisturbed")
    with pytest.raises(Crash):
        train(tmp_path / "crashed", Incident("on_step_begin", step, "raise"))
    assert_same_end(train(tmp_path / "crashed", resume=True), expected)


def test_resuming_a_finished_run_changes_nothing(quick: None, tmp_path: Path) -> None:
    spec = Spec(str(tmp_path))
    first = in_process(spec)
    assert_same_end(in_process(dataclasses.replace(spec, resume=True)), first)


def test_a_checkpoint_named_by_its_path(quick: None, tmp_path: Path) -> None:
    """Going back to an earlier checkpoint gives the same end again."""
    spec = Spec(str(tmp_path), lora=True)
    expected = in_process(spec)
    assert_same_end(in_process(dataclasses.replace(spec, resume=str(tmp_path / "checkpoint-2"))), expected)


def test_going_on_elsewhere_is_said(quick: None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last bits of a step depend on the machine: nothing is said on the same one."""
    spec = Spec(str(tmp_path))
    in_process(spec)
    caplog.clear()
    in_process(dataclasses.replace(spec, resume=str(tmp_path / "checkpoint-2")))
    assert "bit for bit" not in caplog.text
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        in_process(dataclasses.replace(spec, resume=str(tmp_path / "checkpoint-2")))
    finally:
        torch.set_num_threads(threads)
    assert f"checkpoint-2 was written with threads {threads}; here: threads {threads + 1}. The run goes" in caplog.text


def test_one_trainer_trained_twice_starts_over(quick: None, tmp_path: Path) -> None:
    trainer = make_trainer(Spec(str(tmp_path)))
    trainer.train()
    first = trainer.state.log_history[0]["loss"]
    trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.log_history[0]["loss"] < first - 0.5  # the weights went on, the count began anew


# --- signalled ------------------------------------------------------------------------------------------------------

PLACES = {
    "between micro-batches": Incident("on_substep_end", 3, ""),
    "at a step's begin": Incident("on_step_begin", 2, ""),
    "after an optimiser step": Incident("on_optimizer_step", 3, ""),
    "at an epoch's end": Incident("on_epoch_end", 3, ""),
    "on saving": Incident("on_save", 2, ""),
    "in evaluation": Incident("during_evaluation", 4, ""),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_go_on(
    runs: RunServer, undisturbed: Any, tmp_path: Path, place: str, name: str
) -> None:
    arguments = {"save_steps": 2, "logging_steps": 6}
    kind = "lora-fp32" if name == "SIGTERM" else "full-bf16"
    spec = with_arguments(KINDS[kind], tmp_path, **arguments)
    ended = runs.run(dataclasses.replace(spec, incident=dataclasses.replace(PLACES[place], action=name)))
    step = PLACES[place].step + (PLACES[place].event == "on_optimizer_step")
    assert ended.status == 75
    assert f"{name}: finishing the micro-batch and saving (once more to leave at once)" in ended.stderr
    assert f"Interrupted at step {step} ({name}). Saved {tmp_path}/checkpoint-{step}." in ended.stderr
    assert "Continue: trainer.train(resume_from_checkpoint=True)" in ended.stderr
    resumed = runs.run(dataclasses.replace(spec, resume=True))
    assert resumed.status == 0, resumed.stderr
    assert_same_end(read_end(spec), undisturbed(kind, **arguments))


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end", "during_evaluation"])
def test_a_signal_at_any_step(quick: None, tmp_path: Path, event: str, step: int) -> None:
    """Without a checkpoint before it, and with log lines that span the interruption."""
    settings = Spec("", lora=True, arguments={"save_strategy": "no", "logging_steps": 6, "eval_steps": 1,
                                              "neftune_noise_alpha": 5.0})  # fmt: skip
    expected = in_process(with_arguments(settings, tmp_path / "undisturbed"))
    spec = with_arguments(settings, tmp_path / "signalled")
    assert_same_end(crashed_and_resumed(spec, Incident(event, step, "SIGTERM")), expected)


def test_a_signal_from_outside(runs: RunServer, undisturbed: Any, tmp_path: Path) -> None:
    spec = with_arguments(KINDS["full-fp32"], tmp_path, save_steps=100)
    pid = runs.start(dataclasses.replace(spec, incident=Incident("on_step_begin", 4, "wait")))
    deadline = time.monotonic() + 60
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(pid, signal.SIGTERM)
    (tmp_path / "go").touch()
    ended = runs.wait()
    assert ended.status == 75
    assert f"Interrupted at step 4 (SIGTERM). Saved {tmp_path}/checkpoint-4." in ended.stderr
    assert runs.run(dataclasses.replace(spec, resume=True)).status == 0
    assert_same_end(read_end(spec), undisturbed("full-fp32", save_steps=100))


def test_a_signal_before_the_first_step_has_nothing_to_save(runs: RunServer, tmp_path: Path) -> None:
    ended = runs.run(Spec(str(tmp_path), incident=Incident("on_train_begin", 0, "SIGTERM")))
    assert ended.status == 75
    assert "Interrupted by SIGTERM before the first step; nothing to save." in ended.stderr
    assert "Continue" not in ended.stderr
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_second_signal_leaves_at_once(runs: RunServer, undisturbed: Any, tmp_path: Path, name: str) -> None:
    spec = with_arguments(KINDS["full-fp32"], tmp_path)
    ended = runs.run(dataclasses.replace(spec, incident=Incident("on_step_begin", 3, name, twice=True)))
    assert ended.status == -signal.SIGINT  # how Python ends after a KeyboardInterrupt that nobody caught
    assert f"KeyboardInterrupt: second {name}" in ended.stderr
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 3)]
    resumed = runs.run(dataclasses.replace(spec, resume=True))
    assert resumed.status == 0, resumed.stderr
    assert_same_end(read_end(spec), undisturbed("full-fp32"))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_signal_in_an_evaluation_that_finds_the_best_model(quick: None, tmp_path: Path, step: int) -> None:
    """The resumed run evaluates and then saves, as was due, so that the best model has its checkpoint."""
    arguments = {"save_steps": 2, "load_best_model_at_end": True, "learning_rate": 0.3, "save_total_limit": 1}
    settings = Spec("", arguments=arguments)
    expected = in_process(with_arguments(settings, tmp_path / "undisturbed"))
    assert expected[1]["best"][2] == "checkpoint-2"
    spec = with_arguments(settings, tmp_path / "signalled")
    assert_same_end(crashed_and_resumed(spec, Incident("during_evaluation", step, "SIGTERM")), expected)


def test_a_signal_in_the_second_evaluation_set_logs_neither_twice(quick: None, tmp_path: Path) -> None:
    sets = {"one": rows(4, first=20), "two": rows(4, first=24)}

    def train(folder: Path, incident: Incident | None = None, resume: bool = False) -> End:
        trainer = make_trainer(Spec(str(folder), incident=incident), evaluation=sets)
        trainer.train(resume_from_checkpoint=resume)
        return end_state(trainer)

    expected = train(tmp_path / "undisturbed")
    with pytest.raises(Interrupted):
        train(tmp_path / "signalled", Incident("during_evaluation", 4, "SIGTERM", skip=2))
    assert_same_end(train(tmp_path / "signalled", resume=True), expected)
