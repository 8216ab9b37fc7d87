"""asyncmy with and without ``stmt_cache_size``: what is stored and read is the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Integer,
    MetaData,
    Table,
    create_engine,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from sqlalchemy_lucent import EncryptedJSON
from tests.conftest import Databases
from tests.databases import drop_everything, with_driver

pytestmark = pytest.mark.skipif(
    tuple(map(int, version("asyncmy").split(".")[:3])) < (0, 2, 13),
    reason="asyncmy has stmt_cache_size since 0.2.13",
)

metadata = MetaData()
things = Table(
    "things",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("payload", EncryptedJSON),
)
EXECUTED = text("SHOW SESSION STATUS LIKE 'Com_stmt_execute'")


@pytest.fixture
def url(databases: Databases) -> Iterator[URL]:
    url = databases.url("mysql")
    yield with_driver(url, "mysql+asyncmy")
    engine = create_engine(url)
    drop_everything(engine)
    engine.dispose()


def run(url: URL, work: Callable[[AsyncConnection], Awaitable[Any]], **arguments: Any) -> Any:
    async def main() -> Any:
        engine = create_async_engine(url, connect_args=arguments)
        async with engine.begin() as connection:
            result = await work(connection)
        await engine.dispose()
        return result

    return asyncio.run(main())


@pytest.mark.parametrize("size", [1, 40, 70_000])
def test_prepared_statements_store_and_read_sealed_values(url: URL, size: int) -> None:
    rows = [{"id": n, "payload": {"n": n, "text": "ü'\\%" * size}} for n in range(1, 21)]

    async def work(connection: AsyncConnection) -> tuple[Any, int]:
        await connection.run_sync(metadata.create_all)
        await connection.execute(insert(things), rows)
        await connection.execute(insert(things).values(id=21, payload=None))
        changed = update(things).where(things.c.id == 1).values(payload={"n": -1})
        await connection.execute(changed)
        read = (await connection.execute(select(things).order_by(things.c.id))).all()
        await connection.execute(select(things).where(things.c.id == 3))
        return read, int((await connection.execute(EXECUTED)).one()[1])

    read, executed = run(url, work, stmt_cache_size=128)
    changed = {"id": 1, "payload": {"n": -1}}
    assert [row._asdict() for row in read] == [changed, *rows[1:], {"id": 21, "payload": None}]
    assert executed >= 3


VALUES = {
    "DOUBLE": "0.1",
    "DECIMAL(10,2)": "1.50",
    "BOOLEAN": "1",
    "MEDIUMINT": "-5",
    "BIGINT UNSIGNED": "18446744073709551615",
    "DATE": "'2026-01-02'",
    "DATETIME(6)": "'2026-01-02 03:04:05.000006'",
    "TIMESTAMP NULL": "'2026-01-02 03:04:05'",
    "TIME": "'-25:00:01'",
    "TIME(6)": "'10:00:01.5'",
    "YEAR": "2026",
    "BIT(9)": "b'100000001'",
    "JSON": """'{"a": 1}'""",
    "VARCHAR(9)": "'Zürich'",
    "CHAR(9)": "'x'",
    "ENUM('a','b')": "'b'",
    "SET('a','b')": "'a,b'",
    "LONGBLOB": "x'00ff27'",
    "VARBINARY(9)": "x'00ff27'",
    "LONGTEXT": "'é'",
    "DATETIME": "NULL",
    "FLOAT": "0.1",
}


def test_only_float_reads_differently_by_prepared_statements(url: URL) -> None:
    columns = ", ".join(f"c{number} {type_}" for number, type_ in enumerate(VALUES))

    async def make(connection: AsyncConnection) -> None:
        await connection.exec_driver_sql(f"CREATE TABLE kinds ({columns}, id INT)")
        await connection.exec_driver_sql(
            f"INSERT INTO kinds VALUES ({', '.join(VALUES.values())}, 1)"
        )

    async def read(connection: AsyncConnection) -> Any:
        found = await connection.execute(text("SELECT * FROM kinds WHERE id = :id"), {"id": 1})
        return [(type(value), value) for value in found.one()]

    run(url, make)
    *plain, (_, plain_float), _ = run(url, read)
    *prepared, (_, prepared_float), _ = run(url, read, stmt_cache_size=128)
    assert prepared == plain
    assert (plain_float, prepared_float) == (0.1, 0.10000000149011612)
