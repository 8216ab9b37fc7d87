"""Run the Python of the documentation, and compare what it prints with what the page says.

Each page is one program: its blocks run top to bottom in one module, in an empty directory, with a
new key in the environment. A block that is not to run is not marked as Python.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from sqlalchemy import Engine

from sqlalchemy_lucent import generate_master_key, set_default_keyring
from sqlalchemy_lucent.keyring import ENV_KEY, ENV_VARIABLES

from .pages import PAGES, blocks, relative

_NOT_RUN = frozenset({"text", "console", "ini", "toml", "sql", "bash"})
_DIRECTIVES = frozenset({"{toctree}", "{eval-rst}", "{raw} html"})


@pytest.fixture
def page_module(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """A module for a page's code, as it is for a reader who begins at the top."""
    for variable in ENV_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(ENV_KEY, generate_master_key())
    monkeypatch.chdir(tmp_path)
    set_default_keyring(None)
    # A real module, because dataclasses and pickle look their module up by name.
    module = ModuleType("documentation_page")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield module
    for value in vars(module).values():
        # A reader's process ends here, and closes what the page left open.
        if isinstance(value, Engine):
            value.dispose()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_code_runs_and_prints_what_the_page_says(page: Path, page_module: ModuleType) -> None:
    printed = None
    for block in blocks(page):
        if block.is_output:
            assert printed is not None, f"{relative(page)}:{block.line}: output of no code"
            assert printed == block.text, f"{relative(page)}:{block.line}: the output differs"
            printed = None
        elif block.info == "python":
            # Padded, so that a traceback gives the line of the page.
            source = "\n" * (block.line - 1) + block.text
            with contextlib.redirect_stdout(io.StringIO()) as stdout:
                exec(compile(source, str(page), "exec"), vars(page_module))
            printed = stdout.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_block_has_a_language_that_is_known(page: Path) -> None:
    # Python under another name, or in a page's directive, would not be run.
    unknown = [
        f"{relative(page)}:{block.line}: {block.info!r}"
        for block in blocks(page)
        if block.info != "python" and block.info not in _NOT_RUN and not block.info.startswith("{")
    ]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_output_mark_has_its_text_block(page: Path) -> None:
    outputs = [block for block in blocks(page) if block.is_output]
    assert page.read_text("utf-8").count("<!-- output -->") == len(outputs)
    assert all(block.info == "text" for block in outputs)


def test_the_pages_that_teach_have_code() -> None:
    with_code = {
        relative(page) for page in PAGES if any(block.info == "python" for block in blocks(page))
    }
    assert with_code >= {
        "README.md",
        "docs/bytes.md",
        "docs/from-lucent.md",
        "docs/quickstart.md",
        "docs/replacing-json.md",
        "docs/value.md",
    }


def test_the_example_in_the_readme_is_short() -> None:
    (readme, *_) = PAGES
    example = next(block for block in blocks(readme) if block.info == "python")
    assert len(example.text.splitlines()) <= 20
