"""Rows that their own key does not find, and keys that Python cannot hold: named, and at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.operations import Operations
from sqlalchemy import Column, Engine, Integer, MetaData, Table
from sqlalchemy.dialects import postgresql
from sqlalchemy.types import TypeEngine

from sqlalchemy_lucent import (
    EncryptedJSON,
    KeyInUseError,
    Keyring,
    RotationError,
    RotationReport,
    retire_check,
    rotate,
    verify,
)
from sqlalchemy_lucent import migrations as lucent_migrations
from sqlalchemy_lucent._cli.rotate import write_failures
from tests.databases import drop_everything
from tests.integration.test_sealed_check import Operate

on_postgresql = pytest.mark.parametrize("url", ["postgresql"], indirect=True)
on_mysql = pytest.mark.parametrize("url", ["mysql"], indirect=True)


def odd(type_: TypeEngine[Any]) -> Table:
    return Table(
        "odd",
        MetaData(),
        Column("id", type_, primary_key=True, autoincrement=False),
        Column("payload", EncryptedJSON(create_constraint=False)),
    )


def store(engine: Engine, keyring: Keyring, ddl: str, *keys: str) -> None:
    """Store rows with keys that are written as SQL."""
    sealed = keyring.for_context("odd.payload").seal(b'{"a": 1}', b"").hex()
    value = f"decode('{sealed}', 'hex')" if engine.dialect.name == "postgresql" else f"x'{sealed}'"
    with engine.begin() as connection:
        connection.exec_driver_sql(ddl)
        for key in keys:
            connection.exec_driver_sql(f"INSERT INTO odd (id, payload) VALUES ({key}, {value})")


def is_told(report: RotationReport, number: int) -> None:
    assert (report.failed_count, report.remaining) == (number, number)
    for failed in report.failed:
        assert failed.error == "RotationError"
        assert failed.reason is not None
        assert failed.reason.startswith("the database did not change the row")
        assert failed.key_version == "v1"


@pytest.mark.parametrize(
    ("url", "type_", "ddl", "keys"),
    [
        ("postgresql", sa.Float(), "id real PRIMARY KEY, payload bytea", ("0.1", "0.5")),
        (
            "postgresql",
            postgresql.INTERVAL(),
            "id interval PRIMARY KEY, payload bytea",
            ("interval '1 year'", "interval '1 day'"),
        ),
        (
            "sqlite",
            sa.Uuid(),
            "id char(36) PRIMARY KEY, payload blob",
            ("'12345678-1234-1234-1234-123456789012'", "'" + "0" * 32 + "'"),
        ),
    ],
    indirect=["url"],
    ids=["real", "interval", "uuid with hyphens"],
)
def test_a_row_that_its_key_does_not_find_is_named_after_one_pass(
    engine: Engine,
    keyring: Keyring,
    promoted: Keyring,
    type_: TypeEngine[Any],
    ddl: str,
    keys: tuple[str, str],
) -> None:
    store(engine, keyring, f"CREATE TABLE odd ({ddl})", *keys)
    progress: list[int] = []
    report = rotate(
        engine,
        odd(type_),
        keyring=promoted,
        on_progress=lambda seen: progress.append(seen.rotated),
    )
    is_told(report, 1)
    assert report.rotated == 1
    assert len(progress) <= 2  # a batch or two, in one pass
    assert verify(engine, odd(type_), keyring=promoted).opened == 2
    with pytest.raises(RotationError, match=r"odd.payload .* was not replaced: the database did"):
        rotate(engine, odd(type_), keyring=promoted, on_error="raise")


_SKIPS_ONE = """
    CREATE FUNCTION skip_one() RETURNS trigger LANGUAGE plpgsql
    AS 'BEGIN IF old.id = 1 THEN RETURN NULL; END IF; RETURN new; END'
