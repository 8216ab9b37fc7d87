"""Build the project of ``docs/alembic.md`` from the page, and run its commands top to bottom."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import alembic
import pytest

from sqlalchemy_lucent.keyring import ENV_VARIABLES

from .pages import ROOT, blocks

PAGE = ROOT / "docs" / "alembic.md"
CAPTION = ":caption: "

# Exports and functions last from one command to the next, as in a terminal.
SHELL = """
if [ -f {state} ]; then source {state}; fi
{command}
code=$?
{{ export -p; declare -f; }} > {state}
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


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, alembic.__version__.split(".")[:2])) < (1, 18),
    reason="Alembic takes comparators of others from 1.18 on",
)
def test_the_project_of_the_page_is_taken_through_its_life(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    environ = {name: value for name, value in os.environ.items() if name not in ENV_VARIABLES}
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    environ["PYTHONPATH"] = str(ROOT)
    ran = 0
    for block in blocks(PAGE):
        if block.info.startswith("{code-block}"):
            caption, _, text = block.text.partition("\n")
            assert caption.startswith(CAPTION), f"line {block.line}: a file without a name"
            (project / caption.removeprefix(CAPTION)).write_text(text)
        elif block.info == "console":
            for command, printed in commands(block.text):
                script = SHELL.format(state=tmp_path / "state", command=command)
                done = subprocess.run(
                    ["bash", "-c", script],
                    cwd=project,
                    env=environ,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                output = done.stdout + done.stderr
                assert done.returncode == 0, f"{command}\n{output}"
                for line in printed:
                    assert line in output, f"{command} did not print {line!r}, but\n{output}"
                ran += 1
    assert ran > 15
