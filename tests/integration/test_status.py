"""Counting values per key, and keeping keys that rows need."""

from __future__ import annotations

import asyncio
import json
import math
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Engine,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqlalchemy_lucent import (
    ConfigurationError,
    EncryptedJSON,
    KeyInUseError,
    Keyring,
    RotationError,
    aretire_check,
    astatus,
    retire_check,
    rotate,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent.models import computed_key_version, key_version_type
from sqlalchemy_lucent.rotation import _status, needs_rotation
from tests.conftest import KEY_1, KEY_2, Databases
from tests.databases import create_unguarded, drop_everything
from tests.integration.workers import fill, ledger, metadata

raw_ledger = Table("ledger", MetaData(), *(Column(name) for name in ("id", "free", "bound")))


def rows_of(engine: Engine) -> list[tuple[str, str | None, str | None, int]]:
    return [
        (row.column, row.key_version, row.fingerprint, row.count)
        for row in status(engine, ledger).rows
    ]


@pytest.mark.parametrize("version", [1, None, "", "v 1", "v1:"])
def test_retire_check_refuses_what_is_no_version(engine: Engine, version: Any) -> None:
    with pytest.raises(RotationError, match="takes a key version"):
        retire_check(engine, version, ledger)


@pytest.mark.parametrize("settle", [-1, True, "1", math.nan, math.inf])
def test_retire_check_refuses_a_wait_that_is_no_time(engine: Engine, settle: Any) -> None:
    fill(engine, 1)
    with pytest.raises(RotationError, match="settle is a number of seconds, from 0"):
        retire_check(engine, "v2", ledger, settle=settle)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_text_that_the_driver_cannot_read_is_not_quoted(engine: Engine) -> None:
    table = Table(
        "named", MetaData(), Column("name", Text, primary_key=True), Column("v", EncryptedJSON)
    )
    table.create(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO named (name) VALUES (CAST(x'4a616e65ff' AS TEXT))")
    with pytest.raises(RotationError, match="Could not decode to UTF-8") as caught:
        verify(engine, table)
    assert "Jane" not in str(caught.value)


def test_values_are_counted_by_column_version_and_fingerprint(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    fill(engine, 10)
    same_name = Keyring({"v1": bytes(32)})
    with engine.begin() as connection:
        for identity, sealer in ((1, promoted), (2, promoted), (3, same_name)):
            connection.execute(
                update(raw_ledger)
                .where(raw_ledger.c.id == identity)
                .values(free=sealer.for_context("ledger.free").seal(b"1"))
            )
    v1, v2 = promoted.fingerprint("v1"), promoted.fingerprint("v2")
    other = same_name.fingerprint("v1")
    assert sorted(rows_of(engine)) == sorted(
        [
            ("bound", "v1", v1, 10),
            ("free", "v1", v1, 7),
            ("free", "v1", other, 1),
            ("free", "v2", v2, 2),
        ]
    )


@pytest.mark.parametrize(
    "foreign", [b"", b'{"a": 1}', b"gAAAAABm", b"v1:", b"v1:\x02abcd", b"\xff\xfe:\x01abcdefgh"]
)
def test_what_is_not_sealed_is_counted_apart(engine: Engine, foreign: bytes) -> None:
    create_unguarded(metadata, engine)
    fill(engine, 4)
    with engine.begin() as connection:
        connection.execute(
            update(raw_ledger).where(raw_ledger.c.id < 2).values(free=foreign, bound=None)
        )
    counted = {(column, version): count for column, version, _, count in rows_of(engine)}
    assert counted == {("free", None): 2, ("free", "v1"): 2, ("bound", "v1"): 2}


def test_no_value_leaves_the_database_and_no_key_is_needed(engine: Engine) -> None:
    fill(engine, 4)

    def no_key() -> Keyring:
        raise AssertionError("a key was asked for")

    set_default_keyring(no_key)
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement.lower())

    assert len(status(engine, ledger).rows) == 2
    asking = [s for s in statements if "ledger" in s and not s.startswith("show create table")]
    assert all("count(*)" in statement for statement in asking)
    assert sum("group by" in statement for statement in asking) == 2


def test_a_status_is_json_ready(engine: Engine, keyring: Keyring) -> None:
    fill(engine, 2)
    fingerprint = keyring.fingerprint("v1")
    assert json.loads(json.dumps(status(engine, ledger.c.free).as_dict())) == {
        "rows": [
            {
                "table": "ledger",
                "column": "free",
                "key_version": "v1",
                "fingerprint": fingerprint,
                "count": 2,
            }
        ],
        "left_out": [],
    }


def test_an_empty_table_has_no_rows_in_the_status(engine: Engine) -> None:
    metadata.create_all(engine)
    assert status(engine, ledger).rows == ()


def test_a_connection_keeps_its_transaction(engine: Engine, promoted: Keyring) -> None:
    metadata.create_all(engine)
    with engine.connect() as connection, connection.begin():
        connection.execute(insert(ledger).values(id=1, free=1))
        assert [row.count for row in status(connection, ledger).rows] == [1]
        assert needs_rotation(connection, ledger, keyring=promoted)
        assert needs_rotation(connection, ledger, keyring=lambda: promoted)
        assert connection.in_transaction()
    assert not needs_rotation(engine, ledger)


def test_an_async_engine_is_counted(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.execute(insert(ledger).values(id=1, free=1))
            report = await astatus(connection, ledger)
            assert [row.count for row in report.rows] == [1]
            with pytest.raises(KeyInUseError):
                await aretire_check(connection, "v1", ledger)
        assert await astatus(engine, ledger) == report
        both = Keyring({"v1": KEY_1, "v2": KEY_2}, primary="v1")
        await aretire_check(engine, "v2", ledger, keyring=both)

    run_async(work)


# -- Retiring a key --------------------------------------------------------------------------------


def test_a_key_that_rows_need_is_not_retired(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 5)
    with pytest.raises(
        KeyInUseError, match=r"'v1' is still needed: 5 in ledger\.free, 5 in ledger\.bound"
    ):
        retire_check(engine, "v1", ledger)
    rotate(engine, ledger, keyring=promoted)
    retire_check(engine, "v1", ledger)
    with pytest.raises(KeyInUseError):
        retire_check(engine, "v2", ledger)


def test_values_of_two_keys_of_one_name_are_told_as_one_sum_per_column(engine: Engine) -> None:
    fill(engine, 5)
    sealed = Keyring({"v1": bytes(32)}).for_context("ledger.free").seal(b"1")
    with engine.begin() as connection:
        connection.execute(update(raw_ledger).where(raw_ledger.c.id < 2).values(free=sealed))
    with pytest.raises(
        KeyInUseError,
        match=r"needed: 5 in ledger\.free, 5 in ledger\.bound\. Rotate .*; verify\(\) names those",
    ):
        retire_check(engine, "v1", ledger)


def test_a_version_that_neither_a_value_nor_the_keyring_has_is_no_proof(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    fill(engine, 5)
    with pytest.raises(RotationError, match=r"neither .* has key version 'v11'"):
        retire_check(engine, "v11", ledger)
    with pytest.raises(RotationError, match=r"neither .* has key version 'v2'"):
        retire_check(engine, "v2", ledger)
    set_default_keyring(promoted)
    retire_check(engine, "v2", ledger)
    set_default_keyring(keyring.adding("v3", KEY_2))
    retire_check(engine, "v3", ledger)

    def none() -> Keyring:
        raise ConfigurationError("no keyring")

    set_default_keyring(none)
    with pytest.raises(KeyInUseError):
        retire_check(engine, "v1", ledger)
    with pytest.raises(RotationError, match="neither"):
        retire_check(engine, "v2", ledger)


def test_with_a_keyring_every_value_opens_without_the_key(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    fill(engine, 5)
    rotate(engine, ledger, keyring=promoted)
    retire_check(engine, "v1", ledger, keyring=promoted)
    retire_check(engine, "v1", ledger, keyring=lambda: promoted)
    retire_check(engine, "v1", ledger, keyring=promoted.without("v1"))  # the default one knows it
    with pytest.raises(ConfigurationError, match="primary"):
        retire_check(engine, "v1", ledger, keyring=keyring)

    # Somebody puts the other version in front of a value that needs v1.
    needs_v1 = keyring.for_context("ledger.free").seal(b"1")
    prefix = promoted.for_context("ledger.free").primary.header
    forged = prefix + needs_v1[len(prefix) :]
    with engine.begin() as connection:
        connection.execute(update(raw_ledger).where(raw_ledger.c.id == 2).values(free=forged))
    retire_check(engine, "v1", ledger)  # opens nothing
    with pytest.raises(KeyInUseError, match=r"1 values .*ledger\.free .*\(2,\) \(TamperedError"):
        retire_check(engine, "v1", ledger, keyring=promoted)


def test_one_row_of_one_target_is_enough_to_keep_a_key(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 5)
    other = Table(
        "other", MetaData(), Column("id", Integer, primary_key=True), Column("p", EncryptedJSON)
    )
    other.create(engine)
    rotate(engine, ledger, keyring=promoted)
    with engine.begin() as connection:
        connection.execute(insert(other).values(id=1, p="left behind"))
    retire_check(engine, "v1", ledger)
    with pytest.raises(KeyInUseError, match=r"1 in other\.p"):
        retire_check(engine, "v1", [ledger, other])


def test_a_slow_writer_with_the_old_primary_is_seen_by_the_second_count(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 5)
    rotate(engine, ledger, keyring=promoted)
    slow = create_engine(engine.url)
    sealed, counted = threading.Event(), threading.Event()

    def write_slowly() -> None:  # a process whose keyring still has the old primary
        with slow.begin() as connection:
            connection.execute(update(ledger).where(ledger.c.id == 3).values(free={"late": True}))
            sealed.set()
            counted.wait()

    thread = threading.Thread(target=write_slowly)
    thread.start()
    sealed.wait()
    retire_check(engine, "v1", ledger)  # one count cannot see it

    @event.listens_for(engine, "checkin", once=True)
    def after_the_first_count(*_: Any) -> None:
        counted.set()
        thread.join()  # however long the commit takes

    try:
        with pytest.raises(KeyInUseError, match=r"1 in ledger\.free"):
            retire_check(engine, "v1", ledger, settle=0.01)
    finally:
        counted.set()
        slow.dispose()


@pytest.mark.parametrize("settle", [-1, "1", None, True])
def test_settling_for_no_time_that_there_is_gets_refused(engine: Engine, settle: Any) -> None:
    with pytest.raises(RotationError, match="settle"):
        retire_check(engine, "v1", ledger, settle=settle)


def test_settling_inside_a_transaction_is_refused(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 1)
    with engine.connect() as connection:
        connection.begin()
        with pytest.raises(RotationError, match="inside a transaction"):
            retire_check(connection, "v2", ledger, settle=0.01)
        connection.rollback()
        set_default_keyring(promoted)
        retire_check(connection, "v2", ledger, settle=0.01)


def test_an_async_second_count_sees_what_is_committed_while_the_event_loop_runs(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any],
) -> None:
    async def write_late(engine: AsyncEngine) -> None:
        await asyncio.sleep(0.3)
        async with engine.begin() as connection:
            await connection.execute(insert(ledger).values(id=1, free="late"))

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        writing = asyncio.create_task(write_late(engine))
        with pytest.raises(KeyInUseError, match=r"1 in ledger\.free"):
            await aretire_check(engine, "v1", ledger, settle=1.5)
        await writing

    run_async(work)


def test_a_synchronous_engine_is_refused_by_the_async_counts() -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(RotationError, match="AsyncEngine"):
        asyncio.run(astatus(engine))  # type: ignore[arg-type]
    with pytest.raises(RotationError, match="AsyncEngine"):
        asyncio.run(aretire_check(engine, "v1"))  # type: ignore[arg-type]
    with pytest.raises(RotationError, match="takes a key version"):
        asyncio.run(aretire_check(create_async_engine("sqlite+aiosqlite://"), ""))
    engine.dispose()


def test_rows_that_a_policy_hides_are_not_taken_for_done(
    databases: Databases, keyring: Keyring, promoted: Keyring
) -> None:
    engine = create_engine(databases.url("postgresql"))
    fill(engine, 4)
    role = f"lucent_test_owner_{os.getpid()}"
    with engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {role}"))
        connection.execute(text(f"ALTER TABLE ledger OWNER TO {role}"))
        connection.execute(text("ALTER TABLE ledger ENABLE ROW LEVEL SECURITY"))
        connection.execute(text("ALTER TABLE ledger FORCE ROW LEVEL SECURITY"))
        connection.execute(text("CREATE POLICY mine ON ledger USING (id = 1)"))
    try:
        with engine.connect() as connection:
            connection.execute(text(f"SET ROLE {role}"))
            connection.commit()
            asked: list[Callable[[], object]] = [
                lambda: status(connection, ledger),
                lambda: verify(connection, ledger),
                lambda: rotate(connection, ledger, keyring=promoted),
                lambda: needs_rotation(connection, ledger, keyring=promoted),
                lambda: retire_check(connection, "v1", ledger),
            ]
            for ask in asked:
                with pytest.raises(RotationError, match="row-level security"):
                    ask()
                connection.rollback()
            connection.execute(text("RESET ROLE"))
            connection.commit()
        # Who is above the policies sees all.
        assert rotate(engine, ledger, keyring=promoted).rotated == 8
    finally:
        drop_everything(engine)
        with engine.begin() as connection:
            connection.execute(text(f"DROP ROLE {role}"))
        engine.dispose()


# -- In short transactions -------------------------------------------------------------------------

MANY = 70_000
OFTEN = "UPDATE ledger SET bound = randomblob(9) WHERE id = 5"


@pytest.fixture
def large(tmp_path: Path, keyring: Keyring) -> Iterator[Engine]:
    """SQLite in rollback-journal mode, with many rows under v2 and the last one under v1."""
    engine = create_engine(f"sqlite:///{tmp_path}/large.db")
    metadata.create_all(engine)
    keys = keyring.for_context("ledger.free")
    new = Keyring({"v2": bytes(range(32, 64))}).for_context("ledger.free").seal(b"1")
    with engine.begin() as connection:
        connection.execute(
            insert(raw_ledger),
            [{"id": n, "free": new if n < MANY else keys.seal(b"1")} for n in range(1, MANY + 1)],
        )
    yield engine
    engine.dispose()


def write_between(engine: Engine, statement: str, times: int) -> list[int]:
    """Have another connection, which does not wait for a lock, write before later statements."""
    assert engine.url.database is not None
    writer = sqlite3.connect(engine.url.database, timeout=0, isolation_level=None)
    written: list[int] = []

    @event.listens_for(engine, "before_cursor_execute")
    def write(_c: Any, _cursor: Any, asked: str, *_rest: Any) -> None:
        if len(written) < times and "ledger.id > " in asked:
            writer.execute(statement)
            written.append(1)

    @event.listens_for(engine, "engine_disposed")
    def close(_engine: Any) -> None:
        writer.close()

    return written


def test_writers_get_their_turn_while_a_sqlite_database_is_counted(
    large: Engine, promoted: Keyring
) -> None:
    written = write_between(large, OFTEN, 10**6)
    counted = {row.key_version: row.count for row in status(large, ledger.c.free).rows}
    assert counted == {"v1": 1, "v2": MANY - 1}
    assert len(written) > 3
    written.clear()
    with pytest.raises(KeyInUseError, match=r"1 in ledger\.free"):
        retire_check(large, "v1", ledger.c.free)
    assert len(written) > 3
    written.clear()
    assert needs_rotation(large, ledger, keyring=promoted)
    assert len(written) > 3


def test_a_row_that_moves_while_a_sqlite_database_is_counted_is_found(large: Engine) -> None:
    write_between(large, f"UPDATE ledger SET id = -1 WHERE id = {MANY}", 1)
    with pytest.raises(KeyInUseError, match=r"1 in ledger\.free"):
        retire_check(large, "v1", ledger)


def test_a_sqlite_database_that_never_rests_is_counted_at_once_or_not_at_all(
    large: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_between(large, OFTEN, 10**6)
    set_default_keyring(Keyring({"v7": bytes(range(64, 96))}))
    retire_check(large, "v7", ledger)
    monkeypatch.setattr(_status, "_BEARABLE", 0)  # as if it were a hundred times as large
    with pytest.raises(RotationError, match="others write to ledger all the time"):
        retire_check(large, "v7", ledger)


@pytest.mark.parametrize("how", ["generated column", "expression", "none"])
def test_a_check_of_one_version_asks_the_index_for_it(
    engine: Engine, keyring: Keyring, how: str
) -> None:
    own = MetaData()
    column: Column[Any] = Column("p", EncryptedJSON)
    table = Table("sampled", own, Column("id", Integer, primary_key=True), column)
    if how == "generated column":
        table.append_column(
            Column("version", key_version_type(), computed_key_version("p"), index=True)
        )
    elif how == "expression":
        if engine.dialect.name == "mysql":
            pytest.skip("MariaDB has no index on an expression")
        Index("by_version", column.key_version)
    own.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": n, "p": n} for n in (1, 2, 3)])
    asked: list[tuple[str, Any]] = []

    @event.listens_for(engine, "before_cursor_execute")
    def remember(_c: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if "count(*)" in statement and "sampled" in statement:
            asked.append((statement, parameters))

    with pytest.raises(KeyInUseError, match=r"3 in sampled\.p"):
        retire_check(engine, "v1", table)
    statement, parameters = asked.pop()
    assert ("version = " in statement) == (how == "generated column")
    if engine.dialect.name == "sqlite" and how != "none":
        assert len(asked) == 1  # its plan
        with engine.connect() as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters).all()
        assert [str(step[-1])[:6] for step in plan] == ["SEARCH"]
    own.drop_all(engine)  # to reflect an index on an expression is more than SQLAlchemy can


def test_a_version_column_that_anybody_may_write_is_not_believed(engine: Engine) -> None:
    model = Table(
        "sampled",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("p", EncryptedJSON),
        Column("version", key_version_type(), computed_key_version("p"), index=True),
    )
    table = Table(
        "sampled",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("p", EncryptedJSON),
        Column("version", String(32)),
    )
    table.create(engine)
    with engine.begin() as connection:
        connection.execute(insert(table).values(id=1, p=1, version="v9"))
    with pytest.raises(KeyInUseError, match=r"1 in sampled\.p"):
        retire_check(engine, "v1", model)


def test_a_key_that_values_need_under_another_name_is_not_retired(engine: Engine) -> None:
    set_default_keyring(Keyring({"v2": KEY_1}))
    fill(engine, 3)
    set_default_keyring(Keyring({"v1": KEY_1, "v3": KEY_2}, primary="v3"))
    with pytest.raises(KeyInUseError, match=r"3 values in ledger\.free .* the name 'v2'"):
        retire_check(engine, "v1", metadata)


def test_a_rotation_between_two_names_of_one_key_is_not_ok_and_says_why(engine: Engine) -> None:
    set_default_keyring(Keyring({"v1": KEY_1}))
    fill(engine, 3)
    report = rotate(engine, metadata, keyring=Keyring({"v2": KEY_1}))
    assert (report.ok, report.rotated, report.failed_count) == (False, 0, 6)
    assert all("two names of one key" in str(row.reason) for row in report.failed)
    assert {row.key_version for row in status(engine, metadata).rows} == {"v1"}
