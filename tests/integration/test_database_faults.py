"""What a rotation says when the database ends it: true, without a value, and what to do."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Enum,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    text,
)
from sqlalchemy.dialects.mysql import VARBINARY
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    RotationError,
    arotate,
    averify,
    rotate,
    status,
    verify,
)
from tests.conftest import Databases
from tests.databases import drop_everything, with_driver
from tests.integration.workers import fill, ledger
from tests.servers import private_mariadb

AGAIN = "Run it again to go on"
on_servers = pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
on_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)
on_mysql = pytest.mark.parametrize("url", ["mysql"], indirect=True)


def under(engine: Engine, version: str, target: Any = ledger) -> int:
    return sum(row.count for row in status(engine, target).rows if row.key_version == version)


def test_a_dry_run_that_fails_says_that_nothing_was_written(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 300)
    own = create_engine(engine.url)

    def drop(_: Any) -> None:
        ledger.drop(own)

    with pytest.raises(RotationError, match="dry run: nothing was written") as caught:
        rotate(engine, ledger, keyring=promoted, batch_size=10, on_progress=drop, dry_run=True)
    own.dispose()
    assert "committed" not in str(caught.value)
    assert AGAIN not in str(caught.value)


# -- rights ----------------------------------------------------------------------------------------


@contextmanager
def as_another(engine: Engine, *grants: str) -> Iterator[Engine]:
    """Give an engine of a user with these rights only."""
    name = f"lucent_test_reader_{os.getpid()}"
    is_mysql = engine.dialect.name == "mysql"
    user = f"'{name}'@'%'" if is_mysql else name
    with engine.begin() as connection:
        connection.execute(text(f"CREATE USER {user}"))
        for grant in grants:
            connection.execute(text(f"GRANT {grant} TO {user}"))
    other = create_engine(engine.url.set(username=name))
    try:
        yield other
    finally:
        other.dispose()
        with engine.begin() as connection:
            if not is_mysql:
                connection.execute(text(f"DROP OWNED BY {user}"))
            connection.execute(text(f"DROP USER {user}"))


@on_servers
@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    "grants",
    [
        ["SELECT ON ledger"],
        ["SELECT ON ledger", "UPDATE (id) ON ledger"],
        ["SELECT ON ledger", "UPDATE (free) ON ledger"],
    ],
)
def test_a_right_that_is_missing_is_told_before_the_first_write(
    engine: Engine, promoted: Keyring, dry_run: bool, grants: list[str]
) -> None:
    fill(engine, 5)
    with as_another(engine, *grants) as other:
        with pytest.raises(RotationError, match=r"denied.*Grant this user .* UPDATE") as caught:
            rotate(other, ledger, keyring=promoted, dry_run=dry_run)
        assert AGAIN not in str(caught.value)
        assert verify(other, ledger, keyring=promoted).ok
    assert under(engine, "v1") == 10
    with as_another(engine, "SELECT, UPDATE ON ledger") as other:
        assert rotate(other, ledger, keyring=promoted, dry_run=dry_run).rotated == 10


@on_postgresql
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_table_without_a_replica_identity_is_told_with_what_to_do(
    engine: Engine, promoted: Keyring, dry_run: bool
) -> None:
    fill(engine, 5)
    name = f"lucent_test_{os.getpid()}"
    with engine.begin() as connection:
        connection.execute(text("ALTER TABLE ledger REPLICA IDENTITY NOTHING"))
        connection.execute(text(f"CREATE PUBLICATION {name} FOR TABLE ledger"))
    try:
        with pytest.raises(RotationError, match=r"replica identity.*REPLICA IDENTITY") as caught:
            rotate(engine, ledger, keyring=promoted, dry_run=dry_run)
    finally:
        with engine.begin() as connection:
            connection.execute(text(f"DROP PUBLICATION {name}"))
    assert AGAIN not in str(caught.value)


@pytest.mark.slow
def test_a_binary_log_of_statements_is_told_before_the_first_write(promoted: Keyring) -> None:
    with private_mariadb({"log-bin": "binlog", "binlog-format": "STATEMENT"}) as url:
        engine = create_engine(url)
        fill(engine, 5)
        with pytest.raises(RotationError, match=r"binlog_format .*ROW"):
            rotate(engine, ledger, keyring=promoted)
        assert under(engine, "v1") == 10
        engine.dispose()


# -- what the database said ------------------------------------------------------------------------


def refuse_updates(engine: Engine, *, of: int, words: str) -> None:
    """Have a trigger refuse to change a row, in its own words."""
    statement = {
        "sqlite": (
            f"CREATE TRIGGER refusing BEFORE UPDATE ON ledger WHEN NEW.id = {of}"
            f" BEGIN SELECT RAISE(ABORT, '{words}'); END"
        ),
        "postgresql": (
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RAISE EXCEPTION '{words}'; END $$; CREATE TRIGGER refusing BEFORE UPDATE ON ledger"
            f" FOR EACH ROW WHEN (NEW.id = {of}) EXECUTE FUNCTION refuse()"
        ),
        "mysql": (
            "CREATE TRIGGER refusing BEFORE UPDATE ON ledger FOR EACH ROW"
            f" IF NEW.id = {of} THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{words}'; END IF"
        ),
    }[engine.dialect.name]
    with engine.begin() as connection:
        connection.exec_driver_sql(statement)


def test_a_trigger_is_quoted(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 30)
    refuse_updates(engine, of=17, words="tenant 4 is frozen until May")
    with pytest.raises(RotationError, match=r"frozen until May\. 20 values .* committed") as caught:
        rotate(engine, ledger, keyring=promoted, batch_size=10, on_error="raise")
    assert AGAIN not in str(caught.value)
    report = rotate(engine, ledger, keyring=promoted, batch_size=10)
    assert (report.failed_count, report.remaining) == (2, 2)
    assert all("frozen until May" in str(row.reason) for row in report.failed)
    drop_trigger(engine)


def drop_trigger(engine: Engine) -> None:
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.execute(text("DROP FUNCTION IF EXISTS refuse() CASCADE"))


@on_servers
@pytest.mark.parametrize("kind", ["duplicate", "wrong", "cut"])
def test_no_value_is_quoted(engine: Engine, promoted: Keyring, kind: str) -> None:
    fill(engine, 5)
    act = {
        "duplicate": "INSERT INTO audit (words) VALUES ('hunter2 words')",
        "wrong": "INSERT INTO audit (number) VALUES ('hunter2')",
        "cut": "INSERT INTO audit (words) VALUES ('hunter2 and words that are too many')",
    }[kind]
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE audit (words varchar(20) UNIQUE, number int)"))
        connection.execute(text("INSERT INTO audit (words) VALUES ('hunter2 words')"))
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                f" {act}; RETURN NEW; END $$; CREATE TRIGGER refusing BEFORE UPDATE ON ledger"
                " FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        else:
            connection.exec_driver_sql(
                f"CREATE TRIGGER refusing BEFORE UPDATE ON ledger FOR EACH ROW {act}"
            )
    report = rotate(engine, ledger, keyring=promoted)
    assert report.failed_count == 10
    assert all(row.reason for row in report.failed)
    assert "hunter2" not in repr(report)
    with pytest.raises(RotationError) as caught:
        rotate(engine, ledger, keyring=promoted, on_error="raise")
    assert "hunter2" not in str(caught.value)
    assert AGAIN not in str(caught.value)
    drop_trigger(engine)


# -- packets, character sets, escapes --------------------------------------------------------------


@pytest.mark.slow
def test_statements_fit_into_the_packets_of_the_server(promoted: Keyring) -> None:
    table = Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("p", EncryptedJSON),
    )
    with private_mariadb({"max-allowed-packet": "1M"}) as url:
        engine = create_engine(url)
        table.create(engine)
        with engine.begin() as connection:
            for number in range(150):
                connection.execute(insert(table).values(id=number, p="x" * 30_000))
            for number in range(150, 160):
                connection.execute(insert(table).values(id=number, p="x" * 300_000))
        assert rotate(engine, table, keyring=promoted).rotated == 160
        engine.dispose()


@pytest.mark.slow
def test_a_row_that_no_packet_holds_is_named(promoted: Keyring) -> None:
    table = Table(
        "documents",
        MetaData(),
        Column("id", Integer, primary_key=True, autoincrement=False),
        Column("p", EncryptedJSON),
    )
    with private_mariadb({"max-allowed-packet": "4M"}) as url:
        engine = create_engine(url)
        table.create(engine)
        with engine.begin() as connection:
            for number in range(9):
                size = 1_200_000 if number == 5 else 100
                connection.execute(insert(table).values(id=number, p="x" * size))
            connection.execute(text("SET GLOBAL max_allowed_packet = 1048576"))
        engine.dispose()
        report = rotate(engine, table, keyring=promoted)
        assert (report.rotated, report.remaining) == (8, 1)
        assert [row.primary_key for row in report.failed] == [(5,)]
        assert "max_allowed_packet" in str(report.failed[0].reason)
        with pytest.raises(RotationError, match="Raise max_allowed_packet, then run it again"):
            rotate(engine, table, keyring=promoted, on_error="raise")
        engine.dispose()


@on_mysql
@pytest.mark.parametrize("work", [rotate, verify])
def test_a_connection_that_cannot_tell_keys_apart_is_refused_before_the_first_write(
    engine: Engine, promoted: Keyring, work: Any
) -> None:
    table = Table(
        "named",
        MetaData(),
        Column("name", String(9), primary_key=True),
        Column("p", EncryptedJSON),
    )
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TABLE named (name varchar(9) PRIMARY KEY, p longblob) CHARSET utf8mb4")
        )
        connection.execute(insert(table), [{"name": name, "p": 1} for name in ("a", "☃", "☂")])
    narrow = create_engine(engine.url.update_query_dict({"charset": "latin1"}))
    with pytest.raises(RotationError, match=r"latin1.*named\.name.*charset=utf8mb4"):
        work(narrow, table, keyring=promoted)
    narrow.dispose()
    assert under(engine, "v1", table) == 3
    numbered = create_engine(engine.url.update_query_dict({"charset": "latin1"}))
    fill(engine, 3)
    assert work(numbered, ledger, keyring=promoted).ok  # whose keys are numbers
    numbered.dispose()


@pytest.mark.parametrize("kind", ["text", "binary", "long values"])
def test_a_driver_that_escapes_by_backslashes_serves_where_they_mean_nothing(
    databases: Databases, promoted: Keyring, kind: str
) -> None:
    kinds: dict[str, Any] = {
        "text": String(40, collation="utf8mb4_bin"),
        "binary": LargeBinary(40).with_variant(VARBINARY(40), "mysql"),
        "long values": Integer(),
    }
    table = Table(
        "quoted",
        MetaData(),
        Column("id", kinds[kind], primary_key=True),
        Column("p", EncryptedJSON),
    )
    names = ["it's", 'a "name"', "back\\slash", "\\'", "'; --", "%s"]
    keys: list[Any] = [1, 2]
    if kind != "long values":
        keys = names if kind == "text" else [name.encode() + bytes(range(9)) for name in names]
    url = databases.url("mysql")
    engine = create_engine(url)
    table.create(engine)
    with engine.begin() as connection:
        value = "y" * 70_000 if kind == "long values" else 1
        connection.execute(insert(table), [{"id": name, "p": value} for name in keys])

    async def main() -> None:
        literal = create_async_engine(
            with_driver(url, "mysql+asyncmy"),
            connect_args={"init_command": "SET sql_mode = 'NO_BACKSLASH_ESCAPES'"},
        )
        try:
            report = await arotate(literal, table, keyring=promoted, batch_size=2)
            assert (report.ok, report.rotated) == (True, len(keys))
            assert (await averify(literal, table, keyring=promoted)).opened == len(keys)
            async with literal.connect() as connection:
                mode = await connection.scalar(text("SELECT @@sql_mode"))
            assert mode == "NO_BACKSLASH_ESCAPES"
        finally:
            await literal.dispose()

    asyncio.run(main())
    drop_everything(engine)
    engine.dispose()


def test_keys_of_an_enum_that_knows_its_metadata_serve(engine: Engine, promoted: Keyring) -> None:
    metadata = MetaData()
    table = Table(
        "kinds",
        metadata,
        Column("kind", Enum("z", "m", "a", name="kind", metadata=metadata), primary_key=True),
        Column("p", EncryptedJSON),
    )
    metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"kind": kind, "p": kind} for kind in "zma"])
    assert rotate(engine, table, keyring=promoted, batch_size=1).rotated == 3
    assert verify(engine, table, keyring=promoted.without("v1")).opened == 3
    metadata.drop_all(engine)
