"""A session that routes reads to a replica, by SQLAlchemy's own recipe: writes go to the writer.

What a write depends on goes there too: a row that it locks, a target that must be free.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
from sqlalchemy import URL, Delete, Engine, Update, create_engine, event
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConflictError,
    Keyring,
    LucentBase,
    LucentSecrets,
    SecretAccess,
    SecretKey,
)
from tests.conftest import KEY_1, KEY_2
from tests.databases import (
    ASYNC_DRIVERS,
    SYNC_DRIVERS,
    drop_everything,
    own_database,
    with_driver,
)
from tests.secret_tables import KEY, OTHER

NEW = SecretKey("tenant", "t3", "stripe", "apiKey")

STORED = {KEY: "current", OTHER: "current"}
STALE = {KEY: "stale", NEW: "removed"}
"""What the replica has: it lags."""

PROMOTED = Keyring({"v2": KEY_2, "v1": KEY_1}, primary="v2")


class RoutingSession(Session):
    """The recipe of SQLAlchemy's documentation, "Custom Vertical Partitioning"."""

    def __init__(self, *, writer: Engine, reader: Engine, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.writer = writer
        self.reader = reader

    def get_bind(self, mapper: Any = None, clause: Any = None) -> Engine:  # type: ignore[override]
        if self._flushing or isinstance(clause, (Update, Delete)):
            return self.writer
        return self.reader


class Pair(NamedTuple):
    writer: URL
    reader: URL


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Pair]]:
    """Give two databases of a kind, with what is stored and a replica that lags."""
    with ExitStack() as stack:

        @lru_cache
        def databases(kind: str) -> Pair:
            return Pair(
                *(
                    stack.enter_context(
                        own_database(kind, tmp_path_factory.mktemp(role), f"lucent_{role}")
                    )
                    for role in Pair._fields
                )
            )

        def filled(kind: str) -> Pair:
            pair = databases(kind)
            for url, values in zip(pair, (STORED, STALE), strict=True):
                engine = create_engine(url)
                drop_everything(engine)
                LucentBase.metadata.create_all(engine)
                with Session(engine) as session:
                    LucentSecrets(session).set_many(values)
                    session.commit()
                engine.dispose()
            return pair

        yield filled


@pytest.fixture(params=list(SYNC_DRIVERS))
def pair(request: pytest.FixtureRequest, pairs: Callable[[str], Pair]) -> Pair:
    return pairs(request.param)


@pytest.fixture
def engines(pair: Pair) -> Iterator[tuple[Engine, Engine]]:
    """The engines of the writer and the reader."""
    writer, reader = map(create_engine, pair)
    yield writer, reader
    writer.dispose()
    reader.dispose()


def stored_in(url: URL) -> dict[SecretKey, tuple[Any, str | None]]:
    """Return the values in a database, with their key versions."""
    engine = create_engine(url)
    with Session(engine) as session:
        secrets = LucentSecrets(session, keyring=PROMOTED)
        found = {info.key: (secrets.require(info.key), info.key_version) for info in secrets.list()}
    engine.dispose()
    return found


def under_v1(values: Mapping[SecretKey, Any]) -> dict[SecretKey, tuple[Any, str]]:
    return {key: (value, "v1") for key, value in values.items()}


Secrets = Any
"""`LucentSecrets`, or `AsyncLucentSecrets`, whose methods are to be awaited."""

WRITES: dict[str, tuple[Callable[[Secrets], Any], dict[SecretKey, tuple[Any, str]]]] = {
    "set": (lambda s: s.set(KEY, "new"), under_v1({**STORED, KEY: "new"})),
    "set if absent": (
        lambda s: s.set(NEW, "new", expected=None),
        under_v1({**STORED, NEW: "new"}),
    ),
    "set_many": (
        lambda s: s.set_many({KEY: "new", NEW: "new"}),
        under_v1({**STORED, KEY: "new", NEW: "new"}),
    ),
    "copy": (lambda s: s.copy(KEY, NEW), under_v1({**STORED, NEW: "current"})),
    "move": (lambda s: s.move(KEY, NEW), under_v1({OTHER: "current", NEW: "current"})),
    "rotate": (
        lambda s: s.rotate(KEY, PROMOTED),
        {**under_v1(STORED), KEY: ("current", "v2")},
    ),
    "rotate_many": (
        lambda s: s.rotate_many([KEY, OTHER], PROMOTED),
        {KEY: ("current", "v2"), OTHER: ("current", "v2")},
    ),
    "delete": (lambda s: s.delete(KEY), under_v1({OTHER: "current"})),
    "delete_many": (
        lambda s: s.delete_many(scope="tenant", owner_id="t1"),
        under_v1({OTHER: "current"}),
    ),
}


