"""The migration that creates the tables of versions and states, and the one that drops them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata, produce_migrations, render_python_code
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Engine
from sqlalchemy.orm import DeclarativeBase, Session

import sqlalchemy_lucent.migrations as lucent_migrations
from sqlalchemy_lucent import (
    LucentBase,
    LucentSecretMixin,
    LucentSecrets,
    RotationError,
    retire_check,
    rotate,
    set_default_keyring,
    status,
    with_lifecycle,
)
from sqlalchemy_lucent.keyring import Keyring
from tests.integration.test_migrations_autogenerate import comparators, migration_context, run_code
from tests.secret_tables import SECRETS

KEY = "tenant:t1:stripe:apiKey"
NAMES = {"lucent_secrets", "lucent_secret_versions", "lucent_secret_states"}


def migrate(engine: Engine, work: Callable[[Any], None]) -> None:
    with engine.begin() as connection:
        work(Operations(MigrationContext.configure(connection)))


def generated(engine: Engine, metadata: sa.MetaData) -> tuple[str, str]:
    """What autogenerate writes for upgrade and downgrade."""
    with engine.connect() as connection:
        context = migration_context(connection)
        script = produce_migrations(context, metadata)
        assert script.upgrade_ops is not None
        assert script.downgrade_ops is not None
        upgrade, downgrade = (
            render_python_code(
                ops, render_item=lucent_migrations.render_item, migration_context=context
            )
            for ops in (script.upgrade_ops, script.downgrade_ops)
        )
    return upgrade, downgrade


@comparators
def test_autogenerate_brings_an_existing_table_up_to_it(engine: Engine) -> None:
    SECRETS.create(engine)
    with Session(engine) as session:
        LucentSecrets(session).set(KEY, "stored before")
        session.commit()

    upgrade, downgrade = generated(engine, LucentBase.metadata)
    assert upgrade.count("op.") == upgrade.count("op.upgrade_lucent_secrets()") == 1
    assert downgrade.count("op.") == downgrade.count("op.downgrade_lucent_secrets()") == 1

    with engine.begin() as connection:
        run_code(connection, upgrade)
    assert set(sa.inspect(engine).get_table_names()) == NAMES
    with engine.connect() as connection:
        assert compare_metadata(migration_context(connection), LucentBase.metadata) == []
    with Session(engine) as session:
        secrets = LucentSecrets(session, keep=2)
        secrets.set(KEY, "new")
        assert secrets.require(KEY, stage="previous") == "stored before"
        session.commit()

    with engine.begin() as connection, pytest.raises(RotationError, match="holds 1 versions"):
        run_code(connection, downgrade)
    with Session(engine) as session:
        LucentSecrets(session, keep=1).set(KEY, "newer")
        session.commit()
    with engine.begin() as connection:
        run_code(connection, downgrade)
    assert sa.inspect(engine).get_table_names() == ["lucent_secrets"]
    with Session(engine) as session:
        assert LucentSecrets(session).require(KEY) == "newer"


@comparators
def test_a_new_database_gets_all_tables(engine: Engine) -> None:
    upgrade, _ = generated(engine, LucentBase.metadata)
    assert "op.create_table('lucent_secrets'" in upgrade
    assert "op.upgrade_lucent_secrets()" in upgrade
    migrate(engine, lambda op: op.create_lucent_secrets())
    with engine.begin() as connection:
        run_code(connection, generated(engine, LucentBase.metadata)[0])
    with engine.connect() as connection:
        assert compare_metadata(migration_context(connection), LucentBase.metadata) == []


@comparators
def test_a_model_of_ones_own_is_named(engine: Engine) -> None:
    class Base(DeclarativeBase):
        pass

    @with_lifecycle
    class AppSecret(LucentSecretMixin, Base):
        __tablename__ = "app_secrets"

    Base.metadata.tables["app_secrets"].create(engine)
    upgrade, downgrade = generated(engine, Base.metadata)
    assert "op.upgrade_lucent_secrets('app_secrets')" in upgrade
    assert "op.downgrade_lucent_secrets('app_secrets')" in downgrade
    with engine.begin() as connection:
        run_code(connection, upgrade)
    with Session(engine) as session:
        secrets = LucentSecrets(session, model=AppSecret, keep=2)
        secrets.set(KEY, 1)
        secrets.set(KEY, 2)
        assert secrets.require(KEY, version=1) == 1


@comparators
def test_tables_of_others_that_are_named_like_them_are_created_as_they_are(engine: Engine) -> None:
    others = sa.MetaData()
    for name in ("orders", "order_versions", "order_states"):
        sa.Table(name, others, sa.Column("id", sa.Integer, primary_key=True))
    upgrade, _ = generated(engine, others)
    assert upgrade.count("op.") == upgrade.count("op.create_table(") == 3


def test_force_drops_versions(engine: Engine) -> None:
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        LucentSecrets(session).set(KEY, 1)
        LucentSecrets(session).delete(KEY, purge_after=timedelta(days=1))
        session.commit()
    with pytest.raises(RotationError, match="force=True"):
        migrate(engine, lambda op: op.downgrade_lucent_secrets())
    migrate(engine, lambda op: op.downgrade_lucent_secrets(force=True))
    assert sa.inspect(engine).get_table_names() == ["lucent_secrets"]


def test_operations_render_and_reverse() -> None:
    upgrade = lucent_migrations.UpgradeLucentSecretsOp("app_secrets", schema="vault")
    downgrade = upgrade.reverse()
    assert (downgrade.table_name, downgrade.schema, downgrade.force) == (
        "app_secrets",
        "vault",
        False,
    )
    assert downgrade.reverse().to_diff_tuple() == upgrade.to_diff_tuple()


def test_rotation_of_a_database_that_is_not_upgraded_goes_on(
    engine: Engine, promoted: Keyring
) -> None:
    SECRETS.create(engine)
    with Session(engine) as session:
        LucentSecrets(session).set(KEY, 1)
        session.commit()
    assert rotate(engine, keyring=promoted).rotated == 1
    assert [row.key_version for row in status(engine).rows] == ["v2"]
    retire_check(engine, "v1")
    versions = LucentBase.metadata.tables["lucent_secret_versions"]
    with pytest.raises(RotationError, match="lucent_secret_versions"):
        status(engine, versions)

    SECRETS.drop(engine)
    with pytest.raises(RotationError, match="not in this database"):
        status(engine)


def test_a_fence_keeps_versions_of_a_retired_key_out(engine: Engine, promoted: Keyring) -> None:
    LucentBase.metadata.create_all(engine)
    with Session(engine) as session:
        LucentSecrets(session, keyring=promoted, keep=3).set(KEY, 1)
        session.commit()
    set_default_keyring(promoted)
    with engine.connect() as connection:
        operations = Operations(migration_context(connection))
        for name in ("lucent_secrets", "lucent_secret_versions"):
            lucent_migrations.fence_key_version(name, "payload", "v1", operations=operations)
    with Session(engine) as session:
        old = LucentSecrets(session, keyring=promoted.with_primary("v1"), keep=3)
        with pytest.raises(sa.exc.DBAPIError):
            old.stage(KEY, 2)
    with Session(engine) as session:
        assert [v.number for v in LucentSecrets(session).versions(KEY)] == [1]
