"""Secrets that expire are renewed once, by one caller for all, and no answer is lost."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

import anyio
import pytest
import sqlalchemy as sa
from sqlalchemy import URL, Engine, create_engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Session

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    AsyncRenewals,
    ConfigurationError,
    DecryptionError,
    Keyring,
    LucentBase,
    LucentError,
    LucentSecrets,
    NeedsReauthorizationError,
    RenewalAttempt,
    RenewalError,
    Renewals,
    RenewalTimeoutError,
    SecretAccess,
    SecretKey,
    SecretNotFoundError,
    SerializationError,
)
from sqlalchemy_lucent.models import LucentSecretMixin, with_lifecycle
from tests.conftest import KEY_2, LONG, Databases
from tests.databases import drop_everything, with_driver
from tests.frames import texts_in_frames
from tests.integration.test_poolers import RECOMMENDED
from tests.integration.workers import reap, start
from tests.integration.workers.renewer import STATES, expire, renewed
from tests.oauth import OAuthError, Server, oauth_server
from tests.proxies import Proxy, pgbouncer

KEY = SecretKey("user", "u1", "google", "oauth")
OTHER = SecretKey("user", "u2", "google", "oauth")
HOUR = timedelta(hours=1)


@pytest.fixture(scope="module")
def oauth() -> Iterator[Server]:
    with oauth_server() as server:
        yield server


@pytest.fixture
def tables(engine: Engine) -> Engine:
    """An engine over a database with the tables, on each kind of database in turn."""
    LucentBase.metadata.create_all(engine)
    return engine


@pytest.fixture
def sqlite(databases: Databases) -> Iterator[Engine]:
    """SQLite alone, for what the database has no part in."""
    engine = create_engine(databases.url("sqlite"))
    LucentBase.metadata.create_all(engine)
    yield engine
    drop_everything(engine)
    engine.dispose()


class Provider:
    """The refresh function of a test: answers as it is told, and keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[Any, RenewalAttempt]] = []

    def __call__(self, value: Any, attempt: RenewalAttempt) -> Any:
        self.asked.append((value, attempt))
        answer = self.answers.pop(0)
        if callable(answer):
            answer = answer()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    @property
    def uncertain(self) -> list[bool]:
        return [attempt.uncertain for _, attempt in self.asked]


class Down(Exception):
    """The provider cannot be reached."""


def store(engine: Engine, value: Any, *, left: float = 30, key: SecretKey = KEY) -> None:
    """Store a value that expires in so many seconds, maybe less than 0."""
    with Session(engine) as session:
        LucentSecrets(session).set(key, value, expires_at=datetime.now(UTC) + HOUR)
        session.commit()
    expire(engine, key, left)


def stored(engine: Engine, key: SecretKey = KEY, **which: Any) -> Any:
    with Session(engine) as session:
        return LucentSecrets(session).require(key, **which)


def stages(engine: Engine, key: SecretKey = KEY) -> dict[int | None, str | None]:
    with Session(engine) as session:
        return {each.number: each.stage for each in LucentSecrets(session).versions(key)}


def state(engine: Engine) -> sa.Row[Any]:
    with engine.connect() as connection:
        return connection.execute(sa.select(STATES)).one()


def end_lease(engine: Engine) -> None:
    """Have the lease be over, as after a long time."""
    past = datetime.now(UTC) - timedelta(seconds=1)
    with engine.begin() as connection:
        statement = sa.update(STATES).where(STATES.c.lease_until.is_not(None))
        connection.execute(statement.values(lease_until=past))


def is_free(engine: Engine) -> bool:
    return state(engine).lease_until is None


@pytest.fixture
def statements(tables: Engine) -> list[str]:
    """The statements that the engine executes."""
    executed: list[str] = []
    event.listen(
        tables, "before_cursor_execute", lambda c, cursor, text, *rest: executed.append(text)
    )
    return executed


# -- not due, due ----------------------------------------------------------------------------------


def test_a_value_that_is_not_due_costs_one_select(tables: Engine, statements: list[str]) -> None:
    store(tables, {"access": "a1"}, left=3600)
    renewals = Renewals(tables)
    statements.clear()
    assert renewals.fresh(KEY, Provider()) == {"access": "a1"}
    assert [text.split()[0] for text in statements] == ["SELECT"]


def test_a_value_that_is_due_is_renewed_and_the_one_before_is_kept(tables: Engine) -> None:
    store(tables, {"access": "a1"}, left=59)
    provider = Provider(({"access": "a2"}, timedelta(minutes=30)))
    renewals = Renewals(tables)
    assert renewals.fresh(str(KEY), provider) == {"access": "a2"}
    assert renewals.fresh(KEY, provider) == {"access": "a2"}  # whose provider has no other answer
    assert provider.asked == [({"access": "a1"}, RenewalAttempt(KEY, 1, False))]
    assert stored(tables) == {"access": "a2"}
    assert stored(tables, stage="previous") == {"access": "a1"}
    assert stages(tables) == {2: "current", 1: "previous"}
    left = state(tables).expires_at - datetime.now(UTC)
    assert timedelta(minutes=29) < left <= timedelta(minutes=31)
    assert is_free(tables)


