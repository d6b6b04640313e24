"""A configuration becomes a trainer, runs, and leaves the adapter (or model) where the configuration says."""

from __future__ import annotations

import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.mixing import Mixture, mix
from posttrain.errors import ConfigError
from posttrain.runner.config import LoraSection, RunConfig, unknown_key
from posttrain.runner.methods import ONLINE, check_keys, config_of, fields_of, trainer_of

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Trained:
    """What a run leaves: its result, where the weights are, and how evaluation loss moved."""

    result: Any
    path: Path
    log_history: list[dict[str, Any]]


def train(config: RunConfig, source: Path, resume: str = "never", quiet: bool = False) -> Trained:
    """Run `config`, read from `source`, whose folder relative paths start from. `resume` is `auto`, `never` or a path.

    Raises: ConfigError, DataError, CheckpointError, NonFiniteError, Interrupted.
    """
    from transformers import PrinterCallback

    root = source.resolve().parent
    path = _path(config.save.lora_path, root)
    args = _training_arguments(config, root, source, quiet)
    _check_writable(path, f"{source}: save.lora_path")
    checkpoint = _checkpoint(resume, args.output_dir)
    if quiet:
        _silence_transformers()
    peft_config = _adapter(config, args.seed)
    trainer = trainer_of(config.method)(
        model=_local_or_named(config.model.name, root),
        args=args,
        train_dataset=_source(config, root, args.seed),
        eval_dataset=_data_path(config.dataset.val_path, root) if config.dataset.val_path else None,
        peft_config=peft_config,
        **({"reward_funcs": [_reward(one.function, root) for one in config.rewards]} if config.rewards else {}),
    )
    if quiet:
        trainer.remove_callback(PrinterCallback)
    trainer.before_training()
    result = trainer.run.train(checkpoint)
    trainer.save_model(str(path))
    trainer.save_state()
    return Trained(result, path, trainer.state.log_history)


def _training_arguments(config: RunConfig, root: Path, source: Path, quiet: bool) -> Any:
    check_keys(config.method, config.dataset, str(source))
    known = fields_of(config.method)
    given = dict(config.training)
    for name in given:
        if name not in known and not _is_old_spelling(name):
            raise unknown_key(str(source), f"training.{name}", known)
    for name, section_key in TAKEN.items():
        if name in given:
            raise ConfigError(f"{source}: training.{name} is set as {section_key}")
    given.setdefault("output_dir", "outputs")
    if isinstance(given["output_dir"], str) and given["output_dir"]:
        given["output_dir"] = str(_path(given["output_dir"], root))
    given.setdefault("report_to", "none")
    if config.dataset.val_path and "evaluation_strategy" not in given:
        given.setdefault("eval_strategy", "epoch")
    if quiet or not sys.stderr.isatty():  # a bar is for people; files and pipes get the log lines
        given["disable_tqdm"] = True
    data = config.dataset
    options: dict[str, Any] = {
        "max_length": config.model.max_seq_length,
        "dataset_text_field": data.text_field,
        "dataset_columns": data.columns,
        "dataset_num_proc": data.num_proc,
        "on_bad_row": data.on_bad_row,
        "dataset_streaming": data.streaming,
        "dataset_cache": data.cache,
        "assistant_only_loss": False if data.train_on == "all" else None,  # None: each row is asked
        "completion_only_loss": False if data.train_on == "all" else None,
        "chat_template_path": None
        if data.chat_template in (None, "auto")
        else _local_or_named(data.chat_template, root),
        "model_init_kwargs": _model_options(config),
        "dataset_format": data.format,
    }
    if config.method in ONLINE:
        _set_lengths(options, given, config.model.max_seq_length, config.method)
        if config.rewards and "reward_weights" in given:
            raise ConfigError(f"{source}: training.reward_weights is set as rewards[].weight")
        options["reward_weights"] = [one.weight for one in config.rewards or []]
    if config.lora.use_gradient_checkpointing:
        options["gradient_checkpointing"] = True
    try:
        return config_of(config.method)(**given, **{name: value for name, value in options.items() if name in known})
    except ConfigError as error:
        raise ConfigError(f"{source}: {_by_its_key(error.message, known)}", hint=error.hint, code=error.code) from error


def _set_lengths(options: dict[str, Any], given: dict[str, Any], longest: int | None, method: str) -> None:
    """A prompt may have what a completion leaves of the longest sequence."""
    del options["max_length"]
    if longest is None or "max_prompt_length" in given:
        return
    name = "response_length" if method == "ppo" else "max_completion_length"
    completion = given.get(name, config_of(method).__dataclass_fields__[name].default)
    if not isinstance(completion, int) or completion >= longest:
        raise ConfigError(f"training.{name}={completion!r} leaves no room for a prompt in "
                          f"model.max_seq_length={longest}", hint="raise the latter")  # fmt: skip
    options["max_prompt_length"] = longest - completion


