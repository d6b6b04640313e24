"""The command line. Nothing heavy is imported before a command needs it, so `posttrain --help` answers at once."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from posttrain import __version__
from posttrain.commands import COLORS, EXIT_CODES, chat, data, evaluate, recipes, reward, train
from posttrain.commands.reading import in_flags
from posttrain.commands.train import command_to_resume
from posttrain.errors import DiskFullError, Interrupted, OutOfMemoryError, UserError
from posttrain.shortage import is_out_of_memory
from posttrain.terminal import (
    ended_by_signals,
    is_disk_full,
    keep_traceback,
    make_streams_last,
    stopped_at_once,
    wants_colour,
)

COMMANDS = (train, data, reward, evaluate, chat, recipes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; its exit code."""
    make_streams_last()
    try:
        with ended_by_signals():
            options = _parser().parse_args(argv)
            _set_up_logging(options.verbose, options.quiet, wants_colour(options.color, sys.stderr))
            return options.command(options)
    except Interrupted as stopped:
        print(stopped.message, file=sys.stderr)
        if stopped.checkpoint:
            print(f"Continue: {command_to_resume(options)}", file=sys.stderr)
        return 75
    except KeyboardInterrupt as stopped:
        print(stopped_at_once(str(stopped) or "SIGINT"), file=sys.stderr)
        return 75
    except UserError as error:
        error.hint = in_flags(error.hint, options)
        return _say(error)
    except Exception as error:
        if is_out_of_memory(error):
            return _say(OutOfMemoryError.from_error(error))
        if is_disk_full(error):
            return _say(DiskFullError.from_error(error))
        path = keep_traceback(error)
        said = str(error).strip().partition("\n")[0] or "no message"
        print(f"E-INTERNAL-0001 {type(error).__name__}: {said}", file=sys.stderr)
        print(
            f"  = this is a fault of posttrain's or of a library under it; the traceback is in {path}", file=sys.stderr
        )
        return 1


def _say(error: UserError) -> int:
    print(f"{error.code} {error.message}", file=sys.stderr)
    if error.hint:
        print(f"  = {error.hint}", file=sys.stderr)
    return error.exit_code


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print the result as one JSON object")
    common.add_argument("-q", "--quiet", action="store_true", help="no progress, only results and errors")
    common.add_argument("-v", "--verbose", action="store_true", help="say more")
    common.add_argument("--color", choices=COLORS, default="auto", help="colours: on a terminal (auto), always, never")
    common.add_argument("--no-input", action="store_true", help="never ask anything; no command here does")
    parser = argparse.ArgumentParser(
        prog="posttrain",
        description="Post-training for language models: from a file of examples to a better model.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    for command in COMMANDS:
        command.add(commands, common)
    return parser


class _Checkmarks(logging.Formatter):
    """`✔ data     train.jsonl 1 000 rows: ...`; warnings say what they are."""

    def __init__(self, coloured: bool):
        super().__init__()
        self.good, self.bad = ("\033[32m✔\033[0m", "\033[33m!\033[0m") if coloured else ("✔", "!")

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno >= logging.WARNING:
            return f"{self.bad} {message}"
        return message if message.startswith(" ") else f"{self.good} {message}"


def _set_up_logging(verbose: bool, quiet: bool, coloured: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Checkmarks(coloured))
    logger = logging.getLogger("posttrain")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here asks for


if __name__ == "__main__":
    sys.exit(main())
