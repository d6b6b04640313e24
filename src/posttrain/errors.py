"""Errors that are the user's to mend: one sentence that says what, where, what was seen and what would work.

The command line prints them without a traceback and ends with `exit_code`; as a library they are ordinary exceptions.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what was given. `code` is stable and searchable, `hint` the way out."""

    exit_code = 1
    code = "E-0000"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None):
        self.message, self.hint = message, hint
        if code is not None:
            self.code = code
        super().__init__(message if hint is None else f"{message}\n  = {hint}")


class ConfigError(UserError):
    """A setting that is unknown, malformed, contradictory, or not honoured."""

    exit_code = 2
    code = "E-CONFIG-0001"


class UnknownArgumentError(ConfigError, TypeError):
    """A keyword argument that nothing here has ever had; a TypeError too, as Python's own would be."""

    def __init__(self, taker: str, name: str, known: Iterable[str], *, hint: str | None = None):
        near = difflib.get_close_matches(name, [one for one in known if one != name], n=1)
        if hint is None and near:
            hint = f"did you mean {near[0]!r}?"
        super().__init__(f"{taker} has no argument {name!r}", hint=hint)


class DataError(UserError):
    """Training data that cannot be used as it is."""

    exit_code = 3
    code = "E-DATA-0001"


class CheckpointError(UserError):
    """A checkpoint that is torn, altered, or does not belong to this run."""

    code = "E-CKPT-0001"


class LockedError(UserError):
    """Something that only one process may hold is held by another."""

    exit_code = 6
    code = "E-LOCK-0001"


class DiskFullError(UserError):
    """There is no space left where something had to be written. What was whole before still is."""

    exit_code = 7
    code = "E-DISK-0001"

    @classmethod
    def from_error(cls, error: BaseException) -> DiskFullError:
        where = f" for {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return cls(f"no space left on the disk{where}", hint="make room and go on from the last checkpoint")


class OutOfMemoryError(UserError):
    """There is not the memory for what was asked, however it is cut. Nothing was updated by what did not fit."""

    exit_code = 8
    code = "E-OOM-0001"

    @classmethod
    def from_error(cls, error: BaseException) -> OutOfMemoryError:
        said = str(error).strip().partition("\n")[0] or type(error).__name__
        return cls(f"memory ran out ({said})", hint="give it more memory, or take a smaller model or max_length")


class NonFiniteError(UserError):
    """A loss or gradient that is not a number (the weights were not touched by it), or what the model says of the next
    token where it is sampled from."""

    code = "E-TRAIN-0007"


class Stopped(Exception):
    """A signal came in the middle of something long, which is given up; whoever began it says what becomes of it."""


class Interrupted(SystemExit):
    """Raised after a signal, once everything is saved. Exit status 75 means: run it again to go on."""

    def __init__(self, message: str, checkpoint: str | None):
        super().__init__(75)
        self.message, self.checkpoint = message, checkpoint

    def __str__(self) -> str:
        return self.message
