"""Run the commands of ``docs/cli.md`` in a terminal, and compare what they print with the page."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.command import ESCAPE, Lucent, script, server

from .pages import ROOT, blocks
from .shell import Terminal, commands

PAGE = ROOT / "docs" / "cli.md"
ANYTHING = "…"


class RealTerminal(Terminal):
    """Runs commands on a terminal of 80 columns rather than through pipes."""

    def execute(self, arguments: list[str]) -> tuple[int, str]:
        """Return the exit code of a process, and what the terminal was sent."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        process = subprocess.Popen(
            arguments,
            cwd=self.cwd,
            env=self.environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            pass_fds=[server().fileno()],
        )
        os.close(theirs)
        raw = b""
        while True:
            try:
                raw += os.read(ours, 65536)
            except OSError:  # the other side is closed
                break
        os.close(ours)
        return process.wait(timeout=60), ESCAPE.sub("", raw.decode()).replace("\r\n", "\n")

    def lines_of(self, command: str) -> list[str]:
        """Return the lines that `command` leaves on the terminal."""
        lines = (line.rpartition("\r")[2].rstrip() for line in self.output_of(command).split("\n"))
        return [line for line in lines if line]


def matches(line: str, shown: str) -> bool:
    """Say whether `line` is what the page shows.

    An ellipsis stands for anything, and so columns may be of another width.
    """
    pattern = ".*".join(map(re.escape, shown.rstrip().split(ANYTHING)))
    return re.fullmatch(re.sub(r"(\\ )+", " +", pattern), line) is not None


@pytest.mark.slow
def test_the_commands_of_the_page_print_what_it_says(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    programs = tmp_path / "bin"
    programs.mkdir()
    lucent = programs / "lucent"
    lucent.write_text(script("lucent"))
    lucent.chmod(0o755)
    environ = Lucent(project).environ({"TERM": "xterm", "NO_COLOR": "1"})
    terminal = RealTerminal(project, tmp_path / "state", environ)
    terminal.environ["PATH"] = f"{programs}{os.pathsep}{terminal.environ['PATH']}"
    ran = 0
    for block in blocks(PAGE):
        if block.file is not None:
            name, text = block.file
            (project / name).write_text(text)
        elif block.info == "console":
            for command, printed in commands(block.text):
                lines = terminal.lines_of(command)
                # The terminal itself breaks no line: it is as long as it was written.
                assert len(lines) == len(printed), f"{command}\n" + "\n".join(lines)
                for line, shown in zip(lines, printed, strict=True):
                    assert matches(line, shown), f"{command} printed\n{line!r}, not\n{shown!r}"
                ran += 1
    assert ran > 20