def test_within_says_how_long_before_the_expiry_a_value_is_due(sqlite: Engine) -> None:
    store(sqlite, "a1", left=30)
    renewals = Renewals(sqlite)
    assert renewals.fresh(KEY, Provider(), within=20) == "a1"
    assert renewals.fresh(KEY, Provider(), within=0) == "a1"
    assert renewals.fresh(KEY, Provider(("a2", HOUR)), within=timedelta(seconds=40)) == "a2"


@pytest.mark.parametrize("expiry", [HOUR, None, datetime(2999, 1, 1, tzinfo=UTC)], ids=str)
def test_an_expiry_is_a_time_a_duration_or_never(tables: Engine, expiry: Any) -> None:
    store(tables, "a1")
    assert Renewals(tables).fresh(KEY, Provider(("a2", expiry))) == "a2"
    assert Renewals(tables).fresh(KEY, Provider()) == "a2"
    if not isinstance(expiry, timedelta):
        assert state(tables).expires_at == expiry


def test_a_value_that_a_plain_store_wrote_does_not_expire(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    with Session(tables) as session:
        LucentSecrets(session).set(KEY, "theirs")
        session.commit()
    assert Renewals(tables).fresh(KEY, Provider()) == "theirs"


def test_the_function_is_called_while_no_connection_is_held(tables: Engine) -> None:
    store(tables, "a1")
    held: list[int] = []

    def refresh(value: Any, attempt: RenewalAttempt) -> Any:
        held.append(tables.pool.checkedout())  # type: ignore[attr-defined]
        # Nothing is locked either.
        with Session(tables) as session:
            LucentSecrets(session).set(OTHER, value, expires_at=datetime.now(UTC) + HOUR)
            session.commit()
        return "a2", HOUR

    assert Renewals(tables).fresh(KEY, refresh) == "a2"
    assert held == [0]


def test_a_store_of_ones_own_model_keeps_as_many_versions_as_it_says(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    @with_lifecycle
    class Token(LucentSecretMixin, Base):
        __tablename__ = "app_tokens"

    Base.metadata.create_all(engine)
    with Session(engine) as session:
        secrets = LucentSecrets(session, model=Token, keep=2)
        secrets.set(KEY, 0, expires_at=datetime.now(UTC) + timedelta(seconds=5))
        session.commit()
    renewals = Renewals(engine, model=Token, keep=2)
    for number in range(1, 4):
        answer = number, timedelta(seconds=5)
        assert renewals.fresh(KEY, Provider(answer)) == number
    with Session(engine) as session:
        versions = LucentSecrets(session, model=Token, keep=2).versions(KEY)
    assert [each.number for each in versions] == [4, 3]


def test_a_keyring_of_its_own_opens_and_seals(tables: Engine) -> None:
    keyring = Keyring({"v2": KEY_2})
    with Session(tables) as session:
        secrets = LucentSecrets(session, keyring=keyring)
        secrets.set(KEY, "a1", expires_at=datetime.now(UTC) + timedelta(seconds=5))
        session.commit()
    assert Renewals(tables, keyring=keyring).fresh(KEY, Provider(("a2", HOUR))) == "a2"
    with Session(tables) as session:
        assert LucentSecrets(session, keyring=keyring).require(KEY) == "a2"


# -- many callers ----------------------------------------------------------------------------------

CALLERS = 64


def crowded(url: URL) -> dict[str, Any]:
    timeout = {"timeout": 60} if url.get_backend_name() == "sqlite" else {}
    return {"pool_size": 5, "max_overflow": 0, "connect_args": timeout}


def test_sixty_four_threads_share_five_connections_and_one_call(
    tables: Engine, oauth: Server
) -> None:
    grant, tokens = oauth.grant(delays=[0.3])
    store(tables, tokens, left=-1)
    engine = create_engine(tables.url, **crowded(tables.url))
    renewals = Renewals(engine)
    found: list[Any] = []

    def work() -> None:
        try:
            value = renewals.fresh(KEY, lambda value, _: renewed(oauth.url, value), wait=60)
            found.append(value["serial"])
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=work) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.dispose()
    assert found == [2] * CALLERS
    seen = oauth.seen(grant)
    assert (seen.calls, seen.invalid_grant, seen.revocations) == (1, 0, 0)


def run_on(url: URL, work: Callable[[AsyncEngine], Awaitable[Any]], **options: Any) -> Any:
    async def main() -> Any:
        engine = create_async_engine(url, **options)
        try:
            async with engine.begin() as connection:
                await connection.run_sync(LucentBase.metadata.create_all)
            return await work(engine)
        finally:
            await engine.dispose()

    return asyncio.run(main())


async def store_async(engine: AsyncEngine, value: Any, *, left: float = 30) -> None:
    async with AsyncSession(engine) as session:
        secrets = AsyncLucentSecrets(session)
        await secrets.set(KEY, value, expires_at=datetime.now(UTC) + timedelta(seconds=60))
        await session.commit()
    async with engine.begin() as connection:
        until = datetime.now(UTC) + timedelta(seconds=left)
        await connection.execute(sa.update(STATES).values(expires_at=until))


def test_sixty_four_tasks_share_five_connections_and_one_call(
    async_url: URL, oauth: Server
) -> None:
    grant, tokens = oauth.grant(delays=[0.2])

    async def work(engine: AsyncEngine) -> list[Any]:
        await store_async(engine, tokens, left=-1)
        renewals = AsyncRenewals(engine)

        async def refresh(value: Any, attempt: RenewalAttempt) -> Any:
            return await asyncio.to_thread(renewed, oauth.url, value)

        values = await asyncio.gather(
            *(renewals.fresh(KEY, refresh, wait=60) for _ in range(CALLERS))
        )
        return [value["serial"] for value in values]

    options = crowded(async_url)
    assert run_on(async_url, work, **options) == [2] * CALLERS
    seen = oauth.seen(grant)
    assert (seen.calls, seen.invalid_grant, seen.revocations) == (1, 0, 0)


# -- waiting ---------------------------------------------------------------------------------------


def hold(engine: Engine, **changed: Any) -> None:
    """Have another process hold the lease for a long time."""
    values = {"lease_number": 1, "lease_until": datetime.now(UTC) + HOUR, **changed}
    with engine.begin() as connection:
        connection.execute(sa.update(STATES).values(values))


@pytest.mark.parametrize("wait", [0, 0.1])
def test_who_waited_in_vain_gets_the_value_while_it_is_good(tables: Engine, wait: float) -> None:
    store(tables, "a1", left=30)
    hold(tables)
    assert Renewals(tables).fresh(KEY, Provider(), wait=wait) == "a1"


def test_who_waited_in_vain_for_an_expired_value_is_told(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    hold(tables)
    with pytest.raises(RenewalTimeoutError, match=str(KEY)):
        Renewals(tables).fresh(KEY, Provider(), wait=0.1)
    assert stored(tables) == "a1"


def test_who_waits_takes_a_new_value_although_it_is_due_at_once(tables: Engine) -> None:
    # Or each of those who wait would renew a token that lives shorter than `within`.
    store(tables, "a1", left=-1)
    reached, go_on = threading.Event(), threading.Event()

    def answer() -> Any:
        reached.set()
        go_on.wait(30)
        return "a2", timedelta(seconds=50)

    found: list[Any] = []
    first = Provider(answer)
    threads = [
        threading.Thread(target=lambda: found.append(Renewals(tables).fresh(KEY, first, wait=30))),
        threading.Thread(
            target=lambda: found.append(Renewals(tables).fresh(KEY, Provider(), wait=30))
        ),
    ]
    threads[0].start()
    reached.wait(30)
    threads[1].start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert found == ["a2", "a2"]


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])  # SQLite has one writer, and waits for it
def test_a_secret_that_is_locked_by_the_callers_own_transaction_blocks_nobody(
    databases: Databases, kind: str
) -> None:
    engine = create_engine(databases.url(kind))
    LucentBase.metadata.create_all(engine)
    store(engine, "a1", left=30)
    with Session(engine) as session:
        LucentSecrets(session).set(KEY, "uncommitted")
        assert Renewals(engine).fresh(KEY, Provider(), wait=0.1) == "a1"
    with Session(engine) as session:
        LucentSecrets(session).set(KEY, "x", expires_at=datetime.now(UTC) + HOUR)
        assert Renewals(engine).fresh(KEY, Provider(), wait=0.1) == "a1"
    drop_everything(engine)
    engine.dispose()


