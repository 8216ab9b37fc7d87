"""Rotations beside writers and beside each other: nobody's work is lost."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Enum,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    event,
    insert,
    null,
    select,
    text,
    update,
)

from sqlalchemy_lucent import (
    EncryptedJSON,
    Keyring,
    rotate,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent.rotation._updates import (
    BinaryArrayWriter,
    JoinWriter,
    RowWriter,
    Writer,
    writer_for,
)
from sqlalchemy_lucent.rotation.jobs import Reseal
from sqlalchemy_lucent.rotation.rows import BatchBounds, Rows
from sqlalchemy_lucent.rotation.targets import resolve_targets
from tests.command import Forked
from tests.databases import SYNC_DRIVERS
from tests.integration.workers import contents, fill, finish, ledger, reap, start

ROWS = 400
WRITERS = 4


def versions(engine: Engine, target: Any = ledger) -> set[str | None]:
    return {row.key_version for row in status(engine, target).rows}


def line_of(process: Forked) -> str:
    return process.stdout.readline()


def rest_of(process: Forked) -> list[str]:
    """Return the other lines, for which communicate() would not look where line_of() has them."""
    lines = process.stdout.readlines()
    finish(process)
    return lines


def rotated(report: dict[str, Any]) -> int:
    number: int = report["rotated"]
    return number


@pytest.mark.slow
def test_four_writers_beside_two_rotators_lose_nothing(engine: Engine, promoted: Keyring) -> None:
    fill(engine, ROWS)
    url = engine.url.render_as_string(hide_password=False)
    # The writers still have the old primary, so there is always something to rotate.
    writers = [
        start("writer", url, number, WRITERS, ROWS, primary="v1") for number in range(WRITERS)
    ]
    rotators: list[Forked] = []
    reports: list[list[dict[str, Any]]] = [[], []]
    try:
        changes = [line_of(writer) for writer in writers]
        # Batches so large that there is often a write between the read and the write of one.
        rotator = partial(start, "rotator", url, 100, 0.05)
        rotators += [rotator(), rotator()]
        so_far = [0, 0]
        # The writers go on until what they wrote meanwhile was re-encrypted too.
        while sum(so_far) + sum(map(rotated, [*reports[0], *reports[1]])) <= 4 * ROWS:
            for n in range(2):
                line = line_of(rotators[n])
                if line.startswith("{"):  # at that moment, no row was stale: begin again
                    reports[n].append(json.loads(line))
                    rest_of(rotators[n])
                    rotators[n], line = rotator(), "0"
                so_far[n] = int(line)
        for writer in writers:
            print(file=writer.stdin, flush=True)
        for writer in writers:
            changes += rest_of(writer)
        for n in range(2):
            reports[n].append(json.loads(rest_of(rotators[n])[-1]))
    finally:
        reap([*writers, *rotators])
    last: dict[int, int] = {}
    for change in changes:
        row, seq = map(int, change.split())
        last[row] = seq
    assert all(report["failed_count"] == 0 for one in reports for report in one)
    by_rotator = [sum(map(rotated, one)) for one in reports]
    assert sum(by_rotator) > 2 * ROWS
    assert min(by_rotator) > 0
    assert rotate(engine, ledger, keyring=promoted).ok
    assert versions(engine) == {"v2"}
    set_default_keyring(promoted.without("v1"))
    expected = {n: {"seq": last.get(n, 0)} for n in range(ROWS)}
    assert contents(engine, promoted.without("v1")) == {
        n: (value, value) for n, value in expected.items()
    }


def test_two_rotators_share_the_work(engine: Engine, promoted: Keyring) -> None:
    fill(engine, ROWS)
    rotated: list[int] = []
    barrier = threading.Barrier(2)

    def run() -> None:
        own = create_engine(engine.url)
        barrier.wait()
        report = rotate(own, ledger, keyring=promoted, batch_size=10, pause=0.005)
        assert report.ok
        rotated.append(report.rotated)
        own.dispose()

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(rotated) == 2 * ROWS  # each value once: nothing was done twice
    if engine.dialect.name != "sqlite":  # there, who gets the only lock is left to chance
        assert min(rotated) > 0
    assert verify(engine, ledger, keyring=promoted.without("v1")).opened == 2 * ROWS


@pytest.fixture
def other(engine: Engine) -> Iterator[Connection]:
    """A connection of somebody else."""
    own = create_engine(engine.url)
    with own.connect() as connection:
        yield connection
    own.dispose()


def impatient(engine: Engine) -> None:
    """Make the engine's connections give up on a lock after a second, so that no test hangs."""
    setting = {
        "postgresql": "SET lock_timeout = '1s'",
        "mysql": "SET SESSION innodb_lock_wait_timeout = 1",
    }[engine.dialect.name]

    @event.listens_for(engine, "connect")
    def give_up_soon(driver: Any, _record: Any) -> None:
        cursor = driver.cursor()
        cursor.execute(setting)
        driver.commit()
        cursor.close()

    engine.dispose()


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_rows_can_be_inserted_between_those_of_a_batch_in_hand(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 10)
    other = create_engine(engine.url)
    impatient(other)
    with engine.begin() as connection:
        connection.execute(update(ledger).values(id=ledger.c.id * 10 + 1000, bound=None))
    left = [1005, 1095]  # between the rows of the first batch, and behind the last row

    @event.listens_for(engine, "before_cursor_execute")
    def insert_meanwhile(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith("UPDATE") and left:
            with other.begin() as connection:
                connection.execute(insert(ledger).values(id=left.pop(0), free=1))

    try:
        report = rotate(engine, ledger.c.free, keyring=promoted, batch_size=5, retries=0)
    finally:
        other.dispose()
    assert (report.ok, report.rotated, left) == (True, 12, [])


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_row_that_somebody_holds_is_not_waited_for_but_come_back_to(
    engine: Engine, promoted: Keyring, other: Connection
) -> None:
    fill(engine, 30)
    impatient(engine)
    set_default_keyring(promoted)
    held = ledger.c.id == 7
    other.execute(update(ledger).where(held).values(free={"seq": 99}))
    rotated: list[int] = []

    def release(progress: Any) -> None:
        rotated.append(progress.rotated)
        if progress.rotated == 58:  # all the others
            other.commit()

    report = rotate(engine, ledger, keyring=promoted, batch_size=10, retries=0, on_progress=release)
    assert (report.ok, report.remaining) == (True, 0)
    # `bound` of the row that was held is what remained. Batches that find nothing are told of too.
    assert list(dict.fromkeys(rotated))[-2:] == [58, 59]
    assert contents(engine, promoted)[7] == ({"seq": 99}, {"seq": 0})


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_row_that_somebody_holds_is_not_waited_for_with_a_key_of_several_columns(
    engine: Engine, promoted: Keyring, other: Connection
) -> None:
    table = keyed(
        Column("a", Integer, primary_key=True, autoincrement=False),
        Column("b", Integer, primary_key=True, autoincrement=False),
    )
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        rows = [{"a": n // 4, "b": n, "payload": n} for n in range(30)]
        connection.execute(insert(table), rows)
    impatient(engine)
    other.execute(text("UPDATE documents SET payload = payload WHERE a = 1 AND b = 7"))
    report = rotate(
        engine,
        table,
        keyring=promoted,
        batch_size=10,
        retries=0,
        stop_when=lambda progress: progress.rotated == 29,
    )
    assert (report.stopped, report.rotated, report.remaining) == (True, 29, 1)
    other.rollback()
    assert rotate(engine, table, keyring=promoted).rotated == 1


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_a_key_of_a_type_that_the_driver_does_not_know_is_read_as_text(
    engine: Engine, promoted: Keyring
) -> None:
    table = keyed(Column("id", Enum("low", "high", name="level"), primary_key=True))
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": n, "payload": n} for n in ("low", "high")])
    assert rotate(engine, table, keyring=promoted, batch_size=1).rotated == 2
    assert verify(engine, table, keyring=promoted.without("v1")).ok
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE documents; DROP TYPE level"))


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_rows_with_a_foreign_key_to_a_row_can_be_inserted_meanwhile(
    engine: Engine, promoted: Keyring, other: Connection
) -> None:
    fill(engine, 20)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE entries (ledger_id int REFERENCES ledger (id))"))
    other.execute(text("INSERT INTO entries VALUES (7)"))
    assert rotate(engine, ledger, keyring=promoted).rotated == 40
    other.rollback()


def keyed(*key: Column[Any]) -> Table:
    return Table("documents", MetaData(), *key, Column("payload", EncryptedJSON))


def row_by_row(_: Connection, rows: Rows) -> RowWriter:
    return RowWriter(rows)


TYPES: dict[str, Any] = {
    "integer": Integer(),
    "text": String(20),
    "binary text": String(20, "utf8mb4_bin"),
}


@pytest.mark.parametrize(
    "url, key, make_writer",
    [
        *itertools.product(SYNC_DRIVERS, ["integer", "text"], [writer_for, row_by_row]),
        ("mysql", "binary text", writer_for),
    ],
    indirect=["url"],
)
def test_a_value_changed_since_it_was_read_is_not_overwritten(
    engine: Engine, promoted: Keyring, key: str, make_writer: Callable[..., Writer]
) -> None:
    table = keyed(Column("id", TYPES[key], primary_key=True, autoincrement=False))
    table.metadata.create_all(engine)
    identities = [1, 2, 3] if key == "integer" else ["1", "2", "3"]
    with engine.begin() as connection:
        connection.execute(insert(table), [{"id": n, "payload": "old"} for n in identities])
    with engine.begin() as connection:
        (target,) = resolve_targets(table, engine)
        job = Reseal(target, promoted, engine.dialect)
        writer = make_writer(connection, job.rows)
        rows = job.rows.read(connection, BatchBounds(limit=10))
    (changes,), _, _ = job.apply(rows)
    with engine.begin() as connection:
        connection.execute(update(table).where(table.c.id == identities[1]).values(payload="new"))
        connection.execute(table.delete().where(table.c.id == identities[2]))
    with engine.begin() as connection:
        assert writer.write(connection, changes) == 1
    set_default_keyring(promoted)
    with engine.connect() as connection:
        found = connection.scalars(select(table.c.payload).order_by(table.c.id)).all()
    assert found == ["old", "new"]
    assert status(engine, table).rows[0].count == 1


@pytest.mark.parametrize("rows_first", [True, False])
@pytest.mark.parametrize("url", ["mysql"], indirect=True)
def test_the_join_update_writes_several_statements_and_columns(
    engine: Engine, promoted: Keyring, rows_first: bool
) -> None:
    fill(engine, 1100)  # a statement has 500 rows
    with engine.begin() as connection:
        connection.execute(update(ledger).where(ledger.c.id < 30).values(free=null()))
        (target,) = resolve_targets(ledger, engine)
        job = Reseal(target, promoted, engine.dialect)
        writer = JoinWriter(job.rows, (), 16 << 20, rows_first=rows_first)
        changes = job.apply(job.rows.read(connection, BatchBounds(limit=2000))).changes
        assert [change.names for change in changes] == [("bound",), ("free", "bound")]
        assert [writer.write(connection, change) for change in changes] == [30, 2 * 1070]
    assert versions(engine) == {"v2"}
    assert verify(engine, ledger, keyring=promoted.without("v1")).opened == 2200 - 30


@pytest.mark.parametrize(
    "type_, expected",
    [
        (Integer(), {"sqlite": RowWriter, "postgresql": BinaryArrayWriter, "mysql": JoinWriter}),
        (String(20), {"sqlite": RowWriter, "postgresql": BinaryArrayWriter, "mysql": RowWriter}),
        (
            String(20).with_variant(String(20, collation="utf8mb4_bin"), "mysql", "mariadb"),
            {"sqlite": RowWriter, "postgresql": BinaryArrayWriter, "mysql": JoinWriter},
        ),
    ],
)
def test_each_database_has_its_form_of_update(
    engine: Engine, type_: Any, expected: dict[str, type[Any]]
) -> None:
    table = keyed(Column("id", type_, primary_key=True, autoincrement=False))
    with engine.connect() as connection:
        (target,) = resolve_targets(table, connection)
        rows = Rows(target.name, target.clause, target.primary_key, engine.dialect)
        assert type(writer_for(connection, rows)) is expected[engine.dialect.name]


def test_a_writer_with_the_old_primary_cannot_keep_a_run_going_for_ever(
    engine: Engine, promoted: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(engine, 10)
    monkeypatch.setattr("sqlalchemy_lucent.rotation._run.MAX_PASSES", 4)
    own = create_engine(engine.url)

    def write_behind_the_cursor(_: Any) -> None:
        with own.begin() as connection:
            connection.execute(update(ledger).where(ledger.c.id == 0).values(free={"seq": 1}))

    report = rotate(engine, ledger, keyring=promoted, on_progress=write_behind_the_cursor)
    assert (report.ok, report.remaining, report.rotated) == (False, 1, 20 + 3)
    own.dispose()


def test_listeners_that_change_the_statement_see_ordinary_sql(
    engine: Engine, promoted: Keyring
) -> None:
    fill(engine, 5)
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def tag(_c: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> Any:
        statements.append(statement)
        return f"{statement} /* tagged */", parameters

    assert rotate(engine, ledger, keyring=promoted).rotated == 10
    assert sum(statement.startswith("UPDATE") for statement in statements) == 1
