"""Connections that are cut, refused, idle for too long, or come from a pool that is dead."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine
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
    status,
    verify,
)
from sqlalchemy_lucent.rotation import needs_rotation
from tests.conftest import Databases
from tests.databases import SYNC_DRIVERS, drop_everything
from tests.integration.workers import contents, fill, ledger
from tests.proxies import Proxy, haproxy

DRIVERS = {
    "psycopg": ("postgresql", "postgresql+psycopg"),
    "asyncpg": ("postgresql", "postgresql+asyncpg"),
    "psycopg_async": ("postgresql", "postgresql+psycopg_async"),
    "pymysql": ("mysql", "mysql+pymysql"),
    "asyncmy": ("mysql", "mysql+asyncmy"),
}
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
        lambda bind, **_: retire_check(bind, "v2", ledger) is None,
        lambda bind, **_: aretire_check(bind, "v2", ledger),
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
    yield url.set(drivername=driver)
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


def run(name: str, url: URL, **options: Any) -> bool:
    """Do one of the works over a new engine of `url`; say whether it succeeded."""
    work, work_in_async = WORKS[name]
    if url.drivername in ("postgresql+psycopg", "mysql+pymysql"):
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


def skip_without_async(name: str, url: URL) -> None:
    if WORKS[name][1] is None and url.drivername not in ("postgresql+psycopg", "mysql+pymysql"):
        pytest.skip(f"{name} is for ordinary engines only")


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORKS))
def test_a_connection_that_is_cut_at_any_round_trip_is_replaced(
    direct: Engine, proxy: Proxy, keyring: Keyring, promoted: Keyring, name: str
) -> None:
    skip_without_async(name, proxy.url)
    primaries = [promoted, promoted.with_primary("v1")]
    assert run(name, proxy.url, keyring=promoted)
    answers = proxy.answers[1]
    for number in range(1, answers + 1):
        proxy.begin({(1, number)})
        turned = primaries[number % 2]
        assert run(name, proxy.url, keyring=turned), number
    assert len(contents(direct, promoted)) == 12


@pytest.mark.slow
@pytest.mark.parametrize("name", list(WORKS))
def test_three_connections_that_are_cut_while_they_are_set_up_are_replaced(
    direct: Engine, proxy: Proxy, promoted: Keyring, name: str
) -> None:
    skip_without_async(name, proxy.url)
    for number in range(1, 12):
        proxy.begin({(connection, number) for connection in (1, 2, 3)})
        assert run(name, proxy.url, keyring=promoted), number
        assert proxy.connections == 4


def test_a_server_that_is_not_there_is_told_in_our_words(
    own_url: URL, promoted: Keyring
) -> None:
    with Proxy(own_url) as gone:
        nowhere = gone.url
    for name in WORKS:
        if WORKS[name][1] is None and "asyn" in own_url.drivername:
            continue
        options = {"retries": 2} if name == "rotate" else {}
        with pytest.raises(RotationError, match="the database ended") as caught:
            run(name, nowhere, keyring=promoted, **options)
        assert (caught.value.__cause__, caught.value.__context__) == (None, None)
