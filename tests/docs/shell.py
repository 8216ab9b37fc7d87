"""A terminal that the commands of a page are typed into: exports and functions last."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from .pages import ROOT

_SCRIPT: Final = """
if [ -f {functions} ]; then source {functions}; fi
{command}
code=$?
declare -f > {functions}
env -0 > {environ}
exit $code
"""


def commands(text: str) -> Iterator[tuple[str, list[str]]]:
    """Give the commands of a console block, each with the lines that it is said to print."""
    found: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    yield from found


def reader_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with this Python first on the path, and the package to be imported."""
    return {
        **environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }


class Terminal:
    """Runs commands with bash in the folder `cwd`, one after the other.

    :param state: a folder for what lasts from one command to the next.
    """

    def __init__(self, cwd: Path, state: Path, environ: Mapping[str, str]) -> None:
        state.mkdir(exist_ok=True)
        self.cwd = cwd
        self._functions = state / "functions"
        self._exported = state / "environ"
        self.environ = reader_environment(environ)

    def run(self, text: str) -> int:
        """Run the commands of a console block, compare their output, and return their number.

        A command that is shown without output may print anything.
        """
        found = list(commands(text))
        for command, printed in found:
            output = self.output_of(command)
            if printed:
                assert printed == output.splitlines(), command
        return len(found)

    def output_of(self, command: str) -> str:
        """Run one command, and return what it printed; it has to succeed."""
        script = _SCRIPT.format(
            functions=shlex.quote(str(self._functions)),
            environ=shlex.quote(str(self._exported)),
            command=command,
        )
        code, output = self.execute(["bash", "-c", script])
        assert code == 0, f"{command}\n{output}"
        variables = self._exported.read_bytes().decode().split("\0")
        self.environ = dict(pair.split("=", 1) for pair in variables if "=" in pair)
        return output

    def execute(self, arguments: list[str]) -> tuple[int, str]:
        """Return the exit code of a process, and what it printed to either stream."""
        done = subprocess.run(
            arguments, cwd=self.cwd, env=self.environ, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr
