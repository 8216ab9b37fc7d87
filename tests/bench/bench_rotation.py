"""Rows per second of a rotation, beside the fastest loop that one would write by hand.

python -m tests.bench.bench_rotation [--smoke]
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from cryptography.fernet import Fernet, MultiFernet
from sqlalchemy import (
    Column,
    Engine,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    bindparam,
    create_engine,
    insert,
    select,
    update,
)
from sqlalchemy.orm import Session, registry
from sqlalchemy.orm.attributes import flag_modified

from sqlalchemy_lucent import EncryptedJSON, Keyring, rotate, set_default_keyring
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_least, in_turns, run_alone
from tests.bench.servers import bench_database, tidy_up
from tests.databases import drop_everything

TITLE = "Rotation"
ABOUT = """\
`rotate` re-seals every row of a table in committed batches of 1,000. The hand-written loops read a
batch and write it in one form of the UPDATE each, and keep none of the promises: no
compare-and-swap, no locks, no rows that do not open, one integer key. They show which form is the
quickest on each database, by few rounds; that one, which the goal is about, then takes turns with
`rotate` for many. All run on one table, which PostgreSQL vacuums before each turn, outside of the
time: who reads a table after a rotation pays for tidying it.

What the promises cost, the dearest first: on PostgreSQL the compare-and-swap (an array more to send
and to unpack), the row locks (each is written down in its row), the stale condition, for which a
value out of its row is looked up, the look for how far a batch reaches, and the count at the end;
on MariaDB the compare-and-swap and the same looks; on SQLite the statements that go through
SQLAlchemy so that listeners see them, the stale condition and the count. Failures by key cost
nothing while there are none. More than that is saved where the database's own plan or the driver is
poor: the key range in PostgreSQL's UPDATE spares it a hash of the whole table for each batch
(*unnest and the key range* is the loop with that too, so that only the promises are left between it
and `rotate`); MariaDB's statement has the values as hexadecimal literals, because PyMySQL escapes bytes slowly.

