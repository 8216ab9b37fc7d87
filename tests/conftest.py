"""Fixtures of the whole suite: databases, engines and keyrings."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, settings
from sqlalchemy import URL, Engine, create_engine
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from sqlalchemy_lucent import Keyring, set_default_keyring
from tests.databases import (
    ASYNC_DRIVERS,
    SYNC_DRIVERS,
    drop_everything,
    own_database,
    with_driver,
)

T = TypeVar("T")

# No test may fail because the machine is busy.
settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

# For `make mutants`, which wants to know that a test fails and not of the smallest example.
settings.register_profile(
    "mutants", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)

if "LUCENT_TEST_MUTANTS" in os.environ:
    # mutmut puts two calls of its own before each call, also where a function calls itself.
    sys.setrecursionlimit(3 * sys.getrecursionlimit())

# `make test-long` does more of what takes long.
LONG = os.environ.get("LUCENT_TEST_LONG") == "1"

KEY_1 = bytes(range(32))
KEY_2 = bytes(range(32, 64))
KEY_3 = bytes(range(64, 96))


@pytest.fixture
def keyring() -> Keyring:
    """A keyring of one key, ``v1``."""
    return Keyring({"v1": KEY_1})


@pytest.fixture
def promoted(keyring: Keyring) -> Keyring:
    """The same keyring with a second key, ``v2``, as primary."""
    return keyring.adding("v2", KEY_2).with_primary("v2")


@pytest.fixture(autouse=True)
def default_keyring_is_v1(keyring: Keyring) -> Iterator[None]:
    set_default_keyring(keyring)
    yield
    set_default_keyring(None)


def pytest_collection_finish() -> None:
    """Have the garbage collector leave alone what stays: thousands of tests, and modules."""
    gc.collect()
    gc.freeze()


class Databases:
    """The databases of this test process, each opened when a test first asks for it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._stack = ExitStack()
        self._urls: dict[str, URL] = {}

    def url(self, kind: str) -> URL:
        if kind not in self._urls:
            self._urls[kind] = self._stack.enter_context(own_database(kind, self._directory))
        return self._urls[kind]

    def close(self) -> None:
        self._stack.close()


@pytest.fixture(scope="session")
def databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    memory = Path("/dev/shm")  # SQLite waits for the disk at each commit
    if not os.access(memory, os.W_OK):
        memory = tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="lucent-", dir=memory) as directory:
        opened = Databases(Path(directory))
        yield opened
        opened.close()


@pytest.fixture(params=list(SYNC_DRIVERS))
def url(request: pytest.FixtureRequest, databases: Databases) -> URL:
    """The URL of an empty database, on each kind of database in turn."""
    return databases.url(request.param)


@pytest.fixture
def engine(url: URL) -> Iterator[Engine]:
    """An engine over an empty database, on each kind of database in turn."""
    engine = create_engine(url)
    yield engine
    drop_everything(engine)
    engine.dispose()


@pytest.fixture(params=list(ASYNC_DRIVERS))
def async_url(request: pytest.FixtureRequest, databases: Databases) -> Iterator[URL]:
    """The URL of an empty database with an async driver, for each async driver in turn."""
    kind, driver = ASYNC_DRIVERS[request.param]
    url = databases.url(kind)
    yield with_driver(url, driver)
    sync_engine = create_engine(url)
    drop_everything(sync_engine)
    sync_engine.dispose()


@pytest.fixture
def run_async(async_url: URL) -> Callable[[Callable[[AsyncEngine], Awaitable[T]]], T]:
    """Run a coroutine function over an async engine, for each async driver in turn."""

    def run(work: Callable[[AsyncEngine], Awaitable[Any]]) -> Any:
        async def main() -> Any:
            engine = create_async_engine(async_url)
            try:
                return await work(engine)
            finally:
                await engine.dispose()

        return asyncio.run(main())

    return run
