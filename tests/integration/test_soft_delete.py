"""Secrets that are deleted for a while, brought back, and purged; and a model of it all."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from sqlalchemy_lucent import (
    ConfigurationError,
    ConflictError,
    Keyring,
    LucentBase,
    LucentSecrets,
    SecretAccess,
    SecretKey,
    SecretNotFoundError,
    purge,
    rotate,
    verify,
)
from tests.conftest import KEY_1
from tests.secret_tables import KEY, OTHER, SECRETS, STATES, VERSIONS

WEEK = timedelta(days=7)
MOMENT = timedelta(microseconds=1)


@pytest.fixture
def secrets(session: Session) -> LucentSecrets:
    return LucentSecrets(session, keep=5)


def rows(session: Session) -> list[int]:
    return [
        session.execute(sa.select(sa.func.count()).select_from(table)).scalar_one()
        for table in (SECRETS, VERSIONS, STATES)
    ]


@pytest.mark.parametrize("keep", [None, 5])
def test_a_deleted_secret_is_found_nowhere_and_comes_back_as_it_was(
    session: Session, keep: int | None
) -> None:
    secrets = LucentSecrets(session, keep=keep)
    secrets.set(KEY, "a", expires_at=datetime.now(UTC) + WEEK)
    before = (secrets.info(KEY), secrets.versions(KEY))

    assert secrets.delete(KEY, purge_after=WEEK)

    assert secrets.get(KEY) is None
    assert not secrets.exists(KEY)
    assert secrets.list() == secrets.due(datetime.now(UTC) + 2 * WEEK) == []
    assert secrets.versions(KEY) == []
    for wanted in ({}, {"version": 1}, {"stage": "current"}, {"stage": "previous"}):
        with pytest.raises(SecretNotFoundError):
            secrets.require(KEY, **wanted)
    with pytest.raises(SecretNotFoundError):
        secrets.restore(KEY, 1)
    assert not secrets.delete(KEY, purge_after=WEEK)

    secrets.undelete(KEY)
    assert secrets.require(KEY) == "a"
    after = secrets.info(KEY)
    assert before[0] is not None
    assert after is not None
    assert (after.created_at, after.updated_at) == (before[0].created_at, before[0].updated_at)
    assert (after.number, after.expires_at) == (before[0].number, before[0].expires_at)
    assert secrets.versions(KEY) == before[1]


def test_a_deleted_secret_is_listed_when_asked_for(secrets: LucentSecrets) -> None:
    expires_at = datetime.now(UTC) + WEEK
    secrets.set(KEY, "a", expires_at=expires_at)
    stored = secrets.info(KEY)
    secrets.set(OTHER, "b")
    secrets.delete(KEY, purge_after=WEEK)

    deleted, other = secrets.list(deleted=True)
    assert (deleted.key, other.key) == (KEY, OTHER)
    assert stored is not None
    assert (deleted.created_at, deleted.updated_at) == (stored.created_at, stored.updated_at)
    assert (deleted.number, deleted.expires_at, deleted.token) == (1, expires_at, None)
    assert deleted.deleted_at is not None
    assert deleted.purge_at == deleted.deleted_at + WEEK
    assert other.deleted_at is None
    assert [info.key for info in secrets.list(deleted=True, limit=1)] == [KEY]
    assert [info.key for info in secrets.list(deleted=True, after=KEY)] == [OTHER]
    assert [info.key for info in secrets.list(scope="tenant", owner_id="t1")] == []
    assert secrets.list(scope="tenant", owner_id="t1", deleted=True) == [deleted]


def test_another_secret_under_the_key_keeps_the_deleted_one_from_coming_back(
    secrets: LucentSecrets,
) -> None:
    secrets.set(KEY, "old")
    secrets.delete(KEY, purge_after=WEEK)
    secrets.set(KEY, "new")
    with pytest.raises(ConflictError, match="another secret is stored"):
        secrets.undelete(KEY)
    assert secrets.require(KEY) == "new"
    secrets.delete(KEY, purge_after=WEEK)
    secrets.undelete(KEY)
    assert secrets.require(KEY) == "new"
    assert secrets.require(KEY, version=1) == "old"


def test_purge_deletes_what_is_past_its_time_and_nothing_else(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    told = list[tuple[str, SecretKey]]()
    for number in range(3):
        secrets.set(KEY, number)
        secrets.set(OTHER, number)
    secrets.delete(KEY, purge_after=MOMENT)
    secrets.delete(OTHER, purge_after=WEEK)
    third = SecretKey("tenant", "t3", "stripe", "apiKey")
    secrets.set(third, 1)
    secrets.stage(third, 2)
    session.commit()

    def note(access: SecretAccess, _: Session) -> None:
        told.append((access.action, access.key))

    assert purge(engine, on_access=note) == 1
    assert told == [("purge", KEY)]
    assert purge(engine) == 0
    for call in (secrets.undelete, lambda key: secrets.restore(key, 1)):
        with pytest.raises(SecretNotFoundError):
            call(KEY)
    session.rollback()
    secrets.undelete(OTHER)
    assert [secrets.require(OTHER, version=number) for number in (1, 2, 3)] == [0, 1, 2]
    assert secrets.require(third, stage="staged") == 2


def test_purge_leaves_a_secret_that_was_stored_since(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    secrets.set(KEY, "old", expires_at=datetime.now(UTC) + WEEK)
    secrets.delete(KEY, purge_after=MOMENT)
    secrets.set(KEY, "new", expires_at=datetime.now(UTC) + WEEK)
    session.commit()
    before = secrets.info(KEY)
    session.commit()
    assert purge(engine) == 1
    assert secrets.require(KEY) == "new"
    assert secrets.info(KEY) == before
    assert [version.number for version in secrets.versions(KEY)] == [2]


def test_purge_deletes_the_versions_that_a_store_without_them_left(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    for number in range(250):  # more than two batches
        secrets.set(SecretKey("tenant", f"o{number}", "p", "n"), 1)
    secrets.set(KEY, 1)
    secrets.set(KEY, 2)
    staged = SecretKey("tenant", "t9", "p", "n")
    secrets.stage(staged, 1)
    session.execute(sa.delete(SECRETS).where(SECRETS.c.name == "n"))
    LucentSecrets(session).delete(KEY)
    secrets.set(OTHER, 1)
    session.commit()

    assert purge(engine) == 251
    assert rows(session) == [1, 1, 2]
    assert secrets.require(staged, stage="staged") == 1
    assert [version.number for version in secrets.versions(OTHER)] == [1]


def test_a_batch_is_undone_if_the_handler_raises(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    def refuse(access: SecretAccess, _: Session) -> None:
        raise RuntimeError("no audit")

    secrets.set(KEY, 1)
    secrets.delete(KEY, purge_after=MOMENT)
    session.commit()
    with pytest.raises(RuntimeError, match="no audit"):
        purge(engine, on_access=refuse)
    secrets.undelete(KEY)
    assert secrets.require(KEY) == 1


def test_purges_at_once_count_each_secret_once(
    engine: Engine, session: Session, secrets: LucentSecrets
) -> None:
    for number in range(30):
        key = SecretKey("tenant", f"o{number}", "p", "n")
        secrets.set(key, 1)
        secrets.delete(key, purge_after=MOMENT)
    session.commit()
    counts = list[int]()
    threads = [threading.Thread(target=lambda: counts.append(purge(engine))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(counts) == 3
    assert sum(counts) == 30
    assert rows(session) == [0, 0, 0]


def test_deleted_secrets_are_rotated_and_verified(
    engine: Engine, session: Session, secrets: LucentSecrets, promoted: Keyring
) -> None:
    secrets.set(KEY, 1)
    secrets.delete(KEY, purge_after=WEEK)
    session.commit()
    assert rotate(engine, keyring=promoted).rotated == 1
    only = promoted.without("v1")
    assert verify(engine, keyring=only).opened == 1
    after = LucentSecrets(session, keyring=only)
    after.undelete(KEY)
    assert after.require(KEY) == 1


def test_purge_takes_an_engine(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="takes an Engine"):
        purge(connection)  # type: ignore[arg-type]


# -- a model in memory -----------------------------------------------------------------------------

KEEP = 3
EXPIRY = datetime(2100, 1, 1, tzinfo=UTC)


class Model(RuleBasedStateMachine):
    """One secret, and what its store has to answer, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = sa.create_engine("sqlite://", poolclass=sa.StaticPool)
        LucentBase.metadata.create_all(self.engine)
        self.session = Session(self.engine)
        keyring = Keyring({"v1": KEY_1})
        self.secrets = LucentSecrets(self.session, keyring=keyring, keep=KEEP)
        self.plain = LucentSecrets(self.session, keyring=keyring)
        self.last = 0
        self.current: tuple[int | None, Any, datetime | None] | None = None
        self.old: dict[int, tuple[Any, datetime | None]] = {}
        self.staged: tuple[int, Any, datetime | None] | None = None
        self.deleted: tuple[int, Any, datetime | None] | None = None
        self.was_plain_deleted = False

    def teardown(self) -> None:
        self.session.close()
        self.engine.dispose()

    def next_number(self) -> int:
        self.last += 1
        return self.last

    def adopt(self) -> None:
        """Every step numbers a value that a store without versions has written."""
        if self.was_plain_deleted and self.current is None:
            self.old, self.staged = {}, None
        self.was_plain_deleted = False
        if self.current is not None and self.current[0] is None:
            self.current = (self.next_number(), *self.current[1:])

    def make_current(self, value: Any, expires_at: datetime | None) -> None:
        if self.current is not None:
            number, *rest = self.current
            assert number is not None
            self.old[number] = (rest[0], rest[1])
        self.current = (self.next_number(), value, expires_at)
        kept = sorted(self.old)[-(KEEP - 1) :]
        self.old = {number: self.old[number] for number in kept}

    @rule(value=st.integers(), expires=st.booleans())
    def set(self, value: int, expires: bool) -> None:
        expires_at = EXPIRY if expires else None
        self.secrets.set(KEY, value, expires_at=expires_at)
        self.adopt()
        self.make_current(value, expires_at)

    @rule(value=st.integers())
    def set_plainly(self, value: int) -> None:
        self.plain.set(KEY, value)
        self.current = (None, value, None)

    @rule(value=st.integers())
    def set_plainly_with_an_expiry(self, value: int) -> None:
        self.plain.set(KEY, value, expires_at=EXPIRY)
        self.current = (self.next_number(), value, EXPIRY)
        self.was_plain_deleted = False

    @rule(value=st.integers(), expires=st.booleans())
    def stage(self, value: int, expires: bool) -> None:
        expires_at = EXPIRY if expires else None
        number = self.secrets.stage(KEY, value, expires_at=expires_at)
        self.adopt()
        self.staged = (self.next_number(), value, expires_at)
        assert number == self.staged[0]

    @rule()
    def promote(self) -> None:
        try:
            number = self.secrets.promote(KEY)
        except SecretNotFoundError:
            self.session.rollback()
            assert self.staged is None or (self.was_plain_deleted and self.current is None)
            return
        self.adopt()
        assert self.staged is not None
        _, value, expires_at = self.staged
        self.staged = None
        self.make_current(value, expires_at)
        assert self.current is not None
        assert self.current[0] == number

    @rule(data=st.data())
    def restore(self, data: st.DataObject) -> None:
        wanted = data.draw(st.integers(1, self.last + 1))
        try:
            self.secrets.restore(KEY, wanted)
        except SecretNotFoundError:
            self.session.rollback()
            staged = self.staged is not None and self.staged[0] == wanted
            assert self.current is None or not (wanted in self.old or staged)
            return
        self.adopt()
        assert self.current is not None
        if self.current[0] == wanted:
            value, expires_at = self.current[1:]
        elif wanted in self.old:
            value, expires_at = self.old[wanted]
        else:
            assert self.staged is not None
            value, expires_at = self.staged[1:]
        self.make_current(value, expires_at)

    @rule()
    def delete(self) -> None:
        assert self.secrets.delete(KEY) == (self.current is not None)
        self.current = self.staged = self.deleted = None
        self.old, self.last, self.was_plain_deleted = {}, 0, False

    @rule()
    def delete_plainly(self) -> None:
        assert self.plain.delete(KEY) == (self.current is not None)
        # A value without a number leaves the state of an earlier one, or none.
        self.was_plain_deleted |= self.current is not None and self.last > 0
        self.current = None

    @rule()
    def delete_softly(self) -> None:
        deleted = self.secrets.delete(KEY, purge_after=WEEK)
        assert deleted == (self.current is not None)
        if self.current is None:
            self.session.rollback()
            return
        self.adopt()
        number, *rest = self.current
        assert number is not None
        if self.deleted is not None:
            self.old[self.deleted[0]] = (self.deleted[1], self.deleted[2])
        self.deleted, self.current = (number, rest[0], rest[1]), None

    @rule()
    def undelete(self) -> None:
        try:
            self.secrets.undelete(KEY)
        except SecretNotFoundError:
            self.session.rollback()
            assert self.deleted is None
        except ConflictError:
            self.session.rollback()
            assert self.current is not None
        else:
            self.adopt()
            assert self.current is None
            self.current, self.deleted = self.deleted, None

    @rule()
    def purge(self) -> None:
        self.session.commit()
        purge(self.engine)
        if self.was_plain_deleted and self.current is None and self.deleted is None:
            self.old, self.staged, self.last, self.was_plain_deleted = {}, None, 0, False

    @invariant()
    def answers(self) -> None:
        self.session.commit()
        listed = self.secrets.list(deleted=True)
        if self.current is None:
            assert self.secrets.get(KEY) is None
            assert [info.deleted_at is not None for info in listed] == [True][: bool(self.deleted)]
        else:
            assert self.secrets.require(KEY) == self.current[1]
            (info,) = listed
            assert (info.number, info.expires_at) == (self.current[0], self.current[2])
            for number, (value, _) in self.old.items():
                assert self.secrets.require(KEY, version=number) == value
            if self.old:
                assert self.secrets.require(KEY, stage="previous") == self.old[max(self.old)][0]
        shown = {version.number for version in self.secrets.versions(KEY)}
        staged = set() if self.staged is None else {self.staged[0]}
        kept = set() if self.current is None else {*self.old, self.current[0]}
        assert shown == kept | staged
        if self.staged is not None:
            assert self.secrets.require(KEY, stage="staged") == self.staged[1]
        self.session.commit()


Model.TestCase.settings = settings(max_examples=60, stateful_step_count=25)
TestModel = Model.TestCase
