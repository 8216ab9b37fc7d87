"""A sealed column beside plain JSON columns: rows in Core, entities in the ORM.

python -m tests.bench.bench_columns [--smoke]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from sqlalchemy import JSON, URL, Connection, MetaData, Table, create_engine, delete, insert, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeEngine

from sqlalchemy_lucent import EncryptedJSON, set_default_keyring
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, at_most, in_turns, run_alone
from tests.bench.servers import bench_database
from tests.databases import with_driver

TITLE = "Core and ORM beside plain JSON"
ABOUT = """\
One `connection.execute(insert(table), rows)` in a transaction, one
`connection.execute(select(table)).all()`; `session.add_all(entities)` with `session.commit()`, and
`session.scalars(select(Model)).all()` in a new session. *Lazy* is `EncryptedJSON(lazy=True)`, whose
values stay sealed. The same table with a `JSON` column, and on PostgreSQL with a `JSONB` column, is
beside it. *Prepared* is asyncmy with `stmt_cache_size=128`. SQLite is in memory, where the database
costs least and the difference shows most. Async drivers run the work in `run_sync`."""

DRIVERS = {
    "SQLite": "sqlite+pysqlite",
    "PostgreSQL, psycopg": "postgresql+psycopg",
    "PostgreSQL, psycopg async": "postgresql+psycopg_async",
    "PostgreSQL, asyncpg": "postgresql+asyncpg",
    "MariaDB, PyMySQL": "mysql+pymysql",
    "MariaDB, asyncmy": "mysql+asyncmy",
    "MariaDB, asyncmy, prepared": "mysql+asyncmy",
}
OPTIONS = {"MariaDB, asyncmy, prepared": {"stmt_cache_size": "128"}}
ROWS = {"small": 5000, "medium": 2500}
GOAL = at_most(1.05)


class Base(DeclarativeBase):
    metadata = MetaData()


class Document(Base):
    """A document in one kind of column; each subclass has a table of its own."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    payload: Mapped[Any]


def model(name: str, type_: TypeEngine[Any]) -> type[Document]:
    members = {"__tablename__": name, "payload": mapped_column(type_), "__module__": __name__}
    return type(name.title().replace("_", ""), (Document,), members)


MODELS = {
    "JSON": model("plain_json", JSON()),
    "JSONB": model("plain_jsonb", JSON().with_variant(JSONB(), "postgresql")),
    "ours": model("sealed", EncryptedJSON()),
    "lazy": model("sealed_lazy", EncryptedJSON(lazy=True)),
}

Begin = Callable[[Callable[[Connection], Any]], Any]
"""Calls a function with a connection, in a transaction."""


@contextmanager
def opened(url: URL) -> Iterator[Begin]:
    """Give what runs work in a transaction; the tables exist and are empty."""
    with ExitStack() as stack:
        if url.get_dialect().is_async:
            runner = stack.enter_context(asyncio.Runner())
            engine = create_async_engine(url)
            stack.callback(lambda: runner.run(engine.dispose()))

            async def begun(work: Callable[[Connection], Any]) -> Any:
                async with engine.begin() as connection:
                    return await connection.run_sync(work)

            def begin(work: Callable[[Connection], Any]) -> Any:
                return runner.run(begun(work))

        else:
            sync_engine = create_engine(url)
            stack.callback(sync_engine.dispose)

            def begin(work: Callable[[Connection], Any]) -> Any:
                with sync_engine.begin() as connection:
                    return work(connection)

        begin(Base.metadata.create_all)
        stack.callback(begin, Base.metadata.drop_all)
        yield begin


def table(kind: type[Document]) -> Table:
    return Base.metadata.tables[kind.__tablename__]


def empty(begin: Begin, kind: type[Document]) -> None:
    begin(lambda connection: connection.execute(delete(kind)))


def insert_rows(begin: Begin, kind: type[Document], rows: Sequence[dict[str, Any]]) -> None:
    begin(lambda connection: connection.execute(insert(table(kind)), rows))


def select_rows(begin: Begin, kind: type[Document]) -> Sequence[Any]:
    rows: Sequence[Any] = begin(lambda c: c.execute(select(table(kind))).all())
    return rows


def add_entities(begin: Begin, entities: Sequence[Document]) -> None:
    def work(connection: Connection) -> None:
        with Session(connection) as session:
            session.add_all(entities)
            session.commit()

    begin(work)


def select_entities(begin: Begin, kind: type[Document]) -> Sequence[Document]:
    def work(connection: Connection) -> Sequence[Document]:
        with Session(connection) as session:
            return session.scalars(select(kind)).all()

    entities: Sequence[Document] = begin(work)
    return entities


def adding(begin: Begin, kind: type[Document], rows: Sequence[dict[str, Any]]) -> Contender:
    """Make the entities before the clock starts."""
    entities: list[Document] = []

    def before() -> None:
        empty(begin, kind)
        entities[:] = [kind(**row) for row in rows]

    return Contender(lambda: add_entities(begin, entities), before)


def compare(begin: Begin, label: str, size: str, *, smoke: bool) -> Iterator[Figure]:
    count = 10 if smoke else ROWS[size]
    rows = [{"id": n, "payload": DOCUMENTS[size](n)} for n in range(count)]
    beside = ["JSON", "JSONB"] if label.startswith("PostgreSQL") else ["JSON"]
    kinds = {name: MODELS[name] for name in (*beside, "ours")}
    readers = kinds | {"lazy": MODELS["lazy"]}
    insert_rows(begin, MODELS["lazy"], rows)
    work: dict[str, dict[str, Contender]] = {
        "Core insert": {
            name: Contender(partial(insert_rows, begin, kind, rows), partial(empty, begin, kind))
            for name, kind in kinds.items()
        },
        "Core select": {
            name: Contender(partial(select_rows, begin, kind)) for name, kind in kinds.items()
        },
        "ORM add": {name: adding(begin, kind, rows) for name, kind in kinds.items()},
        "ORM select": {
            name: Contender(partial(select_entities, begin, kind)) for name, kind in readers.items()
        },
    }
    for what, contenders in work.items():
        # SQLite waits for nothing, so processor time leaves out what else the machine does.
        clock = time.thread_time if label == "SQLite" else time.perf_counter
        turns = in_turns(contenders, 1 if smoke else 5, clock=clock)
        for ours in ("ours", "lazy") if "lazy" in contenders else ("ours",):
            for theirs in beside:
                name = f"{what}, lazy" if ours == "lazy" else what
                yield turns.figure(f"{label}, {size}", name, ours, theirs, per=count, goal=GOAL)
    for kind in readers.values():
        empty(begin, kind)


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for label, driver in DRIVERS.items():
        with bench_database(driver.partition("+")[0]) as url:
            database = None if label == "SQLite" else url.database
            url = with_driver(url, driver).set(database=database)
            with opened(url.update_query_dict(OPTIONS.get(label, {}))) as begin:
                for size in ROWS:
                    yield from compare(begin, label, size, smoke=smoke)


if __name__ == "__main__":
    run_alone(measure)
