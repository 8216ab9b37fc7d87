"""What is left on the disk when ``op.encrypt_column`` has dropped the plaintext.

The database files are searched before and after what ``docs/encrypt-existing.md`` says to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine

from sqlalchemy_lucent.migrations import encrypt_column
from tests.conftest import Databases
from tests.databases import drop_everything
from tests.disk import data_directory, run, sqlite_engine

MARK = "sk_live_PLAINTEXT"


def count(*files: Path) -> int:
    return sum(file.read_bytes().count(MARK.encode()) for file in files)


def encrypt_users(
    engine: Engine, *, nullable: bool = True, large: int = 3_000, constraint: bool = True
) -> None:
    """Fill table ``users`` with plaintext, some of it `large`, and encrypt it."""
    table = Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("credentials", sa.JSON(), nullable=nullable),
    )
    table.metadata.create_all(engine)
    values = [{"token": MARK, "padding": "x" * (0 if n % 9 else large)} for n in range(200)]
    with engine.begin() as connection:
        connection.execute(table.insert(), [{"credentials": value} for value in values])
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        encrypt_column(
            "users",
            "credentials",
            existing_type=sa.JSON(),
            create_constraint=constraint,
            operations=operations,
        )


# -- SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Callable[..., Engine]]:
    opened: list[Engine] = []

    def configured(**pragmas: str) -> Engine:
        opened.append(sqlite_engine(tmp_path, **pragmas))
        return opened[-1]

    yield configured
    for engine in opened:
        engine.dispose()


def test_sqlite_keeps_it_in_free_pages_until_vacuum(
    sqlite: Callable[..., Engine], tmp_path: Path
) -> None:
    engine = sqlite(secure_delete="OFF", journal_mode="DELETE")

    encrypt_users(engine)
    assert count(*tmp_path.iterdir())

    run(engine, "VACUUM")
    assert not count(*tmp_path.iterdir())


def test_sqlite_with_secure_delete_keeps_none_of_it(
    sqlite: Callable[..., Engine], tmp_path: Path
) -> None:
    encrypt_users(sqlite(secure_delete="ON", journal_mode="DELETE"))

    assert not count(*tmp_path.iterdir())


@pytest.mark.parametrize("secure_delete", ["OFF", "ON"])
def test_sqlite_keeps_it_in_the_wal_until_a_checkpoint(
    sqlite: Callable[..., Engine], tmp_path: Path, secure_delete: str
) -> None:
    engine = sqlite(secure_delete=secure_delete, journal_mode="WAL")
    with engine.connect():  # the last connection that closes removes the WAL
        encrypt_users(engine)
        assert count(tmp_path / "app.db-wal")

        run(engine, "VACUUM")
        assert count(*tmp_path.iterdir())  # vacuumed pages are in the WAL first

        run(engine, "PRAGMA wal_checkpoint(TRUNCATE)")
        assert not count(*tmp_path.iterdir())


# -- servers ---------------------------------------------------------------------------------------


@pytest.fixture
def postgresql(databases: Databases) -> Iterator[Engine]:
    engine = create_engine(databases.url("postgresql"))
    yield engine
    drop_everything(engine)
    engine.dispose()


@pytest.mark.parametrize("cure", ["VACUUM FULL users", "CLUSTER users USING users_pkey"])
def test_postgresql_keeps_it_in_the_table_until_that_is_written_anew(
    postgresql: Engine, cure: str
) -> None:
    folder = data_directory(postgresql, "SHOW data_directory")
    name = sa.text(
        "SELECT pg_relation_filepath(oid), pg_relation_filepath(reltoastrelid) "
        "FROM pg_class WHERE relname = 'users'"
    )

    def left() -> int:
        run(postgresql, "CHECKPOINT")
        with postgresql.connect() as connection:
            files = [folder / file for file in connection.execute(name).one()]
        return count(*(file for file in files if file.exists()))

    encrypt_users(postgresql)
    assert left() >= 200

    run(postgresql, "VACUUM users")
    assert left() >= 100

    run(postgresql, cure)
    assert not left()


@pytest.fixture
def mysql(databases: Databases) -> Iterator[Engine]:
    engine = create_engine(databases.url("mysql"))
    yield engine
    drop_everything(engine)
    engine.dispose()


@pytest.mark.parametrize(("nullable", "constraint"), [(True, False), (True, True), (False, False)])
def test_mariadb_keeps_a_nullable_column_without_a_constraint_until_the_table_is_rebuilt(
    mysql: Engine, nullable: bool, constraint: bool
) -> None:
    file = data_directory(mysql, "SELECT @@datadir") / str(mysql.url.database) / "users.ibd"

    def left() -> int:
        run(mysql, "FLUSH TABLES users FOR EXPORT", "UNLOCK TABLES")  # writes what is in memory
        return count(file)

    encrypt_users(mysql, nullable=nullable, large=20_000, constraint=constraint)
    if nullable and not constraint:
        assert left() >= 100
    else:
        assert not left()  # neither NOT NULL nor a constraint is added in an instant

    run(mysql, "OPTIMIZE TABLE users")
    assert not left()
