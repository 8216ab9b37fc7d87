"""What the command writes: for people on a terminal, plain lines for everything else."""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from enum import IntEnum
from shutil import get_terminal_size
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    LEFT = 1
    """Something is left to do: rows under another key, values that did not open."""
    WRONG = 2
    """Wrong use: nothing was done, or it could not begin."""
    INTERRUPTED = 130
    CLOSED_PIPE = 141
    """Nobody reads the output any more: what a shell says of a program that SIGPIPE ended."""


class CommandError(Exception):
    """What ends a command: a sentence, and its exit code."""

    def __init__(self, sentence: str, code: Exit = Exit.WRONG) -> None:
        super().__init__(sentence)
        self.code = code


class ClosedPipeError(Exception):
    """Nobody reads the output any more."""


def console(stream: TextIO) -> Console:
    """Return a console that takes text as it is, without colour where none is wanted."""
    plain = bool(os.environ.get("NO_COLOR"))
    return Console(
        file=stream,
        markup=False,
        highlight=False,
        emoji=False,
        color_system=None if plain else "auto",
    )


def width() -> int:
    """Return the columns of the terminal."""
    return get_terminal_size().columns


def write(text: str) -> None:
    """Write to standard output, at once."""
    _write(sys.stdout, text)


def tell(text: str) -> None:
    """Write a line to standard error: what is not the result."""
    _write(sys.stderr, f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError as error:
        # Whatever is flushed when the process ends goes nowhere, and quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise ClosedPipeError from error


def write_json(value: Any) -> None:
    """Write `value` as a JSON document; on a terminal, with escapes for what is not printable."""
    text = json.dumps(value, indent=2, ensure_ascii=not _writes_utf8())
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)
    write(f"{text}\n")


def _writes_utf8() -> bool:
    return sys.stdout.encoding.lower().replace("-", "") == "utf8"


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


def write_text(text: str) -> None:
    """Write `text` and a line end: as it is, but on a terminal printable."""
    if sys.stdout.isatty():
        text = "\n".join(map(printable, text.split("\n")))
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    write(f"{text}\n")


def printable(value: object) -> str:
    """Return the text of `value`, without what would move a terminal's cursor or end a field."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def write_rows(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows: a table on a terminal, else a line for each, its fields separated by tabs."""
    rows = list(rows)
    if not rows:
        return
    if not sys.stdout.isatty():
        write("".join("\t".join(map(printable, row)) + "\n" for row in rows))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading, sample in zip(headings, rows[0], strict=True):
        table.add_column(heading, justify="right" if isinstance(sample, int) else "left")
    for row in rows:
        table.add_row(*map(_cell, row))
    columns = zip(headings, *(map(_cell, row) for row in rows), strict=True)
    needed = sum(max(map(cell_len, column)) + 2 for column in columns)
    out = console(sys.stdout)
    with out.capture() as captured:
        if needed <= out.width:
            out.print(table)
        else:
            # Nothing is cut: a line for each field, which the terminal itself may break.
            for row in rows:
                for heading, value in zip(headings, row, strict=True):
                    line = Text.assemble((heading, "bold"), " ", _cell(value))
                    out.print(line, soft_wrap=True)
                out.print()
    write(captured.get())


def _cell(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else printable(value)


def counted(number: int, noun: str) -> str:
    """Return "1 value", "2 values"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def wrapped(text: str, indent: str = "") -> str:
    """Return `text` in lines that fit a terminal, those behind the first indented."""
    if not sys.stdout.isatty():
        return text
    return textwrap.fill(text, max(width() - 1, 20), subsequent_indent=indent)


def write_finding(level: str, what: str, advice: str) -> None:
    """Write a finding: on a terminal in lines that fit, else one line of three fields."""
    if not sys.stdout.isatty():
        write("\t".join((level, printable(what), printable(advice))) + "\n")
        return
    indent = " " * 6
    lines = [wrapped(f"{level:<6}{printable(what)}", indent)]
    if advice:
        lines.append(wrapped(f"{indent}{printable(advice)}", indent))
    out = console(sys.stdout)
    with out.capture() as captured:
        text = Text("\n".join(lines))
        text.stylize({"ok": "green", "note": "yellow"}.get(level, "bold red"), 0, len(indent))
        out.print(text, soft_wrap=True)
    write(captured.get())


def confirm(question: str) -> None:
    """Go on only if the person at the terminal says yes.

    :raises CommandError: the answer is no, or nobody is there to give one.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        raise CommandError("standard input is no terminal to ask on; add --yes if it is meant")
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("not done", Exit.LEFT)