# -- answers that come late, and values that others store ------------------------------------------


def test_an_answer_that_comes_late_is_kept_and_the_next_holder_takes_it(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)
    second = Provider(Down())

    def slowly() -> Any:
        end_lease(tables)
        with pytest.raises(Down):
            renewals.fresh(KEY, second)
        return "a2", HOUR

    assert renewals.fresh(KEY, Provider(slowly)) == "a2"  # the caller has it anyway
    assert second.uncertain == [True]
    assert stored(tables) == "a1"
    assert stages(tables) == {2: "pending", 1: "current"}
    assert renewals.fresh(KEY, Provider()) == "a2"
    assert stored(tables) == "a2"
    assert stages(tables) == {3: "current", 1: "previous"}
    assert is_free(tables)


def test_a_late_answer_that_is_due_itself_is_what_the_next_holder_renews(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)

    def slowly() -> Any:
        end_lease(tables)
        with pytest.raises(Down):
            renewals.fresh(KEY, Provider(Down()))
        return "a2", timedelta(seconds=20)

    assert renewals.fresh(KEY, Provider(slowly)) == "a2"
    provider = Provider(("a3", HOUR))
    assert renewals.fresh(KEY, provider) == "a3"
    assert provider.asked == [("a2", RenewalAttempt(KEY, 3, False))]
    assert stages(tables) == {4: "current", 3: "previous", 1: None}


def test_a_late_answer_to_a_value_that_was_renewed_meanwhile_is_archived(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)

    def slowly() -> Any:
        end_lease(tables)
        assert renewals.fresh(KEY, Provider(("b2", HOUR))) == "b2"
        return "a2", HOUR

    assert renewals.fresh(KEY, Provider(slowly)) == "a2"
    assert stored(tables) == "b2"
    assert stored(tables, version=3) == "a2"
    assert renewals.fresh(KEY, Provider()) == "b2"


def test_an_answer_after_the_lease_that_nobody_took_counts(tables: Engine) -> None:
    store(tables, "a1", left=-1)

    def slowly() -> Any:
        end_lease(tables)
        return "a2", HOUR

    assert Renewals(tables).fresh(KEY, Provider(slowly)) == "a2"
    assert stored(tables) == "a2"
    assert is_free(tables)


