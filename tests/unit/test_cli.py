"""The parts of the command that need no process: URLs, and text that is safe to print."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sqlalchemy_lucent._cli.database import connected, find_url, where
from sqlalchemy_lucent._cli.errors import CommandError
from sqlalchemy_lucent._cli.terminal import counted, printable

PASSWORD = "pa55w0rd-never-shown"


@pytest.fixture(autouse=True)
def an_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("DATABASE_URL", "ALEMBIC_CONFIG"):
        monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    "given, expected",
    [
        ("postgresql://u@h/db", "postgresql+psycopg://u@h/db"),
        ("postgres://u@h/db", "postgresql+psycopg://u@h/db"),
        ("postgresql+psycopg_async://u@h/db", "postgresql+psycopg://u@h/db"),
        (
            "postgresql+asyncpg://u@h/db?ssl=require&prepared_statement_cache_size=0",
            "postgresql+psycopg://u@h/db?sslmode=require",
        ),
        ("sqlite+aiosqlite:///app.db", "sqlite+pysqlite:///app.db"),
        ("mysql+asyncmy://u@h/db?charset=utf8mb4", "mysql+pymysql://u@h/db?charset=utf8mb4"),
        ("mariadb+aiomysql://u@h/db", "mariadb+pymysql://u@h/db"),
        ("mysql+mysqldb://u@h/db", "mysql+mysqldb://u@h/db"),
    ],
)
def test_a_url_is_taken_with_a_synchronous_driver(given: str, expected: str) -> None:
    assert find_url(given).render_as_string(hide_password=False) == expected


@pytest.mark.parametrize(
    "name, module, advice",
    [
        ("mysql+mysqldb", "MySQLdb", ": pip install mysqlclient"),
        ("postgresql+pg8000", "pg8000", ""),
    ],
)
def test_a_driver_that_is_missing_is_named_with_its_package(
    name: str, module: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CommandError) as raised, connected(f"{name}://u@h/db"):
        pass
    assert str(raised.value).startswith(f"the driver of {name} is not installed (")
    assert str(raised.value).endswith(f"){advice}")


@pytest.mark.parametrize("key", ['"sqlalchemy.url"', "sqlalchemy.url"])
def test_the_url_may_stand_in_pyproject(tmp_path: Path, key: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[tool.alembic]\n{key} = "sqlite:///%(here)s/a.db"\n')
    database = find_url(None).database
    assert database is not None
    assert database.endswith("/a.db")


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("sqlalchemy.url = driver://user:pass@localhost/dbname", "no database is named"),
        ("", "no database is named"),
        (f"sqlalchemy.url = mysql://u:{PASSWORD}%x@h/db", "cannot be read from Alembic's"),
        (f"sqlalchemy.url = mysql://u:%(nowhere)s{PASSWORD}@h/db", "cannot be read from Alembic's"),
        (f"sqlalchemy.url = {PASSWORD}", "sqlalchemy.url is not a database URL"),
    ],
)
def test_a_url_that_alembic_does_not_have_is_told_without_its_password(
    tmp_path: Path, line: str, sentence: str
) -> None:
    (tmp_path / "alembic.ini").write_text(f"[alembic]\n{line}\n")
    with pytest.raises(CommandError, match=sentence) as raised:
        find_url(None)
    assert PASSWORD not in str(raised.value)


def test_the_path_of_a_sqlite_file_may_have_an_at_sign() -> None:
    assert where(find_url("sqlite:////home/me@work/app.db")) == "SQLite at /home/me@work/app.db"


def test_a_place_has_neither_user_nor_password() -> None:
    assert where(find_url(f"postgresql://user:{PASSWORD}@host:5433/db")) == (
        "postgresql at host:5433/db"
    )
    assert where(find_url("sqlite://")) == "SQLite at :memory:"


def test_printable_text_moves_no_cursor_and_ends_no_field() -> None:
    assert printable("a\tb\x1b[2J\nü") == "a\\tb\\x1b[2J\\nü"


def test_things_are_counted_in_words() -> None:
    assert [counted(n, "value") for n in (0, 1, 2)] == ["0 values", "1 value", "2 values"]
