"""What the CHECK constraint of a sealed column costs an insert.

python -m tests.bench.bench_check [--smoke]
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from sqlalchemy import Engine, create_engine, delete, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import EncryptedJSON, set_default_keyring
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_most, in_turns, run_alone
from tests.bench.servers import bench_database, tidy_up

TITLE = "The CHECK constraint"
ABOUT = """\
`insert(table)` with a list of rows, and `session.add_all()` with `commit()`, into a table with
`EncryptedJSON()` (*ours*) and into the same table with `create_constraint=False`."""

GOAL = at_most(1.03)
ROWS = {"sqlite": 10_000, "postgresql": 3000, "mysql": 3000}
LABELS = {"sqlite": "SQLite", "postgresql": "PostgreSQL, psycopg", "mysql": "MariaDB, PyMySQL"}


class Base(DeclarativeBase):
    pass


class Guarded(Base):
    __tablename__ = "guarded"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    payload: Mapped[Any] = mapped_column(EncryptedJSON())


class Free(Base):
    __tablename__ = "free"
    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    payload: Mapped[Any] = mapped_column(EncryptedJSON(create_constraint=False))


MODELS: dict[str, type[Any]] = {"with": Guarded, "without": Free}


def empty(engine: Engine, model: type[Any]) -> None:
    with engine.begin() as connection:
        connection.execute(delete(model))
    tidy_up(engine)


def insert_rows(engine: Engine, model: type[Any], rows: list[dict[str, Any]]) -> None:
    with engine.begin() as connection:
        connection.execute(insert(model.__table__), rows)


def add(engine: Engine, model: type[Any], rows: list[dict[str, Any]]) -> None:
    with Session(engine) as session:
        session.add_all([model(**row) for row in rows])
        session.commit()


def figures(kind: str, engine: Engine, smoke: bool) -> Iterator[Figure]:
    count = 20 if smoke else ROWS[kind]
    works: dict[str, Callable[..., None]] = {"insert": insert_rows, "add": add}
    for (what, work), size in itertools.product(works.items(), ("small", "medium")):
        rows = [{"id": number, "payload": DOCUMENTS[size](number)} for number in range(count)]
        turns = in_turns(
            {
                name: Contender(partial(work, engine, model, rows), partial(empty, engine, model))
                for name, model in MODELS.items()
            },
            1 if smoke else 15,
            # SQLite works in this thread, the servers do not.
            clock=time.thread_time if kind == "sqlite" else time.perf_counter,
        )
        yield Figure(
            group=f"{LABELS[kind]}, {count:,} rows",
            name=f"{what}, {size}",
            ours=turns.median("with") / count * 1e6,
            against="without the constraint",
            reference=turns.median("without") / count * 1e6,
            unit="µs",
            ratio=turns.ratio("with", "without"),
            goal=GOAL,
        )


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for kind in ROWS:
        with bench_database(kind) as url:
            engine = create_engine(url)
            Base.metadata.create_all(engine)
            yield from figures(kind, engine, smoke)
            Base.metadata.drop_all(engine)
            engine.dispose()


if __name__ == "__main__":
    run_alone(measure)
