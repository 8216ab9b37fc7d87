"""``docs/configuration.md`` has every variable and option that the code reads, and the defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest

from sqlalchemy_lucent import EncryptedJSON, KeyRegistry, KeySource, LucentSecrets
from sqlalchemy_lucent._cli.database import METADATA_VARIABLE, URL_VARIABLE
from sqlalchemy_lucent._environment import ENV_FILE_SUFFIX, ENV_OLDEST_VERSION, ENV_VARIABLES
from sqlalchemy_lucent._statements import BINARY_RESULTS
from sqlalchemy_lucent.binding import _TYPE_OPTIONS

from .pages import ROOT
from .structure import modules

PAGE = (ROOT / "docs/configuration.md").read_text("utf-8")
NOT_OPTIONS = {"self", "session", "engine", "load"}


def section(heading: str) -> str:
    return PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    lines = [line for line in section(heading).splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.name not in NOT_OPTIONS}


def test_every_variable_that_is_read_is_on_the_page() -> None:
    named = {
        name for row in rows("Environment variables") for name in re.findall(r"`([A-Z_]+)`", row[0])
    }
    by_literal = {
        name
        for path in modules().values()
        for name in re.findall(r'environ(?:\.get\(|\[)"(\w+)"', path.read_text("utf-8"))
    }
    oldest = {ENV_OLDEST_VERSION, ENV_OLDEST_VERSION + ENV_FILE_SUFFIX}
    assert named == {*ENV_VARIABLES, *oldest, URL_VARIABLE, METADATA_VARIABLE, *by_literal}
    assert by_literal == {"ALEMBIC_CONFIG", "NO_COLOR"}


def test_every_option_of_the_type_is_on_the_page_with_its_default() -> None:
    named = {}
    for option, default, _ in rows("Options of the type")[1:]:
        name = option.removesuffix("\\*").strip("`")
        assert option.endswith("\\*") is (name in _TYPE_OPTIONS), name
        named[name] = default.strip("`")
    # The context of a column that names none is said in words.
    assert named.pop("context") == "table.column"
    options = defaults(EncryptedJSON.__init__)
    assert options.pop("context") is None
    assert named == {name: repr(default) for name, default in options.items()}


@pytest.mark.parametrize("class_", [LucentSecrets, KeySource, KeyRegistry])
def test_every_option_of_a_store_is_on_the_page(class_: type[Any]) -> None:
    table = rows("Options of the stores and sources")[1:]
    classes = [row[0].strip("`") for row in table]
    names = [next(name for name in reversed(classes[: n + 1]) if name) for n in range(len(classes))]
    grouped = {
        name: {row[1].strip("`"): row[2].strip("`") for _, row in pairs}
        for name, pairs in groupby(zip(names, table, strict=True), key=lambda pair: pair[0])
    }
    options = defaults(class_.__init__)
    assert grouped[class_.__name__].keys() == options.keys()
    for name, default in options.items():
        if isinstance(default, float):
            assert grouped[class_.__name__][name] == repr(default)


def test_the_options_of_an_engine_are_on_the_page() -> None:
    named = " ".join(row[0] for row in rows("Options of an engine"))
    assert BINARY_RESULTS in named
    assert "stmt_cache_size" in named
    assert "stmt_cache_size" in modules()["_cli.doctor"].read_text("utf-8")