Beside them stand the ways of today. sqlalchemy-utils has its key as a callable: objects are loaded
under the old key and flushed under the new one, a session for each batch, which is the way that its
documentation has; and the same without objects, by one executemany for each batch, the generous
form. For a column of Fernet tokens it is `MultiFernet.rotate` and an UPDATE per row, sent together.
The figures are rows a second."""

BATCH = 1000
ROWS = 20_000
ROUNDS = {"small": 30, "medium": 12}
OTHER_ROUNDS = 3
LABELS = {"sqlite": "SQLite", "postgresql": "PostgreSQL", "mysql": "MariaDB"}

table = Table(
    "documents",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("payload", EncryptedJSON),
)

tokens = Table(
    "tokens",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("token", LargeBinary(8000), nullable=False),
)


def resealer(keyring: Keyring) -> Callable[[bytes], bytes]:
    keys = keyring.for_context("documents.payload")
    return lambda sealed: keys.seal(keys.open(sealed))


# -- by hand: every loop reads in the order of the key, and commits each batch ---------------------

Rows = list[tuple[int, bytes]]
"""The keys of a batch, and the values that they are to have."""


def in_driver(
    write: Callable[[Any, Rows], object], mark: str, **cursor_options: Any
) -> Callable[..., None]:
    """Return a loop over the driver's own cursor that lets `write` change each batch.

    It takes an engine and a keyring, and perhaps the first key and the one to stop before.
    """

    def loop(engine: Engine, keyring: Keyring, first: int = 0, end: int | None = None) -> None:
        bounds = () if end is None else (end,)
        select_batch = (
            f"SELECT id, payload FROM documents WHERE id > {mark}"
            f"{f' AND id < {mark}' if bounds else ''} ORDER BY id LIMIT {mark}"
        )
        reseal = resealer(keyring)
        connection = engine.raw_connection()
        driver: Any = connection.driver_connection
        cursor = driver.cursor(**cursor_options)
        last = first - 1
        while True:
            cursor.execute(select_batch, (last, *bounds, BATCH))
            rows = cursor.fetchall()
            if not rows:
                break
            last = rows[-1][0]
            write(cursor, [(key, reseal(value)) for key, value in rows])
            driver.commit()
        driver.rollback()
        cursor.close()
        connection.close()

    return loop


def executemany(mark: str) -> Callable[[Any, Rows], object]:
    statement = f"UPDATE documents SET payload = {mark} WHERE id = {mark}"
    return lambda cursor, rows: cursor.executemany(statement, [(new, key) for key, new in rows])


def in_core(engine: Engine, keyring: Keyring) -> None:
    """What one writes with SQLAlchemy: a select, and an update() for many parameters."""
    reseal = resealer(keyring)
    raw = Table("documents", MetaData(), Column("id", Integer), Column("payload", LargeBinary))
    change = update(raw).where(raw.c.id == bindparam("key")).values(payload=bindparam("new"))
    last = -1
    while True:
        with engine.begin() as connection:
            query = select(raw).where(raw.c.id > last).order_by(raw.c.id).limit(BATCH)
            rows = connection.execute(query).all()
            if not rows:
                return
            last = rows[-1].id
            connection.execute(change, [{"key": r.id, "new": reseal(r.payload)} for r in rows])


def by_function(engine: Engine, keyring: Keyring) -> None:
    """SQLite: a function registered on the connection."""
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    driver.create_function("reseal", 1, resealer(keyring))
    last = -1
    while True:
        (upto,) = driver.execute(
            "SELECT max(id) FROM (SELECT id FROM documents WHERE id > ? ORDER BY id LIMIT ?)",
            (last, BATCH),
        ).fetchone()
        if upto is None:
            break
        driver.execute(
            "UPDATE documents SET payload = reseal(payload) WHERE id > ? AND id <= ?", (last, upto)
        )
        driver.commit()
        last = upto
    connection.close()


def by_unnest(*, key_range: bool) -> Callable[[Any, Rows], object]:
    """PostgreSQL: an array for each column; or the same, told which part of the table it is."""
    statement = (
        "UPDATE documents SET payload = v.payload"
        " FROM unnest(%b::int[], %b::bytea[]) AS v (id, payload) WHERE documents.id = v.id"
    )
    if key_range:
        statement += " AND documents.id BETWEEN %s AND %s"

    def write(cursor: Any, rows: Rows) -> None:
        keys, values = map(list, zip(*rows, strict=True))
        bounds = (keys[0], keys[-1]) if key_range else ()
        cursor.execute(statement, (keys, values, *bounds))

    return write


def by_values(cursor: Any, rows: Rows) -> None:
    """PostgreSQL: a join with rows of VALUES."""
    marks = ", ".join(["(%b::int, %b::bytea)"] * len(rows))
    cursor.execute(
        f"UPDATE documents SET payload = v.payload FROM (VALUES {marks}) AS v (id, payload)"
        " WHERE documents.id = v.id",
        [part for row in rows for part in row],
    )


def by_copy(cursor: Any, rows: Rows) -> None:
    """PostgreSQL: COPY into a temporary table."""
    cursor.execute("CREATE TEMPORARY TABLE v (id int, payload bytea) ON COMMIT DROP")
    with cursor.copy("COPY v FROM STDIN (FORMAT BINARY)") as copy:
        copy.set_types(["int4", "bytea"])
        for row in rows:
            copy.write_row(row)
    cursor.execute(
        "UPDATE documents SET payload = v.payload FROM v WHERE documents.id = v.id",
    )


def by_join(cursor: Any, rows: Rows) -> None:
    """MariaDB and MySQL: a join with a derived table."""
    cursor.execute(
        "UPDATE documents JOIN (SELECT %s AS id, %s AS payload"
        + " UNION ALL SELECT %s, %s" * (len(rows) - 1)
        + ") AS v ON documents.id = v.id SET documents.payload = v.payload",
        [part for row in rows for part in row],
    )


def by_case(cursor: Any, rows: Rows) -> None:
    """MariaDB and MySQL: one CASE over the keys."""
    cursor.execute(
        f"UPDATE documents SET payload = CASE id {'WHEN %s THEN %s ' * len(rows)}END"
        f" WHERE id IN ({', '.join(['%s'] * len(rows))})",
        [*(part for row in rows for part in row), *(key for key, _ in rows)],
    )


KEY_RANGE = "unnest and the key range"
"""Not what one writes: `rotate` has it from its plan. It shows what the promises alone cost."""

BY_HAND: dict[str, dict[str, Callable[..., None]]] = {
    "sqlite": {
        "a registered function": by_function,
        "executemany": in_driver(executemany("?"), "?"),
        "Core update()": in_core,
    },
    "postgresql": {
        "unnest": in_driver(by_unnest(key_range=False), "%s", binary=True),
        KEY_RANGE: in_driver(by_unnest(key_range=True), "%s", binary=True),
        "executemany": in_driver(executemany("%s"), "%s", binary=True),
        "VALUES": in_driver(by_values, "%s", binary=True),
        "COPY": in_driver(by_copy, "%s", binary=True),
        "Core update()": in_core,
    },
    "mysql": {
        "a derived table": in_driver(by_join, "%s"),
        "CASE": in_driver(by_case, "%s"),
        "executemany": in_driver(executemany("%s"), "%s"),
        "Core update()": in_core,
    },
}


OLD, NEW = "old key", "new key"


class WithUtils:
    """The same work with sqlalchemy-utils, whose key may be a callable. `new` is what is sealed."""

    def __init__(self, engine: Engine) -> None:
        encrypted: Any = importlib.import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
        self.engine = engine
        self.old, self.new, self.current = OLD, NEW, OLD
        metadata = MetaData()

        def documents(name: str, key: object) -> Table:
            return Table(
                name,
                metadata,
                Column("id", Integer, primary_key=True, autoincrement=False),
                Column(
                    "payload",
                    encrypted.StringEncryptedType(Text(), key, encrypted.AesGcmEngine, length=8000),
                ),
            )

        self.table = documents("utils_documents", lambda: self.current)
        mapped = registry(metadata=metadata)

        class Document:
            id: Any
            payload: Any

        mapped.map_imperatively(Document, self.table)
        self.mapped: Any = Document

    def by_objects(self) -> None:
        """Load objects under one key, write them under the other: its documented use."""
        last = -1
        while True:
            with Session(self.engine) as session:
                self.current = self.old
                query = select(self.mapped).where(self.mapped.id > last)
                found = session.scalars(query.order_by(self.mapped.id).limit(BATCH)).all()
                if not found:
                    break
                last = found[-1].id
                self.current = self.new
                for document in found:
                    # The value is the same, so assigning it again would write nothing.
                    flag_modified(document, "payload")
                session.commit()
        self.old, self.new, self.current = self.new, self.old, self.new

    def by_statements(self) -> None:
        """The same without objects, each batch by one executemany."""
        last = -1
        table = self.table
        change = (
            update(table).where(table.c.id == bindparam("key")).values(payload=bindparam("renewed"))
        )
        while True:
            with self.engine.begin() as connection:
                self.current = self.old
                query = select(table).where(table.c.id > last).order_by(table.c.id).limit(BATCH)
                rows = connection.execute(query).all()
                if not rows:
                    break
                last = rows[-1].id
                self.current = self.new
                connection.execute(change, [{"key": r.id, "renewed": r.payload} for r in rows])
        self.old, self.new, self.current = self.new, self.old, self.new


def with_fernet(engine: Engine, fernet: MultiFernet) -> None:
    """What one does with a column of Fernet tokens."""
    last = -1
    columns = tokens.c
    change = update(tokens).where(columns.id == bindparam("key")).values(token=bindparam("renewed"))
    while True:
        with engine.begin() as connection:
            rows = connection.execute(
                select(tokens).where(columns.id > last).order_by(columns.id).limit(BATCH)
            ).all()
            if not rows:
                return
            connection.execute(
                change, [{"key": row.id, "renewed": fernet.rotate(row.token)} for row in rows]
            )
            last = rows[-1].id


def fill(engine: Engine, into: Table, column: str, values: Sequence[Any]) -> None:
    into.metadata.create_all(engine)
    with engine.begin() as connection:
        for first in range(0, len(values), BATCH):
            connection.execute(
                insert(into),
                [
                    {"id": first + n, column: value}
                    for n, value in enumerate(values[first : first + BATCH])
                ],
            )


def measure_on(engine: Engine, kind: str, size: str, rows: int, rounds: int) -> Iterator[Figure]:
    documents = [DOCUMENTS[size](n % 100) for n in range(rows)]
    texts = [json.dumps(document) for document in documents]
    fill(engine, table, "payload", documents)
    utils = WithUtils(engine)
    fill(engine, utils.table, "payload", texts)
    first, second = Fernet(Fernet.generate_key()), Fernet(Fernet.generate_key())
    fill(engine, tokens, "token", [first.encrypt(text.encode()) for text in texts])

    # Each run turns the values back under the other key.
    keyrings = itertools.cycle([KEYS.with_primary("v1"), KEYS])
    fernets = itertools.cycle([MultiFernet([second, first]), MultiFernet([first, second])])

    def run_rotate() -> None:
        report = rotate(engine, table, keyring=next(keyrings), batch_size=BATCH)
        assert (report.ok, report.rotated) == (True, rows)

    def tidied(work: Callable[[], None]) -> Contender:
        return Contender(work, partial(tidy_up, engine))

    by_hand = {
        f"by hand, {form}": tidied(lambda loop=loop: loop(engine, next(keyrings)))  # type: ignore[misc]
        for form, loop in BY_HAND[kind].items()
    }
    peers = {
        "sqlalchemy-utils": tidied(utils.by_objects),
        "sqlalchemy-utils, no objects": tidied(utils.by_statements),
        "MultiFernet": tidied(lambda: with_fernet(engine, next(fernets))),
    }
    ours = {"ours": tidied(run_rotate)}
    others = in_turns(ours | by_hand | peers, min(OTHER_ROUNDS, rounds))
    written = [name for name in by_hand if not name.endswith(KEY_RANGE)]
    quickest = min(written, key=others.median)
    turns = in_turns(ours | {quickest: by_hand[quickest]}, rounds)
    goals = {quickest: at_least(0.8)}
    if size == "small":
        goals["sqlalchemy-utils"] = at_least(4)
    compared = [(turns, quickest)]
    compared += [(others, name) for name in (*by_hand, *peers) if name != quickest]
    for turns_of, name in compared:
        yield Figure(
            group=f"{LABELS[kind]}, {size}",
            name="rotate",
            ours=rows / turns_of.median("ours"),
            against=name,
            reference=rows / turns_of.median(name),
            unit="rows/s",
            ratio=turns_of.ratio(name, to="ours"),
            goal=goals.get(name),
        )
    drop_everything(engine)


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for kind in BY_HAND:
        with bench_database(kind) as url:
            engine = create_engine(url)
            for size in ROUNDS:
                yield from measure_on(
                    engine,
                    kind,
                    size,
                    rows=20 if smoke else ROWS,
                    rounds=1 if smoke else ROUNDS[size],
                )
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
