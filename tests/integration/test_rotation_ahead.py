"""A rotation over an engine with a spare connection reads a batch while it writes another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Engine, LargeBinary, column, create_engine, event, select, table, update
from sqlalchemy.pool import NullPool, StaticPool

from sqlalchemy_lucent import Keyring, RotationProgress, rotate
from tests.integration.workers import contents, fill, ledger

ROWS = 60
BATCH = 5

raw_ledger = table("ledger", column("id"), column("free", LargeBinary))

on_servers = pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)


@contextmanager
def over(engine: Engine, **options: Any) -> Iterator[Engine]:
    """Give another engine over the same database."""
    other = create_engine(engine.url, **options)
    yield other
    other.dispose()


def connections_of(engine: Engine) -> set[int]:
    """Return a set that each connection of the driver is added to once it is used."""
    seen: set[int] = set()
    event.listen(engine, "checkout", lambda driver, *_: seen.add(id(driver)))
    return seen


def at_update(engine: Engine, do: Callable[[str, int], object]) -> None:
    """Call `do` before each UPDATE, with its thread ("own" or "spare") and how many it had."""
    updates = {"own": 0, "spare": 0}

    @event.listens_for(engine, "before_cursor_execute")
    def count(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE"):
            is_own = threading.current_thread() is threading.main_thread()
            thread = "own" if is_own else "spare"
            updates[thread] += 1
            do(thread, updates[thread])


def assert_all_rotated(engine: Engine, promoted: Keyring) -> None:
    assert len(contents(engine, promoted.without("v1"))) == ROWS


@on_servers
@pytest.mark.parametrize("options", [{}, {"poolclass": NullPool}], ids=["a pool", "no pool"])
def test_two_connections_write_at_once(
    engine: Engine, promoted: Keyring, options: dict[str, Any]
) -> None:
    fill(engine, ROWS)
    both = threading.Barrier(2)

    def meet(thread: str, number: int) -> None:
        # The first batch is done by one connection; then each has a batch that is read and locked.
        if (thread, number) in (("own", 2), ("spare", 1)):
            both.wait(timeout=60)

    with over(engine, **options) as rotated:
        at_update(rotated, meet)
        report = rotate(rotated, ledger, keyring=promoted, batch_size=BATCH)
    assert (report.ok, report.rotated) == (True, 2 * ROWS)
    assert_all_rotated(engine, promoted)


ONE_CONNECTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a pool of one": ({"pool_size": 1}, {}),
    "a static pool": ({"poolclass": StaticPool}, {}),
    "a pause": ({}, {"pause": 0.001}),
    "a rate": ({}, {"max_rate": 100_000}),
    "a batch time": ({}, {"batch_time": 10}),
    "an end at the first error": ({}, {"on_error": "raise"}),
}


@pytest.mark.parametrize("why", ONE_CONNECTION)
def test_one_connection_does_it_alone(engine: Engine, promoted: Keyring, why: str) -> None:
    of_engine, of_run = ONE_CONNECTION[why]
    fill(engine, ROWS)
    with over(engine, **of_engine) as rotated:
        seen = connections_of(rotated)
        assert rotate(rotated, ledger, keyring=promoted, batch_size=BATCH, **of_run).ok
    assert len(seen) == 1
    assert_all_rotated(engine, promoted)


def test_a_connection_that_is_given_is_the_only_one(engine: Engine, promoted: Keyring) -> None:
    fill(engine, ROWS)
    with over(engine) as rotated:
        seen = connections_of(rotated)
        with rotated.connect() as connection:
            assert rotate(connection, ledger, keyring=promoted, batch_size=BATCH).ok
    assert len(seen) == 1


def test_sqlite_needs_no_second_connection(promoted: Keyring, databases: Any) -> None:
    with over(create_engine(databases.url("sqlite"))) as engine:
        ledger.metadata.drop_all(engine)
        fill(engine, ROWS)
        seen = connections_of(engine)
        assert rotate(engine, ledger, keyring=promoted, batch_size=BATCH).ok
        assert len(seen) == 1
        ledger.metadata.drop_all(engine)


@on_servers
def test_a_second_connection_that_is_refused_is_done_without(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, ROWS)
    attempts: list[None] = []
    with over(engine) as rotated:

        @event.listens_for(rotated, "do_connect")
        def refuse(*_: Any) -> None:
            attempts.append(None)
            if len(attempts) > 1:
                raise ConnectionRefusedError

        report = rotate(rotated, ledger, keyring=promoted, batch_size=BATCH)
    assert (report.ok, report.rotated) == (True, 2 * ROWS)
    assert len(attempts) == 2  # and it is not asked for again


@on_servers
@pytest.mark.parametrize("thread", ["own", "spare"])
def test_after_a_fault_everything_is_done_and_each_failure_named_once(
    engine: Engine, keyring: Keyring, promoted: Keyring, thread: str
) -> None:
    fill(engine, ROWS)
    spoilt = list(range(0, ROWS, 4))
    elsewhere = keyring.for_context("another.column").seal(b"1")
    with engine.begin() as connection:
        connection.execute(
            update(raw_ledger).where(raw_ledger.c.id.in_(spoilt)).values(free=elsewhere)
        )

    def break_off(which: str, number: int) -> None:
        if (which, number) == (thread, 2):
            raise ConnectionAbortedError

    with over(engine) as rotated:
        at_update(rotated, break_off)
        report = rotate(rotated, ledger.c.free, keyring=promoted, batch_size=BATCH)
    assert [failed.primary_key for failed in report.failed] == [(number,) for number in spoilt]
    assert report.rotated == ROWS - len(spoilt)
    assert report.remaining == report.failed_count == len(spoilt)


@on_servers
def test_an_interrupt_ends_both(engine: Engine, promoted: Keyring) -> None:
    fill(engine, ROWS)
    before = threading.active_count()

    def interrupt(thread: str, number: int) -> None:
        if (thread, number) == ("own", 3):
            raise KeyboardInterrupt

    with over(engine) as rotated:
        at_update(rotated, interrupt)
        with pytest.raises(KeyboardInterrupt):
            rotate(rotated, ledger, keyring=promoted, batch_size=BATCH)
        assert threading.active_count() == before
        assert rotated.pool.checkedout() == 0  # type: ignore[attr-defined]
    with engine.begin() as connection:  # nothing is locked, and no row is lost
        connection.execute(select(ledger.c.id).with_for_update(nowait=True)).all()
    assert len(contents(engine, promoted)) == ROWS
    assert rotate(engine, ledger, keyring=promoted).ok


@on_servers
def test_stop_when_ends_both(engine: Engine, promoted: Keyring) -> None:
    fill(engine, ROWS)
    asked: list[bool] = []

    def is_enough(progress: RotationProgress) -> bool:
        asked.append(progress.rotated >= 4 * BATCH)
        return asked[-1]

    with over(engine) as rotated:
        report = rotate(rotated, ledger, keyring=promoted, batch_size=BATCH, stop_when=is_enough)
    assert report.stopped
    assert asked.count(True) == 1
    assert report.rotated + report.remaining == 2 * ROWS
    # The batch that the other connection had begun was written.
    assert 4 * BATCH <= report.rotated < 2 * ROWS


@on_servers
def test_progress_is_told_in_order_by_the_thread_that_called(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, ROWS)
    told: list[int] = []

    def note(progress: RotationProgress) -> None:
        assert threading.current_thread() is threading.main_thread()
        with engine.connect() as connection:
            values = connection.execute(select(ledger.c.free, ledger.c.bound)).all()
        committed = sum(value.key_version == "v2" for row in values for value in row)
        # The other connection may have committed its batch already.
        assert progress.rotated <= committed
        told.append(progress.rotated)

    with over(engine) as rotated:
        rotate(rotated, ledger, keyring=promoted, batch_size=BATCH, on_progress=note)
    assert told == list(range(2 * BATCH, 2 * ROWS + 1, 2 * BATCH))
