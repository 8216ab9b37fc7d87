"""Versions of secrets: kept, opened by number and stage, staged, promoted, restored."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine, LargeBinary, type_coerce
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Session

from sqlalchemy_lucent import (
    AsyncLucentSecrets,
    ConfigurationError,
    ConflictError,
    DecryptionError,
    InvalidKeyError,
    KeyInUseError,
    Keyring,
    LucentBase,
    LucentSecret,
    LucentSecretMixin,
    LucentSecrets,
    SecretAccess,
    SecretKey,
    SecretNotFoundError,
    SerializationError,
    TamperedError,
    UnknownKeyVersionError,
    retire_check,
    rotate,
    row_bound,
    status,
    verify,
    with_lifecycle,
)
from sqlalchemy_lucent.secret_key import KEY_PART_NAMES
from tests.frames import texts_in_frames
from tests.integration.test_repository import counted, overwrite
from tests.secret_tables import KEY, OTHER, SECRETS, STATES, VERSIONS

SERVERS = pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
"""For what SQLite, with one writer at a time, cannot do."""
TOMORROW = datetime.now(UTC) + timedelta(days=1)


@pytest.fixture
def plain(session: Session) -> LucentSecrets:
    return LucentSecrets(session)


@pytest.fixture
def secrets(session: Session) -> LucentSecrets:
    return LucentSecrets(session, keep=3)


def shown(secrets: LucentSecrets, key: SecretKey = KEY) -> list[tuple[int | None, str | None]]:
    return [(version.number, version.stage) for version in secrets.versions(key)]


def of_key(table: sa.Table, key: SecretKey = KEY) -> sa.ColumnElement[bool]:
    return sa.and_(*(table.c[name] == part for name, part in key._asdict().items()))


def rows(session: Session, table: sa.Table) -> int:
    return session.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()


# -- keeping ---------------------------------------------------------------------------------------


def test_values_are_kept_and_opened_by_number_and_stage(secrets: LucentSecrets) -> None:
    for value in ("a", "b", "c", "d"):
        secrets.set(KEY, value)

    assert secrets.require(KEY) == "d"
    assert shown(secrets) == [(4, "current"), (3, "previous"), (2, None)]
    assert [secrets.require(KEY, version=number) for number in (2, 3, 4)] == ["b", "c", "d"]
    assert secrets.require(KEY, stage="previous") == "c"
    assert secrets.require(KEY, stage="current") == "d"
    with pytest.raises(SecretNotFoundError, match="no version 1"):
        secrets.require(KEY, version=1)


def test_a_version_has_the_times_and_key_of_its_value(
    secrets: LucentSecrets, session: Session
) -> None:
    secrets.set(KEY, 1, expires_at=TOMORROW)
    first = secrets.info(KEY)
    secrets.set(KEY, 2)
    assert first is not None
    current, previous = secrets.versions(KEY)

    assert previous.created_at == first.updated_at
    assert previous.expires_at == first.expires_at == TOMORROW
    assert previous.key_version == "v1"
    assert current.expires_at is None
    assert current.created_at > previous.created_at


def test_keeping_one_numbers_values_and_keeps_no_other(session: Session) -> None:
    secrets = LucentSecrets(session, keep=1)
    for value in range(3):
        secrets.set(KEY, value)
    assert shown(secrets) == [(3, "current")]
    assert rows(session, VERSIONS) == 0


def test_a_store_without_versions_overwrites_and_a_number_is_given_later(
    plain: LucentSecrets, secrets: LucentSecrets
) -> None:
    plain.set(KEY, "a")
    assert shown(secrets) == [(None, "current")]
    secrets.set(KEY, "b")
    plain.set(KEY, "c")

    assert shown(secrets) == [(None, "current"), (1, "previous")]
    assert secrets.require(KEY, stage="previous") == "a"
    assert secrets.require(KEY) == "c"

    secrets.set(KEY, "d")
    assert shown(secrets) == [(4, "current"), (3, "previous"), (1, None)]
    assert secrets.require(KEY, version=3) == "c"


def test_the_orm_writes_like_a_store_without_versions(
    secrets: LucentSecrets, session: Session
) -> None:
    secrets.set(KEY, "a", expires_at=TOMORROW)
    secret = session.get_one(LucentSecret, tuple(KEY))
    secret.payload = "b"
    session.flush()
    info = secrets.info(KEY)
    assert info is not None
    assert (info.number, info.expires_at) == (None, None)
    secrets.set(KEY, "c")
    assert [secrets.require(KEY, version=number) for number in (2, 3)] == ["b", "c"]


def test_loaded_objects_are_expired(secrets: LucentSecrets, session: Session) -> None:
    secrets.set(KEY, "a")
    secret = session.get_one(LucentSecret, tuple(KEY))
    assert secret.payload == "a"
    secrets.set(KEY, "b")
    assert secret.payload == "b"
    secrets.restore(KEY, 1)
    assert secret.payload == "a"


def test_many_are_set_and_deleted_with_their_versions(
    secrets: LucentSecrets, session: Session
) -> None:
    secrets.set_many({KEY: 1, OTHER: 2})
    secrets.set_many({KEY: 3, OTHER: 4})
    assert [secrets.require(key, stage="previous") for key in (KEY, OTHER)] == [1, 2]

    assert secrets.delete_many(scope="tenant", owner_id="t1") == 1
    assert shown(secrets) == []
    assert shown(secrets, OTHER) == [(2, "current"), (1, "previous")]
    assert secrets.delete(OTHER)
    assert not secrets.delete(OTHER)
    assert [rows(session, table) for table in (VERSIONS, STATES)] == [0, 0]


def test_expected_tokens_guard_a_store_with_versions(secrets: LucentSecrets) -> None:
    first = secrets.set(KEY, 1, expected=None)
    second = secrets.set(KEY, 2, expected=first)
    for call in (
        lambda: secrets.set(KEY, 3, expected=first),
        lambda: secrets.set(KEY, 3, expected=None),
        lambda: secrets.delete(KEY, expected=first),
        lambda: secrets.delete(OTHER, expected=first),
    ):
        with pytest.raises(ConflictError):
            call()
    assert shown(secrets) == [(2, "current"), (1, "previous")]
    assert secrets.delete(KEY, expected=second)
    assert shown(secrets) == []


def test_copies_start_anew_and_moves_take_the_versions(
    secrets: LucentSecrets, session: Session
) -> None:
    secrets.set(KEY, 1)
    secrets.set(KEY, 2, expires_at=TOMORROW)
    secrets.stage(KEY, "next")
    secrets.copy(KEY, OTHER)
    assert shown(secrets, OTHER) == [(1, "current")]
    assert secrets.versions(OTHER)[0].expires_at == TOMORROW

    with pytest.raises(ConflictError):
        secrets.move(KEY, OTHER)
    secrets.delete(OTHER)
    secrets.move(KEY, OTHER)
    assert shown(secrets) == []
    assert shown(secrets, OTHER) == [(3, "staged"), (2, "current"), (1, "previous")]
    assert secrets.require(OTHER, version=1) == 1
    assert secrets.require(OTHER, stage="staged") == "next"
    assert secrets.versions(OTHER)[1].expires_at == TOMORROW
    with pytest.raises(SecretNotFoundError):
        secrets.move(KEY, OTHER)


def test_nothing_is_committed(secrets: LucentSecrets, session: Session) -> None:
    secrets.set(KEY, 1)
    session.commit()
    secrets.set(KEY, 2)
    secrets.stage(KEY, 3)
    session.rollback()
    assert shown(secrets) == [(1, "current")]


# -- staged values ---------------------------------------------------------------------------------


def test_a_staged_value_counts_once_it_is_promoted(secrets: LucentSecrets) -> None:
    secrets.set(KEY, "old")
    assert secrets.stage(KEY, "wrong") == 2
    assert secrets.stage(KEY, "new", expires_at=TOMORROW) == 3
    assert secrets.require(KEY) == "old"
    assert secrets.require(KEY, stage="staged") == "new"
    assert shown(secrets) == [(3, "staged"), (1, "current")]

    assert secrets.promote(KEY) == 4
    assert secrets.require(KEY) == "new"
    assert secrets.require(KEY, stage="previous") == "old"
    assert secrets.versions(KEY)[0].expires_at == TOMORROW
    with pytest.raises(SecretNotFoundError, match="no staged value"):
        secrets.promote(KEY)
    with pytest.raises(SecretNotFoundError):
        secrets.require(KEY, stage="staged")


def test_a_value_is_staged_before_there_is_a_secret(secrets: LucentSecrets) -> None:
    secrets.stage(KEY, 1)
    assert secrets.get(KEY) is None
    assert secrets.list() == []
    assert shown(secrets) == [(1, "staged")]
    assert secrets.promote(KEY) == 2
    assert shown(secrets) == [(2, "current")]


def test_promote_and_restore_keep_what_they_replace_in_any_store(plain: LucentSecrets) -> None:
    plain.set(KEY, "a")
    plain.stage(KEY, "b")
    plain.promote(KEY)
    assert plain.require(KEY, stage="previous") == "a"
    plain.restore(KEY, 1)
    assert plain.require(KEY) == "a"
    assert plain.require(KEY, stage="previous") == "b"
    assert shown(plain) == [(4, "current"), (3, "previous"), (1, None)]


def test_restoring_writes_a_new_version(secrets: LucentSecrets) -> None:
    secrets.set(KEY, "a", expires_at=TOMORROW)
    secrets.set(KEY, "b")
    assert secrets.restore(KEY, 1) == 3
    assert secrets.require(KEY) == "a"
    assert shown(secrets) == [(3, "current"), (2, "previous"), (1, None)]
    assert secrets.versions(KEY)[0].expires_at == TOMORROW
    assert secrets.restore(KEY, 3) == 4
    assert secrets.require(KEY, version=4) == "a"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, error",
    [
        (lambda s: s.require(KEY, version=0), InvalidKeyError),
        (lambda s: s.require(KEY, version=True), InvalidKeyError),
        (lambda s: s.require(KEY, version="1"), InvalidKeyError),
        (lambda s: s.require(KEY, version=2**31), InvalidKeyError),
        (lambda s: s.require(KEY, stage="latest"), InvalidKeyError),
        (lambda s: s.require(KEY, stage="deleted"), InvalidKeyError),
        (lambda s: s.require(KEY, version=1, stage="current"), InvalidKeyError),
        (lambda s: s.require(KEY, version=9), SecretNotFoundError),
        (lambda s: s.require(OTHER, version=1), SecretNotFoundError),
        (lambda s: s.require(KEY, stage="pending"), SecretNotFoundError),
        (lambda s: s.require(OTHER, stage="current"), SecretNotFoundError),
        (lambda s: s.restore(KEY, 9), SecretNotFoundError),
        (lambda s: s.restore(OTHER, 1), SecretNotFoundError),
        (lambda s: s.restore(KEY, None), InvalidKeyError),
        (lambda s: s.promote(KEY), SecretNotFoundError),
        (lambda s: s.undelete(KEY), SecretNotFoundError),
        (lambda s: s.set(KEY, 2, expires_at=datetime.now()), SerializationError),  # noqa: DTZ005
        (lambda s: s.set(KEY, 2, expires_at=datetime(2020, 1, 1, tzinfo=UTC)), SerializationError),
        (lambda s: s.set(KEY, 2, expires_at=3600), SerializationError),
        (lambda s: s.stage(KEY, 2, expires_at="tomorrow"), SerializationError),
        (lambda s: s.stage(KEY, {"a": object()}), SerializationError),
        (lambda s: s.set(KEY, {"a": object()}), SerializationError),
        (lambda s: s.delete(KEY, purge_after=timedelta(0)), SerializationError),
        (lambda s: s.delete(KEY, purge_after=7), SerializationError),
        (lambda s: s.delete(KEY, purge_after=timedelta.max), SerializationError),
        (lambda s: s.due(datetime.now()), SerializationError),  # noqa: DTZ005
    ],
)
def test_bad_input_changes_nothing(
    secrets: LucentSecrets, call: Callable[[Any], object], error: type[Exception]
) -> None:
    secrets.set(KEY, 1, expires_at=TOMORROW)
    before = (secrets.versions(KEY), secrets.list(deleted=True))
    with pytest.raises(error):
        call(secrets)
    assert (secrets.versions(KEY), secrets.list(deleted=True)) == before
    assert secrets.require(KEY) == 1


@pytest.mark.parametrize("keep", [0, -1, True, "5", 2.0])
def test_keep_takes_a_count(keep: Any) -> None:
    with pytest.raises(ConfigurationError, match="keep="):
        LucentSecrets(Session(), keep=keep)


# -- what is sealed --------------------------------------------------------------------------------


def test_an_old_version_pasted_elsewhere_does_not_open(
    secrets: LucentSecrets, session: Session
) -> None:
    for value in ("a", "b", "c"):
        secrets.set(KEY, value)
    stored = sa.select(type_coerce(VERSIONS.c.payload, LargeBinary)).where(of_key(VERSIONS))
    old = bytes(session.execute(stored.where(VERSIONS.c.number == 1)).scalar_one())

    session.execute(
        sa.update(VERSIONS)
        .where(of_key(VERSIONS), VERSIONS.c.number == 2)
        .values(payload=type_coerce(old, LargeBinary))
    )
    with pytest.raises(TamperedError):
        secrets.require(KEY, version=2)
    with pytest.raises(TamperedError):
        secrets.restore(KEY, 2)
    overwrite(session, KEY, old)
    with pytest.raises(DecryptionError):
        secrets.require(KEY)
    assert secrets.require(KEY, version=1) == "a"


def test_a_value_that_does_not_open_cannot_be_kept_but_overwritten(
    secrets: LucentSecrets, plain: LucentSecrets, session: Session
) -> None:
    secrets.set(KEY, "a")
    secrets.set(OTHER, "b")
    stolen = sa.select(type_coerce(SECRETS.c.payload, LargeBinary)).where(of_key(SECRETS, OTHER))
    overwrite(session, KEY, bytes(session.execute(stolen).scalar_one()))
    for call in (
        lambda: secrets.set(KEY, "c"),
        lambda: plain.delete(KEY, purge_after=timedelta(days=1)),
    ):
        with pytest.raises(TamperedError, match="cannot be kept as a version"):
            call()
    plain.set(KEY, "c")
    assert secrets.require(KEY) == "c"


def test_versions_are_rotated_counted_verified_and_keep_a_key_in_use(
    engine: Engine, session: Session, secrets: LucentSecrets, keyring: Keyring, promoted: Keyring
) -> None:
    secrets.set(KEY, "a")
    secrets.set(KEY, "b", expires_at=TOMORROW)
    secrets.stage(KEY, "c")
    session.commit()
    counts = {(row.table, row.key_version): row.count for row in status(engine).rows}
    assert counts == {("lucent_secrets", "v1"): 1, ("lucent_secret_versions", "v1"): 2}

    assert rotate(engine, SECRETS.c.payload, keyring=promoted).ok
    # Whoever names the model or its table means the kept versions too.
    for target in (None, SECRETS, LucentSecret, [LucentSecret]):
        with pytest.raises(KeyInUseError, match="lucent_secret_versions"):
            retire_check(engine, "v1", target)
    assert rotate(engine, keyring=promoted).rotated == 2
    retire_check(engine, "v1")
    only_v2 = promoted.without("v1")
    assert verify(engine, keyring=only_v2).opened == 3

    after = LucentSecrets(session, keyring=only_v2, keep=3)
    assert shown(after) == [(3, "staged"), (2, "current"), (1, "previous")]
    assert after.versions(KEY)[1].expires_at == TOMORROW  # a rotation is no edit
    assert [after.require(KEY, version=number) for number in (1, 2, 3)] == ["a", "b", "c"]
    with pytest.raises(UnknownKeyVersionError):
        LucentSecrets(session, keyring=keyring).require(KEY, version=1)


# -- concurrent writers ----------------------------------------------------------------------------


def in_threads(engine: Engine, *works: Callable[[Session, threading.Barrier], None]) -> None:
    """Run each in a transaction of its own, at once; raise what one of them raised."""
    barrier, errors = threading.Barrier(len(works)), list[BaseException]()

    def run(work: Callable[[Session, threading.Barrier], None]) -> None:
        try:
            with Session(engine) as session:
                work(session, barrier)
                session.commit()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("reads_first", [False, True])
def test_each_of_two_writers_has_a_version(
    engine: Engine, session: Session, exists: bool, reads_first: bool
) -> None:
    if exists:
        LucentSecrets(session, keep=9).set(KEY, "first")
    session.commit()

    def write(value: str) -> Callable[[Session, threading.Barrier], None]:
        def work(own: Session, barrier: threading.Barrier) -> None:
            secrets = LucentSecrets(own, keep=9)
            if reads_first:
                secrets.get(KEY)
                if engine.dialect.name == "sqlite":  # which refuses to write on an older state
                    own.rollback()
            barrier.wait(30)
            secrets.set(KEY, value)

        return work

    in_threads(engine, write("a"), write("b"))

    secrets = LucentSecrets(session, keep=9)
    found = [secrets.require(KEY, version=v.number) for v in secrets.versions(KEY) if v.number]
    assert sorted(found) == sorted(["a", "b", *(["first"] if exists else [])])
    assert [version.number for version in secrets.versions(KEY)] == [3, 2, 1][not exists :]


@pytest.mark.parametrize("exists", [False, True])
def test_a_store_without_versions_that_writes_at_once_is_kept_or_wins(
    engine: Engine, session: Session, exists: bool
) -> None:
    if exists:
        LucentSecrets(session, keep=9).set(KEY, "first")
    session.commit()

    def keep(own: Session, barrier: threading.Barrier) -> None:
        barrier.wait(30)
        LucentSecrets(own, keep=9).set(KEY, "kept")

    def overwrite_it(own: Session, barrier: threading.Barrier) -> None:
        barrier.wait(30)
        LucentSecrets(own).set(KEY, "plain")

    in_threads(engine, keep, overwrite_it)

    secrets = LucentSecrets(session, keep=9)
    last = secrets.require(KEY)
    older = [secrets.require(KEY, version=v.number) for v in secrets.versions(KEY)[1:] if v.number]
    if last == "kept":
        assert older[0] == "plain"
    else:
        assert last == "plain"  # overwrote the other's value, as it always does
        assert "plain" not in older


@SERVERS
def test_a_plain_insert_between_the_lock_and_the_write_is_archived(
    engine: Engine, session: Session
) -> None:
    """The one moment in which a store with versions has nothing to lock."""
    session.commit()
    done = list[bool]()

    def insert_meanwhile(
        conn: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        if not done and statement.startswith("INSERT INTO lucent_secrets "):
            done.append(True)
            with Session(engine) as other:
                LucentSecrets(other).set(KEY, "plain")
                other.commit()

    own = sa.create_engine(engine.url)
    sa.event.listen(own, "before_cursor_execute", insert_meanwhile)
    with Session(own) as writer:
        LucentSecrets(writer, keep=9).set(KEY, "kept")
        writer.commit()
    own.dispose()

    secrets = LucentSecrets(session, keep=9)
    assert secrets.require(KEY) == "kept"
    assert secrets.require(KEY, stage="previous") == "plain"


@pytest.mark.parametrize("exists", [False, True])
def test_only_one_of_two_writers_has_the_expected_token(
    engine: Engine, session: Session, exists: bool
) -> None:
    token = LucentSecrets(session, keep=9).set(KEY, "first") if exists else None
    session.commit()
    outcomes = list[str]()

    def write(value: str, keep: int | None) -> Callable[[Session, threading.Barrier], None]:
        def work(own: Session, barrier: threading.Barrier) -> None:
            barrier.wait(30)
            try:
                LucentSecrets(own, keep=keep).set(KEY, value, expected=token)
                own.commit()
                outcomes.append(value)
            except ConflictError:
                outcomes.append("conflict")

        return work

    in_threads(engine, write("a", 9), write("b", 9), write("c", None))
    assert sorted(outcomes)[1:] == ["conflict", "conflict"]
    assert LucentSecrets(session).require(KEY) == min(outcomes)


@SERVERS
def test_writers_of_neighbouring_keys_do_not_deadlock(engine: Engine, session: Session) -> None:
    session.commit()

    def write(name: str) -> Callable[[Session, threading.Barrier], None]:
        def work(own: Session, barrier: threading.Barrier) -> None:
            secrets = LucentSecrets(own, keep=2)
            for number in range(4):
                barrier.wait(30)
                secrets.set(SecretKey("s", "o", "p", name), number)
                secrets.stage(SecretKey("s", "o", "p", name), number)
                secrets.promote(SecretKey("s", "o", "p", name))
                own.commit()

        return work

    in_threads(engine, *(write(name) for name in ("a", "b", "c", "d")))
    assert rows(session, SECRETS) == 4


# -- events and leaks ------------------------------------------------------------------------------


def test_events_of_each_step(session: Session) -> None:
    told = list[tuple[str, str]]()
    secrets = LucentSecrets(
        session, keep=3, on_access=lambda access, _: told.append((access.action, access.outcome))
    )

    def events_of(call: Callable[[], object]) -> list[tuple[str, str]]:
        told.clear()
        try:
            call()
        except (SecretNotFoundError, ConflictError):
            pass
        return list(told)

    assert events_of(lambda: secrets.set(KEY, 1)) == [("write", "ok")]
    assert events_of(lambda: secrets.set(KEY, 2)) == [("write", "ok")]
    assert events_of(lambda: secrets.set(KEY, 3, expected=None)) == [("write", "conflict")]
    assert events_of(lambda: secrets.require(KEY, version=1)) == [("read", "ok")]
    assert events_of(lambda: secrets.require(KEY, version=9)) == [("read", "missing")]
    assert events_of(lambda: secrets.promote(KEY)) == [("promote", "missing")]
    assert events_of(lambda: secrets.stage(KEY, 3)) == [("stage", "ok")]
    assert events_of(lambda: secrets.promote(KEY)) == [("read", "ok"), ("promote", "ok")]
    assert events_of(lambda: secrets.restore(KEY, 1)) == [("read", "ok"), ("restore", "ok")]
    assert events_of(lambda: secrets.restore(KEY, 99)) == [("restore", "missing")]
    week = timedelta(days=7)
    assert events_of(lambda: secrets.delete(KEY, purge_after=week)) == [("delete", "ok")]
    assert events_of(lambda: secrets.delete(KEY, purge_after=week)) == [("delete", "missing")]
    assert events_of(lambda: secrets.undelete(KEY)) == [("read", "ok"), ("undelete", "ok")]
    assert events_of(lambda: secrets.undelete(KEY)) == [("undelete", "missing")]
    assert events_of(lambda: secrets.versions(KEY)) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.set(KEY, "new"),
        lambda s: s.set(KEY, "new", expires_at=TOMORROW),
        lambda s: s.set_many({KEY: "new", OTHER: "new"}),
        lambda s: s.stage(KEY, "new"),
        lambda s: s.promote(KEY),
        lambda s: s.restore(KEY, 1),
        lambda s: s.delete(KEY),
        lambda s: s.delete(KEY, purge_after=timedelta(days=1)),
        lambda s: s.delete_many(scope="tenant", owner_id="t1"),
        lambda s: s.undelete(OTHER),
        lambda s: s.move(KEY, SecretKey("a", "b", "c", "d")),
    ],
)
def test_a_step_is_undone_if_the_handler_raises(
    session: Session, secrets: LucentSecrets, call: Callable[[LucentSecrets], object]
) -> None:
    def refuse(access: SecretAccess, _: Session) -> None:
        if access.action != "read":
            raise RuntimeError("no audit, no change")

    secrets.set(KEY, "a", expires_at=TOMORROW)
    secrets.set(KEY, "b")
    secrets.stage(KEY, "staged")
    secrets.set(OTHER, "deleted")
    secrets.delete(OTHER, purge_after=timedelta(days=1))
    session.commit()
    before = (secrets.versions(KEY), secrets.list(deleted=True))

    with pytest.raises(RuntimeError, match="no audit"):
        call(LucentSecrets(session, keep=3, on_access=refuse))
    session.commit()

    assert (secrets.versions(KEY), secrets.list(deleted=True)) == before
    assert secrets.require(KEY) == "b"


PLAINTEXT = "sk-live-" + "51HvJ2eZvKYlo2C"


@pytest.mark.parametrize(
    "call",
    [
        lambda s: s.set(KEY, PLAINTEXT, expires_at=datetime(2020, 1, 1, tzinfo=UTC)),
        lambda s: s.set(KEY, {"a": PLAINTEXT, "b": object()}),
        lambda s: s.set(KEY, PLAINTEXT, expected=None),
        lambda s: s.stage(KEY, {"a": PLAINTEXT, "b": object()}),
        lambda s: s.stage(KEY, PLAINTEXT, expires_at=datetime(2020, 1, 1, tzinfo=UTC)),
        lambda s: s.require(KEY, version=1, as_=dict[str, int]),
        lambda s: s.promote(OTHER),
        lambda s: s.restore(KEY, 5),
    ],
)
def test_errors_show_no_plaintext(
    secrets: LucentSecrets, call: Callable[[LucentSecrets], object]
) -> None:
    secrets.set(KEY, {"a": PLAINTEXT})
    secrets.set(KEY, {"b": PLAINTEXT})
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call(secrets)
    assert PLAINTEXT not in "".join(traceback.format_exception(caught.value))
    assert not [name for name, data in texts_in_frames(caught.value) if PLAINTEXT.encode() in data]


# -- models and databases without the tables -------------------------------------------------------


def test_a_database_that_is_not_upgraded_serves_a_store_that_uses_none_of_it(
    engine: Engine,
) -> None:
    SECRETS.create(engine)
    with Session(engine) as session, counted(engine) as statements:
        secrets = LucentSecrets(session)
        secrets.set(KEY, 1)
        secrets.set(KEY, 2, expected=secrets_token(session))
        assert (secrets.get(KEY), secrets.require(KEY), secrets.exists(KEY)) == (2, 2, True)
        secrets.set_many({KEY: 3, OTHER: 4})
        assert secrets.get_many([KEY, OTHER]) == {KEY: 3, OTHER: 4}
        assert secrets.count() == 2
        secrets.move(OTHER, SecretKey("a", "b", "c", "d"))
        secrets.rotate(KEY)
        assert secrets.delete(KEY)
        session.commit()
    assert not [each for each in statements if "lucent_secret_" in each]
    assert len(statements) == 15  # as before there were versions

    assert rotate(engine).ok
    assert {row.table for row in status(engine).rows} == {"lucent_secrets"}
    assert verify(engine).opened == 1
    for call in (
        lambda s: s.list(),
        lambda s: s.info(KEY),
        lambda s: s.versions(KEY),
        lambda s: s.due(TOMORROW),
        lambda s: s.stage(KEY, 1),
        lambda s: s.promote(KEY),
        lambda s: s.restore(KEY, 1),
        lambda s: s.undelete(KEY),
        lambda s: s.require(KEY, version=1),
        lambda s: s.set(KEY, 1, expires_at=TOMORROW),
        lambda s: s.delete(KEY, purge_after=timedelta(days=1)),
        lambda s: s.purge(engine),
        lambda _: LucentSecrets(session, keep=2).set(KEY, 1),
    ):
        with (
            Session(engine) as session,
            pytest.raises(ConfigurationError, match=r"op\.upgrade_lucent_secrets\(\)"),
        ):
            call(LucentSecrets(session))


def secrets_token(session: Session) -> str:
    payload = session.execute(sa.select(type_coerce(SECRETS.c.payload, LargeBinary))).scalar_one()
    return bytes(payload)[: len("v1:") + 1 + 4 + 12].hex()


@dataclass
class Token:
    access: str


def test_a_model_of_ones_own_keeps_versions_of_its_typed_values(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    @with_lifecycle
    class AppSecret(LucentSecretMixin, Base):
        __tablename__ = "app_secrets"
        payload = row_bound(*KEY_PART_NAMES, schema=Token, context="vault.payload")

    assert set(Base.metadata.tables) == {"app_secrets", "app_secret_versions", "app_secret_states"}
    kept = Base.metadata.tables["app_secret_versions"].c.payload.type
    assert kept.context == "vault_versions.payload"  # type: ignore[attr-defined]
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        secrets = LucentSecrets(session, model=AppSecret, keep=2)
        secrets.set(KEY, Token("a"))
        secrets.set(KEY, Token("b"))
        assert secrets.require(KEY, stage="previous") == Token("a")
        session.commit()
    assert verify(engine, Base).opened == 2


def test_the_statements_of_each_step_are_as_many_as_the_page_says(
    engine: Engine, secrets: LucentSecrets, plain: LucentSecrets, session: Session
) -> None:
    for number in range(2):
        secrets.set(KEY, number)
    plain.set(OTHER, 1)

    def statements_of(call: Callable[[], object]) -> int:
        with counted(engine) as statements:
            call()
        return len(statements)

    assert statements_of(lambda: secrets.set(KEY, 2)) == 7
    assert statements_of(lambda: secrets.set(KEY, 3)) == 8
    assert statements_of(lambda: plain.set(OTHER, 2, expires_at=TOMORROW)) == 2
    assert statements_of(lambda: plain.set(OTHER, 3)) == 1
    assert statements_of(lambda: secrets.require(KEY, version=2)) == 1
    assert statements_of(lambda: secrets.require(KEY, stage="previous")) == 1
    assert statements_of(lambda: secrets.due(TOMORROW)) == 1
    assert statements_of(lambda: secrets.list()) == 1
    assert statements_of(lambda: secrets.versions(KEY)) == 2


def test_each_declarative_style_gets_the_tables(engine: Engine) -> None:
    own = sa.orm.registry()

    @with_lifecycle
    @own.mapped
    class Mapped(LucentSecretMixin):
        __tablename__ = "vault"

    class Old(sa.orm.declarative_base(metadata=sa.MetaData(schema="app"))):  # type: ignore[misc]
        __abstract__ = True

    @with_lifecycle
    class InASchema(LucentSecretMixin, Old):
        __tablename__ = "secrets"

    assert with_lifecycle(InASchema) is InASchema
    names = {"app.secrets", "app.secret_versions", "app.secret_states"}
    assert set(InASchema.metadata.tables) == names
    own.metadata.create_all(engine)
    with Session(engine) as session:
        secrets = LucentSecrets(session, model=Mapped, keep=2)
        secrets.set(KEY, 1)
        secrets.set(KEY, 2)
        assert secrets.require(KEY, version=1) == 1
        assert secrets.due(TOMORROW) == []

    for given in (LucentSecretMixin, DeclarativeBase, "secrets", None):
        with pytest.raises(ConfigurationError, match="with_lifecycle"):
            with_lifecycle(given)  # type: ignore[type-var]


def test_a_model_without_the_tables_says_so() -> None:
    class Base(DeclarativeBase):
        pass

    class AppSecret(LucentSecretMixin, Base):
        __tablename__ = "app_secrets"

    with pytest.raises(ConfigurationError, match="@with_lifecycle"):
        LucentSecrets(Session(), model=AppSecret, keep=2)
    with pytest.raises(ConfigurationError, match="@with_lifecycle"):
        LucentSecrets(Session(), model=AppSecret).versions(KEY)


# -- async -----------------------------------------------------------------------------------------


def test_the_async_repository_does_the_same(run_async: Callable[..., Any]) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(LucentBase.metadata.create_all)
        async with AsyncSession(engine) as session:
            secrets = AsyncLucentSecrets(session, keep=3)
            await secrets.set(KEY, "a")
            await secrets.set(KEY, "b", expires_at=TOMORROW)
            await secrets.stage(KEY, "c")
            assert await secrets.promote(KEY) == 4
            assert await secrets.restore(KEY, 2) == 5
            assert await secrets.require(KEY, version=2) == "b"
            assert await secrets.require(KEY, stage="previous") == "c"
            assert [version.number for version in await secrets.versions(KEY)] == [5, 4, 2]
            assert [info.key for info in await secrets.due(TOMORROW + timedelta(1))] == [KEY]
            await secrets.delete(KEY, purge_after=timedelta(microseconds=1))
            assert len(await secrets.list(deleted=True)) == 1
            await secrets.undelete(KEY)
            await secrets.delete(KEY, purge_after=timedelta(microseconds=1))
            await session.commit()
        assert await AsyncLucentSecrets.purge(engine) == 1

    run_async(work)
