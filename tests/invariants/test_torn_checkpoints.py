"""A checkpoint is whole or it is refused by the name of the file at fault; whatever happens while one is written, those
before it stay; resuming takes the newest whole one, of the same run, and nothing in it can run code.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from posttrain import CheckpointError, ConfigError
from posttrain.checkpoint import MANIFEST, Checkpoints, verify, write_json
from tests.invariants.short_runs import (
    Crash,
    Incident,
    RunServer,
    Spec,
    Trap,
    assert_same_end,
    end_state,
    make_trainer,
    read_end,
    rows,
)
from tests.tiny_models import FAMILIES, tiny_model

KINDS = {"lora": Spec("", lora=True), "full": Spec("")}
COMMON = {"MANIFEST.json", "chat_template.jinja", "optimizer.safetensors", "rng.safetensors", "state.json",
          "tokenizer.json", "tokenizer_config.json", "trainer_state.json", "training_args.json"}  # fmt: skip
FILES = {
    "lora": {*COMMON, "README.md", "adapter_config.json", "adapter_model.safetensors"},
    "full": {*COMMON, "config.json", "generation_config.json", "model.safetensors"},
}


@pytest.fixture(scope="module")
def finished(runs: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a finished run with its six checkpoints, not to be changed."""
    folders: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            ended = runs.run(dataclasses.replace(KINDS[kind], folder=str(folders[kind])))
            assert ended.status == 0, ended.stderr
        return folders[kind]

    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# --- what is in it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_but_safetensors_json_and_text(finished: Callable[[str], Path], kind: str) -> None:
    for number in range(1, 7):
        checkpoint = finished(kind) / f"checkpoint-{number}"
        assert {path.name for path in checkpoint.rglob("*")} == FILES[kind] - {"chat_template.jinja"}
        assert verify(checkpoint)["step"] == number
        for path in checkpoint.glob("*.json"):
            json.loads(path.read_text(), parse_constant=pytest.fail)  # called with NaN, Infinity, -Infinity


def test_transformers_reads_the_state(finished: Callable[[str], Path]) -> None:
    assert get_last_checkpoint(str(finished("full"))) == str(finished("full") / "checkpoint-6")
    state = TrainerState.load_from_json(str(finished("full") / "checkpoint-6" / "trainer_state.json"))
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (6, 6, 2.0, 2)
    assert [entry["step"] for entry in state.log_history] == [2, 2, 4, 4, 6, 6]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_checkpoint_loads_in_plain_transformers(quick: None, tmp_path: Path, family: str, bf16: bool) -> None:
    """In fp32, as it was learned, whatever dtype computed."""
    trainer = make_trainer(Spec(str(tmp_path), family=family, arguments={"max_steps": 1, "bf16": bf16}))
    trainer.train()
    model, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint-1", dtype="auto", output_loading_info=True
    )
    assert not any(report.values())
    trained, loaded = (dict(one.named_parameters()) for one in (trainer.model, model))
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
    assert all(value.dtype == torch.float32 for value in loaded.values())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint-1")
    assert tokenizer("Paris is four.")["input_ids"] == trainer.processing_class("Paris is four.")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_checkpoint_loads_in_plain_peft(quick: None, tmp_path: Path, family: str) -> None:
    trainer = make_trainer(Spec(str(tmp_path), lora=True, family=family, arguments={"max_steps": 2}))
    trainer.train()
    model = PeftModel.from_pretrained(tiny_model(family, 270), tmp_path / "checkpoint-2")
    trained, loaded = (
        {name: value for name, value in one.named_parameters() if "lora_" in name} for one in (trainer.model, model)
    )
    assert trained.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in trained.items())
    assert any(value.abs().max() > 0 for name, value in loaded.items() if "lora_B" in name)


# --- torn at any file -----------------------------------------------------------------------------------------------


def _missing(path: Path) -> None:
    path.unlink()


