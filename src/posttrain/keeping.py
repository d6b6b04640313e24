"""What a run keeps on disk, and takes up again: checkpoints, and the model as PEFT and transformers load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from posttrain import identity, snapshot
from posttrain.checkpoint import Checkpoints, verify, write_json
from posttrain.errors import ConfigError
from posttrain.evaluate.best import find_best_again
from posttrain.events import Events
from posttrain.models.critic import Critic
from posttrain.models.weights import load_weights, save_weights
from posttrain.optimizer_state import evaluation_weights, has_two_modes
from posttrain.reference import ReferenceModel
from posttrain.session import Session


@dataclass
class Keeper:
    """Of one run. `run_id` becomes that of the run that is taken up. `beside` writes what else belongs beside the
    model's weights."""

    model: Any
    processing_class: Any
    args: TrainingArguments
    events: Events
    run_id: str
    reference: ReferenceModel | None = None
    critic: Critic | None = None
    beside: Callable[[Path], None] | None = None

    @property
    def _checkpoints(self) -> Checkpoints:
        return Checkpoints(Path(self.args.output_dir), self.run_id, self.args.save_total_limit)

    def write_checkpoint(
        self, session: Session, optimizer: Any, scheduler: Any, same_run: Mapping[str, Any], loop_state: dict[str, Any]
    ) -> str:
        """Its path. `same_run` is what a run that resumes from it has to have in common with this one."""
        state = self.events.state
        path = Path(self.args.output_dir) / f"checkpoint-{state.global_step}"
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(path)
        best = Path(state.best_model_checkpoint) if state.best_model_checkpoint else None

        def fill(folder: Path) -> None:
            with weights_to_use(session, optimizer):
                self.write_model(folder, session, is_checkpoint=True)
            if self.reference is not None:
                self.reference.save(folder)
            self.events.save_state(str(folder / "trainer_state.json"))
            if not self.args.save_only_model:
                document = {"run_id": self.run_id, "identity": same_run, "loop": loop_state,
                            "arithmetic": identity.of_arithmetic(session)}  # fmt: skip
                snapshot.write_training_state(folder, optimizer, scheduler, snapshot.capture_rng(), document)

        return str(self._checkpoints.write(state.global_step, fill, best))

    def write_model(self, folder: Path, session: Session | None, is_checkpoint: bool = False) -> None:
        """Weights, tokenizer and settings, so that the folder can be loaded as it is."""
        folder.mkdir(parents=True, exist_ok=True)
        with nullcontext() if session is None else session.precision.exported():
            save_weights(self.model, folder)
            if self.beside is not None:
                self.beside(folder)
            if self.critic is not None:
                self.critic.save(folder, is_checkpoint)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        write_json(folder / "training_args.json", identity.plain(self.args.to_sanitized_dict()))

    def folder_to_resume(self, resume: str | bool | None) -> Path | None:
        """Raises ConfigError where there is none, CheckpointError where it is damaged."""
        if not resume:
            return None
        if resume is True:
            folder = self._checkpoints.latest()
            if folder is None:
                raise ConfigError(f"resume_from_checkpoint=True, but {self.args.output_dir} has no valid checkpoint")
            return folder
        verify(Path(resume))
        return Path(resume)

    def take_up(
        self, folder: Path, session: Session, optimizer: Any, scheduler: Any, same_run: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Load everything a checkpoint holds but two things, which are returned: the loop's state, and the random
        state, which is to be set last. Raises CheckpointError where it is another run's."""
        saved = snapshot.read_state(folder)
        snapshot.check_same_run(folder, saved, same_run)
        snapshot.warn_of_other_arithmetic(folder, saved, identity.of_arithmetic(session))
        self.read_weights(session, folder)
        if self.reference is not None:
            self.reference.load(folder)
        rng = snapshot.restore_training_state(folder, saved, optimizer, scheduler)
        session.precision.publish()
        self.run_id = saved["run_id"]
        self.events.load_state(str(folder / "trainer_state.json"))
        find_best_again(self.events)
        return saved["loop"], rng

    def read_weights(self, session: Session, folder: Path) -> None:
        """Of everything that is trained."""
        with session.precision.exported():
            load_weights(self.model, folder)
            if self.critic is not None:
                self.critic.load(folder)


@contextmanager
def weights_to_use(session: Session, optimizer: Any) -> Iterator[None]:
    """For optimisers that train one set of weights and evaluate another: inside, the model has the second."""
    if not has_two_modes(optimizer):
        yield
        return
    with evaluation_weights(optimizer):
        session.precision.publish()
        yield
    session.precision.publish()
