"""Which process has which key: announcements, promotion, and processes that follow the registry."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from sqlalchemy_lucent import (
    AsyncKeyRegistry,
    ConfigurationError,
    EncryptedJSON,
    FollowingKeyring,
    KeyRegistry,
    Keyring,
    KeyStateError,
    RetiredKeyError,
    UnknownKeyVersionError,
    rotate,
    set_default_keyring,
    verify,
)
from tests.conftest import KEY_1, KEY_2, KEY_3
from tests.frames import texts_in_frames
from tests.registries import (
    BOTH,
    V1,
    V2,
    create,
    documents,
    metadata,
    promoted,
    put,
    registry,
    rotated,
    states,
    under,
)

HOLDERS = KeyRegistry.metadata.tables["lucent_key_holders"]
KEYS = KeyRegistry.metadata.tables["lucent_keys"]


def wait_until(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.01)


def grow_old(engine: Engine, seconds: float) -> None:
    """Have every process be seen for the last time so long before."""
    with engine.begin() as connection:
        for id_, seen_at in connection.execute(sa.select(HOLDERS.c.id, HOLDERS.c.seen_at)).all():
            earlier = seen_at - timedelta(seconds=seconds)
            connection.execute(
                sa.update(HOLDERS).where(HOLDERS.c.id == id_).values(seen_at=earlier)
            )


# -- announcements ---------------------------------------------------------------------------------


def test_a_process_is_there_while_it_announces_itself(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with own.announce("web") as announced:
        (holder,) = own.readiness("v2").holders
        assert (holder.id, holder.kind) == (announced.id, "web")
        assert (holder.versions, holder.primary_version) == (("v1", "v2"), "v1")
    assert own.readiness("v2").holders == ()


def test_an_announcement_is_renewed_at_its_interval(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with own.announce("web", interval=0.02):
        (first,) = own.readiness("v2").holders
        wait_until(lambda: own.readiness("v2").holders[0].seen_at > first.seen_at)


def test_an_announcement_says_what_the_process_has_by_now(engine: Engine) -> None:
    create(engine)
    registry(engine).register()
    present = [V1]
    own = KeyRegistry(engine, targets=metadata, keyring=lambda: present[0])
    with own.announce("web", interval=0.02):
        assert not own.readiness("v2").ok
        present[0] = BOTH
        wait_until(lambda: own.readiness("v2").ok)


def test_an_announcement_outlives_a_registry_that_is_out_of_reach(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with own.announce("web", interval=0.02):
        HOLDERS.drop(engine)
        time.sleep(0.1)
        HOLDERS.create(engine)
        wait_until(lambda: own.readiness("v2").holders)


def test_processes_that_ended_without_a_word_are_forgotten(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    own.announce("web", interval=3600).start()
    grow_old(engine, 8 * 24 * 3600)
    with own.announce("worker"), engine.connect() as connection:
        assert connection.execute(sa.select(HOLDERS.c.kind)).scalars().all() == ["worker"]


@pytest.mark.parametrize("kind", ["", "web server", "w" * 65, "wéb", None])
def test_a_kind_that_breaks_the_rule_is_refused(engine: Engine, kind: Any) -> None:
    with pytest.raises(ConfigurationError, match="a kind of process is"):
        registry(engine).announce(kind)


@pytest.mark.parametrize("seconds", [0, -1, True, "30", float("nan")])
def test_seconds_that_are_none_are_refused(engine: Engine, seconds: Any) -> None:
    create(engine)
    own = registry(engine)
    with pytest.raises(ConfigurationError, match="interval= is a number of seconds"):
        own.announce("web", interval=seconds)
    with pytest.raises(ConfigurationError, match="quiet= is a number of seconds"):
        own.promote("v2", quiet=seconds)


# -- promotion -------------------------------------------------------------------------------------


def test_without_any_process_nothing_is_promoted(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with pytest.raises(KeyStateError, match="no process has announced itself lately"):
        own.promote("v2")
    assert states(own) == {"v1": "primary", "v2": "registered"}


def test_each_kind_that_was_named_must_be_there(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with own.announce("web"):
        with pytest.raises(KeyStateError, match="no process of kind 'worker'"):
            own.promote("v2", kinds=["web", "worker"])
        with own.announce("worker"):
            assert own.promote("v2", kinds=["web", "worker"]).state == "primary"


def test_one_process_of_three_that_lacks_the_key_holds_the_promotion_up(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    old = registry(engine, V1)
    with own.announce("web"), own.announce("web"):
        stale = old.announce("worker", interval=3600).start()
        ready = own.readiness("v2", ["web", "worker"])
        assert len(ready.holders) == 3
        assert [holder.id for holder in ready.lacking] == [stale.id]
        assert json.loads(json.dumps(ready.as_dict()))["ok"] is False
        with pytest.raises(KeyStateError, match=r"1 of 3 processes lack .* 'v2': worker"):
            own.promote("v2", kinds=["web"])
        stale.stop()
        assert own.promote("v2", kinds=["web"]).state == "primary"


def test_a_process_with_another_key_of_that_name_lacks_it(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    wrong = registry(engine, V1.adding("v2", KEY_3))
    refused = pytest.raises(KeyStateError, match="1 of 2 processes lack")
    with own.announce("web"), wrong.announce("worker"), refused:
        own.promote("v2")


def test_a_process_that_was_silent_for_long_counts_as_gone(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    registry(engine, V1).announce("worker", interval=3600).start()
    grow_old(engine, 100)
    with own.announce("web"):
        with pytest.raises(KeyStateError, match="1 of 2 processes lack"):
            own.promote("v2", kinds=["web"], quiet=120)
        assert own.promote("v2", kinds=["web"], quiet=90).state == "primary"


def test_who_lacks_the_key_cannot_promote_it(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with own.announce("web"), pytest.raises(UnknownKeyVersionError, match="it is to promote"):
        registry(engine, V1).promote("v2")


def test_a_promotion_can_be_taken_back(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    with own.announce("web"):
        own.promote("v1")
    assert states(own) == {"v1": "primary", "v2": "draining"}
    assert own.verify_receipts().ok


# -- following -------------------------------------------------------------------------------------


def test_one_deployment_is_enough_because_processes_follow_the_registry(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    following = own.following(interval=0.01)
    put(engine, following, 10)  # type: ignore[arg-type]
    assert under(engine, "v1") == 4
    with own.announce("web"):
        own.promote("v2")
    wait_until(lambda: following().primary == "v2")
    put(engine, following, 11)  # type: ignore[arg-type]
    assert under(engine, "v2") == 1
    assert verify(engine, metadata, keyring=following).opened == 5


def test_keyring_following_reads_at_most_every_thirty_seconds(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    statements: list[str] = []
    sa.event.listen(
        engine, "before_cursor_execute", lambda c, cursor, sql, *_: statements.append(sql)
    )
    following = Keyring.following(own)
    first = following()
    read = len(statements)
    assert read > 0
    for _ in range(1000):
        assert following() is first
    assert len(statements) == read


def test_a_keyring_that_follows_is_the_same_object_until_something_changes(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    following = own.following(interval=0.001)
    first = following()
    time.sleep(0.01)
    assert following() is first  # with its subkeys


def test_the_last_known_primary_stays_while_the_registry_is_out_of_reach(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    following = own.following(interval=0.001)
    assert following().primary == "v2"
    KEYS.drop(engine)
    time.sleep(0.01)
    assert following().primary == "v2"
    assert isinstance(following, FollowingKeyring)
    assert following.fault in ("OperationalError", "ProgrammingError")
    fresh = own.following()
    assert fresh().primary == "v1"  # its own: it has never read the registry
    KEYS.create(engine)


def test_a_primary_that_the_process_lacks_stops_sealing_and_not_opening(engine: Engine) -> None:
    create(engine)
    promoted(engine)
    for keyring in (V1, V1.adding("v2", KEY_3)):
        following = KeyRegistry(engine, targets=metadata, keyring=keyring).following()
        set_default_keyring(following)
        with engine.connect() as connection:
            opened = connection.execute(sa.select(documents.c.body)).scalars().all()
            assert opened == [{"token": "MARKER-plaintext"}] * 3
        refused = pytest.raises(ConfigurationError, match="opened, and none is sealed")
        with refused as caught, engine.connect() as connection:
            connection.execute(documents.insert(), {"id": 9, "body": {"token": "MARKER"}})
        for data in [str(caught.value).encode(), *(d for _, d in texts_in_frames(caught.value))]:
            assert b"MARKER" not in data


def test_a_limit_above_the_registrys_primary_stops_sealing(engine: Engine) -> None:
    create(engine)
    registry(engine).register()
    own = KeyRegistry(engine, targets=metadata, keyring=V2.with_oldest("v2"))
    set_default_keyring(own.following())
    refused = pytest.raises(ConfigurationError, match="older than 'v2'")
    with refused, engine.connect() as connection:
        connection.execute(documents.insert(), {"id": 9, "body": {"a": 1}})


def test_nothing_opens_under_a_retired_key_until_it_is_brought_back(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    set_default_keyring(V1)
    with engine.connect() as connection:
        connection.execute(documents.insert(), {"id": 9, "body": {"a": 1}})
        copied = connection.exec_driver_sql("SELECT body FROM documents WHERE id = 9").scalar()
        connection.rollback()
    assert copied is not None
    own.retire("v1")
    following = own.following(interval=0.001)
    keys = following().for_context("documents.body")
    with pytest.raises(RetiredKeyError, match=r"'v1', which the key registry .* unretire\(\)"):
        keys.open(copied)
    own.unretire("v1")
    wait_until(lambda: following().for_context("documents.body") is not keys)
    assert following().for_context("documents.body").open(copied) == b'{"a":1}'


def test_keys_that_a_function_gives_later_are_followed_too(engine: Engine) -> None:
    create(engine)
    promoted(engine)
    present = [V1]
    own = KeyRegistry(engine, targets=metadata, keyring=lambda: present[0])
    following = own.following(interval=0.001)
    assert following().primary == "v1"
    present[0] = BOTH
    wait_until(lambda: following().primary == "v2")


def test_threads_may_follow_at_once(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    following = own.following()
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(following().primary)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(found) <= {"v1", "v2"}
    assert following().primary == "v2"


def test_a_memory_database_cannot_be_followed() -> None:
    memory = sa.create_engine("sqlite://")
    with pytest.raises(ConfigurationError, match="SQLite memory database"):
        Keyring.following(KeyRegistry(memory, keyring=V1))


def test_a_keyring_that_follows_shows_no_key(engine: Engine) -> None:
    shown = repr(registry(engine).following())
    assert shown.startswith("<FollowingKeyring <Keyring primary=v1")
    for key in (KEY_1, KEY_2):
        assert key.hex() not in shown


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"
    id: Mapped[int] = mapped_column(primary_key=True)
    body: Mapped[Any] = mapped_column(EncryptedJSON)


def test_async_sessions_follow_the_registry(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.run_sync(KeyRegistry.metadata.create_all)
        own = AsyncKeyRegistry(engine, targets=Base, keyring=BOTH)
        await own.register()
        async with own.announce("web", interval=0.01):
            await own.promote("v2")
        following = Keyring.following(own)
        assert following().primary == "v1"  # nothing can be awaited here, so nothing is read
        set_default_keyring(following)
        async with AsyncSession(engine) as session:
            session.add(Note(id=1, body={"a": 1}))
            await session.commit()
            note = await session.get_one(Note, 1, populate_existing=True)
            assert note.body == {"a": 1}
            version = await session.scalar(sa.select(Note.body.key_version))
            assert version == "v2"
        async with engine.begin() as connection:
            await connection.run_sync(KeyRegistry.metadata.drop_all)
            await connection.run_sync(Base.metadata.drop_all)

    run_async(work)


def test_a_rotation_follows_the_registry(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    assert rotate(engine, metadata, keyring=own.following()).key_version == "v2"
    assert under(engine, "v1") == 0
