"""What the repository costs beside hand-written statements on the same rows as plain JSON.

python -m tests.bench.bench_repository [--smoke]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    DateTime,
    Insert,
    MetaData,
    Table,
    bindparam,
    create_engine,
    insert,
    select,
    text,
    tuple_,
)
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    LucentBase,
    LucentSecrets,
    SecretKey,
    set_default_keyring,
)
from sqlalchemy_lucent.models import byte_wise_string
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Figure, Goal, Turns, at_most, in_turns, run_alone
from tests.bench.servers import bench_database

TITLE = "Repository"
ABOUT = """\
Beside `LucentSecrets` stands what one would write by hand for plain JSON: a table with the same
primary key and time stamps, and statements that are built once and kept, executed on the same
session. `require` and `get_many` have a `select` by primary key beside them, `set` and `set_many`
the database's upsert. Both tables hold 9,000 rows more, which nobody asks for. A repository is made
anew for each call, as a request handler does. With asyncpg it is `AsyncLucentSecrets` and an
`AsyncSession`. The figures are microseconds a call.

What `set` does beyond that: it checks the key and the value, seals, gives back the token that
`expected=` takes, and writes a table that has the key version as a generated column with an index.
In memory, where a statement takes some microseconds, that shows most."""

DATABASES = {
    "SQLite in memory": ("sqlite", "sqlite+pysqlite"),
    "PostgreSQL, psycopg": ("postgresql", "postgresql+psycopg"),
    "PostgreSQL, asyncpg": ("postgresql", "postgresql+asyncpg"),
    "MariaDB, PyMySQL": ("mysql", "mysql+pymysql"),
}
PARTS = SecretKey._fields
MANY = 1000
OTHERS = 9 * MANY
CALLS_PER_TURN = 20
GOALS: dict[str, Goal] = {
    "require": at_most(1.15),
    "get_many(1000)": at_most(1.2),
    "set": at_most(1.2),
}

plain = Table(
    "bench_plain_secrets",
    MetaData(),
    *(Column(part, byte_wise_string(128), primary_key=True) for part in PARTS),
    Column("payload", JSON, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
)
SELECT_ONE = select(plain.c.payload).where(*(plain.c[part] == bindparam(part) for part in PARTS))
SELECT_MANY = select(*plain.primary_key, plain.c.payload).where(
    tuple_(*plain.primary_key).in_(bindparam("keys", expanding=True))
)


def upsert(kind: str) -> Insert:
    if kind == "mysql":
        on_mysql = mysql.insert(plain)
        return on_mysql.on_duplicate_key_update(
            payload=on_mysql.inserted.payload, updated_at=on_mysql.inserted.updated_at
        )
    on_others = sqlite.insert(plain) if kind == "sqlite" else postgresql.insert(plain)
    return on_others.on_conflict_do_update(
        index_elements=list(plain.primary_key),
        set_={
            "payload": on_others.excluded.payload,
            "updated_at": on_others.excluded.updated_at,
        },
    )


def row(key: SecretKey, value: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {**key._asdict(), "payload": value, "created_at": now, "updated_at": now}


Calls = Mapping[str, tuple[Callable[[], Any], Callable[[], Any]]]
"""By hand and ours, by name."""


def sync_calls(session: Session, kind: str, values: Mapping[SecretKey, Any]) -> Calls:
    write = upsert(kind)
    key, value = next(iter(values.items()))
    one, many = key._asdict(), [tuple(each) for each in values]

    def get_many() -> dict[SecretKey, Any]:
        rows = session.execute(SELECT_MANY, {"keys": many})
        return {SecretKey(*each[:4]): each[4] for each in rows}

    return {
        "set_many(1000)": (
            lambda: session.execute(write, [row(*each) for each in values.items()]),
            lambda: LucentSecrets(session).set_many(values),
        ),
        "get_many(1000)": (get_many, lambda: LucentSecrets(session).get_many(values)),
        "set": (
            lambda: session.execute(write, row(key, value)),
            lambda: LucentSecrets(session).set(key, value),
        ),
        "require": (
            lambda: session.execute(SELECT_ONE, one).scalar_one(),
            lambda: LucentSecrets(session).require(key),
        ),
    }


def async_calls(
    session: AsyncSession, kind: str, values: Mapping[SecretKey, Any], runner: asyncio.Runner
) -> Calls:
    write = upsert(kind)
    key, value = next(iter(values.items()))
    one, many = key._asdict(), [tuple(each) for each in values]

    async def select_one() -> Any:
        return (await session.execute(SELECT_ONE, one)).scalar_one()

    async def select_many() -> dict[SecretKey, Any]:
        rows = await session.execute(SELECT_MANY, {"keys": many})
        return {SecretKey(*each[:4]): each[4] for each in rows}

    def repeated(call: Callable[[], Awaitable[Any]]) -> Callable[[], Any]:
        async def one_by_one() -> Any:
            for _ in range(CALLS_PER_TURN):
                result = await call()
            return result

        return lambda: runner.run(one_by_one())

    def once(call: Callable[[], Awaitable[Any]]) -> Callable[[], Any]:
        async def awaited() -> Any:
            return await call()

        return lambda: runner.run(awaited())

    return {
        "set_many(1000)": (
            once(lambda: session.execute(write, [row(*each) for each in values.items()])),
            once(lambda: AsyncLucentSecrets(session).set_many(values)),
        ),
        "get_many(1000)": (
            once(select_many),
            once(lambda: AsyncLucentSecrets(session).get_many(values)),
        ),
        "set": (
            repeated(lambda: session.execute(write, row(key, value))),
            repeated(lambda: AsyncLucentSecrets(session).set(key, value)),
        ),
        "require": (
            repeated(select_one),
            repeated(lambda: AsyncLucentSecrets(session).require(key)),
        ),
    }


def fill(connection: Connection, value: Any, count: int) -> None:
    """Make both tables anew, and store `count` secrets that are not asked for."""
    for metadata in (LucentBase.metadata, plain.metadata):
        metadata.drop_all(connection)
        metadata.create_all(connection)
    for first in range(0, count, MANY):
        keys = [SecretKey("user", n, "stripe", "apiKey") for n in range(first, first + MANY)]
        with Session(connection) as session:
            LucentSecrets(session).set_many(dict.fromkeys(keys, value))
            session.commit()
        connection.execute(insert(plain), [row(key, value) for key in keys])
    if connection.dialect.name == "postgresql":
        connection.execute(text("ANALYZE"))


@contextmanager
def calls_on(kind: str, url: URL, values: Mapping[SecretKey, Any], others: int) -> Iterator[Calls]:
    """Give the calls over one session, whose work is rolled back in the end."""
    with ExitStack() as stack:
        if url.get_dialect().is_async:
            runner = stack.enter_context(asyncio.Runner())
            engine = create_async_engine(url)
            stack.callback(lambda: runner.run(engine.dispose()))

            async def prepare() -> None:
                async with engine.begin() as connection:
                    await connection.run_sync(fill, next(iter(values.values())), others)

            runner.run(prepare())
            session = AsyncSession(engine)
            stack.callback(lambda: runner.run(session.close()))
            yield async_calls(session, kind, values, runner)
        else:
            sync_engine = create_engine(url)
            stack.callback(sync_engine.dispose)
            with sync_engine.begin() as connection:
                fill(connection, next(iter(values.values())), others)
            with Session(sync_engine) as sync_session:
                calls = sync_calls(sync_session, kind, values)
                yield {
                    name: pair
                    if name.endswith(f"({MANY})")
                    else (repeated(pair[0]), repeated(pair[1]))
                    for name, pair in calls.items()
                }


def repeated(call: Callable[[], Any]) -> Callable[[], Any]:
    def one_by_one() -> Any:
        for _ in range(CALLS_PER_TURN):
            result = call()
        return result

    return one_by_one


def turns_of(
    name: str, kind: str, by_hand: Callable[[], Any], ours: Callable[[], Any], smoke: bool
) -> Turns:
    assert not name.startswith(("get", "require")) or by_hand() == ours()
    rounds = 1 if smoke else 11 if name.endswith(f"({MANY})") else 60
    return in_turns(
        {"by hand": by_hand, "ours": ours},
        rounds,
        clock=time.thread_time if kind == "sqlite" else time.perf_counter,
        collect=False,
        warm_up=2,
    )


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for label, (kind, driver) in DATABASES.items():
        with bench_database(kind) as url:
            for size in ("small", "medium"):
                values = {
                    SecretKey("tenant", f"tenant_{n:05}", "stripe", "apiKey"): DOCUMENTS[size](n)
                    for n in range(20 if smoke else MANY)
                }
                where = url.set(
                    drivername=driver, database=None if kind == "sqlite" else url.database
                )
                with calls_on(kind, where, values, 0 if smoke else OTHERS) as calls:
                    for name, (by_hand, ours) in calls.items():
                        turns = turns_of(name, kind, by_hand, ours, smoke)
                        count = 1 if name.endswith(f"({MANY})") else CALLS_PER_TURN
                        yield Figure(
                            group=f"{label}, {size}",
                            name=name,
                            ours=turns.median("ours") * 1e6 / count,
                            against="by hand, JSON",
                            reference=turns.median("by hand") * 1e6 / count,
                            unit="µs",
                            ratio=turns.ratio("ours", to="by hand"),
                            goal=GOALS.get(name),
                        )


if __name__ == "__main__":
    run_alone(measure)
