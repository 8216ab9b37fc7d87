"""Run a command line: whatever it raises becomes one sentence and an exit code."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import typer
from sqlalchemy.exc import DBAPIError, SAWarning, SQLAlchemyError

from ..exceptions import (
    ConflictError,
    DecryptionError,
    KeyInUseError,
    LucentError,
    SchemaMismatchError,
    SecretNotFoundError,
)
from . import terminal
from .commands import app
from .database import refusal_of
from .terminal import ClosedPipeError, CommandError, Exit, printable, tell

# Where it is defined differs between releases of typer: in click, or in a copy of its own.
_UsageError: Final[type[Any]] = typer.BadParameter.__mro__[1]

_LEFT: Final = (
    KeyInUseError,
    DecryptionError,
    SchemaMismatchError,
    SecretNotFoundError,
    ConflictError,
)
"""Errors about what is stored, not about how the command was used."""

_INTERRUPTED: Final = "interrupted"


def run(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            # They are for those who write code: of an index that reflection leaves out, say.
            warnings.simplefilter("ignore", SAWarning)
            return _guarded(arguments)
    except ClosedPipeError:
        return Exit.CLOSED_PIPE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _guarded(arguments: Sequence[str]) -> int:
    """Run the command line; say what went wrong."""
    try:
        code = _invoke(arguments)
        if code != Exit.INTERRUPTED:  # which is what typer makes of Ctrl-C
            return code
        sentence = _INTERRUPTED
    except (KeyboardInterrupt, typer.Abort):
        sentence, code = _INTERRUPTED, Exit.INTERRUPTED
    except CommandError as error:
        sentence, code = str(error), error.code
    except LucentError as error:
        sentence, code = str(error), Exit.LEFT if isinstance(error, _LEFT) else Exit.WRONG
    except DBAPIError as error:
        sentence, code = f"the database refused: {refusal_of(error)}", Exit.WRONG
    except SQLAlchemyError as error:
        # Its message may hold a statement and its parameters.
        sentence, code = f"{type(error).__name__} at {_place_of(error)}", Exit.WRONG
    except _UsageError as error:
        sentence, code = _usage(error), Exit.WRONG
    except ClosedPipeError:
        raise
    except Exception as error:  # noqa: BLE001
        sentence = (
            f"unexpected {type(error).__name__} at {_place_of(error)}; its message is not shown, "
            "because it may quote a value. Please report it"
        )
        code = Exit.WRONG
    # Behind what the terminal shows of Ctrl-C.
    newline = "\n" if sentence is _INTERRUPTED and sys.stderr.isatty() else ""
    tell(f"{newline}lucent: {printable(sentence)}")
    return code


def _invoke(arguments: Sequence[str]) -> int:
    command: Any = typer.main.get_command(app)
    for each in command.commands.values():
        # Left to itself, the list of commands cuts what does not fit beside a name.
        each.short_help = each.get_short_help_str(limit=1000)
    result: object = command.main(
        list(arguments) or ["--help"],
        prog_name="lucent",  # also for `python -m sqlalchemy_lucent`
        standalone_mode=False,
        # Left to itself, the help is never narrower than 50 columns.
        terminal_width=min(terminal.width(), 100),
    )
    return result if isinstance(result, int) else Exit.DONE


def _usage(error: Any) -> str:
    """Return what is wrong with the command line, without arguments that were too many.

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
