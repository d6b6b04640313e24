"""The command line. Nothing heavy is imported before a command needs it, so `posttrain --help` answers at once."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from posttrain import __version__
from posttrain.errors import Interrupted, UserError

EXIT_CODES = "exit codes: 0 ok, 1 failure, 2 usage or config, 3 data, 75 interrupted (run again with --resume auto)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    options = _parser().parse_args(argv)
    _set_up_logging(options.verbose, options.quiet)
    try:
        return options.command(options)
    except Interrupted as stopped:
        print(stopped.message, file=sys.stderr)
        if stopped.checkpoint:
            print(f"Continue: posttrain train {options.config} --resume auto", file=sys.stderr)
        return 75
    except UserError as error:
        print(f"{error.code} {error.message}", file=sys.stderr)
        if error.hint:
            print(f"  = {error.hint}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output has left
        return 0


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, only results and errors")
    common.add_argument("-v", "--verbose", action="store_true", help="say more")
    parser = argparse.ArgumentParser(
        prog="posttrain",
        description="Post-training for language models: from a file of examples to a better model.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", parents=[common], help="train from a configuration file", epilog=EXIT_CODES)
    train.add_argument("config", type=Path, help="YAML or JSON file; `posttrain recipes show sft` prints one")
    train.add_argument("--set", action="append", default=[], metavar="A.B=V", help="override a value of the file")
    train.add_argument(
        "--resume",
        default="never",
        metavar="auto|never|PATH",
        help="go on from the newest valid checkpoint, or this one",
    )
    train.set_defaults(command=_train)

    recipes = commands.add_parser("recipes", parents=[common], help="list or print ready configuration files")
    recipes.add_argument("action", choices=("list", "show"), nargs="?", default="list")
    recipes.add_argument("name", nargs="?", help="recipe to show")
    recipes.set_defaults(command=_recipes)
    return parser


def _train(options: argparse.Namespace) -> int:
    from posttrain.runner.config import load_config
    from posttrain.runner.train import train

    config = load_config(options.config, options.set)
    logging.getLogger("posttrain").info("config   %s", options.config)
    trained = train(config, options.config, options.resume, quiet=options.quiet or options.json)
    losses = [entry["loss"] for entry in trained.log_history if "loss" in entry]
    summary = {
        "steps": trained.result.global_step,
        "epochs": trained.result.epoch,
        "first_loss": losses[0] if losses else None,
        "final_loss": losses[-1] if losses else None,
        "seconds": trained.result.metrics["train_runtime"],
        "path": str(trained.path),
    }
    if options.json:
        print(json.dumps(summary))
    else:
        loss = f"loss {losses[0]:.3f} → {losses[-1]:.3f}, " if losses else ""
        print(f"✔ trained  {summary['steps']} steps, {loss}{summary['seconds']:.0f} s")
        print(f"✔ saved    {trained.path}")
    return 0


def _recipes(options: argparse.Namespace) -> int:
    from posttrain.runner.recipes import read_recipe, recipe_names

    if options.action == "show":
        print(read_recipe(options.name or ""), end="")
    elif options.json:
        print(json.dumps(recipe_names()))
    else:
        for name, first_line in recipe_names().items():
            print(f"{name:12} {first_line}")
    return 0


class _Checkmarks(logging.Formatter):
    """`✔ data     train.jsonl 1 000 rows: ...`; warnings say what they are."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            return f"! {message}"
        return message if message.startswith(" ") else f"✔ {message}"


def _set_up_logging(verbose: bool, quiet: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Checkmarks())
    logger = logging.getLogger("posttrain")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


if __name__ == "__main__":
    sys.exit(main())
