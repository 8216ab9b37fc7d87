"""What the CHECK constraint of a sealed column costs an insert.

python -m tests.bench.bench_check [--smoke]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    create_engine,
    delete,
    insert,
)

from sqlalchemy_lucent import EncryptedJSON, set_default_keyring
from tests.bench.bench_rotation import LABELS
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_most, in_turns, run_alone
from tests.bench.servers import bench_database

TITLE = "The CHECK constraint"
ABOUT = """\
`insert(table)` with a list of rows into a table with `EncryptedJSON()`, and into the same table
with `create_constraint=False`. Emptying the table is not timed."""

GOAL = at_most(1.03)
ROWS = 1000
metadata = MetaData()


def table(name: str, type_: EncryptedJSON) -> Table:
    key = Column("id", Integer, primary_key=True, autoincrement=False)
    return Table(name, metadata, key, Column("payload", type_))


TABLES = {
    "with it": table("guarded", EncryptedJSON()),
    "without it": table("free", EncryptedJSON(create_constraint=False)),
}


def empty(engine: Engine, into: Table) -> None:
    with engine.begin() as connection:
        connection.execute(delete(into))


def insert_rows(engine: Engine, into: Table, rows: list[dict[str, Any]]) -> None:
    with engine.begin() as connection:
        connection.execute(insert(into), rows)


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    count, rounds = (20, 1) if smoke else (ROWS, 15)
    for kind, label in LABELS.items():
        with bench_database(kind) as url:
            engine = create_engine(url)
            metadata.create_all(engine)
            for size in ("small", "medium"):
                rows = [{"id": n, "payload": DOCUMENTS[size](n)} for n in range(count)]
                contenders = {
                    name: Contender(
                        partial(insert_rows, engine, into, rows), partial(empty, engine, into)
                    )
                    for name, into in TABLES.items()
                }
                # SQLite works in this thread, the servers do not.
                clock = time.thread_time if kind == "sqlite" else time.perf_counter
                turns = in_turns(contenders, rounds, clock=clock, collect=False)
                yield turns.figure(
                    label, f"insert, {size}", "with it", "without it", per=count, goal=GOAL
                )
            metadata.drop_all(engine)
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
