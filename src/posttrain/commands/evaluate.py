"""`posttrain eval`: is a reward model to be trusted? Writes the validation record that PPO asks for.

Not here yet: evaluation of models that answer.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from posttrain.commands import EXIT_CODES
from posttrain.commands.reading import add_policy, add_reading

logger = logging.getLogger("posttrain")
ABOUT = "how often a reward model prefers the better of two held-out answers; PPO asks for it"


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    command = commands.add_parser("eval", parents=[common], help=ABOUT, description=ABOUT, epilog=EXIT_CODES)
    command.add_argument("--reward-model", required=True, metavar="M", help="its folder, or its name on the hub")
    command.add_argument("--data", required=True, metavar="D", help="pairs that it was not trained on")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="where the record goes (default: reward_validation.json in M)"
    )
    command.add_argument("--max-length", type=int, default=1024, metavar="N",
                         help="pairs with an answer of more tokens are left out (default: 1024)")  # fmt: skip
    add_policy(command, "whether rows that cannot be used are errors, or are skipped and warned of")
    add_reading(command)
    command.set_defaults(command=_evaluate)


def _evaluate(options: argparse.Namespace) -> int:
    from posttrain.commands.reading import data_settings
    from posttrain.errors import ConfigError
    from posttrain.evaluate.accuracy import wilson
    from posttrain.evaluate.validation import NAME
    from posttrain.models.load import load_tokenizer
    from posttrain.trainers.reward import RewardConfig, RewardTrainer

    name = options.reward_model
    if options.out is None and not Path(name).is_dir():
        raise ConfigError(f"--reward-model {name!r} is no folder: the record has no place beside its weights",
                          hint="say where it goes: --out FILE.json, which PPO takes as reward_validation")  # fmt: skip
    path = options.out or Path(name) / NAME
    data = data_settings(options, [options.data])
    model = _reward_model(name)
    with tempfile.TemporaryDirectory() as folder:
        args = RewardConfig(
            folder,
            max_length=options.max_length,
            learning_rate=1e-5,  # nothing is trained
            dataset_format=options.format,
            dataset_columns=dict(data.column_map),
            on_bad_row=options.policy,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = RewardTrainer(model, args, train_dataset=options.data, processing_class=load_tokenizer(name))
        metrics = trainer.run.evaluate({"": _held_out(trainer, name, options.data)}, logged=False)
    record = trainer.validation
    assert record is not None
    assert metrics is not None
    record.write(path)
    if options.json:
        named = ("accuracy", "margin", "calibration_error", "length_correlation")
        print(json.dumps({**{key: metrics[f"eval_{key}"] for key in named}, "n": record.n, "path": str(path)}))
    else:
        low, high = wilson(record.accuracy, record.n)
        print(f"✔ reward   {name}: the better answer scores higher in {record.accuracy:.1%} of {record.n} pairs "
              f"(95 % interval {low:.1%} to {high:.1%})")  # fmt: skip
        print(f"✔ saved    {path}")
    return 0


def _held_out(trainer: Any, name: str, data: str) -> list[Any]:
    """The pairs of `data` that the model was not trained on, each once. Raises DataError where there is none."""
    from posttrain.errors import DataError

    is_said, samples = trainer.learned_before(Path(name)), trainer.run.train_samples
    if not is_said:
        logger.warning("%s does not say which pairs it was trained on: that those of %s were held out is yours to know",
                       name, data)  # fmt: skip
    held_out = [samples[place] for place in trainer.held_out(samples)]
    if not held_out:
        raise DataError(f"{name} was trained on all {len(samples)} pairs of {data}: they prove nothing, and no record "
                        "is written", hint="give pairs that it was not trained on")  # fmt: skip
    if len(held_out) < len(samples):
        logger.warning("%d of %d pairs are left out: the model was trained on them, or they are repeated",
                       len(samples) - len(held_out), len(samples))  # fmt: skip
    return held_out


def _reward_model(name: str) -> Any:
    """Raises ConfigError for a model without a score. An adapter has its score beside it."""
    from posttrain.errors import ConfigError
    from posttrain.models.load import is_adapter, load_model
    from posttrain.models.scoring import is_classifier
    from posttrain.rewards.models import load_reward_model

    if is_adapter(name):
        return load_reward_model(name, None).model
    model = load_model(name, dtype="auto", scorer=True)
    if not is_classifier(model):
        raise ConfigError(f"{name} is no reward model: it has no score",
                          hint="posttrain train reward.yaml makes one")  # fmt: skip
    return model
