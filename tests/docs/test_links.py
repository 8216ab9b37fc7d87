"""What the documentation points to exists: files, headings, tests and Makefile targets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sqlalchemy_lucent

from .pages import PAGES, ROOT, blocks, functions, links, named_tests, prose, relative

_README = ROOT / "README.md"
_EXTERNAL = ("https://", "http://", "mailto:")


def _anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        if target.startswith(_EXTERNAL):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_every_test_that_is_named_exists(page: Path) -> None:
    missing = []
    for path, name in named_tests(page):
        file = ROOT / path
        if not file.is_file() or (name is not None and name not in functions(file)):
            missing.append(f"{path}::{name}")
    assert not missing


def test_every_file_named_in_the_readme_exists() -> None:
    named = re.findall(r"`([\w./-]+(?:/|\.(?:md|toml|py|txt)))`", prose(_README))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for page in PAGES:
        text = prose(page) + "".join(b.text for b in blocks(page) if b.info == "console")
        named = set(re.findall(r"(?:^\$ |`)make ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, relative(page)


def test_the_reference_names_every_public_name() -> None:
    reference = (ROOT / "docs/reference.md").read_text("utf-8")
    documented = set(
        re.findall(
            r"auto(?:class|function|exception):: sqlalchemy_lucent\.(\w+)$", reference, re.MULTILINE
        )
    )
    assert documented == set(sqlalchemy_lucent.__all__) - {"__version__"}


def test_the_error_page_names_every_error() -> None:
    errors = (ROOT / "docs/errors.md").read_text("utf-8")
    missing = [
        name
        for name in sqlalchemy_lucent.__all__
        if name.endswith("Error") and f"`{name}`" not in errors
    ]
    assert not missing
