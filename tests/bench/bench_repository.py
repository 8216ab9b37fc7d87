"""What the repository costs beside hand-written statements on the same rows as plain JSON.

python -m tests.bench.bench_repository [--smoke]
"""

from __future__ import annotations

import asyncio
import sys
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
    Select,
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
from sqlalchemy_lucent.models import byte_wise_string, computed_key_version, key_version_type
from tests.bench.bare import FloorJSON
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

The floor is the statement by hand on a table of the repository's own form, whose payload is sealed
by the floor: the key version is a generated column with an index there, which each write has to
keep. What `set` and `require` do beyond that: they look for a database and a keyring, flush the
session, bind the value to the four parts of its key, forget an object of the session that is out of
date, and give back the token that `expected=` takes. It is some microseconds, whatever the database
takes; in memory, where a statement takes few itself, that shows most. *Python's calls* counts the
functions in Python that one call of each runs through (`sys.setprofile`), SQLAlchemy's own
included: a function that runs once between two statements costs some 0.4 µs there, several times
what it does in a loop of its own."""

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


def secrets_by_hand(name: str, metadata: MetaData, *payload: Column[Any]) -> Table:
    return Table(
        name,
        metadata,
        *(Column(part, byte_wise_string(128), primary_key=True) for part in PARTS),
        *payload,
        Column("created_at", DateTime(timezone=True), nullable=False),
        Column("updated_at", DateTime(timezone=True), nullable=False),
    )


by_hand = MetaData()
plain = secrets_by_hand("bench_plain_secrets", by_hand, Column("payload", JSON, nullable=False))
floor = secrets_by_hand(
    "bench_floor_secrets",
    by_hand,
    Column("payload", FloorJSON, nullable=False),
    Column("key_version", key_version_type(), computed_key_version("payload"), index=True),
)


def by_key(table: Table) -> Select[Any]:
    return select(table.c.payload).where(*(table.c[part] == bindparam(part) for part in PARTS))


def by_keys(table: Table) -> Select[Any]:
    return select(*table.primary_key, table.c.payload).where(
        tuple_(*table.primary_key).in_(bindparam("keys", expanding=True))
    )


def upsert(table: Table, kind: str) -> Insert:
    if kind == "mysql":
        on_mysql = mysql.insert(table)
        return on_mysql.on_duplicate_key_update(
            payload=on_mysql.inserted.payload, updated_at=on_mysql.inserted.updated_at
        )
    on_others = sqlite.insert(table) if kind == "sqlite" else postgresql.insert(table)
    return on_others.on_conflict_do_update(
        index_elements=list(table.primary_key),
        set_={
            "payload": on_others.excluded.payload,
            "updated_at": on_others.excluded.updated_at,
        },
    )


def row(key: SecretKey, value: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {**key._asdict(), "payload": value, "created_at": now, "updated_at": now}


Call = Callable[[], Any]
Calls = Mapping[str, Mapping[str, Call]]
"""By what is done, then by whom."""


def sync_calls(session: Session, kind: str, values: Mapping[SecretKey, Any]) -> Calls:
    key, value = next(iter(values.items()))
    one, many = key._asdict(), [tuple(each) for each in values]

    def in_table(table: Table) -> dict[str, Call]:
        write, select_one, select_many = upsert(table, kind), by_key(table), by_keys(table)

        def get_many() -> dict[SecretKey, Any]:
            rows = session.execute(select_many, {"keys": many})
            return {SecretKey(*each[:4]): each[4] for each in rows}

        return {
            "set_many(1000)": lambda: session.execute(write, [row(*kv) for kv in values.items()]),
            "get_many(1000)": get_many,
            "set": lambda: session.execute(write, row(key, value)),
            "require": lambda: session.execute(select_one, one).scalar_one(),
        }

    ours: dict[str, Call] = {
        "set_many(1000)": lambda: LucentSecrets(session).set_many(values),
        "get_many(1000)": lambda: LucentSecrets(session).get_many(values),
        "set": lambda: LucentSecrets(session).set(key, value),
        "require": lambda: LucentSecrets(session).require(key),
    }
    return side_by_side(in_table(plain), in_table(floor), ours)


def side_by_side(
    on_plain: Mapping[str, Call], on_floor: Mapping[str, Call], ours: Mapping[str, Call]
) -> Calls:
    return {
        name: {"by hand": on_plain[name], "floor": on_floor[name], "ours": ours[name]}
        for name in ours
    }


def async_calls(
    session: AsyncSession, kind: str, values: Mapping[SecretKey, Any], runner: asyncio.Runner
) -> Calls:
    key, value = next(iter(values.items()))
    one, many = key._asdict(), [tuple(each) for each in values]

    def repeated(call: Callable[[], Awaitable[Any]]) -> Call:
        async def one_by_one() -> Any:
            for _ in range(CALLS_PER_TURN):
                result = await call()
            return result

        return lambda: runner.run(one_by_one())

    def once(call: Callable[[], Awaitable[Any]]) -> Call:
        async def awaited() -> Any:
            return await call()

        return lambda: runner.run(awaited())

    def in_table(table: Table) -> dict[str, Call]:
        write, select_one, select_many = upsert(table, kind), by_key(table), by_keys(table)

        async def require() -> Any:
            return (await session.execute(select_one, one)).scalar_one()

        async def get_many() -> dict[SecretKey, Any]:
            rows = await session.execute(select_many, {"keys": many})
            return {SecretKey(*each[:4]): each[4] for each in rows}

        return {
            "set_many(1000)": once(
                lambda: session.execute(write, [row(*kv) for kv in values.items()])
            ),
            "get_many(1000)": once(get_many),
            "set": repeated(lambda: session.execute(write, row(key, value))),
            "require": repeated(require),
        }

    ours = {
        "set_many(1000)": once(lambda: AsyncLucentSecrets(session).set_many(values)),
        "get_many(1000)": once(lambda: AsyncLucentSecrets(session).get_many(values)),
        "set": repeated(lambda: AsyncLucentSecrets(session).set(key, value)),
        "require": repeated(lambda: AsyncLucentSecrets(session).require(key)),
    }
    return side_by_side(in_table(plain), in_table(floor), ours)


def fill(connection: Connection, value: Any, count: int) -> None:
    """Make the tables anew, and store `count` secrets that are not asked for."""
    for metadata in (LucentBase.metadata, by_hand):
        metadata.drop_all(connection)
        metadata.create_all(connection)
    for first in range(0, count, MANY):
        keys = [SecretKey("user", n, "stripe", "apiKey") for n in range(first, first + MANY)]
        with Session(connection) as session:
            LucentSecrets(session).set_many(dict.fromkeys(keys, value))
            session.commit()
        for table in (plain, floor):
            connection.execute(insert(table), [row(key, value) for key in keys])
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
                    name: by_whom
                    if name.endswith(f"({MANY})")
                    else {whose: repeated(call) for whose, call in by_whom.items()}
                    for name, by_whom in calls.items()
                }


def repeated(call: Call) -> Call:
    def one_by_one() -> Any:
        for _ in range(CALLS_PER_TURN):
            result = call()
        return result

    return one_by_one


def turns_of(name: str, kind: str, by_whom: Mapping[str, Call], smoke: bool) -> Turns:
    if name.startswith(("get", "require")):
        assert by_whom["by hand"]() == by_whom["floor"]() == by_whom["ours"]()
    rounds = 1 if smoke else 11 if name.endswith(f"({MANY})") else 60
    return in_turns(
        by_whom,
        rounds,
        clock=time.thread_time if kind == "sqlite" else time.perf_counter,
        collect=False,
        warm_up=2,
    )


def python_calls(work: Call) -> float:
    """Count the functions in Python that a call runs through; `work` makes 20 calls."""
    counted = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal counted
        counted += event == "call"

    work()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted / CALLS_PER_TURN


def where_the_rest_goes(label: str, calls: Calls) -> Iterator[Figure]:
    for name in ("set", "require"):
        counts = {whose: python_calls(work) for whose, work in calls[name].items()}
        yield Figure(
            group=f"Python's calls, {label}",
            name=name,
            ours=counts["ours"],
            against="by hand, JSON",
            reference=counts["by hand"],
            unit="calls",
            ratio=counts["ours"] - counts["by hand"],
            floor=counts["floor"] - counts["by hand"],
            form="{:.0f} more",
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
                    for name, by_whom in calls.items():
                        turns = turns_of(name, kind, by_whom, smoke)
                        count = 1 if name.endswith(f"({MANY})") else CALLS_PER_TURN
                        yield Figure(
                            group=f"{label}, {size}",
                            name=name,
                            ours=turns.median("ours") * 1e6 / count,
                            against="by hand, JSON",
                            reference=turns.median("by hand") * 1e6 / count,
                            unit="µs",
                            ratio=turns.ratio("ours", to="by hand"),
                            floor=turns.ratio("floor", to="by hand"),
                            goal=GOALS.get(name),
                        )
                    if (kind, size) == ("sqlite", "small"):
                        yield from where_the_rest_goes(label, calls)


if __name__ == "__main__":
    run_alone(measure)
