"""Rotations that are killed, refused, cut off, interrupted, or meet rows that do not open."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    column,
    create_engine,
    event,
    insert,
    select,
    table,
    text,
    update,
)
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    RotationError,
    RotationProgress,
    RotationReport,
    arotate,
    rotate,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent.rotation.report import MAX_FAILED
from tests.conftest import KEY_2, LONG
from tests.databases import drop_everything
from tests.integration.workers import ROOT, contents, fill, keys, ledger, reap, start

KILLS = 50 if LONG else 5

raw_ledger = table("ledger", column("id"), column("free"), column("bound"))


def count_under(engine: Engine, version: str, target: Any = ledger) -> int:
    return sum(row.count for row in status(engine, target).rows if row.key_version == version)


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture(params=["one connection", "reads ahead"])
def engine(request: pytest.FixtureRequest, url: URL) -> Iterator[Engine]:
    """An engine without a second connection to read ahead with, and one that has it."""
    reads_ahead = request.param == "reads ahead"
    if reads_ahead and url.get_backend_name() == "sqlite":
        pytest.skip("on SQLite, nothing is read ahead")
    engine = create_engine(url, pool_size=5 if reads_ahead else 1)
    yield engine
    drop_everything(engine)
    engine.dispose()


# What it rotates with is another engine, so one form of the fixture's is enough.
has_its_own_engine = pytest.mark.parametrize("engine", ["one connection"], indirect=True)


# -- Killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.long
@has_its_own_engine
def test_a_run_killed_at_any_moment_loses_nothing_and_the_next_goes_on(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    rows, batch_size = 600, 10
    fill(engine, rows)
    set_default_keyring(promoted)
    expected = {n: ({"seq": 0}, {"seq": 0}) for n in range(rows)}
    primary, reached = "v2", 0
    for _ in range(KILLS):
        process = start("rotator", url_of(engine), batch_size, 0.001, primary=primary)
        try:
            told = [int(process.stdout.readline()) for _ in range(random.randrange(1, 10))]
            # Before its first batch, a run connects, prepares and counts.
            time.sleep(random.uniform(0, 0.005 if told[-1] else 0.03))
            process.send_signal(signal.SIGKILL)
        finally:
            reap([process])
        assert process.returncode == -signal.SIGKILL
        assert contents(engine, promoted) == expected
        done = count_under(engine, primary)
        assert done >= reached + told[-1]
        reached = done
        if done > rows:  # turn back, so that there is always something to do
            primary = "v1" if primary == "v2" else "v2"
            reached = count_under(engine, primary)
    report = rotate(engine, ledger, keyring=promoted)
    assert report.ok
    assert rotate(engine, ledger, keyring=promoted).rotated == 0
    assert contents(engine, promoted.without("v1")) == expected


# -- Interrupted -----------------------------------------------------------------------------------


@has_its_own_engine
def test_ctrl_c_rolls_the_batch_in_hand_back_and_leaves(engine: Engine) -> None:
    fill(engine, 300)
    process = start("rotator", url_of(engine), 10, 0.002)
    try:
        told = [int(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        reap([process])
    assert "KeyboardInterrupt" in errors
    told += [int(line) for line in output.split()]
    # What was told is committed; a batch after that may be too.
    assert told[-1] <= count_under(engine, "v2") <= told[-1] + 20


@pytest.mark.parametrize("where", ["opening", "committing"])
@pytest.mark.parametrize("engine", ["one connection"], indirect=True)
def test_an_interrupt_inside_a_batch_rolls_it_back(
    engine: Engine, promoted: Keyring, where: str
) -> None:
    fill(engine, 30)
    if where == "opening":
        # The old key is what a batch calls between its statements (on SQLite: inside of one).
        keys = promoted.for_context("ledger.free")
        (old,) = (subkey for subkey in keys.subkeys.values() if subkey is not keys.primary)
        calls = iter([*([False] * 15), True, *([False] * 100)])

        class Interrupted:
            def open(self, sealed: bytes, row: bytes = b"") -> bytes | None:
                if next(calls):
                    raise KeyboardInterrupt
                return old.open(sealed, row)

        keys.subkeys[old.header] = Interrupted()  # type: ignore[assignment]
    else:
        updates = iter(range(100))
        updated: list[int] = []

        @event.listens_for(engine, "before_cursor_execute")
        def interrupt(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
            if statement.startswith("UPDATE"):
                updated[:] = [next(updates)]
            elif statement == "COMMIT" and updated == [1]:
                updated.clear()
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rotate(engine, ledger, keyring=promoted, batch_size=10)
    assert count_under(engine, "v2") == 20
    with engine.begin() as connection:  # nothing is locked
        connection.execute(update(raw_ledger).values(id=raw_ledger.c.id))
    promoted._contexts.clear()
    assert rotate(engine, ledger, keyring=promoted).rotated == 40


# -- Rows that do not open -------------------------------------------------------------------------


def spoil(engine: Engine, spoilt: dict[int, bytes]) -> None:
    with engine.begin() as connection:
        for identity, value in spoilt.items():
            connection.execute(
                update(raw_ledger).where(raw_ledger.c.id == identity).values(free=value)
            )


def raw_values(engine: Engine) -> dict[int, bytes]:
    with engine.connect() as connection:
        found = connection.execute(select(raw_ledger.c.id, raw_ledger.c.free)).all()
    return {identity: bytes(value) for identity, value in found}


def faulty(engine: Engine, keyring: Keyring) -> Iterator[tuple[bytes, str]]:
    """Give values that do not open, each with the error that says why, for ever."""
    good = keyring.for_context("ledger.free").seal(b"1")
    elsewhere = keyring.for_context("other.column").seal(b"1")
    lost = Keyring({"v9": KEY_2}).for_context("ledger.free").seal(b"1")
    another = Keyring({"v1": KEY_2}).for_context("ledger.free").seal(b"1")
    while True:
        yield good[:-1] + bytes([good[-1] ^ 1]), "TamperedError"
        yield elsewhere, "TamperedError"
        yield good[:20], "TamperedError"
        yield lost, "UnknownKeyVersionError"
        yield another, "WrongKeyError"
        yield b'{"password": "hunter2"}', "NotSealedError"
        yield b"", "NotSealedError"
        yield b"v1:", "NotSealedError"
        yield b"\xff\x00 no text", "NotSealedError"
        yield b"v1:\x02" + good[4:], "NotSealedError"


def test_one_per_cent_that_does_not_open_is_named_and_left(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    fill(engine, 1000)
    faults = dict(zip(range(50, 1000, 100), faulty(engine, keyring), strict=False))
    spoil(engine, {identity: value for identity, (value, _) in faults.items()})
    before = raw_values(engine)
    report = rotate(engine, ledger, keyring=promoted, batch_size=64)
    assert {(row.table, row.column, row.primary_key, row.error) for row in report.failed} == {
        ("ledger", "free", (identity,), error) for identity, (_, error) in faults.items()
    }
    assert (report.ok, report.rotated) == (False, 2000 - len(faults))
    assert (report.failed_count, report.remaining) == (len(faults), len(faults))
    after = raw_values(engine)
    assert {n for n in before if after[n] == before[n]} == set(faults)
    found = verify(engine, ledger, keyring=promoted)
    assert (found.opened, found.failed) == (report.rotated, report.failed)


def test_batches_of_nothing_else_are_passed_over(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    fill(engine, 60)
    faults = dict(zip(range(10, 50), faulty(engine, keyring), strict=False))
    spoil(engine, {identity: value for identity, (value, _) in faults.items()})
    batches: list[RotationProgress] = []
    report = rotate(
        engine, ledger.c.free, keyring=promoted, batch_size=10, on_progress=batches.append
    )
    assert (report.rotated, report.failed_count, report.remaining) == (20, 40, 40)
    assert len(batches) == 6  # one pass, and no row twice


def test_a_run_of_nothing_else_ends(engine: Engine, keyring: Keyring, promoted: Keyring) -> None:
    fill(engine, 20)
    spoil(engine, dict.fromkeys(range(20), b"plaintext"))
    report = rotate(engine, ledger.c.free, keyring=promoted, batch_size=5)
    assert (report.ok, report.rotated, report.failed_count) == (False, 0, 20)


def test_on_error_raise_rolls_the_batch_back_and_names_the_row(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 30)
    spoil(engine, {15: b"plaintext"})
    with pytest.raises(RotationError, match=r"ledger\.free .* \(15,\) .*NotSealedError"):
        rotate(engine, ledger.c.free, keyring=promoted, batch_size=10, on_error="raise")
    assert count_under(engine, "v2") == 10


def test_a_report_names_the_first_failures_and_counts_all(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, MAX_FAILED + 500)
    with engine.begin() as connection:
        connection.execute(update(raw_ledger).values(free=b"plaintext"))
    report = rotate(engine, ledger.c.free, keyring=promoted)
    assert (len(report.failed), report.failed_count) == (MAX_FAILED, MAX_FAILED + 500)
    found = verify(engine, ledger.c.free, keyring=promoted)
    assert (len(found.failed), found.failed_count, found.ok) == (
        MAX_FAILED,
        MAX_FAILED + 500,
        False,
    )


def test_text_that_was_never_sealed_is_named_even_if_it_is_no_text(
    tmp_path: Path, promoted: Keyring
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/text.db")
    fill(engine, 5)
    with engine.begin() as connection:
        connection.execute(text("UPDATE ledger SET free = CAST(x'ff7b' AS TEXT) WHERE id = 1"))
        connection.execute(text("UPDATE ledger SET free = '{\"a\": 1}' WHERE id = 3"))
    for dry_run in (True, False):
        report = rotate(engine, ledger, keyring=promoted, dry_run=dry_run)
        assert (report.rotated, [row.primary_key for row in report.failed]) == (8, [(1,), (3,)])
    engine.dispose()


def test_rows_whose_primary_key_is_null_are_refused_before_the_first_write(
    tmp_path: Path, promoted: Keyring
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/null.db")  # SQLite alone allows it
    documents = Table(
        "documents",
        MetaData(),
        Column("id", String, primary_key=True),
        Column("payload", EncryptedJSON),
    )
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE documents (id VARCHAR PRIMARY KEY, payload BLOB)"))
        connection.execute(insert(documents), [{"id": n, "payload": n} for n in ("a", "b")])
        connection.execute(text("INSERT INTO documents SELECT NULL, payload FROM documents"))
    with pytest.raises(RotationError, match="table documents has a row with NULL"):
        rotate(engine, documents, keyring=promoted)
    with pytest.raises(RotationError, match="table documents has a row with NULL"):
        verify(engine, documents, keyring=promoted)
    assert count_under(engine, "v1", documents) == 4
    engine.dispose()


# -- Transient faults ------------------------------------------------------------------------------


class Trap:
    """
    Makes the database itself refuse the first so many updates of the ledger with a given error.

    The count is kept where a rollback does not reach.
    """

    def __init__(self, engine: Engine, error: str, times: int) -> None:
        self._engine = engine
        statements = {"postgresql": self._postgresql, "mysql": self._mysql}[engine.dialect.name]
        with engine.begin() as connection:
            for statement in statements(error, times):
                connection.exec_driver_sql(statement)

    def _postgresql(self, error: str, times: int) -> list[str]:
        return [
            "CREATE SEQUENCE IF NOT EXISTS refusals",
            (
                "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                f" IF nextval('refusals') <= {times} THEN"
                f" RAISE EXCEPTION 'refused by the test' USING ERRCODE = '{error}';"
                " END IF; RETURN NULL; END $$"
            ),
            (
                "CREATE TRIGGER refusing BEFORE UPDATE ON ledger"
                " FOR EACH STATEMENT EXECUTE FUNCTION refuse()"
            ),
        ]

    def _mysql(self, error: str, times: int) -> list[str]:
        return [
            "CREATE TABLE refusals (n int) ENGINE=MyISAM",
            "INSERT INTO refusals VALUES (0)",
            (
                "CREATE TRIGGER refusing BEFORE UPDATE ON ledger FOR EACH ROW BEGIN"
                f" IF (SELECT n FROM refusals) < {times} THEN"
                " UPDATE refusals SET n = n + 1;"
                f" SIGNAL SQLSTATE '40001' SET MYSQL_ERRNO = {error}, MESSAGE_TEXT = 'refused';"
                " END IF; END"
            ),
        ]

    def remove(self) -> None:
        with self._engine.begin() as connection:
            if self._engine.dialect.name == "postgresql":
                connection.exec_driver_sql("DROP FUNCTION IF EXISTS refuse() CASCADE")
                connection.exec_driver_sql("DROP SEQUENCE refusals")


@pytest.fixture
def refuse(engine: Engine) -> Iterator[Callable[[str, int], None]]:
    traps: list[Trap] = []

    def set_trap(error: str, times: int) -> None:
        traps.append(Trap(engine, error, times))

    yield set_trap
    for trap in traps:
        trap.remove()


ERRORS = {
    "postgresql": {
        "deadlock": "40P01",
        "serialization failure": "40001",
        "lock timeout": "55P03",
        "statement timeout": "57014",
        "too many connections": "53300",
    },
    "mysql": {
        "deadlock": "1213",
        "serialization failure": "1020",
        "lock timeout": "1205",
        "statement timeout": "1969",
        "MySQL's statement timeout": "3024",
    },
}


@pytest.mark.parametrize(
    "url, fault", [(url, fault) for url in ERRORS for fault in ERRORS[url]], indirect=["url"]
)
def test_a_passing_fault_is_retried_with_smaller_batches(
    engine: Engine, promoted: Keyring, fault: str, refuse: Callable[[str, int], None]
) -> None:
    fill(engine, 40)
    refuse(ERRORS[engine.dialect.name][fault], 2)
    batches: list[int] = []
    report = rotate(
        engine,
        ledger,
        keyring=promoted,
        batch_size=20,
        on_progress=lambda progress: batches.append(progress.rotated),
    )
    assert (report.ok, report.rotated) == (True, 80)
    assert batches == [10, 50, 80]  # a quarter of the batch got through, then whole ones


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_fault_that_does_not_pass_is_reported_in_words(
    engine: Engine, promoted: Keyring, refuse: Callable[[str, int], None]
) -> None:
    fill(engine, 40)
    refuse(ERRORS[engine.dialect.name]["deadlock"], 10**6)
    with pytest.raises(RotationError, match=r"refused.* 0 values were re-encrypted") as caught:
        rotate(engine, ledger, keyring=promoted, batch_size=10, retries=2)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert count_under(engine, "v1") == 80


def engine_with(settings: dict[str, str], engine: Engine) -> Engine:
    """Return another engine, whose connections begin with the statement for their database."""
    other = create_engine(engine.url)

    @event.listens_for(other, "connect")
    def begin_with(driver: Any, _record: Any) -> None:
        driver.cursor().execute(settings[engine.dialect.name])
        driver.commit()

    return other


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
@has_its_own_engine
def test_a_batch_that_takes_longer_than_a_statement_may_is_halved(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 12)
    dialect: Any = engine.dialect
    if dialect.name == "mysql" and not dialect.is_mariadb:
        pytest.skip("MySQL has a limit for SELECT alone")
    slowly = {  # 0.6 seconds for all rows
        "postgresql": [
            (
                "CREATE FUNCTION slowed() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN PERFORM pg_sleep(0.05); RETURN NEW; END $$"
            ),
            "CREATE TRIGGER slowing BEFORE UPDATE ON ledger FOR EACH ROW EXECUTE FUNCTION slowed()",
        ],
        "mysql": ["CREATE TRIGGER slowing BEFORE UPDATE ON ledger FOR EACH ROW DO SLEEP(0.05)"],
    }
    limit = {
        "postgresql": "SET statement_timeout = '500ms'",
        "mysql": "SET SESSION max_statement_time = 0.5",
    }
    with engine.begin() as connection:
        for statement in slowly[engine.dialect.name]:
            connection.exec_driver_sql(statement)
    limited = engine_with(limit, engine)
    errors: list[str] = []
    event.listen(limited, "handle_error", lambda c: errors.append(str(c.original_exception)))
    batches: list[int] = []
    report = rotate(
        limited,
        ledger,
        keyring=promoted,
        batch_size=12,
        on_progress=lambda progress: batches.append(progress.rotated),
    )
    limited.dispose()
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP FUNCTION slowed() CASCADE")
    assert any("timeout" in error or "max_statement_time" in error for error in errors)
    assert (report.ok, report.rotated) == (True, 24)
    assert batches[0] <= 12


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
@has_its_own_engine
def test_a_table_that_somebody_locks_is_come_back_to(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 20)
    limit = {
        "postgresql": "SET lock_timeout = '50ms'",
        "mysql": "SET SESSION lock_wait_timeout = 1",
    }
    lock, unlock = {
        "postgresql": ("LOCK TABLE ledger IN EXCLUSIVE MODE", "ROLLBACK"),
        "mysql": ("LOCK TABLES ledger WRITE", "UNLOCK TABLES"),
    }[engine.dialect.name]
    impatient = engine_with(limit, engine)
    errors: list[str] = []
    with engine.connect() as somebody:

        def hold(_progress: RotationProgress) -> None:
            if not errors:
                somebody.exec_driver_sql(lock)

        @event.listens_for(impatient, "handle_error")
        def release(context: Any) -> None:
            errors.append(str(context.original_exception))
            somebody.exec_driver_sql(unlock)

        report = rotate(impatient, ledger, keyring=promoted, batch_size=15, on_progress=hold)
    impatient.dispose()
    assert len(errors) == 1
    assert "timeout" in errors[0]
    assert (report.ok, report.rotated) == (True, 40)


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_deadlock_with_another_transaction_is_survived(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 10)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE audit (n int primary key, seen int)")
        connection.execute(text("INSERT INTO audit VALUES (:n, 0)"), [{"n": n} for n in range(99)])
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql(
                "CREATE FUNCTION audited() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN UPDATE audit SET seen = 1 WHERE n = 0; RETURN NEW; END $$"
            )
            connection.exec_driver_sql(
                "CREATE TRIGGER auditing BEFORE UPDATE ON ledger"
                " FOR EACH ROW EXECUTE FUNCTION audited()"
            )
        else:
            connection.exec_driver_sql(
                "CREATE TRIGGER auditing BEFORE UPDATE ON ledger"
                " FOR EACH ROW UPDATE audit SET seen = 1 WHERE n = 0"
            )
    other = create_engine(engine.url)
    held, asked = threading.Event(), threading.Event()

    def hold_and_ask() -> None:
        with other.connect() as connection:
            if engine.dialect.name == "postgresql":
                # So that the rotation is the one that finds the deadlock, and is its victim.
                connection.exec_driver_sql("SET deadlock_timeout = '60s'")
            # Of many rows, because MySQL's victim is the smaller transaction.
            connection.exec_driver_sql("UPDATE audit SET seen = 2")
            held.set()
            asked.wait()
            time.sleep(0.2)  # the rotation has the rows by now, and waits for `audit`
            connection.execute(text("SELECT id FROM ledger FOR UPDATE")).all()
            connection.rollback()

    @event.listens_for(engine, "before_cursor_execute")
    def about_to_update(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE"):
            asked.set()

    errors: list[str] = []

    @event.listens_for(engine, "handle_error")
    def remember(context: Any) -> None:
        errors.append(str(context.original_exception))

    thread = threading.Thread(target=hold_and_ask)
    thread.start()
    held.wait()
    report = rotate(engine, ledger, keyring=promoted)
    thread.join()
    other.dispose()
    if engine.dialect.name == "postgresql":
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP FUNCTION audited() CASCADE")
    assert any("deadlock" in error.lower() for error in errors)
    assert (report.ok, report.rotated) == (True, 20)


def terminate(engine: Engine, victim: int) -> None:
    postgresql = engine.dialect.name == "postgresql"
    with engine.connect() as connection:
        connection.exec_driver_sql(
            f"SELECT pg_terminate_backend({victim})" if postgresql else f"KILL {victim}"
        )


def backend(connection: Connection) -> int:
    postgresql = connection.dialect.name == "postgresql"
    identity = connection.exec_driver_sql(
        "SELECT pg_backend_pid()" if postgresql else "SELECT connection_id()"
    ).scalar_one()
    return int(identity)


class Terminator:
    """Terminates the backend of an engine's connection before some of its statements."""

    def __init__(self, engine: Engine, before: str, times: int) -> None:
        self._engine = create_engine(engine.url, poolclass=NullPool)
        self._before = before
        self._left = times
        self.victims: list[int] = []
        event.listen(engine, "before_cursor_execute", self._strike)

    def _strike(self, connection: Connection, _cursor: Any, statement: str, *_rest: Any) -> None:
        if self._left and statement.startswith(self._before):
            self._left -= 1
            self.victims.append(backend(connection))
            terminate(self._engine, self.victims[-1])


