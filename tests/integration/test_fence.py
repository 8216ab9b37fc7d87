"""The fence: the database refuses values under a key version that was rotated away."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Engine, Integer, MetaData, String, Table
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session
from sqlalchemy.schema import CreateSchema, DropSchema

from sqlalchemy_lucent import (
    EncryptedJSON,
    InvalidKeyError,
    KeyInUseError,
    Keyring,
    LucentBase,
    LucentSecrets,
    RotationError,
    rotate,
    set_default_keyring,
)
from sqlalchemy_lucent import migrations as lucent_migrations
from sqlalchemy_lucent.migrations import FenceKeyVersionOp
from sqlalchemy_lucent.migrations.fence import Fence
from sqlalchemy_lucent.rotation.targets import TargetTable, resolve_targets
from tests.conftest import LONG
from tests.databases import create_unguarded
from tests.integration.test_database_faults import as_another
from tests.integration.test_migrations_generated import Project
from tests.integration.test_sealed_check import Operate, every_text, insert_raw, needs_comparators

VALUE = {"token": "MARKER-plaintext"}


def users(*names: str, table: str = "users", schema: str | None = None) -> Table:
    """A table with sealed columns."""
    return Table(
        table,
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("email", String(50)),
        *(Column(name, EncryptedJSON()) for name in names or ("creds",)),
        schema=schema,
    )


@pytest.fixture
def operate(engine: Engine) -> Operate:
    return Operate(engine)


def target_of(table: Table, bind: Engine) -> TargetTable:
    (target,) = resolve_targets(table, bind)
    return target


def fence_of(table: Table, engine: Engine, version: str = "v1", **options: Any) -> Fence:
    return Fence(target_of(table, engine), version, **options)


def put(engine: Engine, table: Table, keyring: Keyring, **values: Any) -> None:
    """Insert a row as a process with that keyring does."""
    set_default_keyring(keyring)
    with engine.begin() as connection:
        connection.execute(table.insert(), values or {"creds": VALUE})


def refuses(engine: Engine, table: Table, keyring: Keyring, column: str = "creds") -> bool:
    """Whether the database refuses an insert and an update by a process with that keyring."""
    set_default_keyring(keyring)
    refused = []
    for statement in (table.insert(), table.update()):
        try:
            with engine.begin() as connection:
                connection.execute(table.insert(), {"email": "x"})
                connection.execute(statement, {column: VALUE})
                connection.rollback()
        except DBAPIError:
            refused.append(True)
        else:
            refused.append(False)
    assert refused in ([True, True], [False, False])
    return refused[0]


def test_it_refuses_the_old_version_and_takes_the_new_one(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, promoted)
    fence = fence_of(table, engine)
    assert not fence.exists(engine)
    fence.add(engine)
    assert fence.exists(engine)
    assert not fence_of(table, engine, "v2").exists(engine)
    fence.validate(engine)
    fence.validate(engine)
    fence.add(engine)
    assert refuses(engine, table, keyring)
    assert not refuses(engine, table, promoted)
    fence.drop(engine)
    fence.drop(engine)
    assert not fence.exists(engine)
    assert not refuses(engine, table, keyring)


@pytest.mark.parametrize("version", ["v1", "V1", "v", "v1.0", "a" * 32, "-._-"])
def test_it_refuses_this_version_and_no_other(engine: Engine, version: str) -> None:
    table = users()
    table.create(engine)
    fence_of(table, engine, version).add(engine)
    others = {"v1", "V1", "v", "v10", "v1.0", "xv1", "a" * 31, "a" * 32, "-._-"}
    refused = {name for name in others if refuses(engine, table, Keyring({name: bytes(range(32))}))}
    assert refused == {version}


def test_null_is_taken_and_text_on_sqlite_is_not(engine: Engine) -> None:
    table = users()
    Table(
        "users",
        MetaData(),
        *(column._copy() for column in table.c if column.name != "creds"),
        Column("creds", EncryptedJSON(create_constraint=False)),
    ).create(engine)
    fence_of(table, engine).add(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO users (id) VALUES (1)"))
        connection.execute(sa.text("UPDATE users SET creds = NULL"))
    values: list[Any] = [b"v1:", b"v1:\x01", b"v1:\x02later", b"v1:{}"]
    if engine.dialect.name == "sqlite":
        values += ["v1:", "v1:\x01text"]
    for value in values:
        for sql in ("UPDATE users SET creds = :v", "INSERT INTO users (id, creds) VALUES (2, :v)"):
            with engine.begin() as connection, pytest.raises(DBAPIError):
                connection.execute(sa.text(sql), {"v": value})
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE users SET creds = :v"), {"v": b"v1"})
    fence_of(table, engine).validate(engine)


def test_an_upsert_is_refused_as_well(engine: Engine, keyring: Keyring, promoted: Keyring) -> None:
    LucentBase.metadata.create_all(engine)
    (target,) = [each for each in resolve_targets(None, engine) if each.name == "lucent_secrets"]
    Fence(target, "v1").add(engine)
    with Session(engine) as session:
        LucentSecrets(session, keyring=promoted).set("tenant:1:google:key", VALUE)
        session.commit()
        with pytest.raises(DBAPIError):
            LucentSecrets(session, keyring=keyring).set("tenant:1:google:key", {"a": 1})
        session.rollback()
        assert LucentSecrets(session, keyring=promoted).get("tenant:1:google:key") == VALUE


def test_its_error_shows_no_value(engine: Engine, keyring: Keyring) -> None:
    table = users()
    table.create(engine)
    fence_of(table, engine).add(engine)
    with engine.begin() as connection, pytest.raises(DBAPIError) as refused:
        connection.execute(table.insert(), {"creds": VALUE})
    said = " ".join(every_text(refused.value))
    assert "MARKER" not in said
    assert "v1" in str(refused.value.orig)


# -- values that are left --------------------------------------------------------------------------


def test_values_that_are_left_keep_it_from_being_added(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    table = users("creds", "tokens")
    table.create(engine)
    put(engine, table, keyring, tokens=VALUE)
    put(engine, table, promoted, creds=VALUE)
    fence = fence_of(table, engine)
    with pytest.raises(KeyInUseError, match=r"1 in users\.tokens"):
        fence.add(engine)
    assert not any(Fence(each, "v1").exists(engine) for each in parts(fence.target))
    assert not refuses(engine, table, keyring)
    assert rotate(engine, table, keyring=promoted).ok
    fence.add(engine)
    fence.validate(engine)
    assert refuses(engine, table, keyring, "creds")
    assert refuses(engine, table, keyring, "tokens")


def parts(target: TargetTable) -> list[TargetTable]:
    return [replace(target, columns=(column,)) for column in target.columns]


def test_a_column_that_was_fenced_before_the_others_stays_so(
    engine: Engine, keyring: Keyring
) -> None:
    table = users("creds", "tokens")
    table.create(engine)
    fence = fence_of(table, engine)
    one, other = (Fence(each, "v1") for each in parts(fence.target))
    other.add(engine)
    assert not fence.exists(engine)
    with pytest.raises(RotationError, match=r"users\.creds has no fence"):
        fence.validate(engine)
    assert other.exists(engine)
    fence.add(engine)
    fence.validate(engine)
    one.drop(engine)
    assert other.exists(engine)
    fence.drop(engine)
    assert not other.exists(engine)


@contextmanager
def open_write(engine: Engine, table: Table, keyring: Keyring) -> Iterator[sa.Connection]:
    """A transaction of a process with that keyring that has written and not committed."""
    set_default_keyring(keyring)
    with engine.connect() as connection:
        connection.execute(table.insert(), {"creds": VALUE})
        yield connection


def test_a_writer_with_an_open_value_is_waited_for_and_its_value_found(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, promoted)
    fence = fence_of(table, engine)
    with open_write(engine, table, keyring) as writer:
        adding = threading.Thread(target=fence.add, args=(engine,))
        adding.start()
        time.sleep(1.5)  # the first attempt gives up meanwhile
        assert adding.is_alive()
        writer.commit()
        adding.join()
    assert fence.exists(engine)
    with pytest.raises(KeyInUseError, match=r"1 in users\.creds.*dropped again"):
        fence.validate(engine)
    assert not fence.exists(engine)
    assert rotate(engine, table, keyring=promoted).ok
    fence.add(engine)
    fence.validate(engine)
    assert refuses(engine, table, keyring)


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_how_long_it_waits_and_how_often_it_tries_can_be_said(
    engine: Engine, operate: Operate, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, promoted)
    set_default_keyring(promoted)
    attempts: list[str] = []

    @sa.event.listens_for(engine, "before_cursor_execute")
    def note(*arguments: Any) -> None:
        if "lock_timeout = 1100" in arguments[2] or "lock_wait_timeout = 2" in arguments[2]:
            attempts.append(arguments[2])

    def fence(op: Operations) -> None:
        lucent_migrations.fence_key_version(
            "users", "creds", "v1", lock_timeout=1.1, retries=0, operations=op
        )

    with open_write(engine, table, promoted):
        with pytest.raises(RotationError, match="the database ended the work on the fence"):
            fence_of(table, engine, lock_timeout=0.05, retries=1).add(engine)
        with pytest.raises(RotationError, match="the database ended the work on the fence"):
            operate(fence)
        assert len(attempts) == 1
    operate(fence)
    operate(lambda op: op.invoke(FenceKeyVersionOp("users", "creds", "v1", retries=1).reverse()))
    assert not fence_of(table, engine).exists(engine)


@pytest.mark.parametrize(
    "options",
    [
        *({"lock_timeout": wrong} for wrong in (0, -1, True, "1", None, float("nan"), 1e300)),
        *({"retries": wrong} for wrong in (-1, 1.5, True, None, "2")),
    ],
    ids=str,
)
def test_a_wait_that_is_none_is_refused(options: dict[str, Any]) -> None:
    engine = sa.create_engine("sqlite://")
    with pytest.raises(RotationError, match=next(iter(options))):
        fence_of(users(), engine, **options)


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_nobody_queues_behind_it_for_long(
    engine: Engine, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    fence = fence_of(table, engine)
    timeout = "SET lock_timeout = '10s'"
    if engine.dialect.name == "mysql":
        timeout = "SET SESSION lock_wait_timeout = 10"
    with open_write(engine, table, keyring) as writer:
        adding = threading.Thread(target=fence.add, args=(engine,))
        adding.start()
        for _ in range(3):
            time.sleep(0.5)
            with engine.connect() as reader:  # would wait for the writer to end
                reader.exec_driver_sql(timeout)
                assert reader.execute(sa.select(table.c.id)).all() == []
        assert adding.is_alive()
        writer.rollback()
        adding.join()
    fence.validate(engine)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not LONG, reason="it tries for half a minute: for `make test-long`")
def test_it_gives_up_with_a_sentence(engine: Engine, keyring: Keyring) -> None:
    table = users()
    table.create(engine)
    fence = fence_of(table, engine)
    own = sa.create_engine(
        engine.url, connect_args={"timeout": 0.1} if engine.dialect.name == "sqlite" else {}
    )
    with (
        open_write(engine, table, keyring),
        pytest.raises(RotationError, match=r"fence of users .*'v1'.*Run it again to go on"),
    ):
        fence.add(own)
    own.dispose()
    assert not fence.exists(engine)


def test_values_that_only_begin_like_it_are_told_on_postgresql(engine: Engine) -> None:
    table = users()
    create_unguarded(table.metadata, engine)
    with engine.begin() as connection:
        connection.execute(sa.text("INSERT INTO users (creds) VALUES (:v)"), {"v": b"v1:{}"})
    fence = fence_of(table, engine)
    fence.add(engine)
    if engine.dialect.name == "postgresql":
        with pytest.raises(RotationError, match=r"'v1:' and are not sealed.*verify\(\)"):
            fence.validate(engine)
        assert not fence.exists(engine)
    else:
        fence.validate(engine)


# -- names -----------------------------------------------------------------------------------------

ODD = ["Select", 'a "b" 100%', "ö:x", "c" * 60, "c" * 59 + "d"]


def test_odd_and_long_names_are_found_again(engine: Engine, keyring: Keyring) -> None:
    table = users(*ODD, table="Order %s:by")
    table.create(engine)
    fence = fence_of(table, engine)
    more = fence_of(table, engine, "v" * 32)
    for each in (fence, more):
        each.add(engine)
        each.validate(engine)
        assert each.exists(engine)
    for name in ODD:
        assert len(fence.name_of(name).encode()) <= 63
        assert refuses(engine, table, keyring, name)
    assert len({each.name_of(name) for each in (fence, more) for name in ODD}) == 2 * len(ODD)
    fence.drop(engine)
    assert not fence.exists(engine)
    assert more.exists(engine)
    assert not refuses(engine, table, keyring, ODD[0])


def test_it_follows_a_renamed_table_and_column(engine: Engine, keyring: Keyring) -> None:
    users().create(engine)
    fence_of(users(), engine).add(engine)
    quote = engine.dialect.identifier_preparer.quote
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE users RENAME TO people")
        connection.exec_driver_sql(f"ALTER TABLE people RENAME COLUMN creds TO {quote('my keys')}")
    table = users("my keys", table="people")
    fence = fence_of(table, engine)
    assert fence.exists(engine)
    fence.validate(engine)
    assert refuses(engine, table, keyring, "my keys")
    fence.drop(engine)
    assert not refuses(engine, table, keyring, "my keys")


def test_it_is_in_the_schema_of_the_table(engine: Engine, keyring: Keyring) -> None:
    name = f"lucent_other_{os.getpid()}"
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            connection.exec_driver_sql(f"ATTACH ':memory:' AS {name}")
        else:
            connection.execute(CreateSchema(name))
        connection.commit()
        try:
            here, there, mapped = users(), users(schema=name), users(schema="tenant")
            for table in (here, there):
                table.create(connection)
            connection.commit()
            fence = Fence(resolve_targets(there, connection)[0], "v1")
            fence.add(connection)
            fence.validate(connection)
            assert fence.exists(connection)
            translated = connection.execution_options(schema_translate_map={"tenant": name})
            assert Fence(resolve_targets(mapped, translated)[0], "v1").exists(translated)
            connection.execution_options(schema_translate_map=None)
            assert not Fence(resolve_targets(here, connection)[0], "v1").exists(connection)
            with pytest.raises(DBAPIError):
                connection.execute(there.insert(), {"creds": VALUE})
            connection.rollback()
            connection.execute(here.insert(), {"creds": VALUE})
            connection.rollback()
            fence.drop(connection)
            connection.execute(there.insert(), {"creds": VALUE})
            connection.commit()
        finally:
            if engine.dialect.name == "sqlite":
                connection.exec_driver_sql(f"DETACH {name}")
            else:
                connection.execute(DropSchema(name, cascade=engine.dialect.name == "postgresql"))
            connection.commit()


# -- what cannot be fenced -------------------------------------------------------------------------


@pytest.mark.parametrize("work", ["add", "validate", "drop", "exists"])
def test_what_is_missing_or_no_encrypted_column_is_told(engine: Engine, work: str) -> None:
    run: Callable[[Engine], object] = getattr(fence_of(users(), engine), work)
    with pytest.raises(RotationError, match="not in this database: users"):
        run(engine)
    Table("users", MetaData(), Column("id", Integer, primary_key=True)).create(engine)
    with pytest.raises(RotationError, match="users has no column creds"):
        run(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE users ADD creds TEXT")
    with pytest.raises(RotationError, match=r"users\.creds is a column of the type .*TEXT"):
        run(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE users")
        users(table="beneath").create(connection)
        connection.exec_driver_sql("CREATE VIEW users AS SELECT * FROM beneath")
    try:
        with pytest.raises(RotationError, match="users is a view"):
            run(engine)
    finally:
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP VIEW users")


@pytest.mark.parametrize("version", ["", "v 1", "v1:", "a" * 33, None, 1])
def test_a_version_that_breaks_the_rule_is_refused(engine: Engine, version: Any) -> None:
    with pytest.raises(InvalidKeyError, match="key version"):
        fence_of(users(), engine, version)


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_a_user_that_may_not_alter_the_table_is_told_so(engine: Engine) -> None:
    users().create(engine)
    fence = fence_of(users(), engine)
    with as_another(engine, "SELECT, INSERT, UPDATE, DELETE ON users") as other:
        with pytest.raises(RotationError, match=r"Connect as the table's owner, or grant") as told:
            fence.add(other)
        fence.add(engine)
        fence.validate(engine)
        with pytest.raises(RotationError, match=r"Connect as the table's owner, or grant"):
            fence.drop(other)
    assert len(str(told.value).splitlines()) == 1
    assert fence.exists(engine)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_file_that_is_read_only_is_told(engine: Engine) -> None:
    users().create(engine)
    fence = fence_of(users(), engine)
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA query_only = ON")
        connection.rollback()
        with pytest.raises(RotationError, match="read-only"):
            fence.add(connection)
        connection.exec_driver_sql("PRAGMA query_only = OFF")


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_rows_that_are_hidden_are_told(engine: Engine) -> None:
    users().create(engine)
    role = f"lucent_test_fence_{os.getpid()}"
    with engine.connect() as connection:
        for sql in (
            f"CREATE ROLE {role}",
            f"ALTER TABLE users OWNER TO {role}",
            "ALTER TABLE users ENABLE ROW LEVEL SECURITY",
            "ALTER TABLE users FORCE ROW LEVEL SECURITY",
        ):
            connection.exec_driver_sql(sql)
        connection.commit()
        connection.exec_driver_sql(f"SET ROLE {role}")
        connection.commit()
        with pytest.raises(RotationError, match="row-level security"):
            fence_of(users(), engine).add(connection)
        connection.exec_driver_sql("RESET ROLE")
        connection.exec_driver_sql("DROP TABLE users")
        connection.exec_driver_sql(f"DROP ROLE {role}")
        connection.commit()


def test_a_connection_that_is_in_a_transaction_is_refused(engine: Engine) -> None:
    users().create(engine)
    fence = fence_of(users(), engine)
    with engine.connect() as connection:
        connection.execute(users().insert(), {"email": "x"})
        with pytest.raises(RotationError, match="inside a transaction"):
            fence.add(connection)


def test_a_settings_of_the_session_are_given_back(engine: Engine) -> None:
    users().create(engine)
    fence = fence_of(users(), engine)
    shown = {
        "sqlite": "PRAGMA busy_timeout",
        "postgresql": "SHOW lock_timeout",
        "mysql": "SELECT @@SESSION.lock_wait_timeout",
    }[engine.dialect.name]
    with engine.connect() as connection:
        before = connection.exec_driver_sql(shown).scalar()
        connection.commit()
        fence.add(connection)
        fence.drop(connection)
        assert connection.exec_driver_sql(shown).scalar() == before


# -- the operations --------------------------------------------------------------------------------


def test_the_operations_add_and_drop_it(
    engine: Engine, operate: Operate, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, keyring)
    set_default_keyring(promoted)
    with pytest.raises(KeyInUseError, match=r"1 in users\.creds"):
        operate(fence_v1)
    assert rotate(engine, table, keyring=promoted).ok
    operate(fence_v1)
    operate(fence_v1)
    if engine.dialect.name == "postgresql":
        checks = sa.inspect(engine).get_check_constraints("users")
        assert not any(each.get("dialect_options", {}).get("not_valid") for each in checks)
    assert refuses(engine, table, keyring)
    operate(unfence_v1)
    operate(unfence_v1)
    assert not refuses(engine, table, keyring)

    def in_batch(op: Operations) -> None:
        with op.batch_alter_table("users") as batch:
            method: Any = batch
            method.fence_key_version("creds", "v1")

    set_default_keyring(promoted)
    operate(in_batch)
    assert fence_of(table, engine).exists(engine)


def fence_v1(op: Operations) -> None:
    lucent_migrations.fence_key_version("users", "creds", "v1", operations=op)


def unfence_v1(op: Operations) -> None:
    lucent_migrations.unfence_key_version("users", "creds", "v1", operations=op)


def test_the_primary_is_not_fenced_and_no_key_is_needed(
    engine: Engine, operate: Operate, monkeypatch: pytest.MonkeyPatch
) -> None:
    users().create(engine)
    with pytest.raises(RotationError, match="'v1' is the primary"):
        operate(fence_v1)
    assert not fence_of(users(), engine).exists(engine)
    for name in list(os.environ):
        if name.startswith("LUCENT_"):
            monkeypatch.delenv(name)
    set_default_keyring(None)
    operate(fence_v1)
    assert fence_of(users(), engine).exists(engine)


def test_it_was_killed_between_its_two_steps_and_goes_on(
    engine: Engine, operate: Operate, promoted: Keyring
) -> None:
    users().create(engine)
    put(engine, users(), promoted)
    fence_of(users(), engine).add(engine)
    operate(fence_v1)
    fence_of(users(), engine).validate(engine)


@pytest.mark.parametrize("dialect", ["postgresql", "mysql", "mariadb"])
def test_it_is_written_as_sql(dialect: str) -> None:
    written = offline(dialect, fence_v1)
    assert "ALTER TABLE users ADD CONSTRAINT lucent_fence_v1_users_creds CHECK" in written
    assert "76313a" in written
    assert "NOT VALID" not in written
    dropped = offline(dialect, unfence_v1)
    assert "lucent_fence_v1_users_creds" in dropped
    assert "DROP" in dropped


@pytest.mark.parametrize("work", [fence_v1, unfence_v1])
def test_it_is_not_written_as_sql_for_sqlite(work: Callable[[Operations], None]) -> None:
    with pytest.raises(RotationError, match=r"--sql.*triggers"):
        offline("sqlite", work)


def offline(dialect: str, work: Callable[[Operations], None]) -> str:
    written = io.StringIO()
    options = {"as_sql": True, "output_buffer": written, "target_metadata": MetaData()}
    work(Operations(MigrationContext.configure(dialect_name=dialect, opts=options)))
    return written.getvalue()


@pytest.mark.parametrize("url", ["postgresql", "mysql"], indirect=True)
def test_what_was_written_as_sql_is_found(engine: Engine, keyring: Keyring) -> None:
    table = users()
    table.create(engine)
    dialect = "mariadb" if engine.dialect.name == "mysql" else engine.dialect.name
    fence = fence_of(table, engine)
    for work, expected in ((fence_v1, True), (unfence_v1, False)):
        with engine.begin() as connection:
            connection.exec_driver_sql(offline(dialect, work).strip().rstrip(";"))
        assert fence.exists(engine) is expected
        assert refuses(engine, table, keyring) is expected
    put(engine, table, keyring)
    with engine.begin() as connection, pytest.raises(DBAPIError):
        connection.exec_driver_sql(offline(dialect, fence_v1).strip().rstrip(";"))


# -- changes of the table --------------------------------------------------------------------------


@needs_comparators
@pytest.mark.parametrize("batch", [False, True], ids=["", "batch"])
def test_autogenerate_does_not_see_it(engine: Engine, tmp_path: Path, batch: bool) -> None:
    own = sa.create_engine(engine.url, poolclass=sa.pool.NullPool)
    project = Project(tmp_path, own, batch=batch)
    metadata = users().metadata
    project.up(metadata)
    fence_of(users(), own).add(own)
    fence_of(users(), own).validate(own)
    assert compared(own, metadata) == []
    wider = users("creds", "more").metadata
    if batch and engine.dialect.name == "sqlite":
        with pytest.raises(RotationError, match="lose its fence"):
            project.up(wider)
    else:
        project.up(wider)
    assert fence_of(users(), own).exists(own)
    own.dispose()


def compared(engine: Engine, metadata: MetaData) -> list[Any]:
    """What `alembic check` would find."""
    options = {"autogenerate_plugins": ["alembic.autogenerate.*", "sqlalchemy_lucent.*"]}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        return [
            diff
            for diff in compare_metadata(context, metadata)
            if "alembic_version" not in repr(diff)
        ]


def test_a_conversion_of_the_column_names_it_and_changes_nothing(
    engine: Engine, operate: Operate, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, promoted)
    fence_of(table, engine).add(engine)

    def decrypt(op: Operations) -> None:
        lucent_migrations.decrypt_column("users", "creds", existing_type=sa.JSON(), operations=op)

    with pytest.raises(RotationError, match=r"lucent_fence_v1_users_creds.*Drop these"):
        operate(decrypt)
    assert fence_of(table, engine).exists(engine)
    operate(unfence_v1)
    operate(decrypt)
    with engine.connect() as connection:
        assert connection.scalars(sa.select(users_plain().c.creds)).all() == [VALUE]


def users_plain() -> Table:
    return Table("users", MetaData(), Column("creds", sa.JSON()))


def alter_in_batch(op: Operations) -> None:
    with op.batch_alter_table("users") as batch:
        batch.alter_column("email", existing_type=String(50), type_=String(60))


def drop_in_batch(op: Operations) -> None:
    with op.batch_alter_table("users") as batch:
        batch.drop_column("email")


def constrain_in_batch(op: Operations) -> None:
    with op.batch_alter_table("users") as batch:
        batch.create_unique_constraint("one", ["email"])


def add_to_a_copy(op: Operations) -> None:
    with op.batch_alter_table("USERS", recreate="always") as batch:
        batch.add_column(Column("more", String(9)), insert_after="id")


def index_a_copy(op: Operations) -> None:
    with op.batch_alter_table("users", recreate="always") as batch:
        batch.create_index("by_email", ["email"])


only_sqlite = pytest.mark.parametrize("url", ["sqlite"], indirect=True)


@only_sqlite
@pytest.mark.parametrize("change", [drop_in_batch, constrain_in_batch, add_to_a_copy, index_a_copy])
def test_no_kind_of_copy_loses_it(
    engine: Engine, operate: Operate, keyring: Keyring, change: Callable[[Operations], None]
) -> None:
    table = users()
    table.create(engine)
    fence_of(table, engine).add(engine)

    def in_place(op: Operations) -> None:
        with op.batch_alter_table("users") as batch:
            batch.add_column(Column("note", String(9)))
            batch.create_index("by_note", ["note"])

    before = sa.inspect(engine).get_columns("users")
    with pytest.raises(RotationError, match="lose its fence"):
        operate(change)
    assert sa.inspect(engine).get_table_names() == ["users"]
    assert str(sa.inspect(engine).get_columns("users")) == str(before)
    operate(in_place)
    assert refuses(engine, table, keyring)


@only_sqlite
def test_a_copy_of_another_table_is_made(engine: Engine, operate: Operate) -> None:
    users().create(engine)
    fence_of(users(), engine).add(engine)
    Table("notes", MetaData(), Column("id", sa.Integer, primary_key=True)).create(engine)

    def change(op: Operations) -> None:
        with op.batch_alter_table("notes", recreate="always") as batch:
            batch.add_column(Column("more", String(9)))

    operate(change)
    assert [each["name"] for each in sa.inspect(engine).get_columns("notes")] == ["id", "more"]


def test_a_copy_of_the_table_does_not_lose_it(
    engine: Engine, operate: Operate, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    table.create(engine)
    put(engine, table, promoted)
    fence_of(table, engine).add(engine)

    change = alter_in_batch
    if engine.dialect.name == "sqlite":
        with pytest.raises(
            RotationError, match=r"lose its fence, the trigger lucent_fence_v1_users_creds"
        ):
            operate(change)
        assert sa.inspect(engine).get_table_names() == ["users"]
        assert fence_of(table, engine).exists(engine)
        operate(unfence_v1)
        operate(change)
        operate(fence_v1)
    else:
        operate(change)
    assert refuses(engine, table, keyring)
    set_default_keyring(promoted)
    with engine.connect() as connection:
        assert connection.scalars(sa.select(table.c.creds)).all() == [VALUE]


def test_the_sealed_check_and_the_fence_do_not_take_each_other_for_themselves(
    engine: Engine, operate: Operate, keyring: Keyring, promoted: Keyring
) -> None:
    table = users()
    create_unguarded(table.metadata, engine)
    fence = fence_of(table, engine)
    fence.add(engine)
    add = partial(lucent_migrations.create_sealed_check, "users", "creds")
    drop = partial(lucent_migrations.drop_sealed_check, "users", "creds")
    if engine.dialect.name == "sqlite":  # it would copy the table
        with pytest.raises(RotationError, match="lose its fence"):
            operate(lambda op: add(operations=op))
    else:
        operate(lambda op: add(operations=op))
        fence.drop(engine)
        with pytest.raises(DBAPIError):
            insert_raw(engine, b"plaintext")
        fence.add(engine)
        operate(lambda op: drop(operations=op))
    assert fence.exists(engine)
    assert refuses(engine, table, keyring)


def test_a_dropped_column_or_table_takes_it_along(engine: Engine, operate: Operate) -> None:
    table = users("creds", "tokens")
    table.create(engine)
    fence = fence_of(table, engine)
    fence.add(engine)
    if engine.dialect.name == "sqlite":
        with pytest.raises(DBAPIError, match="lucent_fence_v1_users_tokens"):
            operate(lambda op: op.drop_column("users", "tokens"))
        operate(
            lambda op: lucent_migrations.unfence_key_version("users", "tokens", "v1", operations=op)
        )
        operate(lambda op: op.drop_column("users", "tokens"))
    else:
        operate(lambda op: op.drop_column("users", "tokens"))
    assert fence_of(users(), engine).exists(engine)
    operate(lambda op: op.drop_table("users"))
    users().create(engine)
    assert not fence_of(users(), engine).exists(engine)


# -- async -----------------------------------------------------------------------------------------


def test_it_works_over_an_async_engine(
    run_async: Callable[[Callable[[AsyncEngine], Awaitable[Any]]], Any], keyring: Keyring
) -> None:
    table = users()

    async def work(engine: AsyncEngine) -> None:
        async with engine.begin() as connection:
            await connection.run_sync(table.create)
        async with engine.connect() as connection:

            def run(sync: sa.Connection) -> bool:
                fence = Fence(resolve_targets(table, sync)[0], "v1")
                fence.add(sync)
                fence.validate(sync)
                return fence.exists(sync)

            assert await connection.run_sync(run)
        with pytest.raises(DBAPIError):
            async with engine.begin() as connection:
                await connection.execute(table.insert(), {"creds": VALUE})

    run_async(work)
