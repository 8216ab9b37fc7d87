"""A rotation on connections and engines of every mode: what is the caller's stays as it was."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    delete,
    func,
    insert,
    select,
    text,
)
from sqlalchemy.dialects.mysql import VARBINARY
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    RotationError,
    arotate,
    rotate,
    status,
    verify,
)
from tests.conftest import KEY_1, KEY_2
from tests.integration.test_rotation import counts, documents_table, fill

on_servers = pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
on_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)
on_mysql = pytest.mark.parametrize("url", ["mysql"], indirect=True)


def number_of_rows(engine: Engine, table: Table) -> int:
    with engine.connect() as connection:
        return connection.scalar(select(func.count()).select_from(table)) or 0


def test_a_connection_of_an_autocommit_engine_still_commits_by_itself(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    commits = create_engine(engine.url, isolation_level="AUTOCOMMIT")
    with commits.connect() as connection:
        assert rotate(connection, table, keyring=promoted).rotated == 25
        assert not connection.in_transaction()
        connection.execute(insert(table), {"id": 1000, "payload": None})
    assert number_of_rows(engine, table) == 26
    commits.dispose()


def test_an_autocommit_connection_is_given_back_in_no_transaction(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        rotate(connection, table, keyring=promoted)
        assert not connection.in_transaction()
        with connection.begin():
            connection.execute(delete(table).where(table.c.id == 1))
    assert number_of_rows(engine, table) == 24


@pytest.mark.parametrize("run", [rotate, status, verify])
def test_a_connection_that_is_closed_is_refused(engine: Engine, run: Callable[..., object]) -> None:
    connection = engine.connect()
    connection.close()
    with pytest.raises(RotationError, match=r"connection is closed\. Pass an open one"):
        run(connection, documents_table())


def test_an_async_connection_that_is_not_open_is_refused(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        with pytest.raises(RotationError, match="connection is not open"):
            await arotate(engine.connect(), documents_table())

    run_async(work)


def test_a_transaction_that_only_the_driver_knows_of_is_not_ended(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("BEGIN")
        connection.execute(delete(table).where(table.c.id < 10))
        with pytest.raises(RotationError, match="inside a transaction"):
            rotate(connection, table, keyring=promoted)
        connection.exec_driver_sql("ROLLBACK")
    assert number_of_rows(engine, table) == 25
    assert counts(engine, table) == {("payload", "v1"): 25}


@on_mysql
@pytest.mark.parametrize("by_row", [False, True])
def test_a_value_that_the_column_has_no_room_for_is_not_cut(
    engine: Engine, url: URL, by_row: bool
) -> None:
    one = Keyring({"v9": KEY_1})
    both = Keyring({"v9": KEY_1, "v10": KEY_2}, primary="v10")  # its header is a byte longer
    # With a text key, each row is written by a statement of its own.
    key_type = String(9) if by_row else Integer
    table = Table(
        "narrow", MetaData(), Column("id", key_type, primary_key=True), Column("p", EncryptedJSON)
    )
    sealed = one.for_context("narrow.p").seal(b'{"n":1}')
    key = "varchar(9)" if by_row else "int"
    with engine.begin() as connection:
        connection.exec_driver_sql(
            f"CREATE TABLE narrow (id {key} PRIMARY KEY, p VARBINARY({len(sealed)}))"
        )
        connection.execute(text("INSERT INTO narrow VALUES (1, :p)"), {"p": sealed})
    lenient = create_engine(url, connect_args={"init_command": "SET sql_mode = ''"})
    report = rotate(lenient, table, keyring=both)
    assert (report.ok, report.rotated, report.failed_count) == (False, 0, 1)
    assert report.failed[0].error == "DataError"
    assert verify(lenient, table, keyring=both).opened == 1
    with lenient.connect() as connection:
        # The session is as it was, also for who gets the connection from the pool next.
        assert connection.scalar(text("SELECT @@sql_mode")) == ""
    lenient.dispose()


@on_mysql
def test_safe_updates_are_no_hindrance(engine: Engine, url: URL, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)
    careful = create_engine(url, connect_args={"init_command": "SET sql_safe_updates = 1"})
    assert rotate(careful, table, keyring=promoted).rotated == 25
    with careful.connect() as connection:
        assert connection.scalar(text("SELECT @@sql_safe_updates")) == 1
    careful.dispose()


@on_postgresql
@pytest.mark.parametrize("options", [{"stream_results": True}, {"yield_per": 5}])
def test_an_engine_that_streams_results_is_rotated_and_counted(
    engine: Engine, promoted: Keyring, options: dict[str, Any]
) -> None:
    table = documents_table()
    fill(engine, table)
    streams = engine.execution_options(**options)
    assert rotate(streams, table, keyring=promoted).rotated == 25
    assert verify(streams, table, keyring=promoted).opened == 25
    assert status(streams, table).rows[0].count == 25


@on_postgresql
def test_client_side_cursors_are_rotated(engine: Engine, url: URL, promoted: Keyring) -> None:
    import psycopg

    table = documents_table()
    fill(engine, table)
    on_client = create_engine(url, connect_args={"cursor_factory": psycopg.ClientCursor})
    assert rotate(on_client, table, keyring=promoted).rotated == 25
    assert verify(on_client, table, keyring=promoted.without("v1")).opened == 25
    on_client.dispose()


def test_an_error_of_the_callback_is_raised_as_it_is(engine: Engine, promoted: Keyring) -> None:
    table = documents_table()
    fill(engine, table)

    def query(_: Any) -> None:
        with engine.connect() as connection:
            connection.execute(text("SELECT nothing FROM nowhere"))

    with pytest.raises(DBAPIError) as caught:
        rotate(engine, table, keyring=promoted, batch_size=10, on_progress=query)
    assert "nowhere" in str(caught.value)
    assert counts(engine, table)["payload", "v2"] == 10


@on_servers
def test_a_connection_that_is_lost_is_given_back_in_its_own_mode(
    engine: Engine, promoted: Keyring
) -> None:
    table = documents_table()
    fill(engine, table)
    is_mysql = engine.dialect.name == "mysql"
    own_id = text("SELECT connection_id()" if is_mysql else "SELECT pg_backend_pid()")
    end = "KILL :id" if is_mysql else "SELECT pg_terminate_backend(:id)"

    with engine.connect() as connection:
        number = connection.scalar(own_id)
        connection.rollback()

        def lose(_: Any) -> None:
            with engine.connect() as other:
                other.execute(text(end), {"id": number})

        with pytest.raises(RotationError, match="the database ended the rotation"):
            rotate(connection, table, keyring=promoted, batch_size=10, on_progress=lose)
        connection.rollback()
        connection.execute(delete(table))
        connection.rollback()
    assert number_of_rows(engine, table) == 25


@pytest.mark.parametrize("hidden", [True, False])
@on_servers
def test_keys_stay_out_of_the_log_where_parameters_do(
    engine: Engine, promoted: Keyring, caplog: pytest.LogCaptureFixture, hidden: bool
) -> None:
    table = Table(
        "sessions",
        MetaData(),
        Column("number", Integer, primary_key=True, autoincrement=False),
        Column("digest", LargeBinary(16).with_variant(VARBINARY(16), "mysql"), primary_key=True),
        Column("payload", EncryptedJSON),
    )
    table.metadata.create_all(engine)
    digests = [b"digest of no. %d" % n for n in range(3)]
    with engine.begin() as connection:
        connection.execute(
            insert(table), [{"number": 471100 + n, "digest": d} for n, d in enumerate(digests)]
        )
        connection.execute(table.update().values(payload={"n": 1}))
    caplog.set_level(logging.INFO, "sqlalchemy.engine")
    logging_engine = create_engine(engine.url, hide_parameters=hidden)
    assert rotate(logging_engine, table, keyring=promoted).rotated == 3
    logging_engine.dispose()
    statements = [record.getMessage() for record in caplog.records]
    updates = [text for text in statements if text.startswith("UPDATE")]
    assert updates
    assert not any("digest of" in text or digests[0].hex() in text for text in updates)
    assert any("471100" in text for text in statements) != hidden
