"""The asynchronous repository, on every async driver: each method, once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConflictError,
    InvalidKeyError,
    Keyring,
    LucentBase,
    LucentSecret,
    SchemaMismatchError,
    SecretKey,
    SecretNotFoundError,
    SerializationError,
)
from tests.secret_tables import KEY, OTHER

RunAsync = Callable[[Callable[[AsyncEngine], Awaitable[None]]], None]
Work = Callable[[AsyncSession, AsyncLucentSecrets], Awaitable[None]]

THIRD = SecretKey("tenant", "t3", "stripe", "apiKey")


@pytest.fixture
def run(run_async: RunAsync) -> Callable[[Work], None]:
    def run_work(work: Work) -> None:
        async def main(engine: AsyncEngine) -> None:
            async with engine.begin() as connection:
                await connection.run_sync(LucentBase.metadata.create_all)
            async with AsyncSession(engine) as session:
                await work(session, AsyncLucentSecrets(session))

        run_async(main)

    return run_work


@dataclass
class Account:
    email: str


def test_one_secret(run: Callable[[Work], None]) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        assert await secrets.get(KEY) is None
        token = await secrets.set(KEY, {"email": "a@b"})
        assert await secrets.get(KEY) == await secrets.require(str(KEY)) == {"email": "a@b"}
        assert await secrets.require(KEY, as_=Account) == Account("a@b")
        assert await secrets.exists(KEY)
        info = await secrets.info(KEY)
        assert info is not None
        assert (info.key, info.key_version, info.token) == (KEY, "v1", token)
        assert await secrets.delete(KEY)
        assert not await secrets.delete(KEY)

    run(work)


def test_compare_and_swap(run: Callable[[Work], None]) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        first = await secrets.set(KEY, 1, expected=None)
        with pytest.raises(ConflictError):
            await secrets.set(KEY, 2, expected=None)
        second = await secrets.set(KEY, 3, expected=first)
        with pytest.raises(ConflictError):
            await secrets.set(KEY, 4, expected=first)
        with pytest.raises(ConflictError):
            await secrets.delete(KEY, expected=first)
        assert await secrets.require(KEY) == 3
        assert await secrets.delete(KEY, expected=second)

    run(work)


def test_many_secrets(run: Callable[[Work], None], promoted: Keyring) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        keys = [SecretKey("tenant", f"t{n % 2}", "p", f"n{n:03}") for n in range(600)]
        await secrets.set_many({key: key.name for key in keys})
        assert await secrets.get_many(keys) == {key: key.name for key in keys}
        assert await secrets.count(scope="tenant") == 600
        first = await secrets.list(scope="tenant", owner_id="t1", limit=200)
        rest = await secrets.list(scope="tenant", owner_id="t1", after=first[-1].key)
        assert [info.key for info in first + rest] == sorted(keys)[300:]
        assert await secrets.rotate_many(keys, promoted) == dict.fromkeys(keys, "v2")
        promoted_secrets = AsyncLucentSecrets(session, keyring=promoted)
        assert await promoted_secrets.get_many(keys) == {key: key.name for key in keys}
        assert await secrets.delete_many(scope="tenant", owner_id="t1") == 300
        assert await secrets.count() == 300

    run(work)


def test_copy_move_and_rotate(run: Callable[[Work], None], promoted: Keyring) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        await secrets.set(KEY, {"n": 1})
        await secrets.copy(KEY, OTHER)
        await secrets.move(KEY, THIRD)
        assert await secrets.get_many([KEY, OTHER, THIRD]) == {OTHER: {"n": 1}, THIRD: {"n": 1}}
        with pytest.raises(ConflictError):
            await secrets.move(OTHER, THIRD)
        assert await secrets.rotate(OTHER, promoted) == "v2"
        assert [info.key_version for info in await secrets.list()] == ["v2", "v1"]

    run(work)


def test_errors_are_those_of_the_synchronous_repository(run: Callable[[Work], None]) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        with pytest.raises(SecretNotFoundError):
            await secrets.require(KEY)
        with pytest.raises(InvalidKeyError):
            await secrets.list(name="n")
        with pytest.raises(SerializationError):
            await secrets.set(KEY, object())
        await secrets.set(KEY, {"email": 7})
        with pytest.raises(SchemaMismatchError):
            await secrets.require(KEY, as_=Account)

    run(work)


def test_nothing_is_committed_and_savepoints_hold(run: Callable[[Work], None]) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        await secrets.set(KEY, 1)
        savepoint = await session.begin_nested()
        await secrets.set(KEY, 2)
        await secrets.set(OTHER, 2)
        await savepoint.rollback()
        assert await secrets.get_many([KEY, OTHER]) == {KEY: 1}
        await session.rollback()
        assert await secrets.list() == []

    run(work)


def test_loaded_objects_of_the_session_follow(run: Callable[[Work], None]) -> None:
    async def work(session: AsyncSession, secrets: AsyncLucentSecrets) -> None:
        await secrets.set(KEY, 1)
        loaded = await session.get_one(LucentSecret, tuple(KEY))
        assert loaded.payload == 1
        await secrets.set(KEY, 2)
        await session.refresh(loaded)
        assert loaded.payload == 2

    run(work)
