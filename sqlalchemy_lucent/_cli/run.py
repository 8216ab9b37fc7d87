"""Run a command line. Whatever it raises becomes one sentence and an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import typer
from sqlalchemy.exc import SAWarning

from . import keys as keys
from . import lifecycle as lifecycle
from . import secrets, terminal
from .errors import ClosedPipeError, Exit, explain
from .terminal import printable, tell


def run(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; return the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            # These are for developers: an index that reflection leaves out, say.
            warnings.simplefilter("ignore", SAWarning)
            return _reporting(arguments)
    except ClosedPipeError:
        return Exit.CLOSED_PIPE
    except KeyboardInterrupt:
        return Exit.INTERRUPTED


def _reporting(arguments: Sequence[str]) -> int:
    """Run the command line; say what went wrong."""
    try:
        code = _invoke(arguments)
        if code != Exit.INTERRUPTED:  # typer turns Ctrl-C into this code
            return code
        raise KeyboardInterrupt
    except ClosedPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        sentence, code = explain(error)
        # The terminal has just shown ^C.
        after_ctrl_c = isinstance(error, (KeyboardInterrupt, typer.Abort)) and sys.stderr.isatty()
    tell("\n" * after_ctrl_c + f"lucent: {printable(sentence)}")
    return code


def _invoke(arguments: Sequence[str]) -> int:
    command: Any = typer.main.get_command(secrets.app)
    for each in (*command.commands.values(), *command.commands["keys"].commands.values()):
        # The default cuts descriptions to fit beside the names.
        each.short_help = each.get_short_help_str(limit=1000)
    result: object = command.main(
        list(arguments) or ["--help"],
        prog_name="lucent",  # also for `python -m sqlalchemy_lucent`
        standalone_mode=False,
        # The default is never narrower than 50 columns.
        terminal_width=min(terminal.width(), 100),
    )
    return result if isinstance(result, int) else Exit.DONE