"""


@on_postgresql
def test_a_row_that_a_rule_or_trigger_leaves_is_named(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    table = "CREATE TABLE odd (id int PRIMARY KEY, payload bytea)"
    store(engine, keyring, table, "1", "2", "3")
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP FUNCTION IF EXISTS skip_one CASCADE")
        connection.exec_driver_sql(_SKIPS_ONE)
        connection.exec_driver_sql(
            "CREATE TRIGGER t BEFORE UPDATE ON odd FOR EACH ROW EXECUTE FUNCTION skip_one()"
        )
    report = rotate(engine, odd(Integer()), keyring=promoted)
    is_told(report, 1)
    assert report.rotated == 2
    assert report.failed[0].primary_key == (1,)
    drop_everything(engine)
    store(engine, keyring, table, "1", "2")
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE RULE r AS ON UPDATE TO odd DO INSTEAD NOTHING")
    is_told(rotate(engine, odd(Integer()), keyring=promoted), 2)


@on_postgresql
@pytest.mark.parametrize("kind", ["decrypt", "encrypt", "rebind"])
def test_a_migration_logs_the_row_and_why(
    engine: Engine, keyring: Keyring, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    type_ = "jsonb" if kind == "encrypt" else "bytea"
    ddl = f"CREATE TABLE odd (id interval PRIMARY KEY, payload {type_})"
    store(engine, keyring, ddl)
    with engine.begin() as connection:
        sealed = keyring.for_context("old.payload" if kind == "rebind" else "odd.payload").seal(
            b'{"a": 1}', b""
        )
        value = sa.text("'{}'" if kind == "encrypt" else f"decode('{sealed.hex()}', 'hex')")
        for key in ("1 year", "1 day"):
            row = {"id": sa.literal_column(f"interval '{key}'"), "payload": value}
            connection.execute(sa.insert(sa.table("odd", *map(sa.column, row))).values(row))
    steps: dict[str, Callable[[Operations], None]] = {
        "decrypt": lambda op: lucent_migrations.decrypt_column(
            "odd", "payload", existing_type=sa.JSON(), operations=op
        ),
        "encrypt": lambda op: lucent_migrations.encrypt_column(
            "odd", "payload", existing_type=sa.JSON(), operations=op
        ),
        "rebind": lambda op: lucent_migrations.rebind_encrypted_column(
            "odd", "payload", from_context="old.payload", operations=op
        ),
    }
    with pytest.raises(RotationError, match=r"1 values of odd\.payload"):
        Operate(engine)(steps[kind])
    assert "the database did not change the row" in caplog.text
    assert "365" in caplog.text


@pytest.mark.parametrize(
    ("url", "type_", "ddl", "key", "says"),
    [
        (
            "postgresql",
            sa.DateTime(),
            "id timestamp PRIMARY KEY, payload bytea",
            "'infinity'",
            "such as a timestamp of infinity",
        ),
        (
            "postgresql",
            sa.Date(),
            "id date PRIMARY KEY, payload bytea",
            "'-infinity'",
            "such as a timestamp of infinity",
        ),
        (
            "sqlite",
            sa.LargeBinary(),
            "id blob PRIMARY KEY, payload blob",
            "'text'",
            "does not fit the column's type",
        ),
        (
            "mysql",
            sa.Date(),
            "id date PRIMARY KEY, payload longblob",
            "'0000-00-00'",
            "the date 0000-00-00 counts as NULL",
        ),
    ],
    indirect=["url"],
    ids=["timestamp", "date", "text for bytes", "zero date"],
)
def test_a_key_that_python_cannot_hold_is_told_in_a_sentence(
    engine: Engine,
    keyring: Keyring,
    promoted: Keyring,
    type_: TypeEngine[Any],
    ddl: str,
    key: str,
    says: str,
) -> None:
    if engine.dialect.name == "mysql":
        sa.event.listen(
            engine, "connect", lambda driver, _: driver.cursor().execute("SET sql_mode = ''")
        )
    store(engine, keyring, f"CREATE TABLE odd ({ddl})", key)
    with pytest.raises(RotationError, match=says):
        rotate(engine, odd(type_), keyring=promoted)


@on_mysql
@pytest.mark.parametrize(
    "by",
    [
        "HASH (id) PARTITIONS 3",
        "RANGE (id) (PARTITION a VALUES LESS THAN (20), PARTITION b VALUES LESS THAN MAXVALUE)",
    ],
    ids=["hash", "range"],
)
def test_partitions_are_paged_as_one_table(
    engine: Engine, keyring: Keyring, promoted: Keyring, by: str
) -> None:
    ddl = "CREATE TABLE odd (id int unsigned PRIMARY KEY, payload longblob) PARTITION BY "
    store(engine, keyring, ddl + by, *map(str, range(1, 40)), "4294967295")
    report = rotate(engine, odd(Integer()), keyring=promoted, batch_size=7)
    assert (report.rotated, report.ok) == (40, True)
    retire_check(engine, "v1", odd(Integer()))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_the_command_says_why_a_row_was_not_changed(
    engine: Engine, keyring: Keyring, promoted: Keyring, capsys: pytest.CaptureFixture[str]
) -> None:
    store(engine, keyring, "CREATE TABLE odd (id real PRIMARY KEY, payload bytea)", "0.1")
    report = rotate(engine, odd(sa.Float()), keyring=promoted)
    write_failures(report.failed, report.failed_count)
    said = " ".join(capsys.readouterr().out.split())
    assert "1 value did not open or were refused by the database" in said
    assert "its key does not find its row" in said


@on_mysql
def test_a_history_that_the_table_keeps_needs_the_key(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    with engine.connect() as connection:
        if not getattr(connection.dialect, "is_mariadb", False):
            pytest.skip("MySQL has no system-versioned tables")
    table = odd(Integer())
    ddl = "CREATE TABLE odd (id int PRIMARY KEY, payload longblob) WITH SYSTEM VERSIONING"
    store(engine, keyring, ddl, "1", "2")
    assert rotate(engine, table, keyring=promoted).ok
    with pytest.raises(KeyInUseError, match=r"odd keeps 2 earlier .*DELETE HISTORY"):
        retire_check(engine, "v1", table)
    with engine.begin() as connection:
        connection.exec_driver_sql("DELETE HISTORY FROM odd")
    retire_check(engine, "v1", table)
