"""The check-list of a release: each step in order, up to the first that fails.

It builds and checks and uploads nothing. Its last lines are what is left to do by hand. Run it as
``make checklist``, so that its Python is that of ``.venv``.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NoReturn

from packaging.version import InvalidVersion, Version

ROOT: Final = Path(__file__).parents[1]
VERSION_FILE: Final = ROOT / "sqlalchemy_lucent/__init__.py"
_RELEASE_HEADING: Final = re.compile(r"^## \[(?P<version>[^]]+)\] - (?P<date>\S+)$", re.MULTILINE)


def stop(sentence: str) -> NoReturn:
    sys.exit(f"not ready: {sentence}")


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        stop(f"`git {' '.join(arguments)}` failed: {done.stderr.strip()}")
    return done.stdout.strip()


def run(sentence: str, *command: str | Path) -> None:
    """Run `command` in the checkout, or stop with `sentence`."""
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        stop(sentence)


def version() -> Version:
    match = re.search(r'^__version__ = "([^"]+)"$', VERSION_FILE.read_text("utf-8"), re.MULTILINE)
    if match is None:
        stop(f"{VERSION_FILE.name} has no line with __version__")
    try:
        return Version(match[1])
    except InvalidVersion:
        stop(f"__version__ is {match[1]!r}, which is not a version")


def clean_tree() -> None:
    changed = git("status", "--porcelain")
    if changed:
        stop(f"the working tree is not clean; commit or remove:\n{changed}")
    branch = git("rev-parse", "--abbrev-ref", "HEAD")
    if branch != "main":
        stop(f"this is branch {branch}; releases are made from main")


def tag_is_free() -> None:
    new = version()
    tags = git("tag", "--list", "v*").split()
    if f"v{new}" in tags:
        stop(f"the tag v{new} exists; raise __version__ in {VERSION_FILE.relative_to(ROOT)}")
    newer = [tag for tag in tags if Version(tag.removeprefix("v")) > new]
    if newer:
        stop(f"version {new} is older than the tag {newer[-1]}")


def changelog_names_the_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    release = _RELEASE_HEADING.search(text)
    today = datetime.now(UTC).date().isoformat()
    wanted = f"## [{version()}] - {today}"
    if release is None:
        stop(f"CHANGELOG.md has no release; put {wanted!r} below an empty '## [Unreleased]'")
    if release.group() != wanted:
        stop(f"the newest release in CHANGELOG.md is {release.group()!r}, not {wanted!r}")
    unreleased = text[: release.start()].partition("## [Unreleased]")[2].strip()
    if unreleased:
        stop("CHANGELOG.md has lines under Unreleased; they belong to the release, or to later")


def gate_is_green() -> None:
    run("the gate is red; its message stands above", ".ci/run")


def tests_reach_the_package() -> None:
    run("the tests reach too little of the package", "make", "--silent", "coverage")


def oldest_versions_work() -> None:
    run("a test fails on the oldest versions", "make", "--silent", "oldest")


def newest_postgresql_works() -> None:
    run("a test fails on the newest PostgreSQL", "make", "--silent", "newest")


def each_python_works() -> None:
    run("a unit test fails on one of the Pythons", "make", "--silent", "pythons")


def long_tests_pass() -> None:
    run("a test fails in its long form", "make", "--silent", "test-long")


def release_tests_pass() -> None:
    run("another library no longer does what the docs say", "make", "--silent", "test-release")


def no_mutant_survives() -> None:
    run(
        "a mutant survives without an explanation; it stands above",
        sys.executable,
        ".ci/mutants.py",
    )


def builds_are_equal() -> None:
    run("two builds differ", sys.executable, ".ci/reproducible.py")
    run("`make wheel` failed", "make", "--silent", "wheel")


def wheel_works_alone() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    if wheel.name.split("-")[1] != str(version()):
        stop(f"dist/ holds {wheel.name}, which is not version {version()}")
    with tempfile.TemporaryDirectory() as directory:
        python = Path(directory, "env/bin/python")
        run("no environment could be made", sys.executable, "-m", "venv", python.parents[1])
        run("the wheel does not install", python, "-m", "pip", "install", "--quiet", wheel)
        script = ROOT / ".ci/wheel_works.py"
        # From elsewhere: the checkout's own package must not be what is imported.
        if subprocess.run([python, script], cwd=directory, check=False).returncode:
            stop("the wheel does not work alone")


def bill_of_materials() -> None:
    (wheel,) = (ROOT / "dist").glob("*.whl")
    run("there is no bill of materials", sys.executable, ".ci/inventory.py", wheel)


STEPS: Final[tuple[tuple[str, Callable[[], None]], ...]] = (
    ("the tree is clean, on main", clean_tree),
    ("the version is new", tag_is_free),
    ("the changelog names it, dated today", changelog_names_the_version),
    ("the gate is green", gate_is_green),
    ("the tests reach the package", tests_reach_the_package),
    ("the oldest versions work", oldest_versions_work),
    ("the newest PostgreSQL works", newest_postgresql_works),
    ("each Python works", each_python_works),
    ("the long forms of the tests pass", long_tests_pass),
    ("other libraries do what the docs say", release_tests_pass),
    ("no unexplained mutant survives", no_mutant_survives),
    ("two builds have the same bytes", builds_are_equal),
    ("the wheel works alone", wheel_works_alone),
    ("the bill of materials is written", bill_of_materials),
    ("the tree is still clean", clean_tree),
)


def main() -> None:
    for number, (title, step) in enumerate(STEPS, 1):
        print(f"\n[{number}/{len(STEPS)}] {title}", flush=True)
        step()
    print(f"""
Version {version()} is ready. By hand, in this order:
    git tag --sign v{version()} --message "Version {version()}"
    git push origin main v{version()}
    .venv/bin/twine upload dist/*.whl dist/*.tar.gz
    attach dist/*.cdx.json to the release of the tag""")


if __name__ == "__main__":
    main()
