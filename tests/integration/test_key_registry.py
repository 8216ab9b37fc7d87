"""The key registry: which key is known, what a process's own keys are worth, and each step."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent import (
    AsyncKeyRegistry,
    ConfigurationError,
    ConflictError,
    KeyInUseError,
    KeyRegistry,
    Keyring,
    KeyStateError,
    LucentError,
    RotationError,
    TamperedError,
    UnknownKeyVersionError,
    WrongKeyError,
    arotate,
    rotate,
)
from sqlalchemy_lucent.keys import _store
from sqlalchemy_lucent.migrations.fence import Fence
from sqlalchemy_lucent.rotation.targets import resolve_targets
from tests.conftest import KEY_1, KEY_2, KEY_3
from tests.frames import texts_in_frames
from tests.integration.test_database_faults import as_another
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
)

LUCENT_KEYS = KeyRegistry.metadata.tables["lucent_keys"]


def actions(own: KeyRegistry) -> list[str]:
    return [f"{receipt.action} {receipt.version}" for receipt in own.receipts()]


# -- registered ------------------------------------------------------------------------------------


def test_the_first_registration_makes_the_keyrings_primary_the_primary(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    assert states(own) == {"v1": "primary", "v2": "registered"}
    assert actions(own) == ["register v1", "register v2"]


def test_a_key_that_values_are_under_is_draining_at_the_first_registration(engine: Engine) -> None:
    create(engine)
    own = registry(engine, V2.adding("v3", KEY_3))
    own.register()
    assert states(own) == {"v2": "primary", "v1": "draining", "v3": "registered"}


def test_registering_again_changes_nothing(engine: Engine) -> None:
    create(engine)
    own = registry(engine)
    before = own.register()
    assert own.register() == registry(engine, V1).register() == before
    assert len(own.receipts()) == 2


def test_a_new_key_is_registered_beside_those_that_are_there(engine: Engine) -> None:
    create(engine)
    registry(engine, V1).register()
    own = registry(engine, V2)  # its own primary is not the registry's
    own.register()
    assert states(own) == {"v1": "primary", "v2": "registered"}


def test_the_registry_knows_a_key_by_sixteen_bytes_that_are_the_same_everywhere(
    engine: Engine,
) -> None:
    create(engine)
    own = registry(engine, V1)
    (key,) = own.register()
    assert key.check_id == "080f95d803ffa57de29f38a85f5236c9"
    assert V1.check_id("v1").hex() == key.check_id


def test_without_the_tables_everything_but_the_registry_works(engine: Engine) -> None:
    metadata.create_all(engine)
    put(engine, V1, 1)
    assert rotate(engine, metadata, keyring=V2).ok
    own = registry(engine)
    with pytest.raises(ConfigurationError, match=r"op\.create_lucent_keys\(\)"):
        own.register()
    with pytest.raises(ConfigurationError, match="no table lucent_keys"):
        own.receipts()


def test_the_registry_takes_an_engine(engine: Engine) -> None:
    with engine.connect() as connection, pytest.raises(ConfigurationError, match="an Engine"):
        KeyRegistry(connection)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="takes an AsyncEngine, not Engine"):
        AsyncKeyRegistry(engine)  # type: ignore[arg-type]


def test_a_step_that_others_overtake_each_time_ends(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_store, "_PAUSE", 0)
    create(engine)
    attempts = []

    def overtaken(connection: sa.Connection) -> None:
        attempts.append(connection)
        raise IntegrityError("INSERT", None, Exception())

    with pytest.raises(ConflictError, match="the test was not done: other processes kept"):
        _store.Store(engine).step("the test", overtaken)
    assert len(attempts) == 20
    assert registry(engine).register()


# -- check -----------------------------------------------------------------------------------------


def test_a_check_registers_and_finds_nothing_wrong(engine: Engine) -> None:
    create(engine)
    checked = registry(engine).check()
    assert [key.version for key in checked.keys] == ["v1", "v2"]
    assert checked.notes == ()


def test_another_key_under_the_same_version_fails_at_the_check(engine: Engine) -> None:
    create(engine)
    registry(engine).register()
    wrong = Keyring({"v1": KEY_3, "v2": KEY_2}, primary="v1")
    with pytest.raises(WrongKeyError, match="another key under the name 'v1'") as caught:
        registry(engine, wrong).check()
    assert wrong.fingerprint("v1") in str(caught.value)
    for step in ("register", "promote", "fence", "retire", "leaked"):
        arguments = () if step == "register" else ("v1",)
        with pytest.raises(WrongKeyError):
            getattr(registry(engine, wrong), step)(*arguments)
    assert states(registry(engine)) == {"v1": "primary", "v2": "registered"}


def test_a_process_without_the_primary_fails_at_the_check(engine: Engine) -> None:
    create(engine)
    promoted(engine)
    with pytest.raises(UnknownKeyVersionError, match="lacks key version 'v2', the primary"):
        registry(engine, V1).check()


def test_a_process_without_a_version_that_values_need_fails_at_the_check(engine: Engine) -> None:
    create(engine)
    promoted(engine)
    alone = Keyring({"v2": KEY_2})
    with pytest.raises(UnknownKeyVersionError, match=r"values need: 3 in documents\.body"):
        registry(engine, alone).check()
    rotate(engine, metadata, keyring=V2)
    assert registry(engine, alone).check().notes == ()


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"canary": b"v1:\x01\x00\x00\x00\x00"}, "canary was replaced"),
        ({"canary": None}, "canary was replaced"),  # that of v2
        ({"check_id": bytes(16)}, "check id .* is not that of its key"),
    ],
)
def test_a_changed_line_of_the_registry_fails_at_the_check(
    engine: Engine, values: dict[str, Any], fault: str
) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with engine.begin() as connection:
        if values == {"canary": None}:
            other = sa.select(LUCENT_KEYS.c.canary).where(LUCENT_KEYS.c.version == "v2")
            values = {"canary": connection.scalar(other)}
        changed = sa.update(LUCENT_KEYS).where(LUCENT_KEYS.c.version == "v1").values(values)
        connection.execute(changed)
    with pytest.raises(TamperedError, match=fault):
        own.check()


def test_a_process_that_seals_with_a_retired_key_fails_at_the_check(engine: Engine) -> None:
    create(engine)
    rotated(engine).retire("v1")
    with pytest.raises(KeyStateError, match=r"seals with key version 'v1', which is retired"):
        registry(engine, BOTH).check()


def test_a_check_notes_a_missing_fence_and_another_primary(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    (note,) = own.check().notes
    assert note.startswith("this process's primary is 'v1', the registry's 'v2'")
    own.fence("v1")
    assert registry(engine, V2).check().notes == ()
    _drop_fences(engine)
    (note,) = registry(engine, V2).check().notes
    assert "'v1' is fenced, and documents.body has no fence against it: call fence() again" in note
    own.fence("v1")
    assert registry(engine, V2).check().notes == ()


def test_a_check_names_a_fence_that_a_killed_step_left(engine: Engine) -> None:
    create(engine)
    rotated(engine)
    own = registry(engine, V2)
    for target in resolve_targets(metadata, engine):
        Fence(target, "v1").add(engine)
    (note,) = own.check().notes
    assert "'v1' is draining, and documents.body has a fence against it" in note
    own.unfence("v1")
    assert own.check().notes == ()
    put(engine, V1, 50)
    assert rotate(engine, metadata, keyring=V2).ok
    for target in resolve_targets(metadata, engine):
        Fence(target, "v1").add(engine)
    assert own.fence("v1").state == "fenced"
    assert own.check().notes == ()


def _drop_fences(engine: Engine) -> None:
    """Drop the fences as somebody does who knows nothing of the registry."""
    for target in resolve_targets(metadata, engine):
        Fence(target, "v1").drop(engine)


# -- from draining to retired, and back ------------------------------------------------------------


def test_a_key_lives_from_registered_to_retired(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    assert states(own) == {"v1": "draining", "v2": "primary"}
    rotate(engine, metadata, keyring=V2)
    assert own.fence("v1").state == "fenced"
    retired = own.retire("v1")
    assert retired.state == "retired"
    assert retired.fenced_at is not None
    assert retired.retired_at is not None
    assert retired.registered_at < retired.fenced_at < retired.retired_at
    assert actions(own) == [
        *("register v1", "register v2", "ready v2", "promote v2"),
        *("fence v1", "retire v1"),
    ]
    assert own.receipts()[-1].details["counts"] == {"documents.body": {"v2": 3}}
    assert own.receipts()[3].details["counts"] == {"documents.body": {"v1": 3}}


def test_a_retired_version_is_refused_by_the_database(engine: Engine) -> None:
    create(engine)
    rotated(engine).retire("v1")  # fences by itself
    with pytest.raises(DBAPIError):
        put(engine, V1, 10)
    put(engine, V2, 10)


def test_steps_that_were_taken_are_not_taken_again(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    own.retire("v1")
    lines = len(own.receipts())
    own.retire("v1")
    own.promote("v2")
    own.register()
    assert len(own.receipts()) == lines


def test_a_fence_waits_for_the_rotation(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    for step in (own.fence, own.retire):
        with pytest.raises(KeyInUseError, match=r"still needed: 3 in documents\.body"):
            step("v1")
    assert states(own) == {"v1": "draining", "v2": "primary"}
    put(engine, V1, 10)  # no fence is left


def test_a_key_that_is_promoted_cannot_be_ended(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    for step in (own.fence, own.retire):
        with pytest.raises(KeyStateError, match="'v2' is the primary"):
            step("v2")


def test_unfence_has_the_database_take_the_version_again(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    own.fence("v1")
    assert own.unfence("v1").state == "draining"
    put(engine, V1, 10)
    assert own.unfence("v1").state == "draining"  # twice is once
    assert actions(own)[-2:] == ["fence v1", "unfence v1"]


def test_unretire_brings_a_key_back_for_a_restored_backup(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    own.retire("v1")
    with pytest.raises(KeyStateError, match=r"unretire\(\) brings it back"):
        own.unfence("v1")
    with pytest.raises(KeyStateError, match="retired and cannot be promoted"):
        own.promote("v1")
    back = own.unretire("v1")
    assert (back.state, back.retired_at) == ("draining", None)
    put(engine, V1, 10)  # what the backup has
    assert rotate(engine, metadata, keyring=V2).ok
    own.retire("v1")
    assert actions(own)[-3:] == ["retire v1", "unretire v1", "retire v1"]
    assert own.verify_receipts().ok


def test_what_is_not_retired_cannot_be_brought_back(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    with pytest.raises(KeyStateError, match="'v2' is primary, not retired"):
        own.unretire("v2")


@pytest.mark.parametrize(
    "step", ["readiness", "promote", "fence", "unfence", "retire", "unretire", "leaked"]
)
def test_an_unknown_version_is_refused(engine: Engine, step: str) -> None:
    create(engine)
    own = registry(engine)
    own.register()
    with pytest.raises(KeyStateError, match=r"does not know the given version; it has 'v1', 'v2'"):
        getattr(own, step)("v9")
    assert len(own.receipts()) == 2


def test_a_fence_that_one_table_does_not_take_is_on_none(engine: Engine) -> None:
    create(engine)
    other = sa.Table(
        "others",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("note", documents.c.body.type.copy()),
    )
    other.create(engine)
    rotated(engine)
    with engine.begin() as connection:
        connection.execute(sa.insert(other), {"id": 1, "note": {"a": 1}})  # under v1
    both = KeyRegistry(engine, targets=[documents, other], keyring=BOTH)
    with pytest.raises(KeyInUseError, match=r"1 in others\.note"):
        both.retire("v1")
    put(engine, V1, 10)
    other.drop(engine)


def test_a_table_without_the_column_is_refused(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    wrong = sa.Table(
        "documents",
        sa.MetaData(),
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("gone", documents.c.body.type.copy()),
    )
    with pytest.raises(RotationError):
        KeyRegistry(engine, targets=wrong, keyring=BOTH).retire("v1")
    assert states(own)["v1"] == "draining"


# -- who may ---------------------------------------------------------------------------------------


ON_REGISTRY = [
    f"SELECT, INSERT, UPDATE, DELETE ON {name}"
    for name in (*KeyRegistry.metadata.tables, "documents")
]


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_role_that_may_not_alter_the_table_retires_nothing(engine: Engine) -> None:
    create(engine)
    rotated(engine)
    with as_another(engine, *ON_REGISTRY) as other:
        own = registry(other, V2)
        assert own.check().notes == ()
        with pytest.raises(RotationError, match="grant this user ALTER") as caught:
            own.retire("v1")
        assert "MARKER" not in str(caught.value)
        assert states(own)["v1"] == "draining"
    put(engine, V1, 10)


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_role_that_may_only_read_takes_no_step(engine: Engine) -> None:
    create(engine)
    own = rotated(engine)
    grants = [grant.replace(", INSERT, UPDATE, DELETE", "") for grant in ON_REGISTRY]
    with as_another(engine, *grants) as other:
        reader = registry(other, V2)
        assert reader.check().notes == ()  # nothing is new
        assert reader.verify_receipts().ok
        new = registry(other, V2.adding("v3", KEY_3))
        for step in (lambda: reader.leaked("v1"), new.register):
            with pytest.raises(RotationError, match=r"the database ended .* denied"):
                step()
    assert len(own.receipts()) == 4


def test_a_server_that_is_read_only_is_refused(engine: Engine) -> None:
    create(engine)
    registry(engine).register()
    other = sa.create_engine(engine.url)
    read_only = {
        "sqlite": "PRAGMA query_only = ON",
        "postgresql": "SET default_transaction_read_only = on",
        "mysql": "SET SESSION TRANSACTION READ ONLY",
    }[engine.dialect.name]

    @sa.event.listens_for(other, "connect")
    def restrict(connection: Any, _: object) -> None:
        cursor = connection.cursor()
        cursor.execute(read_only)
        connection.commit()

    own = registry(other)
    for work in (own.registered, own.check, own.receipts, lambda: own.retire("v1")):
        with pytest.raises(RotationError, match="Connect to the primary server"):
            work()
    other.dispose()


def test_no_error_of_the_registry_shows_a_key_or_value(engine: Engine) -> None:
    create(engine)
    own = promoted(engine)
    wrong = registry(engine, Keyring({"v1": KEY_3}))
    steps: list[Callable[[], object]] = [
        lambda: own.retire("v1"),
        lambda: own.promote("v9"),
        wrong.check,
        registry(engine, V1).check,
    ]
    for step in steps:
        with pytest.raises(LucentError) as caught:
            step()
        shown = [str(caught.value).encode(), *(data for _, data in texts_in_frames(caught.value))]
        for data in shown:
            assert b"MARKER-plaintext" not in data
            assert not any(key in data for key in (KEY_1, KEY_2, KEY_3))


# -- async -----------------------------------------------------------------------------------------


def test_the_steps_over_an_async_engine(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any],
) -> None:
    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
            await connection.run_sync(KeyRegistry.metadata.create_all)
            await connection.execute(documents.insert(), {"id": 1, "body": {"a": 1}})
        own = AsyncKeyRegistry(engine, targets=metadata, keyring=BOTH)
        assert (await own.check()).notes == ()
        async with own.announce("web", interval=0.05):
            ready = await own.readiness("v2", ["web"])
            assert [holder.kind for holder in ready.holders] == ["web"]
            await own.promote("v2", ["web"])
        assert (await own.readiness("v2")).holders == ()
        with pytest.raises(KeyInUseError):
            await own.retire("v1")
        assert len((await own.leaked("v1")).open) == 1
        assert (await arotate(engine, metadata, keyring=V2)).ok
        assert (await own.fence("v1")).state == "fenced"
        assert (await own.unfence("v1")).state == "draining"
        assert (await own.retire("v1")).state == "retired"
        assert (await own.unretire("v1")).state == "draining"
        proof = await own.verify_receipts()
        assert proof.ok
        assert proof.lines == len(await own.receipts()) == 9
        assert [key.version for key in await own.registered()] == ["v1", "v2"]
        assert [key.version for key in await own.register()] == ["v1", "v2"]
        assert repr(own).startswith("<AsyncKeyRegistry of ")

    run_async(work)


# -- the tables ------------------------------------------------------------------------------------


def migrate(engine: Engine, work: Callable[[Operations], None]) -> None:
    with engine.begin() as connection:
        work(Operations(MigrationContext.configure(connection)))


def test_the_operation_creates_what_the_metadata_has(engine: Engine) -> None:
    migrate(engine, lambda op: op.create_lucent_keys())  # type: ignore[attr-defined]
    with engine.connect() as connection:
        context = MigrationContext.configure(connection)
        assert compare_metadata(context, KeyRegistry.metadata) == []
    metadata.create_all(engine)
    put(engine, V1, 1)
    own = rotated(engine)
    own.retire("v1")
    with engine.connect() as connection:  # and no fence is taken for a change
        both = sa.MetaData()
        for table in (*KeyRegistry.metadata.sorted_tables, documents):
            table.to_metadata(both)
        assert compare_metadata(MigrationContext.configure(connection), both) == []


def test_the_tables_are_not_dropped_while_they_prove_something(engine: Engine) -> None:
    create(engine)
    registry(engine).register()
    with pytest.raises(RotationError, match="lucent_key_receipts holds 2 receipts"):
        migrate(engine, lambda op: op.drop_lucent_keys())  # type: ignore[attr-defined]
    migrate(engine, lambda op: op.drop_lucent_keys(force=True))  # type: ignore[attr-defined]
    assert not sa.inspect(engine).has_table("lucent_keys")
    migrate(engine, lambda op: op.create_lucent_keys())  # type: ignore[attr-defined]
    migrate(engine, lambda op: op.drop_lucent_keys())  # type: ignore[attr-defined]
    assert not sa.inspect(engine).has_table("lucent_key_receipts")


def test_the_operations_undo_each_other() -> None:
    created = lucent_migrations.CreateLucentKeysOp(schema="app")
    dropped = created.reverse()
    assert (dropped.schema, dropped.force) == ("app", False)
    assert dropped.reverse().to_diff_tuple() == created.to_diff_tuple()
