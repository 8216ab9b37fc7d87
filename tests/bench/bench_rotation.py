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

from sqlalchemy_lucent import EncryptedJSON, Keyring, rotate, set_default_keyring
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_least, in_turns, run_alone
from tests.bench.servers import bench_database, tidy_up
from tests.databases import drop_everything

TITLE = "Rotation"
ABOUT = """\
`rotate` re-seals every row of a table in committed batches of 1,000. The loops by hand read a batch
and write it by one form of the UPDATE, and keep none of the promises: no compare-and-swap, no
locks, no rows that do not open, one integer key. All take turns on 10,000 rows. The goal is about
the quickest loop, which then takes turns with `rotate` on 100,000 small or 30,000 medium documents,
where the price of a start does not count. PostgreSQL vacuums the table before each turn, untimed.
sqlalchemy-utils has its key as a callable, and each batch is loaded under the old key and written
under the new one by one executemany. *MultiFernet* is `MultiFernet.rotate` and an UPDATE per row,
sent together."""

BATCH = 1000
FEW_ROWS = 10_000
ROWS = {"small": 100_000, "medium": 30_000}
ROUNDS = {"small": 5, "medium": 3}
OTHER_ROUNDS = 2
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
) -> Callable[[Engine, Keyring], None]:
    """Return a loop over the driver's own cursor that lets `write` change each batch."""

    def loop(engine: Engine, keyring: Keyring) -> None:
        reseal = resealer(keyring)
        connection = engine.raw_connection()
        driver: Any = connection.driver_connection
        cursor = driver.cursor(**cursor_options)
        last = -1
        while True:
            cursor.execute(
                f"SELECT id, payload FROM documents WHERE id > {mark} ORDER BY id LIMIT {mark}",
                (last, BATCH),
            )
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
    raw = Table("documents", MetaData(), Column("id", Integer), Column("payload", LargeBinary))
    in_batches(engine, raw, resealer(keyring))


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


def by_unnest(cursor: Any, rows: Rows) -> None:
    """PostgreSQL: an array for each column."""
    keys, values = map(list, zip(*rows, strict=True))
    cursor.execute(
        "UPDATE documents SET payload = v.payload"
        " FROM unnest(%b::int[], %b::bytea[]) AS v (id, payload) WHERE documents.id = v.id",
        (keys, values),
    )


def by_case(cursor: Any, rows: Rows) -> None:
    """MariaDB and MySQL: one CASE over the keys."""
    cursor.execute(
        f"UPDATE documents SET payload = CASE id {'WHEN %s THEN %s ' * len(rows)}END"
        f" WHERE id IN ({', '.join(['%s'] * len(rows))})",
        [*(part for row in rows for part in row), *(key for key, _ in rows)],
    )


BY_HAND: dict[str, dict[str, Callable[[Engine, Keyring], None]]] = {
    "sqlite": {
        "a registered function": by_function,
        "executemany": in_driver(executemany("?"), "?"),
        "Core update()": in_core,
    },
    "postgresql": {
        "unnest": in_driver(by_unnest, "%s", binary=True),
        "executemany": in_driver(executemany("%s"), "%s", binary=True),
        "Core update()": in_core,
    },
    "mysql": {
        "CASE": in_driver(by_case, "%s"),
        "executemany": in_driver(executemany("%s"), "%s"),
        "Core update()": in_core,
    },
}


class WithUtils:
    """A table of sqlalchemy-utils, whose key may be a callable. `new` is what it is sealed by."""

    def __init__(self) -> None:
        encrypted: Any = importlib.import_module("sqlalchemy_utils.types.encrypted.encrypted_type")
        self.old, self.new = "old key", "new key"
        self.current = self.new
        type_ = encrypted.StringEncryptedType(
            Text(), lambda: self.current, encrypted.AesGcmEngine, length=8000
        )
        key = Column("id", Integer, primary_key=True, autoincrement=False)
        self.table = Table("utils_documents", MetaData(), key, Column("payload", type_))

    def rotate(self, engine: Engine) -> None:
        self.old, self.new = self.new, self.old

        def read(value: Any) -> Any:
            self.current = self.new  # for what is written next
            return value

        def before() -> None:
            self.current = self.old

        in_batches(engine, self.table, read, before)


def in_batches(
    engine: Engine,
    table: Table,
    renew: Callable[[Any], Any],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Read a batch and write it by one executemany, as one does with SQLAlchemy."""
    key, value = table.c
    change = update(table).where(key == bindparam("key")).values({value: bindparam("renewed")})
    last = -1
    while True:
        with engine.begin() as connection:
            before()
            query = select(table).where(key > last).order_by(key).limit(BATCH)
            rows = connection.execute(query).all()
            if not rows:
                return
            last = rows[-1][0]
            connection.execute(change, [{"key": r[0], "renewed": renew(r[1])} for r in rows])


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


def measure_on(
    engine: Engine, kind: str, size: str, few_rows: int, rows: int, rounds: int
) -> Iterator[Figure]:
    documents = [DOCUMENTS[size](n % 100) for n in range(100)]
    few = list(itertools.islice(itertools.cycle(documents), few_rows))
    texts = [json.dumps(document) for document in few]
    fill(engine, table, "payload", few)
    utils = WithUtils()
    fill(engine, utils.table, "payload", texts)
    first, second = Fernet(Fernet.generate_key()), Fernet(Fernet.generate_key())
    fill(engine, tokens, "token", [first.encrypt(text.encode()) for text in texts])

    # Each run turns the values back under the other key.
    keyrings = itertools.cycle([KEYS.with_primary("v1"), KEYS])
    fernets = itertools.cycle([MultiFernet([second, first]), MultiFernet([first, second])])

    def run_rotate() -> None:
        report = rotate(engine, table, keyring=next(keyrings), batch_size=BATCH)
        assert report.ok
        assert report.rotated in (few_rows, rows)

    def tidied(work: Callable[[], None]) -> Contender:
        return Contender(work, partial(tidy_up, engine) if rounds > 1 else None)

    by_hand = {
        f"by hand, {form}": tidied(lambda loop=loop: loop(engine, next(keyrings)))  # type: ignore[misc]
        for form, loop in BY_HAND[kind].items()
    }
    peers = {
        "sqlalchemy-utils": tidied(lambda: utils.rotate(engine)),
        "MultiFernet": tidied(lambda: in_batches(engine, tokens, next(fernets).rotate)),
    }
    ours = {"ours": tidied(run_rotate)}
    group = f"{LABELS[kind]}, {size}"
    others = in_turns(ours | by_hand | peers, min(OTHER_ROUNDS, rounds))
    drop_everything(engine)

    # What is filled in is sealed under the primary of the process.
    keyrings = itertools.cycle([KEYS.with_primary("v1"), KEYS])
    fill(engine, table, "payload", list(itertools.islice(itertools.cycle(documents), rows)))
    quickest = min(by_hand, key=others.median)
    turns = in_turns(ours | {quickest: by_hand[quickest]}, rounds)
    yield turns.rate(group, "rotate", "ours", quickest, rows=rows, goal=at_least(0.8))
    for name in (*by_hand, *peers):
        if name != quickest:
            goal = at_least(2) if name == "sqlalchemy-utils" else None
            yield others.rate(group, "rotate", "ours", name, rows=few_rows, goal=goal)
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
                    few_rows=20 if smoke else FEW_ROWS,
                    rows=30 if smoke else ROWS[size],
                    rounds=1 if smoke else ROUNDS[size],
                )
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