@pytest.mark.parametrize("expires", [None, HOUR], ids=["plain", "expiring"])
def test_a_value_that_somebody_stores_meanwhile_stays(tables: Engine, expires: Any) -> None:
    store(tables, "a1", left=-1)

    def log_in_again() -> Any:
        with Session(tables) as session:
            at = None if expires is None else datetime.now(UTC) + expires
            LucentSecrets(session).set(KEY, "theirs", expires_at=at)
            session.commit()
        return "a2", HOUR

    assert Renewals(tables).fresh(KEY, Provider(log_in_again)) == "theirs"
    assert stored(tables) == "theirs"
    assert stored(tables, version=3) == "a2"
    assert is_free(tables)


def test_a_secret_that_is_deleted_meanwhile_stays_deleted(tables: Engine) -> None:
    store(tables, "a1", left=-1)

    def delete() -> Any:
        with Session(tables) as session:
            LucentSecrets(session).delete(KEY)
            session.commit()
        return "a2", HOUR

    assert Renewals(tables).fresh(KEY, Provider(delete)) == "a2"
    with pytest.raises(SecretNotFoundError):
        Renewals(tables).fresh(KEY, Provider())


def test_the_answer_for_a_secret_that_is_put_away_meanwhile_is_a_version_of_it(
    tables: Engine,
) -> None:
    store(tables, "a1", left=-1)

    def put_away() -> Any:
        with Session(tables) as session:
            LucentSecrets(session).delete(KEY, purge_after=HOUR)
            session.commit()
        return "a2", HOUR

    assert Renewals(tables).fresh(KEY, Provider(put_away)) == "a2"
    with Session(tables) as session:
        secrets = LucentSecrets(session)
        secrets.undelete(KEY)
        assert secrets.require(KEY, version=2) == "a2"
        secrets.restore(KEY, 2)
        session.commit()
    assert stored(tables) == "a2"


def test_a_provider_slower_than_the_lease_is_called_twice_and_loses_no_token(
    tables: Engine, oauth: Server
) -> None:
    grant, tokens = oauth.grant(delays=[1.5], on_reuse="refuse")
    store(tables, tokens, left=-1)
    found: list[Any] = []

    def work() -> None:
        value = Renewals(tables).fresh(
            KEY, lambda value, _: renewed(oauth.url, value), lease=1, wait=30
        )
        found.append(value["serial"])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen = oauth.seen(grant)
    assert found == [2] * len(threads)
    assert seen.calls <= 2
    assert stored(tables)["refresh_token"] == seen.refresh_token
    assert is_free(tables)


# -- errors of the provider ------------------------------------------------------------------------


def test_an_error_reaches_its_caller_and_the_next_one_may_try_at_once(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)
    error = Down("no route to host")
    with pytest.raises(Down) as caught:
        renewals.fresh(KEY, Provider(error))
    assert caught.value is error
    assert is_free(tables)
    provider = Provider(("a2", HOUR))
    assert renewals.fresh(KEY, provider) == "a2"
    assert provider.asked == [("a1", RenewalAttempt(KEY, 2, False))]


@pytest.mark.parametrize(
    "error", [OAuthError("invalid_grant"), NeedsReauthorizationError("gone")], ids=["oauth", "ours"]
)
def test_a_grant_that_is_gone_is_noted_and_nothing_is_deleted(
    tables: Engine, error: Exception
) -> None:
    store(tables, "a1", left=30)
    renewals = Renewals(tables)
    with pytest.raises(type(error)) as caught:
        renewals.fresh(KEY, Provider(error))
    assert caught.value is error
    with pytest.raises(NeedsReauthorizationError, match=str(KEY)):
        renewals.fresh(KEY, Provider())  # not asked again
    assert stored(tables) == "a1"
    with Session(tables) as session:
        assert [info.needs_reauthorization for info in LucentSecrets(session).list()] == [True]
    assert is_free(tables)
    store(tables, "b1", left=30)
    assert renewals.fresh(KEY, Provider(("b2", HOUR))) == "b2"


def test_another_error_of_the_provider_is_no_sign_that_the_grant_is_gone(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    with pytest.raises(OAuthError):
        Renewals(tables).fresh(KEY, Provider(OAuthError("temporarily_unavailable")))
    assert Renewals(tables).fresh(KEY, Provider(("a2", HOUR))) == "a2"


def test_an_error_is_forgotten_if_another_process_has_renewed_the_value(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)

    def too_late() -> Any:
        end_lease(tables)
        renewals.fresh(KEY, Provider(("b2", HOUR)))
        return OAuthError("invalid_grant")

    assert renewals.fresh(KEY, Provider(too_late)) == "b2"
    assert state(tables).needs_reauthorization_at is None
    assert renewals.fresh(KEY, Provider()) == "b2"


def test_an_uncertain_holder_waits_for_the_answer_of_the_one_before(tables: Engine) -> None:
    # Whose call has used up the refresh token.
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)
    refused = threading.Event()
    found: list[Any] = []

    def second_call() -> Any:
        refused.set()
        return OAuthError("invalid_grant")

    second = threading.Thread(
        target=lambda: found.append(renewals.fresh(KEY, Provider(second_call), wait=30))
    )

    def slowly() -> Any:
        end_lease(tables)
        second.start()
        refused.wait(30)
        return "a2", HOUR

    assert renewals.fresh(KEY, Provider(slowly)) == "a2"
    second.join()
    assert found == ["a2"]
    assert stored(tables) == "a2"
    assert is_free(tables)


