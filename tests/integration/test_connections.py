"""Connections that are cut, refused, idle for too long, or come from a pool that is dead."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import JSON, URL, Engine, create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

from sqlalchemy_lucent import (
    Keyring,
    RotationError,
    aretire_check,
    arotate,
    astatus,
    averify,
    retire_check,
    rotate,
    set_default_keyring,
    status,
    verify,
)
from sqlalchemy_lucent._database.connection import back_off
from sqlalchemy_lucent.migrations import (
    decrypt_column,
    encrypt_column,
    rebind_encrypted_column,
    rotate_encrypted_column,
)
from sqlalchemy_lucent.rotation import needs_rotation
from tests.conftest import LONG, Databases
from tests.databases import SYNC_DRIVERS, drop_everything, with_driver
from tests.integration.workers import contents, fill, ledger
from tests.proxies import Proxy, haproxy

DRIVERS = {
    "psycopg": ("postgresql", "postgresql+psycopg"),
    "asyncpg": ("postgresql", "postgresql+asyncpg"),
    "psycopg_async": ("postgresql", "postgresql+psycopg_async"),
    "pymysql": ("mysql", "mysql+pymysql"),
    "asyncmy": ("mysql", "mysql+asyncmy"),
}


def test_the_waits_between_attempts_grow_to_4_seconds_and_no_further() -> None:
    assert [back_off(attempt) for attempt in (0, 1, 6, 7, 100_000)] == [0.05, 0.1, 3.2, 4.0, 4.0]


def check(bind: Engine, version: str = "v9", settle: float = 0.0, **_: Any) -> bool:
    retire_check(bind, version, ledger, settle=settle)
    return True


WORKS: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "rotate": (
        lambda bind, **options: rotate(bind, ledger, **options).ok,
        lambda bind, **options: arotate(bind, ledger, **options),
    ),
    "status": (
        lambda bind, **_: len(status(bind, ledger).rows) >= 2,
        lambda bind, **_: astatus(bind, ledger),
    ),
    "verify": (
        lambda bind, **options: verify(bind, ledger, **options).ok,
        lambda bind, **options: averify(bind, ledger, **options),
    ),
    "retire_check": (
        check,
        lambda bind, version="v9", settle=0.0, **_: aretire_check(
            bind, version, ledger, settle=settle
        ),
    ),
    "needs_rotation": (
        lambda bind, **options: needs_rotation(bind, ledger, **options) in (True, False),
        None,
    ),
}
"""Each says whether it succeeded; and the same over an async engine."""


@pytest.fixture(params=list(DRIVERS))
def own_url(request: pytest.FixtureRequest, databases: Databases) -> Iterator[URL]:
    """The URL of an empty database on a server, with each driver in turn."""
    kind, driver = DRIVERS[request.param]
    url = databases.url(kind)
    yield with_driver(url, driver)
    engine = create_engine(url)
    drop_everything(engine)
    engine.dispose()


@pytest.fixture
def direct(own_url: URL) -> Iterator[Engine]:
    """An ordinary engine over the same database, with the table of the workers filled."""
    name = own_url.get_backend_name()
    engine = create_engine(own_url.set(drivername=SYNC_DRIVERS[name]))
    fill(engine, 12)
    yield engine
    engine.dispose()


@pytest.fixture
def proxy(own_url: URL) -> Iterator[Proxy]:
    with Proxy(own_url) as proxy:
        yield proxy


def is_async(url: URL) -> bool:
    return url.drivername not in SYNC_DRIVERS.values()


def run(name: str, url: URL, **options: Any) -> bool:
    """Do one of the works over a new engine of `url`; say whether it succeeded."""
    work, work_in_async = WORKS[name]
    if not is_async(url):
        engine = create_engine(url)
        try:
            return bool(work(engine, **options))
        finally:
            engine.dispose()

    async def main() -> bool:
        assert work_in_async is not None
        engine = create_async_engine(url)
        try:
            result = await work_in_async(engine, **options)
            return bool(getattr(result, "ok", True))
        finally:
            await engine.dispose()

    return asyncio.run(main())


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["rotate", "verify"])
def test_a_connection_that_is_cut_at_any_round_trip_is_replaced(
    direct: Engine, proxy: Proxy, promoted: Keyring, name: str
) -> None:
    primaries = [promoted, promoted.with_primary("v1")]
    assert run(name, proxy.url, keyring=promoted)
    answers = proxy.answers[1]
    step = 1 if LONG else 4
    for number in range(1, answers + 1, step):
        proxy.begin({(1, number)})
        assert run(name, proxy.url, keyring=primaries[number % 2]), number
    assert len(contents(direct, promoted)) == 12


# Connecting is the same for all that one does: each with each driver is for `make test-long`.
EACH_ONCE = [*((driver, "rotate") for driver in DRIVERS), *(("psycopg", name) for name in WORKS)]
PAIRS = list(itertools.product(DRIVERS, WORKS)) if LONG else sorted(set(EACH_ONCE))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("own_url, name", PAIRS, indirect=["own_url"])
def test_three_connections_that_are_cut_while_they_are_set_up_are_replaced(
    direct: Engine, proxy: Proxy, promoted: Keyring, name: str
) -> None:
    if WORKS[name][1] is None and is_async(proxy.url):
        pytest.skip(f"{name} is for ordinary engines only")
    set_default_keyring(promoted.adding("v9", bytes(range(64, 96))))
    for number in (1, 3, 5, 7, 9) if LONG else (1, 5, 9):
        proxy.begin({(connection, number) for connection in (1, 2, 3)})
        assert run(name, proxy.url, keyring=promoted), number
        assert proxy.connections == 4


@pytest.mark.parametrize(
    "own_url, name",
    # A status tries for seconds, as the others do.
    [*((driver, "rotate") for driver in DRIVERS), ("psycopg", "status")],
    indirect=["own_url"],
)
def test_a_server_that_is_not_there_is_told_in_our_words(
    own_url: URL, promoted: Keyring, name: str
) -> None:
    with Proxy(own_url) as gone:
        nowhere = gone.url
    options = {"retries": 2} if name == "rotate" else {}
    with pytest.raises(RotationError, match="the database ended") as caught:
        run(name, nowhere, keyring=promoted, **options)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


@pytest.mark.parametrize("name", list(WORKS))
@pytest.mark.parametrize("own_url", ["psycopg", "pymysql"], indirect=True)
def test_a_pool_of_dead_connections_is_no_hindrance(
    direct: Engine, proxy: Proxy, promoted: Keyring, name: str
) -> None:
    set_default_keyring(promoted.adding("v9", bytes(range(64, 96))))
    pooled = create_engine(proxy.url, pool_size=20)  # more than there are retries
    connections = [pooled.connect() for _ in range(20)]
    for connection in connections:
        connection.close()
    proxy.cut_all()
    assert WORKS[name][0](pooled, keyring=promoted)
    pooled.dispose()


def test_a_connection_that_the_server_gave_up_is_replaced(
    databases: Databases, promoted: Keyring
) -> None:
    url = databases.url("mysql")
    engine = create_engine(url, connect_args={"init_command": "SET SESSION wait_timeout = 1"})
    fill(engine, 5)
    time.sleep(1.5)
    report = rotate(engine, ledger, keyring=promoted)
    assert (report.ok, report.rotated) == (True, 10)
    drop_everything(engine)
    engine.dispose()


def test_a_balancer_that_cuts_idle_connections_does_not_end_a_check(
    direct: Engine, own_url: URL, promoted: Keyring
) -> None:
    assert rotate(direct, ledger, keyring=promoted).ok
    set_default_keyring(promoted)
    with haproxy(own_url, idle=0.2) as url:
        assert run("retire_check", url, version="v1", settle=0.5)
        assert run("rotate", url, keyring=promoted.with_primary("v1"), batch_size=12, pause=0.5)


def test_a_wrong_password_is_told_at_once(databases: Databases) -> None:
    url = databases.url("mysql").set(username="nobody", password="hunter2")
    engine = create_engine(url)
    with pytest.raises(
        RotationError, match=r"denied.*Another run would end like this one"
    ) as caught:
        status(engine, ledger)
    assert "hunter2" not in str(caught.value)
    engine.dispose()


@pytest.mark.parametrize("own_url", ["psycopg", "pymysql"], indirect=True)
def test_a_pool_without_a_free_connection_is_told(direct: Engine, promoted: Keyring) -> None:
    small = create_engine(direct.url, pool_size=1, max_overflow=0, pool_timeout=0.1)
    with small.connect():
        for name in ("rotate", "status"):
            with pytest.raises(RotationError, match=r"QueuePool limit.*an engine of its own"):
                WORKS[name][0](small, keyring=promoted)
    assert WORKS["rotate"][0](small, keyring=promoted)
    small.dispose()


# -- operations ------------------------------------------------------------------------------------

OPERATIONS: dict[str, Callable[[Operations], object]] = {
    "rotate": lambda operations: rotate_encrypted_column("ledger", "free", operations=operations),
    "rebind": lambda operations: rebind_encrypted_column(
        "ledger", "free", from_context="ledger.old", operations=operations
    ),
    "encrypt": lambda operations: encrypt_column(
        "ledger", "plain", existing_type=JSON(), operations=operations
    ),
    "decrypt": lambda operations: decrypt_column(
        "ledger", "free", existing_type=JSON(), operations=operations
    ),
}


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("own_url", ["psycopg", "pymysql"], indirect=True)
def test_an_operation_whose_connection_is_cut_raises_an_error_of_ours(
    direct: Engine, proxy: Proxy, promoted: Keyring, name: str
) -> None:
    set_default_keyring(promoted)
    with direct.begin() as connection:
        connection.execute(text("ALTER TABLE ledger ADD COLUMN plain JSON"))
        connection.execute(text("UPDATE ledger SET plain = '{}'"))
    engine = create_engine(proxy.url)
    for number in range(8, 60, 3 if LONG else 6):
        engine.dispose()
        connection = engine.connect()
        proxy.begin({(0, 0)})
        proxy.cuts = {(1, number)}
        proxy.answers.clear()
        operations = Operations(MigrationContext.configure(connection))
        raised: Exception | None = None
        try:
            OPERATIONS[name](operations)
        except Exception as error:
            raised = error
        with suppress(Exception):  # SQLAlchemy lets the driver's own through here
            connection.close()
        if raised is None:
            break  # there are fewer round trips
        assert isinstance(raised, RotationError), number
        assert "the database" in str(raised)
        assert (raised.__cause__, raised.__context__) == (None, None)
    engine.dispose()