def _one_byte_short(path: Path) -> None:
    path.write_bytes(path.read_bytes().rstrip(b"\n")[:-1])


def _one_byte_long(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"0")


def _one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _a_link(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(elsewhere)


def _a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (_missing, _one_byte_short, _one_byte_long, _one_bit_flipped, _emptied, _a_link, _a_folder)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_torn_at_any_file(
    finished: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    damage: Callable[[Path], None],
) -> None:
    shutil.copytree(finished(kind) / "checkpoint-5", tmp_path / "checkpoint-5")
    files = FILES[kind] - {"chat_template.jinja"}
    for name in sorted(files - {MANIFEST} if damage is _a_link else files):
        newest = tmp_path / "checkpoint-6"
        shutil.rmtree(newest, ignore_errors=True)
        shutil.copytree(finished(kind) / "checkpoint-6", newest)
        verify(newest)
        damage(newest / name)
        with pytest.raises(CheckpointError) as caught:
            verify(newest)
        assert str(newest) in caught.value.message
        assert name in caught.value.message
        caplog.clear()
        assert Checkpoints(tmp_path, "any").latest() == tmp_path / "checkpoint-5"
        assert [record.getMessage() for record in caplog.records] == [f"{caught.value.message} Passed over."]


def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_it_resumed(
    finished: Callable[[str], Path], runs: RunServer, tmp_path: Path
) -> None:
    shutil.copytree(finished("lora"), tmp_path / "run")
    for number in (4, 5, 6):
        _one_bit_flipped(tmp_path / "run" / f"checkpoint-{number}" / "adapter_model.safetensors")
    spec = dataclasses.replace(KINDS["lora"], folder=str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match=r"checkpoint-6 is not whole: adapter_model.safetensors does not match"):
        make_trainer(spec).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    ended = runs.run(dataclasses.replace(spec, resume=True, end="again"))
    assert ended.status == 0, ended.stderr
    for number in (6, 5, 4):
        assert f"checkpoint-{number} is not whole: adapter_model.safetensors does not match" in ended.stderr
    expected = read_end(dataclasses.replace(spec, folder=str(finished("lora"))))
    assert_same_end(read_end(dataclasses.replace(spec, end="again")), expected)


def test_any_bit_of_the_manifest(finished: Callable[[str], Path], tmp_path: Path) -> None:
    """Who wrote it, when, in which order: the manifest is sealed as a whole."""
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished("lora") / "checkpoint-6", checkpoint)
    whole = (checkpoint / MANIFEST).read_bytes()
    for position in range(0, len(whole), 3):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << (position % 8)
        (checkpoint / MANIFEST).write_bytes(flipped)
        with pytest.raises(CheckpointError) as caught:
            verify(checkpoint)
        assert str(checkpoint) in caught.value.message
    (checkpoint / MANIFEST).write_bytes(whole)
    verify(checkpoint)


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[]", "3", "{}", '{"files": 3}', '{"files": {"a": 1}}', '{"files": null}', "\0"]
)
def test_a_manifest_that_is_none(finished: Callable[[str], Path], tmp_path: Path, content: str) -> None:
    for number in (5, 6):
        shutil.copytree(finished("lora") / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    (tmp_path / "checkpoint-6" / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*(cannot be read|schema version|own hash)"):
        verify(tmp_path / "checkpoint-6")
    assert Checkpoints(tmp_path, "any").latest() == tmp_path / "checkpoint-5"


def test_a_later_schema_is_refused(finished: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-6"
    shutil.copytree(finished("lora") / "checkpoint-6", checkpoint)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    write_json(checkpoint / MANIFEST, {**manifest, "schema_version": 2})
    with pytest.raises(CheckpointError, match=r"checkpoint-6 has schema version 2; this posttrain reads 1\."):
        verify(checkpoint)


def test_none_is_whole(finished: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3):
        shutil.copytree(finished("lora") / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
        (tmp_path / f"checkpoint-{number}" / MANIFEST).unlink()
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ConfigError, match=r"resume_from_checkpoint=True, but .* has no valid checkpoint"):
        make_trainer(Spec(str(tmp_path), lora=True)).train(resume_from_checkpoint=True)
    warned = [record.getMessage() for record in caplog.records if record.name == "posttrain"]
    why = "has no MANIFEST.json: it was not completed, or another tool wrote it. Passed over."
    assert warned == [f"{tmp_path}/checkpoint-{number} {why}" for number in (4, 3, 2, 1)]


# --- writing ---------------------------------------------------------------------------------------------------------


def fill(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for name in ("a", "b", "c"):
            (folder / f"{name}.json").write_text(content + name)

    return write


class Full:
    """`function` fails with ENOSPC at call number `at`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: str):
        self.calls, self.at = 0, 0
        module, name = function.rsplit(".", 1)
        self.original = getattr({"os": os, "shutil": shutil}[module], name)
        monkeypatch.setattr(function, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.original(*args, **kwargs)


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
@pytest.mark.parametrize("step", [2, 3])
def test_a_full_disk_at_any_point_of_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, step: int
) -> None:
    """A new checkpoint (3), and one that replaces an earlier one of the same step (2)."""
    checkpoints = Checkpoints(tmp_path, "run", limit=2)
    checkpoints.write(1, fill("one"))
    checkpoints.write(2, fill("two"))
    before = tree(tmp_path)
    full = Full(monkeypatch, function)
    for at in range(1, 20):
        full.calls, full.at = 0, at
        with suppress(OSError):
            checkpoints.write(step, fill("new"))
        if full.calls < at:
            break
        written = (tmp_path / "checkpoint-3").exists()
        assert written == ((function, step, at) in {("os.fsync", 3, 6), ("os.replace", 3, 3)})  # after the last rename
        assert {name: content for name, content in tree(tmp_path).items() if "checkpoint-3" not in name} == before
        assert names(tmp_path) == ["checkpoint-1", "checkpoint-2", *(["checkpoint-3"] if written else [])]
        assert checkpoints.latest() == tmp_path / ("checkpoint-3" if written else "checkpoint-2")
        if written:
            shutil.rmtree(tmp_path / "checkpoint-3")
    assert at == {"os.fsync": 7, "os.replace": 4}[function]
    assert checkpoints.latest() == tmp_path / f"checkpoint-{step}"
    assert names(tmp_path) == (["checkpoint-1", "checkpoint-2"] if step == 2 else ["checkpoint-2", "checkpoint-3"])


def test_a_full_disk_while_weights_are_written(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends with the disk's own error; what was saved stays, also with save_total_limit=1, and is resumed."""
    spec = Spec(str(tmp_path / "run"), arguments={"save_total_limit": 1})
    undisturbed = make_trainer(Spec(str(tmp_path / "undisturbed")))
    undisturbed.train()
    trainer = make_trainer(spec)
    save, calls = trainer.model.save_pretrained, 0

    def save_pretrained(folder: Path) -> None:
        nonlocal calls
        calls += 1
        save(folder)
        if calls == 4:
            (folder / "model.safetensors").write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainer.model, "save_pretrained", save_pretrained)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-3"]
    verify(tmp_path / "run" / "checkpoint-3")
    resumed = make_trainer(spec)
    resumed.train(resume_from_checkpoint=True)
    assert names(tmp_path / "run") == ["checkpoint-6"]
    assert_same_end(end_state(resumed), end_state(undisturbed))


def test_a_new_checkpoint_that_does_not_verify_replaces_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits that flip on their way to the disk are found before anything older is deleted."""
    checkpoints = Checkpoints(tmp_path, "run", limit=1)
    checkpoints.write(1, fill("one"))
    move = os.replace

    def replace(source: Path, target: Path) -> None:
        move(source, target)
        if source.suffix == ".partial":
            _one_bit_flipped(target / "b.json")

    before = tree(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=rf"checkpoint-{step} is not whole: b.json does not match"):
                checkpoints.write(step, fill("new"))
            assert tree(tmp_path / "checkpoint-1") == {n[len("checkpoint-1/") :]: c for n, c in before.items()}
            assert checkpoints.latest() == tmp_path / "checkpoint-1"
    checkpoints.write(3, fill("three"))
    assert checkpoints.latest() == tmp_path / "checkpoint-3"


# --- rotation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rotation_deletes_only_once_the_newest_is_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    checkpoints, deleted = Checkpoints(tmp_path, "run", limit), []
    remove = shutil.rmtree

    def rmtree(path: Path, **options: Any) -> None:
        newest = checkpoints.latest()
        assert newest is not None
        deleted.append((newest.name, Path(path).name))
        remove(path, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for step in range(1, 6):
        checkpoints.write(step, fill(str(step)))
        assert names(tmp_path) == [f"checkpoint-{i}" for i in range(max(1, step - limit + 1), step + 1)]
    expected = [(f"checkpoint-{step}", f"checkpoint-{step - limit}.partial") for step in range(limit + 1, 6)]
    assert [pair for pair in deleted if not pair[1].endswith(".replaced")] == expected


@pytest.mark.parametrize("limit", [1, 2])
def test_rotation_keeps_the_best_and_the_newest(tmp_path: Path, limit: int) -> None:
    checkpoints = Checkpoints(tmp_path, "run", limit)
    for step in range(1, 6):
        checkpoints.write(step, fill(str(step)), best=tmp_path / "checkpoint-2" if step >= 2 else None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-5"]


def test_rotation_goes_by_age_and_not_by_number(tmp_path: Path) -> None:
    """transformers#37260: after starting over, old folders with higher numbers are the older ones."""
    old = Checkpoints(tmp_path, "old")
    for step in (100, 200):
        old.write(step, fill("old"))
    before = tree(tmp_path)
    new = Checkpoints(tmp_path, "new", limit=1)
    for step in (1, 2, 3):
        new.write(step, fill("new"))
        assert new.latest() == tmp_path / f"checkpoint-{step}"
    assert names(tmp_path) == ["checkpoint-100", "checkpoint-200", "checkpoint-3"]
    assert {name: content for name, content in tree(tmp_path).items() if "00/" in name} == before


def test_rotation_leaves_what_others_have_written(tmp_path: Path) -> None:
    """Folders of another tool, of another run, and files that only look like a checkpoint."""
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "pytorch_model.bin").write_text("another tool's")
    (tmp_path / "checkpoint-8").write_text("a file")
    checkpoints = Checkpoints(tmp_path, "run", limit=1)
    for step in (1, 2, 3):
        checkpoints.write(step, fill(str(step)))
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-7", "checkpoint-8", "checkpoint-best"]
    assert checkpoints.latest() == tmp_path / "checkpoint-3"
    assert (tmp_path / "checkpoint-7" / "pytorch_model.bin").read_text() == "another tool's"


def test_the_best_model_of_a_run_survives_its_rotation(quick: None, tmp_path: Path) -> None:
    """Learning far too fast, the second evaluation is the best; in the end its weights are loaded."""
    seen: list[list[str]] = []

    class Look(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(names(tmp_path))

    arguments = {"learning_rate": 0.5, "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(Spec(str(tmp_path), arguments=arguments), callbacks=(Look(),))
    trainer.train()
    assert trainer.state.best_global_step == 2
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    assert seen == [["checkpoint-1"], ["checkpoint-2"], *(["checkpoint-2", f"checkpoint-{i}"] for i in (3, 4, 5, 6))]
    best = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, best[name])
        assert not torch.equal(value, last[name])


# --- killed while writing -------------------------------------------------------------------------------------------


def assert_resumes(runs: RunServer, finished: Callable[[str], Path], spec: Spec) -> None:
    """To the undisturbed end, with nothing half-written left over."""
    ended = runs.run(dataclasses.replace(spec, resume=True, trap=None, incident=None))
    assert ended.status == 0, ended.stderr
    assert_same_end(read_end(spec), read_end(dataclasses.replace(spec, folder=str(finished("full")))))
    assert not [path.name for path in Path(spec.folder).iterdir() if path.suffix in (".partial", ".replaced", ".tmp")]


@pytest.mark.parametrize(
    ("trap", "survivor"),
    [
        (Trap("posttrain.snapshot.save_file", 4), 1),
        (Trap("os.fsync", 14), 1),
        (Trap("os.fsync", 18), 1),
        (Trap("os.fsync", 24), 1),
        (Trap("os.replace", 1, "checkpoint-2.partial/training_args.json"), 1),
        (Trap("os.replace", 1, "checkpoint-2.partial/MANIFEST.json"), 1),
        (Trap("os.replace", 1, "checkpoint-2')"), 1),
        (Trap("hashlib.file_digest", 1, "checkpoint-2/state.json"), 2),
    ],
    ids=str,
)
def test_killed_while_writing(
    runs: RunServer, finished: Callable[[str], Path], tmp_path: Path, trap: Trap, survivor: int
) -> None:
    spec = Spec(str(tmp_path), trap=trap)
    assert runs.run(spec).status == -signal.SIGKILL
    assert Checkpoints(tmp_path, "any").latest() == tmp_path / f"checkpoint-{survivor}"
    assert_resumes(runs, finished, spec)


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_killed_at_any_call_while_writing(runs: RunServer, tmp_path: Path, function: str) -> None:
    """Every call of the second checkpoint: what is chosen is the first, or the second and then it is whole."""
    num_files = len(FILES["full"]) - 1  # all but the chat template
    per_checkpoint = {"os.fsync": num_files + 3, "os.replace": 3}[function]
    chosen: list[int] = []
    for call in range(per_checkpoint + 1, 2 * per_checkpoint + 2):
        folder = tmp_path / str(call)
        assert runs.run(Spec(str(folder), trap=Trap(function, call))).status == -signal.SIGKILL
        latest = Checkpoints(folder, "any").latest()
        assert latest is not None
        chosen.append(verify(latest)["step"])
    assert chosen == sorted(chosen)
    assert set(chosen) == {1, 2}


@pytest.mark.parametrize("call", [4, 5, 6, 7])
def test_killed_while_replacing_a_checkpoint(
    runs: RunServer, finished: Callable[[str], Path], tmp_path: Path, call: int
) -> None:
    """A signal while step 2 is saved has it saved again on leaving; dying then, even between the two renames of the
    replacement, loses neither."""
    spec = Spec(
        str(tmp_path), trap=Trap("os.replace", call, "checkpoint-2"), incident=Incident("on_save", 2, "SIGTERM")
    )
    assert runs.run(spec).status == -signal.SIGKILL
    on_disk = {"checkpoint-1", "checkpoint-2.partial", "checkpoint-2.replaced" if call == 7 else "checkpoint-2"}
    assert set(names(tmp_path)) == on_disk
    assert Checkpoints(tmp_path, "any").latest() == tmp_path / "checkpoint-2"
    assert_resumes(runs, finished, spec)


@pytest.mark.parametrize("call", [1, 5, 11])
def test_killed_while_deleting(runs: RunServer, finished: Callable[[str], Path], tmp_path: Path, call: int) -> None:
    """Half a deletion does not pass for a checkpoint, and is finished at the next save."""
    spec = Spec(str(tmp_path), trap=Trap("os.unlink", call), arguments={"save_total_limit": 1})
    assert runs.run(spec).status == -signal.SIGKILL
    assert names(tmp_path) == ["checkpoint-1.partial", "checkpoint-2"]
    assert Checkpoints(tmp_path, "any").latest() == tmp_path / "checkpoint-2"
    assert_resumes(runs, finished, spec)
    assert names(tmp_path) == ["checkpoint-6"]


# --- another run ----------------------------------------------------------------------------------------------------

OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "batch size": ({"per_device_train_batch_size": 4}, "per_device_train_batch_size = 2, and this run has 4"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps = 2, and this run has 1"),
    "seed": ({"seed": 7}, "data seed = 42, and this run has 7"),
    "data seed": ({"data_seed": 7}, "data seed = 42, and this run has 7"),
    "dtype": ({"bf16": True}, "compute dtype = float32, and this run has bfloat16"),
    "optimizer": ({"optim": "sgd"}, "optimizer = AdamW, and this run has SGD"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_setting_is_refused(finished: Callable[[str], Path], quick: None, name: str) -> None:
    arguments, message = OTHERS[name]
    trainer = make_trainer(dataclasses.replace(KINDS["full"], folder=str(finished("full")), arguments=arguments))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    with pytest.raises(CheckpointError) as caught:
        trainer.train(resume_from_checkpoint=True)
    assert caught.value.message == f"{finished('full') / 'checkpoint-6'} was written with {message}"
    assert caught.value.hint == "restore the old setting to go on with that run, or start anew in another output_dir"
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())


def _one_token_changed(data: list[Any]) -> None:
    data[3]["input_ids"][4] = data[3]["labels"][4] = 5


def _one_label_less(data: list[Any]) -> None:
    data[3]["labels"][4] = -100


def _one_row_less(data: list[Any]) -> None:
    data.pop()


def _two_rows_swapped(data: list[Any]) -> None:
    data[0], data[1] = data[1], data[0]


@pytest.mark.parametrize("change", [_one_token_changed, _one_label_less, _one_row_less, _two_rows_swapped])
def test_other_data_is_refused(
    finished: Callable[[str], Path], quick: None, change: Callable[[list[Any]], None]
) -> None:
    data = rows()
    change(data)
    trainer = make_trainer(dataclasses.replace(KINDS["full"], folder=str(finished("full"))), train=data)
    with pytest.raises(CheckpointError, match=r"was written with training data \(hash of its tokens\) = "):
        trainer.train(resume_from_checkpoint=True)


def test_another_adapter_is_refused(finished: Callable[[str], Path], quick: None) -> None:
    folder = str(finished("lora"))
    with pytest.raises(CheckpointError, match=r"written with number of trained parameters = \d+, and this run has"):
        make_trainer(Spec(folder)).train(resume_from_checkpoint=True)
    wider = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match=r"written with number of trained parameters = \d+, and this run has"):
        make_trainer(Spec(folder, lora=True), adapter=wider).train(resume_from_checkpoint=True)


def test_weights_alone_cannot_be_resumed(quick: None, tmp_path: Path) -> None:
    make_trainer(Spec(str(tmp_path), arguments={"save_only_model": True, "max_steps": 1})).train()
    with pytest.raises(CheckpointError, match=r"checkpoint-1 holds weights only \(save_only_model=True\)"):
        make_trainer(Spec(str(tmp_path))).train(resume_from_checkpoint=True)


def test_a_resumed_run_is_the_same_run(quick: None, tmp_path: Path) -> None:
    """Its rotation goes on with the checkpoints it wrote before."""
    spec = Spec(str(tmp_path), arguments={"save_total_limit": 2})
    with pytest.raises(Crash):
        make_trainer(dataclasses.replace(spec, incident=Incident("on_step_begin", 3, "raise"))).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    make_trainer(spec).train(resume_from_checkpoint=True)
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-6"]


@pytest.fixture(autouse=True)
def _audible() -> None:
    """`posttrain`'s warnings reach pytest, whatever a command-line test before has set."""
    logging.getLogger("posttrain").propagate = True
