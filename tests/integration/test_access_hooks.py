"""Access events: what a handler is told, and what happens when it refuses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import DateTime, Engine, LargeBinary, String, insert, select, type_coerce, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConflictError,
    Keyring,
    LucentBase,
    LucentSecrets,
    SecretAccess,
    SecretKey,
    SecretNotFoundError,
    TamperedError,
)
from tests.secret_tables import KEY, OTHER

TABLE = LucentBase.metadata.tables["lucent_secrets"]


class Base(DeclarativeBase):
    pass


class AuditEntry(Base):
    __tablename__ = "audit_log"

    id: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    action: Mapped[str] = mapped_column(String(10))
    key: Mapped[str] = mapped_column(String(600))
    outcome: Mapped[str] = mapped_column(String(50))


def write_audit(access: SecretAccess, session: Session) -> None:
    session.execute(
        insert(AuditEntry).values(
            time=access.time, action=access.action, key=str(access.key), outcome=access.outcome
        )
    )


class Refusal(Exception):
    pass


class Recorder:
    """A handler that keeps what it is told, and raises for the actions that it refuses."""

    def __init__(self) -> None:
        self.told: list[SecretAccess] = []
        self.refused: set[str] = set()

    def __call__(self, access: SecretAccess, session: Session) -> None:
        self.told.append(access)
        if access.action in self.refused:
            raise Refusal(access.action)

    def take(self) -> list[tuple[str, SecretKey, str | None, str]]:
        taken: list[tuple[str, SecretKey, str | None, str]] = [
            (a.action, a.key, a.key_version, a.outcome) for a in self.told
        ]
        self.told.clear()
        return taken


@pytest.fixture
def session(engine: Engine) -> Iterator[Session]:
    LucentBase.metadata.create_all(engine)
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        yield session


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def secrets(session: Session, recorder: Recorder) -> LucentSecrets:
    return LucentSecrets(session, on_access=recorder)


def test_each_use_is_told(secrets: LucentSecrets, recorder: Recorder, promoted: Keyring) -> None:
    secrets.set(KEY, {"n": 1})
    assert recorder.take() == [("write", KEY, "v1", "ok")]
    secrets.get(KEY)
    secrets.require(KEY)
    assert recorder.take() == [("read", KEY, "v1", "ok")] * 2
    secrets.get(OTHER)
    with pytest.raises(SecretNotFoundError):
        secrets.require(OTHER)
    assert recorder.take() == [("read", OTHER, None, "missing")] * 2
    secrets.copy(KEY, OTHER)
    assert recorder.take() == [("read", KEY, "v1", "ok"), ("write", OTHER, "v1", "ok")]
    secrets.delete(OTHER)
    secrets.delete(OTHER)
    assert recorder.take() == [("delete", OTHER, None, "ok"), ("delete", OTHER, None, "missing")]
    secrets.move(KEY, OTHER)
    assert recorder.take() == [
        ("read", KEY, "v1", "ok"),
        ("write", OTHER, "v1", "ok"),
        ("delete", KEY, None, "ok"),
    ]
    secrets.rotate(OTHER, promoted)
    assert recorder.take() == [("rotate", OTHER, "v2", "ok")]


def test_each_of_many_is_told(
    secrets: LucentSecrets, recorder: Recorder, promoted: Keyring
) -> None:
    secrets.set_many({KEY: 1, OTHER: 2})
    assert recorder.take() == [("write", KEY, "v1", "ok"), ("write", OTHER, "v1", "ok")]
    secrets.get_many([OTHER, "tenant:t3:p:n"])
    assert recorder.take() == [
        ("read", OTHER, "v1", "ok"),
        ("read", SecretKey("tenant", "t3", "p", "n"), None, "missing"),
    ]
    secrets.rotate_many([KEY, OTHER], promoted)
    assert recorder.take() == [("rotate", KEY, "v2", "ok"), ("rotate", OTHER, "v2", "ok")]
    assert secrets.delete_many(scope="tenant", owner_id="t1") == 1
    assert recorder.take() == [("delete", KEY, None, "ok")]


def test_lost_compare_and_swap_is_told(secrets: LucentSecrets, recorder: Recorder) -> None:
    old = secrets.set(KEY, 1)
    secrets.set_many({KEY: 2, OTHER: 2})
    recorder.take()
    for call in (
        lambda: secrets.set(KEY, 3, expected=old),
        lambda: secrets.set(KEY, 3, expected=None),
        lambda: secrets.delete(KEY, expected=old),
    ):
        with pytest.raises(ConflictError):
            call()
    assert [(told[0], told[3]) for told in recorder.take()] == [
        ("write", "conflict"),
        ("write", "conflict"),
        ("delete", "conflict"),
    ]


def test_value_that_does_not_open_is_told_with_the_name_of_its_error(
    session: Session, secrets: LucentSecrets, recorder: Recorder
) -> None:
    secrets.set_many({KEY: 1, OTHER: 2})
    payload = select(type_coerce(TABLE.c.payload, LargeBinary())).where(TABLE.c.owner_id == "t1")
    sealed = bytes(session.execute(payload).scalar_one())
    session.execute(update(TABLE).values(payload=type_coerce(sealed, LargeBinary())))
    recorder.take()
    with pytest.raises(TamperedError):
        secrets.require(OTHER)
    assert recorder.take() == [("read", OTHER, "v1", "TamperedError")]


def test_event_holds_the_time_and_no_value(secrets: LucentSecrets, recorder: Recorder) -> None:
    before = datetime.now(UTC)
    secrets.set(KEY, {"token": "hunter2"})
    secrets.require(KEY)
    for access in recorder.told:
        assert (
            before - timedelta(seconds=1) < access.time < datetime.now(UTC) + timedelta(seconds=1)
        )
        assert access.time.tzinfo is UTC
        assert "hunter2" not in repr(vars(access))


def test_looking_without_opening_tells_nothing(secrets: LucentSecrets, recorder: Recorder) -> None:
    secrets.exists(KEY)
    secrets.info(KEY)
    secrets.list()
    secrets.count()
    assert recorder.take() == []


@pytest.mark.parametrize("others_before", [True, False])
@pytest.mark.parametrize(
    "action, call",
    [
        ("write", lambda s: s.set(KEY, 2)),
        ("write", lambda s: s.set_many({KEY: 2, OTHER: 2})),
        ("write", lambda s: s.copy(KEY, OTHER)),
        ("write", lambda s: s.move(KEY, OTHER)),
        ("delete", lambda s: s.move(KEY, OTHER)),
        ("delete", lambda s: s.delete(KEY)),
        ("delete", lambda s: s.delete_many(scope="tenant", owner_id="t1")),
        ("rotate", lambda s: s.rotate(KEY)),
        ("read", lambda s: s.get(KEY)),
        ("read", lambda s: s.require(KEY)),
        ("read", lambda s: s.get_many([KEY])),
        ("read", lambda s: s.copy(KEY, OTHER)),
    ],
)
def test_handler_that_raises_stops_the_operation(
    session: Session,
    recorder: Recorder,
    action: str,
    call: Callable[[LucentSecrets], Any],
    others_before: bool,
) -> None:
    plain = LucentSecrets(session)
    plain.set(KEY, 1)
    session.commit()
    if others_before:
        plain.set("app:default:resend:apiKey", "kept")
    (before,) = plain.list(scope="tenant")
    recorder.refused.add(action)
    with pytest.raises(Refusal):
        call(LucentSecrets(session, on_access=recorder))
    # The session is usable, the rest of the transaction stands, and nothing of the call is left.
    assert plain.list(scope="tenant") == [before]
    session.commit()
    assert plain.list(scope="tenant") == [before]
    assert plain.get("app:default:resend:apiKey") == ("kept" if others_before else None)


def test_write_with_a_handler_is_not_committed(
    session: Session, secrets: LucentSecrets, recorder: Recorder
) -> None:
    # A savepoint that begins the transaction would commit it on some databases when released.
    secrets.set(KEY, 1)
    session.rollback()
    assert secrets.list() == []


def test_audit_table_is_written_in_the_same_transaction(session: Session) -> None:
    secrets = LucentSecrets(session, on_access=write_audit)
    secrets.set(KEY, 1)
    session.rollback()
    assert session.scalars(select(AuditEntry)).all() == []
    secrets.set(KEY, 1)
    secrets.require(KEY)
    session.commit()
    entries = session.scalars(select(AuditEntry).order_by(AuditEntry.id)).all()
    assert [(entry.action, entry.key, entry.outcome) for entry in entries] == [
        ("write", str(KEY), "ok"),
        ("read", str(KEY), "ok"),
    ]


def test_repository_without_a_handler_is_not_heard(session: Session, recorder: Recorder) -> None:
    LucentSecrets(session, on_access=recorder).exists(KEY)
    LucentSecrets(session).set(KEY, 1)
    assert recorder.take() == []


def test_async_repository_tells_plain_handlers(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[None]]], None], recorder: Recorder
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(LucentBase.metadata.create_all)
            await connection.run_sync(Base.metadata.create_all)
        async with AsyncSession(engine) as session:
            audited = AsyncLucentSecrets(session, on_access=write_audit)
            await audited.set(KEY, 1)
            await session.rollback()
            assert await audited.list() == []
            await audited.set(KEY, 1)
            assert await audited.require(KEY) == 1
            await session.commit()
            entries = (await session.scalars(select(AuditEntry.action))).all()
            assert sorted(entries) == ["read", "write"]
            recorder.refused.add("write")
            with pytest.raises(Refusal):
                await AsyncLucentSecrets(session, on_access=recorder).set(KEY, 2)
            assert await audited.require(KEY) == 1

    run_async(work)
