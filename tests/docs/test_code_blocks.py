"""Run the code and commands of the documentation, and compare what they print with the page.

Each page is one program: its blocks run top to bottom in an empty directory, with a new key in the
environment. Python runs in one module, a block with a caption is written to the file of that name,
and what a command exports is in the environment of what follows. A block that is not to run is
not marked as Python or as console.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

import httpx
import pytest
from sqlalchemy import Engine

from sqlalchemy_lucent import generate_master_key, set_default_keyring
from sqlalchemy_lucent._environment import ENV_KEY, ENV_VARIABLES

from .pages import PAGES, ROOT, blocks, functions, relative
from .shell import Terminal, commands

_NOT_RUN: Final = frozenset({"bash", "ini", "json", "sql", "text", "toml", "typescript"})
_DIRECTIVES: Final = frozenset({"{toctree}", "{eval-rst}", "{raw} html", "{include} ../README.md"})

# Their files and commands are made and run by tests of their own.
_PROJECTS: Final = frozenset(
    {"docs/alembic.md", "docs/benchmarks.md", "docs/celery.md", "docs/cli.md"}
)
# These install or test the whole project, which `.ci/run` and `make` do; or need a cluster, whose
# side of it test_containers.py checks; or a server, as in test_rotation_page.py.
_RUN_ELSEWHERE: Final = (
    ". .venv/bin/activate",
    ".venv/bin/",
    "git ",
    "kubectl ",
    "make ",
    "pip install ",
    "python3 -m venv ",
    "python rotate_by_workers.py",
)

# What a page needs beside it, as fixtures of conftest.py.
_SERVERS: Final = {
    "docs/key-managers.md": "key_managers",
    "docs/oauth-tokens.md": "oauth_provider",
}


@pytest.fixture
def page_module(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """A module for a page's code, as it is for a reader who begins at the top."""
    for variable in ENV_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(ENV_KEY, generate_master_key())
    directory = tmp_path / "page"
    directory.mkdir()
    monkeypatch.chdir(directory)
    monkeypatch.syspath_prepend(directory)
    set_default_keyring(None)
    # A real module, because dataclasses and pickle look their module up by name.
    module = ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    for value in vars(module).values():
        # A reader's process ends here, and closes what the page left open.
        if isinstance(value, Engine):
            value.dispose()
        elif type(value) is httpx.Client:
            value.close()


# Said by advanced-alchemy, when it is imported on SQLAlchemy 2.1.
@pytest.mark.filterwarnings("ignore:The declarative_mixin decorator")
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_code_runs_and_prints_what_the_page_says(
    page: Path,
    page_module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if relative(page) in _SERVERS:
        request.getfixturevalue(_SERVERS[relative(page)])
    terminal = Terminal(Path.cwd(), tmp_path / "state", os.environ)
    printed = None
    for block in blocks(page):
        if block.is_output:
            assert printed is not None, f"{relative(page)}:{block.line}: output of no code"
            assert printed == block.text, f"{relative(page)}:{block.line}: the output differs"
            printed = None
        elif block.file is not None and relative(page) not in _PROJECTS:
            name, text = block.file
            Path(name).write_text(text)
        elif block.info == "console" and relative(page) not in _PROJECTS:
            _run_commands(block.text, terminal, monkeypatch)
        elif block.quotes is not None:
            path, name = block.quotes
            assert block.text == functions(ROOT / path)[name] + "\n", f"{path} has another {name}"
        elif block.info == "python":
            # Padded, so that a traceback gives the line of the page.
            source = "\n" * (block.line - 1) + block.text
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(source, str(page), "exec"), vars(page_module))
            printed = stdout.getvalue()


def _run_commands(text: str, terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    if all(command.startswith(_RUN_ELSEWHERE) for command, _ in commands(text)):
        return
    terminal.run(text)
    for variable in ENV_VARIABLES:
        if variable in terminal.environ:
            monkeypatch.setenv(variable, terminal.environ[variable])
        else:
            monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_block_has_a_language_that_is_known(page: Path) -> None:
    # Python under another name, or in a page's directive, would not be run.
    unknown = [
        f"{relative(page)}:{block.line}: {block.info!r}"
        for block in blocks(page)
        if block.info not in _NOT_RUN | _DIRECTIVES | {"python", "console", "yaml"}
        and block.file is None
    ]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_no_block_of_text_is_python(page: Path) -> None:
    # It would be Python that nobody runs.
    disguised = [
        f"{relative(page)}:{block.line}"
        for block in blocks(page)
        if block.info == "text"
        and any(
            line.startswith(("import ", "from ", "def ", "class ", "@"))
            for line in block.text.splitlines()
        )
        and 'from "' not in block.text
    ]
    assert not disguised


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_output_mark_has_its_text_block(page: Path) -> None:
    outputs = [block for block in blocks(page) if block.is_output]
    assert page.read_text("utf-8").count("<!-- output -->") == len(outputs)
    assert all(block.info == "text" for block in outputs)


def test_the_guides_have_code() -> None:
    without = {
        relative(page)
        for page in PAGES
        if not any(b.info == "python" or b.file is not None for b in blocks(page))
    }
    assert without <= {
        "docs/CONTRIBUTING.md",
        "docs/SECURITY.md",
        "docs/benchmarks.md",
        "docs/cli.md",
        "docs/comparison.md",
        "docs/demo-web.md",
        "docs/errors.md",
        "docs/index.md",
        "docs/admin-and-logs.md",
        "docs/protection.md",
        "docs/modules.md",
        "docs/reference.md",
        "docs/rotation-promises.md",
    }


def test_the_example_in_the_readme_is_short() -> None:
    (readme, *_) = PAGES
    example = next(block for block in blocks(readme) if block.info == "python")
    assert len(example.text.splitlines()) <= 20
