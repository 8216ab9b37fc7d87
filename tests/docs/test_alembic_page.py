"""``docs/alembic.md`` is a recording: run it again, and compare what its commands print."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import script, server

from .pages import ROOT

PAGE = """\
```{code-block} python
:caption: greet.py

print("hello", flush=True)
```

```console
$ export NAME=world
$ python greet.py && echo $NAME
goodbye
```
"""


def record(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "docs" / "record_alembic.py", *arguments]
    passed = [server().fileno()]
    return subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=passed)


@pytest.mark.slow
def test_the_commands_of_the_page_print_what_it_says(tmp_path: Path) -> None:
    alembic = tmp_path / "alembic"
    alembic.write_text(script("alembic"))
    alembic.chmod(0o755)

    done = record("--check", "--programs", tmp_path)

    assert done.returncode == 0, done.stderr


def test_a_page_that_has_something_else_is_told_apart_and_mended(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE)

    done = record("--check", page)
    assert done.returncode == 1
    assert "-goodbye\n+hello\n+world" in done.stderr

    assert record(page).returncode == 0
    assert page.read_text() == PAGE.replace("goodbye", "hello\nworld")
    assert record("--check", page).returncode == 0


def test_a_command_that_fails_ends_the_recording(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n$ echo why >&2; false\n$ echo more\n```\n")

    done = record(page)

    assert done.returncode == 1
    assert "why" in done.stderr
    assert "echo more\n```" in page.read_text()
