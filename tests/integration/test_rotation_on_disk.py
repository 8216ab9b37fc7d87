"""What a rotation leaves on the disk, and how much it makes a table grow.

The files of the database are searched for the old ciphertexts, before and after what the run-books
say to do.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy import Column, Engine, Index, Integer, MetaData, Table

from sqlalchemy_lucent import EncryptedJSON, Keyring, rotate
from tests.disk import data_directory, run, sqlite_engine

ROWS = 2_000
OLD = b"v1:\x01"


def fill(engine: Engine, *, fillfactor: int | None = None, indexed: bool = False) -> MetaData:
    """Make table ``accounts`` with `ROWS` values under ``v1``."""
    table = Table(
        "accounts",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("credentials", EncryptedJSON),
    )
    if indexed:
        Index("ix_accounts_key_version", table.c.credentials.key_version)
    table.metadata.create_all(engine)
    if fillfactor is not None:
        run(engine, f"ALTER TABLE accounts SET (fillfactor = {fillfactor})")
    with engine.begin() as connection:
        connection.execute(
            table.insert(), [{"credentials": {"token": f"token {n:060}"}} for n in range(ROWS)]
        )
    return table.metadata


def count(*files: Path) -> int:
    return sum(file.read_bytes().count(OLD) for file in files if file.exists())


# -- SQLite ----------------------------------------------------------------------------------------


def test_sqlite_overwrites_the_old_values_but_keeps_them_in_the_wal_until_a_truncating_checkpoint(
    tmp_path: Path, promoted: Keyring
) -> None:
    engine = sqlite_engine(tmp_path, secure_delete="OFF", journal_mode="WAL")
    with engine.connect():  # the last connection that closes removes the WAL
        metadata = fill(engine)
        assert rotate(engine, metadata, keyring=promoted).ok
        run(engine, "VACUUM")
        assert count(*tmp_path.iterdir())

        run(engine, "PRAGMA wal_checkpoint(TRUNCATE)")
        assert not count(*tmp_path.iterdir())
    engine.dispose()


def test_sqlite_without_a_wal_keeps_none_after_vacuum(tmp_path: Path, promoted: Keyring) -> None:
    engine = sqlite_engine(tmp_path, secure_delete="OFF", journal_mode="DELETE")
    metadata = fill(engine)
    assert count(*tmp_path.iterdir()) >= ROWS
    assert rotate(engine, metadata, keyring=promoted).ok
    run(engine, "VACUUM")
    assert not count(*tmp_path.iterdir())
    engine.dispose()


# -- PostgreSQL ------------------------------------------------------------------------------------


on_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)


def postgresql_file(engine: Engine) -> Path:
    folder = data_directory(engine, "SHOW data_directory")
    with engine.connect() as connection:
        file = connection.scalar(sa.text("SELECT pg_relation_filepath('accounts')"))
    return folder / str(file)


@on_postgresql
def test_postgresql_keeps_most_old_values_after_vacuum_and_none_after_vacuum_full(
    engine: Engine, promoted: Keyring
) -> None:
    def left() -> int:
        run(engine, "CHECKPOINT")
        return count(postgresql_file(engine))

    metadata = fill(engine)
    assert left() == ROWS
    assert rotate(engine, metadata, keyring=promoted).ok
    run(engine, "VACUUM accounts")
    assert left() > ROWS / 2

    run(engine, "VACUUM FULL accounts")
    assert left() == 0


def updates(engine: Engine) -> tuple[int, int]:
    """Return how many rows were updated, and how many of these within their page (HOT)."""
    statement = sa.text(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'accounts'"
    )
    for _ in range(100):  # the counters arrive after the transaction that they count
        with engine.connect() as connection:
            updated, hot = connection.execute(statement).one()
        if updated >= ROWS:
            break
        time.sleep(0.1)
    return updated, hot


def growth(engine: Engine, metadata: MetaData, keyring: Keyring) -> float:
    size = sa.text("SELECT pg_relation_size('accounts')")
    with engine.connect() as connection:
        before = connection.execute(size).scalar_one()
    assert rotate(engine, metadata, keyring=keyring).ok
    engine.dispose()  # a connection that ends reports what it has counted
    with engine.connect() as connection:
        after = connection.execute(size).scalar_one()
    return float(after / before)


@on_postgresql
def test_postgresql_doubles_a_full_table(engine: Engine, promoted: Keyring) -> None:
    metadata = fill(engine)
    assert growth(engine, metadata, promoted) > 1.8
    updated, hot = updates(engine)
    assert (updated, hot < ROWS / 10) == (ROWS, True)


@on_postgresql
def test_postgresql_grows_nothing_where_pages_were_half_empty(
    engine: Engine, promoted: Keyring
) -> None:
    metadata = fill(engine, fillfactor=50)
    assert growth(engine, metadata, promoted) < 1.05
    updated, hot = updates(engine)
    assert (updated, hot > ROWS * 0.95) == (ROWS, True)


@on_postgresql
def test_an_index_on_the_key_version_leaves_no_update_within_its_page(
    engine: Engine, promoted: Keyring
) -> None:
    metadata = fill(engine, fillfactor=50, indexed=True)
    growth(engine, metadata, promoted)
    assert updates(engine) == (ROWS, 0)


# -- MariaDB ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["mysql"], indirect=True)
def test_mariadb_keeps_some_old_values_until_the_table_is_rebuilt(
    engine: Engine, promoted: Keyring
) -> None:
    file = data_directory(engine, "SELECT @@datadir") / str(engine.url.database) / "accounts.ibd"

    def left() -> int:
        run(engine, "FLUSH TABLES accounts FOR EXPORT", "UNLOCK TABLES")
        return count(file)

    metadata = fill(engine)
    assert left() >= ROWS
    assert rotate(engine, metadata, keyring=promoted).ok
    assert left() < ROWS / 2  # most are overwritten in place

    run(engine, "OPTIMIZE TABLE accounts")
    assert left() == 0
