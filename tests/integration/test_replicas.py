"""A replica is no witness, nor is what is read-only: nothing there proves that a key may go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_lucent import (
    Keyring,
    RotationError,
    aretire_check,
    arotate,
    astatus,
    averify,
    retire_check,
    rotate,
    status,
    verify,
)
from sqlalchemy_lucent.rotation import needs_rotation
from tests.command import Lucent
from tests.conftest import KEY_1, KEY_2
from tests.integration.workers import fill, ledger
from tests.servers import private_mariadb, private_postgresql, standby_of

PROVING: list[Callable[..., object]] = [
    lambda bind, keyring: rotate(bind, ledger, keyring=keyring),
    lambda bind, keyring: rotate(bind, ledger, keyring=keyring, dry_run=True),
    lambda bind, _: status(bind, ledger),
    lambda bind, keyring: verify(bind, ledger, keyring=keyring),
    lambda bind, _: retire_check(bind, "v1", ledger),
    lambda bind, keyring: needs_rotation(bind, ledger, keyring=keyring),
]


def assert_refused(bind: Any, keyring: Keyring, why: str) -> None:
    for work in PROVING:
        with pytest.raises(RotationError, match=f"{why}.* Connect to the primary server"):
            work(bind, keyring)


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Engine, Engine]]:
    """A primary with rows under v1 that its standby has not replayed."""
    with private_postgresql() as primary, standby_of(primary) as standby:
        writing, reading = create_engine(primary.url), create_engine(standby.url)
        ledger.create(writing)
        with writing.connect() as connection:
            position = connection.scalar(text("SELECT pg_current_wal_lsn()"))
        with reading.connect() as connection:
            replayed = text(f"SELECT pg_last_wal_replay_lsn() >= '{position}'")
            while not connection.scalar(replayed):
                time.sleep(0.02)
            connection.execute(text("SELECT pg_wal_replay_pause()"))
        yield writing, reading
        writing.dispose()
        reading.dispose()


@pytest.mark.slow
def test_a_standby_that_lags_vouches_for_no_key(
    pair: tuple[Engine, Engine], promoted: Keyring, tmp_path: Path
) -> None:
    primary, standby = pair
    fill(primary, 5)
    with standby.connect() as connection:
        assert connection.scalar(text("SELECT count(*) FROM ledger")) == 0
        connection.rollback()
        with pytest.raises(RotationError, match="replica"):
            rotate(connection, ledger, keyring=promoted)
        assert connection.get_isolation_level() == "READ COMMITTED"
        with pytest.raises(RotationError, match="replica"):
            status(connection, ledger)
    assert_refused(standby, promoted, "replica")
    lucent = Lucent(tmp_path, standby.url, f"v2:{KEY_2.hex()},v1:{KEY_1.hex()}")
    for arguments in (["rotate"], ["status"], ["verify"], ["retire-check", "v1"]):
        refused = lucent(*arguments, "--metadata", "tests.integration.workers:metadata")
        assert refused.code != 0
        assert "this server is a replica" in refused.err
    assert rotate(primary, ledger, keyring=promoted).ok


@pytest.mark.slow
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_an_async_engine_over_a_standby_is_refused(
    pair: tuple[Engine, Engine], promoted: Keyring, driver: str
) -> None:
    _, standby = pair

    async def main() -> None:
        engine = create_async_engine(standby.url.set(drivername=f"postgresql+{driver}"))
        for work in (
            arotate(engine, ledger, keyring=promoted),
            astatus(engine, ledger),
            averify(engine, ledger, keyring=promoted),
            aretire_check(engine, "v1", ledger),
        ):
            with pytest.raises(RotationError, match="replica"):
                await work
        await engine.dispose()

    asyncio.run(main())


@pytest.mark.slow
def test_a_replica_of_mariadb_that_may_be_written_vouches_for_no_key(promoted: Keyring) -> None:
    with private_mariadb({"server-id": 2}) as url:
        engine = create_engine(url)
        fill(engine, 5)
        assert status(engine, ledger).rows
        with engine.begin() as connection:
            connection.execute(text("CHANGE MASTER TO MASTER_HOST = '127.0.0.1'"))
        assert_refused(engine, promoted, "replica")
        with engine.begin() as connection:
            connection.execute(text("RESET REPLICA ALL"))
            connection.execute(text("SET GLOBAL read_only = ON"))
        assert_refused(engine, promoted, "read-only")
        engine.dispose()


def test_a_connection_that_may_not_write_proves_nothing(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 5)
    setting = {
        "sqlite": "PRAGMA query_only = ON",
        "postgresql": "SET default_transaction_read_only = on",
        "mysql": "SET SESSION TRANSACTION READ ONLY",
    }[engine.dialect.name]
    read_only = create_engine(engine.url)

    @event.listens_for(read_only, "connect")
    def forbid(driver: Any, _record: Any) -> None:
        cursor = driver.cursor()
        cursor.execute(setting)
        driver.commit()
        cursor.close()

    assert_refused(read_only, promoted, "read-only")
    read_only.dispose()


@pytest.mark.parametrize("option", ["mode=ro", "immutable=1"])
def test_a_sqlite_file_that_is_opened_to_be_read_proves_nothing(
    tmp_path: Path, promoted: Keyring, option: str
) -> None:
    path = tmp_path / "wal.db"
    writing = create_engine(f"sqlite:///{path}")
    with writing.connect() as connection:
        connection.execute(text("PRAGMA journal_mode = WAL"))
    fill(writing, 5)
    reading = create_engine(f"sqlite:///file:{path}?{option}&uri=true")
    with writing.connect() as connection:  # whose log is not yet in the file
        connection.execute(text("SELECT 1 FROM ledger"))
        assert_refused(reading, promoted, "read-only")
    reading.dispose()
    writing.dispose()


@pytest.mark.parametrize("url", ["mysql"], indirect=True)
def test_who_may_not_ask_for_replicas_is_taken_at_the_servers_word(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 5)
    user = f"u_{engine.url.database}"
    with engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE USER {user}@'%%'")
        connection.exec_driver_sql(f"GRANT ALL ON {engine.url.database}.* TO {user}@'%%'")
    plain = create_engine(engine.url.set(username=user))
    try:
        assert rotate(plain, ledger, keyring=promoted).ok
    finally:
        plain.dispose()
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP USER {user}@'%%'")