def test_a_late_answer_shows_that_the_grant_is_not_gone(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    renewals = Renewals(tables)

    def slowly() -> Any:
        end_lease(tables)
        with pytest.raises(OAuthError):
            renewals.fresh(KEY, Provider(OAuthError("invalid_grant")), wait=0.1)
        assert state(tables).needs_reauthorization_at is not None
        return "a2", HOUR

    assert renewals.fresh(KEY, Provider(slowly)) == "a2"
    assert renewals.fresh(KEY, Provider()) == "a2"


def test_an_interrupt_gives_the_lease_back_and_the_next_holder_is_told(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    with pytest.raises(KeyboardInterrupt):
        Renewals(tables).fresh(KEY, Provider(KeyboardInterrupt()))
    provider = Provider(("a2", HOUR))
    assert Renewals(tables).fresh(KEY, provider, wait=0) == "a2"
    assert provider.uncertain == [True]


# -- bad input -------------------------------------------------------------------------------------


class Unsealable:
    pass


BAD_ANSWERS: dict[str, tuple[Any, type[LucentError]]] = {
    "nothing": (lambda: None, RenewalError),
    "the value alone": (lambda: {"access": "a2"}, RenewalError),
    "three things": (lambda: ("a2", HOUR, 1), RenewalError),
    "a list": (lambda: ["a2", HOUR], RenewalError),
    "a value that is no JSON": (lambda: (Unsealable(), HOUR), SerializationError),
    "a value with NaN": (lambda: ({"a": float("nan")}, HOUR), SerializationError),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_cannot_be_stored_changes_nothing(tables: Engine, name: str) -> None:
    answer, expected = BAD_ANSWERS[name]
    store(tables, "a1", left=-1)
    with pytest.raises(expected):
        Renewals(tables).fresh(KEY, Provider(answer))
    assert stages(tables) == {1: "current"}
    assert stored(tables) == "a1"
    assert is_free(tables)


BAD_EXPIRIES: dict[str, Any] = {
    "in the past": datetime(2020, 1, 1, tzinfo=UTC),
    "without a time zone": datetime(2999, 1, 1),  # noqa: DTZ001
    "a number": 3600,
    "a text": "2999-01-01",
    "no time": timedelta(0),
    "negative": timedelta(hours=-1),
    "out of range": timedelta.max,
}


@pytest.mark.parametrize("name", BAD_EXPIRIES)
def test_a_wrong_expiry_is_an_error_that_does_not_lose_the_grant(tables: Engine, name: str) -> None:
    store(tables, "a1", left=-1)
    with pytest.raises(SerializationError, match="expiry that refresh returned"):
        Renewals(tables).fresh(KEY, Provider(("a2", BAD_EXPIRIES[name])))
    assert stored(tables) == "a1"
    assert is_free(tables)
    provider = Provider(("a3", HOUR))
    assert Renewals(tables).fresh(KEY, provider) == "a3"
    assert [value for value, _ in provider.asked] == ["a2"]


async def coroutine_function(value: Any, attempt: RenewalAttempt) -> Any:
    return value, None


BAD_ARGUMENTS: dict[str, dict[str, Any]] = {
    "no lease": {"lease": 0},
    "a negative lease": {"lease": -1},
    "an endless lease": {"lease": float("inf")},
    "a lease that is no number": {"lease": "30"},
    "a lease that is not one": {"lease": float("nan")},
    "a lease that is true": {"lease": True},
    "a negative within": {"within": timedelta(seconds=-1)},
    "a negative wait": {"wait": -0.5},
    "an endless wait": {"wait": float("inf")},
    "no function": {"refresh": None},
    "a coroutine function": {"refresh": coroutine_function},
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_a_wrong_argument_is_refused_before_anything_is_asked(sqlite: Engine, name: str) -> None:
    store(sqlite, "a1", left=-1)
    with pytest.raises(ConfigurationError):
        Renewals(sqlite).fresh(KEY, **{"refresh": Provider(), **BAD_ARGUMENTS[name]})
    assert state(sqlite).lease_number == 0


def test_a_lease_shorter_than_a_round_trip_is_refused_and_given_back(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    with pytest.raises(ConfigurationError, match="lease="):
        Renewals(tables).fresh(KEY, Provider(), lease=0.000_001)
    assert is_free(tables)


def test_a_secret_that_is_not_there_is_an_error(tables: Engine) -> None:
    with pytest.raises(SecretNotFoundError):
        Renewals(tables).fresh(KEY, Provider())


def test_a_value_that_does_not_open_is_not_renewed(tables: Engine) -> None:
    store(tables, "a1", left=-1)
    other = Keyring({"v9": KEY_2})
    with pytest.raises(DecryptionError):
        Renewals(tables, keyring=other).fresh(KEY, Provider())
    assert is_free(tables)
    assert state(tables).lease_number == 0


def test_a_database_without_the_tables_says_which_migration_it_lacks(engine: Engine) -> None:
    LucentBase.metadata.tables["lucent_secrets"].create(engine)
    with pytest.raises(ConfigurationError, match="upgrade_lucent_secrets"):
        Renewals(engine).fresh(KEY, Provider())


def test_the_wrong_engines_and_models_are_refused(sqlite: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    class Plain(LucentSecretMixin, Base):
        __tablename__ = "plain_secrets"

    async_engine = create_async_engine("sqlite+aiosqlite://")
    wrong: list[Callable[[], Any]] = [
        lambda: Renewals(async_engine),  # type: ignore[arg-type]
        lambda: Renewals("sqlite://"),  # type: ignore[arg-type]
        lambda: AsyncRenewals(sqlite),  # type: ignore[arg-type]
        lambda: Renewals(sqlite, model=Plain),
        lambda: Renewals(sqlite, model=int),  # type: ignore[arg-type]
        lambda: Renewals(sqlite, keyring="k"),  # type: ignore[arg-type]
        lambda: Renewals(sqlite, keep=0),
        lambda: Renewals(sqlite, on_access=coroutine_function),  # type: ignore[arg-type]
    ]
    for make in wrong:
        with pytest.raises(ConfigurationError):
            make()


# -- processes -------------------------------------------------------------------------------------


class Processes:
    """Processes that call `fresh`; see the worker `renewer`."""

    def __init__(self, url: URL, oauth: Server) -> None:
        shown = url.render_as_string(hide_password=False)
        self.process = start("renewer", shown, oauth.url, primary="v1")

    def ask(self, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"key": str(KEY), **request}) + "\n")
        self.process.stdin.flush()
        answer: dict[str, Any] = json.loads(self.process.stdout.readline() or "{}")
        return answer


@pytest.fixture
def processes(tables: Engine, oauth: Server) -> Iterator[Processes]:
    started = Processes(tables.url, oauth)
    yield started
    reap([started.process])


@pytest.mark.slow
@pytest.mark.long
def test_processes_renew_each_expiry_once(
    tables: Engine, oauth: Server, processes: Processes
) -> None:
    count, expiries = (64, 200) if LONG else (8, 10)
    grant, tokens = oauth.grant()
    store(tables, tokens)
    found = processes.ask(processes=count, rounds=expiries)["rounds"]
    assert found == [[2 + number] * count for number in range(expiries)]
    seen = oauth.seen(grant)
    assert (seen.calls, seen.invalid_grant, seen.revocations) == (expiries, 0, 0)
    print(f"{tables.dialect.name}: {count} processes, {expiries} expiries: {seen.calls} calls")


KILLS = 50 if LONG else 5


@pytest.mark.slow
@pytest.mark.long
def test_a_process_killed_at_any_statement_loses_no_answer_that_another_can_have(
    tables: Engine, oauth: Server, processes: Processes
) -> None:
    _, tokens = oauth.grant()
    store(tables, tokens, left=-1)
    usual = processes.ask()
    assert usual["serial"] == 2
    numbers = range(1, usual["statements"] + 1)
    points = [("answer", 0)]
    points += [(when, number) for number in numbers for when in ("before", "after")]
    last = len(points) - 1  # after the last commit
    chosen = [points[number * last // (KILLS - 1)] for number in range(KILLS)]
    outcomes: Counter[str] = Counter()
    for point in chosen:
        outcomes[outcome_of_kill(tables, oauth, processes, point)] += 1
    assert outcomes["lost, and reported"] >= 1  # killed between the answer and its commit
    assert outcomes["stored"] >= 1
    assert outcomes["not asked yet"] >= 1
    print(f"{tables.dialect.name}: {len(chosen)} kills, {dict(outcomes)}")


def outcome_of_kill(
    engine: Engine, oauth: Server, processes: Processes, point: tuple[str, int]
) -> str:
    grant, tokens = oauth.grant()
    store(engine, tokens, left=-1)
    killed = processes.ask(kill=point)
    assert killed == {"exit": -signal.SIGKILL}, point
    calls = oauth.seen(grant).calls
    assert calls <= 1
    end_lease(engine)
    after = processes.ask()
    seen = oauth.seen(grant)
    if calls == 0:
        assert after["serial"] == 2, point
        assert (seen.calls, seen.invalid_grant) == (1, 0), point
        return "not asked yet"
    if seen.calls == 1:
        assert after["serial"] == 2, point
        assert stored(engine)["refresh_token"] == seen.refresh_token
        return "stored"
    # Nobody has the answer any more. The holder was told, and the value from before is still there.
    assert [attempt["uncertain"] for attempt in after["attempts"]] == [True], point
    assert after["error"] == "OAuthError"
    assert stored(engine)["serial"] == 1
    assert state(engine).needs_reauthorization_at is not None
    return "lost, and reported"


@pytest.mark.parametrize("kind", ["postgresql", "mysql"])
def test_an_answer_is_stored_once_although_the_connection_is_lost(
    databases: Databases, kind: str
) -> None:
    direct = create_engine(databases.url(kind))
    LucentBase.metadata.create_all(direct)
    with Proxy(direct.url) as proxy:
        for cut in range(1, 40):
            store(direct, f"a{cut}", left=-1)

            def answer(cut: int = cut) -> Any:
                proxy.begin({(1, cut)})  # counted from the moment when the provider has answered
                return f"b{cut}", HOUR

            engine = create_engine(proxy.url, poolclass=sa.NullPool)
            assert Renewals(engine).fresh(KEY, Provider(answer)) == f"b{cut}"
            engine.dispose()
            assert stored(direct) == f"b{cut}"
            assert stored(direct, stage="previous") == f"a{cut}"
            newest = max(stages(direct), key=lambda number: number or 0)
            assert newest == state(direct).number == state(direct).last_number
            assert is_free(direct)
            if proxy.connections == 1:
                break  # it went through without reaching the cut
        else:
            pytest.fail("every answer was cut")
    drop_everything(direct)
    direct.dispose()


# -- asyncio ---------------------------------------------------------------------------------------


def test_an_async_engine_renews_by_coroutines_and_by_plain_functions(async_url: URL) -> None:
    async def work(engine: AsyncEngine) -> None:
        renewals = AsyncRenewals(engine)
        held: list[int] = []
        loop_thread = threading.get_ident()
        threads: list[int] = []
        executed: list[str] = []

        async def refresh(value: Any, attempt: RenewalAttempt) -> Any:
            held.append(engine.pool.checkedout())  # type: ignore[attr-defined]
            await asyncio.sleep(0)
            return f"{value}+", HOUR

        class Client:
            async def __call__(self, value: Any, attempt: RenewalAttempt) -> Any:
                return await refresh(value, attempt)

        def plain(value: Any, attempt: RenewalAttempt) -> Any:
            held.append(engine.pool.checkedout())  # type: ignore[attr-defined]
            threads.append(threading.get_ident())
            return f"{value}-", HOUR

        functions: Sequence[Any] = (
            refresh,
            partial(refresh),
            Client(),
            lambda value, attempt: refresh(value, attempt),
        )
        for function in functions:
            await store_async(engine, "a")
            assert await renewals.fresh(KEY, function) == "a+"
        await store_async(engine, "a")
        assert await renewals.fresh(KEY, plain) == "a-"
        assert held == [0] * 5
        assert loop_thread not in threads
        event.listen(
            engine.sync_engine,
            "before_cursor_execute",
            lambda c, d, text, *r: executed.append(text),
        )
        assert await renewals.fresh(KEY, plain) == "a-"
        assert [text.split()[0] for text in executed] == ["SELECT"]

    run_on(async_url, work)


def test_a_cancelled_call_gives_the_lease_back_and_the_next_holder_is_told(async_url: URL) -> None:
    async def work(engine: AsyncEngine) -> None:
        await store_async(engine, "a1", left=-1)
        renewals = AsyncRenewals(engine)
        asked = asyncio.Event()

        async def never(value: Any, attempt: RenewalAttempt) -> Any:
            asked.set()
            await asyncio.sleep(3600)

        task = asyncio.create_task(renewals.fresh(KEY, never))
        await asked.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        provider = Provider(("a2", HOUR))
        assert await renewals.fresh(KEY, provider, wait=0) == "a2"
        assert provider.uncertain == [True]

    run_on(async_url, work)


def test_an_answer_is_stored_before_a_cancellation_goes_on(async_url: URL) -> None:
    async def work(engine: AsyncEngine) -> None:
        renewals = AsyncRenewals(engine)
        for delay in range(6):
            await store_async(engine, "a1", left=-1)

            async def refresh(value: Any, attempt: RenewalAttempt, delay: int = delay) -> Any:
                task = asyncio.current_task()
                assert task is not None
                loop = asyncio.get_running_loop()
                loop.call_later(delay / 1000, task.cancel)
                return "a2", HOUR

            task = asyncio.create_task(renewals.fresh(KEY, refresh))
            with suppress(asyncio.CancelledError):
                await task
            async with AsyncSession(engine) as session:
                assert await AsyncLucentSecrets(session).require(KEY) == "a2"

    run_on(async_url, work)


def test_a_cancel_scope_of_anyio_gives_the_lease_back(databases: Databases) -> None:
    # It cancels each await inside it again and again.
    url = with_driver(databases.url("postgresql"), "postgresql+asyncpg")

    async def work(engine: AsyncEngine) -> None:
        await store_async(engine, "a1", left=-1)
        renewals = AsyncRenewals(engine)
        with anyio.CancelScope() as scope:

            async def never(value: Any, attempt: RenewalAttempt) -> Any:
                scope.cancel()
                await asyncio.sleep(3600)

            await renewals.fresh(KEY, never)
        assert scope.cancelled_caught
        provider = Provider(("a2", HOUR))
        assert await renewals.fresh(KEY, provider, wait=0) == "a2"
        assert provider.uncertain == [True]

    run_on(url, work)
    sync_engine = create_engine(databases.url("postgresql"))
    drop_everything(sync_engine)
    sync_engine.dispose()


# -- behind PgBouncer ------------------------------------------------------------------------------


@pytest.mark.parametrize("driver", ["psycopg", "psycopg_async", "asyncpg"])
def test_renewals_work_behind_pgbouncer(databases: Databases, driver: str) -> None:
    direct = create_engine(databases.url("postgresql"))
    LucentBase.metadata.create_all(direct)
    store(direct, "a1", left=-1)
    provider = Provider(("a2", HOUR), Down())
    with pgbouncer(direct.url) as pooled:
        url = pooled.set(drivername=f"postgresql+{driver}")
        options: dict[str, Any] = {"poolclass": sa.NullPool, "connect_args": RECOMMENDED[driver]}
        if driver == "psycopg":
            engine = create_engine(url, **options)
            for _ in range(2):
                assert Renewals(engine).fresh(KEY, provider) == "a2"
            expire(direct, KEY, -1)
            with pytest.raises(Down):
                Renewals(engine).fresh(KEY, provider)
            engine.dispose()
        else:

            async def work(engine: AsyncEngine) -> None:
                for _ in range(2):
                    assert await AsyncRenewals(engine).fresh(KEY, provider) == "a2"
                expire(direct, KEY, -1)
                with pytest.raises(Down):
                    await AsyncRenewals(engine).fresh(KEY, provider)

            run_on(url, work, **options)
    assert is_free(direct)
    drop_everything(direct)
    direct.dispose()


# -- events ----------------------------------------------------------------------------------------


def test_each_read_and_each_renewal_is_reported(tables: Engine) -> None:
    seen: list[tuple[str, str | None, str]] = []

    def audit(access: SecretAccess, session: Session) -> None:
        assert access.key == KEY
        assert session.scalar(sa.select(sa.literal(1))) == 1
        seen.append((access.action, access.key_version, access.outcome))

    renewals = Renewals(tables, on_access=audit)
    with pytest.raises(SecretNotFoundError):
        renewals.fresh(KEY, Provider())
    store(tables, "a1", left=3600)
    renewals.fresh(KEY, Provider())
    expire(tables, KEY, -1)
    renewals.fresh(KEY, Provider(("a2", HOUR)))
    expire(tables, KEY, -1)
    with pytest.raises(Down):
        renewals.fresh(KEY, Provider(Down()))

    def slowly() -> Any:
        end_lease(tables)
        with pytest.raises(Down):
            Renewals(tables).fresh(KEY, Provider(Down()))
        return "a3", HOUR

    renewals.fresh(KEY, Provider(slowly))
    renewals.fresh(KEY, Provider())
    assert seen == [
        ("read", None, "missing"),
        ("read", "v1", "ok"),
        ("renew", "v1", "ok"),
        ("renew", None, "Down"),
        ("renew", "v1", "late"),
        ("renew", "v1", "ok"),
    ]


def test_a_handler_that_raises_does_not_undo_a_renewal(tables: Engine) -> None:
    class NotAllowed(Exception):
        pass

    def refuse(access: SecretAccess, session: Session) -> None:
        raise NotAllowed(access.action)

    store(tables, "a1", left=-1)
    with pytest.raises(NotAllowed, match="renew"):
        Renewals(tables, on_access=refuse).fresh(KEY, Provider(("a2", HOUR)))
    assert stored(tables) == "a2"
    with pytest.raises(NotAllowed, match="read"):
        Renewals(tables, on_access=refuse).fresh(KEY, Provider())


# -- leaks -----------------------------------------------------------------------------------------

MARKS = (b"PLAINTEXT-OLD", b"PLAINTEXT-NEW")


def broken(engine: Engine) -> Any:
    """Answer, and have the database refuse to store it."""
    with engine.begin() as connection:
        for name in ("lucent_secret_versions", "lucent_secret_states"):
            LucentBase.metadata.tables[name].drop(connection)
    return {"access": "PLAINTEXT-NEW"}, HOUR


FAILURES: dict[str, Callable[[Engine], Any]] = {
    "an error of the provider": lambda engine: Down("down"),
    "a grant that is gone": lambda engine: OAuthError("invalid_grant"),
    "an interrupt": lambda engine: KeyboardInterrupt(),
    "a value that cannot be sealed": lambda engine: ({"a": "PLAINTEXT-NEW", "b": object()}, HOUR),
    "a wrong expiry": lambda engine: ({"access": "PLAINTEXT-NEW"}, 3600),
    "a wrong shape": lambda engine: {"access": "PLAINTEXT-NEW"},
    "a broken database": broken,
}


@pytest.mark.parametrize("name", FAILURES)
def test_no_value_is_in_the_frames_messages_or_logs_of_an_error(
    tables: Engine, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    store(tables, {"access": "PLAINTEXT-OLD"}, left=-1)
    renewals = Renewals(tables)

    def refresh(value: Any, attempt: RenewalAttempt) -> Any:
        assert b"PLAINTEXT" not in repr((value, attempt)).encode()
        answer = FAILURES[name](tables)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    with pytest.raises((Exception, KeyboardInterrupt)) as caught:
        renewals.fresh(KEY, refresh)
    shown = [repr(renewals), repr(caught.value), str(caught.value), caplog.text]
    assert not [text for text in shown if "PLAINTEXT" in text]
    assert not [
        (where, data)
        for where, data in texts_in_frames(caught.value)
        if any(mark in data for mark in MARKS)
    ]
    # What the application raised has its own frames, for whoever looks for the fault.
    if isinstance(caught.value, (Down, OAuthError, KeyboardInterrupt)):
        assert "refresh" in [entry.name for entry in caught.traceback]


@pytest.mark.parametrize("name", FAILURES)
def test_no_value_is_in_the_frames_of_an_error_of_a_task(
    databases: Databases, sqlite: Engine, name: str
) -> None:
    async def work(engine: AsyncEngine) -> BaseException:
        async def refresh(value: Any, attempt: RenewalAttempt) -> Any:
            answer = FAILURES[name](sqlite)
            if isinstance(answer, KeyboardInterrupt):
                raise asyncio.CancelledError
            if isinstance(answer, BaseException):
                raise answer
            return answer

        with pytest.raises((Exception, asyncio.CancelledError)) as caught:
            await AsyncRenewals(engine).fresh(KEY, refresh)
        return caught.value

    store(sqlite, {"access": "PLAINTEXT-OLD"}, left=-1)
    error = run_on(with_driver(sqlite.url, "sqlite+aiosqlite"), work)
    assert not [
        where for where, data in texts_in_frames(error) if any(mark in data for mark in MARKS)
    ]
