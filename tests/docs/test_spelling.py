"""The words of the documentation are English, or in ``docs/words.txt``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from spellchecker import SpellChecker

from .pages import PAGES, ROOT, prose, relative

WORDS = ROOT / "docs" / "words.txt"
# Names the processor and libraries of whoever ran the benchmarks.
_GENERATED = ROOT / "docs" / "benchmarks.md"
_SPELT = [page for page in (*PAGES, ROOT / "CHANGELOG.md") if page != _GENERATED]
_NOT_PROSE = re.compile(r"<!--.*?-->|`[^`]*`|\]\([^)]*\)|https?://\S+", re.DOTALL)
_WORD = re.compile(r"[A-Za-zÀ-ÿ]+(?:'[a-z]+)?")


def words(text: str) -> set[str]:
    """The words of a page's prose, in lower case and without a possessive ending."""
    found = _WORD.findall(_NOT_PROSE.sub(" ", text))
    return {word.lower().removesuffix("'s") for word in found}


@pytest.fixture(scope="module")
def english() -> SpellChecker:
    return SpellChecker(language="en", distance=1)


@pytest.fixture(scope="module")
def listed() -> list[str]:
    return WORDS.read_text("utf-8").split()


@pytest.mark.parametrize("page", _SPELT, ids=relative)
def test_every_word_is_known(page: Path, english: SpellChecker, listed: list[str]) -> None:
    unknown = english.unknown(words(prose(page))) - set(listed)
    assert not unknown, "correct them, or add them to docs/words.txt"


def test_a_misspelt_word_is_not_known(english: SpellChecker) -> None:
    assert english.unknown(words("Seal qeyrings by `nonzze` [of valjue](keyz.md).")) == {
        "qeyrings",
        "valjue",
    }


def test_the_list_is_in_order_and_has_no_word_twice(listed: list[str]) -> None:
    assert listed == sorted(set(listed))


def test_the_list_has_no_word_that_english_has(english: SpellChecker, listed: list[str]) -> None:
    assert not english.known(listed)