@pytest.mark.parametrize("before", ["BEGIN", "SELECT ledger.id", "UPDATE", "COMMIT"])
@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_terminated_backend_is_replaced(engine: Engine, promoted: Keyring, before: str) -> None:
    fill(engine, 40)
    terminator = Terminator(engine, before, 3)
    report = rotate(engine, ledger, keyring=promoted, batch_size=10)
    assert (report.ok, report.rotated) == (True, 80)
    assert len(set(terminator.victims)) == 3
    assert contents(engine, promoted.without("v1"))[39] == ({"seq": 0}, {"seq": 0})


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
@has_its_own_engine
def test_a_lost_connection_that_is_the_callers_is_reported(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 40)
    own = create_engine(engine.url)
    with own.connect() as connection:
        killer: list[Terminator] = []

        def strike(progress: RotationProgress) -> None:
            if not killer:
                killer.append(Terminator(own, "UPDATE", 1))

        with pytest.raises(RotationError, match="20 values were re-encrypted before"):
            rotate(connection, ledger, keyring=promoted, batch_size=10, on_progress=strike)
    own.dispose()
    assert count_under(engine, "v2") == 20
    assert rotate(engine, ledger, keyring=promoted).rotated == 60


def stop_server_of(away: Engine, engine: Engine, times: int) -> Callable[[object], None]:
    """Return what ends the connection of `away`, which then finds no server so many times."""
    with away.connect() as connection:
        victims = [backend(connection)]
    left = iter(range(times))

    def find_nothing(dialect: Any, _record: Any, arguments: Any, options: Any) -> Any:
        if next(left, None) is None:
            return None
        return dialect.connect(*arguments, **{**options, "port": 1})

    def stop(_progress: object) -> None:
        if victims:
            event.listen(away, "do_connect", find_nothing)
            terminate(engine, victims.pop())

    return stop


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
@has_its_own_engine
def test_a_database_that_stays_away_is_reported(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 40)
    away = create_engine(engine.url)
    stop = stop_server_of(away, engine, 100)
    with pytest.raises(RotationError, match="20 values were re-encrypted before"):
        rotate(away, ledger, keyring=promoted, batch_size=10, retries=2, on_progress=stop)
    away.dispose()
    assert count_under(engine, "v2") == 20


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
@has_its_own_engine
def test_a_database_that_comes_back_is_gone_on_with(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 40)
    away = create_engine(engine.url)
    errors: list[Exception] = []
    event.listen(away, "handle_error", lambda context: errors.append(context.original_exception))
    stop = stop_server_of(away, engine, 2)
    report = rotate(away, ledger, keyring=promoted, batch_size=10, retries=3, on_progress=stop)
    away.dispose()
    assert (report.ok, report.rotated) == (True, 80)
    assert len(errors) == 3  # the connection that was lost, and two that were not had


