"""The HTML of the documentation: it builds, its links lead somewhere, and it fits a phone.

Links to other hosts are not followed, because a test must not need the network: their form is
checked, and that each host is one that the documentation means to point to.
"""

from __future__ import annotations

import inspect
import json
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import pytest

import sqlalchemy_lucent
from sqlalchemy_lucent import migrations
from tests.conftest import LONG

from . import screens
from .pages import PAGES, ROOT, links

pytestmark = pytest.mark.slow

HOSTS: Final = {
    "github.com",  # of the theme
    "keepachangelog.com",
    "pradyunsg.me",  # of the theme
    "semver.org",
    "www.sphinx-doc.org",  # of the theme
}


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the documentation was built into."""
    pytest.importorskip("sphinx", reason="Sphinx is in the dependency group docs")
    target = tmp_path_factory.mktemp("html")
    environ = {name: value for name, value in os.environ.items() if name != "INTERSPHINX"}
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "--fail-on-warning", "-q", "-b", "html", "docs", target],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


class _Page(HTMLParser):
    """The anchors and links of a page."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: set[str] = set()
        self.feed(file.read_text("utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and tag != "base":
                self.links.add(value)


def test_every_link_within_leads_to_a_file_and_an_anchor(html: Path) -> None:
    pages = {file: _Page(file) for file in html.rglob("*.html")}
    assert len(pages) > 20
    broken = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchors = pages[target].anchors if target in pages else set()
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in anchors
            ):
                broken.append(f"{file.relative_to(html)}: {link}")
    assert not broken


def test_every_link_to_outside_is_https_and_to_a_known_host(html: Path) -> None:
    in_html = {link for file in html.rglob("*.html") for link in _Page(file).links}
    in_markdown = {link for page in (*PAGES, ROOT / "CHANGELOG.md") for link in links(page)}
    outside = {link for link in in_html | in_markdown if urlsplit(link).netloc}
    strange = {
        link
        for link in outside
        if urlsplit(link).scheme != "https" or urlsplit(link).netloc not in HOSTS
    }
    assert not strange


@pytest.mark.parametrize(
    "word",
    ["sqlmodel", "admin", "sentry", "lazy", "secretstr", "pgbouncer", "replica", "factory"],
)
def test_the_search_finds(html: Path, word: str) -> None:
    from sphinx.search.en import SearchEnglish

    text = (html / "searchindex.js").read_text("utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    stem = SearchEnglish({}).stem(word)
    assert index["terms"].get(stem) or index["titleterms"].get(stem)


def public_members() -> Iterator[str]:
    """The public names, and the documented public members of the classes that are used directly."""
    for name in set(sqlalchemy_lucent.__all__) - {"__version__"}:
        yield f"sqlalchemy_lucent.{name}"
        thing = getattr(sqlalchemy_lucent, name)
        # The others are used as columns and models, whose methods are SQLAlchemy's to call.
        if inspect.isclass(thing) and name in {
            "AsyncLucentSecrets",
            "FailedRow",
            "Keyring",
            "Lucent",
            "LucentConfig",
            "LucentSecrets",
            "RotationProgress",
            "RotationReport",
            "SecretAccess",
            "SecretInfo",
            "SecretKey",
            "SecretsConfig",
            "Sealed",
            "StatusReport",
            "StatusRow",
            "VerifyReport",
        }:
            for member, value in vars(thing).items():
                if not member.startswith("_") and _is_documented(value):
                    yield f"sqlalchemy_lucent.{name}.{member}"


def _is_documented(value: Any) -> bool:
    function = getattr(value, "__func__", value)
    return (inspect.isfunction(function) or isinstance(value, property)) and bool(
        (function.__doc__ or "").strip() and "Internal" not in (function.__doc__ or "")
    )


def test_the_reference_has_every_public_name_and_method(html: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((html / "objects.inv").read_bytes(), uri="")
    documented = {name for objects in inventory.data.values() for name in objects}
    assert set(public_members()) - documented == set()


def test_the_reference_has_every_function_of_migrations(html: Path) -> None:
    from sphinx.util.inventory import InventoryFile

    inventory = InventoryFile.loads((html / "objects.inv").read_bytes(), uri="")
    documented = {name for objects in inventory.data.values() for name in objects}
    functions = {
        f"{migrations.__name__}.{name}"
        for name, function in inspect.getmembers(migrations, inspect.isfunction)
        if function.__module__.startswith(migrations.__name__) and not name.startswith("_")
    }
    functions.remove(f"{migrations.__name__}.setup")  # for Alembic to call
    assert functions - documented == set()


@pytest.mark.parametrize("value", ["", "1"])
def test_other_projects_are_linked_to_where_it_is_asked_for(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INTERSPHINX", value)
    with warnings.catch_warnings():
        conf = runpy.run_path(str(ROOT / "docs" / "conf.py"))
    assert ("sphinx.ext.intersphinx" in conf["extensions"]) is bool(value)
    assert set(conf.get("intersphinx_mapping", ())) == (
        {"python", "sqlalchemy", "alembic", "cryptography"} if value else set()
    )


@pytest.mark.skipif(screens.missing() is not None, reason=str(screens.missing()))
def test_what_leaves_the_screen_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    with screens.phone(dark=False) as browser:
        for style, excess in (("width: 100px", False), ("width: 900px", True)):
            page.write_text(
                '<meta name="viewport" content="width=device-width">'
                f'<article><p style="{style}">text</p></article>'
            )
            assert bool(browser.excess(page)) is excess


@pytest.mark.skipif(screens.missing() is not None, reason=str(screens.missing()))
@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True] if LONG else [False])
def test_every_page_fits_a_phone(html: Path, dark: bool) -> None:
    wide = {}
    with screens.phone(dark=dark) as browser:
        for file in sorted(html.glob("*.html")):
            if excess := browser.excess(file):
                wide[file.name] = excess
    assert not wide
