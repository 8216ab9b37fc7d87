"""The imports of the package go one way, and ``docs/modules.md`` shows them as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from .structure import (
    BELOW,
    COMMAND,
    CORE,
    ENTRY_POINTS,
    PAGE,
    Import,
    When,
    import_layers,
    imports,
    modules,
    package_of,
    render,
)

MOST_LINES = 500
MAY_BE_LONGER = {"repository"}

FILES = modules()
IMPORTS = imports(FILES)


def shown(wrong: list[Import]) -> list[str]:
    return [f"{each.by} imports {each.module}: {each.name or '*'}" for each in wrong]


def is_private_to_another(each: Import) -> bool:
    """Whether this takes what is private to a sub-package, or a private name of a core module."""
    package = package_of(each.module)
    if package == package_of(each.by):
        return False
    stem = each.module.rpartition(".")[2]
    private_module = package != CORE and stem.startswith("_") and stem != "__init__"
    return private_module or (each.name or "").startswith("_")


def test_the_page_shows_the_modules_and_imports_of_today() -> None:
    page = PAGE.read_text("utf-8")
    assert page == render(page), f"run: {COMMAND}"


def test_imports_between_packages_go_one_way() -> None:
    assert not shown(
        [
            each
            for each in IMPORTS
            if each.by not in ENTRY_POINTS
            and package_of(each.module) not in BELOW[package_of(each.by)] | {package_of(each.by)}
        ]
    )


def test_no_package_imports_what_another_keeps_private() -> None:
    assert not shown([each for each in IMPORTS if is_private_to_another(each)])


def test_no_modules_import_each_other_while_they_are_imported() -> None:
    layers = import_layers(IMPORTS, FILES)  # raises if there is a cycle
    assert sorted(module for layer in layers for module in layer) == sorted(FILES)


def test_no_module_is_long() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in FILES.items()}
    assert not {
        name: length
        for name, length in lengths.items()
        if length > MOST_LINES and name not in MAY_BE_LONGER
    }


def test_every_import_is_found_with_what_carries_it_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.py"
    path.write_text(
        "from __future__ import annotations\n"
        "from typing import TYPE_CHECKING\n"
        "import sqlalchemy_lucent as lucent\n"
        "from .. import _sql\n"
        "from . import targets\n"
        "from .._database.relations import relation_of, _hidden\n"
        "if TYPE_CHECKING:\n"
        "    from ..types import EncryptedJSON\n"
        "else:\n"
        "    from ..keyring import Keyring\n"
        "class Rows:\n"
        "    def read(self):\n"
        "        from sqlalchemy_lucent.rotation import rotate\n"
    )
    assert [
        each[1:] for each in imports({**FILES, "rotation.rows": path}) if each.by == "rotation.rows"
    ] == [
        ("__init__", None, When.IMPORT),
        ("_sql", None, When.IMPORT),
        ("rotation.targets", None, When.IMPORT),
        ("_database.relations", "relation_of", When.IMPORT),
        ("_database.relations", "_hidden", When.IMPORT),
        ("types", "EncryptedJSON", When.NEVER),
        ("keyring", "Keyring", When.IMPORT),
        ("rotation.__init__", "rotate", When.CALL),
    ]


@pytest.mark.parametrize(
    ("each", "private"),
    [
        (Import("_cli.rotate", "rotation._run", "run", When.IMPORT), True),
        (Import("_cli.rotate", "rotation._run", None, When.CALL), True),
        (Import("_cli.rotate", "rotation.rows", "_read", When.NEVER), True),
        (Import("rotation.rows", "types", "_codec", When.IMPORT), True),
        (Import("rotation.rows", "_sql", "key_version", When.IMPORT), False),
        (Import("rotation.rows", "rotation._run", "_read", When.IMPORT), False),
        (Import("_cli.rotate", "rotation.__init__", "rotate", When.IMPORT), False),
    ],
)
def test_a_private_module_or_name_of_another_package_is_noticed(
    each: Import, private: bool
) -> None:
    assert is_private_to_another(each) is private
