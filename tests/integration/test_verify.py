"""Opening every row, to know that it does."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    DateTime,
    Engine,
    Integer,
    MetaData,
    Table,
    event,
    func,
    insert,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine

from sqlalchemy_lucent import EncryptedJSON, Keyring, RotationError, averify, rotate, verify
from tests.databases import create_unguarded
from tests.integration.workers import fill, ledger, metadata

raw_ledger = Table("ledger", MetaData(), *(Column(name) for name in ("id", "free", "bound")))


def test_every_value_is_opened(engine: Engine) -> None:
    fill(engine, 250)  # more than a batch
    report = verify(engine, ledger)
    assert (report.ok, report.opened, report.failed) == (True, 500, ())


def test_what_does_not_open_is_named_and_nothing_is_changed(
    engine: Engine, promoted: Keyring
) -> None:
    create_unguarded(metadata, engine)
    fill(engine, 250)
    with engine.begin() as connection:
        connection.execute(
            update(raw_ledger).where(raw_ledger.c.id.in_([3, 111])).values(free=b"plaintext")
        )
        # Copied from another row: its context is the same, its row is not.
        stolen = connection.execute(
            raw_ledger.select().with_only_columns(raw_ledger.c.bound).where(raw_ledger.c.id == 8)
        ).scalar_one()
        connection.execute(
            update(raw_ledger).where(raw_ledger.c.id == 7).values(bound=bytes(stolen))
        )
    report = verify(engine, ledger, keyring=promoted)
    assert [(row.column, row.primary_key, row.error) for row in report.failed] == [
        ("free", (3,), "NotSealedError"),
        ("bound", (7,), "TamperedError"),
        ("free", (111,), "NotSealedError"),
    ]
    assert (report.ok, report.opened, report.failed_count) == (False, 497, 3)
    data = json.loads(json.dumps(report.as_dict()))
    assert (data["ok"], data["opened"], data["failed"][1]["primary_key"]) == (False, 497, [7])


def test_a_key_that_is_missing_shows(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 5)
    report = verify(engine, ledger, keyring=promoted.without("v1"))
    assert {row.error for row in report.failed} == {"UnknownKeyVersionError"}


def test_a_sample_is_the_first_rows_of_each_table(engine: Engine) -> None:
    fill(engine, 250)
    assert verify(engine, ledger, sample=3).opened == 6
    assert verify(engine, ledger, sample=120).opened == 240
    assert verify(engine, ledger, sample=1000).opened == 500


def test_the_keyring_may_be_a_function(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 3)
    assert verify(engine, ledger, keyring=lambda: promoted).opened == 6
    wrong: Any
    for wrong in (3, dict):
        with pytest.raises(RotationError, match="keyring= is a Keyring or a function"):
            verify(engine, ledger, keyring=wrong)


@pytest.mark.parametrize("sample", [0, -1, 1.5, True, "3"])
def test_a_sample_below_one_is_refused(engine: Engine, sample: Any) -> None:
    with pytest.raises(RotationError, match="sample"):
        verify(engine, ledger, sample=sample)


def test_rows_are_read_in_batches_by_primary_key(engine: Engine) -> None:
    fill(engine, 1200)
    reads: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("SELECT ledger.id, ") and "lucent_key" not in statement:
            reads.append(statement)

    assert verify(engine, ledger).opened == 2400
    assert len(reads) == 2
    assert all("ORDER BY ledger.id" in statement for statement in reads)
    assert ["ledger.id <= " in statement for statement in reads] == [True, False]
    assert ["ledger.id > " in statement for statement in reads] == [False, True]


def test_every_row_is_opened_where_the_model_s_key_is_not_unique(engine: Engine) -> None:
    Table("rows_alike", stored := MetaData(), Column("number", Integer), Column("v", EncryptedJSON))
    stored.create_all(engine)
    table = Table(
        "rows_alike",
        MetaData(),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("v", EncryptedJSON),
    )
    with engine.begin() as connection:
        connection.execute(insert(table), [{"number": n // 7, "v": n} for n in range(3001)])
    assert verify(engine, table).opened == 3001
    assert verify(engine, table, sample=1500).opened == 1500


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_every_row_is_opened_where_no_row_is_found_by_its_key(engine: Engine) -> None:
    # SQLite's CURRENT_TIMESTAMP has no microseconds; SQLAlchemy's parameters have.
    table = Table(
        "moments",
        MetaData(),
        Column("moment", DateTime, server_default=func.now(), primary_key=True),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("v", EncryptedJSON),
    )
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"number": n, "v": n} for n in range(3000)])
    assert verify(engine, table).opened == 3000


def test_a_connection_may_be_in_a_transaction(engine: Engine) -> None:
    metadata.create_all(engine)
    with engine.connect() as connection, connection.begin():
        connection.execute(insert(ledger).values(id=1, free=1))
        assert verify(connection, ledger).opened == 1
        assert connection.in_transaction()


def test_an_async_engine_is_verified(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any], promoted: Keyring
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.execute(insert(ledger), [{"id": n, "free": n} for n in range(9)])
        assert (await averify(engine, ledger)).opened == 9
        async with engine.connect() as connection:
            report = await averify(connection, ledger, keyring=promoted, sample=4)
        assert report.opened == 4

    run_async(work)


def test_verification_after_rotation_needs_only_the_new_key(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 20)
    rotate(engine, ledger, keyring=promoted)
    assert verify(engine, ledger, keyring=promoted.without("v1")).opened == 40
