"""Behind a real PgBouncer, which gives each transaction another connection to the server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

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
from tests.conftest import Databases
from tests.databases import drop_everything
from tests.integration.workers import fill, ledger
from tests.proxies import pgbouncer

# As SQLAlchemy's documentation says for PgBouncer.
RECOMMENDED: dict[str, dict[str, Any]] = {
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
    },
    "psycopg": {"prepare_threshold": None},
    "psycopg_async": {"prepare_threshold": None},
}
ROWS = 700


@pytest.fixture
def direct(databases: Databases) -> Iterator[Engine]:
    engine = create_engine(databases.url("postgresql"))
    fill(engine, ROWS)
    yield engine
    drop_everything(engine)
    engine.dispose()


@pytest.fixture
def pooled(direct: Engine) -> Iterator[URL]:
    with pgbouncer(direct.url) as url:
        yield url


def run_async(url: URL, driver: str, work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = create_async_engine(
            url.set(drivername=f"postgresql+{driver}"),
            poolclass=NullPool,
            connect_args=RECOMMENDED[driver],
        )
        try:
            await work(engine)
        finally:
            await engine.dispose()

    asyncio.run(main())


def count(rows: Any) -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for row in rows:
        found[row.key_version] = found.get(row.key_version, 0) + row.count
    return found


def test_everything_works_behind_a_pooler_in_transaction_mode(
    pooled: URL, promoted: Keyring
) -> None:
    engine = create_engine(pooled, poolclass=NullPool, connect_args=RECOMMENDED["psycopg"])
    assert rotate(engine, ledger, keyring=promoted, batch_size=50).rotated == 2 * ROWS
    assert count(status(engine, ledger).rows) == {"v2": 2 * ROWS}
    assert verify(engine, ledger, keyring=promoted).opened == 2 * ROWS
    retire_check(engine, "v1", ledger, settle=0.01)
    engine.dispose()


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_everything_works_in_async_behind_a_pooler_in_transaction_mode(
    pooled: URL, promoted: Keyring, driver: str
) -> None:
    async def work(engine: AsyncEngine) -> None:
        assert count((await astatus(engine, ledger)).rows) == {"v1": 2 * ROWS}
        report = await arotate(engine, ledger, keyring=promoted, batch_size=50)
        assert (report.ok, report.rotated) == (True, 2 * ROWS)
        assert (await averify(engine, ledger, keyring=promoted)).opened == 2 * ROWS
        await aretire_check(engine, "v1", ledger, settle=0.01)

    run_async(pooled, driver, work)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg_async"])
def test_several_at_once_share_the_servers_of_a_pooler(
    pooled: URL, promoted: Keyring, driver: str
) -> None:
    async def work(engine: AsyncEngine) -> None:
        reports = await asyncio.gather(
            *(arotate(engine, ledger, keyring=promoted, batch_size=20) for _ in range(4))
        )
        assert sum(report.rotated for report in reports) == 2 * ROWS
        assert all(report.ok for report in reports)

    run_async(pooled, driver, work)


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async"])
def test_values_are_read_in_binary_behind_a_pooler_in_transaction_mode(
    pooled: URL, driver: str
) -> None:
    formats = []

    def note(_connection: Any, cursor: Any, *_rest: Any) -> None:
        formats.append(getattr(cursor, "_cursor", cursor).pgresult.fformat(0))

    def read(connection: Connection) -> Any:
        return connection.execute(select(ledger).order_by(*ledger.primary_key)).all()

    def read_by(engine: Engine) -> list[Any]:
        event.listen(engine, "after_cursor_execute", note)
        with engine.connect() as connection, engine.connect() as other:
            # Each transaction may get another connection of the pooler's.
            results = []
            for _ in range(3):
                results += [read(connection), read(other)]
                connection.commit()
                other.commit()
        return results

    async def read_by_async(engine: AsyncEngine) -> list[Any]:
        event.listen(engine.sync_engine, "after_cursor_execute", note)
        async with engine.connect() as connection, engine.connect() as other:
            results = []
            for _ in range(3):
                results += [await connection.run_sync(read), await other.run_sync(read)]
                await connection.commit()
                await other.commit()
        return results

    results: list[Any] = []
    if driver == "psycopg":
        engine = create_engine(pooled, poolclass=NullPool, connect_args=RECOMMENDED[driver])
        results = read_by(engine)
        engine.dispose()
    else:

        async def work(engine: AsyncEngine) -> None:
            results.extend(await read_by_async(engine))

        run_async(pooled, driver, work)
    assert len(results[0]) == ROWS
    assert all(result == results[0] for result in results)
    assert formats == [0, 0, 0, 1, 1, 1]


def test_no_setting_is_left_with_the_servers_of_a_pooler(direct: Engine, promoted: Keyring) -> None:
    changed = text("SELECT name, setting FROM pg_settings WHERE source = 'session' ORDER BY name")
    with pgbouncer(direct.url, servers=1) as url:
        engine = create_engine(url, poolclass=NullPool, connect_args=RECOMMENDED["psycopg"])
        with engine.connect() as connection:
            before = connection.execute(changed).all()
        rotate(engine, ledger, keyring=promoted)
        verify(engine, ledger, keyring=promoted)
        with engine.connect() as connection:
            assert connection.execute(changed).all() == before
            assert not connection.execute(text("SELECT 1 FROM pg_prepared_statements")).all()
        engine.dispose()


@pytest.mark.parametrize("driver", ["psycopg", "asyncpg", "psycopg_async"])
def test_a_pooler_in_statement_mode_is_named_before_the_first_write(
    direct: Engine, promoted: Keyring, driver: str
) -> None:
    # asyncpg 0.30 does not pass on why PgBouncer hangs up.
    told = "statement mode" + ("|closed in the middle" if driver == "asyncpg" else "")

    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(RotationError, match=told):
            await astatus(engine, ledger)
        with pytest.raises(RotationError, match=told):
            await arotate(engine, ledger, keyring=promoted)

    with pgbouncer(direct.url, mode="statement") as url:
        if driver == "psycopg":
            engine = create_engine(url, poolclass=NullPool, connect_args=RECOMMENDED[driver])
            with pytest.raises(RotationError, match="statement mode"):
                rotate(engine, ledger, keyring=promoted)
            with pytest.raises(RotationError, match="statement mode"):
                verify(engine, ledger, keyring=promoted)
            engine.dispose()
        else:
            run_async(url, driver, work)
    assert count(status(direct, ledger).rows) == {"v1": 2 * ROWS}
