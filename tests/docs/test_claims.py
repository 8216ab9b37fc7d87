"""Each claim of some pages has its tests, named in a comment in the source of the page.

That the tests exist is checked for all pages by ``test_links.py``.
"""

from __future__ import annotations

import re

import pytest

from .pages import ROOT, functions, named_tests, prose

PROMISES = ROOT / "docs/rotation-promises.md"

# Every test of these files is of a claim on the page.
FILES = [
    ("docs/protection.md", "tests/docs/test_protection.py"),
    ("docs/rotation-promises.md", "tests/integration/test_rotation_concurrency.py"),
    ("docs/rotation-promises.md", "tests/integration/test_rotation_faults.py"),
    ("docs/rotation-promises.md", "tests/integration/test_rotation_rows.py"),
    ("docs/rotation-promises.md", "tests/integration/test_rotators.py"),
]


@pytest.mark.parametrize(("page", "file"), FILES)
def test_the_page_names_every_test_of_the_file(page: str, file: str) -> None:
    named = {name for path, name in named_tests(ROOT / page) if path == file}
    assert {name for name in functions(ROOT / file) if name.startswith("test_")} <= named


def test_every_promise_names_a_test() -> None:
    promises = re.split(r"^- (?=\*\*)", prose(PROMISES), flags=re.MULTILINE)[1:]
    assert len(promises) > 20
    assert [promise for promise in promises if "<!-- tests/" not in promise] == []