def test_an_async_engine_replaces_a_lost_connection(promoted: Keyring, databases: Any) -> None:
    import asyncio

    url = databases.url("postgresql")
    sync = create_engine(url)
    fill(sync, 40)

    async def main() -> RotationReport:
        engine = create_async_engine(url.set(drivername="postgresql+asyncpg"))
        pids: list[int] = []

        @event.listens_for(engine.sync_engine, "before_cursor_execute")
        def strike(connection: Connection, _cursor: Any, statement: str, *_rest: Any) -> None:
            if statement.startswith("UPDATE") and len(pids) < 2:
                pids.append(0)
                terminate(sync, backend(connection))

        try:
            return await arotate(engine, ledger, keyring=promoted, batch_size=10)
        finally:
            await engine.dispose()

    report = asyncio.run(main())
    assert (report.ok, report.rotated) == (True, 80)
    ledger.drop(sync)
    sync.dispose()


# -- SQLite ----------------------------------------------------------------------------------------


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Engine]:
    """A SQLite engine that does not wait for a lock at all."""
    engine = create_engine(f"sqlite:///{tmp_path}/locked.db", connect_args={"timeout": 0})
    fill(engine, 40)
    yield engine
    engine.dispose()


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_a_locked_sqlite_database_is_waited_for(
    impatient: Engine, promoted: Keyring, lock: str
) -> None:
    assert impatient.url.database is not None
    holder = sqlite3.connect(impatient.url.database, isolation_level=None, check_same_thread=False)
    holder.execute(f"BEGIN {lock}")
    timer = threading.Timer(0.3, holder.execute, ["COMMIT"])
    timer.start()
    report = rotate(impatient, ledger, keyring=promoted, batch_size=10)
    timer.join()
    holder.close()
    assert (report.ok, report.rotated) == (True, 80)


