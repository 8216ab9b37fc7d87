"""How long the swap of ``op.encrypt_column`` keeps a table locked, beside the back-fill before it.

python -m tests.bench.bench_swap [--smoke]
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, Table, create_engine, event

from sqlalchemy_lucent import set_default_keyring
from sqlalchemy_lucent.migrations import encrypt_column
from tests.bench.bench_rotation import LABELS, fill
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Figure, Turns, run_alone
from tests.bench.servers import bench_database
from tests.databases import drop_everything

TITLE = "Migration: the lock of the swap"
ABOUT = """\
`op.encrypt_column` turns a `JSON` column of a table of 20,000 rows into a sealed one. *Before* is
what it does while others read and write: the back-fill and, on PostgreSQL, the comparison of every
row. *Ours* is from the statement that keeps writers out to the one that lets them in again, while
nobody writes."""

ROWS = 20_000
SIZES = ("small", "medium")
LOCKING = {
    "sqlite": "BEGIN IMMEDIATE",
    "postgresql": "LOCK TABLE",
    "mysql": "LOCK TABLES",
}
"""How the statement begins that keeps writers out; on SQLite the last of its kind counts."""

RELEASING = {"sqlite": "COMMIT", "postgresql": "COMMIT", "mysql": "UNLOCK TABLES"}

table = Table(
    "documents",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("payload", sa.JSON()),
)


def once(engine: Engine, kind: str, documents: list[Any]) -> tuple[float, float]:
    """Return the seconds before the lock, and those under it."""
    fill(engine, table, "payload", documents)
    locked = released = 0.0

    def note_lock(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal locked
        if statement.startswith(LOCKING[kind]):
            locked = time.perf_counter()

    def note_release(_: Any, __: Any, statement: str, *___: Any) -> None:
        nonlocal released
        if released < locked and statement.startswith(RELEASING[kind]):
            released = time.perf_counter()

    event.listen(engine, "before_cursor_execute", note_lock)
    event.listen(engine, "after_cursor_execute", note_release)
    began = time.perf_counter()
    with engine.connect() as connection:
        operations = Operations(MigrationContext.configure(connection))
        encrypt_column("documents", "payload", existing_type=sa.JSON(), operations=operations)
    event.remove(engine, "before_cursor_execute", note_lock)
    event.remove(engine, "after_cursor_execute", note_release)
    drop_everything(engine)
    assert began < locked < released
    return locked - began, released - locked


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    rows, rounds, warm_up = (20, 1, 0) if smoke else (ROWS, 3, 1)
    for kind, label in LABELS.items():
        with bench_database(kind) as url:
            engine = create_engine(url)
            for size in SIZES:
                documents = [DOCUMENTS[size](n % 100) for n in range(rows)]
                found = [once(engine, kind, documents) for _ in range(warm_up + rounds)][warm_up:]
                before, locked = zip(*found, strict=True)
                turns = Turns({"before": before, "locked": locked})
                yield turns.figure(
                    "op.encrypt_column", f"{label}, {size}", "locked", "before", per=rows
                )
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
