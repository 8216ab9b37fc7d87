"""Operations, renderers and comparators, on a migration context over each database."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import alembic
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.operations import Operations
from alembic.operations.ops import UpgradeOps
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Column, Connection, Engine, Integer, MetaData, String, Table

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent import (
    Bound,
    EncryptedJSON,
    Keyring,
    RotationError,
    set_default_keyring,
    status,
)
from sqlalchemy_lucent.models import secrets_table

ALEMBIC = tuple(int(part) for part in alembic.__version__.split(".")[:2])
comparators = pytest.mark.skipif(
    ALEMBIC < (1, 18), reason="Alembic takes comparators of others from 1.18 on"
)


def users() -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("email", String(50)),
        Column("credentials", EncryptedJSON),
    )


@pytest.fixture
def table(engine: Engine) -> Table:
    """Table ``users`` with three rows under ``v1``."""
    table = users()
    table.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(
            table.insert(),
            [{"id": n, "email": "a@example.com", "credentials": {"n": n}} for n in (1, 2, 3)],
        )
    return table


def migration_context(connection: Connection, **options: Any) -> MigrationContext:
    options = {
        "render_item": lucent_migrations.render_item,
        "autogenerate_plugins": ["alembic.autogenerate.*", "sqlalchemy_lucent.*"],
        **options,
    }
    return MigrationContext.configure(connection, opts=options)


def versions(engine: Engine, table: Table) -> dict[str | None, int]:
    return {row.key_version: row.count for row in status(engine, table).rows}


def read(engine: Engine, table: Table) -> dict[int, Any]:
    with engine.connect() as connection:
        rows = connection.execute(sa.select(table.c.id, table.c.credentials))
        return {row.id: row.credentials for row in rows}


def test_rotate_as_a_typed_function(engine: Engine, table: Table, promoted: Keyring) -> None:
    set_default_keyring(promoted)

    with engine.connect() as connection:
        operations = Operations(migration_context(connection))
        lucent_migrations.rotate_encrypted_column("users", "credentials", operations=operations)

    assert versions(engine, table) == {"v2": 3}
    assert read(engine, table) == {n: {"n": n} for n in (1, 2, 3)}


def test_rotate_inside_batch_alter_table(engine: Engine, table: Table, promoted: Keyring) -> None:
    set_default_keyring(promoted)

    with engine.connect() as connection:
        operations = Operations(migration_context(connection))
        with operations.batch_alter_table("users") as batch:
            batch.rotate_encrypted_column("credentials")  # type: ignore[attr-defined]

    assert versions(engine, table) == {"v2": 3}


def test_the_reverse_of_a_rotation_rotates_to_the_primary_of_its_day(
    engine: Engine, table: Table, promoted: Keyring
) -> None:
    rotation = lucent_migrations.RotateEncryptedColumnOp("users", "credentials")
    for keyring, expected in (
        (promoted, "v2"),
        (promoted, "v2"),
        (promoted.with_primary("v1"), "v1"),
    ):
        set_default_keyring(keyring)
        with engine.connect() as connection:
            Operations(migration_context(connection)).invoke(rotation)
        assert versions(engine, table) == {expected: 3}
        rotation = rotation.reverse()

    set_default_keyring(promoted.with_primary("v2").without("v1"))
    with engine.connect() as connection, pytest.raises(RotationError, match="3 values"):
        Operations(migration_context(connection)).invoke(rotation)


def test_assert_only_fails_while_something_is_left_and_changes_nothing(
    engine: Engine, table: Table, promoted: Keyring
) -> None:
    set_default_keyring(promoted)
    checked = lucent_migrations.RotateEncryptedColumnOp("users", "credentials", assert_only=True)
    with engine.connect() as connection, pytest.raises(RotationError, match="only checks"):
        Operations(migration_context(connection)).invoke(checked)
    assert versions(engine, table) == {"v1": 3}

    with engine.connect() as connection:
        operations = Operations(migration_context(connection))
        lucent_migrations.rotate_encrypted_column("users", "credentials", operations=operations)
        operations.invoke(checked)


def test_create_and_drop_lucent_secrets_under_another_name(engine: Engine) -> None:
    with engine.begin() as connection:
        operations = Operations(migration_context(connection))
        lucent_migrations.create_lucent_secrets("app_secrets", operations=operations)
    assert sa.inspect(engine).has_table("app_secrets")

    with engine.begin() as connection:
        operations = Operations(migration_context(connection))
        lucent_migrations.drop_lucent_secrets("app_secrets", operations=operations)
    assert not sa.inspect(engine).has_table("app_secrets")


# -- autogenerate ----------------------------------------------------------------------------------


def upgrade_code(connection: Connection, metadata: MetaData, **options: Any) -> str:
    context = migration_context(connection, **options)
    migration = produce_migrations(context, metadata)
    assert migration.upgrade_ops is not None
    return render_python_code(
        migration.upgrade_ops,
        render_item=lucent_migrations.render_item,
        migration_context=context,
    )


@comparators
def test_values_under_a_key_that_is_not_primary_give_a_rotation(
    engine: Engine, table: Table, promoted: Keyring
) -> None:
    set_default_keyring(promoted)

    with engine.connect() as connection:
        code = upgrade_code(connection, table.metadata)
        diffs = compare_metadata(migration_context(connection), table.metadata)

    assert "op.rotate_encrypted_column('users', 'credentials')" in code
    assert diffs == [("rotate_encrypted_column", None, "users", "credentials")]


@comparators
def test_the_rotation_names_what_the_column_is_bound_to(engine: Engine, promoted: Keyring) -> None:
    metadata = MetaData()
    secrets_table(metadata, "app_secrets")
    metadata.create_all(engine)
    key = ("tenant", "1", "stripe", "apiKey")
    with engine.begin() as connection:
        connection.execute(
            metadata.tables["app_secrets"].insert(),
            {
                **dict(zip(("scope", "owner_id", "provider", "name"), key, strict=True)),
                "payload": Bound({"a": 1}, row=key),
                "created_at": datetime.now(UTC),
                "updated_at": datetime.now(UTC),
            },
        )
    set_default_keyring(promoted)

    with engine.connect() as connection:
        code = upgrade_code(connection, metadata)

    assert "bound_to=('scope', 'owner_id', 'provider', 'name')" in code


@comparators
@pytest.mark.parametrize("rotated", [True, False])
def test_nothing_is_suggested_where_nothing_is_to_be_done(
    engine: Engine, table: Table, keyring: Keyring, rotated: bool
) -> None:
    if not rotated:
        with engine.begin() as connection:
            connection.execute(table.delete())
        set_default_keyring(None)  # an empty table needs no key

    with engine.connect() as connection:
        assert compare_metadata(migration_context(connection), table.metadata) == []


@comparators
def test_a_rotation_waits_until_the_schema_is_up_to_date(
    engine: Engine, table: Table, promoted: Keyring
) -> None:
    table.append_column(Column("phone", String(20)))
    set_default_keyring(promoted)

    with engine.connect() as connection:
        code = upgrade_code(connection, table.metadata)

    assert "add_column" in code
    assert "rotate" not in code


def test_comparators_are_opt_in(engine: Engine, table: Table, promoted: Keyring) -> None:
    set_default_keyring(promoted)

    with engine.connect() as connection:
        context = migration_context(connection, autogenerate_plugins=["alembic.autogenerate.*"])
        assert compare_metadata(context, table.metadata) == []


def test_a_generated_migration_imports_the_type_and_carries_no_key(
    engine: Engine, keyring: Keyring
) -> None:
    metadata = MetaData()
    Table(
        "accounts",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("token", EncryptedJSON(lazy=True, none_as_null=True)),
        Column("renamed", EncryptedJSON(context="users.credentials")),
    )
    secrets_table(metadata, "app_secrets")

    with engine.connect() as connection:
        context = migration_context(connection)
        migration = produce_migrations(context, metadata)
        assert migration.upgrade_ops is not None
        code = render_python_code(
            migration.upgrade_ops,
            render_item=lucent_migrations.render_item,
            migration_context=context,
        )

    assert "EncryptedJSON(none_as_null=True, lazy=True)" in code
    assert "EncryptedJSON(context='users.credentials')" in code
    assert "sqlalchemy_lucent.types" not in code
    for secret in (bytes(range(32)).hex(), keyring.fingerprint("v1")):
        assert secret not in code


@pytest.mark.parametrize(
    ("operation", "code"),
    [
        (lucent_migrations.CreateLucentSecretsOp(), "op.create_lucent_secrets()"),
        (
            lucent_migrations.CreateLucentSecretsOp("app_secrets", schema="vault"),
            "op.create_lucent_secrets('app_secrets', schema='vault')",
        ),
        (lucent_migrations.DropLucentSecretsOp(), "op.drop_lucent_secrets()"),
        (
            lucent_migrations.RotateEncryptedColumnOp("users", "token", batch_size=50),
            "op.rotate_encrypted_column('users', 'token', batch_size=50)",
        ),
    ],
)
def test_an_operation_renders_as_it_is_called(operation: Any, code: str) -> None:
    rendered = render_python_code(UpgradeOps([operation]))

    assert code in rendered


def test_reverses() -> None:
    create = lucent_migrations.CreateLucentSecretsOp("app_secrets", schema="vault")
    assert isinstance(create.reverse(), lucent_migrations.DropLucentSecretsOp)
    assert create.reverse().reverse().to_diff_tuple() == create.to_diff_tuple()
    rotate = lucent_migrations.RotateEncryptedColumnOp("users", "token")
    assert rotate.reverse().to_diff_tuple() == rotate.to_diff_tuple()


# -- autogenerate: conversions ---------------------------------------------------------------------


def plain_users(type_: Any, **options: Any) -> Table:
    return Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("email", String(50)),
        Column("credentials", type_, **options),
    )


def run_code(connection: Connection, code: str) -> None:
    """Run the body of a generated migration as it is."""
    body = "\n".join(line.strip() for line in code.splitlines())
    names = {"op": Operations(migration_context(connection)), "sa": sa}
    for dialect in ("mysql", "postgresql", "sqlite"):
        names[dialect] = getattr(__import__("sqlalchemy.dialects", fromlist=[dialect]), dialect)
    exec(body, {**names, "EncryptedJSON": EncryptedJSON})


@comparators
@pytest.mark.parametrize(
    "type_",
    [sa.JSON(), sa.Text(), String(500)],
    ids=["json", "text", "varchar"],
)
def test_a_column_that_became_encrypted_is_converted_by_what_is_generated(
    engine: Engine, type_: Any
) -> None:
    plain, sealed = plain_users(type_, nullable=False), users()
    sealed.c.credentials.nullable = False
    plain.metadata.create_all(engine)
    value = {"a": 1} if isinstance(type_, sa.JSON) else '{"a": 1}'
    with engine.begin() as connection:
        connection.execute(plain.insert().values(id=1, credentials=value))

    with engine.connect() as connection:
        context = migration_context(connection)
        script = produce_migrations(context, sealed.metadata)
        diffs = compare_metadata(migration_context(connection), sealed.metadata)
        assert script.upgrade_ops is not None
        assert script.downgrade_ops is not None
        up, down = (
            render_python_code(
                ops, render_item=lucent_migrations.render_item, migration_context=context
            )
            for ops in (script.upgrade_ops, script.downgrade_ops)
        )

    assert "op.encrypt_column('users', 'credentials', existing_type=" in up
    assert "alter_column" not in up
    assert "op.decrypt_column('users', 'credentials', existing_type=" in down
    assert [diff[0] for diff in diffs] == ["encrypt_column"]
    with engine.connect() as connection:
        run_code(connection, up)
    assert read(engine, sealed) == {1: {"a": 1}}
    with engine.connect() as connection:
        assert compare_metadata(migration_context(connection), sealed.metadata) == []
    with engine.connect() as connection:
        run_code(connection, down)
    assert read(engine, plain) == {1: value}


@comparators
def test_other_changes_of_the_column_come_after_its_encryption(engine: Engine) -> None:
    plain, sealed = plain_users(sa.JSON()), users()
    sealed.c.credentials.nullable = False
    plain.metadata.create_all(engine)

    with engine.connect() as connection:
        up = upgrade_code(connection, sealed.metadata)

    assert up.index("op.encrypt_column") < up.index("op.alter_column")
    assert "type_=" not in up
    assert "existing_type=EncryptedJSON()" in up
    assert "nullable=False" in up


@comparators
def test_a_column_that_is_no_longer_encrypted_is_decrypted(engine: Engine, table: Table) -> None:
    with engine.connect() as connection:
        diffs = compare_metadata(migration_context(connection), plain_users(sa.JSON()).metadata)

    assert [diff[0] for diff in diffs] == ["decrypt_column"]


@comparators
def test_values_of_an_earlier_context_give_a_rebinding(engine: Engine, table: Table) -> None:
    renamed = plain_users(EncryptedJSON(context="users.new", accept_contexts=["users.credentials"]))

    with engine.connect() as connection:
        up = upgrade_code(connection, renamed.metadata)

    assert (
        "op.rebind_encrypted_column('users', 'credentials', from_context='users.credentials', "
        "context='users.new')" in up
    )
    with engine.connect() as connection:
        run_code(connection, up)
    with engine.connect() as connection:
        assert compare_metadata(migration_context(connection), renamed.metadata) == []


@comparators
def test_values_of_no_known_context_are_warned_of(
    engine: Engine, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = plain_users(EncryptedJSON(context="users.new"))

    with engine.connect() as connection:
        assert compare_metadata(migration_context(connection), renamed.metadata) == []

    assert "accept_contexts" in caplog.text


@comparators
def test_a_rename_that_would_drop_the_values_is_warned_of(
    engine: Engine, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    renamed = Table(
        "users",
        MetaData(),
        Column("id", Integer, primary_key=True),
        Column("email", String(50)),
        Column("creds", EncryptedJSON),
    )

    with engine.connect() as connection:
        compare_metadata(migration_context(connection), renamed.metadata)

    assert "new_column_name='creds'" in caplog.text
    assert "accept_contexts=['users.credentials']" in caplog.text


@comparators
def test_one_value_of_an_earlier_context_behind_many_others_gives_a_rebinding(
    engine: Engine, table: Table
) -> None:
    renamed = plain_users(EncryptedJSON(context="users.new", accept_contexts=["users.credentials"]))
    last = table.c.id == 3
    with engine.begin() as connection:
        connection.execute(table.delete().where(table.c.id != 3))
        connection.execute(table.update().where(last).values(id=2_000))
        rows = [{"id": n, "credentials": {"n": n}} for n in range(1, 1_500)]
        connection.execute(renamed.insert(), rows)

    with engine.connect() as connection:
        diffs = compare_metadata(migration_context(connection), renamed.metadata)

    assert [diff[0] for diff in diffs] == ["rebind_encrypted_column"]


@comparators
def test_a_table_that_is_renamed_is_warned_of_before_its_values_are_dropped(
    engine: Engine, table: Table, caplog: pytest.LogCaptureFixture
) -> None:
    people = table.to_metadata(MetaData(), name="people")
    Table("others", people.metadata, Column("credentials", sa.Text))

    with engine.connect() as connection:
        compare_metadata(migration_context(connection), people.metadata)

    assert "op.rename_table('users', 'people')" in caplog.text
    assert "accept_contexts=['users.credentials']" in caplog.text
    assert sum("is created and users is dropped" in r.getMessage() for r in caplog.records) == 1


@comparators
@pytest.mark.parametrize("wanted", [True, False])
def test_plain_columns_that_look_like_secrets_are_warned_of_if_wanted(
    engine: Engine, caplog: pytest.LogCaptureFixture, wanted: bool
) -> None:
    metadata = MetaData()
    Table(
        "accounts",
        metadata,
        Column("id", Integer, primary_key=True),
        Column("stripe_api_key", String(50)),
        Column("password", sa.Text),
        Column("password_hash", sa.Text),
        Column("token_count", Integer),
        Column("refresh_token", EncryptedJSON),
    )
    plugins = ["alembic.autogenerate.*", "sqlalchemy_lucent.*"]
    plugins += ["lucent_lint"] if wanted else []

    with engine.connect() as connection:
        context = migration_context(connection, autogenerate_plugins=plugins)
        compare_metadata(context, metadata)

    warned = [r.args[0] for r in caplog.records if "looks like a secret" in r.msg and r.args]  # type: ignore[index]
    assert list(map(str, warned)) == (
        ["accounts.stripe_api_key", "accounts.password"] if wanted else []
    )
