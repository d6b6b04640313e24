"""Short training runs in processes of their own, to be killed, signalled and resumed.

`RunServer` starts this file once as a process that imports everything, warms up and then forks one child a run, so that
a test pays for the imports only once. A child computes on one thread, ends the way any script ends (an exception that
nobody catches, `SystemExit`, a signal), and leaves its end state in `end.safetensors` and `end.json` for comparison.

A run is a `Spec`: what to train, and what is to befall it, an `Incident` at a callback or a `Trap` in a function of the
standard library. They really happen: a SIGKILL is a SIGKILL.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, TextIO

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback

from posttrain import SFTConfig, SFTTrainer, optimizer_state, snapshot
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import plain_tokenizer

ROOT = Path(__file__).resolve().parents[2]
NUM_ROWS = 10  # 2 x 2 a step: three steps an epoch, of which the last is incomplete
TIMINGS = re.compile(r"runtime|_per_second|peak_memory|hardware_share")


@dataclasses.dataclass(frozen=True)
class Incident:
    """At `event` of step `step`, counted as callbacks see it, `action` happens: a signal's name (sent to the process
    itself), `raise`, or `wait` (for a file `go`; the file `waiting` says so). `event` is a callback's name or
    `during_evaluation`; `skip` lets it pass so many times before."""

    event: str
    step: int
    action: str
    twice: bool = False
    skip: int = 0


@dataclasses.dataclass(frozen=True)
class Trap:
    """The process kills itself at call number `call` (from 1) of `function`, such as `os.replace`, before it happens.
    With `within`, only calls with this text among their arguments count."""

    function: str
    call: int
    within: str = ""


@dataclasses.dataclass(frozen=True)
class Spec:
    """One run in `folder`. `arguments` are `SFTConfig`'s, over the defaults below."""

    folder: str
    lora: bool = False
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    resume: str | bool = False
    incident: Incident | None = None
    trap: Trap | None = None
    patience: int | None = None
    family: str = "llama"
    end: str = "end"


End = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Tensors and plain values that a run has left."""


class Crash(RuntimeError):
    """What `raise` raises."""


def rows(count: int = NUM_ROWS, first: int = 0) -> list[dict[str, list[int]]]:
    """Tokenized rows of five lengths, the first two tokens not supervised."""
    built = []
    for i in range(first, first + count):
        ids = [5 + (37 * i + 11 * j * j + 3 * j) % 250 for j in range(6 + 3 * (i % 5))]
        built.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return built


def make_trainer(
    spec: Spec, callbacks: tuple[Any, ...] = (), train: Any = None, evaluation: Any = None, adapter: Any = None
) -> Any:
    """The trainer of a run: always the same model, data and settings for the same spec."""
    defaults: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "learning_rate": 2e-2,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "logging_steps": 2,
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "token_budget": 30,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    ordinary = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
    early = [EarlyStoppingCallback(spec.patience)] if spec.patience is not None else []
    trainer = SFTTrainer(
        tiny_model(spec.family, 270),
        SFTConfig(spec.folder, **{**defaults, **spec.arguments}),
        train_dataset=rows() if train is None else train,
        eval_dataset=rows(4, first=NUM_ROWS) if evaluation is None else evaluation,
        processing_class=plain_tokenizer(),
        peft_config=(adapter or ordinary) if spec.lora else None,
        callbacks=[*early, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    if spec.incident is not None:
        _prepare(spec, spec.incident, trainer)
    return trainer


def _prepare(spec: Spec, incident: Incident, trainer: Any) -> None:
    """Let `incident` happen in `trainer`."""
    passed = 0

    def happen(_callback: Any, _args: Any, state: Any, _control: Any, **_objects: Any) -> None:
        nonlocal passed
        if state.global_step != incident.step:
            return
        passed += 1
        if passed != incident.skip + 1:
            return
        if incident.action == "raise":
            raise Crash(f"{incident.event} of step {incident.step}")
        if incident.action == "wait":
            _wait(Path(spec.folder))
            return
        for _ in range(1 + incident.twice):
            os.kill(os.getpid(), getattr(signal, incident.action))

    if incident.event != "during_evaluation":
        trainer.add_callback(type("Happening", (TrainerCallback,), {incident.event: happen}))
        return
    evaluate = trainer.run.objective

    class Objective:
        needs, needs_reference, is_sum = evaluate.needs, evaluate.needs_reference, evaluate.is_sum

        def __call__(self, outputs: Any, batch: Any) -> Any:
            if not torch.is_grad_enabled():
                happen(None, None, trainer.state, None)
            return evaluate(outputs, batch)

    trainer.run.objective = Objective()


def _wait(folder: Path) -> None:
    (folder / "waiting").touch()
    for _ in range(6000):
        if (folder / "go").exists():
            return
        time.sleep(0.01)
    raise TimeoutError(f"nobody made {folder / 'go'}")


def lay(trap: Trap) -> None:
    """Replace the trap's function, for the rest of this process."""
    module_name, name = trap.function.rsplit(".", 1)
    module = importlib.import_module(module_name)
    original, calls = getattr(module, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += trap.within in repr((args, kwargs))
        if calls == trap.call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(module, name, counted)


def end_state(trainer: Any) -> End:
    """Everything a run leaves behind, as tensors and as plain values without timings."""
    tensors = {f"weight/{name}": p.detach().clone() for name, p in trainer.model.named_parameters()}
    optimizer_tensors, optimizer_plain = optimizer_state.split_optimizer(trainer.optimizer)
    tensors |= {f"optimizer/{name}": value for name, value in optimizer_tensors.items()}
    tensors |= {f"rng/{name}": value for name, value in snapshot.capture_rng()["tensors"].items()}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    assert all(isinstance(value, torch.Tensor) for value in tensors.values())
    state = trainer.state
    plain = {
        "log_history": without_timings(state.log_history),
        "global_step": state.global_step,
        "epoch": state.epoch,
        "tokens": state.num_input_tokens_seen,
        "flops": state.total_flos,
        "best": [state.best_metric, state.best_global_step, os.path.basename(state.best_model_checkpoint or "")],
        "scheduler": {k: v for k, v in trainer.lr_scheduler.state_dict().items() if k != "lr_lambdas"},
        "optimizer": optimizer_plain,
        "patience": [
            callback.early_stopping_patience_counter
            for callback in trainer.callback_handler.callbacks
            if hasattr(callback, "early_stopping_patience_counter")
        ],
    }
    return tensors, json.loads(json.dumps(plain))


def without_timings(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in entry.items() if not TIMINGS.search(name)} for entry in history]


