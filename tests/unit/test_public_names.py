"""What ``import sqlalchemy_lucent`` gives, and what it leaves alone."""

from __future__ import annotations

import ast
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sqlalchemy_lucent

ROOT = Path(__file__).parents[2]
SOURCE = ast.parse(Path(sqlalchemy_lucent.__file__).read_text("utf-8"))

CONTRACT = {
    "AsyncLucentSecrets", "EncryptedJSON", "Keyring", "Lucent", "LucentBase", "LucentConfig",
    "LucentError", "LucentSecret", "LucentSecretMixin", "LucentSecrets", "RotationReport",
    "SecretKey", "SecretsConfig", "StatusReport", "VerifyReport", "arotate", "default_keyring",
    "generate_master_key", "retire_check", "rotate", "set_default_keyring", "status", "verify",
}  # fmt: skip


def test_all_is_sorted_and_without_duplicates() -> None:
    assert sqlalchemy_lucent.__all__ == sorted(set(sqlalchemy_lucent.__all__))


def test_all_is_complete() -> None:
    at_once = {
        alias.name
        for node in SOURCE.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    later = set(sqlalchemy_lucent._AT_FIRST_USE)
    assert not at_once & later
    assert at_once | later | {"__version__"} == set(sqlalchemy_lucent.__all__)


def test_what_type_checkers_see_is_what_is_imported_at_first_use() -> None:
    (block,) = (
        node
        for node in SOURCE.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    seen = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == sqlalchemy_lucent._AT_FIRST_USE


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        getattr(sqlalchemy_lucent, "nothing")  # noqa: B009


def test_all_has_the_names_of_the_contract() -> None:
    assert set(sqlalchemy_lucent.__all__) >= CONTRACT


@pytest.mark.parametrize("name", sqlalchemy_lucent.__all__)
def test_every_exported_name_resolves_and_is_documented(name: str) -> None:
    value = getattr(sqlalchemy_lucent, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        assert value.__module__.startswith("sqlalchemy_lucent.")


def test_star_import_gives_all() -> None:
    names: dict[str, object] = {}
    exec("from sqlalchemy_lucent import *", names)
    assert set(names) - {"__builtins__"} == set(sqlalchemy_lucent.__all__)


def test_the_package_holds_exports_only() -> None:
    allowed = (ast.ImportFrom, ast.Assign, ast.Expr)
    others = [node for node in SOURCE.body if not isinstance(node, allowed)]
    assert [ast.unparse(node).splitlines()[0] for node in others] == [
        "if TYPE_CHECKING:",
        "def __dir__() -> list[str]:",
        "if not TYPE_CHECKING:",
    ]


def fresh(code: str) -> list[str]:
    """Return the words that Python code prints in a process of its own, without any key."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("LUCENT_SECRETS")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_each_name_is_imported_at_its_first_use_and_kept() -> None:
    printed = fresh("""if True:
        import sys
        import sqlalchemy_lucent as package
        print("sqlalchemy.orm" in sys.modules, set(package._AT_FIRST_USE) & set(vars(package)))
        assert set(package.__all__) <= set(dir(package))
        assert package.rotation is sys.modules["sqlalchemy_lucent.rotation"]
        for name in package.__all__:
            assert getattr(package, name) is vars(package)[name], name
    """)
    assert printed == ["False", "set()"]


def test_importing_loads_nothing_that_only_some_users_need() -> None:
    loaded = fresh(
        "import sys, sqlalchemy_lucent; print(*{name.split('.')[0] for name in sys.modules})"
    )
    assert "sqlalchemy_lucent" in loaded
    optional = {"alembic", "rich", "typer", "pydantic", "hypothesis", "pytest", "psycopg", "mako"}
    assert not optional & set(loaded)


def test_importing_does_not_need_greenlet() -> None:
    loaded = fresh(
        "import sys; sys.modules['greenlet'] = None; import sqlalchemy_lucent; print(*sys.modules)"
    )
    assert "sqlalchemy.ext.asyncio" not in loaded
