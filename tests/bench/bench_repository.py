"""What the repository costs beside hand-written statements on the same rows as plain JSON.

python -m tests.bench.bench_repository [--smoke]
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy import (
    JSON,
    URL,
    Column,
    Connection,
    DateTime,
    Engine,
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
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    AsyncRenewals,
    LucentBase,
    LucentSecrets,
    RenewalAttempt,
    Renewals,
    SecretKey,
    set_default_keyring,
)
from sqlalchemy_lucent.models import byte_wise_string
from tests.bench.documents import DOCUMENTS
from tests.bench.measure import KEYS, Contender, Figure, Goal, at_most, in_turns, run_alone
from tests.bench.servers import bench_database
from tests.databases import with_driver

TITLE = "Repository"
ABOUT = """\
Beside `LucentSecrets` stands what one would write by hand for plain JSON: a table with the same
primary key and time stamps, and statements that are built once and executed on the same session.
`require` and `get_many` compare with a `select` by primary key, `set` and `set_many` with the
database's upsert, 20 calls a transaction. Both tables hold 9,000 rows more. Each call makes a
repository, as a request handler does. With asyncpg it is `AsyncLucentSecrets` and an
`AsyncSession`. `fresh` of `Renewals`, for a token that is not due, stands beside `require` on a
session of its own: either takes a connection from the pool for each call."""

DATABASES = {
    "SQLite": "sqlite+pysqlite",
    "PostgreSQL, psycopg": "postgresql+psycopg",
    "PostgreSQL, asyncpg": "postgresql+asyncpg",
    "MariaDB, PyMySQL": "mysql+pymysql",
}
PARTS = SecretKey._fields
MANY = 1000
OTHERS = 9 * MANY
CALLS_PER_TURN = 20
GOALS: dict[str, Goal] = {
    "require": at_most(1.15),
    "get_many(1000)": at_most(1.2),
    "set": at_most(1.2),
    "fresh": at_most(1.05),
}

plain = Table(
    "bench_plain_secrets",
    MetaData(),
    *(Column(part, byte_wise_string(128), primary_key=True) for part in PARTS),
    Column("payload", JSON, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False),
    Column("updated_at", DateTime(timezone=True), nullable=False),
)


def by_key() -> Select[Any]:
    return select(plain.c.payload).where(*(plain.c[part] == bindparam(part) for part in PARTS))


def by_keys() -> Select[Any]:
    return select(*plain.primary_key, plain.c.payload).where(
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
        set_={"payload": on_others.excluded.payload, "updated_at": on_others.excluded.updated_at},
    )


def row(key: SecretKey, value: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    return {**key._asdict(), "payload": value, "created_at": now, "updated_at": now}


Call = Callable[[], Any]
Calls = dict[str, dict[str, Call]]
"""By what is done, then by whom: each makes as many calls as `calls_of` says."""


def calls_of(name: str) -> int:
    return 1 if name.endswith(f"({MANY})") else CALLS_PER_TURN


def by_hand(kind: str, values: Mapping[SecretKey, Any]) -> dict[str, Callable[[Any], Any]]:
    """Return what executes each statement on a session, awaitable on an async one."""
    key, value = next(iter(values.items()))
    one, many = key._asdict(), [tuple(each) for each in values]
    write, select_one, select_many = upsert(kind), by_key(), by_keys()
    return {
        "set_many(1000)": lambda s: s.execute(write, [row(*kv) for kv in values.items()]),
        "get_many(1000)": lambda s: s.execute(select_many, {"keys": many}),
        "set": lambda s: s.execute(write, row(key, value)),
        "require": lambda s: s.execute(select_one, one),
    }


def not_due(value: Any, attempt: RenewalAttempt) -> Any:
    raise AssertionError("nothing is due")


def required(engine: Engine, key: SecretKey) -> Any:
    with Session(engine) as session:
        return LucentSecrets(session).require(key)


async def required_async(engine: AsyncEngine, key: SecretKey) -> Any:
    async with AsyncSession(engine) as session:
        return await AsyncLucentSecrets(session).require(key)


def finish(name: str, result: Any) -> Any:
    """Return the values of a statement by hand."""
    if name.startswith("get_many"):
        return {SecretKey(*each[:4]): each[4] for each in result}
    return result.scalar_one() if name == "require" else result


def ours(secrets: Callable[[Any], Any], values: Mapping[SecretKey, Any]) -> dict[str, Any]:
    key, value = next(iter(values.items()))
    return {
        "set_many(1000)": lambda s: secrets(s).set_many(values),
        "get_many(1000)": lambda s: secrets(s).get_many(values),
        "set": lambda s: secrets(s).set(key, value),
        "require": lambda s: secrets(s).require(key),
    }


def fill(connection: Connection, value: Any, count: int) -> None:
    """Make the tables anew, and store `count` secrets that nobody asks for."""
    for metadata in (LucentBase.metadata, plain.metadata):
        metadata.drop_all(connection)
        metadata.create_all(connection)
    for first in range(0, count, MANY):
        keys = [SecretKey("user", n, "stripe", "apiKey") for n in range(first, first + MANY)]
        with Session(connection) as session:
            LucentSecrets(session).set_many(dict.fromkeys(keys, value))
            session.commit()
        connection.execute(insert(plain), [row(key, value) for key in keys])
    with Session(connection) as session:
        key = SecretKey("user", OTHERS, "google", "oauth")
        expires_at = datetime.now(UTC) + timedelta(days=1)
        LucentSecrets(session).set(key, value, expires_at=expires_at)
        session.commit()
    if connection.dialect.name == "postgresql":
        connection.execute(text("ANALYZE"))


@contextmanager
def calls_on(
    kind: str, url: URL, values: Mapping[SecretKey, Any], others: int
) -> Iterator[tuple[Calls, Call]]:
    """Give the calls over one session, and what commits it."""
    value = next(iter(values.values()))
    with ExitStack() as stack:
        if url.get_dialect().is_async:
            runner = stack.enter_context(asyncio.Runner())
            engine = create_async_engine(url)
            stack.callback(lambda: runner.run(engine.dispose()))

            async def prepare() -> None:
                async with engine.begin() as connection:
                    await connection.run_sync(fill, value, others)

            runner.run(prepare())
            session = AsyncSession(engine)
            stack.callback(lambda: runner.run(session.close()))
            commit: Call = lambda: runner.run(session.commit())  # noqa: E731
            renewals: Any = AsyncRenewals(engine)
            required_here: Callable[[SecretKey], Any] = partial(required_async, engine)

            def repeated(name: str, call: Callable[[Any], Any], *, plain: bool) -> Call:
                async def one_by_one() -> Any:
                    for _ in range(calls_of(name)):
                        result = await call(session)
                        result = finish(name, result) if plain else result
                    return result

                return lambda: runner.run(one_by_one())

            secrets: Any = AsyncLucentSecrets
        else:
            sync_engine = create_engine(url)
            stack.callback(sync_engine.dispose)
            with sync_engine.begin() as connection:
                fill(connection, value, others)
            sync_session = stack.enter_context(Session(sync_engine))
            commit = sync_session.commit
            renewals = Renewals(sync_engine)
            required_here = partial(required, sync_engine)

            def repeated(name: str, call: Callable[[Any], Any], *, plain: bool) -> Call:
                def one_by_one() -> Any:
                    for _ in range(calls_of(name)):
                        result = call(sync_session)
                        result = finish(name, result) if plain else result
                    return result

                return one_by_one

            secrets = LucentSecrets
        hand, own = by_hand(kind, values), ours(secrets, values)
        key = SecretKey("user", OTHERS, "google", "oauth")
        # `fresh` comes first: on SQLite, the open transaction of the others may keep it out.
        calls: Calls = {
            "fresh": {
                "require": repeated("fresh", lambda _: required_here(key), plain=False),
                "ours": repeated("fresh", lambda _: renewals.fresh(key, not_due), plain=False),
            }
        } | {
            name: {
                "by hand": repeated(name, hand[name], plain=True),
                "ours": repeated(name, own[name], plain=False),
            }
            for name in own
        }
        yield calls, commit


def measure(smoke: bool = False) -> Iterator[Figure]:
    set_default_keyring(KEYS)
    for label, driver in DATABASES.items():
        kind = driver.partition("+")[0]
        with bench_database(kind) as url:
            database = None if kind == "sqlite" else url.database
            where = with_driver(url, driver).set(database=database)
            for size in ("small", "medium"):
                values = {
                    SecretKey("tenant", f"tenant_{n:05}", "stripe", "apiKey"): DOCUMENTS[size](n)
                    for n in range(20 if smoke else MANY)
                }
                with calls_on(kind, where, values, 0 if smoke else OTHERS) as (calls, commit):
                    for name, by_whom in calls.items():
                        against = next(iter(by_whom))
                        if name.startswith(("get", "require", "fresh")):
                            assert by_whom[against]() == by_whom["ours"]()
                        rounds = 1 if smoke else 7 if calls_of(name) == 1 else 40
                        clock = time.thread_time if kind == "sqlite" else time.perf_counter
                        # In one long transaction, each write would walk past all earlier ones.
                        each = {who: Contender(call, commit) for who, call in by_whom.items()}
                        turns = in_turns(each, rounds, clock=clock, collect=False, warm_up=2)
                        yield turns.figure(
                            f"{label}, {size}",
                            name,
                            "ours",
                            against,
                            per=calls_of(name),
                            goal=GOALS.get(name),
                        )


if __name__ == "__main__":
    run_alone(measure)