def read_end(spec: Spec) -> End:
    """What a finished child left."""
    path = Path(spec.folder) / spec.end
    return load_file(path.with_suffix(".safetensors")), json.loads(path.with_suffix(".json").read_text())


def assert_same_end(one: End, other: End) -> None:
    """Bit for bit."""
    assert one[0].keys() == other[0].keys()
    different = [name for name, value in one[0].items() if not torch.equal(value, other[0][name])]
    assert different == []
    for name, value in one[1].items():
        assert value == other[1][name], name


# --- the server -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ended:
    """`status` as `subprocess` counts it: the exit status, or minus the signal."""

    status: int
    stderr: str


class RunServer:
    """Runs specs one at a time: `run(spec)`, or `start(spec)` for its process id and then `wait()`."""

    def __init__(self) -> None:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), *_inherited()]),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._spec: Spec | None = None

    def start(self, spec: Spec) -> int:
        Path(spec.folder).mkdir(parents=True, exist_ok=True)
        self._spec = spec
        self._say(dataclasses.asdict(spec))
        return int(self._hear()["pid"])

    def wait(self) -> Ended:
        assert self._spec is not None
        status = int(self._hear()["status"])
        return Ended(status, Path(self._spec.folder, "stderr.txt").read_text())

    def run(self, spec: Spec) -> Ended:
        self.start(spec)
        return self.wait()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server of short runs has ended"
        return json.loads(line)


def _inherited() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _serve(replies: TextIO) -> dict[str, Any] | None:
    """Fork a child for every request. In a child: the request, to be run at the top level; in the server: None."""
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return request
        print(json.dumps({"pid": pid}), file=replies, flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=replies, flush=True)
    return None


def _warm_up() -> None:
    """Import everything and make the kernels that are made at first use, on this one thread."""
    with tempfile.TemporaryDirectory() as folder:
        for lora in (False, True):
            for bf16 in (False, True):
                make_trainer(Spec(folder, lora=lora, arguments={"bf16": bf16, "save_strategy": "no"})).train()


def _main() -> None:
    torch.set_num_threads(1)  # a process may fork safely as long as it has started no thread pool
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whatever the test runner was started with
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "w")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    _warm_up()
    gc.collect()
    gc.freeze()  # children then share these pages for good, and take down nothing at their end
    request = _serve(replies)
    if request is None:
        return
    kinds = {"incident": Incident, "trap": Trap}
    spec = Spec(**{name: kinds[name](**value) if name in kinds and value else value for name, value in request.items()})
    with open(Path(spec.folder, "stderr.txt"), "w") as errors:
        os.dup2(errors.fileno(), 2)
    trainer = make_trainer(spec)
    if spec.trap is not None:
        lay(spec.trap)
    trainer.train(resume_from_checkpoint=spec.resume)
    tensors, plain = end_state(trainer)
    save_file(tensors, Path(spec.folder, f"{spec.end}.safetensors"))
    Path(spec.folder, f"{spec.end}.json").write_text(json.dumps(plain))


if __name__ == "__main__":
    _main()
