"""The models that are compared, and what is done with them, alike on every database."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import JSON, URL, Connection, MetaData, Table, create_engine, delete, insert, select
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import TypeEngine

from sqlalchemy_lucent import EncryptedJSON
from tests.bench.bare import FloorJSON

T = TypeVar("T")


class Base(DeclarativeBase):
    metadata = MetaData()


class Document(Base):
    """A document of any kind of column; each subclass has a table of its own."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    payload: Mapped[Any]


def model(name: str, type_: TypeEngine[Any]) -> type[Document]:
    members = {"__tablename__": name, "payload": mapped_column(type_), "__module__": __name__}
    return type(name.title().replace("_", ""), (Document,), members)


PLAIN = model("plain_json", JSON())
BINARY = model("plain_jsonb", JSON().with_variant(JSONB(), "postgresql"))
FLOOR = model("floor", FloorJSON())
SEALED = model("sealed", EncryptedJSON())
LAZY = model("sealed_lazy", EncryptedJSON(lazy=True))

MODELS = {"JSON": PLAIN, "JSONB": BINARY, "floor": FLOOR, "ours": SEALED, "ours, lazy": LAZY}


class Database:
    """Does work in a transaction of a connection or of a session; the same for async drivers."""

    def transaction(self, work: Callable[[Connection], T]) -> T:
        raise NotImplementedError

    def session(self, work: Callable[[Session], T]) -> T:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class SyncDatabase(Database):
    def __init__(self, url: URL | str) -> None:
        self.engine = create_engine(url)

    def transaction(self, work: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            return work(connection)

    def session(self, work: Callable[[Session], T]) -> T:
        with Session(self.engine) as session:
            return work(session)

    def close(self) -> None:
        self.engine.dispose()


class AsyncDatabase(Database):
    def __init__(self, url: URL | str, runner: asyncio.Runner) -> None:
        self.engine = create_async_engine(url)
        self.runner = runner

    def transaction(self, work: Callable[[Connection], T]) -> T:
        async def run() -> T:
            async with self.engine.begin() as connection:
                return await connection.run_sync(work)

        return self.runner.run(run())

    def session(self, work: Callable[[Session], T]) -> T:
        async def run() -> T:
            async with AsyncSession(self.engine) as session:
                return await session.run_sync(work)

        return self.runner.run(run())

    def close(self) -> None:
        self.runner.run(self.engine.dispose())


@contextmanager
def opened(url: URL | str, *, is_async: bool = False) -> Iterator[Database]:
    """Give a database whose tables are there and empty, and drop them in the end."""
    with asyncio.Runner() as runner:
        database = AsyncDatabase(url, runner) if is_async else SyncDatabase(url)
        database.transaction(Base.metadata.drop_all)
        database.transaction(Base.metadata.create_all)
        try:
            yield database
        finally:
            database.transaction(Base.metadata.drop_all)
            database.close()


# -- what is timed -------------------------------------------------------------------------------


def table(kind: type[Document]) -> Table:
    return Base.metadata.tables[kind.__tablename__]


def empty(database: Database, kind: type[Document]) -> None:
    database.transaction(lambda connection: connection.execute(delete(kind)))


def insert_rows(database: Database, kind: type[Document], rows: Sequence[dict[str, Any]]) -> object:
    return database.transaction(lambda connection: connection.execute(insert(table(kind)), rows))


def select_rows(database: Database, kind: type[Document]) -> Sequence[Any]:
    statement = select(table(kind))
    return database.transaction(lambda connection: connection.execute(statement).all())


def add_entities(database: Database, entities: Sequence[Document]) -> None:
    def work(session: Session) -> None:
        session.add_all(entities)
        session.commit()

    database.session(work)


def select_entities(database: Database, kind: type[Document]) -> Sequence[Document]:
    return database.session(lambda session: session.scalars(select(kind)).all())