def test_a_sqlite_database_that_stays_locked_is_reported(
    impatient: Engine, promoted: Keyring
) -> None:
    assert impatient.url.database is not None
    holder = sqlite3.connect(impatient.url.database, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(RotationError, match="database is locked"):
        rotate(impatient, ledger, keyring=promoted, retries=2)
    holder.close()


def test_a_commit_that_readers_hold_up_is_tried_again(impatient: Engine, promoted: Keyring) -> None:
    assert impatient.url.database is not None
    reader = sqlite3.connect(impatient.url.database, isolation_level=None, check_same_thread=False)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM ledger").fetchone()
    timer = threading.Timer(0.3, reader.execute, ["COMMIT"])
    timer.start()
    report = rotate(impatient, ledger, keyring=promoted)
    timer.join()
    reader.close()
    assert (report.ok, report.rotated) == (True, 80)


# -- Bad input -------------------------------------------------------------------------------------


async def nobody_awaits(progress: RotationProgress) -> bool:
    return False


class AwaitedByNobody:
    async def __call__(self, progress: RotationProgress) -> bool:
        return False


@pytest.mark.parametrize(
    "option, value",
    [
        ("batch_size", 0),
        ("batch_size", -1),
        ("batch_size", 1.5),
        ("batch_size", True),
        ("batch_size", "10"),
        ("batch_time", 0),
        ("batch_time", "1"),
        ("max_rate", 0),
        ("max_rate", 0.5),
        ("pause", -1),
        ("pause", None),
        ("retries", -1),
        ("on_error", "ignore"),
        ("batch_time", float("inf")),
        ("max_rate", float("nan")),
        ("pause", float("inf")),
        ("pause", 1e300),
        ("dry_run", "no"),
        ("on_progress", 3),
        ("stop_when", True),
        ("on_progress", nobody_awaits),
        ("stop_when", AwaitedByNobody()),
    ],
)
def test_an_option_out_of_range_is_refused(option: str, value: Any) -> None:
    engine = create_engine("sqlite://")
    with pytest.raises(RotationError, match=option):
        rotate(engine, **{option: value})
    engine.dispose()


plain = Table("plain", MetaData(), Column("id", Integer, primary_key=True), Column("x", String))
keyless = Table("keyless", MetaData(), Column("payload", EncryptedJSON))


@pytest.mark.parametrize(
    "target, message",
    [
        (MetaData(), "found no EncryptedJSON column"),
        ([], "found no EncryptedJSON column"),
        (plain, "table plain has no EncryptedJSON column"),
        ([ledger, plain], "table plain has no EncryptedJSON column"),
        (plain.c.x, "plain.x is not an EncryptedJSON column"),
        (keyless, "table keyless has no primary key"),
        ("ledger", "not str"),
        (int, "not int"),
        (5, "not int"),
        (ledger.alias().c.free, "not a column of a table"),
    ],
)
def test_a_target_that_is_none_is_an_error(target: Any, message: str) -> None:
    engine = create_engine("sqlite://")
    for function in (rotate, status, verify):
        with pytest.raises(RotationError, match=message):
            function(engine, target)
    engine.dispose()


def test_a_missing_table_is_told_before_the_first_write(engine: Engine, promoted: Keyring) -> None:
    fill(engine, 5)
    missing = Table(
        "missing", MetaData(), Column("id", Integer, primary_key=True), Column("p", EncryptedJSON)
    )
    with pytest.raises(RotationError, match=r"not in this database: missing\."):
        rotate(engine, [ledger, missing], keyring=promoted)
    assert count_under(engine, "v1") == 10


def test_a_table_that_vanishes_is_told_with_what_was_done(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 30)
    own = create_engine(engine.url)

    def drop(progress: RotationProgress) -> None:
        ledger.drop(own)

    with pytest.raises(RotationError, match=r"ledger.* 20 values were re-encrypted"):
        rotate(engine, ledger, keyring=promoted, batch_size=10, on_progress=drop)
    own.dispose()


@has_its_own_engine
def test_a_database_that_may_only_be_read_is_told_before_the_first_write(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 5)
    if engine.dialect.name == "sqlite":
        read_only = create_engine(f"sqlite:///file:{engine.url.database}?mode=ro&uri=true")
    else:
        read_only = create_engine(engine.url)
        setting = {
            "postgresql": "SET default_transaction_read_only = on",
            "mysql": "SET SESSION TRANSACTION READ ONLY",
        }[engine.dialect.name]

        @event.listens_for(read_only, "connect")
        def forbid(driver: Any, _record: Any) -> None:
            cursor = driver.cursor()
            cursor.execute(setting)
            driver.commit()
            cursor.close()

    for dry_run in (False, True):
        with pytest.raises(RotationError, match=r"read-only \("):
            rotate(read_only, ledger, keyring=promoted, dry_run=dry_run)
    read_only.dispose()


def test_another_dialect_is_refused_by_name(promoted: Keyring) -> None:
    engine = create_engine("sqlite://")
    engine.dialect.name = "oracle"
    with pytest.raises(RotationError, match="no rotation for the dialect 'oracle'"):
        rotate(engine, ledger, keyring=promoted)
    engine.dispose()


# -- Memory ----------------------------------------------------------------------------------------


def measured(url: str, what: str, count: int) -> str:
    """Run the script that measures, as a process whose memory is the library's alone."""
    command = [sys.executable, "-m", "tests.integration.workers.measured", url, what, str(count)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "LUCENT_SECRETS_KEYS": keys("v2")}
    environ.pop("COVERAGE_PROCESS_CONFIG", None)
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True).stdout.decode()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@has_its_own_engine
def test_memory_does_not_grow_with_the_table(engine: Engine) -> None:
    count = 1_000_000 if LONG else 100_000
    ledger.metadata.create_all(engine)
    keys = Keyring({"v1": bytes(range(32))})
    sealed = keys.for_context("ledger.free").seal(json.dumps({"x": "y" * 100}).encode())
    with engine.begin() as connection:
        for first in range(0, count, 10_000):
            connection.execute(
                insert(raw_ledger),
                [{"id": n, "free": sealed} for n in range(first, first + 10_000)],
            )
    for what in ("verify", "rotate"):
        peaks = json.loads(measured(url_of(engine), what, count))
        assert peaks["done"] == count
        assert peaks["end"] < 150 << 20
        # Some bytes for each of the rows between would be more.
        assert peaks["end"] - peaks["quarter"] < 2 << 20, what
