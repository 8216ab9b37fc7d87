"""What `pyproject.toml`, the changelog and the release check-list say, held against each other."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import sqlalchemy_lucent

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text("utf-8")


def requirements() -> list[Requirement]:
    """Return what an installation may need, without the package itself."""
    texts = [*PROJECT["dependencies"], *(text for extra in EXTRAS.values() for text in extra)]
    found = [Requirement(text) for text in texts]
    return [r for r in found if canonicalize_name(r.name) != PROJECT["name"]]


# -- dependencies ----------------------------------------------------------------------------------


def test_dependencies_have_a_lower_bound_and_no_other() -> None:
    named = {canonicalize_name(r.name) for r in requirements() if r.specifier}
    for requirement in requirements():
        assert {s.operator for s in requirement.specifier} <= {">="}, requirement
        assert canonicalize_name(requirement.name) in named, requirement


def test_every_lower_bound_is_what_the_oldest_environment_installs() -> None:
    lines = (ROOT / ".ci/oldest.txt").read_text("utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    oldest = {canonicalize_name(p.name): next(iter(p.specifier)).version for p in pins}
    for requirement in requirements():
        for bound in requirement.specifier:
            installed = oldest[canonicalize_name(requirement.name)]
            assert Version(installed) == Version(bound.version), requirement


def test_the_extra_all_has_every_other_extra() -> None:
    (everything,) = [Requirement(text) for text in EXTRAS["all"]]
    assert canonicalize_name(everything.name) == PROJECT["name"]
    assert everything.extras == set(EXTRAS) - {"all"}


def test_there_is_an_extra_for_each_database_of_the_readme() -> None:
    assert {"postgresql", "asyncpg", "mysql", "asyncmy", "aiosqlite"} <= set(EXTRAS)


def test_the_classifiers_and_the_readme_name_the_oldest_python() -> None:
    oldest = PROJECT["requires-python"].removeprefix(">=")
    prefix = "Programming Language :: Python :: 3."
    minors = sorted(
        int(text.removeprefix(prefix)) for text in PROJECT["classifiers"] if text.startswith(prefix)
    )
    assert oldest == f"3.{minors[0]}"
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert f"Python {oldest}+" in (ROOT / "README.md").read_text("utf-8")
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "sqlalchemy_lucent/py.typed").exists() or "site-packages" in str(
        sqlalchemy_lucent.__file__
    )


# -- the changelog ---------------------------------------------------------------------------------

SECTIONS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_changelog_has_the_form_of_keep_a_changelog() -> None:
    headings = re.findall(r"^## (.+)$", CHANGELOG, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\S+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert None not in released
    dated = [(Version(match[1]), date.fromisoformat(match[2])) for match in released if match]
    assert dated == sorted(dated, reverse=True)
    assert set(re.findall(r"^### (.+)$", CHANGELOG, re.MULTILINE)) <= SECTIONS


def test_no_release_in_the_changelog_is_newer_than_the_package() -> None:
    released = re.findall(r"^## \[(\d\S*)\]", CHANGELOG, re.MULTILINE)
    assert all(Version(text) <= Version(sqlalchemy_lucent.__version__) for text in released)


# -- the check-list --------------------------------------------------------------------------------

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small repository with what the first steps of the check-list read, all in order."""
    for name in (".ci/release.py", "sqlalchemy_lucent/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / ".ci/release.py", tmp_path / ".ci/release.py")
    (tmp_path / ".ci/run").write_text("#!/bin/sh\necho the gate ran\nexit 1\n")
    (tmp_path / ".ci/run").chmod(0o755)
    (tmp_path / "sqlalchemy_lucent/__init__.py").write_text('__version__ = "1.2.0"\n')
    write_changelog(tmp_path, f"## [Unreleased]\n\n## [1.2.0] - {today()}\n")
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "config", "user.name", "A Person")
    git(tmp_path, "config", "user.email", "person@example.com")
    commit(tmp_path)
    return tmp_path


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def git(checkout: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=checkout, check=True)


def commit(checkout: Path) -> None:
    git(checkout, "add", "--all")
    git(checkout, "commit", "--quiet", "--allow-empty", "--message", "A change")


def write_changelog(checkout: Path, text: str) -> None:
    (checkout / "CHANGELOG.md").write_text(f"# Changelog\n\n{text}")


def refusal(checkout: Path) -> str:
    done = subprocess.run(
        [sys.executable, ".ci/release.py"],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("not ready: ")
    return done.stderr


@needs_git
def test_the_check_list_comes_to_the_gate_and_stops_there_when_it_is_red(checkout: Path) -> None:
    assert "the gate is red" in refusal(checkout)


@needs_git
def test_the_check_list_wants_a_clean_tree_on_main(checkout: Path) -> None:
    (checkout / "new.txt").write_text("")
    assert "not clean" in refusal(checkout)
    commit(checkout)
    git(checkout, "switch", "--quiet", "--create", "side")
    assert "branch side" in refusal(checkout)


@needs_git
def test_the_check_list_wants_a_version_without_a_tag_and_newer_than_the_last(
    checkout: Path,
) -> None:
    git(checkout, "tag", "v1.1.0")
    assert "the gate is red" in refusal(checkout)
    git(checkout, "tag", "v1.2.0")
    assert "v1.2.0 exists" in refusal(checkout)
    git(checkout, "tag", "--delete", "v1.2.0")
    git(checkout, "tag", "v1.10.0")
    assert "older than the tag v1.10.0" in refusal(checkout)


@needs_git
@pytest.mark.parametrize(
    "changelog, fault",
    [
        ("## [Unreleased]\n", "has no release"),
        ("## [Unreleased]\n\n## [1.1.0] - 2020-01-02\n", "'## [1.1.0] - 2020-01-02'"),
        ("## [Unreleased]\n\n## [1.2.0] - 2020-01-02\n", "'## [1.2.0] - 2020-01-02'"),
        ("## [Unreleased]\n\n- Late\n\n## [1.2.0] - TODAY\n", "lines under Unreleased"),
    ],
)
def test_the_check_list_wants_the_version_in_the_changelog(
    checkout: Path, changelog: str, fault: str
) -> None:
    write_changelog(checkout, changelog.replace("TODAY", today()))
    commit(checkout)
    assert fault in refusal(checkout)


@needs_git
def test_the_check_list_wants_a_version_that_is_one(checkout: Path) -> None:
    for text in ('__version__ = "one"\n', "version = 1\n"):
        (checkout / "sqlalchemy_lucent/__init__.py").write_text(text)
        commit(checkout)
        assert "version" in refusal(checkout)
