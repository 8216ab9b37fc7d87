"""Output: tables and colour on a terminal, plain lines for everything else."""

from __future__ import annotations

import io
import json
import os
import sys
import textwrap
from collections.abc import Iterable, Sequence
from shutil import get_terminal_size
from typing import Any, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import ClosedPipeError, CommandError, Exit


def console(stream: TextIO) -> Console:
    """Return a console that prints text literally, and without colour under NO_COLOR."""
    colors: Any = None if os.environ.get("NO_COLOR") else "auto"
    return Console(file=stream, markup=False, highlight=False, emoji=False, color_system=colors)


def width() -> int:
    """Return the width of the terminal in columns."""
    return get_terminal_size().columns


def write(text: str) -> None:
    """Write to standard output, unbuffered."""
    _write(sys.stdout, text)


def say(sentence: str) -> None:
    """Write a sentence to standard output, in lines that fit a terminal."""
    write(wrapped(sentence) + "\n")


def tell(text: str) -> None:
    """Write a line that is not part of the result to standard error."""
    _write(sys.stderr, f"{text}\n")


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError as error:
        # Python flushes once more at exit: let that succeed silently.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise ClosedPipeError from error


def write_json(value: Any) -> None:
    """Write `value` as JSON. A terminal gets escapes for what is not printable."""
    is_utf8 = sys.stdout.encoding.lower().replace("-", "") == "utf8"
    text = json.dumps(value, indent=2, ensure_ascii=not is_utf8)
    if sys.stdout.isatty():
        text = "".join(c if c.isprintable() or c == "\n" else _json_escape(c) for c in text)
    write(f"{text}\n")


def _json_escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[n : n + 4]}" for n in range(0, len(units), 4))


def write_text(text: str) -> None:
    """Write `text` and a line end. A terminal gets escapes for what is not printable."""
    if sys.stdout.isatty():
        text = "\n".join(map(printable, text.split("\n")))
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")
    write(f"{text}\n")


def printable(value: object) -> str:
    """Return the text of `value`, with escapes for control characters, tabs and line ends."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(value)
    )


def write_rows(
    headings: Sequence[str], rows: Iterable[Sequence[object]], *, is_report: bool = False
) -> None:
    """Write a table on a terminal, elsewhere one line of tab-separated fields per row.

    :param is_report: write the headings elsewhere too: people read it in a log, and programs have
        ``--json``.
    """
    rows = list(rows)
    if not rows:
        return
    if not sys.stdout.isatty():
        lines = [headings, *rows] if is_report else rows
        write("".join("\t".join(map(printable, line)) + "\n" for line in lines))
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
            # One line per field, so that nothing is cut.
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
    """Return `text` in lines that fit a terminal, all but the first indented."""
    if not sys.stdout.isatty():
        return text
    return textwrap.fill(text, max(width() - 1, 20), subsequent_indent=indent)


def write_finding(level: str, what: str, advice: str) -> None:
    """Write a finding: lines that fit a terminal, elsewhere one line of three fields."""
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
    """Ask on the terminal, and end the command unless the answer is yes."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise CommandError(
            "standard input is not a terminal, so nobody can be asked; add --yes to go on"
        )
    sys.stderr.write(f"{question} [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise CommandError("not done", Exit.LEFT)
