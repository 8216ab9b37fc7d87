"""How a command ends: its exit code, and one sentence for whatever was raised."""

from __future__ import annotations

import traceback
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

import typer
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from ..exceptions import (
    ConflictError,
    DecryptionError,
    KeyInUseError,
    KeyStateError,
    LucentError,
    SchemaMismatchError,
    SecretNotFoundError,
)

# Some releases of typer take this class from click, others have a copy of their own.
_UsageError: Final[type[Any]] = typer.BadParameter.__mro__[1]

_LEFT: Final = (
    KeyInUseError,
    KeyStateError,
    DecryptionError,
    SchemaMismatchError,
    SecretNotFoundError,
    ConflictError,
)
"""Errors about what is stored, not about how the command was used."""


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    LEFT = 1
    """Something is left to do: rows under another key, values that did not open."""
    WRONG = 2
    """Wrong use: nothing was done, or it could not begin."""
    INTERRUPTED = 130
    CLOSED_PIPE = 141
    """Nobody reads the output any more. A shell reports this code for a program that SIGPIPE
    ended."""


class CommandError(Exception):
    """Ends a command with a sentence and an exit code. Most functions here may raise it."""

    def __init__(self, sentence: str, code: Exit = Exit.WRONG) -> None:
        super().__init__(sentence)
        self.code = code


class ClosedPipeError(Exception):
    """Nobody reads the output any more."""


def explain(error: BaseException) -> tuple[str, Exit]:
    """Return what to say about `error`, and the exit code. No value of a row is quoted."""
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return "interrupted", Exit.INTERRUPTED
    if isinstance(error, CommandError):
        return str(error), error.code
    if isinstance(error, LucentError):
        return str(error), Exit.LEFT if isinstance(error, _LEFT) else Exit.WRONG
    if isinstance(error, DBAPIError):
        # Its next lines may repeat the row.
        return f"the database refused: {first_line(said_by(error))}", Exit.WRONG
    if isinstance(error, SQLAlchemyError):
        # Its message may hold a statement and its parameters.
        return f"{type(error).__name__} at {_place_of(error)}", Exit.WRONG
    if isinstance(error, _UsageError):
        return _usage(error), Exit.WRONG
    return (
        f"unexpected {type(error).__name__} at {_place_of(error)}; its message is not shown, "
        "because it may quote a value. Please report it"
    ), Exit.WRONG


def said_by(error: DBAPIError) -> object:
    """Return the database's own message."""
    original = error.orig
    if original is not None and len(original.args) == 2 and isinstance(original.args[0], int):
        return original.args[1]  # PyMySQL's: a number and a sentence
    return original


def first_line(error: object) -> str:
    """Return the first line of a message, or the name of its class if it is empty."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def _usage(error: Any) -> str:
    """Return what is wrong with the command line, without surplus arguments.

    One of them may be a secret that somebody tried to give to `lucent set`.
    """
    message: str = error.format_message()
    if message.startswith("Got unexpected extra argument"):
        message = message.partition(" (")[0] + "; a secret's value is never one"
    where = error.ctx.command_path if error.ctx is not None else "lucent"
    message = message.rstrip(".")
    end = "" if message.endswith("?") else "."
    return f"{message}{end} Try '{where} --help'"


def _place_of(error: BaseException) -> str:
    """Return the file and line that raised `error`."""
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return f"{Path(last.filename).name}:{last.lineno}"
