"""Many callers at once, on every database: threads and tasks, each with its own transaction."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConflictError,
    Keyring,
    LucentBase,
    LucentSecrets,
    SecretKey,
)
from tests.databases import drop_everything
from tests.secret_tables import KEY

CALLERS = 16
MYSQL_DEADLOCK = 1213


def options(url: URL) -> dict[str, Any]:
    """A writer of SQLite waits for the one before it, for up to a minute."""
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": 60}, "pool_size": CALLERS}
    return {"pool_size": CALLERS}


@pytest.fixture
def crowded(url: URL) -> Iterator[Engine]:
    engine = create_engine(url, **options(url))
    LucentBase.metadata.create_all(engine)
    yield engine
    drop_everything(engine)
    engine.dispose()


def at_once(work: Callable[[int], None]) -> list[BaseException]:
    """Run `work` in 16 threads that start together; return what they raised."""
    barrier = threading.Barrier(CALLERS)
    raised: list[BaseException] = []

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def stored(engine: Engine) -> dict[SecretKey, Any]:
    with Session(engine) as session:
        secrets = LucentSecrets(session)
        return secrets.get_many(info.key for info in secrets.list())


def test_threads_that_set_the_same_new_key_leave_the_last_committed_value(
    crowded: Engine,
) -> None:
    for round_ in range(5):
        key = SecretKey("tenant", "t1", "stripe", f"key{round_}")
        committed: list[int] = []

        def work(number: int, key: SecretKey = key, committed: list[int] = committed) -> None:
            with Session(crowded) as session:
                # The row is locked from the write to the commit, so this order is theirs.
                event.listen(session, "before_commit", lambda _: committed.append(number))
                LucentSecrets(session).set(key, {"by": number})
                session.commit()

        assert at_once(work) == []
        assert len(committed) == CALLERS
        assert stored(crowded)[key] == {"by": committed[-1]}
    assert len(stored(crowded)) == 5


def test_threads_of_which_half_roll_back_leave_a_committed_value(crowded: Engine) -> None:
    def work(number: int) -> None:
        while True:
            with Session(crowded) as session:
                try:
                    LucentSecrets(session).set(KEY, number)
                except OperationalError as error:
                    # The waiting writers of a row that is rolled back are a deadlock to InnoDB.
                    if error.orig is None or error.orig.args[0] != MYSQL_DEADLOCK:
                        raise
                    continue
                session.commit() if number % 2 else session.rollback()
                return

    assert at_once(work) == []
    assert stored(crowded)[KEY] % 2 == 1


def test_one_thread_of_many_creates_a_secret_that_must_not_exist(crowded: Engine) -> None:
    def work(number: int) -> None:
        with Session(crowded) as session:
            LucentSecrets(session).set(KEY, number, expected=None)
            session.commit()

    raised = at_once(work)
    assert [type(error) for error in raised] == [ConflictError] * (CALLERS - 1)
    assert len(stored(crowded)) == 1


def test_increments_by_compare_and_swap_are_never_lost(crowded: Engine) -> None:
    with Session(crowded) as session:
        LucentSecrets(session).set(KEY, 0)
        session.commit()

    def work(number: int) -> None:
        while True:
            with Session(crowded) as session:
                secrets = LucentSecrets(session)
                info = secrets.info(KEY)
                assert info is not None
                assert info.token is not None
                value = secrets.require(KEY)
                session.rollback()  # so that what is compared is what is committed by then
                try:
                    secrets.set(KEY, value + 1, expected=info.token)
                except ConflictError:
                    continue
                session.commit()
                return

    assert at_once(work) == []
    assert stored(crowded)[KEY] == CALLERS


def test_threads_that_set_many_of_the_same_keys_in_any_order(crowded: Engine) -> None:
    keys = [SecretKey("tenant", "t1", "stripe", f"key{n}") for n in range(50)]

    def work(number: int) -> None:
        order = keys[number:] + keys[:number]
        with Session(crowded) as session:
            LucentSecrets(session).set_many(dict.fromkeys(order, number))
            session.commit()

    assert at_once(work) == []
    # One caller's values, all of them: the last to commit has written every row.
    assert len(set(stored(crowded).values())) == 1
    assert len(stored(crowded)) == len(keys)


def test_rotations_and_writers_at_once_lose_no_write(crowded: Engine, promoted: Keyring) -> None:
    with Session(crowded) as session:
        LucentSecrets(session).set(KEY, "old")
        session.commit()

    def work(number: int) -> None:
        with Session(crowded) as session:
            secrets = LucentSecrets(session, keyring=promoted)
            if number == 0:
                secrets.set(KEY, "new")
                session.commit()
                return
            while True:
                try:
                    secrets.rotate(KEY)
                except ConflictError:
                    session.rollback()
                    continue
                session.commit()
                return

    assert at_once(work) == []
    with Session(crowded) as session:
        assert LucentSecrets(session, keyring=promoted).require(KEY) == "new"


# -- asyncio ---------------------------------------------------------------------------------------


@pytest.fixture
def run_crowded(async_url: URL) -> Callable[[Callable[[AsyncEngine], Awaitable[None]]], None]:
    def run(work: Callable[[AsyncEngine], Awaitable[None]]) -> None:
        async def main() -> None:
            engine = create_async_engine(async_url, **options(async_url))
            try:
                async with engine.begin() as connection:
                    await connection.run_sync(LucentBase.metadata.create_all)
                await work(engine)
            finally:
                await engine.dispose()

        asyncio.run(main())

    return run


async def stored_async(engine: AsyncEngine) -> dict[SecretKey, Any]:
    async with AsyncSession(engine) as session:
        secrets = AsyncLucentSecrets(session)
        return await secrets.get_many([info.key for info in await secrets.list()])


def test_tasks_that_set_the_same_new_key_leave_the_last_committed_value(
    run_crowded: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        committed: list[int] = []

        async def one(number: int) -> None:
            async with AsyncSession(engine) as session:
                await AsyncLucentSecrets(session).set(KEY, {"by": number})
                committed.append(number)
                await session.commit()

        await asyncio.gather(*map(one, range(CALLERS)))
        assert len(committed) == CALLERS
        assert await stored_async(engine) == {KEY: {"by": committed[-1]}}

    run_crowded(work)


def test_one_task_of_many_creates_a_secret_that_must_not_exist(
    run_crowded: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async def one(number: int) -> None:
            async with AsyncSession(engine) as session:
                await AsyncLucentSecrets(session).set(KEY, number, expected=None)
                await session.commit()

        raised = await asyncio.gather(*map(one, range(CALLERS)), return_exceptions=True)
        refused = [error for error in raised if error is not None]
        assert [type(error) for error in refused] == [ConflictError] * (CALLERS - 1)
        assert len(await stored_async(engine)) == 1

    run_crowded(work)


@pytest.mark.parametrize("url", ["mysql"], indirect=True)
@pytest.mark.parametrize("keep", [None, 2])
def test_a_deadlock_of_audited_writers_is_raised_as_one(crowded: Engine, keep: int | None) -> None:
    keys = KEY, SecretKey("user", "u2", "google", "oauth")
    barrier = threading.Barrier(len(keys))
    codes: list[int] = []

    def write_both(first: SecretKey, second: SecretKey) -> None:
        with Session(crowded) as session:
            secrets = LucentSecrets(session, keep=keep, on_access=lambda *_: None)
            secrets.set(first, 2)
            barrier.wait()
            try:
                secrets.delete(second)
            except OperationalError as error:
                codes.append(error.orig.args[0] if error.orig else 0)
            else:
                session.commit()

    with Session(crowded) as session:
        LucentSecrets(session, keep=keep).set_many(dict.fromkeys(keys, 1))
        session.commit()
    threads = [threading.Thread(target=write_both, args=each) for each in (keys, keys[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [MYSQL_DEADLOCK]
