"""`posttrain train`: from a configuration file to a trained model."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
from pathlib import Path
from typing import Any

from posttrain.commands import EXIT_CODES


def add(commands: Any, common: argparse.ArgumentParser) -> None:
    train = commands.add_parser("train", parents=[common], help="train from a configuration file", epilog=EXIT_CODES)
    train.add_argument("config", type=Path, help="YAML or JSON file; `posttrain recipes show sft` prints one")
    train.add_argument("--set", action="append", default=[], metavar="A.B=V", help="override a value of the file")
    train.add_argument("--method", metavar="M", help="sft, dpo, ...: instead of the file's `method`")
    train.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="go on from the newest valid checkpoint, or this one",
    )
    train.set_defaults(command=_train)


def command_to_resume(options: argparse.Namespace) -> str:
    """The command that goes on with the run that `options` started: its settings are part of it."""
    words = ["posttrain", "train", str(options.config)]
    for override in options.set:
        words += ["--set", override]
    if options.method:
        words += ["--method", options.method]
    return shlex.join([*words, "--resume", "auto"])


def _train(options: argparse.Namespace) -> int:
    from posttrain.runner.config import load_config
    from posttrain.runner.train import train

    overrides = [*options.set, *([f"method={options.method}"] if options.method else [])]
    config = load_config(options.config, overrides)
    logging.getLogger("posttrain").info("config   %s", options.config)
    trained = train(config, options.config, options.resume, quiet=options.quiet or options.json)
    losses = [entry["loss"] for entry in trained.log_history if "loss" in entry]
    summary = {
        "steps": trained.result.global_step,
        "epochs": trained.result.epoch,
        "first_loss": losses[0] if losses else None,
        "final_loss": trained.result.last_loss,
        "seconds": trained.result.metrics["train_runtime"],
        "path": str(trained.path),
    }
    if options.json:
        print(json.dumps(summary))
    else:
        last = trained.result.last_loss
        loss = f"loss {losses[0]:.3f} → {last:.3f}, " if losses and last is not None else ""
        print(f"✔ trained  {summary['steps']} steps, {loss}{summary['seconds']:.0f} s")
        print(f"✔ saved    {trained.path}")
    return 0
