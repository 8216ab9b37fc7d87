"""What a fence costs an update: of the sealed column, and of another one.

python -m tests.bench.bench_fence [--smoke]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from sqlalchemy import (
    Column,
    Engine,
    Integer,
    MetaData,
    Table,
    bindparam,
    create_engine,
    insert,
    update,
)

from sqlalchemy_lucent import EncryptedJSON, set_default_keyring
from sqlalchemy_lucent.migrations.fence import Fence
from sqlalchemy_lucent.rotation.targets import resolve_targets
from tests.bench.bench_rotation import LABELS
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Figure, at_most, in_turns, run_alone
from tests.bench.servers import bench_database

TITLE = "The fence"
ABOUT = """\
Updates by primary key, all in one transaction, of a table that is fenced against `v1` and of the
same table without a fence: of the sealed column, and of an integer beside it."""

GOAL = at_most(1.1)
ROWS = 1000
metadata = MetaData()


def table(name: str) -> Table:
    key = Column("id", Integer, primary_key=True, autoincrement=False)
    return Table(name, metadata, key, Column("number", Integer), Column("payload", EncryptedJSON))


TABLES = {"with it": table("fenced"), "without it": table("open")}


def update_rows(engine: Engine, of: Table, values: list[Mapping[str, Any]]) -> None:
    (name,) = values[0].keys() - {"key"}
    statement = update(of).where(of.c.id == bindparam("key")).values({name: bindparam(name)})
    with engine.begin() as connection:
        connection.execute(statement, values)


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    count, rounds = (20, 1) if smoke else (ROWS, 15)
    for kind, label in LABELS.items():
        # SQLite works in this thread, the servers do not.
        clock: Callable[[], float] = time.thread_time if kind == "sqlite" else time.perf_counter
        with bench_database(kind) as url:
            engine = create_engine(url)
            for size in ("small", "medium"):
                metadata.create_all(engine)
                documents = [{"id": n, "payload": DOCUMENTS[size](n)} for n in range(count)]
                with engine.begin() as connection:
                    for each in TABLES.values():
                        connection.execute(insert(each), documents)
                (target,) = resolve_targets(TABLES["with it"], engine)
                fence = Fence(target, "v1")
                fence.add(engine)
                fence.validate(engine)
                work: dict[str, list[Mapping[str, Any]]] = {
                    "payload": [{"key": n, "payload": DOCUMENTS[size](n)} for n in range(count)],
                    "number": [{"key": n, "number": n} for n in range(count)],
                }
                for name, values in work.items():
                    contenders = {
                        which: partial(update_rows, engine, each, values)
                        for which, each in TABLES.items()
                    }
                    turns = in_turns(contenders, rounds, clock=clock, collect=False)
                    yield turns.figure(
                        label,
                        f"{size}, {name}",
                        "with it",
                        "without it",
                        per=count,
                        goal=GOAL,
                    )
                metadata.drop_all(engine)
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