def record(engine: Engine) -> list[str]:
    """Return a list that each statement on `engine` is added to."""
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def add(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        statements.append(statement)

    return statements


def ignore(access: SecretAccess, session: Session) -> None:
    """Handle an access: with a handler, writes happen in a savepoint."""


@pytest.mark.parametrize("on_access", [None, ignore], ids=["unaudited", "audited"])
@pytest.mark.parametrize("name", WRITES)
def test_a_write_asks_and_changes_the_writer_only(
    pair: Pair, engines: tuple[Engine, Engine], name: str, on_access: Any
) -> None:
    write, expected = WRITES[name]
    writer, reader = engines
    asked = record(reader)
    with RoutingSession(writer=writer, reader=reader) as session:
        write(LucentSecrets(session, on_access=on_access))
        session.commit()
    assert asked == []
    assert stored_in(pair.writer) == expected
    assert stored_in(pair.reader) == under_v1(STALE)


def test_reads_go_to_the_replica(engines: tuple[Engine, Engine]) -> None:
    writer, reader = engines
    asked = record(writer)
    with RoutingSession(writer=writer, reader=reader) as session:
        secrets = LucentSecrets(session)
        assert secrets.require(KEY) == secrets.get(KEY) == "stale"
        assert secrets.get_many([KEY, OTHER, NEW]) == STALE
        assert secrets.exists(NEW)
        assert secrets.info(OTHER) is None
        assert [info.key for info in secrets.list(after=KEY)] == [NEW]
        assert secrets.count() == 2
    assert asked == []


def test_expected_tokens_are_compared_in_the_writer(
    pair: Pair, engines: tuple[Engine, Engine]
) -> None:
    writer, reader = engines
    with RoutingSession(writer=writer, reader=reader) as session:
        secrets = LucentSecrets(session)
        stale = secrets.info(KEY)
        assert stale is not None
        assert stale.token is not None
        for expected in (stale.token, None):
            with pytest.raises(ConflictError):
                secrets.set(KEY, "new", expected=expected)
        with pytest.raises(ConflictError):
            secrets.delete(KEY, expected=stale.token)
        token = secrets.set(OTHER, "newer")
        secrets.set(OTHER, "newest", expected=token)
        session.commit()
    assert stored_in(pair.writer) == under_v1({KEY: "current", OTHER: "newest"})


def test_a_registry_of_routing_sessions_routes(pair: Pair, engines: tuple[Engine, Engine]) -> None:
    writer, reader = engines
    registry = scoped_session(sessionmaker(class_=RoutingSession, writer=writer, reader=reader))
    secrets = LucentSecrets(registry)
    secrets.set(KEY, "new")
    assert secrets.get_many([KEY]) == {KEY: "stale"}
    registry.commit()
    registry.remove()
    assert stored_in(pair.writer) == under_v1({**STORED, KEY: "new"})


@pytest.mark.parametrize("driver", ASYNC_DRIVERS)
@pytest.mark.parametrize("name", WRITES)
def test_an_async_session_over_a_routing_session_routes(
    pairs: Callable[[str], Pair], driver: str, name: str
) -> None:
    write, expected = WRITES[name]
    kind, drivername = ASYNC_DRIVERS[driver]
    pair = pairs(kind)

    async def main() -> list[str]:
        writer, reader = (create_async_engine(with_driver(url, drivername)) for url in pair)
        asked = record(reader.sync_engine)
        async with AsyncSession(
            sync_session_class=RoutingSession, writer=writer.sync_engine, reader=reader.sync_engine
        ) as session:
            await write(AsyncLucentSecrets(session))
            await session.commit()
            written = list(asked)
            assert await AsyncLucentSecrets(session).require(KEY) == "stale"
        await writer.dispose()
        await reader.dispose()
        return written

    assert asyncio.run(main()) == []
    assert stored_in(pair.writer) == expected
    assert stored_in(pair.reader) == under_v1(STALE)