def _reward(name: str, root: Path) -> Any:
    """A function of a file beside the configuration, a reward model's folder there, or what the trainer knows by this
    name."""
    before, _, after = name.rpartition(":")
    file, function = (before, after) if before.endswith(".py") else (name, "")
    if not file.endswith(".py"):
        return str(_path(name, root)) if _path(name, root).is_dir() else name
    from posttrain.runner.reward_test import find_reward

    return find_reward(str(_path(file, root)), function or None, which=f"{file}:NAME says which")


# Settings that other sections hold, so that each can be set in one place only.
TAKEN = {
    "max_length": "model.max_seq_length",
    "max_seq_length": "model.max_seq_length",
    "dataset_text_field": "dataset.text_field",
    "dataset_columns": "dataset.columns",
    "dataset_num_proc": "dataset.num_proc",
    "dataset_format": "dataset.format",
    "on_bad_row": "dataset.on_bad_row",
    "dataset_streaming": "dataset.streaming",
    "dataset_cache": "dataset.cache",
    "assistant_only_loss": "dataset.train_on",
    "completion_only_loss": "dataset.train_on",
    "chat_template_path": "dataset.chat_template",
}


def _by_its_key(message: str, known: set[str]) -> str:
    """`message` about a field of the method's config, with the field's name as it stands in the file."""
    name = re.match(r"\w*", message)
    if name is None or name[0] not in known:
        return message
    return TAKEN.get(name[0], f"training.{name[0]}") + message[name.end() :]


def _is_old_spelling(name: str) -> bool:
    from posttrain.trainers.spellings import CONFIG_SPELLINGS

    return name in CONFIG_SPELLINGS


def _source(config: RunConfig, root: Path, seed: int) -> str | Mixture:
    """The training data: a path or a name on the hub, or several mixed."""
    data = config.dataset
    if data.path is not None:
        return _data_path(data.path, root)
    parts = data.mixture or []
    paths, weights = [_data_path(part.path, root) for part in parts], [part.weight for part in parts]
    return mix(paths, weights, seed=seed, stop=data.mix_until)


def _model_options(config: RunConfig) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if config.model.dtype is not None:
        options["dtype"] = config.model.dtype
    if config.model.revision is not None:
        options["revision"] = config.model.revision
    if config.model.local_only:
        options["local_files_only"] = True
    return options


def _adapter(config: RunConfig, seed: int) -> Any:
    lora = config.lora
    if not lora.enabled:
        return None
    from peft import LoraConfig

    from posttrain.models.load import is_adapter

    if is_adapter(config.model.name):
        hint = "merge it first" if config.method == "reward" else "lora.enabled: false goes on with that one"
        raise ConfigError(f"model.name={config.model.name!r} is an adapter, and lora asks for another", hint=hint)
    if lora.random_state is not None and lora.random_state != seed:
        raise ConfigError(f"lora.random_state={lora.random_state} differs from training.seed={seed}",
                          hint="one seed serves both: set training.seed")  # fmt: skip
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=_targets(lora),
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=lora.modules_to_save,
        task_type="CAUSAL_LM",
    )


def _targets(lora: LoraSection) -> list[str] | str:
    if isinstance(lora.target_modules, str):
        if not (lora.finetune_attention_modules and lora.finetune_mlp_modules):
            raise ConfigError("lora.finetune_*_modules choose among named target_modules; name them")
        return lora.target_modules
    left_out = (() if lora.finetune_attention_modules else ATTENTION) + (() if lora.finetune_mlp_modules else MLP)
    targets = [name for name in lora.target_modules if name not in left_out]
    if not targets:
        raise ConfigError("lora: no target module is left", hint="set one of finetune_*_modules to true")
    return targets


def _path(given: str, root: Path) -> Path:
    """From `root` on; `~` is the home folder."""
    return root / Path(given).expanduser()


def _check_writable(folder: Path, what: str) -> None:
    """Find out now and not after hours of training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{what}={str(folder)!r} cannot be written: {error.strerror or error}",
                          hint="choose a folder of your own") from error  # fmt: skip


def _silence_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _local_or_named(name: str, root: Path) -> str:
    path = _path(name, root)
    return str(path) if path.exists() else name


def _data_path(name: str, root: Path) -> str:
    """From `root` on, unless it is a name on the hub."""
    from posttrain.data.sources import hub_name

    return name if hub_name(name, root) else str(_path(name, root))


def _checkpoint(resume: str, output_dir: str) -> str | None:
    """The checkpoint to go on from. Raises ConfigError where there is none of that name, and where a new run would
    replace the checkpoints of an earlier one, number by number."""
    from posttrain.checkpoint import Checkpoints

    if resume == "auto":
        folder = Checkpoints(Path(output_dir), run_id="").latest()
        return str(folder) if folder else None
    if resume != "never":
        if not Path(resume).is_dir():
            raise ConfigError(f"--resume {resume!r}: no such folder", hint="auto, never, or the path of a checkpoint")
        return resume
    if any(Path(output_dir).glob("checkpoint-*/MANIFEST.json")):
        raise ConfigError(
            f"{output_dir} holds checkpoints of an earlier run",
            hint="--resume auto goes on with it; for a new one choose another training.output_dir or move them away",
        )
    return None
